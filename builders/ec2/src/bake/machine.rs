//! The instance while it runs, and after it has stopped.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::base::DiskFile;
use kiln_model::block::BlockSource;
use kiln_model::checkpoint::{Slot, Written};
use kiln_model::cleanup::Ticket;
use kiln_model::guest::{Command, Guest};
use kiln_model::image::CloudImage;
use kiln_model::machine::{AtCloud, Context, Files, Machine, Naming, Stopped};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use kiln_ssh::Target;

use super::Ec2Builder;
use super::capture::Captured;
use super::fetch::SnapshotSource;
use super::region::Region;
use super::settings::Settings;
use super::start::{Running, ended, explained};
use crate::api::Kind;
use crate::api::error::CallExt as _;
use crate::api::machines::InstanceState;

/// Asks the guest to power off. The first one that is there does it; none of
/// them waits for the end, which would cut the connection.
const POWER_OFF: &str = "systemctl --no-block poweroff 2>/dev/null || poweroff || halt -p";

/// How long the guest may take to answer that.
const ASKING: Duration = Duration::from_secs(30);

/// An instance whose guest answers.
pub(crate) struct Ec2Machine {
    running: Running,
    guest: Arc<dyn Guest>,
    target: Target,
    settings: Settings,
    kept: PathBuf,
    context: Context,
}

impl Ec2Machine {
    pub(crate) fn new(builder: &Ec2Builder, running: Running, guest: Arc<dyn Guest>, target: Target, context: &Context) -> Self {
        let (settings, kept) = (builder.settings.clone(), builder.around.kept.clone());
        Self { running, guest, target, settings, kept, context: context.clone() }
    }

    /// Stops the instance, from inside and outside: an image whose guest hears
    /// no power button stops from inside alone, and one that cannot be asked any
    /// more from outside.
    async fn power_off(&self) -> Result<()> {
        let Region { machines, calls, .. } = &self.running.region;
        let id = &self.running.instance.id;
        let _ = self.guest.execute(&Command::new(POWER_OFF).timeout(ASKING), &mut |_, _| {}).await;
        match calls.make_of_new(|| machines.stop(id)).await {
            // It is going, or gone, already.
            Err(error) if error.kind == Kind::State => Ok(()),
            done => done.trying_to(|| format!("stop the instance {id}")),
        }
    }
}

#[async_trait]
impl Machine for Ec2Machine {
    fn guest(&self) -> Arc<dyn Guest> {
        Arc::clone(&self.guest)
    }

    async fn ended(&self) -> Error {
        ended(&self.running.region, &self.running.instance.id).await
    }

    async fn checkpoint(&mut self, _: &Slot) -> Result<Option<Written>> {
        Ok(None)
    }

    fn checkpoint_size(&self) -> Option<u64> {
        None
    }

    async fn explain(&self, error: Error) -> Error {
        explained(&self.running.region, &self.running.instance.id, error).await
    }

    async fn stop(self: Box<Self>, deadline: Duration) -> Result<Box<dyn Stopped>> {
        let id = self.running.instance.id.clone();
        self.power_off().await?;
        let states = [InstanceState::Stopped, InstanceState::ShuttingDown, InstanceState::Terminated];
        match self.running.region.instance_in(&id, &states, deadline).await? {
            Some(instance) if instance.state == InstanceState::Stopped => {
                let Self { running, settings, context, .. } = *self;
                Ok(Box::new(Ec2Stopped { running: Some(running), settings, context, captured: None }))
            }
            Some(_) => Err(Error::new(Code::MachineEnded, format!("the instance {id} was terminated instead of stopped"))),
            None => {
                let error = Error::new(Code::Timeout, format!("the guest did not power off within {} s", deadline.as_secs()));
                let error = self.explain(error).await;
                self.kill().await;
                Err(error)
            }
        }
    }

    async fn kill(self: Box<Self>) {
        let Self { running, context, .. } = *self;
        remove(running, &context).await;
    }

    /// Leaves the instance running: it costs money until somebody ends it.
    async fn keep(self: Box<Self>) -> Result<String> {
        let Self { running, target, kept, context, .. } = *self;
        let folder = kept.join(&context.bake);
        let write = || -> std::io::Result<()> {
            use std::io::Write as _;
            use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
            let name = if target.port == 22 { target.host.clone() } else { format!("[{}]:{}", target.host, target.port) };
            let known = format!("{name} {}\n", target.keys.host_public());
            for (file, text) in [("id_ed25519", target.keys.client_private_openssh()), ("known_hosts", known.as_str())] {
                let path = folder.join(file);
                std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?.write_all(text.as_bytes())?;
            }
            Ok(())
        };
        write().trying(|| format!("write to {}", folder.display()))?;
        for made in [Some(&running.instance), running.group.as_ref(), Some(&running.key)].into_iter().flatten() {
            context.scope.forget(made.ticket)?;
        }
        let (id, region) = (&running.instance.id, &running.region.name);
        Ok(format!(
            "the instance runs on, and costs money: {id} in {region}\nlog in:    ssh -p {port} -i {folder}/id_ed25519 -o IdentitiesOnly=yes -o UserKnownHostsFile={folder}/known_hosts {user}@{host}\nremove it: kiln reap --ec2 {region} --bake {bake}; rm -r {folder}",
            port = target.port,
            folder = folder.display(),
            user = target.user,
            host = target.host,
            bake = context.bake,
        ))
    }
}

/// Ends an instance and what it used, and waits until all of it is gone.
pub(crate) async fn remove(running: Running, context: &Context) {
    let Running { instance, group, key, tunnel, .. } = running;
    if let Some(tunnel) = tunnel {
        tunnel.terminate();
    }
    for made in [Some(instance), group, Some(key)].into_iter().flatten() {
        if let Err(error) = context.scope.undo(made.ticket).await {
            context.reports.warn(error.chain());
        }
    }
}

/// An instance that has stopped; then, the image that was made of it.
pub(crate) struct Ec2Stopped {
    /// Gone once it is captured.
    running: Option<Running>,
    settings: Settings,
    context: Context,
    captured: Option<Captured>,
}

impl Ec2Stopped {
    fn captured(&mut self) -> Result<&mut Captured> {
        self.captured.as_mut().ok_or_else(|| Error::new(Code::Failed, "no image was made of the instance yet"))
    }
}

#[async_trait]
impl Stopped for Ec2Stopped {
    async fn blocks(&self) -> Result<Box<dyn BlockSource>> {
        let captured = self.captured.as_ref().ok_or_else(|| Error::new(Code::Failed, "no image was made of the instance yet"))?;
        let (region, snapshot) = captured.root_snapshot()?;
        let source = SnapshotSource::open(region.cloud.ebs(&region.name), region.calls.clone(), &snapshot).await?;
        Ok(Box::new(source))
    }

    async fn files(&self) -> Result<Option<Box<dyn Files>>> {
        Ok(None)
    }

    fn disk(&self) -> Option<DiskFile> {
        None
    }

    fn at_cloud(&mut self) -> Option<&mut dyn AtCloud> {
        Some(self)
    }
}

#[async_trait]
impl AtCloud for Ec2Stopped {
    async fn capture(&mut self, naming: &Naming) -> Result<CloudImage> {
        let Some(running) = &self.running else { return Err(Error::new(Code::Failed, "an image was made of the instance already")) };
        let captured = Captured::make(running, &self.settings, naming, &self.context).await?;
        let image = captured.first().clone();
        self.captured = Some(captured);
        if let Some(running) = self.running.take() {
            remove(running, &self.context).await;
        }
        Ok(image)
    }

    async fn spread(&mut self) -> Result<Vec<CloudImage>> {
        let (settings, context) = (self.settings.clone(), self.context.clone());
        self.captured()?.spread(&settings, &context).await
    }

    async fn finish(&mut self) -> Result<()> {
        self.captured()?.finish().await
    }

    fn tickets(&self) -> Vec<Ticket> {
        self.captured.as_ref().map(Captured::tickets).unwrap_or_default()
    }

    async fn recorded(&mut self, image: &Digest) {
        if let Some(captured) = &self.captured {
            captured.recorded(image, &self.context).await;
        }
    }
}

//! The machine while it runs, and after it has stopped.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln_disk::files::DiskFiles;
use kiln_disk::overlay::OverlayDisk;
use kiln_model::base::DiskFile;
use kiln_model::block::BlockSource;
use kiln_model::checkpoint::{Slot, Written};
use kiln_model::cleanup::Scope;
use kiln_model::guest::{Command, Guest};
use kiln_model::machine::{Context, Files, Machine, Stopped};
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_ssh::SshGuest;
use serde_json::Value;

use crate::agent::AgentGuest;
use crate::kept::Shown;
use crate::layers::Layers;
use crate::vm::{End, Vm};

/// Asks the guest to power off. The first one that is there does it; none of
/// them waits for the end, which would cut the connection.
const POWER_OFF: &str = "systemctl --no-block poweroff 2>/dev/null || poweroff || halt -p";

/// How long the guest may take to answer that.
const ASKING: Duration = Duration::from_secs(60);

/// How long a kept machine may take to write its files.
const SYNCING: Duration = Duration::from_secs(60);

/// A running machine.
pub(crate) struct QemuMachine {
    pub(crate) vm: Vm,
    pub(crate) ssh: Arc<SshGuest>,
    /// The faster way to the same guest, where checkpoints are wanted and it
    /// can have the agent.
    pub(crate) agent: Option<Arc<AgentGuest>>,
    pub(crate) layers: Layers,
    /// cloud-init's instance id.
    pub(crate) instance: String,
    /// A folder of this machine's own.
    pub(crate) folder: PathBuf,
    pub(crate) context: Context,
    pub(crate) shown: Shown,
}

#[async_trait]
impl Machine for QemuMachine {
    fn guest(&self) -> Arc<dyn Guest> {
        match &self.agent {
            Some(agent) => agent.clone(),
            None => self.ssh.clone(),
        }
    }

    async fn ended(&self) -> Error {
        let end = self.vm.end().await;
        self.vm.unexpected(end).await
    }

    async fn checkpoint(&mut self, slot: &Slot) -> Result<Option<Written>> {
        self.keep_in(slot).await.map(Some)
    }

    fn checkpoint_size(&self) -> Option<u64> {
        Some(self.kept_size())
    }

    async fn explain(&self, error: Error) -> Error {
        self.vm.explain(error, true).await
    }

    async fn stop(self: Box<Self>, deadline: Duration) -> Result<Box<dyn Stopped>> {
        let ended = tokio::select! {
            end = self.vm.end() => Ok(end),
            never = self.power_off() => match never {},
            () = tokio::time::sleep(deadline) => {
                let error = Error::new(Code::Timeout, format!("the guest did not power off within {} s", deadline.as_secs()));
                Err(self.vm.explain(error, true).await)
            }
        };
        match ended {
            Ok(End::PoweredOff) => {
                self.vm.quit().await?;
                Ok(Box::new(QemuStopped { layers: self.layers, folder: self.folder, scope: self.context.scope.clone() }))
            }
            Ok(end) => {
                let error = self.vm.unexpected(end).await;
                self.vm.kill().await;
                Err(error)
            }
            Err(error) => {
                self.vm.kill().await;
                Err(error)
            }
        }
    }

    async fn kill(self: Box<Self>) {
        self.vm.kill().await;
    }

    /// Keeps the *disk*: the machine itself ends with kiln, as nothing may
    /// outlive it unseen. Gives the commands that boot the disk and log in.
    async fn keep(self: Box<Self>) -> Result<String> {
        let guest = self.guest();
        let Self { vm, layers, context, shown, .. } = *self;
        // A guest that no longer answers is kept as it is.
        let _ = guest.execute(&Command::new("sync").timeout(SYNCING), &mut |_, _| {}).await;
        let _ = vm.qmp.execute("stop", Value::Null).await;
        vm.quit().await?;
        shown.keep(&layers.top(), &context).await
    }
}

enum Never {}

impl QemuMachine {
    /// Asks the guest to power off, by every way there is; its end is told by
    /// an event, not by this.
    async fn power_off(&self) -> Never {
        let asked = self.guest().execute(&Command::new(POWER_OFF).timeout(ASKING), &mut |_, _| {}).await;
        if !asked.is_ok_and(|exit| exit.success()) {
            // The connection may be gone because the guest is going; pressing
            // its power button then does no harm.
            let _ = self.vm.qmp.execute("system_powerdown", Value::Null).await;
        }
        std::future::pending().await
    }
}

/// A machine that has stopped: its disk.
struct QemuStopped {
    layers: Layers,
    folder: PathBuf,
    scope: Arc<Scope>,
}

impl QemuStopped {
    async fn open(&self) -> Result<OverlayDisk> {
        let (disk, folder, scope) = (self.layers.top(), self.folder.clone(), self.scope.clone());
        // Below the machine's own layers lies the base.
        let own = u32::try_from(self.layers.count()).unwrap_or(u32::MAX);
        let open = move || OverlayDisk::open(&disk, own, &folder, Some(&scope));
        tokio::task::spawn_blocking(open).await.trying(|| "open the stopped disk".into())?
    }
}

#[async_trait]
impl Stopped for QemuStopped {
    async fn blocks(&self) -> Result<Box<dyn BlockSource>> {
        Ok(Box::new(self.open().await?))
    }

    async fn files(&self) -> Result<Option<Box<dyn Files>>> {
        let disk = self.open().await?;
        let open = move || DiskFiles::open(Box::new(disk));
        let files = tokio::task::spawn_blocking(open).await.trying(|| "read the stopped disk".into())??;
        Ok(files.map(|files| Box::new(files) as Box<dyn Files>))
    }

    fn disk(&self) -> Option<DiskFile> {
        Some(self.layers.top())
    }
}

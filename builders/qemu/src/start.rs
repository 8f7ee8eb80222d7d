//! Starting a machine: from a base to a guest that answers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kiln_disk::gpt::{self, Grown};
use kiln_disk::nbd::{Access, Export};
use kiln_model::base::{Base, DiskFile};
use kiln_model::guest::{Command, Guest, GuestExt as _};
use kiln_model::machine::{Context, Start};
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_process as process;
use kiln_ssh::{Keys, SshGuest, Target};

use crate::accelerator::Chosen;
use crate::agent::AgentGuest;
use crate::command::{self, Descriptors, Ovmf, Shape};
use crate::kept::Shown;
use crate::layers::Layers;
use crate::machine::QemuMachine;
use crate::settings::Boot;
use crate::vm::{End, Surroundings, Vm};
use crate::{QemuBuilder, accelerator, private, ways_in};

/// Grows the root file system in the guest.
const GROW_ROOT: &str = include_str!("grow_root.sh");

/// How long that may take: it writes the tables of a large file system.
const GROWING: Duration = Duration::from_secs(600);

/// The only login that is used.
const USER: &str = "root";

/// A machine's own UEFI variables, in its folder.
pub(crate) const EFI_VARIABLES: &str = "efi-variables.fd";

/// What a machine is started with: files in a folder of its own, and its keys.
pub(crate) struct Body {
    pub(crate) folder: PathBuf,
    pub(crate) layers: Layers,
    pub(crate) ovmf: Option<Ovmf>,
    /// cloud-init's instance id.
    pub(crate) instance: String,
    pub(crate) keys: Arc<Keys>,
    pub(crate) credential: Option<PathBuf>,
    pub(crate) seed: Option<PathBuf>,
}

impl QemuBuilder {
    /// What accelerates this builder's machines; chosen, and told, once.
    pub(crate) async fn accelerator(&self, context: &Context) -> Result<&Chosen> {
        let choose = || async {
            let chosen = accelerator::choose(self.settings.accelerator, &self.settings.binary, &context.work, &context.scope).await?;
            context.reports.note(format!("accelerator {}: {}", chosen.name(), chosen.why));
            Ok(chosen)
        };
        self.chosen.get_or_try_init(choose).await
    }

    /// Boots a fresh machine from `base`.
    pub(crate) async fn start_machine(&self, base: &Base, start: &Start, context: &Context) -> Result<QemuMachine> {
        let base = &self.check(base)?;
        let boot = command::boot(&self.settings, base.firmware)?;
        let folder = machine_folder(&context.work)?;
        let disk = base.file()?;
        let size = start.disk_size.unwrap_or(disk.size);
        let layers = Layers::create(disk, &folder, size).await?;
        if size > disk.size {
            grow_partition(&layers.top(), &folder, context).await?;
        }
        let ovmf = (boot == Boot::Uefi).then(|| Ovmf::install(folder.join(EFI_VARIABLES))).transpose()?;
        let instance = format!("kiln-{}", context.bake.to_ascii_lowercase());
        let body = self.body(base, start, folder, layers, ovmf, instance)?;
        self.boot(body, start, context).await
    }

    /// Makes a machine's keys, and the ways in that carry them.
    pub(crate) fn body(
        &self,
        base: &Base,
        start: &Start,
        folder: PathBuf,
        layers: Layers,
        ovmf: Option<Ovmf>,
        instance: String,
    ) -> Result<Body> {
        let keys = Arc::new(Keys::generate()?);
        let ways = ways_in::ways(&keys, base.credentials, start.user_data.as_deref(), &instance)?;
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            private::write(&path, bytes).trying(|| format!("write {}", path.display())).map(|()| path)
        };
        let credential = ways.credential.map(|text| write("credential", text.as_bytes())).transpose()?;
        let seed = ways.seed.map(|bytes| write("seed.img", &bytes)).transpose()?;
        Ok(Body { folder, layers, ovmf, instance, keys, credential, seed })
    }

    /// Starts a machine on its layers and waits until its guest answers.
    pub(crate) async fn boot(&self, body: Body, start: &Start, context: &Context) -> Result<QemuMachine> {
        let vm = self.launch(&body, false, start, context).await?;
        let chosen = self.accelerator(context).await?;
        let limit = self.settings.boot_timeout.unwrap_or_else(|| chosen.boot_timeout());
        match reach(&vm, &body, start, limit, context).await {
            Ok((ssh, agent)) => Ok(self.machine(vm, body, chosen, ssh, agent, context)),
            Err(error) => {
                vm.kill().await;
                Err(error)
            }
        }
    }

    /// Starts QEMU; a machine that is `resumed` waits for its devices' state.
    pub(crate) async fn launch(&self, body: &Body, resumed: bool, start: &Start, context: &Context) -> Result<Vm> {
        let shape = Shape {
            settings: &self.settings,
            kvm: self.accelerator(context).await?.kvm,
            ovmf: body.ovmf.as_ref(),
            disk: &body.layers,
            credential: body.credential.as_deref(),
            seed: body.seed.as_deref(),
            resumed,
            ports: &start.ports,
            sandbox: true,
            descriptors: Descriptors::default(),
        };
        let around = Surroundings {
            scope: context.scope.clone(),
            redactor: context.reports.redactor().clone(),
            diagnostics: self.diagnostics.clone(),
            name: context.bake.clone(),
        };
        Vm::start(shape, around).await
    }

    pub(crate) fn machine(
        &self,
        vm: Vm,
        body: Body,
        chosen: &Chosen,
        ssh: Arc<SshGuest>,
        agent: Option<Arc<AgentGuest>>,
        context: &Context,
    ) -> QemuMachine {
        let Body { folder, layers, ovmf, instance, keys, credential, seed } = body;
        let shown = Shown {
            settings: self.settings.clone(),
            kvm: chosen.kvm,
            uefi: ovmf.is_some(),
            folder: self.kept.join(&context.bake),
            keys,
            credential,
            seed,
        };
        QemuMachine { vm, ssh, agent, layers, instance, folder, context: context.clone(), shown }
    }

    /// Whether this builder can start `base` at all; gives it with its disk by
    /// the one path that is the same whichever way leads to it.
    pub(crate) fn check(&self, base: &Base) -> Result<Base> {
        if base.architecture != "amd64" {
            let error = Error::new(Code::Base, format!("the base is for {}, and this builder runs amd64 only", base.architecture));
            return Err(error.next("use a base for amd64"));
        }
        if process::find(&self.settings.binary).is_none() {
            let error = Error::new(Code::Missing, format!("the program `{}` is missing on this machine", self.settings.binary));
            let hint = process::install_hint(&self.settings.binary);
            return Err(match hint {
                Some(hint) => error.next(format!("install it with `{hint}`; `kiln doctor` shows everything that is needed")),
                None => error.next("correct `binary` in [builder.qemu]"),
            });
        }
        let disk = base.file()?;
        let path = std::fs::canonicalize(&disk.path).trying(|| format!("find {}", disk.path.display()))?;
        Ok(Base { disk: DiskFile { path, ..disk.clone() }.into(), ..base.clone() })
    }
}

/// Where the guest's sshd is.
pub(crate) async fn target(vm: &Vm, body: &Body, start: &Start) -> Result<Target> {
    let usernet = vm.qmp.monitor("info usernet").await?;
    let port = command::ssh_port(&usernet, &start.ports)
        .ok_or_else(|| Error::new(Code::Failed, "QEMU does not tell which port leads to the guest").detail(usernet))?;
    Ok(Target { host: "127.0.0.1".into(), port, user: USER.into(), keys: body.keys.clone(), folder: body.folder.clone() })
}

/// Waits for the guest, puts the agent into it where checkpoints are wanted,
/// and makes its root as large as its disk.
async fn reach(
    vm: &Vm,
    body: &Body,
    start: &Start,
    limit: Duration,
    context: &Context,
) -> Result<(Arc<SshGuest>, Option<Arc<AgentGuest>>)> {
    let target = target(vm, body, start).await?;
    let guest = tokio::select! {
        guest = kiln_ssh::connect(target, limit) => match guest {
            Ok(guest) => guest,
            // Another host answered: its console would not explain it.
            Err(error) if error.kind() == Code::HostKey => return Err(error),
            Err(error) => {
                let error = error.next("read the console's end below; a guest that is only slow needs a longer `boot_timeout` in [builder.qemu]");
                return Err(vm.explain(error, true).await);
            }
        },
        end = vm.end() => {
            let error = vm.unexpected(end).await;
            return Err(match end {
                End::Hopeless(_) => error.code(Code::Unreachable).next("boot the base by hand to see what it lacks"),
                _ => error,
            });
        }
    };
    let prepared = async {
        let port = if start.checkpoints { vm.take_agent() } else { None };
        let agent = match port {
            Some(port) => AgentGuest::bring(port, &guest).await.map(Some),
            None => Ok(None),
        };
        let agent = agent.unwrap_or_else(|error| {
            context.reports.note(format!("checkpoints of this machine hold its disk alone: {}", error.chain()));
            None
        });
        let way: &dyn Guest = match &agent {
            Some(agent) => {
                // A session would be in every checkpoint's memory.
                guest.close().await;
                &**agent
            }
            None => &*guest,
        };
        if start.disk_size.is_some() {
            grow_root(way).await?;
        }
        Ok(agent)
    };
    tokio::select! {
        agent = prepared => Ok((guest, agent?)),
        end = vm.end() => Err(vm.unexpected(end).await),
    }
}

async fn grow_root(guest: &dyn Guest) -> Result<()> {
    let output = guest.output(&Command::new("exec sh -s").stdin(GROW_ROOT).timeout(GROWING)).await?;
    if output.exit.success() {
        return Ok(());
    }
    let error = Error::new(Code::Failed, format!("cannot grow the guest's root file system ({})", output.exit));
    Err(error
        .detail(format!("{}{}", output.stdout, output.stderr))
        .next("leave out `size` in [disk], or give the base growpart and its file system's tools"))
}

/// A folder for one machine of a bake: there may be several.
pub(crate) fn machine_folder(work: &Path) -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let folder = work.join(format!("machine-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
    let folder = std::path::absolute(&folder).trying(|| format!("find {}", folder.display()))?;
    private::folder(&folder).trying(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

/// Moves the partition table along on the overlay, through NBD: the base is
/// never touched.
async fn grow_partition(disk: &DiskFile, folder: &Path, context: &Context) -> Result<Grown> {
    let (disk, folder, scope) = (disk.clone(), folder.to_owned(), context.scope.clone());
    let work = move || -> Result<Grown> {
        let export = Export::start(&disk, Access::Write, &folder, Some(&scope))?;
        let mut client = export.connect()?;
        let grown = gpt::grow(&mut client).trying(|| "grow the partition on the new disk".into())?;
        client.flush().trying(|| "write the partition table of the new disk".into())?;
        drop(client);
        export.close()?;
        Ok(grown)
    };
    tokio::task::spawn_blocking(work).await.trying(|| "grow the partition on the new disk".into())?
}

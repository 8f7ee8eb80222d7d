//! Starting a machine: from a base to a guest that answers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kiln_disk::gpt::{self, Grown};
use kiln_disk::nbd::{Access, Export};
use kiln_disk::{process, qemu_img};
use kiln_model::base::{Base, DiskFile};
use kiln_model::guest::{Command, Guest, GuestExt as _};
use kiln_model::machine::{Context, Start};
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_ssh::{Keys, SshGuest, Target};

use crate::accelerator::Chosen;
use crate::command::{self, Descriptors, Ovmf, Shape};
use crate::kept::Shown;
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

    pub(crate) async fn start_machine(&self, base: &Base, start: &Start, context: &Context) -> Result<QemuMachine> {
        self.check(base)?;
        let chosen = self.accelerator(context).await?;
        let boot = command::boot(&self.settings, base.firmware)?;
        let folder = machine_folder(&context.work)?;

        let size = start.disk_size.unwrap_or(base.disk.size);
        let disk = qemu_img::create_overlay(&base.disk, &folder.join("disk.qcow2"), size).await?;
        if size > base.disk.size {
            grow_partition(&disk, &folder, context).await?;
        }
        let keys = Arc::new(Keys::generate()?);
        let instance = format!("kiln-{}", context.bake.to_ascii_lowercase());
        let ways = ways_in::ways(&keys, base.credentials, start.user_data.as_deref(), &instance)?;
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            private::write(&path, bytes).trying(|| format!("write {}", path.display())).map(|()| path)
        };
        let credential = ways.credential.map(|text| write("credential", text.as_bytes())).transpose()?;
        let seed = ways.seed.map(|bytes| write("seed.img", &bytes)).transpose()?;
        let ovmf = (boot == Boot::Uefi).then(|| Ovmf::install(folder.join("efi-variables.fd"))).transpose()?;

        let shape = Shape {
            settings: &self.settings,
            kvm: chosen.kvm,
            ovmf: ovmf.as_ref(),
            overlay: &disk.path,
            base: &base.disk,
            credential: credential.as_deref(),
            seed: seed.as_deref(),
            ports: &start.ports,
            sandbox: true,
            descriptors: Descriptors { qmp: 0, serial: 0, firmware: 0 },
        };
        let around = Surroundings {
            scope: context.scope.clone(),
            redactor: context.reports.redactor().clone(),
            diagnostics: self.diagnostics.clone(),
            name: context.bake.clone(),
        };
        let vm = Vm::start(shape, around).await?;
        let limit = self.settings.boot_timeout.unwrap_or_else(|| chosen.boot_timeout());
        match reach(&vm, &keys, &folder, start, limit).await {
            Ok(guest) => Ok(QemuMachine {
                vm,
                guest,
                shown: Shown {
                    settings: self.settings.clone(),
                    kvm: chosen.kvm,
                    uefi: boot == Boot::Uefi,
                    folder: self.kept.join(&context.bake),
                    keys,
                    credential,
                    seed,
                },
                disk,
                folder,
                context: context.clone(),
            }),
            Err(error) => {
                vm.kill().await;
                Err(error)
            }
        }
    }

    fn check(&self, base: &Base) -> Result<()> {
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
        Ok(())
    }
}

/// Waits for the guest, and makes its root as large as its disk.
async fn reach(vm: &Vm, keys: &Arc<Keys>, folder: &Path, start: &Start, limit: Duration) -> Result<Arc<SshGuest>> {
    let usernet = vm.qmp.monitor("info usernet").await?;
    let port = command::ssh_port(&usernet, &start.ports)
        .ok_or_else(|| Error::new(Code::Failed, "QEMU does not tell which port leads to the guest").detail(usernet))?;
    let target = Target { host: "127.0.0.1".into(), port, user: USER.into(), keys: keys.clone(), folder: folder.to_owned() };
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
    if start.disk_size.is_some() {
        tokio::select! {
            grown = grow_root(&*guest) => grown?,
            end = vm.end() => return Err(vm.unexpected(end).await),
        }
    }
    Ok(guest)
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
fn machine_folder(work: &Path) -> Result<PathBuf> {
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

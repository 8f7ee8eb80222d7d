//! Checkpoints: keeping a machine as it stands, and going on from there.
//!
//! **Keeping.** The agent writes the guest's file systems out and freezes all
//! of its processes; QEMU stops the processors. The top layer of the disk is
//! frozen by putting an empty one on it ([`crate::layers`]), memory and devices
//! are written as a migration stream, and everything goes on. Nothing of the
//! disk is copied. Memory that QEMU shares with a file would make the stream
//! small (`x-ignore-shared`), and every boot and step a third slower: the kernel
//! gives shared memory no huge pages.
//!
//! **Going on.** A fresh QEMU gets links to the frozen layers with an empty one
//! on them, and the stream, whose digest the cache has compared. Its guest is
//! not a twin of the one that was kept: its processes are still frozen when the
//! agent gets, as the first thing that runs, entropy from this machine (and
//! tells the kernel to reseed its generator from it), the time, and this
//! bake's keys. Only then do they go on. The credential and the seed carry the
//! new keys too, so that they are right after a reboot.
//!
//! **Where memory cannot be used**, because none was kept (a secret was there)
//! or QEMU, the processor or the machine's shape is another, the guest boots
//! from the frozen layers.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, SystemTime};

use kiln_model::base::Base;
use kiln_model::checkpoint::{Checkpoint, KeptFile, Slot, Written};
use kiln_model::guest::Command;
use kiln_model::key::KeyHasher;
use kiln_model::machine::{Context, Machine as _, Portable, Start};
use kiln_model::{Code, Error, Key, Result, ResultExt as _};
use kiln_process as process;
use kiln_ssh::SshGuest;
use serde::{Deserialize, Serialize};

use crate::agent::{self, AgentGuest, Refresh};
use crate::command::{self, Ovmf};
use crate::layers::Layers;
use crate::machine::QemuMachine;
use crate::settings::Boot;
use crate::start::{EFI_VARIABLES, machine_folder, target};
use crate::{QemuBuilder, private, ways_in};

/// Version of the machine's shape and of what a checkpoint holds. A change
/// makes every kept memory useless.
const SHAPE: &str = "2";

/// The state of memory and devices, in a checkpoint's folder.
const STATE: &str = "state";

/// How long a guest without an agent may take to write its files.
const SYNCING: Duration = Duration::from_secs(120);

/// How long the agent of a resumed guest may take to make it fresh. Its
/// processors may be emulated on a busy machine.
const REFRESHING: Duration = Duration::from_secs(60);

/// What the builder remembers of a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    layers: usize,
    /// Virtual size of the disk in bytes.
    size: u64,
    /// What the lowest layer lies on.
    base: std::path::PathBuf,
    base_format: String,
    uefi: bool,
    /// cloud-init's instance id.
    instance: String,
}

impl QemuBuilder {
    /// What the memory of a machine that is started from `base` depends on
    /// beside what was done to it.
    pub(crate) async fn shape_key(&self, step: &Key, base: &Base, context: &Context) -> Result<Option<Key>> {
        if agent::BINARY.is_none() {
            return Ok(None);
        }
        let chosen = self.accelerator(context).await?;
        let boot = command::boot(&self.settings, base.firmware)?;
        let mut hasher = KeyHasher::new("memory");
        hasher.field("step", step.hex()).field("shape", SHAPE).field("agent", agent::VERSION.to_string());
        hasher.field("memory", self.settings.memory.to_string()).field("cpus", self.settings.cpus.to_string());
        hasher.field("firmware", if boot == Boot::Uefi { "uefi" } else { "bios" });
        hasher.field("seed", if base.credentials == Some(true) { "no" } else { "yes" });
        hasher.field("accelerator", chosen.name()).field("cpu", cpu(chosen.kvm));
        hasher.field("qemu", emulator(&self.settings.binary)?);
        Ok(Some(hasher.finish()))
    }

    /// The disk of a checkpoint: all its files but the state of memory.
    pub(crate) fn portable_files(checkpoint: &Checkpoint) -> Option<Portable> {
        let mut note: Note = serde_json::from_value(checkpoint.note.clone()).ok()?;
        // Of no use elsewhere, and nobody's business.
        note.base = std::path::PathBuf::new();
        let files = checkpoint.files.iter().map(|kept| kept.name.clone()).filter(|name| name != STATE).collect();
        Some(Portable { files, note: serde_json::to_value(note).ok()? })
    }

    /// Goes on from `checkpoint`; `None` when it is of a machine with another
    /// firmware.
    ///
    /// # Errors
    /// [`Code::DigestMismatch`] when its memory is damaged.
    pub(crate) async fn resume_machine(
        &self,
        base: &Base,
        checkpoint: &Checkpoint,
        start: &Start,
        context: &Context,
    ) -> Result<Option<QemuMachine>> {
        let base = &self.check(base)?;
        let Ok(note) = serde_json::from_value::<Note>(checkpoint.note.clone()) else { return Ok(None) };
        let boot = command::boot(&self.settings, base.firmware)?;
        if note.uefi != (boot == Boot::Uefi) {
            return Ok(None);
        }
        // The step's key names the base's content: where the file is another,
        // it holds the same.
        let disk = base.file()?;
        let moved = note.base != disk.path || note.base_format != disk.format.name();
        let folder = machine_folder(&context.work)?;
        let layers = Layers::resume(disk, &checkpoint.folder, note.layers, &folder, note.size, moved).await?;
        let ovmf = match boot {
            Boot::Bios => None,
            Boot::Uefi => {
                let kept = checkpoint.folder.join(EFI_VARIABLES);
                Some(Ovmf::with(&kept, folder.join(EFI_VARIABLES))?)
            }
        };
        let body = self.body(base, start, folder, layers, ovmf, note.instance)?;
        let memory = match (&checkpoint.memory, self.shape_key(&checkpoint.step, base, context).await?) {
            (Some(kept), Some(wanted)) => *kept == wanted,
            _ => false,
        };
        if memory { self.go_on(body, checkpoint, start, context).await.map(Some) } else { self.boot(body, start, context).await.map(Some) }
    }

    /// Goes on with memory.
    async fn go_on(&self, body: crate::start::Body, checkpoint: &Checkpoint, start: &Start, context: &Context) -> Result<QemuMachine> {
        let vm = self.launch(&body, true, start, context).await?;
        let work = async {
            let path = checkpoint.folder.join(STATE);
            let file = std::fs::File::open(&path).trying(|| format!("read {}", path.display()))?;
            vm.load_state(file.into()).await?;
            let ssh = SshGuest::unconnected(target(&vm, &body, start).await?);
            let port = vm.take_agent().ok_or_else(|| Error::new(Code::Failed, "the agent's port is taken"))?;
            let refresh = Refresh { seed: entropy()?, now: SystemTime::now(), files: ways_in::files(&body.keys) };
            // The agent's first words wait in its port when the processors start.
            let (guest, ()) = tokio::try_join!(AgentGuest::wake(port, &ssh, refresh, REFRESHING), vm.go_on())?;
            Ok((ssh, guest))
        };
        let done = tokio::select! {
            done = work => done,
            end = vm.end() => Err(vm.unexpected(end).await),
        };
        match done {
            Ok((ssh, guest)) => {
                let chosen = self.accelerator(context).await?;
                Ok(self.machine(vm, body, chosen, ssh, Some(guest), context))
            }
            Err(error) => {
                vm.kill().await;
                Err(error)
            }
        }
    }
}

impl QemuMachine {
    /// See [`kiln_model::machine::Machine::checkpoint`].
    pub(crate) async fn keep_in(&mut self, slot: &Slot) -> Result<Written> {
        let agent = self.agent.clone().filter(|agent| agent.is_there());
        let still = match &agent {
            Some(agent) => match agent.quiesce().await {
                Ok(()) => true,
                Err(error) => {
                    self.context.reports.note(format!("the checkpoint holds the disk alone: {}", error.chain()));
                    false
                }
            },
            None => false,
        };
        if !still {
            self.guest().execute(&Command::new("sync").timeout(SYNCING), &mut |_, _| {}).await?;
        }
        let kept = match self.vm.pause().await {
            Ok(()) => {
                let kept = self.write_to(slot, still && slot.memory.is_some()).await;
                // Whatever came of it, the guest goes on.
                self.vm.go_on().await.map_err(stuck)?;
                kept
            }
            Err(error) => Err(error),
        };
        if let (Some(agent), true) = (&agent, still) {
            agent.thaw().await.map_err(stuck)?;
        }
        kept
    }

    /// Writes a machine that stands still.
    async fn write_to(&mut self, slot: &Slot, with_memory: bool) -> Result<Written> {
        let top = self.layers.push().await?;
        if let Err(error) = self.vm.freeze_disk(self.layers.count() - 1, &top).await {
            self.layers.pop();
            return Err(error);
        }
        let mut files: Vec<KeptFile> = self.layers.link_frozen(&slot.folder)?.into_iter().map(plain).collect();
        if self.shown.uefi {
            let variables = self.folder.join(EFI_VARIABLES);
            let copy = || private::write(&slot.folder.join(EFI_VARIABLES), &std::fs::read(&variables)?);
            copy().trying(|| format!("copy {}", variables.display()))?;
            files.push(plain(EFI_VARIABLES.into()));
        }
        if with_memory {
            let path = slot.folder.join(STATE);
            private::write(&path, &[]).trying(|| format!("make {}", path.display()))?;
            let file = std::fs::File::options().write(true).open(&path).trying(|| format!("write {}", path.display()))?;
            self.vm.save_state(OwnedFd::from(file)).await?;
            files.push(plain(STATE.into()));
        }
        let base = self.layers.base();
        let note = Note {
            layers: self.layers.count() - 1,
            size: self.layers.top().size,
            base: base.path.clone(),
            base_format: base.format.name().to_owned(),
            uefi: self.shown.uefi,
            instance: self.instance.clone(),
        };
        let note = serde_json::to_value(note).trying(|| "describe the checkpoint".into())?;
        Ok(Written { memory: with_memory, files, note })
    }

    /// Bytes that a checkpoint would take now, about. Much of the memory that a
    /// guest has ever touched, in huge pages, is zero.
    pub(crate) fn kept_size(&self) -> u64 {
        let allocated = |path: &Path| std::fs::metadata(path).map_or(0, |meta| std::os::unix::fs::MetadataExt::blocks(&meta) * 512);
        self.vm.resident() / 2 + allocated(&self.layers.top().path)
    }
}

/// The error for a machine that does not go on after a checkpoint.
fn stuck(error: Error) -> Error {
    Error::new(Code::MachineEnded, "the machine did not go on after a checkpoint").because(error)
}

/// A file that the cache is to digest.
fn plain(name: String) -> KeptFile {
    KeptFile { name, length: 0, digest: String::new() }
}

/// 512 bytes that the guest's generator is seeded with.
fn entropy() -> Result<[u8; 512]> {
    use std::io::Read as _;
    let mut seed = [0; 512];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut seed));
    read.trying(|| "read /dev/urandom".into()).map(|()| seed)
}

/// What a guest sees of the processor: a guest that knows of an instruction
/// cannot go on where it is missing.
fn cpu(kvm: bool) -> String {
    if !kvm {
        return command::TCG_CPU.to_owned();
    }
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    [line("model name"), line("microcode"), line("flags")].join("\n")
}

/// Which QEMU it is: its file says so without running it.
fn emulator(binary: &str) -> Result<String> {
    use std::os::unix::fs::MetadataExt as _;
    let path =
        process::find(binary).ok_or_else(|| Error::new(Code::Missing, format!("the program `{binary}` is missing on this machine")))?;
    let path = std::fs::canonicalize(&path).trying(|| format!("find {}", path.display()))?;
    let meta = std::fs::metadata(&path).trying(|| format!("read {}", path.display()))?;
    Ok(format!("{} {} {}.{}", path.display(), meta.size(), meta.mtime(), meta.mtime_nsec()))
}

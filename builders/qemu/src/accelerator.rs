//! Which accelerator to use.
//!
//! That `/dev/kvm` opens, and that a virtual machine can be created with it,
//! proves nothing: inside some virtual machines both succeed and every guest
//! hangs (`facts.md`). So a guest of one sector ([`PROBE`], from
//! `probe/probe.s`) is run: it enters long mode, takes a timer interrupt, and
//! ends QEMU with a known status, within a fraction of a second where KVM works.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kiln_model::cleanup::Scope;
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_process as process;
use serde_json::json;

use crate::settings::Accelerator;

/// The guest: a boot sector. Its source is `probe/probe.s`.
const PROBE: &[u8; 512] = include_bytes!("probe/probe.bin");

/// The status with which the guest ends QEMU: `0x31 << 1 | 1`.
const PROVEN: i32 = 99;

/// How long the guest may take. KVM needs 0.2 s; this leaves room for a host
/// that is busy, and is all that a KVM which hangs can cost.
const LIMIT: Duration = Duration::from_secs(4);

/// The size of the guest's disk in bytes: SeaBIOS reads from no disk that is
/// smaller than a cylinder.
const DISK: u64 = 8 << 20;

/// What runs the guest, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Whether it is KVM; TCG otherwise.
    pub kvm: bool,
    /// Why, in a few words; follows "accelerator kvm:".
    pub why: String,
}

impl Chosen {
    /// QEMU's name of it.
    pub fn name(&self) -> &'static str {
        if self.kvm { "kvm" } else { "tcg" }
    }

    /// How long a guest may take until it answers, where nothing else is said:
    /// generous, for a cold boot on a slow and busy machine.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(if self.kvm { 180 } else { 600 })
    }
}

/// Chooses what `wanted` says. The probe's disk is written to `work`.
///
/// # Errors
/// [`Code::Missing`] when KVM is asked for and does not work, with why and what
/// to do; or when QEMU is missing.
pub(crate) async fn choose(wanted: Accelerator, binary: &str, work: &Path, scope: &Scope) -> Result<Chosen> {
    if wanted == Accelerator::Tcg {
        return Ok(Chosen { kvm: false, why: "as the template says".into() });
    }
    let refused = match cheap_refusal() {
        Some(refused) => refused,
        None => match proves_itself(binary, "kvm", work, scope).await {
            Ok(Probe::Proven(took)) => {
                return Ok(Chosen { kvm: true, why: format!("a probe guest ran under it in {:.1} s", took.as_secs_f64()) });
            }
            Ok(Probe::Hung) => Refused::new(
                format!("/dev/kvm opens, but a probe guest did nothing for {} s under it", LIMIT.as_secs()),
                "if this is a virtual machine, enable nested virtualisation for it",
            ),
            Ok(Probe::Failed(words)) => Refused::new(format!("QEMU cannot use /dev/kvm: {words}"), "see the message of QEMU"),
            Err(error) => return Err(error),
        },
    };
    if wanted == Accelerator::Kvm {
        let error = Error::new(Code::Missing, format!("accelerator \"kvm\" does not work here: {}", refused.why));
        return Err(error.next(format!("{}; or set accelerator = \"auto\"", refused.next)));
    }
    Ok(Chosen { kvm: false, why: refused.why })
}

/// Why KVM is not used, and what would help.
struct Refused {
    why: String,
    next: String,
}

impl Refused {
    fn new(why: impl Into<String>, next: impl Into<String>) -> Self {
        Self { why: why.into(), next: next.into() }
    }
}

/// What can be told without running anything.
fn cheap_refusal() -> Option<Refused> {
    if std::env::consts::ARCH != "x86_64" {
        return Some(Refused::new("the guest is x86_64 and this machine is not", "bake on an x86_64 machine"));
    }
    let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    let cpu = std::fs::read_to_string("/proc/cpuinfo").ok();
    refusal(opened.as_ref().err().map(std::io::Error::kind), cpu.as_deref())
}

/// As [`cheap_refusal`], of how opening `/dev/kvm` failed and what
/// `/proc/cpuinfo` says.
fn refusal(failed: Option<std::io::ErrorKind>, cpuinfo: Option<&str>) -> Option<Refused> {
    use std::io::ErrorKind;
    const NESTED: &str =
        "if this is a virtual machine, enable nested virtualisation for it; otherwise enable virtualisation in its firmware";
    match failed {
        Some(ErrorKind::NotFound) => return Some(Refused::new("there is no /dev/kvm", NESTED)),
        Some(ErrorKind::PermissionDenied) => {
            return Some(Refused::new(
                "you may not open /dev/kvm",
                "add yourself to its group: sudo usermod -aG kvm \"$USER\", then log in again",
            ));
        }
        Some(kind) => return Some(Refused::new(format!("/dev/kvm does not open ({kind})"), NESTED)),
        None => {}
    }
    let flags = cpuinfo?.lines().find(|line| line.starts_with("flags"))?;
    let has = |wanted: &str| flags.split_whitespace().any(|flag| flag == wanted);
    if has("vmx") || has("svm") {
        return None;
    }
    Some(Refused::new("/dev/kvm opens, but this CPU offers neither vmx nor svm", NESTED))
}

enum Probe {
    Proven(Duration),
    Hung,
    Failed(String),
}

/// Runs the probe guest under `accelerator`.
async fn proves_itself(binary: &str, accelerator: &str, work: &Path, scope: &Scope) -> Result<Probe> {
    let path = work.join("accelerator-probe.raw");
    let disk = || -> std::io::Result<()> {
        std::fs::write(&path, PROBE)?;
        std::fs::File::options().write(true).open(&path)?.set_len(DISK)
    };
    disk().trying(|| format!("write {}", path.display()))?;
    let file = json!({ "driver": "raw", "node-name": "probe", "read-only": true, "file": { "driver": "file", "filename": path } });
    let mut command: Command = process::piped(binary);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-m", "16", "-accel", accelerator]);
    command.args(["-machine", "q35,sata=off,smbus=off,usb=off,vmport=off,i8042=off"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-blockdev", &file.to_string()]);
    command.args(["-device", "virtio-blk-pci,drive=probe,bootindex=0"]);
    let since = std::time::Instant::now();
    let (child, ticket) = process::spawn_registered(scope, command, "the accelerator's probe", Vec::new())?;
    let ended = tokio::time::timeout(LIMIT, child.ended()).await;
    scope.undo(ticket).await?;
    let _ = std::fs::remove_file(&path);
    Ok(match ended {
        Ok(status) if status.code() == Some(PROVEN) => Probe::Proven(since.elapsed()),
        Ok(_) => Probe::Failed(child.stderr_tail().lines().last().unwrap_or("it ended without a word").to_owned()),
        Err(_) => Probe::Hung,
    })
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use kiln_model::ledger::Ledger;

    use super::*;

    #[test]
    fn what_is_refused_without_a_guest() {
        let why = |failed, cpu: &str| refusal(failed, Some(cpu)).map(|refused| refused.why);
        assert_eq!(why(None, "model name : x\nflags : fpu vmx sse\n"), None);
        assert_eq!(why(None, "flags\t\t: fpu svm\n"), None);
        assert!(why(None, "flags : fpu sse vmxnet\n").unwrap().contains("neither vmx nor svm"));
        assert!(why(Some(ErrorKind::NotFound), "flags : vmx\n").unwrap().contains("no /dev/kvm"));
        assert!(why(Some(ErrorKind::PermissionDenied), "flags : vmx\n").unwrap().contains("may not"));
    }

    #[tokio::test]
    async fn the_probe_runs_to_its_end_under_emulation() {
        if process::find("qemu-system-x86_64").is_none() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let scope = Scope::new(Ledger::create(folder.path(), "b").unwrap());
        // Under emulation on a busy machine the limit may be too short.
        for _ in 0..5 {
            match proves_itself("qemu-system-x86_64", "tcg", folder.path(), &scope).await.unwrap() {
                Probe::Proven(_) => return,
                Probe::Failed(words) => panic!("{words}"),
                Probe::Hung => {}
            }
        }
        panic!("the probe did not end");
    }

    #[tokio::test]
    async fn an_accelerator_that_cannot_be_used_is_told_in_words() {
        if process::find("qemu-system-x86_64").is_none() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let scope = Scope::new(Ledger::create(folder.path(), "b").unwrap());
        let probe = proves_itself("qemu-system-x86_64", "nonsense", folder.path(), &scope).await.unwrap();
        assert!(matches!(probe, Probe::Failed(words) if words.contains("nonsense")));
        let chosen = choose(Accelerator::Tcg, "/nonexistent", folder.path(), &scope).await.unwrap();
        assert_eq!(chosen.name(), "tcg");
    }

    #[test]
    fn the_probe_is_what_its_source_says() {
        let (Some(assembler), Some(linker)) = (process::find("as"), process::find("ld")) else { return };
        let folder = tempfile::tempdir().unwrap();
        let (object, made) = (folder.path().join("probe.o"), folder.path().join("probe.bin"));
        let mut assemble = Command::new(assembler);
        assemble.args(["--32", concat!(env!("CARGO_MANIFEST_DIR"), "/src/probe/probe.s"), "-o"]).arg(&object);
        let mut link = Command::new(linker);
        link.args(["-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-e", "start"]).arg(&object).arg("-o").arg(&made);
        process::run(assemble).unwrap();
        process::run(link).unwrap();
        assert_eq!(std::fs::read(made).unwrap(), PROBE);
    }
}

//! `qemu-img`: making, checking and converting disk files.
//!
//! No format is ever left for QEMU to guess: a raw disk's guest writes its
//! first sector, and could make it look like a qcow2 that names a file of this
//! machine as its backing file. Every call here names the format.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::str::FromStr;

use kiln_model::base::{DiskFile, DiskFormat};
use kiln_model::cleanup::Scope;
use kiln_model::{Code, Error, Result, ResultExt as _};
use serde::Deserialize;

pub use crate::recognise::{Recognised, recognise};
use crate::recognise::{Refused, recognise_raw};
use kiln_process as process;

/// Formats that a disk can be converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// QEMU, KVM, OpenStack, KubeVirt.
    Qcow2,
    /// The bytes themselves, sparse.
    Raw,
    /// VMware.
    Vmdk,
    /// Hyper-V.
    Vhdx,
    /// VirtualBox.
    Vdi,
}

impl Target {
    /// All of them, as `--format` names them.
    pub const NAMES: [&str; 5] = ["qcow2", "raw", "vmdk", "vhdx", "vdi"];

    /// QEMU's name of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
        }
    }
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Qcow2, Self::Raw, Self::Vmdk, Self::Vhdx, Self::Vdi].into_iter().find(|target| target.name() == text).ok_or_else(|| {
            Error::new(Code::Usage, format!("`{text}` is not a format that kiln writes"))
                .next(format!("use one of: {}", Self::NAMES.join(", ")))
        })
    }
}

/// Makes a qcow2 overlay (0600) of `size` bytes on `base`.
///
/// # Errors
/// When `size` is smaller than the base, or the file cannot be made.
pub async fn create_overlay(base: &DiskFile, overlay: &Path, size: u64) -> Result<DiskFile> {
    if size < base.size {
        let error = Error::new(Code::Usage, format!("a disk of {size} bytes is smaller than its base, which has {} bytes", base.size));
        return Err(error.next("raise `size` in [disk], or leave it out"));
    }
    let backing = std::path::absolute(&base.path).trying(|| format!("find {}", base.path.display()))?;
    private_file(overlay)?;
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", base.format.name(), "-b"]).arg(backing);
    // The backing file was checked; opening it again here would only cost time.
    command.arg("-u").arg(overlay).arg(size.to_string());
    process::run_async(command).await.trying(|| format!("make the overlay {}", overlay.display()))?;
    Ok(DiskFile { path: overlay.to_owned(), format: DiskFormat::Qcow2, size })
}

/// Makes an empty qcow2 (0600) on the qcow2 named `below`, which is in the same
/// folder and need not exist yet.
///
/// # Errors
/// When the file cannot be made.
pub async fn create_layer(path: &Path, below: &str, size: u64) -> Result<()> {
    private_file(path)?;
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, "-u"]).arg(path).arg(size.to_string());
    process::run_async(command).await.map(|_| ()).trying(|| format!("make the layer {}", path.display()))
}

/// Has the qcow2 at `path` lie on `base` from now on, which holds what the file
/// did that it named before; that one need not be there.
///
/// # Errors
/// When the file cannot be changed.
pub async fn move_to(path: &Path, base: &DiskFile) -> Result<()> {
    let backing = std::path::absolute(&base.path).trying(|| format!("find {}", base.path.display()))?;
    let mut command = Command::new("qemu-img");
    command.args(["rebase", "-q", "-u", "-f", "qcow2", "-F", base.format.name(), "-b"]).arg(backing).arg(path);
    process::run_async(command).await.map(|_| ()).trying(|| format!("put {} on {}", path.display(), base.path.display()))
}

/// Makes an empty file that its owner alone can read, for a program that would
/// make it with the umask's mode.
fn private_file(path: &Path) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let made = File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
    made.map(drop).trying(|| format!("make {}", path.display()))
}

/// Writes the content of `source` (with what it is based on) to `destination`
/// in another format; holes stay holes. `progress` is called with per cent.
///
/// # Errors
/// When reading or writing fails; the destination is then incomplete.
pub async fn convert(
    scope: &Scope,
    source: &DiskFile,
    target: Target,
    destination: &Path,
    progress: &mut (dyn FnMut(f64) + Send),
) -> Result<()> {
    let from = std::path::absolute(&source.path).trying(|| format!("find {}", source.path.display()))?;
    let to = std::path::absolute(destination).trying(|| format!("find {}", destination.display()))?;
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-p", "-f", source.format.name(), "-O", target.name()]).arg(from).arg(to);
    let what = format!("qemu-img convert to {}", target.name());
    process::run_lines(scope, command, &what, &mut |_, line| {
        // "    (12.50/100%)\r    (25.00/100%)\r": the last one of a line counts.
        let percent = line.rsplit('(').next().and_then(|text| text.split('/').next()).and_then(|text| text.parse().ok());
        if let Some(percent) = percent {
            progress(percent);
        }
    })
    .await
    .trying(|| format!("write {} as {}", destination.display(), target.name()))
}

/// What `qemu-img check` says of a qcow2 (`qapi/block-core.json`, ImageCheck).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ImageCheck {
    #[serde(default)]
    check_errors: u64,
    #[serde(default)]
    corruptions: u64,
    image_end_offset: Option<u64>,
}

/// Checks the metadata of a qcow2: every cluster it refers to exists, once.
/// (A qcow2 holds no checksums of its data.)
///
/// # Errors
/// [`Code::Base`] when it is damaged or cut short.
pub async fn check(path: &Path) -> Result<()> {
    let absolute = std::path::absolute(path).trying(|| format!("find {}", path.display()))?;
    // The file may be read-only, or in use by a reader: `-U` asks for no lock.
    let mut command = Command::new("qemu-img");
    command.args(["check", "-U", "--output=json", "-f", "qcow2"]).arg(&absolute);
    let damaged = || {
        Error::new(Code::Base, format!("{} is a damaged qcow2", path.display()))
            .next("get it again, and give its checksum so that kiln can check it; or try `qemu-img check -r all`")
    };
    let (child, status, report) = process::run_to_end(command).await?;
    // 2 is damage, 3 leaked clusters (harmless); 1 is a file it cannot even open.
    if !matches!(status.code(), Some(0 | 2 | 3)) {
        return Err(damaged().detail(child.stderr_tail()));
    }
    let report: ImageCheck = serde_json::from_slice(&report).map_err(|error| damaged().because(error))?;
    let places = report.corruptions + report.check_errors;
    if places > 0 {
        return Err(damaged().detail(format!("qemu-img check found {places} damaged places\n{}", child.stderr_tail())));
    }
    let length = std::fs::metadata(path).trying(|| format!("read {}", path.display()))?.len();
    match report.image_end_offset {
        Some(end) if end > length => Err(damaged().detail(format!("it is cut short: {length} bytes of {end}"))),
        _ => Ok(()),
    }
}

/// Recognises a disk by its content, and refuses one that is damaged, that
/// refers to other files, or that is no disk at all.
///
/// # Errors
/// [`Code::NotFound`], or [`Code::Base`] with what is wrong and what to do.
pub async fn probe(path: &Path) -> Result<DiskFile> {
    probe_by(path, recognise).await
}

/// Takes a file for a raw disk, whatever its content looks like: a volume of
/// LVM, a LUKS container, plain data.
///
/// # Errors
/// When it cannot be read, or is empty.
pub async fn probe_raw(path: &Path) -> Result<DiskFile> {
    probe_by(path, |_, length| recognise_raw(length)).await
}

async fn probe_by(path: &Path, recognise: impl FnOnce(&File, u64) -> Result<Recognised, Refused>) -> Result<DiskFile> {
    let path = std::path::absolute(path).trying(|| format!("find {}", path.display()))?;
    let file = File::open(&path).map_err(|error| {
        let code = if error.kind() == std::io::ErrorKind::NotFound { Code::NotFound } else { Code::Base };
        Error::new(code, format!("cannot open the disk {}", path.display())).because(error)
    })?;
    let meta = file.metadata().trying(|| format!("read {}", path.display()))?;
    if !meta.is_file() {
        return Err(Error::new(Code::Base, format!("{} is not a regular file", path.display())));
    }
    let found = recognise(&file, meta.len()).map_err(|why| {
        let error = Error::new(Code::Base, format!("{} {}", path.display(), why.what));
        if let Some(next) = why.next { error.next(next) } else { error }
    })?;
    if found.format == DiskFormat::Qcow2 {
        check(&path).await?;
    }
    Ok(DiskFile { path, format: found.format, size: found.size })
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, SeekFrom, Write as _};
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn raw(folder: &Path) -> DiskFile {
        let path = folder.join("base, with \"odd\" name.raw");
        let mut file = File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.seek(SeekFrom::Start(0x400)).unwrap();
        // An ext superblock with its magic at 0x38.
        let mut superblock = vec![0_u8; 1024];
        superblock[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        file.write_all(&superblock).unwrap();
        file.write_all_at(&[7; 3 << 20], 4 << 20).unwrap();
        DiskFile { path, format: DiskFormat::Raw, size: 8 << 20 }
    }

    fn scope(folder: &Path) -> Scope {
        Scope::new(kiln_model::ledger::Ledger::create(folder, "b").unwrap())
    }

    #[tokio::test]
    async fn recognises_good_disks_and_refuses_damaged_ones() {
        let folder = tempfile::tempdir().unwrap();
        let base = raw(folder.path());
        assert_eq!(probe(&base.path).await.unwrap(), base);

        let qcow2 = folder.path().join("named.raw");
        let mut last = 0.0;
        convert(&scope(folder.path()), &base, Target::Qcow2, &qcow2, &mut |percent| last = percent).await.unwrap();
        assert!(last > 99.0);
        let found = probe(&qcow2).await.unwrap();
        assert_eq!((found.format, found.size), (DiskFormat::Qcow2, 8 << 20));

        let overlay = folder.path().join("overlay");
        let made = create_overlay(&base, &overlay, 16 << 20).await.unwrap();
        assert_eq!(made.size, 16 << 20);
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&overlay).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        let error = probe(&overlay).await.unwrap_err();
        assert!(error.kind() == Code::Base && error.to_string().contains("backing file"), "{error:?}");
        assert_eq!(create_overlay(&base, &overlay, 1 << 20).await.unwrap_err().kind(), Code::Usage);

        let whole = std::fs::read(&qcow2).unwrap();
        for keep in [0, 3, 100, 70_000, 200_000, whole.len() / 2, whole.len() - 70_000, whole.len() - 100] {
            std::fs::write(&qcow2, &whole[..keep]).unwrap();
            let error = probe(&qcow2).await.unwrap_err();
            assert_eq!(error.kind(), Code::Base, "cut to {keep}: {error:?}");
        }
        // A bit of the L1 table, found through the header, points elsewhere.
        let l1 = usize::try_from(u64::from_be_bytes(whole[40..48].try_into().unwrap())).unwrap();
        let mut flipped = whole.clone();
        flipped[l1 + 5] ^= 0x40;
        std::fs::write(&qcow2, &flipped).unwrap();
        assert_eq!(probe(&qcow2).await.unwrap_err().kind(), Code::Base);
    }

    #[tokio::test]
    async fn an_overlay_moves_to_a_base_that_lies_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        let base = raw(folder.path());
        let overlay = create_overlay(&base, &folder.path().join("overlay"), 16 << 20).await.unwrap();
        let other = folder.path().join("elsewhere");
        std::fs::create_dir(&other).unwrap();
        let moved = DiskFile { path: other.join("base.raw"), ..base.clone() };
        std::fs::rename(&base.path, &moved.path).unwrap();
        let whole = folder.path().join("whole.raw");
        let read = async || convert(&scope(folder.path()), &overlay, Target::Raw, &whole, &mut |_| ()).await;
        assert!(read().await.is_err(), "its base is gone");
        move_to(&overlay.path, &moved).await.unwrap();
        drop(std::fs::remove_file(&whole));
        read().await.unwrap();
        let bytes = std::fs::read(&whole).unwrap();
        assert_eq!((bytes.len(), bytes[4 << 20], bytes[(7 << 20) - 1], bytes[8 << 20]), (16 << 20, 7, 7, 0));
    }

    #[tokio::test]
    async fn what_is_no_disk_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(probe(&folder.path().join("none")).await.unwrap_err().kind(), Code::NotFound);
        assert_eq!(probe(folder.path()).await.unwrap_err().kind(), Code::Base);
        let text = folder.path().join("text.qcow2");
        std::fs::write(&text, "hello\n".repeat(1000)).unwrap();
        assert!(probe(&text).await.unwrap_err().to_string().ends_with("is not a disk"));
        let raw = probe_raw(&text).await.unwrap();
        assert_eq!((raw.format, raw.size), (DiskFormat::Raw, 6144));
        std::fs::write(&text, "").unwrap();
        assert!(probe_raw(&text).await.unwrap_err().to_string().ends_with("is empty"));
    }
}

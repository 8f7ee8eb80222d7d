//! What a file is, from its first bytes.
//!
//! qcow2 as in QEMU's `docs/interop/qcow2.txt`: all numbers big-endian.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use kiln_model::base::DiskFormat;

/// A disk that can be started from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recognised {
    /// Its format.
    pub format: DiskFormat,
    /// Its virtual size in bytes.
    pub size: u64,
}

/// Why a file cannot be started from; follows the file's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// What is wrong with it.
    pub what: String,
    /// What to do about it.
    pub next: Option<String>,
    /// Whether it looks like nothing that is known: it may be a raw disk that
    /// tells nothing of itself (a volume of LVM, plain data).
    pub unknown: bool,
}

impl Refused {
    fn new(what: impl Into<String>, next: impl Into<Option<&'static str>>) -> Self {
        Self { what: what.into(), next: next.into().map(Into::into), unknown: false }
    }
}

/// How much of the file is looked at: up to the superblock of btrfs.
const HEAD: usize = 0x1_0048;

/// Recognises a disk of `length` bytes by its content.
///
/// # Errors
/// Why it cannot be used.
pub fn recognise(file: &File, length: u64) -> Result<Recognised, Refused> {
    let mut head = vec![0; HEAD.min(usize::try_from(length).unwrap_or(HEAD))];
    if let Err(error) = file.read_exact_at(&mut head, 0) {
        return Err(Refused::new(format!("cannot be read: {error}"), None));
    }
    if head.starts_with(b"QFI\xfb") {
        let size = qcow2(&head)?;
        return Ok(Recognised { format: DiskFormat::Qcow2, size });
    }
    if looks_like_a_disk(&head) {
        return recognise_raw(length);
    }
    Err(other(&head))
}

/// What a file of `length` bytes is as a raw disk.
pub(crate) fn recognise_raw(length: u64) -> Result<Recognised, Refused> {
    if length == 0 {
        return Err(Refused::new("is empty", None));
    }
    // QEMU rounds a raw disk up to whole sectors.
    Ok(Recognised { format: DiskFormat::Raw, size: length.next_multiple_of(512) })
}

fn looks_like_a_disk(head: &[u8]) -> bool {
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    let mbr = at(510, &[0x55, 0xaa]);
    let gpt = at(512, b"EFI PART") || at(4096, b"EFI PART");
    let ext = at(0x438, &[0x53, 0xef]);
    mbr || gpt || ext || at(0, b"XFSB") || at(0x1_0040, b"_BHRfS_M")
}

fn other(head: &[u8]) -> Refused {
    const UNPACK: &str = "unpack it first";
    const CONVERT: &str = "convert it first: qemu-img convert -O qcow2 OLD NEW.qcow2";
    let known: [(&[u8], usize, &str, &str); 11] = [
        (b"KDMV", 0, "a VMware disk (vmdk)", CONVERT),
        (b"# Disk DescriptorFile", 0, "a VMware disk descriptor (vmdk)", CONVERT),
        (b"vhdxfile", 0, "a Hyper-V disk (vhdx)", CONVERT),
        (b"conectix", 0, "a Virtual PC disk (vhd)", CONVERT),
        (&[0x7f, 0x10, 0xda, 0xbe], 64, "a VirtualBox disk (vdi)", CONVERT),
        (b"CD001", 0x8001, "a CD image, not a disk", "take the distribution's cloud image (qcow2 or raw) instead of its installer"),
        (&[0x1f, 0x8b], 0, "compressed with gzip", UNPACK),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], 0, "compressed with xz", UNPACK),
        (&[0x28, 0xb5, 0x2f, 0xfd], 0, "compressed with zstd", UNPACK),
        (b"BZh", 0, "compressed with bzip2", UNPACK),
        (b"PK\x03\x04", 0, "a zip archive", UNPACK),
    ];
    for (magic, offset, what, next) in known {
        if head.get(offset..offset + magic.len()) == Some(magic) {
            return Refused::new(format!("is {what}"), next);
        }
    }
    if head.is_empty() {
        return Refused::new("is empty", None);
    }
    Refused { unknown: true, ..Refused::new("is not a disk", "give a qcow2, or a raw disk with a partition table or a file system") }
}

/// Reads a qcow2's header; gives its virtual size.
fn qcow2(head: &[u8]) -> Result<u64, Refused> {
    let cut = || Refused::new("is a qcow2 that is cut short", "get it again");
    let u32_at = |offset: usize| head.get(offset..offset + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes).ok_or_else(cut);
    let u64_at = |offset: usize| head.get(offset..offset + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes).ok_or_else(cut);
    let damaged = || Refused::new("is a damaged qcow2", "get it again, and give its checksum so that kiln can check it");

    let version = u32_at(4)?;
    if !matches!(version, 2 | 3) {
        return Err(Refused::new(format!("is a qcow2 of version {version}, which kiln does not know"), None));
    }
    const FLATTEN: &str = "write it as one file first: qemu-img convert -O qcow2 OLD NEW.qcow2";
    if u64_at(8)? != 0 {
        return Err(Refused::new("is a qcow2 with a backing file: kiln takes no disk that refers to another file", FLATTEN));
    }
    let (cluster_bits, size, encryption) = (u32_at(20)?, u64_at(24)?, u32_at(32)?);
    if !(9..=21).contains(&cluster_bits) || size == 0 || size > 1 << 60 {
        return Err(damaged());
    }
    if encryption != 0 {
        return Err(Refused::new("is an encrypted qcow2", "decrypt it first: qemu-img convert can do that"));
    }
    let mut extension = 72;
    if version == 3 {
        let incompatible = u64_at(72)?;
        if incompatible & 0b100 != 0 {
            return Err(Refused::new("is a qcow2 with an external data file: kiln takes no disk that refers to another file", FLATTEN));
        }
        if incompatible & 0b10 != 0 {
            return Err(damaged());
        }
        if incompatible & 0b1 != 0 {
            return Err(Refused::new("is a qcow2 that was not closed cleanly", "repair it first: qemu-img check -r all FILE"));
        }
        if incompatible & !0b1_1111 != 0 {
            return Err(Refused::new(format!("is a qcow2 with features that kiln does not know ({incompatible:#x})"), None));
        }
        let length = usize::try_from(u32_at(100)?).map_err(|_| damaged())?;
        if length < 104 || length > 1 << cluster_bits {
            return Err(damaged());
        }
        extension = length;
    }
    // Extensions: type, length, data padded to 8 bytes; type 0 ends them. They
    // lie within the first cluster.
    let end = (1_usize << cluster_bits).min(HEAD - 8);
    while extension < end {
        let (kind, length) = (u32_at(extension)?, u32_at(extension + 4)?);
        match kind {
            0 => break,
            // "DATA": the name of an external data file.
            0x4441_5441 => {
                return Err(Refused::new("is a qcow2 with an external data file: kiln takes no disk that refers to another file", FLATTEN));
            }
            _ => {}
        }
        let length = usize::try_from(length).map_err(|_| damaged())?;
        extension = length.checked_next_multiple_of(8).and_then(|l| l.checked_add(extension + 8)).ok_or_else(damaged)?;
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(change: impl FnOnce(&mut Vec<u8>)) -> Result<u64, Refused> {
        let mut head = vec![0; 4096];
        head[..4].copy_from_slice(b"QFI\xfb");
        head[7] = 3;
        head[23] = 16;
        head[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        head[103] = 104;
        change(&mut head);
        qcow2(&head)
    }

    #[test]
    fn headers() {
        assert_eq!(header(|_| {}), Ok(1 << 30));
        type Change = fn(&mut Vec<u8>);
        let cases: [(&str, Change); 9] = [
            ("version 4", |h| h[7] = 4),
            ("backing file", |h| h[15] = 1),
            ("external data file", |h| h[79] = 4),
            ("external data file", |h| h[104..112].copy_from_slice(b"DATA\0\0\0\0")),
            ("encrypted", |h| h[35] = 2),
            ("closed cleanly", |h| h[79] = 1),
            ("damaged", |h| h[79] = 2),
            ("features", |h| h[72] = 1),
            ("cut short", |h| h.truncate(60)),
        ];
        for (expected, change) in cases {
            let refused = header(change).unwrap_err();
            assert!(refused.what.contains(expected), "{expected}: {refused:?}");
        }
    }

    #[test]
    fn no_header_makes_it_panic() {
        for length in 0..200 {
            for fill in [0x00, 0x01, 0x7f, 0xff] {
                let mut head = vec![fill; length];
                let magic = b"QFI\xfb\0\0\0\x03";
                let count = magic.len().min(length);
                head[..count].copy_from_slice(&magic[..count]);
                let _ = qcow2(&head);
            }
        }
    }
}

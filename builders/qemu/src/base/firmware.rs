//! What a disk says of itself in its first bytes: how it starts, and whether
//! it is a compressed file rather than a disk.

use kiln_model::image::Firmware;

/// How many of a disk's first bytes [`firmware`] wants: MBR, GPT header and the
/// usual 128 entries of 128 bytes, rounded up.
pub(crate) const HEAD: usize = 64 * 1024;

const SECTOR: usize = 512;
/// EFI system partition, `C12A7328-F81F-11D2-BA4B-00A0C93EC93B` as on disk.
const ESP: [u8; 16] = [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
/// BIOS boot partition, `21686148-6449-6E6F-744E-656564454649` as on disk.
const BIOS_BOOT: [u8; 16] = *b"Hah!IdontNeedEFI";
/// Attribute bit 2 of an entry: "legacy BIOS bootable".
const LEGACY_BOOTABLE: u64 = 1 << 2;

/// How a disk that begins with `head` starts: UEFI needs an EFI system
/// partition, BIOS needs boot code and, on a GPT, a place for what it loads.
/// [`Firmware::BiosUefi`] when it shows neither, since then nothing is known.
///
/// Source: UEFI 2.10, chapter 5 (GUID partition table, legacy MBR).
pub(crate) fn firmware(head: &[u8]) -> Firmware {
    let boot_code = head.get(..440).is_some_and(|code| code.iter().any(|b| *b != 0));
    if head.get(510..512) != Some(&[0x55, 0xaa]) {
        return Firmware::BiosUefi;
    }
    let (esp, bios) = match gpt_entries(head) {
        Some(entries) => {
            let has = |guid: &[u8; 16]| entries.iter().any(|e| e.get(..16) == Some(guid));
            let legacy = entries.iter().any(|e| number::<8>(e, 48) & LEGACY_BOOTABLE != 0);
            (has(&ESP), boot_code && (has(&BIOS_BOOT) || legacy))
        }
        None => {
            let types = (0..4).filter_map(|n| head.get(446 + n * 16 + 4)).any(|t| *t == 0xef);
            (types, boot_code)
        }
    };
    match (esp, bios) {
        (true, false) => Firmware::Uefi,
        (false, true) => Firmware::Bios,
        _ => Firmware::BiosUefi,
    }
}

/// The entries in use, as far as `head` reaches; `None` if it is not a GPT.
fn gpt_entries(head: &[u8]) -> Option<Vec<&[u8]>> {
    let header = head.get(SECTOR..2 * SECTOR)?;
    if !header.starts_with(b"EFI PART") {
        return None;
    }
    let start = usize::try_from(number::<8>(header, 72)).ok()?.checked_mul(SECTOR)?;
    let count = usize::try_from(number::<4>(header, 80)).ok()?;
    let size = usize::try_from(number::<4>(header, 84)).ok()?.max(128);
    let entries = head.get(start..)?.chunks_exact(size).take(count);
    Some(entries.filter(|e| e.iter().take(16).any(|b| *b != 0)).collect())
}

/// A little-endian number of `N` bytes; 0 where there are none.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + N).into_iter().flatten().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// A compression that a file begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Compression {
    /// Its name.
    pub(crate) name: &'static str,
    /// The command that undoes it.
    pub(crate) undo: &'static str,
}

/// The compression of a file that begins with `head`.
pub(crate) fn compression(head: &[u8]) -> Option<Compression> {
    let known: [(&[u8], &str, &str); 5] = [
        (b"\xfd7zXZ\0", "xz", "unxz"),
        (b"\x1f\x8b", "gzip", "gunzip"),
        (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
        (b"BZh", "bzip2", "bunzip2"),
        (b"PK\x03\x04", "zip", "unzip"),
    ];
    known.iter().find(|(magic, ..)| head.starts_with(magic)).map(|(_, name, undo)| Compression { name, undo })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(boot_code: bool, entries: &[([u8; 16], u64)]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        head[510..512].copy_from_slice(&[0x55, 0xaa]);
        head[0] = u8::from(boot_code);
        head[512..520].copy_from_slice(b"EFI PART");
        head[512 + 72] = 2;
        head[512 + 80] = 128;
        head[512 + 84] = 128;
        for (n, (guid, attributes)) in entries.iter().enumerate() {
            head[1024 + n * 128..][..16].copy_from_slice(guid);
            head[1024 + n * 128 + 48..][..8].copy_from_slice(&attributes.to_le_bytes());
        }
        head
    }

    #[test]
    fn firmware_follows_from_what_the_disk_has() {
        let root = [1; 16];
        assert_eq!(firmware(&disk(true, &[(BIOS_BOOT, 0), (ESP, 0), (root, 0)])), Firmware::BiosUefi);
        assert_eq!(firmware(&disk(false, &[(ESP, 0), (root, 0)])), Firmware::Uefi);
        assert_eq!(firmware(&disk(true, &[(ESP, 0), (root, 0)])), Firmware::Uefi);
        assert_eq!(firmware(&disk(true, &[(ESP, 0), (root, LEGACY_BOOTABLE)])), Firmware::BiosUefi);
        assert_eq!(firmware(&disk(true, &[(BIOS_BOOT, 0), (root, 0)])), Firmware::Bios);
        assert_eq!(firmware(&disk(false, &[(root, 0)])), Firmware::BiosUefi);
        let mut mbr = vec![0; 512];
        mbr[510..].copy_from_slice(&[0x55, 0xaa]);
        mbr[0] = 0xeb;
        assert_eq!(firmware(&mbr), Firmware::Bios);
        mbr[446 + 4] = 0xef;
        assert_eq!(firmware(&mbr), Firmware::BiosUefi);
        mbr[0] = 0;
        assert_eq!(firmware(&mbr), Firmware::Uefi);
    }

    #[test]
    fn damaged_tables_are_read_without_harm() {
        for (at, value) in [(72, 0xff), (80, 0xff), (84, 0xff), (84, 0)] {
            let mut head = disk(true, &[(ESP, 0)]);
            for byte in &mut head[512 + at..512 + at + 4] {
                *byte = value;
            }
            let _ = firmware(&head);
        }
        for length in [0, 1, 511, 512, 520, 1024, 1030] {
            let _ = firmware(&disk(true, &[(ESP, 0)])[..length]);
        }
    }

    #[test]
    fn compressions_by_magic() {
        assert_eq!(compression(b"\xfd7zXZ\0rest").map(|c| c.name), Some("xz"));
        assert_eq!(compression(b"\x1f\x8b\x08").map(|c| c.undo), Some("gunzip"));
        assert_eq!(compression(b"\x28\xb5\x2f\xfd").map(|c| c.name), Some("zstd"));
        assert_eq!(compression(b"QFI\xfb"), None);
        assert_eq!(compression(b""), None);
    }
}

//! Partition tables: finding the partitions of a disk, and making use of the
//! room when a disk has grown.
//!
//! GPT as in the UEFI specification 2.10, chapter 5; all numbers
//! little-endian, sectors of 512 bytes (QEMU's default, and that of every
//! cloud). A table that is not understood, or whose checksum is wrong, is left
//! alone: the guest has tools of its own.

use std::io;

const SECTOR: u64 = 512;

/// Partitions end on a multiple of this many sectors (1 MiB), as every tool
/// aligns them.
const ALIGN: u64 = 2048;

/// The most entries' bytes that are taken for a table.
const ENTRIES_LIMIT: usize = 1 << 20;

/// Type of a root file system on x86-64 (Discoverable Partitions Specification).
pub const ROOT_X86_64: &str = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709";
/// Type of a root file system on 64-bit ARM.
pub const ROOT_ARM64: &str = "b921b045-1df0-41c3-af44-4c6f280d3fae";
/// Type of any Linux file system.
pub const LINUX: &str = "0fc63daf-8483-4772-8e79-3d69d8477de4";

/// A disk as bytes that can be changed.
pub trait Disk {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// When the disk cannot be read.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// When the disk cannot be written.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// What a partition is said to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The root file system.
    Root,
    /// Some Linux file system.
    Linux,
    /// Anything else.
    Other,
}

/// A partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// What it is said to hold.
    pub role: Role,
}

/// What [`grow`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grown {
    /// The last partition now has this many bytes.
    Partition(u64),
    /// The table reaches to the end of the disk; the last partition is not one
    /// to grow.
    Table,
    /// Nothing was changed.
    Nothing,
}

/// The partitions of a disk, in the table's order; none if there is no table
/// that is understood.
///
/// # Errors
/// When the disk cannot be read.
pub fn partitions(disk: &mut dyn Disk) -> io::Result<Vec<Partition>> {
    let bytes = |sectors: u64| sectors.saturating_mul(SECTOR);
    if let Some(gpt) = Gpt::read(disk)? {
        let used = gpt.entries().filter(|entry| entry.kind != [0; 16] && entry.last >= entry.first);
        return Ok(used
            .map(|e| Partition { offset: bytes(e.first), length: bytes(e.last - e.first + 1), role: role_of(e.kind) })
            .collect());
    }
    let Some(mbr) = Mbr::read(disk)? else { return Ok(Vec::new()) };
    let role = |kind| if kind == 0x83 { Role::Linux } else { Role::Other };
    Ok(mbr.used().map(|(_, e)| Partition { offset: bytes(e.first), length: bytes(e.sectors), role: role(e.kind) }).collect())
}

/// After a disk has grown: moves the backup GPT to its end, and grows its last
/// partition to it when that may be the root. Writes nothing when nothing has
/// to change.
///
/// # Errors
/// When the disk cannot be read or written.
pub fn grow(disk: &mut dyn Disk) -> io::Result<Grown> {
    if let Some(gpt) = Gpt::read(disk)? {
        return gpt.grow(disk);
    }
    match Mbr::read(disk)? {
        Some(mbr) => mbr.grow(disk),
        None => Ok(Grown::Nothing),
    }
}

struct Gpt {
    header: Vec<u8>,
    entries: Vec<u8>,
    entry_size: usize,
}

struct Entry {
    index: usize,
    kind: [u8; 16],
    first: u64,
    last: u64,
}

impl Gpt {
    fn read(disk: &mut dyn Disk) -> io::Result<Option<Self>> {
        if disk.size() < 68 * SECTOR {
            return Ok(None);
        }
        let mut sector = vec![0; SECTOR as usize];
        disk.read_at(SECTOR, &mut sector)?;
        if !sector.starts_with(b"EFI PART") {
            return Ok(None);
        }
        let length = u32_at(&sector, 12) as usize;
        if !(92..=SECTOR as usize).contains(&length) {
            return Ok(None);
        }
        let mut header = sector;
        let stored = u32_at(&header, 16);
        put(&mut header, 16, &[0; 4]);
        if crc32(&header[..length]) != stored || u64_at(&header, 24) != 1 {
            return Ok(None);
        }
        let (at, count, entry_size) = (u64_at(&header, 72), u32_at(&header, 80) as usize, u32_at(&header, 84) as usize);
        let bytes = count.saturating_mul(entry_size);
        let end = at.checked_mul(SECTOR).and_then(|start| start.checked_add(bytes as u64));
        if entry_size < 128 || bytes == 0 || bytes > ENTRIES_LIMIT || at < 2 || end.is_none_or(|end| end > disk.size()) {
            return Ok(None);
        }
        let mut entries = vec![0; bytes];
        disk.read_at(at * SECTOR, &mut entries)?;
        Ok((crc32(&entries) == u32_at(&header, 88)).then_some(Self { header, entries, entry_size }))
    }

    fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.entries.chunks_exact(self.entry_size).enumerate().map(|(index, entry)| {
            let mut kind = [0; 16];
            kind.copy_from_slice(&entry[..16]);
            Entry { index, kind, first: u64_at(entry, 32), last: u64_at(entry, 40) }
        })
    }

    fn grow(mut self, disk: &mut dyn Disk) -> io::Result<Grown> {
        let last_sector = disk.size() / SECTOR - 1;
        let table_sectors = (self.entries.len() as u64).div_ceil(SECTOR);
        let last_usable = last_sector - table_sectors - 1;
        let used: Vec<Entry> = self.entries().filter(|entry| entry.kind != [0; 16]).collect();
        if used.iter().any(|entry| entry.last > last_usable || entry.first > entry.last) {
            return Ok(Grown::Nothing);
        }
        let mut grown = Grown::Table;
        if let Some(last) = used.iter().max_by_key(|entry| entry.last) {
            let end = (last_usable + 1) / ALIGN * ALIGN;
            if role_of(last.kind) != Role::Other && end > last.last + 1 {
                put(&mut self.entries, last.index * self.entry_size + 40, &(end - 1).to_le_bytes());
                grown = Grown::Partition((end - last.first) * SECTOR);
            }
        }
        if grown == Grown::Table && u64_at(&self.header, 32) == last_sector && u64_at(&self.header, 48) == last_usable {
            return Ok(Grown::Nothing);
        }
        let primary_entries = u64_at(&self.header, 72);
        put(&mut self.header, 48, &last_usable.to_le_bytes());
        let crc = crc32(&self.entries).to_le_bytes();
        put(&mut self.header, 88, &crc);
        // The backup first: whoever is interrupted has one whole table.
        let backup = self.sealed(last_sector, 1, last_sector - table_sectors);
        disk.write_at((last_sector - table_sectors) * SECTOR, &self.entries)?;
        disk.write_at(last_sector * SECTOR, &backup)?;
        let primary = self.sealed(1, last_sector, primary_entries);
        disk.write_at(primary_entries * SECTOR, &self.entries)?;
        disk.write_at(SECTOR, &primary)?;
        protect(disk, last_sector)?;
        Ok(grown)
    }

    /// The header for one of the two places, with its checksum.
    fn sealed(&self, own: u64, other: u64, entries: u64) -> Vec<u8> {
        let mut header = self.header.clone();
        put(&mut header, 24, &own.to_le_bytes());
        put(&mut header, 32, &other.to_le_bytes());
        put(&mut header, 72, &entries.to_le_bytes());
        put(&mut header, 16, &[0; 4]);
        let length = u32_at(&header, 12) as usize;
        let crc = crc32(&header[..length]).to_le_bytes();
        put(&mut header, 16, &crc);
        header
    }
}

/// Lets the protective MBR cover the whole disk, where there is one.
fn protect(disk: &mut dyn Disk, last_sector: u64) -> io::Result<()> {
    let Some(mut mbr) = Mbr::read(disk)? else { return Ok(()) };
    let entry = mbr.used().find(|(_, entry)| entry.kind == 0xee && entry.first == 1).map(|(index, _)| index);
    if let Some(index) = entry {
        let sectors = u32::try_from(last_sector).unwrap_or(u32::MAX);
        put(&mut mbr.sector, 446 + index * 16 + 12, &sectors.to_le_bytes());
        disk.write_at(0, &mbr.sector)?;
    }
    Ok(())
}

struct Mbr {
    sector: Vec<u8>,
}

#[derive(Clone, Copy)]
struct MbrEntry {
    kind: u8,
    first: u64,
    sectors: u64,
}

impl Mbr {
    fn read(disk: &mut dyn Disk) -> io::Result<Option<Self>> {
        if disk.size() < SECTOR {
            return Ok(None);
        }
        let mut sector = vec![0; SECTOR as usize];
        disk.read_at(0, &mut sector)?;
        let table = Self { sector };
        // A boot sector of FAT or NTFS has the same signature: in a table every
        // entry is active or not, and lies on the disk.
        let sectors = disk.size() / SECTOR;
        let sane = (0..4).all(|i| {
            let (flag, entry) = (table.sector[446 + i * 16], table.entry(i));
            flag & 0x7f == 0 && (entry.kind == 0 || entry.kind == 0xee || (entry.first > 0 && entry.first + entry.sectors <= sectors))
        });
        let any = (0..4).any(|i| table.entry(i).kind != 0);
        Ok((table.sector[510..] == [0x55, 0xaa] && sane && any).then_some(table))
    }

    fn entry(&self, index: usize) -> MbrEntry {
        let at = 446 + index * 16;
        let (first, sectors) = (u32_at(&self.sector, at + 8), u32_at(&self.sector, at + 12));
        MbrEntry { kind: self.sector[at + 4], first: first.into(), sectors: sectors.into() }
    }

    fn used(&self) -> impl Iterator<Item = (usize, MbrEntry)> + '_ {
        (0..4).map(|index| (index, self.entry(index))).filter(|(_, entry)| entry.kind != 0)
    }

    fn grow(mut self, disk: &mut dyn Disk) -> io::Result<Grown> {
        // With an extended partition, whatever is last may be inside it.
        const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
        if self.used().any(|(_, entry)| EXTENDED.contains(&entry.kind) || entry.kind == 0xee) {
            return Ok(Grown::Nothing);
        }
        let Some((index, last)) = self.used().max_by_key(|(_, entry)| entry.first + entry.sectors) else { return Ok(Grown::Nothing) };
        let end = (disk.size() / SECTOR).min(last.first + u64::from(u32::MAX)) / ALIGN * ALIGN;
        if last.kind != 0x83 || end <= last.first + last.sectors {
            return Ok(Grown::Nothing);
        }
        let sectors = end - last.first;
        let at = 446 + index * 16;
        // Cylinders cannot say it: the value that means "see the sectors".
        put(&mut self.sector, at + 5, &[0xfe, 0xff, 0xff]);
        put(&mut self.sector, at + 12, &u32::try_from(sectors).unwrap_or(u32::MAX).to_le_bytes());
        disk.write_at(0, &self.sector)?;
        Ok(Grown::Partition(sectors * SECTOR))
    }
}

fn role_of(kind: [u8; 16]) -> Role {
    match guid(kind).as_str() {
        ROOT_X86_64 | ROOT_ARM64 => Role::Root,
        LINUX => Role::Linux,
        _ => Role::Other,
    }
}

/// A GUID as text: its first three parts are stored little-endian.
fn guid(b: [u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (one, two) = (u32::from_le_bytes([b[0], b[1], b[2], b[3]]), u16::from_le_bytes([b[4], b[5]]));
    format!("{one:08x}-{two:04x}-{:04x}-{}-{}", u16::from_le_bytes([b[6], b[7]]), hex(&b[8..10]), hex(&b[10..]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// CRC-32 as in ISO 3309 (reflected, polynomial 0xedb88320).
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

#[cfg(test)]
#[path = "gpt_tests.rs"]
mod tests;

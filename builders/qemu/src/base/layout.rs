//! The disk around a root file system that is already in it: partition table,
//! BIOS boot code and EFI system partition.
//!
//! ```text
//!   0        boot.img in the MBR, and the primary GPT
//!   1 MiB    1 "bios": GRUB's core image, which boot.img loads
//!   2 MiB    2 "esp":  FAT32 with /EFI/BOOT/BOOTX64.EFI
//!  64 MiB    3 "root": ext4; the last one, so that it can grow
//!   end      1 MiB for the backup GPT
//! ```
//!
//! This is what `grub-install` does, without a block device and without root.
//! Sources: GPT and removable media path, UEFI 2.10, 5.3 and 3.5.1.1; boot
//! code, GRUB 2.06, `grub-core/boot/i386/pc/{boot,diskboot}.S`,
//! `include/grub/i386/pc/boot.h` and `util/setup.c`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;

use fatfs::{FatType, FormatVolumeOptions, FsOptions};
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition_types::{BIOS, EFI, LINUX_ROOT_X64};
use kiln_model::{Code, Error, Result, ResultExt as _};

/// Bytes of a sector.
const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;

const BIOS_START: u64 = MIB;
const ESP_START: u64 = 2 * MIB;
/// First byte of the root file system.
pub(super) const ROOT_START: u64 = 64 * MIB;
/// Bytes after the root file system: alignment and the backup GPT.
const END: u64 = MIB;

/// Bytes of boot.img that are code; what follows is the disk's signature and
/// the table of partitions (`GRUB_BOOT_MACHINE_WINDOWS_NT_MAGIC`).
const BOOT_CODE: usize = 440;
/// Where boot.img holds the first sector of the core image
/// (`GRUB_BOOT_MACHINE_KERNEL_SECTOR`).
const KERNEL_SECTOR: usize = 0x5c;
/// Where boot.img jumps over its check for a BIOS that passes a wrong drive
/// (`GRUB_BOOT_MACHINE_DRIVE_CHECK`); two no-ops in its place enable the check.
const DRIVE_CHECK: usize = 0x66;
/// `GRUB_BOOT_I386_PC_KERNEL_SEG` and one sector: where diskboot.img puts what
/// follows it.
const KERNEL_SEGMENT: u16 = 0x800 + 0x20;

/// Bytes of the root file system on a disk of `size` bytes.
pub(super) const fn root_size(size: u64) -> u64 {
    size.saturating_sub(ROOT_START + END)
}

/// GRUB's images, made for this disk's root file system.
pub(super) struct BootImages {
    /// `boot.img`: one sector of boot code.
    pub(super) boot: Vec<u8>,
    /// `core.img` for `i386-pc`, as `grub-mkimage` made it.
    pub(super) core: Vec<u8>,
    /// The same for `x86_64-efi`.
    pub(super) efi: Vec<u8>,
}

/// Writes everything around the root file system into `disk`, a file of its
/// final size that holds zeros outside of that. Partitions get random GUIDs,
/// the ESP the volume id `esp`.
///
/// # Errors
/// When it cannot be written, or when GRUB's images are not what they should be.
pub(super) fn write(disk: &File, images: &BootImages, esp: u32) -> Result<()> {
    let size = disk.metadata().trying(|| "read the size of the disk".into())?.len();
    let code = boot_code(&images.boot, BIOS_START / SECTOR)?;
    let core = core(&images.core, BIOS_START / SECTOR)?;
    if core.len() as u64 > ESP_START - BIOS_START {
        return Err(damaged("core.img", "it does not fit into its partition of 1 MiB"));
    }
    partitions(disk, size, code).trying(|| "write the partition table".into())?;
    disk.write_all_at(&core, BIOS_START).trying(|| "write the boot loader for BIOS".into())?;
    let window = Window { file: disk, start: ESP_START, length: ROOT_START - ESP_START, at: 0 };
    system_partition(window, &images.efi, esp).trying(|| "write the boot loader for UEFI".into())?;
    disk.sync_all().trying(|| "write the disk".into())
}

fn partitions(disk: &File, size: u64, code: [u8; BOOT_CODE]) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut device = disk.try_clone()?;
    // Saturates where the disk is larger than the field (UEFI 2.10, table 5.4).
    let mut mbr = ProtectiveMBR::with_lb_size(u32::try_from(size / SECTOR - 1).unwrap_or(u32::MAX));
    mbr.set_bootcode(code);
    mbr.overwrite_lba0(&mut device)?;
    let block = LogicalBlockSize::Lb512;
    let mut table = gpt::GptConfig::new().writable(true).logical_block_size(block).create_from_device(device, None)?;
    let (bios, esp, root) = (BIOS_START / SECTOR, ESP_START / SECTOR, ROOT_START / SECTOR);
    table.add_partition_at("bios", 1, bios, esp - bios, BIOS, 0)?;
    table.add_partition_at("esp", 2, esp, root - esp, EFI, 0)?;
    table.add_partition_at("root", 3, root, root_size(size) / SECTOR, LINUX_ROOT_X64, 0)?;
    table.write()?;
    Ok(())
}

/// boot.img's code, told where the core image begins.
fn boot_code(image: &[u8], core_sector: u64) -> Result<[u8; BOOT_CODE]> {
    if image.len() as u64 != SECTOR || !image.ends_with(&[0x55, 0xaa]) {
        return Err(damaged("boot.img", "it is not one boot sector"));
    }
    let mut code = [0; BOOT_CODE];
    code.copy_from_slice(&image[..BOOT_CODE]);
    code[KERNEL_SECTOR..KERNEL_SECTOR + 8].copy_from_slice(&core_sector.to_le_bytes());
    code[DRIVE_CHECK..DRIVE_CHECK + 2].copy_from_slice(&[0x90, 0x90]);
    Ok(code)
}

/// The core image, whose first sector (diskboot.img) is told where the rest is:
/// its last twelve bytes are a list of one entry, first sector (8 bytes), number
/// of sectors (2) and segment to load them to (2).
fn core(image: &[u8], sector: u64) -> Result<Vec<u8>> {
    let sectors = image.len().div_ceil(SECTOR as usize);
    let rest = u16::try_from(sectors.saturating_sub(1)).ok().filter(|rest| *rest > 0);
    let Some(rest) = rest else { return Err(damaged("core.img", "its length cannot be right")) };
    let mut image = image.to_vec();
    image.resize(sectors * SECTOR as usize, 0);
    let entry = SECTOR as usize - 12;
    if image[entry + 10..entry + 12] != KERNEL_SEGMENT.to_le_bytes() {
        return Err(damaged("core.img", "its list of blocks is not where GRUB 2.06 and 2.12 have it"));
    }
    image[entry..entry + 8].copy_from_slice(&(sector + 1).to_le_bytes());
    image[entry + 8..entry + 10].copy_from_slice(&rest.to_le_bytes());
    Ok(image)
}

fn system_partition(mut window: Window<'_>, efi: &[u8], id: u32) -> io::Result<()> {
    // FAT32, as UEFI wants it on disks; with one sector a cluster there are
    // enough clusters for it to be one.
    let options = FormatVolumeOptions::new().fat_type(FatType::Fat32).bytes_per_cluster(SECTOR as u32);
    fatfs::format_volume(&mut window, options.volume_id(id).volume_label(*b"ESP        "))?;
    window.seek(SeekFrom::Start(0))?;
    let volume = fatfs::FileSystem::new(&mut window, FsOptions::new())?;
    let mut file = volume.root_dir().create_dir("EFI")?.create_dir("BOOT")?.create_file("BOOTX64.EFI")?;
    file.write_all(efi)?;
    file.flush()?;
    drop(file);
    volume.unmount()
}

fn damaged(name: &str, why: &str) -> Error {
    Error::new(Code::Base, format!("GRUB's {name} cannot be used: {why}")).next("this suite's GRUB is not known to kiln: please report it")
}

/// A stretch of a file, as a file of its own.
struct Window<'a> {
    file: &'a File,
    start: u64,
    length: u64,
    at: u64,
}

impl Window<'_> {
    fn left(&self, wanted: usize) -> usize {
        usize::try_from(self.length.saturating_sub(self.at)).map_or(wanted, |left| left.min(wanted))
    }
}

impl Read for Window<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = self.left(buffer.len());
        let count = self.file.read_at(&mut buffer[..wanted], self.start + self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Write for Window<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let wanted = self.left(buffer.len());
        let count = self.file.write_at(&buffer[..wanted], self.start + self.at)?;
        self.at += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Window<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 2 << 30;

    fn images() -> BootImages {
        let mut boot = vec![0xcc; 512];
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        let mut core = vec![0xdd; 3 * 512 + 7];
        core[510..512].copy_from_slice(&KERNEL_SEGMENT.to_le_bytes());
        BootImages { boot, core, efi: (0..991_232_u32).map(|n| (n % 251) as u8).collect() }
    }

    fn disk() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        file
    }

    fn at(file: &File, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    #[test]
    fn the_table_reads_back_from_both_its_copies() {
        let file = disk();
        write(&file, &images(), 0x1234_abcd).unwrap();
        let table = gpt::GptConfig::new().open_from_device(file.try_clone().unwrap()).unwrap();
        assert!(table.primary_header().is_ok() && table.backup_header().is_ok());
        assert_eq!(table.backup_header().unwrap().current_lba, SIZE / SECTOR - 1);
        let parts: Vec<_> =
            table.partitions().values().map(|p| (p.name.as_str(), p.part_type_guid.clone(), p.first_lba, p.last_lba)).collect();
        assert_eq!(
            parts,
            [
                ("bios", BIOS, 2048, 4095),
                ("esp", EFI, 4096, 131_071),
                ("root", LINUX_ROOT_X64, 131_072, (ROOT_START + root_size(SIZE)) / SECTOR - 1),
            ]
        );
        let guids: std::collections::BTreeSet<_> = table.partitions().values().map(|p| p.part_guid).collect();
        assert_eq!(guids.len(), 3);
        // One protective partition over the whole disk (UEFI 2.10, 5.2.3).
        assert_eq!(at(&file, 446, 16)[4], 0xee);
        assert_eq!(at(&file, 446, 16)[8..], [1_u32.to_le_bytes(), (SIZE as u32 / 512 - 1).to_le_bytes()].concat());
        assert_eq!(at(&file, 462, 50), [vec![0; 48], vec![0x55, 0xaa]].concat());
    }

    #[test]
    fn boot_code_finds_the_core_and_the_core_its_rest() {
        let file = disk();
        write(&file, &images(), 1).unwrap();
        let mbr = at(&file, 0, 440);
        assert_eq!(mbr[KERNEL_SECTOR..KERNEL_SECTOR + 8], 2048_u64.to_le_bytes());
        assert_eq!(mbr[DRIVE_CHECK..DRIVE_CHECK + 2], [0x90, 0x90]);
        assert_eq!(mbr[439], 0xcc);
        let core = at(&file, BIOS_START, 4 * 512);
        assert_eq!(core[500..512], [2049_u64.to_le_bytes().to_vec(), vec![3, 0, 0x20, 0x08]].concat());
        assert_eq!(core[499], 0xdd);
        assert_eq!(core[3 * 512 + 6..3 * 512 + 8], [0xdd, 0]);
    }

    #[test]
    fn firmware_finds_the_loader_in_the_esp() {
        let (file, images) = (disk(), images());
        write(&file, &images, 0x1234_abcd).unwrap();
        let mut window = Window { file: &file, start: ESP_START, length: ROOT_START - ESP_START, at: 0 };
        let volume = fatfs::FileSystem::new(&mut window, FsOptions::new()).unwrap();
        assert_eq!((volume.fat_type(), volume.volume_id()), (FatType::Fat32, 0x1234_abcd));
        let mut found = Vec::new();
        volume.root_dir().open_file("EFI/BOOT/BOOTX64.EFI").unwrap().read_to_end(&mut found).unwrap();
        assert!(found == images.efi);
    }

    #[test]
    fn the_root_file_system_is_left_alone() {
        let file = disk();
        let (first, last) = (ROOT_START, ROOT_START + root_size(SIZE) - 1);
        file.write_all_at(&[7], first).unwrap();
        file.write_all_at(&[8], last).unwrap();
        write(&file, &images(), 1).unwrap();
        assert_eq!((at(&file, first, 1), at(&file, last, 1)), (vec![7], vec![8]));
    }

    #[test]
    fn images_of_another_grub_are_refused() {
        let good = images();
        for (boot, core) in [
            (vec![], good.core.clone()),
            (vec![0; 512], good.core.clone()),
            (good.boot.clone(), vec![]),
            (good.boot.clone(), vec![0; 512]),
            (good.boot.clone(), vec![0; 2048]),
            (good.boot.clone(), [good.core.clone(), vec![0; MIB as usize]].concat()),
        ] {
            let images = BootImages { boot, core, efi: Vec::new() };
            assert_eq!(write(&disk(), &images, 1).unwrap_err().kind(), Code::Base);
        }
    }
}

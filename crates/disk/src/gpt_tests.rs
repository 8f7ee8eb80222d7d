use super::*;

impl Disk for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        buffer.copy_from_slice(&self[at..at + buffer.len()]);
        Ok(())
    }
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let at = offset as usize;
        self[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

fn bytes_of(text: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(text.replace('-', "").as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    }
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

/// A disk of `sectors` with the partitions (type, first, last).
fn gpt(sectors: u64, partitions: &[(&str, u64, u64)]) -> Vec<u8> {
    let mut disk = vec![0; (sectors * SECTOR) as usize];
    put(&mut disk, 446, &[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    put(&mut disk, 458, &u32::try_from(sectors - 1).unwrap().to_le_bytes());
    put(&mut disk, 510, &[0x55, 0xaa]);
    let mut entries = vec![0; 128 * 128];
    for (index, (kind, first, last)) in partitions.iter().enumerate() {
        put(&mut entries, index * 128, &bytes_of(kind));
        put(&mut entries, index * 128 + 32, &first.to_le_bytes());
        put(&mut entries, index * 128 + 40, &last.to_le_bytes());
    }
    let mut header = vec![0; 512];
    put(&mut header, 0, b"EFI PART\0\0\x01\0\x5c\0\0\0");
    put(&mut header, 40, &34_u64.to_le_bytes());
    put(&mut header, 48, &(sectors - 34).to_le_bytes());
    put(&mut header, 80, &128_u32.to_le_bytes());
    put(&mut header, 84, &128_u32.to_le_bytes());
    put(&mut header, 88, &crc32(&entries).to_le_bytes());
    let table = Gpt { header, entries, entry_size: 128 };
    put(&mut disk, 512, &table.sealed(1, sectors - 1, 2));
    put(&mut disk, 1024, &table.entries);
    let end = ((sectors - 33) * SECTOR) as usize;
    put(&mut disk, end, &table.entries);
    let end = ((sectors - 1) * SECTOR) as usize;
    put(&mut disk, end, &table.sealed(sectors - 1, 1, sectors - 33));
    disk
}

const ESP: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";

#[test]
fn checksum_and_guid() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    assert_eq!(guid(bytes_of(ESP)), ESP);
}

#[test]
fn the_last_partition_grows_and_both_tables_are_right() {
    let mut disk = gpt(20_480, &[(ROOT_X86_64, 4096, 20_446), (ESP, 2048, 4095)]);
    assert_eq!(grow(&mut disk).unwrap(), Grown::Nothing);
    disk.resize((40_960 * SECTOR) as usize, 0);
    let before = disk.clone();
    let expected = (40_960 - 2048 - 4096) * SECTOR;
    assert_eq!(grow(&mut disk).unwrap(), Grown::Partition(expected));
    assert_ne!(before, disk);
    let found = partitions(&mut disk).unwrap();
    assert_eq!(found[0], Partition { offset: 4096 * SECTOR, length: expected, role: Role::Root });
    assert_eq!(found[1].role, Role::Other);
    // The backup: read it as if it were the primary.
    let mut backup = disk[(40_959 * SECTOR) as usize..].to_vec();
    let stored = u32_at(&backup, 16);
    put(&mut backup, 16, &[0; 4]);
    assert_eq!(crc32(&backup[..92]), stored);
    assert_eq!((u64_at(&backup, 24), u64_at(&backup, 32), u64_at(&backup, 72)), (40_959, 1, 40_927));
    assert_eq!(disk[(40_927 * SECTOR) as usize..][..128 * 128], disk[1024..][..128 * 128]);
    assert_eq!(u32_at(&disk, 458), 40_959);
    assert_eq!(grow(&mut disk).unwrap(), Grown::Nothing);
    if kiln_process::find("sfdisk").is_some() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &disk).unwrap();
        let mut sfdisk = std::process::Command::new("sfdisk");
        sfdisk.arg("--verify").arg(file.path());
        let output = kiln_process::run(sfdisk).unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("No errors detected"), "{output:?}");
    }
}

#[test]
fn what_is_not_understood_is_left_alone() {
    let mut last_is_swap = gpt(20_480, &[(ROOT_X86_64, 2048, 4095), ("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", 4096, 8191)]);
    last_is_swap.resize((40_960 * SECTOR) as usize, 0);
    assert_eq!(grow(&mut last_is_swap).unwrap(), Grown::Table);
    for at in [512 + 20, 1024 + 33] {
        let mut damaged = gpt(20_480, &[(LINUX, 2048, 4095)]);
        damaged[at] ^= 1;
        damaged.resize((40_960 * SECTOR) as usize, 0);
        let before = damaged.clone();
        assert_eq!(grow(&mut damaged).unwrap(), Grown::Nothing);
        assert_eq!(before, damaged);
    }
    for size in [0, 100, 512, 4096, 1 << 20] {
        assert_eq!(grow(&mut vec![0xff; size]).unwrap(), Grown::Nothing);
        assert!(partitions(&mut vec![0; size]).unwrap().is_empty());
    }
}

#[test]
fn the_last_primary_partition_of_an_mbr_grows() {
    let mut disk = vec![0; (40_960 * SECTOR) as usize];
    let mut entry = |index: usize, kind: u8, first: u32, sectors: u32| {
        let at = 446 + index * 16;
        disk[at + 4] = kind;
        put(&mut disk, at + 8, &first.to_le_bytes());
        put(&mut disk, at + 12, &sectors.to_le_bytes());
    };
    entry(0, 0x83, 4096, 4096);
    entry(1, 0x82, 2048, 2048);
    put(&mut disk, 510, &[0x55, 0xaa]);
    let length = (40_960 - 4096) * SECTOR;
    assert_eq!(grow(&mut disk).unwrap(), Grown::Partition(length));
    assert_eq!(partitions(&mut disk).unwrap()[0], Partition { offset: 4096 * SECTOR, length, role: Role::Linux });
    assert_eq!(grow(&mut disk).unwrap(), Grown::Nothing);
}

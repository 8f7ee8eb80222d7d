use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_model::block::Extent;

use super::*;
use crate::blocks::{MapSource, write_raw};
use crate::packs::NewPack;
use crate::raw::RawSource;

/// Packs as files in a folder, by hex digest.
pub(crate) struct Folder {
    root: PathBuf,
    count: usize,
}

impl Folder {
    fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), count: 0 }
    }
}

impl Packs for Folder {
    fn open(&self, pack: &PackRef) -> Result<File> {
        File::open(self.root.join(pack.digest.hex())).trying(|| "open".into())
    }
    fn has(&self, pack: &PackRef) -> bool {
        std::fs::metadata(self.root.join(pack.digest.hex())).is_ok_and(|m| m.len() == pack.size)
    }
}

impl PackSink for Folder {
    fn create(&mut self) -> Result<Box<dyn NewPack>> {
        self.count += 1;
        let path = self.root.join(format!("open.{}", self.count));
        let file = File::options().read(true).write(true).create_new(true).open(&path).trying(|| "create".into())?;
        Ok(Box::new(Packing { root: self.root.clone(), path, file, synced: false }))
    }
}

struct Packing {
    root: PathBuf,
    path: PathBuf,
    file: File,
    synced: bool,
}

impl NewPack for Packing {
    fn file(&self) -> &File {
        &self.file
    }
    fn sync(&mut self) -> Result<()> {
        self.synced = true;
        Ok(())
    }
    fn keep(self: Box<Self>, pack: &PackRef) -> Result<()> {
        assert!(self.synced);
        std::fs::rename(&self.path, self.root.join(pack.digest.hex())).trying(|| "rename".into())
    }
}

impl Drop for Packing {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.path));
    }
}

/// Bytes that do not compress, different for each seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length.div_ceil(8))
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .take(length)
        .collect()
}

/// A sparse raw file with `blocks` (index, seed) of noise.
fn raw(path: &Path, size: u64, blocks: &[(u64, u64)]) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (index, seed) in blocks {
        let at = index * BLOCK;
        file.write_all_at(&noise(*seed, BLOCK.min(size - at) as usize), at).unwrap();
    }
}

fn pack_file(path: &Path, folder: &Path, maps: &[&BlockMap]) -> Packed {
    let packs = Folder::new(folder);
    let parents = Parents { backing: None, maps, packs: &packs };
    pack(&mut RawSource::open(path).unwrap(), &parents, &mut Folder::new(folder), &mut |_, _| {}).unwrap()
}

/// The disk digest as the documentation gives it, without kiln's code.
fn naive_digest(bytes: &[u8]) -> Digest {
    let mut text = format!("kiln-disk-v1 {} 524288\n", bytes.len()).into_bytes();
    for chunk in bytes.chunks(BLOCK_LEN) {
        let mut block = chunk.to_vec();
        block.resize(BLOCK_LEN, 0);
        text.extend(Digest::of(block).as_bytes());
    }
    Digest::of(text)
}

#[test]
fn there_and_back_with_zeros_repeats_and_an_odd_end() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, back) = (folder.path().join("disk"), folder.path().join("back"));
    raw(&disk, 20 * BLOCK + 777, &[(1, 1), (2, 2), (7, 1), (8, 1), (9, 3), (20, 4)]);
    let packed = pack_file(&disk, folder.path(), &[]);
    let bytes = std::fs::read(&disk).unwrap();
    assert_eq!(packed.map.disk_digest(), naive_digest(&bytes));
    assert_eq!(packed.map.blocks[7], packed.map.blocks[1]);
    assert_eq!(packed.map.blocks.iter().filter(|b| b.place == Place::Zero).count(), 21 - 6);
    assert_eq!(packed.new.len(), 1);
    assert!(packed.new[0].size < 4 * BLOCK + 1024, "a block was stored twice");

    let out = File::create(&back).unwrap();
    write_raw(&packed.map, &Folder::new(folder.path()), &out, &mut |_, _| {}).unwrap();
    assert_eq!(std::fs::read(&back).unwrap(), bytes);
    use std::os::unix::fs::MetadataExt as _;
    assert!(out.metadata().unwrap().blocks() * 512 <= 7 * BLOCK, "the holes were filled");

    let mut source = MapSource::new(Arc::new(packed.map), Arc::new(Folder::new(folder.path()))).unwrap();
    for (offset, length) in [(0, 1), (BLOCK - 3, 7), (BLOCK / 2, 3 * BLOCK_LEN), (20 * BLOCK - 5, 782)] {
        let mut buffer = vec![1; length];
        source.read_at(offset, &mut buffer).unwrap();
        assert_eq!(buffer, bytes[offset as usize..offset as usize + length]);
    }
    assert_eq!(classify(source.size(), &source.extents().unwrap())[0..3], [Content::Zero, Content::Data, Content::Data]);
}

#[test]
fn the_result_does_not_depend_on_timing() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    let blocks: Vec<_> = (0..60).map(|n| (n, n % 7)).collect();
    raw(&disk, 64 * BLOCK, &blocks);
    let first = pack_file(&disk, folder.path(), &[]);
    for _ in 0..10 {
        assert_eq!(pack_file(&disk, folder.path(), &[]).map, first.map);
    }
}

#[test]
fn what_a_parent_holds_is_not_stored_again_unless_its_pack_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    raw(&one, 30 * BLOCK, &[(1, 1), (2, 2), (3, 3)]);
    raw(&two, 40 * BLOCK, &[(2, 1), (20, 3), (21, 9)]);
    let parent = pack_file(&one, folder.path(), &[]);
    let child = pack_file(&two, folder.path(), &[&parent.map]);
    assert_eq!(child.map.packs.len(), 2);
    assert!(child.new[0].size < 2 * BLOCK);
    let alone = pack_file(&two, folder.path(), &[]);
    assert_eq!(alone.map.disk_digest(), child.map.disk_digest());
    std::fs::remove_file(folder.path().join(parent.new[0].digest.hex())).unwrap();
    assert_eq!(pack_file(&two, folder.path(), &[&parent.map]).map, alone.map);
}

#[test]
fn mostly_dead_packs_are_rewritten() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two, back) = (folder.path().join("one"), folder.path().join("two"), folder.path().join("back"));
    raw(&one, 30 * BLOCK, &(0..20).map(|n| (n, n)).collect::<Vec<_>>());
    raw(&two, 30 * BLOCK, &[(5, 5), (6, 77)]);
    let parent = pack_file(&one, folder.path(), &[]);
    let child = pack_file(&two, folder.path(), &[&parent.map]);
    assert_eq!(child.map.packs, child.new, "a pack of 20 blocks was kept for one");
    let out = File::create(&back).unwrap();
    write_raw(&child.map, &Folder::new(folder.path()), &out, &mut |_, _| {}).unwrap();
    assert_eq!(std::fs::read(&back).unwrap(), std::fs::read(&two).unwrap());
}

/// A raw file of which some stretches are said to be the backing disk's, and
/// which fails when those are read.
struct Overlay(RawSource, Vec<Extent>);

impl BlockSource for Overlay {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn extents(&mut self) -> Result<Vec<Extent>> {
        Ok(self.1.clone())
    }
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let kinds = classify(self.0.size(), &self.1);
        assert_ne!(kinds[(offset / BLOCK) as usize], Content::Backing, "read at {offset}");
        self.0.read_at(offset, buffer)
    }
}

#[test]
fn backing_blocks_are_taken_from_the_map() {
    let folder = tempfile::tempdir().unwrap();
    let (base, disk) = (folder.path().join("base"), folder.path().join("disk"));
    // The base ends in the middle of a block; the disk on it was grown.
    raw(&base, 10 * BLOCK + 4096, &[(1, 1), (2, 2), (10, 3)]);
    let parent = pack_file(&base, folder.path(), &[]);
    std::fs::copy(&base, &disk).unwrap();
    let file = File::options().write(true).open(&disk).unwrap();
    file.set_len(16 * BLOCK).unwrap();
    file.write_all_at(&noise(50, 100), 5 * BLOCK).unwrap();
    let extents = vec![
        Extent { offset: 0, length: 5 * BLOCK, content: Content::Backing },
        Extent { offset: 5 * BLOCK, length: 4096, content: Content::Data },
        Extent { offset: 5 * BLOCK + 4096, length: 5 * BLOCK, content: Content::Backing },
        Extent { offset: 10 * BLOCK + 4096, length: 6 * BLOCK - 4096, content: Content::Zero },
    ];
    let packs = Folder::new(folder.path());
    let parents = Parents { backing: Some(&parent.map), maps: &[], packs: &packs };
    let mut source = Overlay(RawSource::open(&disk).unwrap(), extents);
    let packed = pack(&mut source, &parents, &mut Folder::new(folder.path()), &mut |_, _| {}).unwrap();
    assert_eq!(packed.map.disk_digest(), naive_digest(&std::fs::read(&disk).unwrap()));
}

#[test]
fn a_flipped_bit_in_a_pack_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    raw(&disk, 4 * BLOCK, &[(1, 1), (2, 2)]);
    let packed = pack_file(&disk, folder.path(), &[]);
    let path = folder.path().join(packed.new[0].digest.hex());
    let good = std::fs::read(&path).unwrap();
    for at in (0..good.len()).step_by(good.len() / 40) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&path, bad).unwrap();
        let out = tempfile::tempfile().unwrap();
        match write_raw(&packed.map, &Folder::new(folder.path()), &out, &mut |_, _| {}) {
            Err(error) => assert_eq!(error.kind(), Code::Corrupt),
            // A bit that zstd ignores: the blocks are still the right ones.
            Ok(()) => {
                use std::io::Read as _;
                let mut back = Vec::new();
                (&out).read_to_end(&mut back).unwrap();
                let mut whole = vec![0; 4 * BLOCK_LEN];
                out.read_exact_at(&mut whole, 0).unwrap();
                assert_eq!(naive_digest(&whole), packed.map.disk_digest());
            }
        }
    }
    std::fs::write(&path, &good[..good.len() / 2]).unwrap();
    let out = tempfile::tempfile().unwrap();
    assert_eq!(write_raw(&packed.map, &Folder::new(folder.path()), &out, &mut |_, _| {}).unwrap_err().kind(), Code::Corrupt);
}

#[test]
fn errors_of_either_end_come_through() {
    struct Full;
    impl PackSink for Full {
        fn create(&mut self) -> Result<Box<dyn NewPack>> {
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull)).trying(|| "write".into())
        }
    }
    struct Bad;
    impl BlockSource for Bad {
        fn size(&self) -> u64 {
            100 * BLOCK
        }
        fn extents(&mut self) -> Result<Vec<Extent>> {
            Ok(vec![Extent { offset: 0, length: self.size(), content: Content::Data }])
        }
        fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            buffer.fill(1);
            if offset > 30 * BLOCK { Err(Error::new(Code::Base, "bad sector")) } else { Ok(()) }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let packs = Folder::new(folder.path());
    let parents = Parents { backing: None, maps: &[], packs: &packs };
    assert_eq!(pack(&mut Bad, &parents, &mut Full, &mut |_, _| {}).unwrap_err().kind(), Code::DiskFull);
    assert_eq!(pack(&mut Bad, &parents, &mut Folder::new(folder.path()), &mut |_, _| {}).unwrap_err().kind(), Code::Base);
}

//! A walk through an ext4 file system by its inodes.
//!
//! `ext4-view` resolves paths and reads files; what it does not tell is *where*
//! a file's bytes are. That is worth knowing: an image knows the digest of each
//! of its blocks, so the places of a file's bytes say whether two files of two
//! images are the same without reading either ([`Entry::place`]). Bakes on one
//! base leave nearly all files where they were, and comparing two images then
//! reads little more than their directories.
//!
//! So this reads super block, group descriptors, inodes, extents and
//! directories (kernel documentation, `filesystems/ext4`), and nothing else. A
//! file system with a feature that it does not know, or with a journal that
//! has to be replayed first, is left to `ext4-view`, whose walk knows no
//! places. Nothing that is read is trusted: numbers are checked before they
//! are used, and a directory that is met twice ends the walk.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use kiln_model::block::BLOCK;
use kiln_model::image::BlockMap;
use kiln_model::machine::{Entry, EntryKind};
use kiln_model::{Code, Digest, Error, Result};
use sha2::{Digest as _, Sha256};

use crate::files::View;

/// Features that change how things are read, and are known here: file types in
/// directories, extents, 64 bit, multiple mount protection, flexible groups,
/// attributes in inodes, checksum seed, large directories.
const KNOWN: u32 = 0x2 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000;
/// Those of them without which nothing can be read here.
const NEEDED: u32 = 0x2 | 0x40;
const WIDE: u32 = 0x80;

const INODE_EXTENTS: u32 = 0x8_0000;
const INODE_INLINE: u32 = 0x1000_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
const ATTRIBUTES: u32 = 0xea02_0000;
const ROOT: u32 = 2;

/// Largest directory in bytes: some two million names.
const DIRECTORY_LIMIT: u64 = 128 << 20;
/// Longest target of a symbolic link in bytes.
const LINK_LIMIT: u64 = 4096;
/// Largest value of an extended attribute in bytes: the kernel's own bound.
const ATTRIBUTE_LIMIT: u64 = 64 << 10;
/// Most nodes of one file's extent tree.
const NODE_LIMIT: usize = 1 << 20;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn wide(high: impl Into<u64>, low: u32) -> u64 {
    high.into() << 32 | u64::from(low)
}

fn corrupt(what: &str) -> Error {
    Error::new(Code::Failed, format!("the file system of the stopped disk is damaged: {what}"))
}

/// A stretch of a file on the disk: in blocks of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// First block within the file.
    logical: u64,
    /// First block of the file system; `None` where it reads as zeros.
    physical: Option<u64>,
    blocks: u64,
}

/// An inode as it is on the disk.
struct Inode(Vec<u8>);

impl Inode {
    fn mode(&self) -> u16 {
        u16_at(&self.0, 0)
    }
    fn flags(&self) -> u32 {
        u32_at(&self.0, 0x20)
    }
    fn size(&self) -> u64 {
        wide(u32_at(&self.0, 0x6c), u32_at(&self.0, 0x4))
    }
    /// The root of the extent tree, a short link's target, a device's numbers.
    fn inner(&self) -> &[u8] {
        self.0.get(0x28..0x28 + 60).unwrap_or_default()
    }
    fn modified(&self) -> i64 {
        let seconds = i64::from(u32_at(&self.0, 0x10).cast_signed());
        let has_extra = self.0.len() > 0x8c && u16_at(&self.0, 0x80) >= 0x8c - 0x80;
        let epoch = if has_extra { i64::from(u32_at(&self.0, 0x88) & 3) } else { 0 };
        seconds + (epoch << 32)
    }
    fn device(&self) -> (u32, u32) {
        let (old, new) = (u32_at(self.inner(), 0), u32_at(self.inner(), 4));
        if old != 0 { (old >> 8 & 0xff, old & 0xff) } else { (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00) }
    }
}

/// The inodes of a file system.
pub(crate) struct Inodes {
    view: View,
    block: u64,
    blocks: u64,
    inode_size: u64,
    per_group: u32,
    count: u32,
    /// First block of each group's inode table.
    tables: Vec<u64>,
    map: Option<Arc<BlockMap>>,
}

/// A name in a directory, and its inode.
type Name = (Vec<u8>, u32);

/// How far a walk has come.
pub(crate) struct InodeWalk {
    /// The directories on the way, each with what of it was not visited yet.
    stack: Vec<(Vec<u8>, std::vec::IntoIter<Name>)>,
    directories: HashSet<u32>,
}

impl Inodes {
    /// The file system that `view` begins with; `None` when it is one that
    /// this does not know. `map` gives the digests of the disk's blocks.
    pub(crate) fn open(view: View, map: Option<Arc<BlockMap>>) -> Result<Option<Self>> {
        let mut head = vec![0; 1024];
        view.bytes(1024, &mut head)?;
        let features = u32_at(&head, 0x60);
        let log = u32_at(&head, 0x18);
        if u16_at(&head, 0x38) != 0xef53 || u32_at(&head, 0x4c) == 0 || features & !KNOWN != 0 || features & NEEDED != NEEDED || log > 5 {
            return Ok(None);
        }
        let block = 1024_u64 << log;
        let wide_descriptors = features & WIDE != 0;
        let blocks = wide(if wide_descriptors { u32_at(&head, 0x150) } else { 0 }, u32_at(&head, 0x4));
        let descriptor = if wide_descriptors { u64::from(u16_at(&head, 0xfe)) } else { 32 };
        let first = u64::from(u32_at(&head, 0x14));
        let (per_group, blocks_per_group) = (u32_at(&head, 0x28), u64::from(u32_at(&head, 0x20)));
        let (count, inode_size) = (u32_at(&head, 0), u64::from(u16_at(&head, 0x58)));
        let sound = (128..=block).contains(&inode_size) && (32..=1024).contains(&descriptor) && per_group > 0 && blocks_per_group > 0;
        let groups = if sound { blocks.saturating_sub(first).div_ceil(blocks_per_group) } else { 0 };
        if groups == 0 || blocks > view.size() / block || u64::from(count) > groups * u64::from(per_group) {
            return Ok(None);
        }
        let mut table = vec![0; usize::try_from(groups * descriptor).map_err(|_| corrupt("it has too many groups"))?];
        view.bytes((first + 1) * block, &mut table)?;
        let start = |group: &[u8]| wide(if descriptor >= 64 { u32_at(group, 0x28) } else { 0 }, u32_at(group, 0x8));
        let tables = table.chunks(usize::try_from(descriptor).unwrap_or(32)).map(start).collect();
        Ok(Some(Self { view, block, blocks, inode_size, per_group, count, tables, map }))
    }

    /// A walk from the root.
    pub(crate) fn walk(&self) -> Result<InodeWalk> {
        let root = self.directory(&self.inode(ROOT)?)?;
        Ok(InodeWalk { stack: vec![(b"/".to_vec(), root.into_iter())], directories: HashSet::from([ROOT]) })
    }

    /// The next entry of a walk.
    pub(crate) fn next(&self, walk: &mut InodeWalk) -> Result<Option<Entry>> {
        let (folder, name, number) = loop {
            let Some((folder, names)) = walk.stack.last_mut() else { return Ok(None) };
            match names.next() {
                Some((name, number)) => break (folder, name, number),
                None => walk.stack.pop(),
            };
        };
        let path = [folder.as_slice(), &name].concat();
        let inode = self.inode(number)?;
        let kind = self.kind(&inode)?;
        let file = kind == EntryKind::File;
        if kind == EntryKind::Directory {
            if !walk.directories.insert(number) {
                return Err(corrupt("a directory is inside of itself"));
            }
            let inside = self.directory(&inode)?;
            walk.stack.push(([path.as_slice(), b"/"].concat(), inside.into_iter()));
        }
        Ok(Some(Entry {
            path,
            kind,
            mode: inode.mode() & 0o7777,
            uid: u32::from(u16_at(&inode.0, 0x2)) | u32::from(u16_at(&inode.0, 0x78)) << 16,
            gid: u32::from(u16_at(&inode.0, 0x18)) | u32::from(u16_at(&inode.0, 0x7a)) << 16,
            size: if file { inode.size() } else { 0 },
            modified: inode.modified(),
            attributes: Some(self.attributes(&inode)?),
            place: if file { self.place(&inode)? } else { None },
            position: if file { self.position(&inode) } else { 0 },
        }))
    }

    fn inode(&self, number: u32) -> Result<Inode> {
        if number == 0 || number > self.count {
            return Err(corrupt("a name points to no inode"));
        }
        let (group, index) = ((number - 1) / self.per_group, u64::from((number - 1) % self.per_group));
        let table = *self.tables.get(group as usize).ok_or_else(|| corrupt("a name points to no inode"))?;
        let at = table.checked_mul(self.block).and_then(|at| at.checked_add(index * self.inode_size));
        let mut bytes = vec![0; usize::try_from(self.inode_size).unwrap_or(128)];
        self.view.bytes(at.ok_or_else(|| corrupt("an inode is outside of the disk"))?, &mut bytes)?;
        Ok(Inode(bytes))
    }

    fn kind(&self, inode: &Inode) -> Result<EntryKind> {
        Ok(match inode.mode() >> 12 {
            0x8 => EntryKind::File,
            0x4 => EntryKind::Directory,
            0xa => EntryKind::Link(self.target(inode)?),
            0x6 => EntryKind::BlockDevice(Some(inode.device())),
            0x2 => EntryKind::CharacterDevice(Some(inode.device())),
            0x1 => EntryKind::Pipe,
            0xc => EntryKind::Socket,
            _ => return Err(corrupt("a name points to an inode that is not in use")),
        })
    }

    fn target(&self, inode: &Inode) -> Result<Vec<u8>> {
        let size = inode.size();
        match usize::try_from(size) {
            Ok(length) if length < 60 && inode.flags() & INODE_EXTENTS == 0 => Ok(inode.inner()[..length].to_vec()),
            _ if size > LINK_LIMIT => Err(corrupt("a link's target is too long")),
            _ => self.content(inode),
        }
    }

    /// The runs of an inode in the order of the file, holes left out.
    fn runs(&self, inode: &Inode) -> Result<Vec<Run>> {
        let (mut runs, mut nodes) = (Vec::new(), 0);
        self.extents(inode.inner(), 5, &mut nodes, &mut runs)?;
        Ok(runs)
    }

    fn extents(&self, node: &[u8], most: u16, nodes: &mut usize, runs: &mut Vec<Run>) -> Result<()> {
        let (entries, depth) = (usize::from(u16_at(node, 2)), u16_at(node, 6));
        *nodes += 1;
        if u16_at(node, 0) != EXTENT_MAGIC || depth > most || *nodes > NODE_LIMIT || 12 + entries * 12 > node.len() {
            return Err(corrupt("a file's extents make no sense"));
        }
        for entry in node[12..].chunks_exact(12).take(entries) {
            if depth > 0 {
                let at = wide(u16_at(entry, 8), u32_at(entry, 4));
                let mut below = vec![0; usize::try_from(self.block).unwrap_or(4096)];
                self.view.bytes(self.inside(at, 1)?, &mut below)?;
                self.extents(&below, depth - 1, nodes, runs)?;
                continue;
            }
            // Beyond 32768: set aside, not written yet, reads as zeros.
            let length = u16_at(entry, 4);
            let (blocks, written) = if length > 0x8000 { (u64::from(length - 0x8000), false) } else { (u64::from(length), true) };
            let (logical, physical) = (u64::from(u32_at(entry, 0)), wide(u16_at(entry, 6), u32_at(entry, 8)));
            self.inside(physical, blocks)?;
            if runs.last().is_some_and(|last: &Run| last.logical + last.blocks > logical) {
                return Err(corrupt("a file's extents overlap"));
            }
            runs.push(Run { logical, physical: written.then_some(physical), blocks });
        }
        Ok(())
    }

    /// The first byte of blocks that have to be there.
    fn inside(&self, first: u64, count: u64) -> Result<u64> {
        match first.checked_add(count) {
            Some(end) if end <= self.blocks => Ok(first * self.block),
            _ => Err(corrupt("a file reaches beyond the end of the file system")),
        }
    }

    /// The bytes of something small that is not a regular file.
    fn content(&self, inode: &Inode) -> Result<Vec<u8>> {
        if inode.flags() & INODE_EXTENTS == 0 {
            return Err(Error::new(Code::Failed, "the file system has directories or links without extents"));
        }
        let size = inode.size();
        let mut bytes = vec![0; usize::try_from(size).map_err(|_| corrupt("a directory is too large"))?];
        for run in self.runs(inode)? {
            let Some(physical) = run.physical else { continue };
            let Range { start, end } = run.logical * self.block..((run.logical + run.blocks) * self.block).min(size);
            if let (Ok(from), Ok(to)) = (usize::try_from(start), usize::try_from(end))
                && let Some(part) = bytes.get_mut(from..to)
            {
                self.view.bytes(physical * self.block, part)?;
            }
        }
        Ok(bytes)
    }

    /// The names in a directory with their inodes, in the order of their bytes.
    fn directory(&self, inode: &Inode) -> Result<Vec<Name>> {
        if inode.size() > DIRECTORY_LIMIT {
            return Err(corrupt("a directory is too large"));
        }
        let bytes = self.content(inode)?;
        let mut names = Vec::new();
        // Nodes of a directory's index look like one entry that is not in use.
        for block in bytes.chunks(usize::try_from(self.block).unwrap_or(4096)) {
            let mut rest = block;
            while rest.len() >= 8 {
                let (number, length, name) = (u32_at(rest, 0), usize::from(u16_at(rest, 4)), usize::from(rest[6]));
                if length < 8 || length > rest.len() || name + 8 > length {
                    return Err(corrupt("a directory's entries make no sense"));
                }
                let text = &rest[8..8 + name];
                if number != 0 && text != b"." && text != b".." {
                    if text.is_empty() || text.contains(&b'/') || text.contains(&0) {
                        return Err(corrupt("a directory holds what is no name"));
                    }
                    names.push((text.to_vec(), number));
                }
                rest = &rest[length..];
            }
        }
        names.sort();
        Ok(names)
    }

    /// The extended attributes of an inode: behind its fields, and in a block
    /// of their own.
    fn attributes(&self, inode: &Inode) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut found = Vec::new();
        let extra = if inode.0.len() > 0x82 { usize::from(u16_at(&inode.0, 0x80)) } else { 0 };
        let inside = inode.0.get(0x80 + extra..).unwrap_or_default();
        if extra > 0 && u32_at(inside, 0) == ATTRIBUTES {
            self.attributes_in(&inside[4..], &inside[4..], &mut found)?;
        }
        let block = wide(u16_at(&inode.0, 0x76), u32_at(&inode.0, 0x68));
        if block != 0 {
            let mut bytes = vec![0; usize::try_from(self.block).unwrap_or(4096)];
            self.view.bytes(self.inside(block, 1)?, &mut bytes)?;
            if u32_at(&bytes, 0) != ATTRIBUTES {
                return Err(corrupt("a file's attributes make no sense"));
            }
            self.attributes_in(&bytes[32..], &bytes, &mut found)?;
        }
        found.sort();
        Ok(found)
    }

    /// The attributes listed in `entries`, whose values are in `values`.
    fn attributes_in(&self, mut entries: &[u8], values: &[u8], found: &mut Vec<(Vec<u8>, Vec<u8>)>) -> Result<()> {
        // Four zero bytes end the list.
        while entries.len() >= 16 && u32_at(entries, 0) != 0 {
            let (length, prefix) = (usize::from(entries[0]), entries[1]);
            let name = entries.get(16..16 + length);
            let (elsewhere, size) = (u32_at(entries, 4), u32_at(entries, 8) as usize);
            let start = usize::from(u16_at(entries, 2));
            let value = match elsewhere {
                0 => values.get(start..start + size).map(<[u8]>::to_vec),
                // So large that it has an inode of its own.
                number => match self.inode(number)? {
                    inode if inode.size() <= ATTRIBUTE_LIMIT => Some(self.content(&inode)?),
                    _ => None,
                },
            };
            let (Some(name), Some(value)) = (name, value) else { return Err(corrupt("a file's attributes make no sense")) };
            let prefix: &[u8] = match prefix {
                1 => b"user.",
                2 => b"system.posix_acl_access",
                3 => b"system.posix_acl_default",
                4 => b"trusted.",
                6 => b"security.",
                7 => b"system.",
                _ => b"unknown.",
            };
            found.push(([prefix, name].concat(), value));
            entries = entries.get((16 + length).next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(())
    }

    /// See [`Entry::position`].
    fn position(&self, inode: &Inode) -> u64 {
        if inode.flags() & INODE_EXTENTS == 0 || inode.flags() & INODE_INLINE != 0 {
            return 0;
        }
        // The root of the tree tells where the first blocks are, or those that
        // say so: near enough.
        let entry = inode.inner().get(12..24).unwrap_or_default();
        let deep = u16_at(inode.inner(), 6) > 0;
        let first = if deep { wide(u16_at(entry, 8), u32_at(entry, 4)) } else { wide(u16_at(entry, 6), u32_at(entry, 8)) };
        first.saturating_mul(self.block)
    }

    /// See [`Entry::place`].
    fn place(&self, inode: &Inode) -> Result<Option<Digest>> {
        let Some(map) = &self.map else { return Ok(None) };
        if inode.flags() & INODE_EXTENTS == 0 || inode.flags() & INODE_INLINE != 0 {
            return Ok(None);
        }
        let size = inode.size();
        let mut hasher = Sha256::new();
        hasher.update(b"kiln-place-v1\n");
        hasher.update(size.to_le_bytes());
        let mut piece = |digest: &[u8; 32], from: u64, length: u64| {
            hasher.update(digest);
            hasher.update(from.to_le_bytes());
            hasher.update(length.to_le_bytes());
        };
        let mut at = 0;
        for run in self.runs(inode)? {
            let start = (run.logical * self.block).min(size);
            let end = ((run.logical + run.blocks) * self.block).min(size);
            if start > at {
                piece(&[0; 32], 0, start - at);
            }
            at = end.max(at);
            let Some(physical) = run.physical else {
                piece(&[0; 32], 0, end - start);
                continue;
            };
            let (mut from, mut left) = (self.view.offset + physical * self.block, end - start);
            while left > 0 {
                let length = left.min(BLOCK - from % BLOCK);
                let block = usize::try_from(from / BLOCK).ok().and_then(|index| map.blocks.get(index));
                let Some(block) = block else { return Err(corrupt("a file reaches beyond the end of the disk")) };
                piece(block.digest.as_bytes(), from % BLOCK, length);
                (from, left) = (from + length, left - length);
            }
        }
        if size > at {
            piece(&[0; 32], 0, size - at);
        }
        Ok(Some(Digest::finish(hasher)))
    }
}

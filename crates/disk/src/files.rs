//! The files of a stopped disk, read without a guest and without root.
//!
//! Only ext2, ext3 and ext4 can be read (by the crate `ext4-view`, which also
//! replays a journal in memory; a walk goes by the inodes where it can, see
//! `inodes.rs`). A thread owns the file system: the crate's types stay on one
//! thread, while the answer may be used from any.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use ext4_view::{DirEntry, Ext4, Ext4Error, Ext4Read, FileType};
use kiln_model::block::{BLOCK, BlockSource};
use kiln_model::image::BlockMap;
use kiln_model::machine::{Entry, EntryKind, FileKind, Files, Walk};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};

use crate::blocks::BLOCK_LEN;
use crate::gpt::{self, Disk, Role};
use crate::inodes::{InodeWalk, Inodes};

/// How much is read from a machine's disk at once, in bytes.
const PAGE: u64 = 64 << 10;

/// How many bytes of pages are kept for each disk.
const KEPT: u64 = 4 << 20;

/// How many bytes of pages are kept for all images that share a [`Pool`].
const POOLED: usize = 64 << 20;

/// The largest file that is read whole, in bytes: those looked at are small.
const FILE_LIMIT: u64 = 64 << 20;

/// How much of an open file is read at once, in bytes.
const PIECE: usize = 256 << 10;

/// How many entries of a walk are asked for at once.
const ENTRIES: usize = 512;

type Question = Box<dyn FnOnce(&Root) + Send>;

/// What the thread owns.
struct Root {
    files: Ext4,
    inodes: Option<Inodes>,
    open: RefCell<HashMap<u64, ext4_view::File>>,
    walks: RefCell<HashMap<u64, Walking>>,
    next: Cell<u64>,
}

impl Root {
    fn number(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }
}

/// Blocks of images by their digests, the one used last first. To read one is
/// to take its frame apart and to check it, which takes milliseconds; two images
/// of one base, walked side by side, need most of them only once.
#[derive(Clone, Default)]
pub struct Pool(Arc<Mutex<Vec<Pooled>>>);

type Pooled = (Digest, Arc<Vec<u8>>);

impl Pool {
    fn get(&self, digest: &Digest) -> Option<Arc<Vec<u8>>> {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = pages.iter().position(|page| page.0 == *digest)?;
        pages[..=at].rotate_right(1);
        Some(pages[0].1.clone())
    }

    fn put(&self, digest: Digest, page: Arc<Vec<u8>>) {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pages.truncate(POOLED / BLOCK_LEN - 1);
        pages.insert(0, (digest, page));
    }
}

/// The root file system of a disk.
pub struct DiskFiles {
    /// Present until it is dropped.
    questions: Mutex<Option<mpsc::Sender<Question>>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl DiskFiles {
    /// Finds the root file system of `source`. `None` when there is none that
    /// can be read (another file system, LVM, encryption).
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn open(source: Box<dyn BlockSource>) -> Result<Option<Self>> {
        Self::start(source, None)
    }

    /// The same of a disk whose blocks have known digests: its walk can tell
    /// where files are ([`Entry::place`]). Images that are compared share a
    /// `pool`.
    ///
    /// # Errors
    /// As [`DiskFiles::open`].
    pub fn of_image(source: Box<dyn BlockSource>, map: BlockMap, pool: &Pool) -> Result<Option<Self>> {
        Self::start(source, Some((Arc::new(map), pool.clone())))
    }

    fn start(source: Box<dyn BlockSource>, map: Option<(Arc<BlockMap>, Pool)>) -> Result<Option<Self>> {
        let (questions, asked) = mpsc::channel::<Question>();
        let (answer, opened) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("kiln-files".into()).spawn(move || match find_root(source, map) {
            Ok(Some(root)) => {
                let _ = answer.send(Ok(true));
                for question in asked {
                    question(&root);
                }
            }
            Ok(None) => drop(answer.send(Ok(false))),
            Err(error) => drop(answer.send(Err(error))),
        });
        let thread = Some(thread.trying(|| "read the stopped disk's files".into())?);
        let files = Self { questions: Mutex::new(Some(questions)), thread };
        let found = opened.recv().map_err(|_| gone())??;
        Ok(found.then_some(files))
    }

    fn ask<T: Send + 'static>(&self, question: impl FnOnce(&Root) -> Result<T> + Send + 'static) -> Result<T> {
        let (answer, answered) = mpsc::sync_channel(1);
        let boxed: Question = Box::new(move |root| drop(answer.send(question(root))));
        self.put(boxed)?;
        answered.recv().map_err(|_| gone())?
    }

    fn put(&self, question: Question) -> Result<()> {
        let sent = self.questions.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|questions| questions.send(question));
        sent.ok_or_else(gone)?.map_err(|_| gone())
    }
}

impl Drop for DiskFiles {
    /// Waits until the disk is closed: its server is gone then too.
    fn drop(&mut self) {
        drop(self.questions.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Files for DiskFiles {
    fn kind(&self, path: &str) -> Result<Option<FileKind>> {
        let path = path.to_owned();
        self.ask(move |root| kind(&root.files, &path))
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        let path = path.to_owned();
        self.ask(move |root| {
            if kind(&root.files, &path)? != Some(FileKind::Directory) {
                return Ok(Vec::new());
            }
            let unreadable = |error| damaged(&path, error);
            let mut names = Vec::new();
            for entry in root.files.read_dir(path.as_str()).map_err(unreadable)? {
                let name = String::from_utf8_lossy(entry.map_err(unreadable)?.file_name().as_ref()).into_owned();
                if name != "." && name != ".." {
                    names.push(name);
                }
            }
            names.sort();
            Ok(names)
        })
    }

    fn read(&self, path: &str) -> Result<Vec<u8>> {
        let path = path.to_owned();
        self.ask(move |root| match kind(&root.files, &path)? {
            Some(FileKind::File(size)) if size <= FILE_LIMIT => root.files.read(path.as_str()).map_err(|error| damaged(&path, error)),
            Some(FileKind::File(size)) => Err(Error::new(Code::Failed, format!("{path} is too large to look at ({size} bytes)"))),
            Some(_) => Err(Error::new(Code::NotFound, format!("{path} on the stopped disk is not a regular file"))),
            None => Err(Error::new(Code::NotFound, format!("there is no {path} on the stopped disk"))),
        })
    }

    fn open(&self, path: &[u8]) -> Result<Box<dyn io::Read + '_>> {
        let path = path.to_vec();
        let number = self.ask(move |root| {
            let shown = String::from_utf8_lossy(&path).into_owned();
            match root.files.symlink_metadata(path.as_slice()) {
                Ok(meta) if meta.file_type().is_regular_file() => {}
                Ok(_) => return Err(Error::new(Code::NotFound, format!("{shown} on the stopped disk is not a regular file"))),
                Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => {
                    return Err(Error::new(Code::NotFound, format!("there is no {shown} on the stopped disk")));
                }
                Err(error) => return Err(damaged(&shown, error)),
            }
            let file = root.files.open(path.as_slice()).map_err(|error| damaged(&shown, error))?;
            let number = root.number();
            root.open.borrow_mut().insert(number, file);
            Ok(number)
        })?;
        Ok(Box::new(OpenFile { files: self, number, piece: Vec::new(), at: 0 }))
    }

    fn walk(&self) -> Result<Walk<'_>> {
        let number = self.ask(|root| {
            let walk = match &root.inodes {
                Some(inodes) => Walking::Inodes(inodes.walk()?),
                None => Walking::Tree(vec![children(&root.files, b"/")?]),
            };
            let number = root.number();
            root.walks.borrow_mut().insert(number, walk);
            Ok(number)
        })?;
        Ok(Box::new(Entries { files: self, number, batch: Vec::new().into_iter(), ended: false }))
    }
}

/// An open file, whose other half is on the thread.
struct OpenFile<'a> {
    files: &'a DiskFiles,
    number: u64,
    piece: Vec<u8>,
    at: usize,
}

impl io::Read for OpenFile<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            let (number, mut piece) = (self.number, std::mem::take(&mut self.piece));
            let read = move |root: &Root| {
                let mut open = root.open.borrow_mut();
                let file = open.get_mut(&number).ok_or_else(gone)?;
                piece.resize(PIECE, 0);
                let mut filled = 0;
                while filled < PIECE {
                    match file.read_bytes(&mut piece[filled..]).map_err(|error| damaged("a file", error))? {
                        0 => break,
                        count => filled += count,
                    }
                }
                piece.truncate(filled);
                Ok(piece)
            };
            self.piece = self.files.ask(read).map_err(io::Error::other)?;
            self.at = 0;
        }
        let rest = &self.piece[self.at..];
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        Ok(count)
    }
}

impl Drop for OpenFile<'_> {
    fn drop(&mut self) {
        let number = self.number;
        drop(self.files.put(Box::new(move |root| drop(root.open.borrow_mut().remove(&number)))));
    }
}

/// How far a walk has come; by inodes, or by what `ext4-view` lists.
enum Walking {
    Inodes(InodeWalk),
    Tree(Vec<Level>),
}

/// A directory's path, and what of it has not been visited.
type Level = (Vec<u8>, std::vec::IntoIter<DirEntry>);

/// A walk, whose other half is on the thread.
struct Entries<'a> {
    files: &'a DiskFiles,
    number: u64,
    batch: std::vec::IntoIter<Result<Entry>>,
    ended: bool,
}

impl Iterator for Entries<'_> {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(entry) = self.batch.next() {
            return Some(entry);
        }
        if self.ended {
            return None;
        }
        let number = self.number;
        let more = self.files.ask(move |root| {
            let mut walks = root.walks.borrow_mut();
            let walk = walks.get_mut(&number).ok_or_else(gone)?;
            let mut batch = Vec::new();
            while batch.len() < ENTRIES {
                let next = match (&mut *walk, &root.inodes) {
                    (Walking::Inodes(walk), Some(inodes)) => inodes.next(walk),
                    (Walking::Tree(stack), _) => next_of_tree(&root.files, stack),
                    (Walking::Inodes(_), None) => Ok(None),
                };
                let last = !matches!(next, Ok(Some(_)));
                batch.extend(next.transpose());
                if last {
                    return Ok((batch, true));
                }
            }
            Ok((batch, false))
        });
        match more {
            Ok((batch, ended)) => (self.batch, self.ended) = (batch.into_iter(), ended),
            Err(error) => {
                self.ended = true;
                return Some(Err(error));
            }
        }
        self.batch.next()
    }
}

impl Drop for Entries<'_> {
    fn drop(&mut self) {
        let number = self.number;
        drop(self.files.put(Box::new(move |root| drop(root.walks.borrow_mut().remove(&number)))));
    }
}

/// What is in a directory, in the order of the bytes of the names.
fn children(files: &Ext4, path: &[u8]) -> Result<Level> {
    let unreadable = |error| damaged(&String::from_utf8_lossy(path), error);
    let mut entries = Vec::new();
    for entry in files.read_dir(path).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if ![b".".as_slice(), b".."].contains(&entry.file_name().as_ref()) {
            entries.push(entry);
        }
    }
    entries.sort_by(|a, b| a.file_name().as_ref().cmp(b.file_name().as_ref()));
    Ok((path.to_vec(), entries.into_iter()))
}

/// The deepest directory that is gone into: one that is inside of itself would
/// have no end.
const DEPTH: usize = 1024;

fn next_of_tree(files: &Ext4, stack: &mut Vec<Level>) -> Result<Option<Entry>> {
    let (folder, found) = loop {
        let Some((folder, entries)) = stack.last_mut() else { return Ok(None) };
        match entries.next() {
            Some(entry) => break (folder, entry),
            None => stack.pop(),
        };
    };
    let slash: &[u8] = if folder.ends_with(b"/") { b"" } else { b"/" };
    let path = [folder.as_slice(), slash, found.file_name().as_ref()].concat();
    let unreadable = |error| damaged(&String::from_utf8_lossy(&path), error);
    let meta = found.metadata().map_err(unreadable)?;
    let kind = match meta.file_type() {
        FileType::Regular => EntryKind::File,
        FileType::Directory => EntryKind::Directory,
        FileType::Symlink => EntryKind::Link(files.read_link(path.as_slice()).map_err(unreadable)?.as_ref().to_vec()),
        FileType::BlockDevice => EntryKind::BlockDevice(None),
        FileType::CharacterDevice => EntryKind::CharacterDevice(None),
        FileType::Fifo => EntryKind::Pipe,
        FileType::Socket => EntryKind::Socket,
    };
    if kind == EntryKind::Directory {
        if stack.len() > DEPTH {
            return Err(Error::new(Code::Failed, "the stopped disk has directories too deep in each other"));
        }
        let below = children(files, &path)?;
        stack.push(below);
    }
    let size = if kind == EntryKind::File { meta.len() } else { 0 };
    let (mode, uid, gid, modified) = (meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.modified().seconds());
    Ok(Some(Entry { path, kind, mode, uid, gid, size, modified, attributes: None, place: None, position: 0 }))
}

fn kind(root: &Ext4, path: &str) -> Result<Option<FileKind>> {
    let meta = match root.symlink_metadata(path) {
        Ok(meta) => meta,
        Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(None),
        Err(error) => return Err(damaged(path, error)),
    };
    Ok(Some(match meta.file_type() {
        kind if kind.is_regular_file() => FileKind::File(meta.len()),
        kind if kind.is_dir() => FileKind::Directory,
        kind if kind.is_symlink() => FileKind::Link,
        _ => FileKind::Other,
    }))
}

/// The first file system that can be read and has a root's folders; partitions
/// that say they are the root come first.
fn find_root(mut source: Box<dyn BlockSource>, image: Option<(Arc<BlockMap>, Pool)>) -> Result<Option<Root>> {
    let mut places = gpt::partitions(&mut Reading(source.as_mut())).trying(|| "read the stopped disk's partition table".into())?;
    places.retain(|partition| partition.role != Role::Other);
    places.sort_by_key(|partition| partition.role != Role::Root);
    let mut offsets: Vec<u64> = places.iter().map(|partition| partition.offset).collect();
    if offsets.is_empty() {
        // A file system on the whole disk.
        offsets.push(0);
    }
    let page = if image.is_some() { BLOCK } else { PAGE };
    let most = usize::try_from(KEPT / page).unwrap_or(1);
    let map = image.as_ref().map(|(map, _)| map.clone());
    let shared = Rc::new(RefCell::new(Cache { source, image, page, most, pages: Vec::new() }));
    for offset in offsets {
        let view = View { cache: shared.clone(), offset };
        let Ok(files) = Ext4::load(Box::new(view.clone())) else { continue };
        let is_root = ["/etc/os-release", "/usr/lib/os-release", "/etc/passwd", "/sbin/init"];
        if is_root.iter().any(|path| files.symlink_metadata(*path).is_ok()) {
            let inodes = Inodes::open(view, map)?;
            return Ok(Some(Root { files, inodes, open: RefCell::default(), walks: RefCell::default(), next: Cell::new(0) }));
        }
    }
    Ok(None)
}

/// A source as a disk whose table is read.
struct Reading<'a>(&'a mut dyn BlockSource);

impl Disk for Reading<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer).map_err(io::Error::other)
    }
    fn write_at(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

/// The pages read last, newest first: file systems come back to the same few.
struct Cache {
    source: Box<dyn BlockSource>,
    /// The blocks' digests, and where blocks are kept by them.
    image: Option<(Arc<BlockMap>, Pool)>,
    /// Bytes of a page; of an image's disk a block's.
    page: u64,
    /// How many are kept.
    most: usize,
    pages: Vec<(u64, Arc<Vec<u8>>)>,
}

impl Cache {
    fn page(&mut self, number: u64) -> Result<&[u8]> {
        match self.pages.iter().position(|page| page.0 == number) {
            Some(0) => {}
            Some(at) => self.pages[..=at].rotate_right(1),
            None => {
                let bytes = self.load(number)?;
                self.pages.truncate(self.most - 1);
                self.pages.insert(0, (number, bytes));
            }
        }
        Ok(&self.pages[0].1)
    }

    fn load(&mut self, number: u64) -> Result<Arc<Vec<u8>>> {
        let start = number.saturating_mul(self.page);
        let length = self.page.min(self.source.size().saturating_sub(start));
        // The last block may be cut short, which its digest does not say.
        let pooled = self.image.as_ref().filter(|_| length == BLOCK).and_then(|(map, pool)| {
            let block = map.blocks.get(usize::try_from(number).ok()?)?;
            Some((block.digest, pool))
        });
        if let Some(page) = pooled.and_then(|(digest, pool)| pool.get(&digest)) {
            return Ok(page);
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        self.source.read_at(start, &mut bytes)?;
        let page = Arc::new(bytes);
        if let Some((digest, pool)) = pooled {
            pool.put(digest, page.clone());
        }
        Ok(page)
    }

    fn read(&mut self, mut offset: u64, mut into: &mut [u8]) -> Result<()> {
        while !into.is_empty() {
            let within = usize::try_from(offset % self.page).unwrap_or(0);
            let page = self.page(offset / self.page)?;
            let part = page.get(within..).unwrap_or_default();
            let count = part.len().min(into.len());
            if count == 0 {
                return Err(Error::new(Code::Corrupt, "the file system reaches beyond the end of the disk"));
            }
            into[..count].copy_from_slice(&part[..count]);
            into = &mut into[count..];
            offset += count as u64;
        }
        Ok(())
    }
}

/// A source from one of its bytes on.
#[derive(Clone)]
pub(crate) struct View {
    cache: Rc<RefCell<Cache>>,
    /// That byte.
    pub(crate) offset: u64,
}

impl View {
    /// Fills `into` from `start`.
    pub(crate) fn bytes(&self, start: u64, into: &mut [u8]) -> Result<()> {
        let outside = || Error::new(Code::Corrupt, "the file system reaches beyond the end of the disk");
        self.cache.borrow_mut().read(self.offset.checked_add(start).ok_or_else(outside)?, into)
    }

    /// How many bytes there are.
    pub(crate) fn size(&self) -> u64 {
        self.cache.borrow().source.size().saturating_sub(self.offset)
    }
}

impl Ext4Read for View {
    fn read(&mut self, start: u64, into: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        self.bytes(start, into).map_err(Into::into)
    }
}

fn damaged(path: &str, error: Ext4Error) -> Error {
    Error::new(Code::Failed, format!("cannot read {path} on the stopped disk")).because(error)
}

fn gone() -> Error {
    Error::new(Code::Failed, "reading the stopped disk's files ended unexpectedly")
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_model::block::{Content, Extent};

    struct Bytes(Vec<u8>);

    impl BlockSource for Bytes {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }
        fn extents(&mut self) -> Result<Vec<Extent>> {
            Ok(vec![Extent { offset: 0, length: self.size(), content: Content::Data }])
        }
        fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            let at = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
            Ok(())
        }
    }

    #[test]
    fn reads_a_file_system_made_by_mke2fs() {
        let Some(mke2fs) = kiln_process::find("mke2fs").or_else(|| kiln_process::find("/sbin/mke2fs")) else { return };
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        std::fs::create_dir_all(tree.join("etc/empty")).unwrap();
        std::fs::write(tree.join("etc/os-release"), "ID=debian\n").unwrap();
        std::fs::write(tree.join("etc/large"), vec![7; 3 << 20]).unwrap();
        std::os::unix::fs::symlink("etc/os-release", tree.join("link")).unwrap();
        std::os::unix::fs::symlink("etc", tree.join("folder")).unwrap();
        let image = folder.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let mut command = std::process::Command::new(mke2fs);
        command.args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image);
        kiln_process::run(command).unwrap();

        let files = DiskFiles::open(Box::new(Bytes(std::fs::read(&image).unwrap()))).unwrap().unwrap();
        assert_eq!(files.read("/etc/os-release").unwrap(), b"ID=debian\n");
        assert_eq!(files.read("/folder/os-release").unwrap(), b"ID=debian\n");
        assert_eq!(files.read("/etc/large").unwrap().len(), 3 << 20);
        assert_eq!(files.kind("/link").unwrap(), Some(FileKind::Link));
        assert_eq!(files.kind("/etc/empty").unwrap(), Some(FileKind::Directory));
        assert_eq!(files.kind("/etc/none").unwrap(), None);
        assert_eq!(files.kind("/etc/os-release/none").unwrap(), None);
        assert_eq!(files.list("/etc").unwrap(), ["empty", "large", "os-release"]);
        assert!(files.list("/none").unwrap().is_empty());
        assert_eq!(files.read("/link").unwrap_err().kind(), Code::NotFound);
        fn sendable(_: Box<dyn Files>) {}
        sendable(Box::new(files));
    }

    #[test]
    fn other_disks_have_no_files() {
        assert!(DiskFiles::open(Box::new(Bytes(vec![0; 1 << 20]))).unwrap().is_none());
        assert!(DiskFiles::open(Box::new(Bytes(vec![0xff; 100]))).unwrap().is_none());
    }
}

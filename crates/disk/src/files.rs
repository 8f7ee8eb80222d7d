//! The files of a stopped disk, read without a guest and without root.
//!
//! Only ext2, ext3 and ext4 can be read (by the crate `ext4-view`, which also
//! replays a journal in memory). A thread owns the file system: the crate's
//! types stay on one thread, while the answer may be used from any.

use std::io;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use ext4_view::{Ext4, Ext4Error, Ext4Read};
use kiln_model::block::BlockSource;
use kiln_model::machine::{FileKind, Files};
use kiln_model::{Code, Error, Result, ResultExt as _};

use crate::gpt::{self, Disk, Role};

/// How much is read from the disk at once, in bytes.
const PAGE: u64 = 64 << 10;

/// How many such pages are kept: 4 MiB.
const PAGES: usize = 64;

/// The largest file that is read whole, in bytes: those looked at are small.
const FILE_LIMIT: u64 = 64 << 20;

type Question = Box<dyn FnOnce(&Ext4) + Send>;

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
        let (questions, asked) = mpsc::channel::<Question>();
        let (answer, opened) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("kiln-files".into()).spawn(move || match find_root(source) {
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

    fn ask<T: Send + 'static>(&self, question: impl FnOnce(&Ext4) -> Result<T> + Send + 'static) -> Result<T> {
        let (answer, answered) = mpsc::sync_channel(1);
        let boxed: Question = Box::new(move |root| drop(answer.send(question(root))));
        let sent = self.questions.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|questions| questions.send(boxed));
        sent.ok_or_else(gone)?.map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())?
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
        self.ask(move |root| kind(root, &path))
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        let path = path.to_owned();
        self.ask(move |root| {
            if kind(root, &path)? != Some(FileKind::Directory) {
                return Ok(Vec::new());
            }
            let unreadable = |error| damaged(&path, error);
            let mut names = Vec::new();
            for entry in root.read_dir(path.as_str()).map_err(unreadable)? {
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
        self.ask(move |root| match kind(root, &path)? {
            Some(FileKind::File(size)) if size <= FILE_LIMIT => root.read(path.as_str()).map_err(|error| damaged(&path, error)),
            Some(FileKind::File(size)) => Err(Error::new(Code::Failed, format!("{path} is too large to look at ({size} bytes)"))),
            Some(_) => Err(Error::new(Code::NotFound, format!("{path} on the stopped disk is not a regular file"))),
            None => Err(Error::new(Code::NotFound, format!("there is no {path} on the stopped disk"))),
        })
    }
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
fn find_root(mut source: Box<dyn BlockSource>) -> Result<Option<Ext4>> {
    let mut places = gpt::partitions(&mut Reading(source.as_mut())).trying(|| "read the stopped disk's partition table".into())?;
    places.retain(|partition| partition.role != Role::Other);
    places.sort_by_key(|partition| partition.role != Role::Root);
    let mut offsets: Vec<u64> = places.iter().map(|partition| partition.offset).collect();
    if offsets.is_empty() {
        // A file system on the whole disk.
        offsets.push(0);
    }
    let shared = std::rc::Rc::new(std::cell::RefCell::new(Cache { source, pages: Vec::new() }));
    for offset in offsets {
        let Ok(root) = Ext4::load(Box::new(View { cache: shared.clone(), offset })) else { continue };
        let is_root = ["/etc/os-release", "/usr/lib/os-release", "/etc/passwd", "/sbin/init"];
        if is_root.iter().any(|path| root.symlink_metadata(*path).is_ok()) {
            return Ok(Some(root));
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
    pages: Vec<(u64, Vec<u8>)>,
}

impl Cache {
    fn page(&mut self, number: u64) -> Result<&[u8]> {
        match self.pages.iter().position(|page| page.0 == number) {
            Some(0) => {}
            Some(at) => self.pages[..=at].rotate_right(1),
            None => {
                let start = number * PAGE;
                let length = PAGE.min(self.source.size().saturating_sub(start));
                let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
                self.source.read_at(start, &mut bytes)?;
                self.pages.truncate(PAGES - 1);
                self.pages.insert(0, (number, bytes));
            }
        }
        Ok(&self.pages[0].1)
    }

    fn read(&mut self, mut offset: u64, mut into: &mut [u8]) -> Result<()> {
        while !into.is_empty() {
            let within = usize::try_from(offset % PAGE).unwrap_or(0);
            let page = self.page(offset / PAGE)?;
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

struct View {
    cache: std::rc::Rc<std::cell::RefCell<Cache>>,
    offset: u64,
}

impl Ext4Read for View {
    fn read(&mut self, start: u64, into: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let offset = self.offset.checked_add(start).ok_or("an offset out of bounds")?;
        self.cache.borrow_mut().read(offset, into).map_err(Into::into)
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
        let Some(mke2fs) = crate::process::find("mke2fs").or_else(|| crate::process::find("/sbin/mke2fs")) else { return };
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
        crate::process::run(command).unwrap();

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

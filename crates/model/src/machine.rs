//! Builders and machines. Snapshotting a machine that still runs does not
//! compile: [`Machine::stop`] consumes it and gives what can be captured.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::Digest;
use crate::base::{Base, DiskFile};
use crate::block::BlockSource;
use crate::checkpoint::{Checkpoint, Slot, Written};
use crate::cleanup::{Scope, Ticket};
use crate::error::{Error, Result};
use crate::event::Reports;
use crate::guest::Guest;
use crate::image::CloudImage;
use crate::key::Key;

/// What a builder is told of the bake it works for.
#[derive(Clone)]
pub struct Context {
    /// Bake id (ULID).
    pub bake: String,
    /// Where undoes are registered before the act.
    pub scope: Arc<Scope>,
    /// Where to say what happens.
    pub reports: Reports,
    /// A folder for this bake alone, removed at its end.
    pub work: PathBuf,
}

/// What a machine is started for.
#[derive(Debug, Clone, Default)]
pub struct Start {
    /// Virtual size of its disk in bytes; the partition and the root file
    /// system are grown to it. None: the base's own size.
    pub disk_size: Option<u64>,
    /// Ports of this machine, on loopback, that lead to ports of the guest.
    pub ports: Vec<Port>,
    /// User data as a deployment would give it (NoCloud).
    pub user_data: Option<Vec<u8>>,
    /// Whether checkpoints will be made of it: it then gets whatever that takes.
    pub checkpoints: bool,
    /// Disk digest of a base that is a file here: by it a cloud knows the image
    /// that was published of that disk.
    pub disk_digest: Option<Digest>,
}

/// One forwarded port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// TCP port on 127.0.0.1.
    pub host: u16,
    /// TCP port of the guest.
    pub guest: u16,
}

/// Gives fresh machines from a base.
#[async_trait]
pub trait Builder: Send + Sync {
    /// Its kind, as the template names it (`qemu`).
    fn kind(&self) -> &'static str;

    /// Whether its machines are at a cloud. What is baked there is an image of
    /// that cloud, and no bake elsewhere takes it for its own.
    fn at_cloud(&self) -> bool {
        false
    }

    /// The region of that cloud, where the template says one.
    fn region(&self) -> Option<&str> {
        None
    }

    /// Whether images that an earlier bake captured are still where this
    /// builder would leave them: all of them, and in all regions.
    ///
    /// # Errors
    /// When that cannot be asked.
    async fn still_there(&self, _images: &[CloudImage], _context: &Context) -> Result<bool> {
        Ok(true)
    }

    /// Bytes of this machine's memory that one of its machines takes; nothing
    /// where they run elsewhere.
    fn memory(&self) -> u64 {
        0
    }

    /// What a memory checkpoint depends on beside the step: machine shape,
    /// version of the hypervisor, CPU model. `None` where memory cannot be
    /// kept (a cloud).
    ///
    /// # Errors
    /// When the hypervisor cannot be asked.
    async fn memory_key(&self, step: &Key, base: &Base, context: &Context) -> Result<Option<Key>>;

    /// Starts a machine from `base` and waits until its guest can be reached.
    /// May take minutes at a cloud; everything it makes is registered in the
    /// context's scope before it is made.
    ///
    /// # Errors
    /// [`crate::Code::Unreachable`] with the tail of the console and the path
    /// of a screenshot, [`crate::Code::HostKey`], and others.
    async fn start(&self, base: &Base, start: &Start, context: &Context) -> Result<Box<dyn Machine>>;

    /// Goes on from a checkpoint, made fresh first: entropy, clock, lease, and
    /// this bake's keys. Memory is used where it was kept under
    /// [`Builder::memory_key`]; otherwise the guest boots from the kept disk.
    /// `None` when this builder cannot use it at all.
    ///
    /// # Errors
    /// [`crate::Code::DigestMismatch`] when it is damaged; and as
    /// [`Builder::start`].
    async fn resume(&self, base: &Base, checkpoint: &Checkpoint, start: &Start, context: &Context) -> Result<Option<Box<dyn Machine>>>;

    /// What of a checkpoint means the same on another machine that has the
    /// same base: its disk, and never its memory. `None` where nothing does.
    fn portable(&self, _checkpoint: &Checkpoint) -> Option<Portable> {
        None
    }
}

/// What of a checkpoint can go to another machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Portable {
    /// Which of its files, by their names.
    pub files: Vec<String>,
    /// The builder's words about them, to be given back with them.
    pub note: serde_json::Value,
}

/// The thing being baked, while it runs.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Its inside.
    fn guest(&self) -> Arc<dyn Guest>;

    /// Returns only when the machine has ended without being asked to, with
    /// what is known of it: powered off, panicked, killed.
    async fn ended(&self) -> Error;

    /// Copies its state into `slot`: the disk, and the memory where `slot`
    /// asks for it and the builder can. `None` when it keeps none. The guest
    /// stands still meanwhile, and goes on as if nothing had been.
    ///
    /// # Errors
    /// When the state cannot be written; the machine goes on all the same. With
    /// [`crate::Code::MachineEnded`] it does not.
    async fn checkpoint(&mut self, slot: &Slot) -> Result<Option<Written>>;

    /// How many bytes a checkpoint of it would take now, about; `None` when it
    /// keeps none.
    fn checkpoint_size(&self) -> Option<u64>;

    /// Adds what the machine itself can tell of a failure: the tail of its
    /// console, a screenshot.
    async fn explain(&self, error: Error) -> Error;

    /// Asks the guest to power off, and waits until it has.
    ///
    /// # Errors
    /// [`crate::Code::Timeout`] after `deadline`; the machine is gone then too.
    async fn stop(self: Box<Self>, deadline: Duration) -> Result<Box<dyn Stopped>>;

    /// Ends it at once, without a word to the guest.
    async fn kill(self: Box<Self>);

    /// Leaves it running when kiln goes, and says how to reach it and end it.
    ///
    /// # Errors
    /// When it cannot outlive kiln.
    async fn keep(self: Box<Self>) -> Result<String>;
}

/// A machine that has stopped: what can be captured.
#[async_trait]
pub trait Stopped: Send + Sync {
    /// Its root disk's content.
    ///
    /// # Errors
    /// When it cannot be read.
    async fn blocks(&self) -> Result<Box<dyn BlockSource>>;

    /// The files of its root file system, read from the disk. `None` when the
    /// file system is one that kiln cannot read.
    ///
    /// # Errors
    /// When the disk cannot be read.
    async fn files(&self) -> Result<Option<Box<dyn Files>>>;

    /// Its root disk as something to start throwaway machines from; valid as
    /// long as `self`. `None` where it is at a cloud.
    fn disk(&self) -> Option<DiskFile>;

    /// The same machine as what it is where it stopped at a cloud: something
    /// to be captured there.
    fn at_cloud(&mut self) -> Option<&mut dyn AtCloud> {
        None
    }
}

/// What is told of an image when it is captured at a cloud.
#[derive(Debug, Clone)]
pub struct Naming {
    /// Image name.
    pub name: String,
    /// Image version.
    pub version: String,
    /// Source commit.
    pub commit: Option<String>,
    /// Labels from the template.
    pub labels: BTreeMap<String, String>,
}

/// A machine that has stopped at a cloud. Its image is made there, and undone
/// with the bake's scope until a store has recorded it.
#[async_trait]
pub trait AtCloud: Send + Sync {
    /// Makes an image of it where it is, waits until it can be used, and ends
    /// the machine. The image is valid as a base for throwaway machines.
    /// [`Stopped::blocks`] reads it back from then on.
    ///
    /// # Errors
    /// When the cloud refuses or takes too long.
    async fn capture(&mut self, naming: &Naming) -> Result<CloudImage>;

    /// Makes of the captured image what the builder's settings want: copies in
    /// other regions, others who may use it. Gives all of them, the first one
    /// first.
    ///
    /// # Errors
    /// When the cloud refuses or takes too long.
    async fn spread(&mut self) -> Result<Vec<CloudImage>>;

    /// Marks the images as finished, just before a store records them.
    ///
    /// # Errors
    /// When the cloud refuses.
    async fn finish(&mut self) -> Result<()>;

    /// The undos of the images: forgotten in the moment in which a store
    /// records them.
    fn tickets(&self) -> Vec<Ticket>;

    /// A store has recorded the images, as the image of this manifest digest:
    /// says so on them, where that can be done.
    async fn recorded(&mut self, image: &Digest);
}

/// What a path of a stopped disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file with its size in bytes.
    File(u64),
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A device, socket or pipe.
    Other,
}

/// What an entry of a walk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link, with the bytes of its target.
    Link(Vec<u8>),
    /// A block device, with its major and minor number where they are known.
    BlockDevice(Option<(u32, u32)>),
    /// A character device, likewise.
    CharacterDevice(Option<(u32, u32)>),
    /// A named pipe.
    Pipe,
    /// A socket.
    Socket,
}

/// One entry of a walk through the files of a disk: all that is known without
/// reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Absolute path, as the bytes that are on the disk: names need not be text.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, with set-user-id, set-group-id and sticky: 12 bits.
    pub mode: u16,
    /// Number of the user who owns it.
    pub uid: u32,
    /// Number of the group that owns it.
    pub gid: u32,
    /// Bytes of a regular file; 0 for anything else.
    pub size: u64,
    /// When its content was last changed, seconds since 1970.
    pub modified: i64,
    /// Extended attributes with their values, in the order of their names:
    /// capabilities (`security.capability`), access lists, labels. `None` where
    /// they are not known.
    pub attributes: Option<Vec<(Vec<u8>, Vec<u8>)>>,
    /// Where its bytes are, as a digest over the digests of the blocks that
    /// hold them: two files for which this is the same have the same bytes, on
    /// whatever disk they are. The other way round nothing follows. `None`
    /// where it is not known.
    pub place: Option<Digest>,
    /// The first byte of the disk that holds some of it: who reads many files
    /// reads neighbours one after another. 0 where it is not known.
    pub position: u64,
}

/// A walk through the files of a disk.
pub type Walk<'a> = Box<dyn Iterator<Item = Result<Entry>> + 'a>;

/// The files of a stopped disk's root file system, read-only. Paths are
/// absolute within it; symbolic links are not followed in the last part.
pub trait Files: Send {
    /// What is at `path`; `None` if nothing.
    ///
    /// # Errors
    /// When the file system is damaged.
    fn kind(&self, path: &str) -> Result<Option<FileKind>>;

    /// The names in a directory, sorted; empty if there is none. Bytes of a
    /// name that are no text are replaced; [`Files::walk`] gives them as they
    /// are.
    ///
    /// # Errors
    /// When the file system is damaged.
    fn list(&self, path: &str) -> Result<Vec<String>>;

    /// The bytes of a small file.
    ///
    /// # Errors
    /// When it is not a regular file, is too large to be read whole, or the
    /// file system is damaged.
    fn read(&self, path: &str) -> Result<Vec<u8>>;

    /// The bytes of a file of any size, a piece at a time.
    ///
    /// # Errors
    /// As [`Files::read`], but for the size.
    fn open(&self, path: &[u8]) -> Result<Box<dyn std::io::Read + '_>>;

    /// Everything below the root: a directory before what is in it, names in
    /// the order of their bytes. Memory is bounded, however many there are.
    ///
    /// # Errors
    /// When the file system is damaged; also from the iterator, which then ends.
    fn walk(&self) -> Result<Walk<'_>>;
}

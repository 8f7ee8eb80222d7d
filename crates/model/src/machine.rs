//! Builders and machines. Snapshotting a machine that still runs does not
//! compile: [`Machine::stop`] consumes it and gives what can be captured.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::base::{Base, DiskFile};
use crate::block::BlockSource;
use crate::checkpoint::{Checkpoint, Slot, Written};
use crate::cleanup::Scope;
use crate::error::{Error, Result};
use crate::event::Reports;
use crate::guest::Guest;
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
    /// long as `self`.
    fn disk(&self) -> DiskFile;
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

/// The files of a stopped disk's root file system, read-only. Paths are
/// absolute within it; symbolic links are not followed in the last part.
pub trait Files: Send {
    /// What is at `path`; `None` if nothing.
    ///
    /// # Errors
    /// When the file system is damaged.
    fn kind(&self, path: &str) -> Result<Option<FileKind>>;

    /// The names in a directory, sorted; empty if there is none.
    ///
    /// # Errors
    /// When the file system is damaged.
    fn list(&self, path: &str) -> Result<Vec<String>>;

    /// The bytes of a file.
    ///
    /// # Errors
    /// When it is not a regular file, or the file system is damaged.
    fn read(&self, path: &str) -> Result<Vec<u8>>;
}

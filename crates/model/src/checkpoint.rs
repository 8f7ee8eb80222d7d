//! Checkpoints: the machine after a step, cached under the step's key.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::error::Result;
use crate::key::Key;

/// Holds something as long as it lives: a lock on what is in use.
pub type Hold = Arc<dyn Any + Send + Sync>;

/// A machine's state after a step.
#[derive(Clone)]
pub struct Checkpoint {
    /// Key of the last step in it; for a booted base, of the machine before
    /// its first step.
    pub step: Key,
    /// Key of its memory; `None` when only the disk is kept.
    pub memory: Option<Key>,
    /// The builder's own files, below one folder. Read-only.
    pub folder: PathBuf,
    /// What each file is, by its name in `folder`.
    pub files: Vec<KeptFile>,
    /// The builder's own words about it.
    pub note: serde_json::Value,
    /// When it was made: its age decides whether it may still be used.
    pub made: SystemTime,
    /// What it saves: seconds of boot and steps.
    pub worth: Duration,
    /// Keeps it from being evicted.
    pub hold: Hold,
}

/// A file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptFile {
    /// Its name in the folder.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
    /// BLAKE3 of its bytes, in hex: what tells a damaged one.
    pub digest: String,
    /// Whether the builder compares the digest while it reads the file, as it
    /// does with memory; all others are compared before a checkpoint is given
    /// out.
    pub builder_checks: bool,
}

/// Where a checkpoint is to be written. Nothing in it can be seen before
/// [`CheckpointCache::commit`]; dropping it removes what was written.
pub struct Slot {
    /// Key of the last step.
    pub step: Key,
    /// Key for its memory; `None` asks for the disk alone (a machine that
    /// received a secret is tainted until it has rebooted).
    pub memory: Option<Key>,
    /// An empty folder (0700) to write to.
    pub folder: PathBuf,
    /// Removes the folder, unless it was committed.
    pub hold: Hold,
}

/// What a builder wrote into a slot.
#[derive(Debug, Clone, Default)]
pub struct Written {
    /// Whether memory is among it.
    pub memory: bool,
    /// The files; those with an empty digest are digested by the cache.
    pub files: Vec<KeptFile>,
    /// The builder's own words, given back with the checkpoint.
    pub note: serde_json::Value,
}

/// What is known of a checkpoint without opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peek {
    /// When it was made.
    pub made: SystemTime,
    /// Key of its memory.
    pub memory: Option<Key>,
}

/// Keeps checkpoints. What is in use is locked, and never evicted.
pub trait CheckpointCache: Send + Sync {
    /// Whether there is a checkpoint of exactly this step. Cheap: nothing is
    /// verified.
    ///
    /// # Errors
    /// When the cache cannot be read.
    fn peek(&self, step: &Key) -> Result<Option<Peek>>;

    /// The newest checkpoint of exactly this step that is not older than
    /// `max_age` (none: of any age), held until its `hold` is dropped. All files
    /// but those that the builder checks were compared with their digests.
    ///
    /// # Errors
    /// When the cache cannot be read. A damaged checkpoint is not an error: it
    /// is dropped, with a warning to `warn`.
    fn find(&self, step: &Key, max_age: Option<Duration>, warn: &dyn Fn(String)) -> Result<Option<Checkpoint>>;

    /// Drops a checkpoint in which a builder found damage.
    ///
    /// # Errors
    /// When it cannot be removed.
    fn drop_damaged(&self, checkpoint: Checkpoint) -> Result<()>;

    /// Room for a new one of about `bytes`: others of less value go for it.
    /// `None` when the budget has no room for it.
    ///
    /// # Errors
    /// When no room can be made.
    fn slot(&self, step: &Key, memory: Option<&Key>, bytes: u64) -> Result<Option<Slot>>;

    /// Makes what was written visible, whole or not at all; an older one of
    /// that step goes.
    ///
    /// # Errors
    /// When it cannot be written.
    fn commit(&self, slot: Slot, written: &Written, worth: Duration) -> Result<()>;

    /// Takes the right to make what `key` names (a step's result, a sealed
    /// image), so that two bakes never do the same work; free when the hold is
    /// dropped, or its process dies. `None` while another has it.
    ///
    /// # Errors
    /// When the lock cannot be made.
    fn claim(&self, key: &Key) -> Result<Option<Hold>>;
}

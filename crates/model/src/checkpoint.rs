//! Checkpoints: the machine after a step, cached under the step's key.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::error::Result;
use crate::key::Key;

/// A machine's state after a step.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Key of the last step in it.
    pub step: Key,
    /// Key of its memory; `None` when only the disk is kept.
    pub memory: Option<Key>,
    /// The builder's own files, below one folder.
    pub folder: PathBuf,
    /// When it was made: its age decides whether it may still be used.
    pub made: SystemTime,
    /// What it saves: seconds of boot and steps.
    pub worth: Duration,
}

/// Where a checkpoint is to be written. Nothing in it can be seen before
/// [`CheckpointCache::commit`].
#[derive(Debug)]
pub struct Slot {
    /// Key of the last step.
    pub step: Key,
    /// Key for its memory; `None` asks for the disk alone (a machine that
    /// received a secret is tainted until it has rebooted).
    pub memory: Option<Key>,
    /// An empty folder (0700) to write to.
    pub folder: PathBuf,
}

/// Keeps checkpoints. What is in use is locked, and never evicted.
pub trait CheckpointCache: Send + Sync {
    /// The newest checkpoint of exactly this step that is not older than
    /// `max_age`; with memory if `memory` is given and kept.
    ///
    /// # Errors
    /// When the cache cannot be read. A damaged checkpoint is not an error: it
    /// is dropped.
    fn find(&self, step: &Key, memory: Option<&Key>, max_age: Option<Duration>) -> Result<Option<Checkpoint>>;

    /// Room for a new one.
    ///
    /// # Errors
    /// When no room can be made.
    fn slot(&self, step: &Key, memory: Option<&Key>) -> Result<Slot>;

    /// Makes what was written visible, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    fn commit(&self, slot: Slot, checkpoint: Checkpoint) -> Result<()>;
}

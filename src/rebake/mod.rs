//! Baking an image again from its provenance.
//!
//! ```text
//!  provenance ──► source.rs    the template, as it was then
//!             ──► base.rs      the base, by its disk digest
//!  template   ──► origin.rs    each step, and what it touches
//!  bake       ──► scratch.rs   a store of its own: no name moves, nothing stays
//!  both disks ──► answer.rs    what differs, and of which step
//! ```

pub(crate) mod answer;
pub(crate) mod base;
pub(crate) mod origin;
pub(crate) mod scratch;
pub(crate) mod source;

use std::sync::Arc;
use std::time::Duration;

use kiln_model::checkpoint::{Checkpoint, CheckpointCache, Hold, Peek, Slot, Written};
use kiln_model::history::{History, Record};
use kiln_model::{Key, Result};

/// A history that knows of no bake, and remembers none: what is baked again
/// must not be found by the next bake of the same.
pub(crate) struct NoHistory;

impl History for NoHistory {
    fn records(&self, _: &str) -> Result<Vec<Record>> {
        Ok(Vec::new())
    }

    fn add(&self, _: &Record) -> Result<()> {
        Ok(())
    }
}

/// A cache in which nothing is found, so that the base is booted.
pub(crate) struct NothingKept(pub(crate) Arc<dyn CheckpointCache>);

impl CheckpointCache for NothingKept {
    fn peek(&self, _: &Key) -> Result<Option<Peek>> {
        Ok(None)
    }

    fn find(&self, _: &Key, _: Option<Duration>, _: &dyn Fn(String)) -> Result<Option<Checkpoint>> {
        Ok(None)
    }

    fn drop_damaged(&self, checkpoint: Checkpoint) -> Result<()> {
        self.0.drop_damaged(checkpoint)
    }

    fn slot(&self, step: &Key, memory: Option<&Key>, bytes: u64) -> Result<Option<Slot>> {
        self.0.slot(step, memory, bytes)
    }

    fn commit(&self, slot: Slot, written: &Written, worth: Duration) -> Result<()> {
        self.0.commit(slot, written, worth)
    }

    fn claim(&self, key: &Key) -> Result<Option<Hold>> {
        self.0.claim(key)
    }
}

//! Stands in for the crate that keeps checkpoints and records: nothing is kept.
//! Goes with it; [`crate::commands::App`] is the only user.

use std::sync::Arc;
use std::time::Duration;

use kiln_model::checkpoint::{Checkpoint, CheckpointCache, Hold, Peek, Slot, Written};
use kiln_model::history::{History, Record};
use kiln_model::{Key, Result};

/// A cache and a history in which nothing stays.
pub(crate) struct Nothing;

impl CheckpointCache for Nothing {
    fn peek(&self, _: &Key) -> Result<Option<Peek>> {
        Ok(None)
    }

    fn find(&self, _: &Key, _: Option<Duration>, _: &dyn Fn(String)) -> Result<Option<Checkpoint>> {
        Ok(None)
    }

    fn drop_damaged(&self, _: Checkpoint) -> Result<()> {
        Ok(())
    }

    fn slot(&self, _: &Key, _: Option<&Key>, _: u64) -> Result<Option<Slot>> {
        Ok(None)
    }

    fn commit(&self, _: Slot, _: &Written, _: Duration) -> Result<()> {
        Ok(())
    }

    fn claim(&self, _: &Key) -> Result<Option<Hold>> {
        Ok(Some(Arc::new(())))
    }
}

impl History for Nothing {
    fn records(&self, _: &str) -> Result<Vec<Record>> {
        Ok(Vec::new())
    }

    fn add(&self, _: &Record) -> Result<()> {
        Ok(())
    }
}

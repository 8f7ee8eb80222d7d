//! What the tests share.

mod damage;
mod keep;
mod past;
mod processes;
mod room;

use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_model::Key;
use kiln_model::checkpoint::{Checkpoint, CheckpointCache as _, KeptFile, Slot, Written};
use kiln_model::home::Home;
use kiln_model::key::KeyHasher;

use crate::Checkpoints;
use crate::room::Space;

/// A folder for a test, and a cache in it on a disk with much room.
struct Place {
    folder: tempfile::TempDir,
    cache: Checkpoints,
}

impl Place {
    fn new(budget: Option<u64>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cache = open(folder.path(), budget);
        Self { folder, cache }
    }

    /// Finds a checkpoint that has to be whole.
    fn find(&self, step: &Key) -> Option<Checkpoint> {
        self.cache.find(step, None, &|text| panic!("{text}")).unwrap()
    }

    /// Names of what is in `.new`.
    fn drafts(&self) -> Vec<PathBuf> {
        crate::checkpoints::entries(&self.cache.root.join(crate::checkpoints::NEW)).unwrap()
    }

    /// The keys of what is there, in some order.
    fn steps(&self) -> Vec<Key> {
        self.cache.list().unwrap().into_iter().map(|listed| listed.step).collect()
    }

    fn usage(&self) -> u64 {
        self.cache.usage().unwrap().bytes
    }
}

fn open(folder: &Path, budget: Option<u64>) -> Checkpoints {
    let mut cache = Checkpoints::open(&Home::open(Some(folder.to_owned())).unwrap(), budget).unwrap();
    // Tests have to pass on a full disk too.
    cache.space = |_| Ok(Space { total: 100 << 30, free: 50 << 30 });
    cache
}

fn key(name: impl std::fmt::Display) -> Key {
    let mut hasher = KeyHasher::new("step");
    hasher.field("name", name.to_string());
    hasher.finish()
}

/// Bytes of which none repeats in a way that matters.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn slot(cache: &Checkpoints, step: &Key, bytes: u64) -> Slot {
    cache.slot(step, None, bytes).unwrap().unwrap()
}

fn undigested(name: &str) -> KeptFile {
    KeptFile { name: name.into(), length: 0, digest: String::new() }
}

/// Commits a slot with all that is in its folder.
fn commit(cache: &Checkpoints, slot: Slot, worth: u64) {
    let names = crate::checkpoints::entries(&slot.folder).unwrap();
    let files = names.iter().map(|path| undigested(path.file_name().unwrap().to_str().unwrap())).collect();
    let written = Written { files, ..Written::default() };
    cache.commit(slot, &written, Duration::from_secs(worth)).unwrap();
}

/// Keeps a checkpoint of these files.
fn put(cache: &Checkpoints, step: &Key, worth: u64, files: &[(&str, &[u8])]) {
    let slot = slot(cache, step, files.iter().map(|(_, bytes)| bytes.len() as u64).sum());
    for (name, bytes) in files {
        std::fs::write(slot.folder.join(name), bytes).unwrap();
    }
    commit(cache, slot, worth);
}

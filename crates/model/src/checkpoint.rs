//! Checkpoints: the machine after a step, cached under the step's key.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptFile {
    /// Its name in the folder.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
    /// [`FileDigest`] of its bytes: what tells a damaged one. Empty where the
    /// cache is to make it ([`Written`]); then the length is the cache's to find
    /// out too.
    pub digest: String,
}

/// Bytes in a chunk of a [`FileDigest`].
pub const CHUNK: usize = 64 * 1024;

/// What a chunk that is left out looks like. To compare with it is a `memcmp`,
/// which is fast in a build without optimisation too.
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// Makes the digest of a [`KeptFile`]: BLAKE3 over the line `kiln-file-v1`, then
/// for each chunk of 64 KiB that is not all zero its offset (64 bits, little
/// endian) and its own BLAKE3, in the order of the offsets, then the length of
/// the file. The last chunk is padded with zeros.
///
/// So a hole costs nothing, and whether zeros were written or left out makes no
/// difference. Chunks are digested one by one, so several threads can share a
/// file, and a builder can digest a memory file while it copies it. It takes
/// 40 bytes of memory for each chunk that it saw.
#[derive(Clone, Default)]
pub struct FileDigest {
    chunks: Vec<(u64, [u8; 32])>,
    /// Bytes of the chunk that came in part, and where that begins.
    part: Vec<u8>,
    part_at: u64,
}

impl FileDigest {
    /// The digest of a file in which nothing was seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the bytes at `offset`. What is never added counts as zeros. Whole
    /// chunks may come in any order, each once; pieces of a chunk come one
    /// after the other (they are copied, so whole chunks are faster).
    pub fn add(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let within = (offset % CHUNK as u64) as usize;
            let start = offset - within as u64;
            let (piece, rest) = bytes.split_at(bytes.len().min(CHUNK - within));
            if piece.len() == CHUNK {
                self.chunk(start, piece);
            } else {
                if self.part_at != start {
                    self.end_part();
                }
                self.part_at = start;
                self.part.resize(CHUNK, 0);
                self.part[within..within + piece.len()].copy_from_slice(piece);
            }
            offset += piece.len() as u64;
            bytes = rest;
        }
    }

    /// Adds what another one saw of the same file.
    pub fn merge(&mut self, mut other: Self) {
        other.end_part();
        self.chunks.append(&mut other.chunks);
    }

    /// The digest of the file, which is `length` bytes long, in hex.
    pub fn finish(mut self, length: u64) -> String {
        self.end_part();
        self.chunks.sort_unstable();
        let mut whole = blake3::Hasher::new();
        whole.update(b"kiln-file-v1\n");
        for (offset, digest) in &self.chunks {
            whole.update(&offset.to_le_bytes()).update(digest);
        }
        whole.update(&length.to_le_bytes());
        crate::digest::hex(whole.finalize().as_bytes())
    }

    fn chunk(&mut self, start: u64, bytes: &[u8]) {
        if bytes != ZEROS {
            self.chunks.push((start, *blake3::hash(bytes).as_bytes()));
        }
    }

    fn end_part(&mut self) {
        let mut part = std::mem::take(&mut self.part);
        if !part.is_empty() {
            self.chunk(self.part_at, &part);
            // Kept for the next one.
            part.clear();
            self.part = part;
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(pieces: &[(u64, &[u8])], length: u64) -> String {
        let mut digest = FileDigest::new();
        for (offset, bytes) in pieces {
            digest.add(*offset, bytes);
        }
        digest.finish(length)
    }

    fn sample() -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..5 * CHUNK + 1234).map(|n| (n * n % 251) as u8).collect();
        bytes[2 * CHUNK..4 * CHUNK].fill(0);
        bytes
    }

    #[test]
    fn how_a_file_comes_makes_no_difference() {
        let bytes = sample();
        let length = bytes.len() as u64;
        let whole = digest(&[(0, &bytes)], length);
        for size in [1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK] {
            let pieces: Vec<_> = bytes.chunks(size).enumerate().map(|(n, piece)| ((n * size) as u64, piece)).collect();
            assert_eq!(digest(&pieces, length), whole, "pieces of {size}");
        }
        let (one, two) = bytes.split_at(4 * CHUNK);
        assert_eq!(digest(&[(4 * CHUNK as u64, two), (0, &one[..2 * CHUNK])], length), whole, "a hole, and another order");
        let mut first = FileDigest::new();
        first.add(0, &one[..CHUNK]);
        let mut second = FileDigest::new();
        second.add(4 * CHUNK as u64, two);
        second.add(CHUNK as u64, &one[CHUNK..]);
        first.merge(second);
        assert_eq!(first.finish(length), whole, "in two parts");
    }

    #[test]
    fn every_byte_its_place_and_the_length_count() {
        let bytes = sample();
        let length = bytes.len() as u64;
        let whole = digest(&[(0, &bytes)], length);
        assert_ne!(digest(&[(0, &bytes)], length + 1), whole);
        assert_ne!(digest(&[(0, &bytes[..bytes.len() - 1])], length), whole);
        assert_ne!(digest(&[(CHUNK as u64, &bytes)], length), whole);
        for at in [0, CHUNK - 1, CHUNK, 2 * CHUNK, 3 * CHUNK + 77, bytes.len() - 1] {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert_ne!(digest(&[(0, &other)], length), whole, "byte {at}");
        }
        assert_ne!(digest(&[], 0), digest(&[], 1));
        assert_eq!(digest(&[(0, &[0; 100])], 100), digest(&[], 100));
    }

    #[test]
    fn the_digest_is_what_its_description_says() {
        let mut text = b"kiln-file-v1\n".to_vec();
        let mut chunk = [0; CHUNK];
        chunk[..3].copy_from_slice(b"abc");
        text.extend((CHUNK as u64).to_le_bytes());
        text.extend(blake3::hash(&chunk).as_bytes());
        text.extend((CHUNK as u64 + 3).to_le_bytes());
        assert_eq!(digest(&[(CHUNK as u64, b"abc")], CHUNK as u64 + 3), blake3::hash(&text).to_hex().to_string());
    }
}

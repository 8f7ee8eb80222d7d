//! What is known of a snapshot that is being written, kept so that a killed
//! process or a lost connection costs nothing but what was under way.
//!
//! ```text
//!  $KILN_HOME/ec2/uploads/REGION-KEY.json   what is asked of AWS, and the snapshot's id
//!  $KILN_HOME/ec2/uploads/REGION-KEY.done   the blocks that AWS has taken
//!  $KILN_HOME/ec2/uploads/REGION-KEY.lock   locked by the process that is at it
//! ```
//!
//! The first is replaced in one piece and synced before it is used: the client
//! token is on the disk before the snapshot is begun, so that a second
//! StartSnapshot gives the first one's snapshot and none is lost. The second
//! is only appended to and not synced. Each record of 8 bytes is an index and
//! its complement, both little-endian, so that what a power cut leaves (zeros,
//! half a record) is told apart; what is missing is sent again. In the end
//! AWS checks count and checksum over all blocks.

use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiln_model::{Digest, Result, ResultExt as _};
use serde::{Deserialize, Serialize};

use crate::api::Tags;

const VERSION: u32 = 1;

/// What is asked of AWS: the same in every attempt, since the client token
/// stands for exactly this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Intent {
    v: u32,
    /// Client token.
    pub(crate) token: String,
    pub(crate) gib: u32,
    pub(crate) parent: Option<Parent>,
    pub(crate) key: Option<String>,
    pub(crate) description: String,
    pub(crate) tags: Tags,
    /// The snapshot, once it is known.
    pub(crate) snapshot: Option<String>,
    /// Whether AWS was asked to complete it.
    pub(crate) completing: bool,
}

/// The snapshot that another one is based on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Parent {
    pub(crate) snapshot: String,
    /// Disk digest of what is in it.
    pub(crate) disk: Digest,
}

impl Intent {
    pub(crate) fn new(gib: u32, parent: Option<Parent>, key: Option<String>, description: String, tags: Tags) -> Self {
        let token = format!("kiln-{}", ulid::Ulid::generate());
        Self { v: VERSION, token, gib, parent, key, description, tags, snapshot: None, completing: false }
    }
}

/// The state of one upload, held by this process alone.
pub(crate) struct State {
    path: PathBuf,
    done: Option<File>,
    _lock: File,
}

impl State {
    /// That of the disk `disk` in `region`, encrypted with `key`. `None` while
    /// another process is at it.
    ///
    /// # Errors
    /// When the folder cannot be used.
    pub(crate) fn open(folder: &Path, region: &str, disk: &Digest, gib: u32, key: Option<&str>) -> Result<Option<Self>> {
        let what = || format!("use {}", folder.display());
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).trying(what)?;
        let of = Digest::of(format!("{disk} {gib} {}", key.unwrap_or("-")));
        let path = folder.join(format!("{region}-{}.json", of.short()));
        let lock = path.with_extension("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(lock).trying(what)?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(Self { path, done: None, _lock: lock })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).trying(what),
        }
    }

    /// What an earlier process has begun, and how long ago it last wrote to
    /// this; nothing when that cannot be read.
    pub(crate) fn read(&self) -> Option<(Intent, Duration)> {
        let intent: Intent = serde_json::from_slice(&std::fs::read(&self.path).ok()?).ok()?;
        let at = std::fs::metadata(&self.path).and_then(|meta| meta.modified()).ok()?;
        (intent.v == VERSION).then(|| (intent, SystemTime::now().duration_since(at).unwrap_or_default()))
    }

    /// Replaces what is known, in one piece, and syncs it.
    pub(crate) fn write(&self, intent: &Intent) -> Result<()> {
        let part = self.path.with_extension("part");
        let write = || -> std::io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
            file.write_all(&serde_json::to_vec(intent)?)?;
            file.sync_all()?;
            std::fs::rename(&part, &self.path)?;
            File::open(self.path.parent().unwrap_or(Path::new("/")))?.sync_all()
        };
        write().trying(|| format!("write {}", self.path.display()))
    }

    /// The blocks that AWS has taken.
    pub(crate) fn taken(&self) -> HashSet<u32> {
        let bytes = std::fs::read(self.path.with_extension("done")).unwrap_or_default();
        let record = |chunk: &[u8]| {
            let (index, check) = chunk.split_at_checked(4)?;
            let number = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_le_bytes);
            let index = number(index)?;
            (number(check)? == !index).then_some(index)
        };
        bytes.chunks_exact(8).map_while(record).collect()
    }

    /// Notes that AWS has taken a block.
    pub(crate) fn took(&mut self, index: u32) -> Result<()> {
        let what = || format!("write {}", self.path.with_extension("done").display());
        let file = match &mut self.done {
            Some(file) => file,
            None => {
                // After the last whole record: what follows one that is not
                // would never be read.
                let whole = self.taken_bytes();
                let file = OpenOptions::new().append(true).create(true).mode(0o600).open(self.path.with_extension("done")).trying(what)?;
                file.set_len(whole).trying(what)?;
                self.done.insert(file)
            }
        };
        let mut record = [0; 8];
        record[..4].copy_from_slice(&index.to_le_bytes());
        record[4..].copy_from_slice(&(!index).to_le_bytes());
        file.write_all(&record).trying(what)
    }

    /// Bytes of the records that are good, from the first on.
    fn taken_bytes(&self) -> u64 {
        let bytes = std::fs::read(self.path.with_extension("done")).unwrap_or_default();
        let good = |chunk: &&[u8]| chunk[..4].iter().zip(&chunk[4..]).all(|(a, b)| *a == !*b);
        bytes.chunks_exact(8).take_while(good).count() as u64 * 8
    }

    /// Forgets the blocks that AWS has taken.
    pub(crate) fn start_over(&mut self) -> Result<()> {
        self.done = None;
        remove(&self.path.with_extension("done"))
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) -> Result<()> {
        // First what says that there is something.
        remove(&self.path)?;
        self.start_over()
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).trying(|| format!("remove {}", path.display())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &Path) -> Option<State> {
        State::open(folder, "eu-central-1", &Digest::of("disk"), 4, None).unwrap()
    }

    #[test]
    fn what_was_begun_is_there_again_and_one_process_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let state = open(folder.path()).unwrap();
        assert!(state.read().is_none());
        let parent = Parent { snapshot: "snap-1".into(), disk: Digest::of("parent") };
        let mut intent = Intent::new(4, Some(parent), None, "web".into(), Tags::from([("a".into(), "b".into())]));
        state.write(&intent).unwrap();
        intent.snapshot = Some("snap-2".into());
        state.write(&intent).unwrap();
        assert!(open(folder.path()).is_none());
        // Another key is another snapshot.
        assert!(State::open(folder.path(), "eu-central-1", &Digest::of("disk"), 4, Some("arn")).unwrap().unwrap().read().is_none());
        drop(state);
        let mut state = open(folder.path()).unwrap();
        assert_eq!(state.read().unwrap().0, intent);
        state.clear().unwrap();
        assert!(state.read().is_none());
    }

    #[test]
    fn torn_records_are_not_believed_and_written_over() {
        let folder = tempfile::tempdir().unwrap();
        for torn in [&[0; 16][..], &[7, 0, 0], &[1, 0, 0, 0, 0, 0, 0, 0]] {
            let mut state = open(folder.path()).unwrap();
            state.start_over().unwrap();
            for index in [0, 5, u32::MAX] {
                state.took(index).unwrap();
            }
            let done = state.path.with_extension("done");
            OpenOptions::new().append(true).open(&done).unwrap().write_all(torn).unwrap();
            drop(state);
            let mut state = open(folder.path()).unwrap();
            assert_eq!(state.taken(), HashSet::from([0, 5, u32::MAX]));
            state.took(6).unwrap();
            assert_eq!(state.taken(), HashSet::from([0, 5, 6, u32::MAX]), "{torn:?}");
        }
    }
}

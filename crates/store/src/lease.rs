//! Leases: which blobs a living process needs although nothing names them yet.

use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_model::Digest;
use kiln_model::error::{Result, ResultExt};

use crate::blobs::create_private;

/// A file of digests, one per line, that this process holds locked.
#[derive(Debug)]
pub(crate) struct Lease {
    id: String,
    path: PathBuf,
    file: File,
    held: HashSet<Digest>,
}

impl Lease {
    /// A new lease in `folder`. The caller holds the blobs lock, so that nobody
    /// takes the file for a dead one before it is locked.
    pub(crate) fn create(folder: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // Unique among the living by pid and count; the time tells it from the
        // files of an earlier process with the same pid.
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_nanos());
        let id = format!("{}-{time:x}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = folder.join(&id);
        let file = create_private(&path)?;
        file.try_lock().trying(|| format!("lock {}", path.display()))?;
        Ok(Self { id, path, file, held: HashSet::new() })
    }

    /// Prefix of this lease's temporary files.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Adds digests. The caller holds the blobs lock.
    pub(crate) fn hold(&mut self, digests: impl IntoIterator<Item = Digest>) -> Result<()> {
        let new: Vec<_> = digests.into_iter().filter(|digest| self.held.insert(*digest)).collect();
        let lines: String = new.iter().map(|digest| format!("{digest}\n")).collect();
        self.file.write_all(lines.as_bytes()).trying(|| format!("write {}", self.path.display())).inspect_err(|_| {
            for digest in &new {
                self.held.remove(digest);
            }
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.path));
    }
}

/// What the living hold.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Ids of living leases.
    pub(crate) ids: HashSet<String>,
    /// Everything they name.
    pub(crate) digests: HashSet<Digest>,
}

/// Reads all leases and removes those of the dead. The caller holds the blobs
/// lock alone, so that none appears or grows meanwhile.
pub(crate) fn living(folder: &Path) -> Result<Held> {
    let mut held = Held::default();
    let what = || format!("read {}", folder.display());
    for entry in std::fs::read_dir(folder).trying(what)? {
        let path = entry.trying(what)?.path();
        let file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.trying(|| format!("open {}", path.display()))?,
        };
        match file.try_lock() {
            Ok(()) => drop(std::fs::remove_file(&path)),
            Err(TryLockError::WouldBlock) => {
                let text = std::io::read_to_string(&file).trying(|| format!("read {}", path.display()))?;
                held.digests.extend(text.lines().filter_map(|line| line.parse::<Digest>().ok()));
                held.ids.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
            }
            Err(TryLockError::Error(error)) => return Err(error).trying(|| format!("lock {}", path.display())),
        }
    }
    Ok(held)
}

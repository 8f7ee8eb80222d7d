//! The cache of bases, `cache/bases/<id>/`:
//!
//! ```text
//! making             held by the bake that makes this base; the others wait
//! current            the name of the folder that is in use
//! <bake id>-<time>/  one making of it
//!   disk             the disk
//!   base.json        what it is (`Card`)
//!   using            held, shared, by every bake that uses it
//! .new-<bake id>/    being made; registered in the bake's scope
//! ```
//!
//! A base that is made anew gets a folder of its own, and `current` is swapped:
//! whoever uses the old one keeps it. It is removed by the next making that
//! finds nobody using it. So every state that a crash can leave is the old one
//! or the new one.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_model::base::{Base, DiskFile, DiskFormat};
use kiln_model::cleanup::{Ticket, remove_path};
use kiln_model::image::Firmware;
use kiln_model::machine::Context;
use kiln_model::{Digest, Result, ResultExt as _};
use serde::{Deserialize, Serialize};

/// How often a held lock is looked at again. Not a blocking lock: a bake that
/// waits must still hear Ctrl-C.
const LOOK: Duration = Duration::from_millis(200);

/// What `base.json` says of a base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Card {
    /// What the template called it when it was made.
    pub(crate) label: String,
    /// [`DiskFormat::name`].
    pub(crate) format: String,
    /// Virtual size in bytes.
    pub(crate) size: u64,
    /// Size of the file in bytes.
    pub(crate) length: u64,
    /// When it was made, in milliseconds since 1970.
    pub(crate) made: u64,
    /// How it starts.
    pub(crate) firmware: Firmware,
    /// Architecture in OCI's words.
    pub(crate) architecture: String,
    /// [`Base::credentials`].
    pub(crate) credentials: Option<bool>,
    /// Its disk digest, once a store has its blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) disk: Option<Digest>,
}

impl Card {
    /// What is known of `disk`, made now.
    pub(crate) fn new(label: &str, disk: &DiskFile, length: u64, firmware: Firmware, credentials: Option<bool>) -> Self {
        Self {
            label: label.to_owned(),
            format: disk.format.name().to_owned(),
            size: disk.size,
            length,
            made: now(),
            firmware,
            architecture: kiln_model::image::host_architecture().to_owned(),
            credentials,
            disk: None,
        }
    }

    /// The base, whose disk is at `path`; `None` for a format of a later kiln.
    pub(crate) fn base(&self, label: &str, path: PathBuf) -> Option<Base> {
        let format = [DiskFormat::Raw, DiskFormat::Qcow2].into_iter().find(|f| f.name() == self.format)?;
        Some(Base {
            label: label.to_owned(),
            disk: DiskFile { path, format, size: self.size }.into(),
            firmware: self.firmware,
            architecture: self.architecture.clone(),
            credentials: self.credentials,
        })
    }
}

/// Milliseconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX))
}

/// How long ago that was, for people: `3 days`.
pub(crate) fn age(made: u64) -> String {
    let seconds = now().saturating_sub(made) / 1000;
    let (count, unit) = match seconds {
        0..90 => (seconds, "second"),
        90..5400 => (seconds / 60, "minute"),
        5400..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

/// One base of the cache, in whatever makings of it.
#[derive(Debug)]
pub(crate) struct Shelf {
    folder: PathBuf,
    /// The shared locks on what was taken; released with the shelf.
    using: Mutex<Vec<File>>,
}

/// A making of a base.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    /// Its folder.
    pub(crate) folder: PathBuf,
    /// What it is.
    pub(crate) card: Card,
}

impl Made {
    /// Its disk.
    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }
}

/// A base being made.
#[derive(Debug)]
pub(crate) struct Draft {
    /// Where to: an empty folder.
    pub(crate) folder: PathBuf,
    ticket: Ticket,
}

const DISK: &str = "disk";
const DOWNLOADS: &str = "downloads";
const CARD: &str = "base.json";

impl Draft {
    /// Where the disk is to be.
    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }
}

impl Shelf {
    /// The shelf of base `id` in the cache folder `cache`.
    pub(crate) fn new(cache: &Path, id: &str) -> Self {
        Self { folder: cache.join("bases").join(id), using: Mutex::new(Vec::new()) }
    }

    /// Its folder, made if it is not there.
    pub(crate) fn folder(&self) -> Result<&Path> {
        std::fs::create_dir_all(&self.folder).trying(|| format!("make {}", self.folder.display()))?;
        Ok(&self.folder)
    }

    /// What `current` names, if it is whole. Whatever is not (a crash, a meddler)
    /// counts as not there, and is made anew.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub(crate) fn current(&self) -> Result<Option<Made>> {
        let pointer = self.folder.join("current");
        let name = match std::fs::read_to_string(&pointer) {
            Ok(name) => name,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).trying(|| format!("read {}", pointer.display())),
        };
        let name = name.trim();
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Ok(None);
        }
        let folder = self.folder.join(name);
        let Some(card) = read_card::<Card>(&folder.join(CARD))? else { return Ok(None) };
        let made = Made { folder, card };
        let whole = std::fs::metadata(made.disk()).is_ok_and(|m| m.is_file() && m.len() == made.card.length);
        Ok(whole.then_some(made))
    }

    /// The current making, locked against removal as long as `self` lives.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub(crate) fn take(&self) -> Result<Option<Made>> {
        // Once more for each swap that comes in between: there cannot be many.
        for _ in 0..16 {
            let Some(made) = self.current()? else { return Ok(None) };
            let path = made.folder.join("using");
            let Ok(file) = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path) else { continue };
            // Held exclusively only for a moment, by one that removes it.
            if file.try_lock_shared().is_err() {
                continue;
            }
            if self.current()?.is_some_and(|again| again.folder == made.folder) {
                self.using.lock().unwrap_or_else(PoisonError::into_inner).push(file);
                return Ok(Some(made));
            }
        }
        Ok(None)
    }

    /// Waits until no other bake makes this base; while what is given back
    /// lives, none does.
    ///
    /// # Errors
    /// When the lock cannot be taken.
    pub(crate) async fn making(&self, label: &str, context: &Context) -> Result<File> {
        let path = self.folder()?.join("making");
        let what = || format!("lock {}", path.display());
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).trying(what)?;
        let mut said = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error).trying(what),
            }
            if !said {
                said = true;
                context.reports.note(format!("another bake is getting the base {label}; waiting for it"));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Room for a new making. Whoever calls this holds [`Shelf::making`].
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn draft(&self, context: &Context) -> Result<Draft> {
        self.sweep();
        let folder = self.folder()?.join(format!(".new-{}", context.bake));
        let ticket = context.scope.before_path(&folder)?;
        std::fs::create_dir(&folder).trying(|| format!("make {}", folder.display()))?;
        Ok(Draft { folder, ticket })
    }

    /// Makes a draft the current making, and takes it.
    ///
    /// # Errors
    /// When it cannot be written; then the old one stays.
    pub(crate) async fn commit(&self, draft: Draft, card: Card, context: &Context) -> Result<Option<Made>> {
        write_card(&draft.folder.join(CARD), &card)?;
        let disk = File::open(draft.disk()).trying(|| format!("open {}", draft.disk().display()))?;
        // May take seconds for a large disk.
        let synced = tokio::task::spawn_blocking(move || disk.sync_all()).await;
        synced.map_err(std::io::Error::other).flatten().trying(|| format!("write {}", draft.disk().display()))?;
        // Never the name of another making, not even of one that is gone: who
        // waits with an old `current` in hand must not meet a new disk there.
        let name = format!("{}-{:x}", context.bake, now());
        let folder = self.folder.join(&name);
        std::fs::rename(&draft.folder, &folder).trying(|| format!("make {}", folder.display()))?;
        write_file(&self.folder.join("current"), name.as_bytes())?;
        context.scope.forget(draft.ticket)?;
        self.sweep();
        self.take()
    }

    /// Writes down the disk digest of the making whose disk is at `disk`.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(crate) fn remember(&self, disk: &Path, digest: &Digest) -> Result<()> {
        let Some(path) = disk.parent().filter(|f| f.parent() == Some(&self.folder)).map(|f| f.join(CARD)) else { return Ok(()) };
        let Some(mut card) = read_card::<Card>(&path)? else { return Ok(()) };
        let known = Some(*digest);
        if card.disk == known {
            return Ok(());
        }
        card.disk = known;
        write_card(&path, &card)
    }

    /// Removes the makings that are neither current nor in use, and what
    /// crashed ones have left. Only while [`Shelf::making`] is held. What cannot
    /// be removed now is left to the next time.
    fn sweep(&self) {
        let current = std::fs::read_to_string(self.folder.join("current")).unwrap_or_default();
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        for path in entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()) {
            if path.file_name().is_some_and(|name| name == current.trim()) {
                continue;
            }
            let lock = File::open(path.join("using"));
            if lock.as_ref().is_ok_and(|file| file.try_lock().is_err()) {
                continue;
            }
            let _ = remove_path(&path);
        }
    }
}

/// Removes every base below `cache` that nobody makes or uses; gives the bytes
/// that this frees on disk.
///
/// # Errors
/// When the cache cannot be read or a base cannot be removed.
pub(crate) fn prune(cache: &Path, dry_run: bool) -> Result<u64> {
    let shelves = cache.join("bases");
    let mut freed = 0;
    for shelf in folders(&shelves)? {
        // Someone is at work here.
        let making = File::open(shelf.join("making"));
        if making.as_ref().is_ok_and(|lock| lock.try_lock().is_err()) {
            continue;
        }
        for folder in folders(&shelf)? {
            let lock = File::open(folder.join("using"));
            if lock.as_ref().is_ok_and(|file| file.try_lock().is_err()) {
                continue;
            }
            freed += size_on_disk(&folder.join(DISK));
            if !dry_run {
                remove_path(&folder)?;
            }
        }
    }
    Ok(freed)
}

/// Where the part of a download for the shelf `id` is kept, so that the next run
/// goes on with it. The shelf's id is in its name: whoever holds that shelf's
/// [`Shelf::making`] has the part too. `source` tells one address from another.
pub(crate) fn part(cache: &Path, id: &str, source: &str) -> PathBuf {
    cache.join(DOWNLOADS).join(format!("{id}.{}.part", Digest::of(source).short()))
}

/// Removes the parts of downloads that nobody goes on with now; gives the bytes
/// that this frees on disk.
///
/// # Errors
/// When the cache cannot be read or a part cannot be removed.
pub(crate) fn prune_downloads(cache: &Path, dry_run: bool) -> Result<u64> {
    let downloads = cache.join(DOWNLOADS);
    let entries = match std::fs::read_dir(&downloads) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        entries => entries.trying(|| format!("read {}", downloads.display()))?,
    };
    let mut freed = 0;
    for path in entries.flatten().map(|entry| entry.path()) {
        let id = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split('.').next()).unwrap_or_default();
        let making = File::open(cache.join("bases").join(id).join("making"));
        if making.as_ref().is_ok_and(|lock| lock.try_lock().is_err()) {
            continue;
        }
        freed += size_on_disk(&path);
        if !dry_run {
            remove_path(&path)?;
        }
    }
    Ok(freed)
}

fn folders(folder: &Path) -> Result<Vec<PathBuf>> {
    match std::fs::read_dir(folder) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).trying(|| format!("read {}", folder.display())),
    }
}

fn size_on_disk(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| std::os::unix::fs::MetadataExt::blocks(&meta) * 512)
}

/// Reads a JSON file; `None` if it is not there or not what it should be.
///
/// # Errors
/// When it is there and cannot be read.
pub(crate) fn read_card<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>> {
    match std::fs::read(path) {
        Ok(json) => Ok(serde_json::from_slice(&json).ok()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).trying(|| format!("read {}", path.display())),
    }
}

/// Writes a JSON file, whole or not at all.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn write_card<T: Serialize>(path: &Path, card: &T) -> Result<()> {
    let json = serde_json::to_vec_pretty(card).trying(|| format!("write {}", path.display()))?;
    write_file(path, &json)
}

/// Writes to a temporary name, syncs, renames, and syncs the folder.
fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(folder)?.sync_all()
    };
    write().trying(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests;

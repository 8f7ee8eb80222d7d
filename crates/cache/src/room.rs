//! Room for new checkpoints: what has to go for them, and what takes how much.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiln_model::{Key, Result, ResultExt as _};

use crate::books::{Books, Links, value};
use crate::checkpoints::{Checkpoints, NEW, entries, remove_whole};
use crate::claim::Claim;
use crate::label::{self, Label, Unusable};
use crate::lock::Lock;

/// Stays free on the file system, at least: the machines that are running write
/// to it, and must not fail for what is only kept to save time.
const ALWAYS_FREE: u64 = 2 << 30;

/// Needs no more to stay free, however large the file system is.
const FREE_ENOUGH: u64 = 5 << 30;

/// How much room a file system has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Space {
    /// Its size in bytes.
    pub(crate) total: u64,
    /// Bytes that this user may still take.
    pub(crate) free: u64,
}

impl Space {
    /// Asks the file system of `path`.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(Self { total: stat.f_blocks.saturating_mul(stat.f_frsize), free: stat.f_bavail.saturating_mul(stat.f_frsize) })
    }

    /// Bytes that have to stay free.
    fn floor(&self) -> u64 {
        (self.total / 20).clamp(ALWAYS_FREE, FREE_ENOUGH)
    }
}

/// A checkpoint, for people.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed {
    /// Key of the last step in it.
    pub step: Key,
    /// Key of its memory.
    pub memory: Option<Key>,
    /// When it was made.
    pub made: SystemTime,
    /// When it was last given out.
    pub last_used: SystemTime,
    /// What it saves.
    pub worth: Duration,
    /// Bytes that its files take, what it shares with others included.
    pub bytes: u64,
    /// Bytes that only it takes: what its going frees.
    pub frees: u64,
    /// Whether somebody uses it now.
    pub in_use: bool,
}

/// What all checkpoints take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// How many there are.
    pub checkpoints: usize,
    /// Bytes that they take, and those that are being written.
    pub bytes: u64,
    /// Bytes that they may take.
    pub budget: u64,
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// How many checkpoints.
    pub checkpoints: usize,
    /// Bytes that became free, those of dead writers included.
    pub bytes: u64,
}

/// A checkpoint as it lies there.
struct Stored {
    folder: PathBuf,
    step: Key,
    /// None when it cannot be read: then it saves nothing.
    label: Option<Label>,
    last_used: SystemTime,
    links: Links,
    /// Whether there is a newer one of the same step: then nobody asks for this
    /// one.
    superseded: bool,
}

/// What is going to be removed, held alone.
struct Doomed {
    folder: PathBuf,
    links: Links,
    _lock: Lock,
}

/// All that is there.
struct Shelf {
    stored: Vec<Stored>,
    /// What dead processes left, and dropped checkpoints that nobody uses any
    /// more.
    dead: Vec<Doomed>,
    /// Everything, the dead included.
    books: Books,
    /// Bytes that were promised to slots and are not written yet.
    promised: u64,
    /// Room of the file system, and of the cache in it.
    space: Space,
    budget: u64,
}

impl Checkpoints {
    /// Makes room for `bytes`, and a draft with `make`, which is given the name
    /// of its folder. `None` when there is no room for it, however much goes.
    pub(crate) fn make_room<T>(&self, bytes: u64, make: impl FnOnce(&str) -> Result<T>) -> Result<Option<T>> {
        let _lock = self.lock_room()?;
        let mut shelf = self.shelf()?;
        self.clear_dead(&mut shelf)?;
        let (promised, space, budget) = (shelf.promised, shelf.space, shelf.budget);
        let needed = promised.saturating_add(bytes);
        let enough = |books: &Books| {
            let within_budget = books.used().saturating_add(needed) <= budget;
            within_budget && space.free.saturating_add(books.freed()) >= space.floor().saturating_add(needed)
        };
        // Nothing goes for a checkpoint that has no room even so.
        let (doomed, done) = shelf.choose(enough)?;
        if !done {
            return Ok(None);
        }
        remove(doomed)?;
        // The bytes in its name tell others what is promised.
        make(&format!("{}.{bytes}", ulid::Ulid::generate())).map(Some)
    }

    /// All checkpoints, the last used first.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let _lock = self.lock_room()?;
        let shelf = self.shelf()?;
        let mut listed = Vec::new();
        for stored in &shelf.stored {
            let Some(label) = &stored.label else { continue };
            listed.push(Listed {
                step: stored.step,
                memory: label.memory,
                made: label.made,
                last_used: stored.last_used,
                worth: label.worth(),
                bytes: shelf.books.bytes_of(&stored.links),
                frees: shelf.books.bytes_only_of(&stored.links),
                in_use: lock(&stored.folder)?.is_none(),
            });
        }
        listed.sort_by_key(|listed| Reverse(listed.last_used));
        Ok(listed)
    }

    /// What they take together.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn usage(&self) -> Result<Usage> {
        let _lock = self.lock_room()?;
        let shelf = self.shelf()?;
        let bytes = shelf.books.used();
        let possible = shelf.space.free.saturating_add(bytes).saturating_sub(shelf.space.floor());
        Ok(Usage { checkpoints: shelf.stored.len(), bytes, budget: shelf.budget.min(possible) })
    }

    /// Removes those of least value until all together take at most `target`
    /// bytes (none: all), and what dead processes left. What is in use stays. A
    /// dry run removes nothing, and says what would be.
    ///
    /// # Errors
    /// When they cannot be read or removed.
    pub fn prune(&self, target: Option<u64>, dry_run: bool) -> Result<Pruned> {
        let _lock = self.lock_room()?;
        let mut shelf = self.shelf()?;
        if dry_run {
            shelf.strike_dead();
        } else {
            self.clear_dead(&mut shelf)?;
        }
        let (doomed, _) = shelf.choose(|books| target.is_some_and(|target| books.used() <= target))?;
        let pruned = Pruned { checkpoints: doomed.len(), bytes: shelf.books.freed() };
        if !dry_run {
            remove(doomed)?;
        }
        Ok(pruned)
    }

    /// Held while room is made: two at once would give the same room away, and
    /// might take a folder for a dead one that is just being made.
    fn lock_room(&self) -> Result<Lock> {
        let path = self.root.join(".lock");
        let lock = || -> io::Result<Lock> {
            let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            Lock::alone_in_turn(file)
        };
        lock().trying(|| format!("lock {}", path.display()))
    }

    /// Looks at everything. The caller holds the lock of the room.
    fn shelf(&self) -> Result<Shelf> {
        let space = (self.space)(&self.root).trying(|| format!("ask for the room in {}", self.root.display()))?;
        let mut shelf = Shelf { stored: Vec::new(), dead: Vec::new(), books: Books::default(), promised: 0, space, budget: 0 };
        for step_folder in entries(&self.root)? {
            let name = step_folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Ok(step) = format!("sha256:{name}").parse::<Key>() else { continue };
            for folder in entries(&step_folder)? {
                shelf.take_stored(step, folder)?;
            }
        }
        // Links of those being written to stored ones are known only now.
        let mut living = Vec::new();
        for folder in entries(&self.root.join(NEW))? {
            let promise = folder.extension().and_then(|bytes| bytes.to_str()?.parse::<u64>().ok()).unwrap_or(0);
            living.extend(shelf.take_other(folder)?.map(|links| (links, promise)));
        }
        shelf.promised = living.iter().map(|(links, promise)| promise.saturating_sub(shelf.books.bytes_only_of(links))).sum();
        shelf.budget = self.budget.unwrap_or_else(|| space.free.saturating_add(shelf.books.used()) / 4);
        shelf.find_superseded();
        Ok(shelf)
    }

    fn clear_dead(&self, shelf: &mut Shelf) -> Result<()> {
        remove(shelf.strike_dead())?;
        Claim::sweep(&self.claims).trying(|| format!("clear up {}", self.claims.display()))
    }
}

impl Shelf {
    /// Takes a folder in the place of a checkpoint.
    fn take_stored(&mut self, step: Key, folder: PathBuf) -> Result<()> {
        let label = match Label::read(&folder) {
            // Dropped: only who still uses it keeps it.
            Err(Unusable::Gone) => return self.take_other(folder).map(drop),
            Err(Unusable::Failed(error)) => return Err(error).trying(|| format!("read {}", folder.display())),
            Err(Unusable::Damaged(_) | Unusable::Foreign) => None,
            Ok(label) => Some(label),
        };
        let last_used = std::fs::metadata(folder.join(label::NAME)).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        if let Some(links) = links(&folder)? {
            self.books.add(&links);
            self.stored.push(Stored { folder, step, label, last_used, links, superseded: false });
        }
        Ok(())
    }

    /// Takes a folder that is no checkpoint (yet, or any more). Gives its names
    /// when somebody has it.
    fn take_other(&mut self, folder: PathBuf) -> Result<Option<Links>> {
        let held = lock(&folder)?;
        let Some(links) = links(&folder)? else { return Ok(None) };
        self.books.add(&links);
        Ok(match held {
            None => Some(links),
            Some(lock) => {
                self.dead.push(Doomed { folder, links, _lock: lock });
                None
            }
        })
    }

    fn find_superseded(&mut self) {
        let mut newest: HashMap<Key, SystemTime> = HashMap::new();
        let made = |stored: &Stored| stored.label.as_ref().map_or(SystemTime::UNIX_EPOCH, |label| label.made);
        for stored in &self.stored {
            let newest = newest.entry(stored.step).or_insert(SystemTime::UNIX_EPOCH);
            *newest = made(stored).max(*newest);
        }
        for stored in &mut self.stored {
            stored.superseded = newest.get(&stored.step).is_some_and(|newest| made(stored) < *newest);
        }
    }

    /// Strikes out the dead, and gives them.
    fn strike_dead(&mut self) -> Vec<Doomed> {
        let dead = std::mem::take(&mut self.dead);
        for doomed in &dead {
            self.books.remove(&doomed.links);
        }
        dead
    }

    /// Chooses what has to go, the least valuable first, until it is `enough`;
    /// strikes it out. Whatever is in use is passed over. Gives whether it was
    /// enough in the end.
    fn choose(&mut self, enough: impl Fn(&Books) -> bool) -> Result<(Vec<Doomed>, bool)> {
        let now = SystemTime::now();
        let mut doomed = Vec::new();
        while !enough(&self.books) {
            // Anew each time: with the first of two that share a layer gone, the
            // going of the second frees it.
            let value = |stored: &Stored| match &stored.label {
                Some(label) if !stored.superseded => {
                    let idle = now.duration_since(stored.last_used).unwrap_or_default();
                    value(label.worth(), self.books.bytes_only_of(&stored.links), idle)
                }
                _ => 0.0,
            };
            let values = self.stored.iter().enumerate().map(|(at, stored)| (value(stored), stored.last_used, at));
            let Some((_, _, at)) = values.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))) else { return Ok((doomed, false)) };
            let stored = self.stored.swap_remove(at);
            if let Some(lock) = lock(&stored.folder)? {
                self.books.remove(&stored.links);
                doomed.push(Doomed { folder: stored.folder, links: stored.links, _lock: lock });
            }
        }
        Ok((doomed, true))
    }
}

fn remove(doomed: Vec<Doomed>) -> Result<()> {
    doomed.into_iter().try_for_each(|doomed| remove_whole(&doomed.folder))
}

/// Locks a folder, unless somebody has it or it is gone.
fn lock(folder: &Path) -> Result<Option<Lock>> {
    Lock::alone_at(folder).trying(|| format!("lock {}", folder.display()))
}

/// The names in a folder; `None` when it is gone, or is none.
fn links(folder: &Path) -> Result<Option<Links>> {
    match Links::of(folder) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        other => other.map(Some).trying(|| format!("read {}", folder.display())),
    }
}

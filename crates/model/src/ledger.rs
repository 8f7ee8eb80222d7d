//! The ledger: the record, written before the act, of everything a bake
//! creates outside the store.
//!
//! One file per bake, `ledger/<bake id>.jsonl`, one JSON object per line:
//! `{"intent":N,"resource":{…}}` before something is made (again with the same
//! number once more is known, such as a pid), `{"gone":N}` when it is gone.
//! A live bake holds an exclusive lock on its file, so that no other command
//! reaps it. A torn last line is what a crash leaves, and is ignored.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::error::{Result, ResultExt};

/// Something that a bake creates outside the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Resource {
    /// A process group of this machine, known by its leader's pid and start
    /// time together, since pids are used again.
    Process {
        /// Pid of the leader, which is the group's id too.
        pid: u32,
        /// Start time in clock ticks since boot (`/proc/PID/stat`, field 22).
        start: u64,
        /// What it is, for people.
        what: String,
    },
    /// A file or folder of this machine.
    Path {
        /// Absolute path.
        path: PathBuf,
    },
    /// Something at a cloud.
    Cloud {
        /// Which builder can remove it (`ec2`).
        builder: String,
        /// Where (`eu-central-1`).
        region: String,
        /// What (`instance`, `key-pair`).
        resource: String,
        /// Its id; absent while only intended: then the bake's tag finds it.
        id: Option<String>,
    },
}

/// Number of an intent within its ledger.
pub type Intent = u64;

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Intent { intent: Intent, resource: Resource },
    Gone { gone: Intent },
}

/// One bake's ledger, open and locked.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    next: Intent,
    live: BTreeMap<Intent, Resource>,
}

impl Ledger {
    /// Begins the ledger of bake `id` in `folder`.
    ///
    /// # Errors
    /// When the file cannot be made or locked.
    pub fn create(folder: &Path, id: &str) -> Result<Self> {
        let path = folder.join(format!("{id}.jsonl"));
        let open = || -> std::io::Result<File> {
            use std::os::unix::fs::OpenOptionsExt as _;
            // Nobody takes it for a dead bake's before it is locked.
            let new = path.with_extension("new");
            let file = OpenOptions::new().create_new(true).append(true).mode(0o600).open(&new)?;
            file.try_lock()?;
            std::fs::rename(&new, &path)?;
            File::open(folder)?.sync_all()?;
            Ok(file)
        };
        let file = open().trying(|| format!("begin the ledger {}", path.display()))?;
        Ok(Self { path, state: Mutex::new(State { file, next: 1, live: BTreeMap::new() }) })
    }

    /// Records that `resource` is about to be made. On disk when this returns.
    ///
    /// # Errors
    /// When the record cannot be written: then nothing may be made.
    pub fn intend(&self, resource: Resource) -> Result<Intent> {
        let mut state = self.lock();
        let intent = state.next;
        state.next += 1;
        self.append(&mut state, &Line::Intent { intent, resource: resource.clone() })?;
        state.live.insert(intent, resource);
        Ok(intent)
    }

    /// Records what is known by now of an intended resource.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn amend(&self, intent: Intent, resource: Resource) -> Result<()> {
        let mut state = self.lock();
        self.append(&mut state, &Line::Intent { intent, resource: resource.clone() })?;
        state.live.insert(intent, resource);
        Ok(())
    }

    /// Strikes out what is gone.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn strike(&self, intent: Intent) -> Result<()> {
        let mut state = self.lock();
        self.append(&mut state, &Line::Gone { gone: intent })?;
        state.live.remove(&intent);
        Ok(())
    }

    /// Ends the ledger: when nothing is live any more, its file goes too.
    pub fn close(&self) {
        let state = self.lock();
        if state.live.is_empty() {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn append(&self, state: &mut State, line: &Line) -> Result<()> {
        let write = |file: &mut File| -> std::io::Result<()> {
            let mut text = serde_json::to_string(line)?;
            text.push('\n');
            file.write_all(text.as_bytes())?;
            file.sync_data()
        };
        write(&mut state.file).trying(|| format!("write the ledger {}", self.path.display()))
    }
}

/// A ledger whose bake is dead: locked by the reader, with what is left.
#[derive(Debug)]
pub struct Orphan {
    /// The dead bake's id.
    pub bake: String,
    /// What it has left, newest first: the order to remove it in.
    pub left: Vec<Resource>,
    path: PathBuf,
    _locked: File,
}

impl Orphan {
    /// Removes the file, once everything in it is gone.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn settle(self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).trying(|| format!("remove the ledger {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }
}

/// The ledgers in `folder` whose bakes have died.
///
/// # Errors
/// When the folder cannot be read.
pub fn orphans(folder: &Path) -> Result<Vec<Orphan>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(error).trying(|| format!("read the ledgers in {}", folder.display())),
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let Some(bake) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".jsonl")) else { continue };
        let Ok(mut file) = File::open(&path) else { continue };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Error(error)) => return Err(error).trying(|| format!("lock the ledger {}", path.display())),
        }
        // Not by its name: a bake may have ended well since it was opened.
        let mut text = String::new();
        file.read_to_string(&mut text).trying(|| format!("read the ledger {}", path.display()))?;
        found.push(Orphan { bake: bake.to_owned(), left: left_in(&text), path: path.clone(), _locked: file });
    }
    found.sort_by(|a, b| a.bake.cmp(&b.bake));
    Ok(found)
}

/// The ids of the bakes that are alive: whose ledgers in `folder` somebody holds.
///
/// # Errors
/// When the folder cannot be read.
pub fn running(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(error).trying(|| format!("read the ledgers in {}", folder.display())),
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let Some(bake) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".jsonl")) else { continue };
        let Ok(file) = File::open(&path) else { continue };
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            found.push(bake.to_owned());
        }
    }
    Ok(found)
}

fn left_in(text: &str) -> Vec<Resource> {
    let mut live = BTreeMap::new();
    for line in text.lines() {
        match serde_json::from_str(line) {
            Ok(Line::Intent { intent, resource }) => {
                live.insert(intent, resource);
            }
            Ok(Line::Gone { gone }) => {
                live.remove(&gone);
            }
            Err(_) => {}
        }
    }
    live.into_values().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> Resource {
        Resource::Path { path: name.into() }
    }

    #[test]
    fn a_live_ledger_is_not_an_orphan_and_a_dead_one_tells_what_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::create(folder.path(), "b1").unwrap();
        let one = ledger.intend(path("/one")).unwrap();
        ledger.intend(path("/two")).unwrap();
        let three = ledger.intend(path("/three")).unwrap();
        ledger.amend(three, path("/three-known")).unwrap();
        ledger.strike(one).unwrap();
        assert!(orphans(folder.path()).unwrap().is_empty());
        assert_eq!(running(folder.path()).unwrap(), ["b1"]);
        drop(ledger);
        assert!(running(folder.path()).unwrap().is_empty());
        let mut found = orphans(folder.path()).unwrap();
        let orphan = found.pop().unwrap();
        assert_eq!(orphan.left, [path("/three-known"), path("/two")]);
        orphan.settle().unwrap();
        assert!(orphans(folder.path()).unwrap().is_empty());
    }

    #[test]
    fn a_torn_line_is_ignored() {
        let text = "{\"intent\":1,\"resource\":{\"kind\":\"path\",\"path\":\"/a\"}}\n{\"gon";
        assert_eq!(left_in(text), [path("/a")]);
    }

    #[test]
    fn a_ledger_with_nothing_left_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::create(folder.path(), "b2").unwrap();
        let one = ledger.intend(path("/one")).unwrap();
        ledger.strike(one).unwrap();
        ledger.close();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

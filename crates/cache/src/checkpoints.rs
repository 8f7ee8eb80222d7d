//! Checkpoints in folders: written, found, verified, dropped. What has to go to
//! make room is decided in `room.rs`.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use kiln_model::checkpoint::{Checkpoint, CheckpointCache, Hold, KeptFile, Peek, Slot, Written};
use kiln_model::cleanup::remove_path;
use kiln_model::home::Home;
use kiln_model::{Code, Error, Key, Result, ResultExt as _};

use crate::claim::Claim;
use crate::digest::{Source, digest_all};
use crate::label::{self, Label, Unusable, is_damage};
use crate::lock::Lock;
use crate::room::Space;

/// Where checkpoints are written.
pub(crate) const NEW: &str = ".new";

/// Checkpoints below `$KILN_HOME/cache`. Several processes may use the same at
/// once.
#[derive(Debug)]
pub struct Checkpoints {
    pub(crate) root: PathBuf,
    pub(crate) claims: PathBuf,
    /// Bytes that may be taken; by default a share of what the disk has.
    pub(crate) budget: Option<u64>,
    /// Asks how much room the file system has.
    pub(crate) space: fn(&Path) -> io::Result<Space>,
    /// The keys that vouch for what may be used beside this machine's own.
    trusted: Vec<String>,
    /// The one that vouches for what was found last: what is made of that hangs
    /// on it too.
    origin: Mutex<Option<String>>,
}

/// A checkpoint being written: its folder goes with it, unless it was committed.
pub(crate) struct Draft {
    folder: PathBuf,
    /// Holds the folder; nothing once it was committed.
    lock: Mutex<Option<Lock>>,
}

impl Draft {
    /// Makes the folder. The caller keeps others from sweeping meanwhile.
    pub(crate) fn create(folder: PathBuf) -> Result<Self> {
        let make = || -> io::Result<Option<Lock>> {
            make_folder(&folder)?;
            Lock::alone_at(&folder)
        };
        let lock = make().trying(|| format!("make the folder {}", folder.display()))?;
        let lock = lock.ok_or_else(|| Error::new(Code::Failed, format!("{} was taken by another process", folder.display())))?;
        Ok(Self { folder, lock: Mutex::new(Some(lock)) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Lock>> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.lock().is_some() {
            drop(remove_path(&self.folder));
        }
    }
}

/// Makes a folder that its owner alone may use.
fn make_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(folder)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Removes the folder of a checkpoint or draft, and that of its step when it is
/// empty then. The caller holds it alone. Its label goes first, so that half of
/// it is none.
pub(crate) fn remove_whole(folder: &Path) -> Result<()> {
    remove_path(&folder.join(label::NAME))?;
    remove_path(folder)?;
    if let Some(step) = folder.parent().filter(|parent| !parent.ends_with(NEW)) {
        // Fails as long as there is another.
        drop(std::fs::remove_dir(step));
    }
    Ok(())
}

/// The names in a folder; none when it is gone.
pub(crate) fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = || std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    match read() {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(Vec::new()),
        other => other.trying(|| format!("read {}", folder.display())),
    }
}

impl Checkpoints {
    /// Opens the cache below `home`; makes it when there is none. It takes at
    /// most `budget` bytes: unless said, a quarter of what the file system has
    /// free and the cache takes already. In any case 5 % of the file system
    /// stay free, at least 2 GiB and at most 5 GiB.
    ///
    /// # Errors
    /// When the folders cannot be made.
    pub fn open(home: &Home, budget: Option<u64>) -> Result<Self> {
        let (root, claims) = (home.cache().join("checkpoints"), home.cache().join("claims"));
        for folder in [&root.join(NEW), &claims] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
            made.trying(|| format!("make the folder {}", folder.display()))?;
        }
        Ok(Self { root, claims, budget, space: Space::of, trusted: Vec::new(), origin: Mutex::default() })
    }

    /// The same cache for one bake, which may also use what other machines have
    /// made and one of `keys` has signed. Who trusts no key sees none of that,
    /// nor what was made of it: another template may trust others.
    #[must_use]
    pub fn trusting(&self, keys: Vec<String>) -> Self {
        let Self { root, claims, budget, space, .. } = self;
        Self { root: root.clone(), claims: claims.clone(), budget: *budget, space: *space, trusted: keys, origin: Mutex::default() }
    }

    fn origin(&self) -> MutexGuard<'_, Option<String>> {
        self.origin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it may be used here.
    fn trusts(&self, label: &Label) -> bool {
        label.signer.as_ref().is_none_or(|signer| self.trusted.contains(signer))
    }

    fn step_folder(&self, step: &Key) -> PathBuf {
        self.root.join(step.hex())
    }

    /// The checkpoints of a step, the newest first. Those of which it is not
    /// known when they were made come before all others.
    fn of_step(&self, step: &Key) -> Result<Vec<(PathBuf, std::result::Result<Label, Unusable>)>> {
        let labelled = entries(&self.step_folder(step))?.into_iter().map(|folder| (Label::read(&folder), folder));
        let mut found: Vec<_> = labelled
            .filter(|(label, _)| !matches!(label, Err(Unusable::Gone | Unusable::Foreign)))
            .filter(|(label, _)| label.as_ref().ok().is_none_or(|label| self.trusts(label)))
            .map(|(label, folder)| match label {
                // It is complete, and yet in the wrong place.
                Ok(label) if label.step != *step => (folder, Err(Unusable::Damaged(format!("{} is of another step", label::NAME)))),
                label => (folder, label),
            })
            .collect();
        found.sort_by(|(a_folder, a), (b_folder, b)| {
            let made = |label: &std::result::Result<Label, Unusable>| label.as_ref().ok().map(|label| label.made);
            match (made(a), made(b)) {
                (Some(a), Some(b)) => b.cmp(&a).then_with(|| b_folder.cmp(a_folder)),
                (a, b) => a.cmp(&b),
            }
        });
        Ok(found)
    }

    /// Drops a damaged checkpoint: at once for who looks for one, and from the
    /// disk when nobody uses it any more.
    fn drop_folder(&self, folder: &Path, own: impl Sized) -> Result<()> {
        remove_path(&folder.join(label::NAME))?;
        drop(own);
        match Lock::alone_at(folder).trying(|| format!("lock {}", folder.display()))? {
            Some(_lock) => remove_whole(folder),
            None => Ok(()),
        }
    }

    /// Makes what `draft` holds visible. Gives its folder.
    fn place(&self, draft: &Draft, label: &Label) -> Result<PathBuf> {
        let what = || format!("write the checkpoint of step {}", label.step.short());
        let mut lock = draft.lock();
        if lock.is_none() {
            return Err(Error::new(Code::Failed, format!("the checkpoint of step {} was committed already", label.step.short())));
        }
        let bytes = label.encode()?;
        let path = draft.folder.join(label::NAME);
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            sync_folder(&draft.folder)
        };
        write().trying(what)?;
        let step = self.step_folder(&label.step);
        // The id alone: how many bytes were asked for is of no interest now.
        let to = step.join(draft.folder.file_stem().unwrap_or_default());
        // Who removes the last checkpoint of a step removes the step's folder
        // too, maybe right after it was found here.
        let mut tries = 0;
        loop {
            let made = match make_folder(&step) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
                other => other.map(|()| true).trying(what)?,
            };
            match std::fs::rename(&draft.folder, &to) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && tries < 100 => tries += 1,
                other => {
                    other.trying(what)?;
                    // From here on others may find, use and remove it.
                    *lock = None;
                    sync_folder(&step).trying(what)?;
                    if made {
                        sync_folder(&self.root).trying(what)?;
                    }
                    return Ok(to);
                }
            }
        }
    }

    /// Removes the checkpoints of a step that are older than `newest`. One that
    /// is in use stays until its room is needed; so does one that cannot be
    /// removed now, since the new one is there all the same.
    fn remove_older(&self, step: &Key, newest: &Path) {
        let found = self.of_step(step).unwrap_or_default();
        let older = found.iter().skip_while(|(folder, _)| folder != newest).skip(1);
        for (folder, _) in older {
            if let Ok(Some(_lock)) = Lock::alone_at(folder) {
                drop(remove_whole(folder));
            }
        }
    }
}

impl CheckpointCache for Checkpoints {
    fn peek(&self, step: &Key) -> Result<Option<Peek>> {
        let newest = self.of_step(step)?.into_iter().find_map(|(_, label)| label.ok());
        Ok(newest.map(|label| Peek { made: label.made, memory: label.memory }))
    }

    fn find(&self, step: &Key, max_age: Option<Duration>, warn: &dyn Fn(String)) -> Result<Option<Checkpoint>> {
        let what = || format!("read the checkpoints of step {}", step.short());
        let now = SystemTime::now();
        for (folder, label) in self.of_step(step)? {
            let old_enough = |label: &Label| max_age.is_some_and(|max| now.duration_since(label.made).unwrap_or_default() > max);
            if label.as_ref().is_ok_and(old_enough) {
                continue;
            }
            // Held first, then verified, so that it is the same that is used. It
            // may be gone when those who had it alone let it go.
            let Some(lock) = Lock::together_at(&folder).trying(what)? else { continue };
            if !folder.join(label::NAME).exists() {
                continue;
            }
            match label.and_then(|label| verify(&folder, &label).map(|()| label)) {
                Ok(label) => {
                    // Only its value when room is needed depends on this.
                    drop(File::open(folder.join(label::NAME)).and_then(|file| file.set_modified(now)));
                    self.origin().clone_from(&label.signer);
                    return Ok(Some(Checkpoint {
                        step: label.step,
                        memory: label.memory,
                        made: label.made,
                        worth: label.worth(),
                        files: label.files,
                        note: label.note,
                        folder,
                        hold: Arc::new(lock),
                    }));
                }
                Err(Unusable::Damaged(flaw)) => {
                    warn(format!("the checkpoint of step {} is damaged and was dropped: {flaw}", step.short()));
                    self.drop_folder(&folder, lock)?;
                }
                Err(Unusable::Gone | Unusable::Foreign) => {}
                Err(Unusable::Failed(error)) => return Err(error).trying(what),
            }
        }
        Ok(None)
    }

    fn drop_damaged(&self, checkpoint: Checkpoint) -> Result<()> {
        let folder = checkpoint.folder.clone();
        if folder.parent() != Some(&self.step_folder(&checkpoint.step)) {
            return Err(Error::new(Code::Failed, format!("{} is no checkpoint of this cache", folder.display())));
        }
        self.drop_folder(&folder, checkpoint)
    }

    fn slot(&self, step: &Key, memory: Option<&Key>, bytes: u64) -> Result<Option<Slot>> {
        let draft = self.make_room(bytes, |name| Draft::create(self.root.join(NEW).join(name)))?;
        Ok(draft.map(|draft| Slot { step: *step, memory: memory.copied(), folder: draft.folder.clone(), hold: Arc::new(draft) }))
    }

    fn commit(&self, slot: Slot, written: &Written, worth: Duration) -> Result<()> {
        let signer = self.origin().clone();
        self.write(&slot, written, (worth, SystemTime::now()), signer)
    }

    fn claim(&self, key: &Key) -> Result<Option<Hold>> {
        let claim = Claim::take(&self.claims.join(key.hex())).trying(|| format!("claim {}", key.short()))?;
        Ok(claim.map(|claim| Arc::new(claim) as Hold))
    }
}

impl Checkpoints {
    /// Makes visible what came from another machine, was made there at `made`,
    /// from which its age counts, and is vouched for by the key `signer`. Else as
    /// [`CheckpointCache::commit`].
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn commit_signed(&self, slot: &Slot, written: &Written, worth: Duration, made: SystemTime, signer: &str) -> Result<()> {
        self.write(slot, written, (worth, made), Some(signer.to_owned()))
    }

    fn write(&self, slot: &Slot, written: &Written, (worth, made): (Duration, SystemTime), signer: Option<String>) -> Result<()> {
        let Some(draft) = slot.hold.downcast_ref::<Draft>().filter(|draft| draft.folder.parent() == Some(&self.root.join(NEW))) else {
            return Err(Error::new(Code::Failed, format!("{} is no slot of this cache", slot.folder.display())));
        };
        let what = || format!("keep the checkpoint of step {}", slot.step.short());
        let files = complete(&draft.folder, &written.files).trying(what)?;
        let memory = if written.memory { slot.memory } else { None };
        let mut label = Label::new(slot.step, memory, (worth, made), written.note.clone(), files);
        label.signer = signer;
        let folder = self.place(draft, &label)?;
        self.remove_older(&slot.step, &folder);
        Ok(())
    }
}

/// Compares the files of a checkpoint with its label.
fn verify(folder: &Path, label: &Label) -> std::result::Result<(), Unusable> {
    let unreadable = |name: &str, error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Unusable::Damaged(format!("{name} is missing")),
        _ if is_damage(&error) => Unusable::Damaged(format!("{name} cannot be read: {error}")),
        _ => Unusable::Failed(error),
    };
    let mut sources = Vec::new();
    for kept in &label.files {
        let path = folder.join(&kept.name);
        let meta = std::fs::symlink_metadata(&path).map_err(|error| unreadable(&kept.name, error))?;
        if !meta.is_file() || meta.len() != kept.length {
            return Err(Unusable::Damaged(format!("{} has {} bytes instead of {}", kept.name, meta.len(), kept.length)));
        }
        sources.push(Source { file: File::open(&path).map_err(|error| unreadable(&kept.name, error))?, length: kept.length });
    }
    for (kept, digest) in label.files.iter().zip(digest_all(&sources)) {
        if digest.map_err(|error| unreadable(&kept.name, error))? != kept.digest {
            return Err(Unusable::Damaged(format!("the bytes of {} are not those that were written", kept.name)));
        }
    }
    Ok(())
}

/// Checks what a builder says that it wrote, and adds the digests that it left
/// out. Whatever else is in the folder goes.
fn complete(folder: &Path, written: &[KeptFile]) -> Result<Vec<KeptFile>> {
    let mut files = written.to_vec();
    let mut names: BTreeSet<PathBuf> = BTreeSet::new();
    let (mut open, mut sources) = (Vec::new(), Vec::new());
    for kept in &mut files {
        let path = folder.join(&kept.name);
        let plain =
            matches!(Path::new(&kept.name).components().collect::<Vec<_>>()[..], [Component::Normal(name)] if name == kept.name.as_str());
        if !plain || kept.name == label::NAME || !names.insert(path.clone()) {
            return Err(Error::new(Code::Failed, format!("`{}` cannot be the name of a checkpoint's file", kept.name)));
        }
        let meta = std::fs::symlink_metadata(&path).trying(|| format!("find {}", path.display()))?;
        if !meta.is_file() {
            return Err(Error::new(Code::Failed, format!("{} is not a regular file", path.display())));
        }
        let private = meta.permissions().mode() & 0o700;
        if meta.permissions().mode() & 0o077 != 0 {
            std::fs::set_permissions(&path, Permissions::from_mode(private)).trying(|| format!("protect {}", path.display()))?;
        }
        if kept.digest.is_empty() {
            kept.length = meta.len();
            sources.push(Source { file: File::open(&path).trying(|| format!("open {}", path.display()))?, length: kept.length });
            open.push(kept);
        } else if kept.length != meta.len() {
            let message = format!("{} has {} bytes instead of the {} that were digested", path.display(), meta.len(), kept.length);
            return Err(Error::new(Code::Failed, message));
        }
    }
    for (kept, digest) in open.into_iter().zip(digest_all(&sources)) {
        kept.digest = digest.trying(|| format!("read {}", folder.join(&kept.name).display()))?;
    }
    for path in entries(folder)? {
        if !names.contains(&path) {
            remove_path(&path)?;
        }
    }
    Ok(files)
}

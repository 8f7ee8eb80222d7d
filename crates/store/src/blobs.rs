//! The folder itself: blobs, temporary files and locks.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_disk::lanes;
use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::PackRef;

use crate::lease::{self, Lease};

/// Content of `oci-layout`, as the OCI image specification has it.
pub(crate) const LAYOUT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

/// An OCI image layout on disk that holds images. Cheap to clone; clones share
/// one lease, which ends with the last of them.
#[derive(Debug, Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    lease: Mutex<Option<Lease>>,
    count: AtomicU64,
}

/// A file or folder in `tmp`, removed unless it is put in its place.
#[derive(Debug)]
pub(crate) struct Temp {
    path: PathBuf,
    armed: bool,
}

impl Temp {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Renames it to `to`, replacing what is there.
    pub(crate) fn place(mut self, to: &Path) -> Result<()> {
        std::fs::rename(&self.path, to).trying(|| format!("write {}", to.display()))?;
        self.armed = false;
        Ok(())
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if self.armed {
            drop(kiln_model::cleanup::remove_path(&self.path));
        }
    }
}

/// A new file that its owner alone may read and write.
pub(crate) fn create_private(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).trying(|| format!("make {}", path.display()))
}

/// Makes renames in `folder` last.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).trying(|| format!("sync {}", folder.display()))
}

impl Store {
    /// Opens the store at `root`; makes it when there is none. Removes what
    /// dead writers left, unless somebody is at work.
    ///
    /// # Errors
    /// When the folder cannot be made, or is an image layout of a version that
    /// is not known.
    pub fn open(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).trying(|| format!("use {} as a store", root.display()))?;
        let store = Self { shared: Arc::new(Shared { root, lease: Mutex::new(None), count: AtomicU64::new(0) }) };
        for folder in ["blobs/sha256", ".kiln/leases", ".kiln/tmp", ".kiln/partial"] {
            let folder = store.root().join(folder);
            DirBuilder::new().recursive(true).mode(0o700).create(&folder).trying(|| format!("make the folder {}", folder.display()))?;
        }
        let layout = store.root().join("oci-layout");
        match std::fs::read_to_string(&layout) {
            Ok(text) => {
                let version = serde_json::from_str::<serde_json::Value>(&text).ok();
                let version = version.as_ref().and_then(|v| v.get("imageLayoutVersion")).and_then(|v| v.as_str());
                if version != Some("1.0.0") {
                    return Err(Error::new(Code::Corrupt, format!("{} is not an OCI image layout 1.0.0", store.root().display())));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                store.write_file(&layout, LAYOUT.as_bytes())?;
            }
            Err(error) => return Err(error).trying(|| format!("read {}", layout.display())),
        }
        store.make_index()?;
        // Somebody who holds the lock is at work: the next one clears up.
        let lock = store.lock_file("blobs.lock")?;
        if lock.try_lock().is_ok() {
            let living = lease::living(&store.leases())?;
            store.clear_tmp(&living)?;
        }
        Ok(store)
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.shared.root
    }

    /// Where a blob is, or would be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    /// Whether a blob is there with this size. Says nothing of its bytes.
    pub fn has_blob(&self, digest: &Digest, size: u64) -> bool {
        std::fs::metadata(self.blob_path(digest)).is_ok_and(|meta| meta.is_file() && meta.len() == size)
    }

    /// The bytes of a small blob, checked against its digest.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when it is missing, damaged or larger than `limit`
    /// bytes.
    pub fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let bytes = self.read_unchecked(digest, limit)?;
        if Digest::of(&bytes) == *digest { Ok(bytes) } else { Err(damaged(digest)) }
    }

    /// The bytes of small blobs, as [`Store::read_blob`] gives each; digested
    /// side by side.
    pub(crate) fn read_blobs(&self, digests: &[Digest], limit: u64) -> Vec<Result<Vec<u8>>> {
        let mut read = Vec::with_capacity(digests.len());
        for part in digests.chunks(lanes::at_once()) {
            let found: Vec<Result<Vec<u8>>> = part.iter().map(|digest| self.read_unchecked(digest, limit)).collect();
            let messages: Vec<&[u8]> = found.iter().map(|bytes| bytes.as_deref().unwrap_or_default()).collect();
            let computed = lanes::digests(&messages);
            let checked = found.into_iter().zip(part.iter().zip(computed)).map(|(bytes, (wanted, computed))| match bytes {
                Ok(_) if computed != *wanted => Err(damaged(wanted)),
                bytes => bytes,
            });
            read.extend(checked);
        }
        read
    }

    fn read_unchecked(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let file = self.open_blob(digest)?;
        let reading = || format!("read blob {digest}");
        let length = file.metadata().trying(reading)?.len();
        let too_large = || Error::new(Code::Corrupt, format!("blob {digest} is larger than the {limit} bytes it may have"));
        if length > limit {
            return Err(too_large());
        }
        let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default() + 1);
        file.take(limit + 1).read_to_end(&mut bytes).trying(reading)?;
        if bytes.len() as u64 > limit { Err(too_large()) } else { Ok(bytes) }
    }

    /// Stores a small blob; [`Store::prune`] leaves it alone as long as this
    /// store is open.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_blob(&self, bytes: &[u8]) -> Result<Digest> {
        let (temp, mut file) = self.temp()?;
        file.write_all(bytes).and_then(|()| file.sync_all()).trying(|| "write a blob".into())?;
        let digest = Digest::of(bytes);
        self.place_blob(temp, &digest)?;
        Ok(digest)
    }

    /// Protects blobs from [`Store::prune`] as long as this store is open, and
    /// gives those of them that are there (with their sizes in bytes).
    ///
    /// # Errors
    /// When the lease cannot be written.
    pub fn hold(&self, blobs: &[PackRef]) -> Result<Vec<PackRef>> {
        let _lock = self.appearing()?;
        self.leased(|lease| lease.hold(blobs.iter().map(|blob| blob.digest)))?;
        Ok(blobs.iter().filter(|blob| self.has_blob(&blob.digest, blob.size)).copied().collect())
    }

    /// Opens a blob for reading, unchecked.
    pub(crate) fn open_blob(&self, digest: &Digest) -> Result<File> {
        File::open(self.blob_path(digest)).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::new(Code::Corrupt, format!("blob {digest} is missing from the store"))
                .next("`kiln verify` names every image that is damaged"),
            _ => Error::new(Code::Failed, format!("cannot open blob {digest}")).because(error),
        })
    }

    /// Puts a synced temporary file in its place among the blobs. One that is
    /// there already is replaced, which heals it if it was damaged.
    pub(crate) fn place_blob(&self, temp: Temp, digest: &Digest) -> Result<()> {
        let _lock = self.appearing()?;
        self.leased(|lease| lease.hold([*digest]))?;
        temp.place(&self.blob_path(digest))
    }

    /// Puts a synced file of this layout in its place among the blobs.
    pub(crate) fn place_file(&self, path: &Path, digest: &Digest) -> Result<()> {
        self.place_blob(Temp { path: path.to_owned(), armed: false }, digest)
    }

    /// An empty temporary file.
    pub(crate) fn temp(&self) -> Result<(Temp, File)> {
        let path = self.temp_path()?;
        let file = create_private(&path)?;
        Ok((Temp { path, armed: true }, file))
    }

    /// An empty temporary folder.
    pub(crate) fn temp_folder(&self) -> Result<Temp> {
        let path = self.temp_path()?;
        DirBuilder::new().mode(0o700).create(&path).trying(|| format!("make the folder {}", path.display()))?;
        Ok(Temp { path, armed: true })
    }

    fn temp_path(&self) -> Result<PathBuf> {
        let number = self.shared.count.fetch_add(1, Ordering::Relaxed);
        let id = self.lease_id()?;
        Ok(self.tmp().join(format!("{id}.{number}")))
    }

    /// Replaces a file of the layout: written aside, synced, renamed.
    pub(crate) fn write_file(&self, to: &Path, bytes: &[u8]) -> Result<()> {
        let (temp, mut file) = self.temp()?;
        file.write_all(bytes).and_then(|()| file.sync_all()).trying(|| format!("write {}", to.display()))?;
        temp.place(to)?;
        sync_folder(self.root())
    }

    /// Held while a blob appears: beside others who do the same, but not beside
    /// `prune`.
    fn appearing(&self) -> Result<File> {
        let file = self.lock_file("blobs.lock")?;
        file.lock_shared().trying(|| "lock the store".into())?;
        Ok(file)
    }

    /// Held while blobs are removed.
    pub(crate) fn removing(&self) -> Result<File> {
        let file = self.lock_file("blobs.lock")?;
        file.lock().trying(|| "lock the store".into())?;
        Ok(file)
    }

    /// Opens a lock file; closing it unlocks.
    pub(crate) fn lock_file(&self, name: &str) -> Result<File> {
        let path = self.root().join(".kiln").join(name);
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        open.trying(|| format!("open {}", path.display()))
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root().join("blobs/sha256")
    }

    pub(crate) fn leases(&self) -> PathBuf {
        self.root().join(".kiln/leases")
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.root().join(".kiln/tmp")
    }

    /// Where blobs grow that are being fetched. See `transfer::partial`.
    pub(crate) fn partial(&self) -> PathBuf {
        self.root().join(".kiln/partial")
    }

    /// Removes temporary files of writers that are gone; gives how many.
    pub(crate) fn clear_tmp(&self, living: &lease::Held) -> Result<usize> {
        let tmp = self.tmp();
        let what = || format!("read {}", tmp.display());
        let mut removed = 0;
        for entry in std::fs::read_dir(&tmp).trying(what)? {
            let path = entry.trying(what)?.path();
            let owner = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.rsplit_once('.')).map(|(id, _)| id);
            if !owner.is_some_and(|id| living.ids.contains(id)) && kiln_model::cleanup::remove_path(&path).is_ok() {
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn lease(&self) -> MutexGuard<'_, Option<Lease>> {
        self.shared.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The id of this store's lease, which is made when there is none yet.
    fn lease_id(&self) -> Result<String> {
        if let Some(lease) = &*self.lease() {
            return Ok(lease.id().to_owned());
        }
        let _lock = self.appearing()?;
        self.leased(|lease| Ok(lease.id().to_owned()))
    }

    /// Uses the lease. The caller holds the blobs lock.
    fn leased<T>(&self, with: impl FnOnce(&mut Lease) -> Result<T>) -> Result<T> {
        let mut lease = self.lease();
        match &mut *lease {
            Some(lease) => with(lease),
            none => with(none.insert(Lease::create(&self.leases())?)),
        }
    }
}

/// A blob whose bytes are not those its name says.
pub(crate) fn damaged(digest: &Digest) -> Error {
    Error::new(Code::Corrupt, format!("blob {digest} is damaged: its bytes have another digest"))
        .next("`kiln verify` names every image that is damaged; bake or import it again")
}

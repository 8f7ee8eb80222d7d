//! Claims: who makes what a key names.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::lock::Lock;

/// A file that is locked, and removed with the claim. What a dead process
/// leaves is an unlocked file, which is as good as none.
pub(crate) struct Claim {
    path: PathBuf,
    _lock: Lock,
}

impl Claim {
    /// Claims `path`; `None` while another has it.
    pub(crate) fn take(path: &Path) -> io::Result<Option<Self>> {
        loop {
            let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
            let Some(lock) = Lock::alone(file)? else { return Ok(None) };
            // The one before may have removed the file after it was opened here;
            // then somebody else may have claimed a new one.
            if lock.is_at(path)? {
                return Ok(Some(Self { path: path.to_owned(), _lock: lock }));
            }
        }
    }

    /// Removes the files in `folder` that dead processes left.
    pub(crate) fn sweep(folder: &Path) -> io::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if let Some(lock) = Lock::alone_at(&path)? {
                drop(Self { path, _lock: lock });
            }
        }
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Still locked: nobody else can have the file that goes.
        drop(std::fs::remove_file(&self.path));
    }
}

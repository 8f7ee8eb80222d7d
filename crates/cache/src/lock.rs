//! Locks on files and folders (`flock`), which end with their process.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// A locked file or folder; unlocked when dropped.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Lock {
    /// Locks what is open, for this holder alone; `None` while another has it.
    pub(crate) fn alone(file: File) -> io::Result<Option<Self>> {
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Self(file))),
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
    }

    /// Locks what is open for this holder alone, after whoever has it.
    pub(crate) fn alone_in_turn(file: File) -> io::Result<Self> {
        uninterrupted(|| file.lock())?;
        Ok(Self(file))
    }

    /// Locks what is at `path` for this holder alone; `None` while another has
    /// it, or when it is gone.
    pub(crate) fn alone_at(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => match Self::alone(opened?)? {
                Some(lock) if lock.is_at(path)? => Ok(Some(lock)),
                _ => Ok(None),
            },
        }
    }

    /// Locks what is at `path` together with others, after whoever has it
    /// alone; `None` when it is gone.
    pub(crate) fn together_at(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => {
                let file = opened?;
                uninterrupted(|| file.lock_shared())?;
                let lock = Self(file);
                Ok(lock.is_at(path)?.then_some(lock))
            }
        }
    }

    /// Whether `path` leads to what is locked: between opening and locking it,
    /// another may have removed it and made a new one.
    pub(crate) fn is_at(&self, path: &Path) -> io::Result<bool> {
        let own = self.0.metadata()?;
        match std::fs::symlink_metadata(path) {
            Ok(there) => Ok((own.dev(), own.ino()) == (there.dev(), there.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone would not do while a child that is being started still
        // has a copy of the descriptor.
        drop(self.0.unlock());
    }
}

fn uninterrupted(lock: impl Fn() -> io::Result<()>) -> io::Result<()> {
    loop {
        match lock() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

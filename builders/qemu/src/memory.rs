//! A guest's memory as a file of kiln's own.
//!
//! The file is a memfd: it has no name, so that nobody else can open it and
//! nothing of it is left however kiln and QEMU end. QEMU maps it shared
//! (`memory-backend-file` on `/proc/self/fd/N`), and a migration with
//! `x-ignore-shared` then leaves it out of its stream. A checkpoint copies the
//! file while the guest stands still; a resumed guest gets a copy of the
//! checkpoint's, compared with its digest on the way. So every machine and
//! every checkpoint owns its memory, and neither can spoil another's.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Mutex;

use kiln_model::checkpoint::{FileDigest, KeptFile};
use kiln_model::{Code, Error, Result, ResultExt as _};
use rustix::fs::{MemfdFlags, SeekFrom};

/// Bytes that are copied at a time: a multiple of a digest's chunk.
const PIECE: usize = 1 << 20;

/// How many threads copy at most.
const THREADS: usize = 4;

/// A guest's memory.
pub(crate) struct Memory {
    file: File,
    size: u64,
}

impl Memory {
    /// Memory of zeros.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub(crate) fn new(size: u64) -> Result<Self> {
        let make = || -> std::io::Result<File> {
            let file = File::from(rustix::fs::memfd_create("kiln-guest", MemfdFlags::CLOEXEC)?);
            file.set_len(size)?;
            Ok(file)
        };
        Ok(Self { file: make().trying(|| "make the guest's memory".into())?, size })
    }

    /// A copy of what [`Memory::save`] wrote.
    ///
    /// # Errors
    /// [`Code::DigestMismatch`] when the file is damaged.
    pub(crate) fn load(path: &Path, kept: &KeptFile) -> Result<Self> {
        let what = || format!("read {}", path.display());
        let memory = Self::new(kept.length)?;
        let source = File::open(path).trying(what)?;
        let length = source.metadata().trying(what)?.len();
        let digest = if length == kept.length { copy(&source, &memory.file, length).trying(what)? } else { String::new() };
        if digest != kept.digest {
            return Err(Error::new(Code::DigestMismatch, format!("the memory {} is damaged", path.display())));
        }
        Ok(memory)
    }

    /// Copies it to a new file (0600), holes and zeros left out.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn save(&self, path: &Path) -> Result<KeptFile> {
        let what = || format!("write {}", path.display());
        let file = File::options().write(true).create_new(true).mode(0o600).open(path).trying(what)?;
        file.set_len(self.size).trying(what)?;
        let digest = copy(&self.file, &file, self.size).trying(what)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(KeptFile { name, length: self.size, digest, builder_checks: true })
    }

    /// A descriptor for QEMU to inherit.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn descriptor(&self) -> Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned().trying(|| "share the guest's memory with QEMU".into())
    }

    /// Bytes that are in use.
    pub(crate) fn used(&self) -> u64 {
        self.file.metadata().map_or(0, |meta| meta.blocks() * 512)
    }
}

/// Copies what is not zero; gives the digest of it all. Several threads take
/// piece after piece, since one alone is busy with page faults most of the time.
fn copy(from: &File, to: &File, length: u64) -> std::io::Result<String> {
    let pieces = Mutex::new(Pieces { file: from, length, next: 0, end: 0 });
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get().min(THREADS));
    let work = || -> std::io::Result<FileDigest> {
        let mut digest = FileDigest::new();
        let mut buffer = vec![0; PIECE];
        loop {
            let taken = pieces.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()?;
            let Some((offset, count)) = taken else { return Ok(digest) };
            let bytes = &mut buffer[..count];
            from.read_exact_at(bytes, offset)?;
            digest.add(offset, bytes);
            for (index, page) in bytes.chunks(ZEROS.len()).enumerate() {
                if page != &ZEROS[..page.len()] {
                    to.write_all_at(page, offset + (index * ZEROS.len()) as u64)?;
                }
            }
        }
    };
    let mut digest = FileDigest::new();
    std::thread::scope(|scope| -> std::io::Result<()> {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        digest.merge(work()?);
        for other in others {
            digest.merge(other.join().map_err(|_| std::io::Error::other("a copying thread panicked"))??);
        }
        Ok(())
    })?;
    Ok(digest.finish(length))
}

/// What is looked for in a guest's memory before it is written: writing it
/// would only take room.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// The pieces of a file that hold data.
struct Pieces<'a> {
    file: &'a File,
    length: u64,
    next: u64,
    /// Where the data that `next` lies in ends.
    end: u64,
}

impl Pieces<'_> {
    fn take(&mut self) -> std::io::Result<Option<(u64, usize)>> {
        if self.next >= self.end {
            match rustix::fs::seek(self.file, SeekFrom::Data(self.next)) {
                Ok(start) => {
                    self.next = start - start % PIECE as u64;
                    self.end = rustix::fs::seek(self.file, SeekFrom::Hole(start))?;
                }
                // There is no more data.
                Err(rustix::io::Errno::NXIO) => self.end = 0,
                Err(error) => return Err(error.into()),
            }
            if self.end == 0 || self.next >= self.length {
                self.next = self.length;
                return Ok(None);
            }
        }
        let offset = self.next;
        let count = (self.length - offset).min(PIECE as u64);
        self.next = offset + count;
        Ok(Some((offset, usize::try_from(count).unwrap_or(PIECE))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_loaded_and_a_flipped_byte_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let memory = Memory::new(64 << 20).unwrap();
        let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        for offset in [4096, 20 << 20, (64 << 20) - 3_000_000] {
            memory.file.write_all_at(&data, offset).unwrap();
        }
        let kept = memory.save(&path).unwrap();
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 12 << 20);
        let again = Memory::load(&path, &kept).unwrap();
        let mut found = vec![0; data.len()];
        for offset in [4096, 20 << 20, (64 << 20) - 3_000_000] {
            again.file.read_exact_at(&mut found, offset).unwrap();
            assert!(found == data);
        }
        assert!(again.used() < 12 << 20);
        for offset in [0, 5000, 40 << 20, (64 << 20) - 1] {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).unwrap();
            file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
            assert_eq!(Memory::load(&path, &kept).err().unwrap().kind(), Code::DigestMismatch, "{offset}");
            file.write_all_at(&byte, offset).unwrap();
        }
        File::options().write(true).open(&path).unwrap().set_len(63 << 20).unwrap();
        assert_eq!(Memory::load(&path, &kept).err().unwrap().kind(), Code::DigestMismatch);
    }
}

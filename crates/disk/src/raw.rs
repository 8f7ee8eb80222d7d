//! Raw disks: files whose bytes are the disk's, with holes where it is zero.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use kiln_model::block::{BlockSource, Content, Extent};
use kiln_model::error::{Code, Error, Result, ResultExt};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// A raw file as a source of blocks. Holes are known to be zero without
/// being read (`SEEK_DATA`, `SEEK_HOLE`).
#[derive(Debug)]
pub struct RawSource {
    path: PathBuf,
    file: File,
    size: u64,
}

impl RawSource {
    /// Opens the file at `path`, read-only.
    ///
    /// # Errors
    /// When it cannot be opened or is no regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).trying(|| format!("open {}", path.display()))?;
        Self::new(file, path)
    }

    /// Takes an open file; `path` is for messages.
    ///
    /// # Errors
    /// When it is no regular file.
    pub fn new(file: File, path: &Path) -> Result<Self> {
        let meta = file.metadata().trying(|| format!("read {}", path.display()))?;
        if !meta.is_file() {
            return Err(Error::new(Code::Usage, format!("{} is not a file", path.display())));
        }
        // The kernel may read further ahead; where it cannot, nothing is lost.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
        Ok(Self { path: path.to_owned(), file, size: meta.len() })
    }
}

impl BlockSource for RawSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&mut self) -> Result<Vec<Extent>> {
        let what = || format!("find the holes of {}", self.path.display());
        let mut extents = Vec::new();
        let mut at = 0;
        while at < self.size {
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data.min(self.size),
                // Nothing but a hole from here to the end.
                Err(Errno::NXIO) => self.size,
                // A file system that cannot tell: everything has to be read.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
                Err(error) => return Err(std::io::Error::from(error)).trying(what),
            };
            if data > at {
                extents.push(Extent { offset: at, length: data - at, content: Content::Zero });
            }
            if data == self.size {
                break;
            }
            let hole = match rustix::fs::seek(&self.file, SeekFrom::Hole(data)) {
                Ok(hole) if hole > data => hole.min(self.size),
                Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => self.size,
                Err(error) => return Err(std::io::Error::from(error)).trying(what),
            };
            extents.push(Extent { offset: data, length: hole - data, content: Content::Data });
            at = hole;
        }
        Ok(extents)
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buffer, offset).trying(|| format!("read {} at byte {offset}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_model::block::BLOCK;

    #[test]
    fn holes_are_known_and_the_rest_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 * BLOCK + 100).unwrap();
        file.as_file().write_all_at(b"in the middle", 3 * BLOCK).unwrap();
        let mut source = RawSource::open(file.path()).unwrap();
        let extents = source.extents().unwrap();
        let mut at = 0;
        for extent in &extents {
            assert_eq!(extent.offset, at);
            at += extent.length;
        }
        assert_eq!(at, source.size());
        assert_eq!(extents[0], Extent { offset: 0, length: 3 * BLOCK, content: Content::Zero });
        assert_eq!(extents.last().unwrap().content, Content::Zero);
        let mut text = [0; 13];
        source.read_at(3 * BLOCK, &mut text).unwrap();
        assert_eq!(&text, b"in the middle");
    }

    #[test]
    fn a_folder_is_refused_and_an_empty_file_has_no_extents() {
        let folder = tempfile::tempdir().unwrap();
        assert!(RawSource::open(folder.path()).is_err());
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(RawSource::open(file.path()).unwrap().extents().unwrap(), []);
    }
}

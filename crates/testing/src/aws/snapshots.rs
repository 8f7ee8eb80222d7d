//! Snapshots: which block holds what, and since when it may be used.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use kiln_model::Digest;

/// Bytes of a block.
pub(crate) const BLOCK: usize = 524_288;
/// Blocks of a GiB.
pub(crate) const PER_GIB: u64 = (1 << 30) / BLOCK as u64;

/// To compare with it is a `memcmp`, which is fast in a build without
/// optimisation too.
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Which block, by its number, holds what.
pub(crate) type Blocks = BTreeMap<u64, Digest>;

/// How far a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Blocks are written.
    Open,
    /// All are; it is completed a while after this.
    Sealed(Instant),
}

/// What `StartSnapshot` was asked, or what a copy was made of.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wish {
    /// GiB.
    pub(crate) size: u64,
    pub(crate) parent: Option<String>,
    pub(crate) description: String,
    pub(crate) encrypted: bool,
    pub(crate) kms_key: Option<String>,
    pub(crate) tags: Vec<(String, String)>,
}

/// One snapshot.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) id: String,
    pub(crate) region: String,
    pub(crate) wish: Wish,
    pub(crate) begun: SystemTime,
    pub(crate) stage: Stage,
    /// The first one of those that came of each other.
    pub(crate) lineage: String,
    /// What the parent holds.
    pub(crate) inherited: Blocks,
    /// What was written into this one.
    pub(crate) written: Blocks,
}

impl Snapshot {
    /// A new one, without blocks.
    pub(crate) fn new(id: &str, region: &str, wish: Wish) -> Self {
        Self {
            id: id.into(),
            region: region.into(),
            wish,
            begun: SystemTime::now(),
            stage: Stage::Open,
            lineage: id.into(),
            inherited: Blocks::new(),
            written: Blocks::new(),
        }
    }

    /// `pending` or `completed`; the latter only so long after the end.
    pub(crate) fn status(&self, settling: Duration) -> &'static str {
        match self.stage {
            Stage::Sealed(since) if since.elapsed() >= settling => "completed",
            _ => "pending",
        }
    }

    /// What it holds, its parent's blocks included.
    pub(crate) fn blocks(&self) -> Blocks {
        let mut all = self.inherited.clone();
        all.extend(self.written.iter().map(|(index, digest)| (*index, *digest)));
        all
    }

    /// How many blocks it has room for.
    pub(crate) fn room(&self) -> u64 {
        self.wish.size * PER_GIB
    }
}

/// The blocks' bytes: a file for each that is another, named by its digest.
#[derive(Debug, Clone)]
pub(crate) struct Shelf(PathBuf);

impl Shelf {
    /// Below a folder that is there.
    pub(crate) fn new(folder: &Path) -> Self {
        Self(folder.into())
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.0.join(digest.hex())
    }

    /// Keeps a block.
    pub(crate) fn put(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(digest);
        if path.exists() {
            return Ok(());
        }
        // Two may write the same block at once.
        let mut file = tempfile::NamedTempFile::new_in(&self.0)?;
        io::Write::write_all(&mut file, bytes)?;
        file.persist(path).map(drop).map_err(|error| error.error)
    }

    /// Gives it back.
    pub(crate) fn get(&self, digest: &Digest) -> io::Result<Vec<u8>> {
        std::fs::read(self.path(digest))
    }

    /// Takes a raw disk in; gives the blocks that are not zero.
    pub(crate) fn take(&self, disk: &Path) -> io::Result<Blocks> {
        let mut file = File::open(disk)?;
        let mut blocks = Blocks::new();
        for index in 0.. {
            let mut bytes = Vec::with_capacity(BLOCK);
            if (&mut file).take(BLOCK as u64).read_to_end(&mut bytes)? == 0 {
                break;
            }
            bytes.resize(BLOCK, 0);
            if bytes != ZEROS {
                let digest = Digest::of(&bytes);
                self.put(&digest, &bytes)?;
                blocks.insert(index, digest);
            }
        }
        Ok(blocks)
    }

    /// Writes a raw disk of so many bytes, with holes for what is zero.
    pub(crate) fn write(&self, blocks: &Blocks, size: u64, to: &Path) -> io::Result<()> {
        let file = File::create(to)?;
        file.set_len(size)?;
        for (index, digest) in blocks {
            let bytes = self.get(digest)?;
            if bytes != ZEROS {
                file.write_all_at(&bytes, index * BLOCK as u64)?;
            }
        }
        Ok(())
    }
}

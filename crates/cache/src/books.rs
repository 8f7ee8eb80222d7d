//! Who takes how much room: inodes, each counted once, by the blocks that it
//! takes (so that a hole takes none).

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

type Inode = (u64, u64);

/// The names that one folder has for inodes.
#[derive(Debug, Default)]
pub(crate) struct Links(Vec<Link>);

#[derive(Debug)]
struct Link {
    inode: Inode,
    bytes: u64,
    /// Names that the inode has anywhere.
    names: u64,
}

impl Links {
    /// The names in `folder`. One that vanishes meanwhile is left out.
    pub(crate) fn of(folder: &Path) -> io::Result<Self> {
        let mut links = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            match entry?.metadata() {
                Ok(meta) if meta.is_dir() => {}
                Ok(meta) => links.push(Link { inode: (meta.dev(), meta.ino()), bytes: meta.blocks() * 512, names: meta.nlink() }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self(links))
    }
}

#[derive(Debug)]
struct Taken {
    bytes: u64,
    /// Names anywhere that are left.
    names: u64,
    /// Those of them in the books.
    known: u64,
}

/// The inodes of many folders.
#[derive(Debug, Default)]
pub(crate) struct Books {
    inodes: HashMap<Inode, Taken>,
    used: u64,
    freed: u64,
}

impl Books {
    /// Enters a folder.
    pub(crate) fn add(&mut self, links: &Links) {
        for link in &links.0 {
            let taken = self.inodes.entry(link.inode).or_insert_with(|| {
                self.used += link.bytes;
                Taken { bytes: link.bytes, names: link.names, known: 0 }
            });
            taken.known += 1;
            // Names may have come while the folders were read.
            taken.names = taken.names.max(link.names).max(taken.known);
        }
    }

    /// Strikes out a folder, as if it had been removed.
    pub(crate) fn remove(&mut self, links: &Links) {
        for link in &links.0 {
            let Some(taken) = self.inodes.get_mut(&link.inode) else { continue };
            taken.known -= 1;
            taken.names -= 1;
            let (bytes, last_known, last) = (taken.bytes, taken.known == 0, taken.names == 0);
            if last_known {
                self.inodes.remove(&link.inode);
                self.used -= bytes;
            }
            if last {
                self.freed += bytes;
            }
        }
    }

    /// Bytes that the folders in the books take.
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    /// Bytes that nothing takes any more since folders were struck out.
    pub(crate) fn freed(&self) -> u64 {
        self.freed
    }

    /// Bytes that `links` lead to.
    pub(crate) fn bytes_of(&self, links: &Links) -> u64 {
        self.sum(links, |_, _| true)
    }

    /// Bytes that only `links` lead to: what the folder's going frees.
    pub(crate) fn bytes_only_of(&self, links: &Links) -> u64 {
        self.sum(links, |taken, own| taken.names == own)
    }

    fn sum(&self, links: &Links, counts: impl Fn(&Taken, u64) -> bool) -> u64 {
        let mut own: HashMap<Inode, u64> = HashMap::new();
        for link in &links.0 {
            *own.entry(link.inode).or_default() += 1;
        }
        let taken = own.iter().filter_map(|(inode, own)| self.inodes.get(inode).filter(|taken| counts(taken, *own)));
        taken.map(|taken| taken.bytes).sum()
    }
}

/// How much a checkpoint is worth keeping: the seconds that it saves for each
/// byte that its going frees, the less the longer nobody has used it.
pub(crate) fn value(worth: Duration, bytes: u64, idle: Duration) -> f64 {
    const DAY: f64 = 24.0 * 3600.0;
    // One that frees nothing still goes before one that is worth more.
    worth.as_secs_f64() / bytes.max(4096) as f64 / (1.0 + idle.as_secs_f64() / DAY)
}

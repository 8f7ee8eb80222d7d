//! Packs: zstd frames of one block each, one after the other, at most
//! [`PACK_LIMIT`] bytes. Writing them, finding them, and moving the live
//! frames of packs that are mostly dead.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::PackRef;
use sha2::{Digest as _, Sha256};

use crate::blocks::Decoder;

/// Largest size of a pack in bytes.
pub const PACK_LIMIT: u64 = 64 * 1024 * 1024;

/// Most packs that a disk lists: with its map that makes 256 layers, below
/// what every known registry takes (ECR about 500).
pub const MAX_PACKS: usize = 255;

/// Largest frame of one block in bytes: zstd's bound for 512 KiB, rounded up.
/// Whatever claims to be longer is no frame of a block.
pub const FRAME_LIMIT: u32 = 528 * 1024;

/// Where packs are read from.
pub trait Packs: Send + Sync {
    /// Opens a pack for reading at any place.
    ///
    /// # Errors
    /// When it is not there or cannot be opened.
    fn open(&self, pack: &PackRef) -> Result<File>;

    /// Whether it is there with the size it should have.
    fn has(&self, pack: &PackRef) -> bool;
}

/// Where new packs go. One pack is open at a time.
pub trait PackSink: Send {
    /// An empty file for the next pack.
    ///
    /// # Errors
    /// When it cannot be made.
    fn create(&mut self) -> Result<File>;

    /// Takes the file of a pack that is whole. What it does with it may go on
    /// beside the next pack.
    ///
    /// # Errors
    /// When the pack, or one before it, cannot be kept.
    fn finish(&mut self, file: File, pack: PackRef) -> Result<()>;
}

/// Where a frame is: number of the pack in this process, and the place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Location {
    pub(crate) pack: u32,
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

struct Open {
    file: File,
    hasher: Sha256,
    size: u64,
}

/// Writes frames to packs, hashing as it goes.
pub(crate) struct PackWriter<'a> {
    sink: &'a mut dyn PackSink,
    open: Option<Open>,
    /// Number of the first new pack.
    first: u32,
    done: Vec<PackRef>,
}

impl<'a> PackWriter<'a> {
    pub(crate) fn new(sink: &'a mut dyn PackSink, first: u32) -> Self {
        Self { sink, open: None, first, done: Vec::new() }
    }

    /// Packs so far, the open one included.
    pub(crate) fn count(&self) -> usize {
        self.done.len() + usize::from(self.open.is_some())
    }

    /// Bytes so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.done.iter().map(|pack| pack.size).sum::<u64>() + self.open.as_ref().map_or(0, |open| open.size)
    }

    pub(crate) fn append(&mut self, frame: &[u8]) -> Result<Location> {
        let length = frame.len() as u64;
        if self.open.as_ref().is_some_and(|open| open.size + length > PACK_LIMIT) {
            self.close()?;
        }
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(Open { file: self.sink.create()?, hasher: Sha256::new(), size: 0 }),
        };
        open.file.write_all(frame).trying(|| "write a pack".into())?;
        open.hasher.update(frame);
        let too_large = |_| Error::new(Code::Failed, "the disk needs more packs than a map can list");
        let pack = self.first + u32::try_from(self.done.len()).map_err(too_large)?;
        let offset = u32::try_from(open.size).map_err(too_large)?;
        open.size += length;
        Ok(Location { pack, offset, length: u32::try_from(length).map_err(too_large)? })
    }

    fn close(&mut self) -> Result<()> {
        if let Some(Open { file, hasher, size }) = self.open.take() {
            let pack = PackRef { digest: Digest::finish(hasher), size };
            self.sink.finish(file, pack)?;
            self.done.push(pack);
        }
        Ok(())
    }

    /// Ends the last pack; gives the new packs in order.
    pub(crate) fn finish(mut self) -> Result<Vec<PackRef>> {
        self.close()?;
        Ok(self.done)
    }
}

/// How much of an older pack a disk still uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Usage {
    pack: u32,
    size: u64,
    live: u64,
}

/// Which older packs to give up, so that at most half of what is listed is
/// dead and no more than `limit` packs are listed. Rewrites as little as it
/// can: those with the least that lives, relative to their size, go first;
/// where only their number is at fault, those with the least that lives.
fn victims(mut used: Vec<Usage>, fresh: usize, fresh_bytes: u64, limit: usize) -> HashSet<u32> {
    let mut gone = HashSet::new();
    let mut listed = fresh_bytes + used.iter().map(|u| u.size).sum::<u64>();
    let mut dead: u64 = used.iter().map(|u| u.size.saturating_sub(u.live)).sum();
    // Ratios as integers, since sorting has to be exact to be repeatable.
    used.sort_by_key(|u| (u.live.saturating_mul(1 << 20) / u.size.max(1), u.live, u.pack));
    while dead * 2 > listed && !used.is_empty() {
        let worst = used.remove(0);
        let freed = worst.size.saturating_sub(worst.live);
        (dead, listed) = (dead - freed, listed - freed);
        gone.insert(worst.pack);
    }
    let mut moved: u64 = 0;
    let count = |left: usize, moved: u64| left + fresh + usize::try_from(moved.div_ceil(PACK_LIMIT)).unwrap_or(usize::MAX);
    if count(used.len(), 0) > limit {
        used.sort_by_key(|u| (u.live, u.pack));
        // Some room, so that the next image need not do the same.
        while count(used.len(), moved) > limit - limit / 8 && !used.is_empty() {
            let least = used.remove(0);
            moved += least.live;
            gone.insert(least.pack);
        }
    }
    gone
}

/// Moves frames out of packs that are mostly dead into `writer`'s. `blocks`
/// are the disk's, in order; `packs` the older packs by number.
///
/// Every frame that moves is checked first: damage must not be sealed into a
/// new pack whose digest is right.
pub(crate) fn repack(
    blocks: &mut [(Digest, Option<Location>)],
    packs: &[PackRef],
    source: &dyn Packs,
    writer: &mut PackWriter<'_>,
    limit: usize,
) -> Result<()> {
    let mut used: HashMap<u32, Usage> = HashMap::new();
    let mut counted = HashSet::new();
    for location in blocks.iter().filter_map(|(_, location)| *location) {
        if let Some(pack) = packs.get(location.pack as usize)
            && counted.insert(location)
        {
            used.entry(location.pack).or_insert(Usage { pack: location.pack, size: pack.size, live: 0 }).live += u64::from(location.length);
        }
    }
    let gone = victims(used.into_values().collect(), writer.count(), writer.bytes(), limit);
    if gone.is_empty() {
        return Ok(());
    }
    let mut files: HashMap<u32, File> = HashMap::new();
    let mut moved: HashMap<Location, Location> = HashMap::new();
    let mut decoder = Decoder::new()?;
    let mut frame = Vec::new();
    for (digest, location) in blocks.iter_mut() {
        let Some(old) = location.filter(|old| gone.contains(&old.pack)) else { continue };
        if let Some(new) = moved.get(&old) {
            *location = Some(*new);
            continue;
        }
        let Some(pack) = packs.get(old.pack as usize) else { continue };
        let file = match files.entry(old.pack) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(source.open(pack)?),
        };
        frame.resize(old.length as usize, 0);
        file.read_exact_at(&mut frame, u64::from(old.offset)).trying(|| format!("read pack {}", pack.digest))?;
        decoder.decode(&frame, digest, &pack.digest)?;
        let new = writer.append(&frame)?;
        moved.insert(old, new);
        *location = Some(new);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(pack: u32, size: u64, live: u64) -> Usage {
        Usage { pack, size, live }
    }

    #[test]
    fn half_dead_is_fine_and_more_is_not() {
        assert!(victims(vec![usage(0, 100, 50)], 0, 0, 255).is_empty());
        assert!(victims(vec![usage(0, 100, 10)], 2, 90, 255).is_empty());
        assert_eq!(victims(vec![usage(0, 100, 49)], 0, 0, 255), HashSet::from([0]));
        // The worst one alone is enough.
        assert_eq!(victims(vec![usage(0, 100, 90), usage(1, 200, 10)], 0, 0, 255), HashSet::from([1]));
    }

    #[test]
    fn too_many_packs_are_merged_smallest_first() {
        let used: Vec<_> = (0..20).map(|n| usage(n, 1000 - u64::from(n), 1000 - u64::from(n))).collect();
        let gone = victims(used, 1, 10, 16);
        assert!(gone.contains(&19) && !gone.contains(&0), "{gone:?}");
        assert!(20 - gone.len() + 2 <= 16);
    }
}

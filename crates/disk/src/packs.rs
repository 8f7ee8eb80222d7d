//! Packs: zstd frames of one block each, one after the other, at most
//! [`PACK_LIMIT`] bytes. Writing them, finding them, and moving the live
//! frames of packs that are mostly dead.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::PackRef;
use sha2::{Digest as _, Sha256};

use crate::blocks::Decoder;
use crate::lanes::{self, LANES};

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

/// Where new packs go. One pack is written at a time; those before it may still
/// be on their way to their place.
pub trait PackSink: Send {
    /// An empty place for the next pack.
    ///
    /// # Errors
    /// When it cannot be made.
    fn create(&mut self) -> Result<Box<dyn NewPack>>;
}

/// A pack on its way into a [`PackSink`]. One that is dropped before it was
/// kept leaves nothing behind.
pub trait NewPack: Send {
    /// Its file, to be written and read.
    fn file(&self) -> &File;

    /// Makes it last. Called once it is whole, on a thread of its own, since it
    /// takes as long as writing it.
    ///
    /// # Errors
    /// When the disk is full or broken.
    fn sync(&mut self) -> Result<()>;

    /// Puts it in its place. Packs are kept in no particular order, and only
    /// when all that was written is synced.
    ///
    /// # Errors
    /// When it cannot be put there.
    fn keep(self: Box<Self>, pack: &PackRef) -> Result<()>;
}

/// Where a frame is: number of the pack in this process, and the place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Location {
    pub(crate) pack: u32,
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

/// As long as at least so many bytes of the disk are still to come, packs are
/// digested several at once; below that, what comes fills about one pack, and
/// that one is digested while it is written.
const MANY_LEFT: u64 = 4 * PACK_LIMIT;

/// A pack that is being written.
struct Open {
    pack: Box<dyn NewPack>,
    /// `None` when it is digested later, with others.
    hasher: Option<Sha256>,
    size: u64,
}

/// What the keeper is told.
enum Step {
    /// A pack is written.
    Whole { number: usize, pack: Box<dyn NewPack>, size: u64 },
    /// What its digest is.
    Digest { number: usize, digest: Result<Digest> },
}

/// Writes frames to packs. Packs that are whole go on beside the next one:
///
/// ```text
///  writer ──► keeper   syncs each pack; puts it in its place when it
///     │          ▲     has its digest too
///     │          │ digests
///     └──► digester    reads up to eight packs again, side by side
/// ```
///
/// SHA-256 takes a third of the time that compression takes, unless several
/// packs are digested at once (see [`lanes`]). Packs have to be read again for
/// that, which comes from the page cache. The last ones are digested while
/// they are written, since there nothing is left that it could go on beside.
pub(crate) struct PackWriter<'a, 'scope> {
    sink: &'a mut dyn PackSink,
    /// Largest size of a pack in bytes.
    limit: u64,
    open: Option<Open>,
    /// Number of the first new pack.
    first: u32,
    /// Packs and bytes that are whole.
    whole: usize,
    bytes: u64,
    steps: Option<SyncSender<Step>>,
    /// Until the end is near.
    digester: Option<Sender<(usize, File)>>,
    keeper: Option<ScopedJoinHandle<'scope, Result<Vec<PackRef>>>>,
}

impl<'a, 'scope> PackWriter<'a, 'scope> {
    /// Starts the threads. `many` says whether digesting several packs at once
    /// pays.
    pub(crate) fn new(scope: &'scope Scope<'scope, '_>, sink: &'a mut dyn PackSink, first: u32, many: bool) -> Self {
        // One being synced, one waiting, one being written.
        let (steps, taken) = sync_channel(1);
        let keeper = scope.spawn(move || keep(&taken));
        let digester = many.then(|| {
            let (files, whole) = channel();
            let steps = steps.clone();
            scope.spawn(move || digest(&whole, &steps));
            files
        });
        Self { sink, limit: PACK_LIMIT, open: None, first, whole: 0, bytes: 0, steps: Some(steps), digester, keeper: Some(keeper) }
    }

    /// Packs so far, the open one included.
    pub(crate) fn count(&self) -> usize {
        self.whole + usize::from(self.open.is_some())
    }

    /// Bytes so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes + self.open.as_ref().map_or(0, |open| open.size)
    }

    /// Adds a frame. At most `left` bytes of the disk are still to come after
    /// it.
    pub(crate) fn append(&mut self, frame: &[u8], left: u64) -> Result<Location> {
        let length = frame.len() as u64;
        if self.open.as_ref().is_some_and(|open| open.size + length > self.limit) {
            self.close()?;
        }
        let open = match &mut self.open {
            Some(open) => open,
            none => {
                if left < MANY_LEFT {
                    // The digester does what it has, and ends.
                    self.digester = None;
                }
                let hasher = self.digester.is_none().then(Sha256::new);
                none.insert(Open { pack: self.sink.create()?, hasher, size: 0 })
            }
        };
        open.pack.file().write_all(frame).trying(|| "write a pack".into())?;
        if let Some(hasher) = &mut open.hasher {
            hasher.update(frame);
        }
        let too_large = |_| Error::new(Code::Failed, "the disk needs more packs than a map can list");
        let pack = self.first + u32::try_from(self.whole).map_err(too_large)?;
        let offset = u32::try_from(open.size).map_err(too_large)?;
        open.size += length;
        Ok(Location { pack, offset, length: u32::try_from(length).map_err(too_large)? })
    }

    fn close(&mut self) -> Result<()> {
        let Some(Open { pack, hasher, size }) = self.open.take() else { return Ok(()) };
        let number = self.whole;
        (self.whole, self.bytes) = (self.whole + 1, self.bytes + size);
        let known = match (hasher, &self.digester) {
            (Some(hasher), _) => Some(Digest::finish(hasher)),
            (None, Some(digester)) => {
                let file = pack.file().try_clone().trying(|| "read a pack".into())?;
                // Nobody there: the keeper knows why.
                drop(digester.send((number, file)));
                None
            }
            (None, None) => return Err(broken()),
        };
        self.tell(Step::Whole { number, pack, size })?;
        known.map_or(Ok(()), |digest| self.tell(Step::Digest { number, digest: Ok(digest) }))
    }

    fn tell(&mut self, step: Step) -> Result<()> {
        match self.steps.as_ref().map(|steps| steps.send(step)) {
            Some(Ok(())) => Ok(()),
            // It has given up, and says why.
            _ => Err(self.kept().err().unwrap_or_else(broken)),
        }
    }

    /// Waits until every pack is in its place.
    fn kept(&mut self) -> Result<Vec<PackRef>> {
        (self.steps, self.digester) = (None, None);
        self.keeper.take().and_then(|keeper| keeper.join().ok()).unwrap_or_else(|| Err(broken()))
    }

    /// Ends the last pack; gives the new packs in order.
    pub(crate) fn finish(mut self) -> Result<Vec<PackRef>> {
        self.close()?;
        let packs = self.kept()?;
        if packs.len() == self.whole { Ok(packs) } else { Err(broken()) }
    }
}

fn broken() -> Error {
    Error::new(Code::Failed, "the packs were not written").next("this is a mistake in kiln: please report it")
}

/// The digester: up to [`LANES`] packs at once, and what is left at the end.
fn digest(whole: &Receiver<(usize, File)>, steps: &SyncSender<Step>) {
    loop {
        let packs: Vec<(usize, File)> = whole.iter().take(LANES).collect();
        let files: Vec<&File> = packs.iter().map(|(_, file)| file).collect();
        for ((number, _), digest) in packs.iter().zip(lanes::digests_of_files(&files)) {
            let digest = digest.map(|(digest, _)| digest).trying(|| "read a pack that was just written".into());
            if steps.send(Step::Digest { number: *number, digest }).is_err() {
                return;
            }
        }
        if packs.len() < LANES {
            return;
        }
    }
}

/// The keeper: syncs packs, and puts those in their place that have a digest.
fn keep(steps: &Receiver<Step>) -> Result<Vec<PackRef>> {
    let mut synced: BTreeMap<usize, (Box<dyn NewPack>, u64)> = BTreeMap::new();
    let mut digests: BTreeMap<usize, Digest> = BTreeMap::new();
    let mut kept: BTreeMap<usize, PackRef> = BTreeMap::new();
    for step in steps {
        let number = match step {
            Step::Whole { number, mut pack, size } => {
                pack.sync()?;
                synced.insert(number, (pack, size));
                number
            }
            Step::Digest { number, digest } => {
                digests.insert(number, digest?);
                number
            }
        };
        if let Some(digest) = digests.get(&number)
            && let Some((pack, size)) = synced.remove(&number)
        {
            let whole = PackRef { digest: *digest, size };
            pack.keep(&whole)?;
            kept.insert(number, whole);
        }
    }
    Ok(kept.into_values().collect())
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
    writer: &mut PackWriter<'_, '_>,
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
        // What is left is not known: not much, as a rule.
        let new = writer.append(&frame, 0)?;
        moved.insert(old, new);
        *location = Some(new);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

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

    /// Packs in memory's stead: what was kept, in the order of keeping.
    #[derive(Clone, Default)]
    struct Sink {
        kept: Arc<Mutex<Vec<PackRef>>>,
        made: usize,
        /// Which one cannot be synced.
        broken: Option<usize>,
    }

    struct Pack(Sink, File, bool);

    impl PackSink for Sink {
        fn create(&mut self) -> Result<Box<dyn NewPack>> {
            self.made += 1;
            Ok(Box::new(Pack(self.clone(), tempfile::tempfile().unwrap(), false)))
        }
    }

    impl NewPack for Pack {
        fn file(&self) -> &File {
            &self.1
        }
        fn sync(&mut self) -> Result<()> {
            self.2 = true;
            if self.0.broken == Some(self.0.made) { Err(Error::new(Code::DiskFull, "no room")) } else { Ok(()) }
        }
        fn keep(self: Box<Self>, pack: &PackRef) -> Result<()> {
            assert!(self.2, "kept before it was synced");
            assert_eq!(lanes::digests_of_files(&[&self.1])[0].as_ref().unwrap(), &(pack.digest, pack.size));
            self.0.kept.lock().unwrap().push(*pack);
            Ok(())
        }
    }

    /// Writes `frames` frames of 1,000 bytes to packs of three, the first
    /// `early` of them long before the end.
    fn written(sink: &mut Sink, frames: u16, early: u16, many: bool) -> Result<Vec<PackRef>> {
        std::thread::scope(|scope| {
            let mut writer = PackWriter::new(scope, sink, 7, many);
            writer.limit = 3500;
            for n in 0..frames {
                let left = if n < early { MANY_LEFT } else { MANY_LEFT - 1 };
                let location = writer.append(&n.to_le_bytes().repeat(500), left)?;
                assert_eq!(location, Location { pack: 7 + u32::from(n) / 3, offset: u32::from(n) % 3 * 1000, length: 1000 });
                assert_eq!((writer.count(), writer.bytes()), (usize::from(n) / 3 + 1, u64::from(n + 1) * 1000));
            }
            writer.finish()
        })
    }

    #[test]
    fn packs_are_the_same_whenever_they_are_digested() {
        for frames in [0, 1, 3, 4, 26, 100] {
            let expected = written(&mut Sink::default(), frames, 0, false).unwrap();
            assert_eq!(expected.len(), usize::from(frames).div_ceil(3));
            for early in [0, 1, 10, 24, 25, 100] {
                let mut sink = Sink::default();
                assert_eq!(written(&mut sink, frames, early, true).unwrap(), expected, "{frames} {early}");
                let mut kept = std::mem::take(&mut *sink.kept.lock().unwrap());
                kept.sort_by_key(|pack| expected.iter().position(|other| other == pack));
                assert_eq!(kept, expected);
            }
        }
    }

    #[test]
    fn a_pack_that_cannot_be_synced_ends_it_with_the_reason() {
        for (broken, early) in [(1, 0), (1, 100), (20, 100), (33, 20), (34, 100)] {
            let mut sink = Sink { broken: Some(broken), ..Sink::default() };
            assert_eq!(written(&mut sink, 100, early, true).unwrap_err().kind(), Code::DiskFull, "{broken} {early}");
        }
    }
}

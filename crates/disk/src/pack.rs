//! Taking a disk apart: read, detect zeros, digest, compress, pack.
//!
//! ```text
//!  reader ──► workers (all cores) ──► writer
//!  in order   zero? SHA-256, zstd     back in order: frames to packs, SHA-256
//!     ▲                                  │
//!     └───────── empty buffers ◄─────────┘
//! ```
//!
//! A fixed number of buffers goes round, which bounds memory whatever the
//! disk's size. Frames are written in the order of blocks, so the packs depend
//! on the disk and its parents alone, not on timing.

use std::collections::{BTreeMap, HashMap};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use kiln_model::Digest;
use kiln_model::block::{BLOCK, BlockSource, Content, classify};
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::{Block, BlockMap, PackRef, Place, zero_block};

use crate::blocks::{BLOCK_LEN, is_zero, workers};
use crate::packs::{FRAME_LIMIT, Location, MAX_PACKS, PackSink, PackWriter, Packs, repack};

/// zstd's level. Part of the format only so far as equal disks should give
/// equal packs; identity never rests on compressed bytes.
const LEVEL: i32 = 3;

/// Largest virtual size of a disk in bytes: 2 TiB, so that a map, held whole
/// in memory, stays below 200 MB.
pub const SIZE_LIMIT: u64 = 2 << 40;

/// A disk that was taken apart.
#[derive(Debug, Clone)]
pub struct Packed {
    /// Its map. Packs are listed in the order in which blocks first need them.
    pub map: BlockMap,
    /// The packs that were written.
    pub new: Vec<PackRef>,
}

/// What to do with a disk's blocks beside reading them.
pub struct Parents<'a> {
    /// The map of the disk below the source, for [`Content::Backing`].
    pub backing: Option<&'a BlockMap>,
    /// Disks whose blocks need not be stored again, the preferred one first.
    pub maps: &'a [&'a BlockMap],
    /// Where their packs are. What is not there any more is stored again.
    pub packs: &'a dyn Packs,
}

/// One block on its way, with buffers that are used again and again.
struct Job {
    index: usize,
    raw: Vec<u8>,
    frame: Vec<u8>,
    outcome: Outcome,
}

/// What a worker found out.
#[derive(Clone, Copy)]
enum Outcome {
    /// Nothing yet.
    Read,
    Zero,
    /// Held by a parent.
    Known(Digest, Location),
    /// The same as an earlier block of this disk.
    Repeated(Digest),
    /// Compressed in `frame`.
    Frame(Digest),
}

type Placed = (Digest, Option<Location>);

/// What the parents hold.
struct Known {
    /// Their packs, each once.
    packs: Vec<PackRef>,
    places: HashMap<Digest, Location>,
}

impl Known {
    fn of(parents: &Parents<'_>) -> Result<Self> {
        let mut known = Self { packs: Vec::new(), places: HashMap::new() };
        let mut numbers: HashMap<(Digest, u64), Option<u32>> = HashMap::new();
        for map in parents.backing.iter().chain(parents.maps) {
            let mut mine = Vec::with_capacity(map.packs.len());
            for pack in &map.packs {
                let number = match numbers.get(&(pack.digest, pack.size)) {
                    Some(number) => *number,
                    None => {
                        let number = parents.packs.has(pack).then(|| u32::try_from(known.packs.len()).ok()).flatten();
                        numbers.insert((pack.digest, pack.size), number);
                        if number.is_some() {
                            known.packs.push(*pack);
                        }
                        number
                    }
                };
                mine.push(number);
            }
            for block in &map.blocks {
                if let Place::Pack { pack, offset, length } = block.place
                    && let Some(Some(pack)) = mine.get(pack as usize)
                {
                    known.places.entry(block.digest).or_insert(Location { pack: *pack, offset, length });
                }
            }
        }
        Ok(known)
    }

    /// A block of the backing disk, without reading it: when it lies whole
    /// inside that disk and is still stored.
    fn backing(&self, backing: Option<&BlockMap>, index: usize, size: u64) -> Option<Placed> {
        let map = backing?;
        let end = (index as u64 + 1) * BLOCK;
        let block = map.blocks.get(index).filter(|_| end <= map.size || size == map.size)?;
        match block.place {
            Place::Zero => Some((zero_block(), None)),
            Place::Pack { .. } => Some((block.digest, Some(*self.places.get(&block.digest)?))),
        }
    }
}

/// Reads `source` and writes what `parents` do not hold to packs in `sink`.
///
/// `progress` is called with bytes read and bytes to read: what is known
/// without reading counts in neither.
///
/// # Errors
/// When the disk cannot be read or the packs cannot be written.
pub fn pack(
    source: &mut dyn BlockSource,
    parents: &Parents<'_>,
    sink: &mut dyn PackSink,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Packed> {
    let size = source.size();
    if size > SIZE_LIMIT {
        return Err(Error::new(Code::Usage, format!("a disk of {size} bytes is larger than kiln can store (2 TiB)")));
    }
    let contents = classify(size, &source.extents()?);
    let known = Known::of(parents)?;
    let mut blocks: Vec<Placed> = vec![(zero_block(), None); contents.len()];
    let mut to_read = Vec::new();
    for (index, content) in contents.into_iter().enumerate() {
        match content {
            Content::Zero => {}
            Content::Backing => match known.backing(parents.backing, index, size) {
                Some(placed) => blocks[index] = placed,
                None => to_read.push(index),
            },
            Content::Data => to_read.push(index),
        }
    }
    let first = u32::try_from(known.packs.len()).unwrap_or(u32::MAX);
    let mut writer = PackWriter::new(sink, first);
    read_all(source, &to_read, &known, &mut writer, &mut blocks, progress)?;
    repack(&mut blocks, &known.packs, parents.packs, &mut writer, MAX_PACKS)?;
    let new = writer.finish()?;
    let all: Vec<PackRef> = known.packs.iter().chain(&new).copied().collect();
    Ok(Packed { map: map_of(size, &blocks, &all), new })
}

/// The map, with packs in the order of first use.
fn map_of(size: u64, blocks: &[Placed], all: &[PackRef]) -> BlockMap {
    let mut map = BlockMap { size, packs: Vec::new(), blocks: Vec::with_capacity(blocks.len()) };
    let mut numbers: HashMap<u32, u32> = HashMap::new();
    for (digest, location) in blocks {
        let place = match location {
            None => Place::Zero,
            Some(Location { pack, offset, length }) => {
                let number = *numbers.entry(*pack).or_insert_with(|| {
                    map.packs.extend(all.get(*pack as usize));
                    u32::try_from(map.packs.len()).unwrap_or(u32::MAX) - 1
                });
                Place::Pack { pack: number, offset: *offset, length: *length }
            }
        };
        map.blocks.push(Block { digest: *digest, place });
    }
    map
}

/// The pipeline: this thread reads, workers compress, one more thread writes.
fn read_all(
    source: &mut dyn BlockSource,
    to_read: &[usize],
    known: &Known,
    writer: &mut PackWriter<'_>,
    blocks: &mut [Placed],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let total = to_read.len() as u64 * BLOCK;
    progress(0, total);
    if to_read.is_empty() {
        return Ok(());
    }
    let size = source.size();
    let threads = workers(to_read.len());
    let (empty, empties) = channel();
    for _ in 0..(threads * 2 + 2).min(to_read.len()) {
        let (raw, frame) = (vec![0; BLOCK_LEN], Vec::with_capacity(FRAME_LIMIT as usize));
        drop(empty.send(Job { index: 0, raw, frame, outcome: Outcome::Read }));
    }
    let (full, fulls) = channel();
    let (result, results) = channel();
    let fulls = Mutex::new(fulls);
    let seen = Mutex::new(HashMap::new());
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || write(to_read, &results, &empty, writer, blocks));
        for _ in 0..threads {
            let (fulls, seen, result) = (&fulls, &seen, result.clone());
            scope.spawn(move || work(known, seen, fulls, &result));
        }
        drop(result);
        let mut reading = Ok(());
        for (done, index) in to_read.iter().enumerate() {
            // No more buffers ever: the writer has given up, and says why.
            let Ok(mut job) = empties.recv() else { break };
            let at = *index as u64 * BLOCK;
            let length = usize::try_from(size - at).unwrap_or(usize::MAX).min(BLOCK_LEN);
            reading = source.read_at(at, &mut job.raw[..length]);
            if reading.is_err() {
                break;
            }
            job.raw[length..].fill(0);
            (job.index, job.outcome) = (*index, Outcome::Read);
            drop(full.send(job));
            progress((done as u64 + 1) * BLOCK, total);
        }
        drop(full);
        let written = writing.join().unwrap_or_else(|_| Err(broken()));
        // A read that failed is the cause of a writer that got too little.
        reading.and(written)
    })
}

fn broken() -> Error {
    Error::new(Code::Failed, "the disk was not read to its end").next("this is a mistake in kiln: please report it")
}

/// A worker: turns full buffers into outcomes until there are no more.
fn work(known: &Known, seen: &Mutex<HashMap<Digest, usize>>, fulls: &Mutex<Receiver<Job>>, result: &Sender<Result<Job>>) {
    let mut context = zstd::bulk::Compressor::new(LEVEL).trying(|| "set up zstd".into());
    loop {
        let next = fulls.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut job) = next else { return };
        let done = match &mut context {
            Ok(context) => look(context, known, seen, &mut job).map(|()| job),
            Err(_) => Err(broken()),
        };
        let failed = done.is_err();
        if result.send(done).is_err() || failed {
            return;
        }
    }
}

/// Digests one block, and compresses it if nobody holds it yet.
fn look(context: &mut zstd::bulk::Compressor<'static>, known: &Known, seen: &Mutex<HashMap<Digest, usize>>, job: &mut Job) -> Result<()> {
    if is_zero(&job.raw) {
        job.outcome = Outcome::Zero;
        return Ok(());
    }
    let digest = Digest::of(&job.raw);
    if let Some(location) = known.places.get(&digest) {
        job.outcome = Outcome::Known(digest, *location);
        return Ok(());
    }
    // Of two equal blocks the earlier one is stored. A worker may only leave a
    // block out when an *earlier* one is on its way; when a later one came
    // first, both are compressed and the writer drops the later.
    {
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        let first = seen.entry(digest).or_insert(job.index);
        if *first < job.index {
            job.outcome = Outcome::Repeated(digest);
            return Ok(());
        }
        *first = job.index;
    }
    job.frame.clear();
    context.compress_to_buffer(&job.raw, &mut job.frame).trying(|| "compress a block".into())?;
    job.outcome = Outcome::Frame(digest);
    Ok(())
}

/// The writer: puts outcomes back in order, and frames into packs.
fn write(
    to_read: &[usize],
    results: &Receiver<Result<Job>>,
    empty: &Sender<Job>,
    writer: &mut PackWriter<'_>,
    blocks: &mut [Placed],
) -> Result<()> {
    let mut early: BTreeMap<usize, Job> = BTreeMap::new();
    let mut fresh: HashMap<Digest, Location> = HashMap::new();
    for index in to_read {
        let job = loop {
            if let Some(job) = early.remove(index) {
                break job;
            }
            let job = results.recv().map_err(|_| broken())??;
            early.insert(job.index, job);
        };
        let placed = match job.outcome {
            Outcome::Read => return Err(broken()),
            Outcome::Zero => (zero_block(), None),
            Outcome::Known(digest, location) => (digest, Some(location)),
            Outcome::Repeated(digest) => (digest, Some(*fresh.get(&digest).ok_or_else(broken)?)),
            Outcome::Frame(digest) => {
                let location = match fresh.get(&digest) {
                    Some(location) => *location,
                    None => writer.append(&job.frame)?,
                };
                fresh.insert(digest, location);
                (digest, Some(location))
            }
        };
        if let Some(block) = blocks.get_mut(*index) {
            *block = placed;
        }
        drop(empty.send(job));
    }
    Ok(())
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;

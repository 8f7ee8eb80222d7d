//! Taking a disk apart: read, detect zeros, digest, compress, pack.
//!
//! ```text
//!  reader ──────► workers (all cores) ───────────► writer
//!  in order        SHA-256 of eight at once         back in order:
//!  zero? ──► ∅     known? ──────────────────────►   frames to packs
//!     ▲            zstd, each by itself ────────►      │
//!     └──────────────── empty buffers ◄────────────────┘
//! ```
//!
//! A fixed number of buffers goes round, which bounds memory whatever the
//! disk's size. A worker compresses before it digests: so no more is digested
//! ahead than keeps the others busy. Frames are written in the order of
//! blocks, so the packs depend on the disk and its parents alone, not on
//! timing.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use kiln_model::Digest;
use kiln_model::block::{BLOCK, BlockSource, Content, classify};
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::{Block, BlockMap, PackRef, Place, zero_block};

use crate::blocks::{BLOCK_LEN, is_zero, workers};
use crate::lanes;
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
    /// How many that are not zero were read before it.
    number: usize,
    index: usize,
    /// How many are still to be read after it.
    left: usize,
    raw: Vec<u8>,
    frame: Vec<u8>,
    outcome: Outcome,
}

/// What a worker found out.
#[derive(Clone, Copy)]
enum Outcome {
    /// Nothing yet.
    Read,
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
    let new = std::thread::scope(|scope| {
        let mut writer = PackWriter::new(scope, sink, first, lanes::at_once() > 1);
        read_all(source, &to_read, &known, &mut writer, &mut blocks, progress)?;
        repack(&mut blocks, &known.packs, parents.packs, &mut writer, MAX_PACKS)?;
        writer.finish()
    })?;
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

/// What waits for a worker.
struct Waiting {
    /// Blocks that were read, in order.
    read: VecDeque<Job>,
    /// Blocks that were digested and that nobody holds.
    digested: VecDeque<Job>,
    /// Nothing more will be read.
    ended: bool,
}

/// Work for one worker.
enum Work {
    Digest(Vec<Job>),
    Compress(Job),
}

/// Where workers get their work.
struct Queue {
    waiting: Mutex<Waiting>,
    more: Condvar,
    /// How many blocks are digested at once.
    at_once: usize,
    threads: usize,
}

impl Queue {
    fn new(threads: usize) -> Self {
        let waiting = Waiting { read: VecDeque::new(), digested: VecDeque::new(), ended: false };
        Self { waiting: Mutex::new(waiting), more: Condvar::new(), at_once: lanes::at_once(), threads }
    }

    /// As many buffers as keep everybody busy: some being read, some being
    /// digested, two for each worker, two being written. More than are
    /// digested at once, or nobody would ever begin.
    fn buffers(&self) -> usize {
        2 * self.at_once + 2 * self.threads + 2
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a block that was read.
    fn add(&self, job: Job) {
        let mut waiting = self.waiting();
        waiting.read.push_back(job);
        if waiting.read.len() >= self.at_once {
            self.more.notify_one();
        }
    }

    /// Adds blocks to compress.
    fn digested(&self, jobs: Vec<Job>) {
        self.waiting().digested.extend(jobs);
        self.more.notify_all();
    }

    /// Says that nothing more will be read.
    fn end(&self) {
        self.waiting().ended = true;
        self.more.notify_all();
    }

    /// The next piece of work; `None` when there will be none.
    fn next(&self) -> Option<Work> {
        let mut waiting = self.waiting();
        loop {
            if let Some(job) = waiting.digested.pop_front() {
                return Some(Work::Compress(job));
            }
            let ready = waiting.read.len();
            if ready >= self.at_once {
                return Some(Work::Digest(waiting.read.drain(..self.at_once).collect()));
            }
            if waiting.ended {
                // The last ones are shared out.
                let share = ready.div_ceil(self.threads);
                return (share > 0).then(|| Work::Digest(waiting.read.drain(..share).collect()));
            }
            waiting = self.more.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The pipeline: this thread reads, workers digest and compress, one more
/// thread writes.
fn read_all(
    source: &mut dyn BlockSource,
    to_read: &[usize],
    known: &Known,
    writer: &mut PackWriter<'_, '_>,
    blocks: &mut [Placed],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let total = to_read.len() as u64 * BLOCK;
    progress(0, total);
    if to_read.is_empty() {
        return Ok(());
    }
    let size = source.size();
    let queue = Queue::new(workers(to_read.len()));
    let (empty, empties) = channel();
    for _ in 0..queue.buffers().min(to_read.len()) {
        let (raw, frame) = (vec![0; BLOCK_LEN], Vec::with_capacity(FRAME_LIMIT as usize));
        drop(empty.send(Job { number: 0, index: 0, left: 0, raw, frame, outcome: Outcome::Read }));
    }
    let (result, results) = channel();
    let seen = Mutex::new(HashMap::new());
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || write(&results, &empty, writer, blocks));
        for _ in 0..queue.threads {
            let (queue, seen, result) = (&queue, &seen, result.clone());
            scope.spawn(move || work(known, seen, queue, &result));
        }
        drop(result);
        let mut number = 0;
        let mut spare = None;
        let mut reading = Ok(());
        for (done, index) in to_read.iter().enumerate() {
            // No more buffers ever: the writer has given up, and says why.
            let Some(mut job) = spare.take().or_else(|| empties.recv().ok()) else { break };
            let at = *index as u64 * BLOCK;
            let length = usize::try_from(size - at).unwrap_or(usize::MAX).min(BLOCK_LEN);
            reading = source.read_at(at, &mut job.raw[..length]);
            if reading.is_err() {
                break;
            }
            if is_zero(&job.raw[..length]) {
                // As it is noted already.
                spare = Some(job);
            } else {
                job.raw[length..].fill(0);
                (job.number, job.index, job.left, job.outcome) = (number, *index, to_read.len() - done - 1, Outcome::Read);
                number += 1;
                queue.add(job);
            }
            progress((done as u64 + 1) * BLOCK, total);
        }
        queue.end();
        let written = writing.join().unwrap_or_else(|_| Err(broken()));
        // A read that failed is the cause of a writer that got too little.
        reading?;
        if written? == number { Ok(()) } else { Err(broken()) }
    })
}

fn broken() -> Error {
    Error::new(Code::Failed, "the disk was not read to its end").next("this is a mistake in kiln: please report it")
}

/// A worker: turns what was read into outcomes until there is no more.
fn work(known: &Known, seen: &Mutex<HashMap<Digest, usize>>, queue: &Queue, result: &Sender<Result<Job>>) {
    let mut context = match zstd::bulk::Compressor::new(LEVEL).trying(|| "set up zstd".into()) {
        Ok(context) => context,
        Err(error) => return drop(result.send(Err(error))),
    };
    while let Some(work) = queue.next() {
        let sent = match work {
            Work::Digest(jobs) => {
                let (fresh, rest) = look(known, seen, jobs);
                queue.digested(fresh);
                rest.into_iter().try_for_each(|job| result.send(Ok(job)))
            }
            Work::Compress(mut job) => {
                job.frame.clear();
                let done = context.compress_to_buffer(&job.raw, &mut job.frame).trying(|| "compress a block".into());
                result.send(done.map(|_| job))
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Digests blocks; gives those that nobody holds yet, which have to be
/// compressed, and the others.
fn look(known: &Known, seen: &Mutex<HashMap<Digest, usize>>, jobs: Vec<Job>) -> (Vec<Job>, Vec<Job>) {
    let digests = lanes::digests(&jobs.iter().map(|job| job.raw.as_slice()).collect::<Vec<_>>());
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    let outcomes = jobs.into_iter().zip(digests).map(|(mut job, digest)| {
        job.outcome = match known.places.get(&digest) {
            Some(location) => Outcome::Known(digest, *location),
            None => {
                // Of two equal blocks the earlier one is stored. A worker may
                // only leave a block out when an *earlier* one is on its way;
                // when a later one came first, both are compressed and the
                // writer drops the later.
                let first = seen.entry(digest).or_insert(job.index);
                if *first < job.index {
                    Outcome::Repeated(digest)
                } else {
                    *first = job.index;
                    Outcome::Frame(digest)
                }
            }
        };
        job
    });
    outcomes.partition(|job| matches!(job.outcome, Outcome::Frame(_)))
}

/// The writer: puts outcomes back in order, and frames into packs. Gives how
/// many there were.
fn write(results: &Receiver<Result<Job>>, empty: &Sender<Job>, writer: &mut PackWriter<'_, '_>, blocks: &mut [Placed]) -> Result<usize> {
    let mut early: BTreeMap<usize, Job> = BTreeMap::new();
    let mut fresh: HashMap<Digest, Location> = HashMap::new();
    let mut next = 0;
    for job in results {
        let job = job?;
        early.insert(job.number, job);
        while let Some(job) = early.remove(&next) {
            next += 1;
            let placed = match job.outcome {
                Outcome::Read => return Err(broken()),
                Outcome::Known(digest, location) => (digest, location),
                Outcome::Repeated(digest) => (digest, *fresh.get(&digest).ok_or_else(broken)?),
                Outcome::Frame(digest) => {
                    let location = match fresh.get(&digest) {
                        Some(location) => *location,
                        None => writer.append(&job.frame, job.left as u64 * BLOCK)?,
                    };
                    fresh.insert(digest, location);
                    (digest, location)
                }
            };
            if let Some(block) = blocks.get_mut(job.index) {
                *block = (placed.0, Some(placed.1));
            }
            drop(empty.send(job));
        }
    }
    Ok(next)
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;

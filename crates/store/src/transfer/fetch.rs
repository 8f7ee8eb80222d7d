//! From a registry straight into a file, raw or qcow2, without storing.
//!
//! ```text
//!  ranges of packs ──► frames ──► decode, compare, write (all cores) ──► .disk.part
//!  (one task each)     (bounded)                  ▲
//!  frames of local packs ─────────────────────────┘
//! ```
//!
//! Only frames that the disk uses are asked for, those near each other in one
//! request; blocks of zeros become holes; blocks that an image of the store has
//! are read there. Each block is written only when it has its digest, at a
//! place that is known from the map, so blocks may come in any order, and the
//! file beside the final one is all that has to be known to go on: what has the
//! right digest in it stays. A frame that is damaged on the way is asked for
//! again, one that is damaged in the store is fetched.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Seek as _, Write as _};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use kiln_disk::blocks::{self, BATCH, Decoder, is_zero};
use kiln_disk::{lanes, qcow2};
use kiln_model::Digest;
use kiln_model::base::DiskFormat;
use kiln_model::block::BLOCK;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::event::Reports;
use kiln_model::image::{BlockMap, PackRef, Place};
use kiln_registry::Repository;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::local::{Frame, Local};
use super::meter::Meter;
use super::partial::blocking;
use super::remote::Remote;
use crate::blobs::Store;

/// Frames that are nearer than this are fetched in one request, with what is
/// between them: a request costs about as much as so many bytes.
const GAP: u64 = 128 * 1024;

/// Most bytes of one request, so that several are under way for a single pack.
const REQUEST: u64 = 16 * 1024 * 1024;

/// Times that a frame is asked for.
const ROUNDS: u32 = 3;

/// Frames between the network and the decoders, for each of them.
const QUEUE: usize = 8;

/// What is fetched, and where to.
pub struct Fetch<'a> {
    /// The image; its root disk is fetched.
    pub image: &'a Remote,
    /// Where blocks may be already.
    pub store: Option<&'a Store>,
    /// The file that is to be. It appears when it is whole.
    pub to: &'a Path,
    /// Raw or qcow2.
    pub format: DiskFormat,
    /// Whether a file that is there may be replaced.
    pub replace: bool,
    /// Where progress goes.
    pub reports: &'a Reports,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Written {
    /// Digest of the image's manifest.
    pub digest: Digest,
    /// Disk digest of what was written.
    pub disk_digest: Digest,
    /// Bytes that came from the registry.
    pub bytes_fetched: u64,
    /// Raw bytes of blocks that came from the store.
    pub bytes_local: u64,
    /// Raw bytes of blocks that an interrupted attempt had left.
    pub bytes_resumed: u64,
    /// Raw bytes of blocks that are not zero.
    pub bytes_used: u64,
}

/// Where blocks are in the file.
enum Shape {
    Raw { size: u64 },
    Qcow2(Box<qcow2::Layout>),
}

impl Shape {
    fn length(&self) -> u64 {
        match self {
            Self::Raw { size } => *size,
            Self::Qcow2(layout) => layout.length(),
        }
    }

    /// Place and length of a block that is stored.
    fn place(&self, index: usize) -> Option<(u64, usize)> {
        match self {
            Self::Raw { size } => {
                let at = index as u64 * BLOCK;
                Some((at, usize::try_from(size.saturating_sub(at).min(BLOCK)).unwrap_or(0)))
            }
            Self::Qcow2(layout) => layout.place(index),
        }
    }
}

/// What the threads share.
struct Work {
    map: BlockMap,
    shape: Shape,
    file: File,
    path: PathBuf,
    /// Indexes of stored blocks by pack and offset: blocks of one frame are
    /// neighbours.
    order: Vec<u32>,
    meter: Meter,
    /// Buffers that are used again and again.
    spare: Mutex<Vec<Vec<u8>>>,
    /// Groups of `order` whose bytes were not what they should be.
    bad: Mutex<Vec<(Range<usize>, Error)>>,
    /// Why nothing can be written any more.
    failed: Mutex<Option<Error>>,
}

/// A frame that is to be decoded: which blocks of [`Work::order`] it is, and
/// its bytes, or where they are in the store.
struct Task {
    group: Range<usize>,
    bytes: Vec<u8>,
    local: Option<(Arc<File>, Frame)>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes the root disk of an image to a file.
///
/// # Errors
/// [`Code::Usage`] when the file is there; [`Code::Corrupt`], naming pack and
/// block, when something is damaged; [`Code::Infrastructure`] when the registry
/// does not carry it. What has come so far is gone on with next time.
pub async fn fetch(fetch: &Fetch<'_>) -> Result<Written> {
    let disk = fetch.image.root()?;
    let to = std::path::absolute(fetch.to).trying(|| format!("write {}", fetch.to.display()))?;
    refuse_existing(fetch, &to)?;
    let name = to.file_name().ok_or_else(|| Error::new(Code::Usage, format!("{} is no name of a file", to.display())))?;
    // Not to be taken for the disk, and found again by the next attempt.
    let path = to.with_file_name(format!(".{}.kiln-part", name.to_string_lossy()));
    let file = open_part(&path)?;
    let shape = match fetch.format {
        DiskFormat::Raw => Shape::Raw { size: disk.map.size },
        DiskFormat::Qcow2 => Shape::Qcow2(Box::new(qcow2::Layout::of(&disk.map))),
    };
    let place = |index: &u32| match disk.map.blocks.get(*index as usize).map(|block| block.place) {
        Some(Place::Pack { pack, offset, .. }) => (pack, offset, *index),
        _ => (u32::MAX, u32::MAX, *index),
    };
    let count = u32::try_from(disk.map.blocks.len()).unwrap_or(u32::MAX);
    let mut order: Vec<u32> = (0..count).filter(|index| place(index).0 != u32::MAX).collect();
    order.sort_unstable_by_key(place);
    let used = order.len() as u64 * BLOCK;
    let meter = Meter::new("pull", used, fetch.reports);
    let (spare, bad, failed) = (Mutex::default(), Mutex::default(), Mutex::default());
    let work = Arc::new(Work { map: disk.map.clone(), shape, file, path, order, meter, spare, bad, failed });

    let begun = work.clone();
    let wanted = blocking(move || begun.begin()).await?;
    let resumed = used - bytes_of(&wanted);
    let (mut wanted, mut local) = find_local(&work, fetch, wanted).await?;
    let locally = bytes_of(local.iter().map(|(group, _)| group));
    let mut fetched = 0;
    for round in 1..=ROUNDS {
        fetched += work.clone().round(&fetch.image.repository, &wanted, fetch.store, std::mem::take(&mut local)).await?;
        let mut bad = std::mem::take(&mut *lock(&work.bad));
        if bad.is_empty() {
            break;
        }
        if round == ROUNDS {
            let (group, error) = bad.swap_remove(0);
            let what = format!("take block {} of the disk from {}", work.order.get(group.start).copied().unwrap_or(0), fetch.image.label());
            return Err(error).trying(|| what);
        }
        fetch.reports.note(format!("{} blocks were damaged on the way, and are asked for again", bad.len()));
        bad.sort_by_key(|(group, _)| group.start);
        wanted = bad.into_iter().map(|(group, _)| group).collect();
    }
    work.meter.end();
    refuse_existing(fetch, &to)?;
    std::fs::rename(&work.path, &to).trying(|| format!("write {}", to.display()))?;
    Ok(Written {
        digest: fetch.image.digest(),
        disk_digest: disk.config.digest,
        bytes_fetched: fetched,
        bytes_local: locally,
        bytes_resumed: resumed,
        bytes_used: used,
    })
}

fn refuse_existing(fetch: &Fetch<'_>, to: &Path) -> Result<()> {
    if to.exists() && !fetch.replace {
        return Err(Error::new(Code::Usage, format!("{} is there already", fetch.to.display())).next("name another file, or add --force"));
    }
    Ok(())
}

/// Opens the file beside the final one, alone.
fn open_part(path: &Path) -> Result<File> {
    let what = || format!("write {}", path.display());
    let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path).trying(what)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            Err(Error::new(Code::Failed, format!("another kiln is writing {}", path.display())).next("wait for it, or name another file"))
        }
        Err(std::fs::TryLockError::Error(error)) => Err(error).trying(what),
    }
}

/// Takes out of `wanted` what images of the store have.
async fn find_local(
    work: &Arc<Work>,
    fetch: &Fetch<'_>,
    wanted: Vec<Range<usize>>,
) -> Result<(Vec<Range<usize>>, Vec<(Range<usize>, Frame)>)> {
    let Some(store) = fetch.store.cloned() else { return Ok((wanted, Vec::new())) };
    let (work, name) = (work.clone(), fetch.image.config.name.clone());
    blocking(move || {
        let digests: HashSet<Digest> = wanted.iter().filter_map(|group| work.digest(group)).collect();
        let found = Local::find(&store, &digests, &name)?;
        let (mut rest, mut local) = (Vec::new(), Vec::new());
        for group in wanted {
            match work.digest(&group).and_then(|digest| found.get(&digest)) {
                Some(frame) => local.push((group, frame)),
                None => rest.push(group),
            }
        }
        local.sort_by_key(|(_, frame)| (frame.pack.digest, frame.offset));
        Ok((rest, local))
    })
    .await
}

/// Frames of one pack that are fetched with one request.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    pack: u32,
    bytes: Range<u64>,
    groups: Vec<Range<usize>>,
}

impl Work {
    fn block(&self, at: usize) -> Option<&kiln_model::image::Block> {
        self.map.blocks.get(*self.order.get(at)? as usize)
    }

    fn digest(&self, group: &Range<usize>) -> Option<Digest> {
        self.block(group.start).map(|block| block.digest)
    }

    fn frame(&self, group: &Range<usize>) -> Option<(u32, u64, u32)> {
        match self.block(group.start)?.place {
            Place::Pack { pack, offset, length } => Some((pack, u64::from(offset), length)),
            Place::Zero => None,
        }
    }

    /// The neighbours in `order` that are one frame.
    fn groups(&self) -> Vec<Range<usize>> {
        let mut groups: Vec<Range<usize>> = Vec::new();
        for at in 0..self.order.len() {
            match groups.last_mut() {
                Some(last) if self.block(last.start) == self.block(at) => last.end = at + 1,
                _ => groups.push(at..at + 1),
            }
        }
        groups
    }

    /// Makes the file what it is before any block, and looks which blocks an
    /// earlier attempt has left in it; gives the groups that are wanted.
    fn begin(&self) -> Result<Vec<Range<usize>>> {
        let what = || format!("write {}", self.path.display());
        let before = self.file.metadata().trying(what)?.len();
        self.file.set_len(self.shape.length()).trying(what)?;
        if let Shape::Qcow2(layout) = &self.shape {
            let mut out = BufWriter::with_capacity(1 << 20, &self.file);
            out.rewind().trying(what)?;
            layout.write_head(&mut out).and_then(|()| out.flush()).trying(what)?;
        }
        let groups = self.groups();
        if before == 0 {
            return Ok(groups);
        }
        // Blocks that are right stay; what should be zero is made so.
        let right: Vec<AtomicU64> = (0..self.order.len().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let next = AtomicUsize::new(0);
        let zeros: Vec<usize> = match self.shape {
            Shape::Raw { .. } => (0..self.map.blocks.len()).filter(|index| self.map.blocks[*index].place == Place::Zero).collect(),
            // There are no places for zeros.
            Shape::Qcow2(_) => Vec::new(),
        };
        let look = || -> Result<()> {
            let mut buffers = vec![vec![0; BLOCK as usize]; BATCH];
            loop {
                let first = next.fetch_add(BATCH, Ordering::Relaxed);
                if first >= self.order.len() + zeros.len() {
                    return Ok(());
                }
                let mut read = Vec::with_capacity(BATCH);
                for (at, bytes) in (first..).zip(&mut buffers) {
                    let stored = self.order.get(at).map(|index| *index as usize);
                    let Some(index) = stored.or_else(|| zeros.get(at - self.order.len()).copied()) else { break };
                    let Some((place, length)) = self.shape.place(index) else { continue };
                    self.file.read_exact_at(&mut bytes[..length], place).trying(|| format!("read {}", self.path.display()))?;
                    bytes[length..].fill(0);
                    // A hole, most often.
                    if is_zero(bytes) {
                        continue;
                    }
                    if stored.is_none() {
                        bytes.fill(0);
                        self.file.write_all_at(&bytes[..length], place).trying(what)?;
                        continue;
                    }
                    read.push((at, index, &**bytes));
                }
                let blocks: Vec<&[u8]> = read.iter().map(|(_, _, bytes)| *bytes).collect();
                for ((at, index, _), digest) in read.iter().zip(lanes::digests(&blocks)) {
                    if self.map.blocks.get(*index).is_some_and(|block| block.digest == digest) {
                        if let Some(word) = right.get(at / 64) {
                            word.fetch_or(1 << (at % 64), Ordering::Relaxed);
                        }
                        self.meter.add(BLOCK);
                    }
                }
            }
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from).min(16);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..cores).map(|_| scope.spawn(look)).collect();
            threads.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|_| Err(Error::new(Code::Failed, "looking at what an interrupted pull has left failed")))
            })
        })?;
        let is_right = |at: usize| right.get(at / 64).is_some_and(|word| word.load(Ordering::Relaxed) >> (at % 64) & 1 == 1);
        // A frame is wanted for those of its blocks that are not there.
        Ok(groups.into_iter().flat_map(|group| split(group, is_right)).collect())
    }

    /// What is to be asked for.
    fn requests(&self, wanted: &[Range<usize>]) -> Vec<Request> {
        let mut requests: Vec<Request> = Vec::new();
        for group in wanted {
            let Some((pack, offset, length)) = self.frame(group) else { continue };
            let end = offset + u64::from(length);
            match requests.last_mut() {
                Some(last)
                    if last.pack == pack
                        && offset >= last.bytes.end
                        && offset <= last.bytes.end + GAP
                        && end - last.bytes.start <= REQUEST =>
                {
                    last.bytes.end = end;
                    last.groups.push(group.clone());
                }
                _ => requests.push(Request { pack, bytes: offset..end, groups: vec![group.clone()] }),
            }
        }
        requests
    }

    /// Gets what is wanted, as far as it can be had; gives the bytes that came.
    async fn round(
        self: Arc<Self>,
        repository: &Repository,
        wanted: &[Range<usize>],
        store: Option<&Store>,
        local: Vec<(Range<usize>, Frame)>,
    ) -> Result<u64> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from).min(16);
        let (sender, tasks) = mpsc::channel::<Task>(cores * QUEUE);
        let tasks = Arc::new(Mutex::new(tasks));
        let mut decoding = JoinSet::new();
        for _ in 0..cores {
            let (work, tasks) = (self.clone(), tasks.clone());
            decoding.spawn_blocking(move || work.decode(&tasks));
        }
        drop(tasks);
        let mut coming: JoinSet<Result<u64>> = JoinSet::new();
        for request in self.requests(wanted) {
            let (work, sender, repository) = (self.clone(), sender.clone(), repository.clone());
            let limit = repository.limit();
            coming.spawn(async move {
                let _permit = limit.acquire().await;
                work.get(&repository, request, &sender).await
            });
        }
        if let Some(store) = store.filter(|_| !local.is_empty()).cloned() {
            let (work, sender) = (self.clone(), sender.clone());
            coming.spawn_blocking(move || {
                work.read_local(&store, local, &sender);
                Ok(0)
            });
        }
        drop(sender);
        let mut fetched = 0;
        let mut first = None;
        while let Some(came) = coming.join_next().await {
            match came.trying(|| "fetch blocks".into())? {
                Ok(bytes) => fetched += bytes,
                Err(error) => {
                    first.get_or_insert(error);
                    coming.abort_all();
                    while coming.join_next().await.is_some() {}
                }
            }
        }
        while decoding.join_next().await.is_some() {}
        // Who could not write is why nothing was taken any more.
        match lock(&self.failed).take().or(first) {
            Some(error) => Err(error),
            None => Ok(fetched),
        }
    }

    /// Hands over frames of the store, in the order of its packs.
    fn read_local(&self, store: &Store, local: Vec<(Range<usize>, Frame)>, sender: &mpsc::Sender<Task>) {
        let mut open: Option<(Digest, Arc<File>)> = None;
        for (group, frame) in local {
            let file = match &open {
                Some((pack, file)) if *pack == frame.pack.digest => file.clone(),
                _ => match store.open_blob(&frame.pack.digest) {
                    Ok(file) => open.insert((frame.pack.digest, Arc::new(file))).1.clone(),
                    // Then it is fetched.
                    Err(error) => {
                        lock(&self.bad).push((group, error));
                        continue;
                    }
                },
            };
            let bytes = lock(&self.spare).pop().unwrap_or_default();
            if sender.blocking_send(Task { group, bytes, local: Some((file, frame)) }).is_err() {
                return;
            }
        }
    }

    /// Fetches one request, and hands over its frames.
    async fn get(&self, repository: &Repository, request: Request, sender: &mpsc::Sender<Task>) -> Result<u64> {
        let Some(pack) = self.map.packs.get(request.pack as usize).copied() else { return Ok(0) };
        let mut body = repository.read(&pack.digest, request.bytes.clone()).await?.checked_by_caller();
        let mut at = request.bytes.start;
        let mut chunk = Bytes::new();
        for group in request.groups {
            let Some((_, offset, length)) = self.frame(&group) else { continue };
            let mut bytes = lock(&self.spare).pop().unwrap_or_default();
            bytes.clear();
            let end = offset + u64::from(length);
            while at < end {
                if chunk.is_empty() {
                    chunk = body.chunk().await?.ok_or_else(|| cut_short(&pack))?;
                    continue;
                }
                // What lies between two frames is passed over.
                let skip = usize::try_from(offset.saturating_sub(at)).unwrap_or(usize::MAX).min(chunk.len());
                drop(chunk.split_to(skip));
                at += skip as u64;
                let take = usize::try_from(end - at.max(offset)).unwrap_or(usize::MAX).min(chunk.len());
                bytes.extend_from_slice(&chunk.split_to(take));
                at += take as u64;
            }
            if sender.send(Task { group, bytes, local: None }).await.is_err() {
                break;
            }
        }
        Ok(at - request.bytes.start)
    }

    /// A thread that decodes until there is nothing more.
    fn decode(&self, tasks: &Mutex<mpsc::Receiver<Task>>) {
        let mut decoder = match Decoder::new() {
            Ok(decoder) => decoder,
            Err(error) => return self.fail(error, tasks),
        };
        loop {
            // Several together are digested in little more time than one.
            let mut batch = Vec::with_capacity(BATCH);
            {
                let mut tasks = lock(tasks);
                while batch.len() < BATCH
                    && let Some(task) = tasks.blocking_recv()
                {
                    batch.push(task);
                }
            }
            if batch.is_empty() {
                return;
            }
            if let Err(error) = self.write_all(&mut decoder, &mut batch) {
                return self.fail(error, tasks);
            }
            lock(&self.spare).extend(batch.into_iter().map(|task| task.bytes));
        }
    }

    fn fail(&self, error: Error, tasks: &Mutex<mpsc::Receiver<Task>>) {
        lock(&self.failed).get_or_insert(error);
        lock(tasks).close();
    }

    /// Decodes frames and writes their blocks; damage is only noted.
    fn write_all(&self, decoder: &mut Decoder, batch: &mut Vec<Task>) -> Result<()> {
        batch.retain_mut(|task| {
            let Some((file, frame)) = &task.local else { return true };
            task.bytes.resize(frame.length as usize, 0);
            let read = file.read_exact_at(&mut task.bytes, u64::from(frame.offset));
            read.map_err(|error| {
                let error = Error::new(Code::Corrupt, format!("cannot read pack {}", frame.pack.digest)).because(error);
                lock(&self.bad).push((task.group.clone(), error));
            })
            .is_ok()
        });
        let (groups, frames): (Vec<_>, Vec<_>) = batch.iter().filter_map(|task| Some((&task.group, self.expected(task)?))).unzip();
        for (group, block) in groups.into_iter().zip(decoder.decode_all(&frames)) {
            match block {
                Ok(block) => self.put(group, block)?,
                Err(error) => lock(&self.bad).push((group.clone(), error)),
            }
        }
        Ok(())
    }

    /// What has to be in a frame.
    fn expected<'a>(&self, task: &'a Task) -> Option<blocks::Frame<'a>> {
        let (pack, _, _) = self.frame(&task.group)?;
        let pack = task.local.as_ref().map_or(self.map.packs.get(pack as usize)?.digest, |(_, frame)| frame.pack.digest);
        Some(blocks::Frame { bytes: &task.bytes, digest: self.digest(&task.group)?, pack })
    }

    /// Writes a block everywhere where it belongs.
    fn put(&self, group: &Range<usize>, block: &[u8]) -> Result<()> {
        for at in group.clone() {
            let Some((place, length)) = self.order.get(at).and_then(|index| self.shape.place(*index as usize)) else { continue };
            self.file.write_all_at(&block[..length], place).trying(|| format!("write {}", self.path.display()))?;
            self.meter.add(BLOCK);
        }
        Ok(())
    }
}

/// Raw bytes of the blocks of some groups.
fn bytes_of<'a>(groups: impl IntoIterator<Item = &'a Range<usize>>) -> u64 {
    groups.into_iter().map(|group| group.len() as u64 * BLOCK).sum()
}

fn cut_short(pack: &PackRef) -> Error {
    Error::new(Code::Corrupt, format!("pack {} ends before its last block", pack.digest))
        .next("it is damaged at the registry: push the image again")
}

/// The parts of a group that are not right yet.
fn split(group: Range<usize>, right: impl Fn(usize) -> bool) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    for at in group {
        if right(at) {
            continue;
        }
        match parts.last_mut() {
            Some(last) if last.end == at => last.end = at + 1,
            _ => parts.push(at..at + 1),
        }
    }
    parts
}

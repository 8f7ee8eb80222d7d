//! Reading a disk back from its map and its packs. Every block is checked
//! against its digest before a byte of it is given out.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_model::Digest;
use kiln_model::block::{BLOCK, BlockSource, Content, Extent};
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::{Block, BlockMap, PackRef, Place};

use crate::lanes::{self, LANES};
use crate::packs::{FRAME_LIMIT, Packs};

/// [`BLOCK`] as a length in memory.
pub(crate) const BLOCK_LEN: usize = BLOCK as usize;

/// Open pack files that a [`MapSource`] keeps.
const OPEN_FILES: usize = 64;

/// Whether all bytes are zero; stops at the first 4 KiB that are not.
pub fn is_zero(bytes: &[u8]) -> bool {
    const PAGE: [u8; 4096] = [0; 4096];
    bytes.chunks(PAGE.len()).all(|chunk| PAGE.starts_with(chunk))
}

/// Worker threads for `jobs` independent pieces of work: as many as there are
/// cores, but at most 16, since each has buffers and a zstd context of its own.
pub(crate) fn workers(jobs: usize) -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(16).min(jobs).max(1)
}

/// How many frames a [`Decoder`] is best given at once: their blocks are
/// digested side by side.
pub const BATCH: usize = LANES;

/// A frame, and what has to be in it.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// The frame's bytes.
    pub bytes: &'a [u8],
    /// The digest of its block.
    pub digest: Digest,
    /// The pack it comes from, to be named when it is damaged.
    pub pack: Digest,
}

/// Takes frames apart and checks what comes out. Keeps its context, and as many
/// buffers of one block as it was given frames at once.
pub struct Decoder {
    context: zstd::bulk::Decompressor<'static>,
    blocks: Vec<Vec<u8>>,
}

impl Decoder {
    /// A decoder without buffers yet.
    ///
    /// # Errors
    /// When zstd cannot be set up.
    pub fn new() -> Result<Self> {
        let context = zstd::bulk::Decompressor::new().trying(|| "set up zstd".into())?;
        Ok(Self { context, blocks: Vec::new() })
    }

    /// The block in `frame`, which has to have `digest`; `pack` is named when
    /// it has not.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when it is no frame of a block, or of another block.
    pub fn decode(&mut self, frame: &[u8], digest: &Digest, pack: &Digest) -> Result<&[u8]> {
        let mut blocks = self.decode_all(&[Frame { bytes: frame, digest: *digest, pack: *pack }]);
        blocks.next().unwrap_or_else(|| Err(Error::new(Code::Failed, "no block was decoded")))
    }

    /// The block in `frame`, not compared with any digest: for whoever hands it
    /// on to somebody who does that. `pack` is named when it is no block.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when it is no frame of a block.
    pub fn expand(&mut self, frame: &[u8], pack: &Digest) -> Result<Vec<u8>> {
        let damaged = |what: &str| {
            Error::new(Code::Corrupt, format!("pack {pack} is damaged: {what}")).next("`kiln verify` names every image that is damaged")
        };
        match self.context.decompress(frame, BLOCK_LEN) {
            Ok(block) if block.len() == BLOCK_LEN => Ok(block),
            Ok(_) => Err(damaged("a frame holds less than a block")),
            Err(error) => Err(damaged("a frame cannot be decompressed").because(error)),
        }
    }

    /// The block in each of `frames`, in order, or why there is none: as
    /// [`Decoder::decode`]. Several are checked in much less time than each by
    /// itself, best [`BATCH`] of them.
    pub fn decode_all<'a>(&'a mut self, frames: &[Frame<'_>]) -> impl Iterator<Item = Result<&'a [u8]>> + use<'a> {
        let corrupt = |frame: &Frame<'_>, what: &str| {
            Error::new(Code::Corrupt, format!("pack {} is damaged: {what}", frame.pack))
                .next("`kiln verify` names every image that is damaged")
        };
        let other = |frame: &Frame<'_>| corrupt(frame, &format!("what is stored as block {} is something else", frame.digest));
        while self.blocks.len() < frames.len() {
            self.blocks.push(Vec::with_capacity(BLOCK_LEN));
        }
        let mut wrong: Vec<Option<Error>> = Vec::with_capacity(frames.len());
        for (frame, block) in frames.iter().zip(&mut self.blocks) {
            block.clear();
            wrong.push(match self.context.decompress_to_buffer(frame.bytes, block) {
                Ok(BLOCK_LEN) => None,
                Ok(_) => Some(other(frame)),
                Err(error) => Some(corrupt(frame, &format!("block {} cannot be decompressed", frame.digest)).because(error)),
            });
        }
        let blocks: Vec<&[u8]> = self.blocks.iter().take(frames.len()).map(Vec::as_slice).collect();
        for ((frame, digest), wrong) in frames.iter().zip(lanes::digests(&blocks)).zip(&mut wrong) {
            if wrong.is_none() && frame.digest != digest {
                *wrong = Some(other(frame));
            }
        }
        blocks.into_iter().zip(wrong).map(|(block, wrong)| wrong.map_or(Ok(block), Err))
    }

    /// The first block of those that were last decoded.
    fn block(&self) -> &[u8] {
        self.blocks.first().map_or(&[], Vec::as_slice)
    }
}

/// Reads one frame to `frame`, never more than [`FRAME_LIMIT`] bytes.
fn read_frame(file: &File, pack: &PackRef, offset: u32, length: u32, frame: &mut Vec<u8>) -> Result<()> {
    if length == 0 || length > FRAME_LIMIT || u64::from(offset) + u64::from(length) > pack.size {
        return Err(Error::new(Code::Corrupt, format!("a block map points outside of pack {}", pack.digest)));
    }
    frame.resize(length as usize, 0);
    file.read_exact_at(frame, u64::from(offset)).map_err(|error| {
        let code = if error.kind() == io::ErrorKind::UnexpectedEof { Code::Corrupt } else { Code::Failed };
        Error::new(code, format!("cannot read pack {} at byte {offset}", pack.digest)).because(error)
    })
}

fn missing_pack() -> Error {
    Error::new(Code::Corrupt, "a block map names a pack that it does not list")
}

/// A disk in packs as a source of blocks, read at any place.
pub struct MapSource {
    map: Arc<BlockMap>,
    packs: Arc<dyn Packs>,
    files: HashMap<u32, File>,
    decoder: Decoder,
    frame: Vec<u8>,
    /// Which block the decoder holds.
    held: Option<usize>,
}

impl MapSource {
    /// The disk of `map`, whose packs are in `packs`.
    ///
    /// # Errors
    /// When zstd cannot be set up.
    pub fn new(map: Arc<BlockMap>, packs: Arc<dyn Packs>) -> Result<Self> {
        Ok(Self { map, packs, files: HashMap::new(), decoder: Decoder::new()?, frame: Vec::new(), held: None })
    }

    /// The raw bytes of a block, zero-padded; `None` when it is all zeros.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when it is damaged.
    pub fn block(&mut self, index: usize) -> Result<Option<&[u8]>> {
        if self.held != Some(index) {
            self.held = None;
            let Some((digest, pack)) = self.frame(index)? else { return Ok(None) };
            self.decoder.decode(&self.frame, &digest, &pack)?;
            self.held = Some(index);
        }
        Ok(Some(self.decoder.block()))
    }

    /// As [`MapSource::block`], not compared with the block's digest: for
    /// whoever hands it on to somebody who does that.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when what is stored is no block.
    pub fn unchecked(&mut self, index: usize) -> Result<Option<Vec<u8>>> {
        match self.frame(index)? {
            None => Ok(None),
            Some((_, pack)) => self.decoder.expand(&self.frame, &pack).map(Some),
        }
    }

    /// Reads a block's frame; gives the digests of the block and of its pack,
    /// and nothing for one that is all zeros.
    fn frame(&mut self, index: usize) -> Result<Option<(Digest, Digest)>> {
        let Some(Block { digest, place }) = self.map.blocks.get(index).copied() else {
            return Err(Error::new(Code::Failed, format!("the disk has no block {index}")));
        };
        let Place::Pack { pack: number, offset, length } = place else { return Ok(None) };
        let pack = *self.map.packs.get(number as usize).ok_or_else(missing_pack)?;
        if !self.files.contains_key(&number) && self.files.len() >= OPEN_FILES {
            self.files.clear();
        }
        let file = match self.files.entry(number) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(self.packs.open(&pack)?),
        };
        read_frame(file, &pack, offset, length, &mut self.frame)?;
        Ok(Some((digest, pack.digest)))
    }
}

impl BlockSource for MapSource {
    fn size(&self) -> u64 {
        self.map.size
    }

    fn extents(&mut self) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut offset = 0;
        for block in &self.map.blocks {
            let length = BLOCK.min(self.map.size - offset);
            let content = if block.place == Place::Zero { Content::Zero } else { Content::Data };
            match extents.last_mut() {
                Some(last) if last.content == content => last.length += length,
                _ => extents.push(Extent { offset, length, content }),
            }
            offset += length;
        }
        Ok(extents)
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (mut offset, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let index = usize::try_from(offset / BLOCK).unwrap_or(usize::MAX);
            let from = usize::try_from(offset % BLOCK).unwrap_or(0);
            let length = rest.len().min(BLOCK_LEN - from);
            let (now, later) = rest.split_at_mut(length);
            match self.block(index)? {
                Some(block) => now.copy_from_slice(&block[from..from + length]),
                None => now.fill(0),
            }
            offset += length as u64;
            rest = later;
        }
        Ok(())
    }
}

/// Writes a disk to `out`, an empty regular file, which becomes a raw disk
/// with holes where blocks are zero. All cores work on it; each holds [`BATCH`]
/// blocks and their frames, whatever the disk's size. `progress` is called with bytes
/// written and bytes to write. Does not sync.
///
/// # Errors
/// [`Code::Corrupt`] when a block is not what its digest says;
/// [`Code::DiskFull`].
pub fn write_raw(map: &BlockMap, packs: &dyn Packs, out: &File, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    out.set_len(map.size).trying(|| "make the raw disk".into())?;
    let stored: Vec<usize> = (0..map.blocks.len()).filter(|i| matches!(map.blocks[*i].place, Place::Pack { .. })).collect();
    let total = stored.len() as u64 * BLOCK;
    progress(0, total);
    if stored.is_empty() {
        return Ok(());
    }
    let files: Vec<Mutex<Option<Arc<File>>>> = map.packs.iter().map(|_| Mutex::new(None)).collect();
    let open = |number: u32| -> Result<(Arc<File>, PackRef)> {
        let number = number as usize;
        let (pack, slot) = map.packs.get(number).zip(files.get(number)).ok_or_else(missing_pack)?;
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match &*slot {
            Some(file) => file.clone(),
            None => slot.insert(Arc::new(packs.open(pack)?)).clone(),
        };
        Ok((file, *pack))
    };
    let (next, done, stop) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let threads = workers(stored.len());
    // The last ones are shared out.
    let batch = lanes::at_once().min(stored.len().div_ceil(threads));
    let work = || -> Result<()> {
        let mut decoder = Decoder::new()?;
        let mut buffers: Vec<Vec<u8>> = vec![Vec::new(); batch];
        while !stop.load(Ordering::Relaxed) {
            let from = next.fetch_add(batch, Ordering::Relaxed);
            let Some(indices) = stored.get(from..stored.len().min(from + batch)).filter(|indices| !indices.is_empty()) else { break };
            let mut frames = Vec::with_capacity(batch);
            for (index, bytes) in indices.iter().zip(&mut buffers) {
                let Block { digest, place: Place::Pack { pack, offset, length } } = map.blocks[*index] else { continue };
                let (file, pack) = open(pack)?;
                read_frame(&file, &pack, offset, length, bytes)?;
                frames.push(Frame { bytes, digest, pack: pack.digest });
            }
            for (block, index) in decoder.decode_all(&frames).zip(indices) {
                let block = block?;
                let at = *index as u64 * BLOCK;
                let length = usize::try_from(map.size.saturating_sub(at)).unwrap_or(usize::MAX).min(BLOCK_LEN);
                out.write_all_at(&block[..length], at).trying(|| "write the raw disk".into())?;
                done.fetch_add(BLOCK, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let (ended, ends) = std::sync::mpsc::channel();
        for _ in 0..threads {
            let (ended, work, failed, stop) = (ended.clone(), &work, &failed, &stop);
            scope.spawn(move || {
                if let Err(error) = work() {
                    stop.store(true, Ordering::Relaxed);
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
                let _ = ended.send(());
            });
        }
        drop(ended);
        while ends.recv_timeout(Duration::from_millis(100)) != Err(std::sync::mpsc::RecvTimeoutError::Disconnected) {
            progress(done.load(Ordering::Relaxed), total);
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

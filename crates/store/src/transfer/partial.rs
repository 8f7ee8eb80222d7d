//! Packs that are being fetched: `.kiln/partial/HEX`, written from front to
//! back under a lock (flock) on the file itself, so that its length says what
//! is there already. Whoever pulls the same pack at the same time waits, and
//! then finds it in the store. What nobody has gone on with for a day is
//! removed by `prune`.
//!
//! A pack need not come from the registry alone. Where a local image holds a
//! block of it, as a frame of the same length, that frame is copied: kiln
//! writes frames the same way everywhere, so most often the pack has the right
//! digest then. When it has not, it is fetched whole.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kiln_disk::blocks::{self, BATCH, Decoder};
use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::PackRef;
use kiln_registry::Repository;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, mpsc};

use super::local::{Frame, Local};
use super::meter::Meter;
use super::remote::label;
use crate::blobs::Store;

/// Age at which `prune` removes what nobody goes on with.
pub(crate) const STALE: Duration = Duration::from_secs(24 * 3600);

/// Chunks between the network and the disk.
const QUEUE: usize = 8;

/// Times that a pack is fetched whole before it is given up.
const WHOLE: u32 = 2;

/// Bytes that are copied at once.
const COPY: usize = 256 * 1024;

/// A frame that a pack has to have: offset, length, block.
pub(crate) type Expected = (u32, u32, Digest);

/// Where the bytes of a pack came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Came {
    /// From the registry.
    pub(crate) fetched: u64,
    /// From packs of this store.
    pub(crate) reused: u64,
    /// From an earlier attempt.
    pub(crate) resumed: u64,
}

/// A stretch of a pack, and where its bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stretch {
    Remote { length: u64 },
    Local { frame: Frame },
}

impl Stretch {
    fn length(&self) -> u64 {
        match self {
            Self::Remote { length } => *length,
            Self::Local { frame } => u64::from(frame.length),
        }
    }
}

/// How a pack of `size` bytes with `frames` (sorted) is put together, from
/// byte `from` on.
fn stretches(size: u64, from: u64, frames: &[Expected], local: &Local) -> Vec<Stretch> {
    let mut all = Vec::new();
    let mut at = from;
    let remote = |all: &mut Vec<Stretch>, length: u64| match all.last_mut() {
        _ if length == 0 => {}
        Some(Stretch::Remote { length: before }) => *before += length,
        _ => all.push(Stretch::Remote { length }),
    };
    for (offset, length, block) in frames {
        let (offset, end) = (u64::from(*offset), u64::from(*offset) + u64::from(*length));
        if offset < at {
            continue;
        }
        if let Some(frame) = local.get(block).filter(|frame| frame.length == *length) {
            remote(&mut all, offset - at);
            all.push(Stretch::Local { frame });
            at = end;
        }
    }
    remote(&mut all, size.saturating_sub(at));
    all
}

/// The file of a pack, locked.
struct Partial {
    file: File,
    path: PathBuf,
}

/// Opens the file of a pack, alone; nothing, when the pack is there.
fn open(store: &Store, pack: &PackRef) -> Result<Option<Partial>> {
    let path = store.partial().join(pack.digest.hex());
    loop {
        if !store.hold(&[*pack])?.is_empty() {
            return Ok(None);
        }
        let what = || format!("open {}", path.display());
        let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path).trying(what)?;
        file.lock().trying(|| format!("lock {}", path.display()))?;
        // Whoever had it may have finished it, or `prune` has removed it.
        let is = file.metadata().trying(what)?;
        if std::fs::metadata(&path).is_ok_and(|there| (there.ino(), there.dev()) == (is.ino(), is.dev())) {
            return Ok(Some(Partial { file, path }));
        }
    }
}

/// Fetches a pack into the store, unless it is there. `frames` (sorted) are
/// checked, except those that `local` vouches for.
pub(crate) async fn fetch_pack(
    store: &Store,
    repository: &Repository,
    pack: PackRef,
    frames: Vec<Expected>,
    local: Arc<Local>,
    meter: &Meter,
    checking: &Arc<Semaphore>,
) -> Result<Came> {
    // Before the lock: who has a lock gets on with it.
    let permit = repository.limit().acquire().await;
    let opened = {
        let store = store.clone();
        blocking(move || open(&store, &pack)).await?
    };
    let Some(mut partial) = opened else {
        meter.add(pack.size);
        return Ok(Came::default());
    };
    let mut whole = 0;
    let mut first = true;
    loop {
        let length = partial.file.metadata().trying(|| format!("read {}", partial.path.display()))?.len();
        let from = if first && length <= pack.size { length } else { 0 };
        let nobody = Local::default();
        let parts = stretches(pack.size, from, &frames, if first { &local } else { &nobody });
        let plain = from == 0 && parts.iter().all(|part| matches!(part, Stretch::Remote { .. }));
        whole += u32::from(plain);
        let came = Came {
            resumed: from,
            fetched: parts.iter().filter(|part| matches!(part, Stretch::Remote { .. })).map(Stretch::length).sum(),
            reused: parts.iter().filter(|part| matches!(part, Stretch::Local { .. })).map(Stretch::length).sum(),
        };
        meter.add(from);
        let (chunks, arriving) = mpsc::channel(QUEUE);
        let job = Job { store: store.clone(), partial, pack, from, parts: parts.clone(), meter: meter.clone() };
        let writing = tokio::task::spawn_blocking(move || job.write(arriving));
        let fetching = fetch_parts(repository, &pack, from, &parts, &chunks).await;
        drop(chunks);
        let (back, written) = writing.await.trying(|| format!("write pack {}", pack.digest))?;
        partial = back;
        // A disk that is full is why nobody took the chunks any more.
        let is = match (written, fetching) {
            (Ok(_), Err(error)) => return Err(error),
            (is, _) => is?,
        };
        if is == Some(pack.digest) {
            drop(permit);
            // As many as there are cores: each has buffers of its own.
            let _turn = checking.acquire().await;
            let (store, local) = (store.clone(), local.clone());
            let at = label(repository);
            blocking(move || {
                check_frames(&partial.file, &pack, &frames, &local).trying(|| format!("take what {at} has as pack {}", pack.digest))?;
                partial.file.sync_all().trying(|| format!("write pack {}", pack.digest))?;
                store.place_file(&partial.path, &pack.digest)
            })
            .await?;
            return Ok(came);
        }
        meter.part(pack.size, 0);
        if whole >= WHOLE {
            drop(std::fs::remove_file(&partial.path));
            let what = format!("what {} sends as pack {} is something else", label(repository), pack.digest);
            return Err(Error::new(Code::DigestMismatch, what)
                .next("it is damaged there or on the way: push the image again, or pull it from elsewhere"));
        }
        first = false;
    }
}

/// Fetches the stretches that come from the registry, in order.
async fn fetch_parts(repository: &Repository, pack: &PackRef, from: u64, parts: &[Stretch], chunks: &mpsc::Sender<Bytes>) -> Result<()> {
    let mut at = from;
    for part in parts {
        if let Stretch::Remote { length } = part {
            let mut body = repository.read(&pack.digest, at..at + length).await?.checked_by_caller();
            while let Some(chunk) = body.chunk().await? {
                if chunks.send(chunk).await.is_err() {
                    // The writer says why.
                    return Ok(());
                }
            }
        }
        at += part.length();
    }
    Ok(())
}

/// What the thread that writes a pack has to know.
struct Job {
    store: Store,
    partial: Partial,
    pack: PackRef,
    from: u64,
    parts: Vec<Stretch>,
    meter: Meter,
}

impl Job {
    /// Writes the pack; gives its digest, or none when a part was not to be had.
    fn write(mut self, chunks: mpsc::Receiver<Bytes>) -> (Partial, Result<Option<Digest>>) {
        let done = self.try_write(chunks);
        (self.partial, done)
    }

    fn try_write(&mut self, mut chunks: mpsc::Receiver<Bytes>) -> Result<Option<Digest>> {
        let Self { store, partial, pack, from, parts, meter } = self;
        let what = || format!("write pack {}", pack.digest);
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; COPY];
        let mut at = 0;
        while at < *from {
            let count = buffer.len().min(usize::try_from(*from - at).unwrap_or(usize::MAX));
            partial.file.read_exact_at(&mut buffer[..count], at).trying(what)?;
            hasher.update(&buffer[..count]);
            at += count as u64;
        }
        partial.file.set_len(*from).trying(what)?;
        partial.file.seek(SeekFrom::Start(*from)).trying(what)?;
        let mut chunk = Bytes::new();
        for part in parts {
            match part {
                Stretch::Remote { length } => {
                    let mut left = *length;
                    while left > 0 {
                        if chunk.is_empty() {
                            match chunks.blocking_recv() {
                                Some(next) => chunk = next,
                                // Who fetches says why.
                                None => return Ok(None),
                            }
                        }
                        let count = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                        let bytes = chunk.split_to(count);
                        partial.file.write_all(&bytes).trying(what)?;
                        hasher.update(&bytes);
                        meter.add(count as u64);
                        left -= count as u64;
                    }
                }
                Stretch::Local { frame } => {
                    let bytes = buffer_of(&mut buffer, frame.length as usize);
                    let source = store.open_blob(&frame.pack.digest)?;
                    if source.read_exact_at(bytes, u64::from(frame.offset)).is_err() {
                        return Ok(Some(Digest::of("a pack of this store that was cut short")));
                    }
                    partial.file.write_all(bytes).trying(what)?;
                    hasher.update(&*bytes);
                    meter.add(u64::from(frame.length));
                }
            }
        }
        Ok(Some(Digest::finish(hasher)))
    }
}

/// The first `length` bytes of a buffer that grows to have them.
fn buffer_of(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    &mut buffer[..length]
}

/// Decompresses the frames of a pack and compares the blocks, except those that
/// `local` vouches for.
pub(crate) fn check_frames(file: &File, pack: &PackRef, frames: &[Expected], local: &Local) -> Result<()> {
    let mut decoder = Decoder::new()?;
    let mut buffers: Vec<Vec<u8>> = vec![Vec::new(); BATCH];
    let strange = |(offset, length, block): &&Expected| !local.vouches(block, &Frame { pack: *pack, offset: *offset, length: *length });
    let mut strange = frames.iter().filter(strange);
    loop {
        let mut batch = Vec::with_capacity(BATCH);
        for (bytes, (offset, length, block)) in buffers.iter_mut().zip(strange.by_ref()) {
            let bytes = buffer_of(bytes, *length as usize);
            file.read_exact_at(bytes, u64::from(*offset)).trying(|| format!("read pack {}", pack.digest))?;
            batch.push(blocks::Frame { bytes, digest: *block, pack: pack.digest });
        }
        if batch.is_empty() {
            return Ok(());
        }
        decoder.decode_all(&batch).try_for_each(|block| block.map(drop))?;
    }
}

impl Store {
    /// Removes packs that nobody goes on fetching; gives how many.
    pub(crate) fn clear_partial(&self) -> Result<usize> {
        let folder = self.partial();
        let what = || format!("read {}", folder.display());
        let mut removed = 0;
        for entry in std::fs::read_dir(&folder).trying(what)? {
            let path = entry.trying(what)?.path();
            let Ok(file) = File::open(&path) else { continue };
            let old = file.metadata().and_then(|meta| meta.modified()).is_ok_and(|at| at.elapsed().is_ok_and(|age| age > STALE));
            if old && file.try_lock().is_ok() && std::fs::remove_file(&path).is_ok() {
                removed += 1;
            }
        }
        Ok(removed)
    }
}

/// Does something that blocks beside what does not.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.trying(|| "work on the store".into())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_local_frames_a_pack_is_one_stretch() {
        let local = Local::default();
        let frames = [(0, 10, Digest::of("a")), (10, 20, Digest::of("b"))];
        assert_eq!(stretches(30, 0, &frames, &local), [Stretch::Remote { length: 30 }]);
        assert_eq!(stretches(30, 12, &frames, &local), [Stretch::Remote { length: 18 }]);
        assert_eq!(stretches(30, 30, &frames, &local), []);
    }
}

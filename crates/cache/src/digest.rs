//! The digests of files, by several threads at once.
//!
//! The files are cut into segments, and each thread takes the next that is left:
//! so it makes no difference whether there is one large file or there are many.
//! A thread needs one buffer and 40 bytes for each chunk that it digested.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, PoisonError};

use kiln_model::checkpoint::{CHUNK, FileDigest};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// What a thread takes at a time: many chunks, so that no chunk is shared.
const SEGMENT: u64 = 128 * CHUNK as u64;

/// Read at once: little enough that it is still in the processor's cache when
/// it is digested.
const BUFFER: usize = 4 * CHUNK;

/// More threads than this would wait for the memory.
const THREADS: usize = 8;

/// What threads found out, by the number of the file.
type Found = BTreeMap<usize, io::Result<FileDigest>>;

/// A file, and the length that it is digested to.
pub(crate) struct Source {
    /// Open for reading.
    pub(crate) file: File,
    /// Its length in bytes.
    pub(crate) length: u64,
}

/// The digests of `sources`, in their order.
pub(crate) fn digest_all(sources: &[Source]) -> Vec<io::Result<String>> {
    let segments = sources.iter().map(|source| source.length.div_ceil(SEGMENT)).sum::<u64>();
    let left = Mutex::new(sources.iter().enumerate().flat_map(|(index, source)| {
        let starts = (0..source.length).step_by(SEGMENT as usize);
        starts.map(move |start| (index, start, source.length.min(start + SEGMENT)))
    }));
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        let mut found = Found::new();
        let mut buffer = vec![0; BUFFER];
        while let Some((index, start, end)) = next() {
            let digest = found.entry(index).or_insert_with(|| Ok(FileDigest::new()));
            if let Ok(so_far) = digest
                && let Err(error) = add_segment(&sources[index].file, so_far, start, end, &mut buffer)
            {
                *digest = Err(error);
            }
        }
        found
    };
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(THREADS).min(segments as usize);
    let mut all = Found::new();
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        merge(&mut all, work());
        for other in others {
            match other.join() {
                Ok(found) => merge(&mut all, found),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    let digest = |(index, source): (usize, &Source)| {
        let found = all.remove(&index).unwrap_or_else(|| Ok(FileDigest::new()));
        found.map(|digest| digest.finish(source.length))
    };
    sources.iter().enumerate().map(digest).collect()
}

fn merge(all: &mut Found, found: Found) {
    for (index, digest) in found {
        match all.entry(index) {
            Entry::Vacant(entry) => {
                entry.insert(digest);
            }
            Entry::Occupied(mut entry) => match (entry.get_mut(), digest) {
                (Ok(all), Ok(digest)) => all.merge(digest),
                (Ok(_), Err(error)) => drop(entry.insert(Err(error))),
                (Err(_), _) => {}
            },
        }
    }
}

/// Digests the bytes from `start` to `end`; holes are not read.
fn add_segment(file: &File, digest: &mut FileDigest, start: u64, end: u64, buffer: &mut [u8]) -> io::Result<()> {
    const WHOLE: u64 = CHUNK as u64;
    let mut at = start;
    while let Some((data, hole)) = data_after(file, at, end)? {
        // A chunk that is data in part is digested as one.
        let mut next = (data / WHOLE * WHOLE).max(at);
        let stop = hole.next_multiple_of(WHOLE).min(end);
        while next < stop {
            let length = (stop - next).min(buffer.len() as u64) as usize;
            file.read_exact_at(&mut buffer[..length], next)?;
            digest.add(next, &buffer[..length]);
            next += length as u64;
        }
        at = stop;
    }
    Ok(())
}

/// Where the next data begins and ends, between `at` and `end`. The place of
/// the descriptor is moved, which other threads do too, and nobody uses.
fn data_after(file: &File, at: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= end {
        return Ok(None);
    }
    let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => data,
        Err(Errno::NXIO) => {
            // Nothing but a hole from here on; or the file has become shorter,
            // which must not pass for zeros.
            return if file.metadata()?.len() < end { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(None) };
        }
        // A file system that cannot tell: everything has to be read.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, end))),
        Err(error) => return Err(error.into()),
    };
    if data >= end {
        return Ok(None);
    }
    let hole = match rustix::fs::seek(file, SeekFrom::Hole(data)) {
        Ok(hole) if hole > data => hole.min(end),
        Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => end,
        Err(error) => return Err(error.into()),
    };
    Ok(Some((data, hole)))
}

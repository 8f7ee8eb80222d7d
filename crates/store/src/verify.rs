//! Reading everything again.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use kiln_disk::blocks::{self, Decoder};
use kiln_disk::lanes;
use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::{BLOCK_MAP, Place};

use crate::artifacts::{self, Attached};
use crate::blobs::{Store, damaged};
use crate::blockmap::{self, MAP_LIMIT};
use crate::index::REF_NAME;
use crate::manifest::{Descriptor, MANIFEST, MANIFEST_LIMIT, Manifest, links, parse_config};

/// From how many bytes on a blob is worth a thread of its own.
const LARGE: u64 = 1 << 20;

/// What is wrong with one blob.
#[derive(Debug)]
pub struct Damage {
    /// Which.
    pub blob: Digest,
    /// What is wrong with it.
    pub error: Error,
    /// The images that need it, by name or, without one, by digest.
    pub images: Vec<String>,
}

/// What [`Store::verify`] found.
#[derive(Debug, Default)]
pub struct Verified {
    /// Blobs read.
    pub blobs: usize,
    /// Bytes read.
    pub bytes: u64,
    /// Blocks decompressed and checked.
    pub blocks: u64,
    /// Every damaged or missing blob.
    pub damaged: Vec<Damage>,
}

/// A frame of a pack, and the block it has to hold.
type Frame = (u32, u32, Digest);

/// What has to be true of the blobs.
#[derive(Default)]
struct Expected {
    /// Every blob that is needed: its size, where said, and by which images.
    blobs: BTreeMap<Digest, (Option<u64>, BTreeSet<String>)>,
    /// Frames by pack. Images share most of theirs, and each is read once.
    frames: BTreeMap<Digest, HashSet<Frame>>,
    found: Vec<(Digest, Error)>,
}

impl Store {
    /// Reads every blob again, and every block of every image through its map.
    /// `progress` is called with bytes read and bytes to read.
    ///
    /// # Errors
    /// When the index or the folder cannot be read. Damage is no error: it is
    /// in the report.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Verified> {
        let mut expected = self.expected()?;
        let what = || format!("read {}", self.blobs().display());
        let mut sizes: BTreeMap<Digest, u64> = BTreeMap::new();
        for entry in std::fs::read_dir(self.blobs()).trying(what)? {
            let entry = entry.trying(what)?;
            if let Some(digest) = entry.file_name().to_str().and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok()) {
                sizes.insert(digest, entry.metadata().map_or(0, |meta| meta.len()));
            }
        }
        let mut report = Verified { blobs: sizes.len(), bytes: sizes.values().sum(), ..Verified::default() };
        let mut found = std::mem::take(&mut expected.found);
        for (digest, (size, _)) in &expected.blobs {
            match (sizes.get(digest), size) {
                (None, _) => found.push((*digest, Error::new(Code::Corrupt, format!("blob {digest} is missing from the store")))),
                (Some(is), Some(said)) if is != said => {
                    found.push((*digest, Error::new(Code::Corrupt, format!("blob {digest} has {is} bytes and should have {said}"))));
                }
                _ => {}
            }
        }
        let blobs: Vec<(Digest, u64)> = sizes.into_iter().collect();
        let (more, blocks) = self.read_all(&blobs, &expected.frames, progress);
        found.extend(more);
        report.blocks = blocks;
        let mut named = HashSet::new();
        for (blob, error) in found {
            // The first thing that is wrong with a blob says enough.
            if named.insert(blob) {
                let images = expected.blobs.get(&blob).map(|(_, images)| images.iter().cloned().collect()).unwrap_or_default();
                report.damaged.push(Damage { blob, error, images });
            }
        }
        report.damaged.sort_by_key(|damage| damage.blob);
        Ok(report)
    }

    /// Collects what the manifests and maps promise.
    fn expected(&self) -> Result<Expected> {
        let mut expected = Expected::default();
        let index = self.index()?;
        let named = |digest: &Digest| index.manifests.iter().find(|entry| entry.digest == *digest)?.annotation(REF_NAME);
        for entry in &index.manifests {
            let name = match (entry.annotation(REF_NAME), artifacts::subject(entry)) {
                (Some(name), _) => name.to_owned(),
                (None, Some(subject)) => {
                    let image = named(&subject).map_or_else(|| subject.to_string(), Into::into);
                    format!("{} of {image}", Attached::of(entry).artifact_type)
                }
                (None, None) => entry.digest.to_string(),
            };
            expected.need(entry, &name);
            if let Err((blob, error)) = self.expect(entry, &name, &mut expected) {
                expected.found.push((blob, error));
            }
        }
        Ok(expected)
    }

    fn expect(&self, entry: &Descriptor, name: &str, expected: &mut Expected) -> Result<(), (Digest, Error)> {
        let of = |digest: Digest| move |error: Error| (digest, error);
        let bytes = self.read_blob(&entry.digest, MANIFEST_LIMIT).map_err(of(entry.digest))?;
        for blob in links(&bytes).map_err(of(entry.digest))?.needs() {
            expected.need(blob, name);
        }
        let ours = serde_json::from_slice::<serde_json::Value>(&bytes)
            .is_ok_and(|value| value.get("artifactType").and_then(|kind| kind.as_str()) == Some(kiln_model::image::IMAGE));
        if entry.media_type != MANIFEST || !ours {
            return Ok(());
        }
        let manifest = Manifest::parse(&bytes).map_err(of(entry.digest))?;
        let config = manifest.config.digest;
        let bytes = self.read_blob(&config, MANIFEST_LIMIT).map_err(of(config))?;
        let config = parse_config(&bytes, &config).map_err(of(config))?;
        for layer in manifest.layers.iter().filter(|layer| layer.media_type == BLOCK_MAP) {
            let map = self.read_blob(&layer.digest, MAP_LIMIT).and_then(|bytes| blockmap::decode(&bytes)).map_err(of(layer.digest))?;
            let digest = map.disk_digest();
            if !config.disks.iter().any(|disk| disk.digest == digest && disk.size == map.size) {
                return Err((layer.digest, Error::new(Code::Corrupt, format!("block map {} is of another disk", layer.digest))));
            }
            for block in &map.blocks {
                if let Place::Pack { pack, offset, length } = block.place
                    && let Some(pack) = map.packs.get(pack as usize)
                {
                    expected.frames.entry(pack.digest).or_default().insert((offset, length, block.digest));
                }
            }
        }
        Ok(())
    }

    /// Reads all blobs on all cores; gives what is damaged, and how many
    /// blocks were checked.
    fn read_all(
        &self,
        blobs: &[(Digest, u64)],
        frames: &BTreeMap<Digest, HashSet<Frame>>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> (Vec<(Digest, Error)>, u64) {
        let total = blobs.iter().map(|(_, size)| size).sum();
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(16);
        // Those of about one size together, to be digested side by side; but
        // few large ones are better shared out.
        let mut by_size = blobs.to_vec();
        by_size.sort_by_key(|(digest, size)| (Reverse(*size), *digest));
        let large = by_size.iter().filter(|(_, size)| *size >= LARGE).count();
        let group = lanes::at_once().min(large.div_ceil(threads)).max(1);
        let groups: Vec<&[(Digest, u64)]> = by_size.chunks(group).collect();
        let (next, done, blocks) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let found = Mutex::new(Vec::new());
        let work = || {
            while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                let files: Vec<Result<File>> = group.iter().map(|(digest, _)| self.open_blob(digest)).collect();
                let open: Vec<&File> = files.iter().flatten().collect();
                let mut digests = lanes::digests_of_files(&open).into_iter();
                for ((digest, size), file) in group.iter().zip(files) {
                    let frames = frames.get(digest);
                    let checked = file.and_then(|file| match digests.next() {
                        Some(is) => check(digest, &file, is, frames),
                        None => Err(damaged(digest)),
                    });
                    match checked {
                        Ok(()) => drop(blocks.fetch_add(frames.map_or(0, HashSet::len) as u64, Ordering::Relaxed)),
                        Err(error) => found.lock().unwrap_or_else(PoisonError::into_inner).push((*digest, error)),
                    }
                    done.fetch_add(*size, Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            let (ended, ends) = mpsc::channel::<()>();
            for _ in 0..threads {
                let (ended, work) = (ended.clone(), &work);
                scope.spawn(move || {
                    work();
                    drop(ended);
                });
            }
            drop(ended);
            while ends.recv_timeout(Duration::from_millis(100)) != Err(mpsc::RecvTimeoutError::Disconnected) {
                progress(done.load(Ordering::Relaxed), total);
            }
        });
        progress(total, total);
        (found.into_inner().unwrap_or_else(PoisonError::into_inner), blocks.into_inner())
    }
}

/// Checks one blob, whose bytes have been digested, and the frames in it.
fn check(digest: &Digest, file: &File, is: std::io::Result<(Digest, u64)>, frames: Option<&HashSet<Frame>>) -> Result<()> {
    let (is, size) = is.trying(|| format!("read blob {digest}"))?;
    if is != *digest {
        return Err(damaged(digest));
    }
    let mut frames: Vec<&Frame> = frames.into_iter().flatten().collect();
    frames.sort();
    let mut decoder = Decoder::new()?;
    for batch in frames.chunks(lanes::at_once()) {
        let mut read = Vec::with_capacity(batch.len());
        for (offset, length, block) in batch {
            if u64::from(*offset) + u64::from(*length) > size {
                return Err(damaged(digest));
            }
            let mut bytes = vec![0; *length as usize];
            file.read_exact_at(&mut bytes, u64::from(*offset)).trying(|| format!("read pack {digest}"))?;
            read.push((bytes, *block));
        }
        let frames: Vec<_> = read.iter().map(|(bytes, block)| blocks::Frame { bytes, digest: *block, pack: *digest }).collect();
        decoder.decode_all(&frames).try_for_each(|block| block.map(drop))?;
    }
    Ok(())
}

impl Expected {
    fn need(&mut self, blob: &Descriptor, image: &str) {
        let (size, images) = self.blobs.entry(blob.digest).or_default();
        size.get_or_insert(blob.size);
        images.insert(image.to_owned());
    }
}

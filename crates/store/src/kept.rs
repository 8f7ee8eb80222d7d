//! Checkpoints at a registry: the disk of a machine after a step, for machines
//! that start with nothing.
//!
//! An artifact at the tag `step-HEX` of its step's key, so that it is found
//! without a list:
//!
//! | Part | Media type | Is |
//! |---|---|---|
//! | manifest | `artifactType: application/vnd.kiln.checkpoint.v1+json` | |
//! | config | `application/vnd.kiln.checkpoint.config.v1+json` | a [`Kept`] |
//! | layers | `application/vnd.kiln.checkpoint.file.v1+zstd` | the files, in the config's order |
//!
//! A layer of the disk is the same blob in every checkpoint that has it, and is
//! sent once. The tag moves to a newer checkpoint of the same step. Whether one
//! is to be trusted is not decided here: whoever signs or checks it does so
//! with the manifest's digest, which all its bytes hang on.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path, PathBuf};

use kiln_model::checkpoint::KeptFile;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::{Digest, Key};
use kiln_registry::FileSource;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::manifest::{Descriptor, MANIFEST, MANIFEST_LIMIT, links};
use crate::place::Place as _;
use crate::place::RemotePlace;

/// What kind of artifact it is.
const CHECKPOINT: &str = "application/vnd.kiln.checkpoint.v1+json";
/// Its config.
const CONFIG: &str = "application/vnd.kiln.checkpoint.config.v1+json";
/// One of its files.
const FILE: &str = "application/vnd.kiln.checkpoint.file.v1+zstd";
/// The annotation with a file's name.
const TITLE: &str = "org.opencontainers.image.title";
/// Version of the config's format.
const FORMAT: u32 = 1;
/// Most files of a checkpoint.
const MOST: usize = 500;
/// Files are on their way for hours at most: fast is better than small.
const LEVEL: i32 = 3;

/// What a checkpoint at a registry is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    v: u32,
    /// Key of the last step in it.
    pub step: Key,
    /// Seconds since 1970 from which its age counts.
    pub made: u64,
    /// Seconds that it saves.
    pub worth: f64,
    /// The builder's own words.
    pub note: serde_json::Value,
    /// Its files.
    pub files: Vec<KeptFile>,
}

impl Kept {
    /// The checkpoint after `step`, which counts as made at `made`.
    pub fn new(step: Key, made: u64, worth: f64, note: serde_json::Value, files: Vec<KeptFile>) -> Self {
        Self { v: FORMAT, step, made, worth, note, files }
    }

    /// Bytes of all files.
    pub fn size(&self) -> u64 {
        self.files.iter().map(|file| file.length).sum()
    }

    /// Names are those of files in one folder.
    fn check(&self) -> Result<()> {
        let plain = |name: &str| {
            matches!(Path::new(name).components().collect::<Vec<_>>()[..], [Component::Normal(one)] if one == name)
                && !name.starts_with('.')
        };
        match self.files.iter().find(|file| !plain(&file.name)) {
            Some(file) => Err(Error::new(Code::Corrupt, format!("`{}` cannot be the name of a checkpoint's file", file.name))),
            None if self.files.len() > MOST => Err(Error::new(Code::Corrupt, format!("a checkpoint of more than {MOST} files"))),
            None => Ok(()),
        }
    }
}

/// A checkpoint that a registry has.
#[derive(Debug, Clone, PartialEq)]
pub struct Offered {
    /// Digest of its manifest.
    pub digest: Digest,
    /// What it says of itself.
    pub kept: Kept,
    layers: Vec<Descriptor>,
}

/// The tag of a step's checkpoint.
pub fn tag(step: &Key) -> String {
    format!("step-{}", step.hex())
}

/// The checkpoint of exactly this step, if there is one. Nothing of it is
/// trusted yet.
///
/// # Errors
/// When the registry cannot be asked; [`Code::Corrupt`] when what is at the tag
/// is no checkpoint of that step.
pub async fn offered(place: &RemotePlace, step: &Key) -> Result<Option<Offered>> {
    let Some(manifest) = place.repository().manifest(&tag(step)).await? else { return Ok(None) };
    let corrupt = |why: &str| Error::new(Code::Corrupt, format!("{}:{} is no checkpoint: {why}", place.label(), tag(step)));
    let links = links(&manifest.bytes)?;
    if links.artifact_type.as_deref() != Some(CHECKPOINT) {
        return Err(corrupt("it is another kind of artifact"));
    }
    let config = links.config.filter(|config| config.media_type == CONFIG).ok_or_else(|| corrupt("it has no config"))?;
    let bytes = place.blob(&config.digest, MANIFEST_LIMIT.min(config.size)).await?;
    let kept: Kept = serde_json::from_slice(&bytes).map_err(|error| corrupt("its config cannot be read").because(error))?;
    kept.check()?;
    if kept.v != FORMAT || kept.step != *step {
        return Err(corrupt("it is of another step, or of another version of kiln"));
    }
    let named = |(layer, file): (&Descriptor, &KeptFile)| layer.media_type == FILE && layer.annotation(TITLE) == Some(&file.name);
    if links.layers.len() != kept.files.len() || !links.layers.iter().zip(&kept.files).all(named) {
        return Err(corrupt("its layers are not its files"));
    }
    Ok(Some(Offered { digest: manifest.digest, kept, layers: links.layers }))
}

/// Writes the files of a checkpoint into an empty folder.
///
/// # Errors
/// [`Code::DigestMismatch`] when a blob's bytes are not those of its digest;
/// [`Code::Corrupt`] when a file has another length than was said.
pub async fn fetch(place: &RemotePlace, offered: &Offered, folder: &Path) -> Result<()> {
    for (layer, file) in offered.layers.iter().zip(&offered.kept.files) {
        let to = folder.join(&file.name);
        let packed = folder.join(format!("{}.zst", layer.digest.hex()));
        let what = || format!("fetch {} of {}", file.name, place.label());
        let _permit = place.repository().limit().acquire().await;
        let mut body = place.repository().read(&layer.digest, 0..u64::MAX).await?;
        let mut into = private(&packed).trying(what)?;
        while let Some(chunk) = body.chunk().await? {
            into.write_all(&chunk).trying(what)?;
        }
        drop(into);
        let length = file.length;
        let unpack = move || {
            let done = unpack(&packed, &to, length);
            drop(std::fs::remove_file(&packed));
            done
        };
        let unpacked = tokio::task::spawn_blocking(unpack).await.trying(what)?.trying(what)?;
        if unpacked != length {
            return Err(Error::new(Code::Corrupt, format!("cannot {}: it has {unpacked} bytes or more instead of {length}", what())));
        }
    }
    Ok(())
}

/// A file that its owner alone can read.
fn private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Writes what `packed` holds, and at most one byte more than `length`; gives
/// how many bytes it wrote.
fn unpack(packed: &Path, to: &Path, length: u64) -> io::Result<u64> {
    let mut from = zstd::stream::read::Decoder::new(File::open(packed)?)?.take(length.saturating_add(1));
    io::copy(&mut from, &mut private(to)?)
}

/// What was packed for a registry, so that no layer is packed twice.
#[derive(Debug, Default)]
pub struct Packed(HashMap<String, (Digest, u64, PathBuf)>);

/// Sends the checkpoint whose files are in `folder`; packs them in the folder
/// `work`. Gives the digest of its manifest, which is at no tag yet: whoever
/// signs it does so first, and then calls [`point`].
///
/// # Errors
/// When a file cannot be read, or sent.
pub async fn send(place: &RemotePlace, kept: &Kept, folder: &Path, work: &Path, packed: &mut Packed) -> Result<Digest> {
    kept.check()?;
    let mut layers = Vec::new();
    for file in &kept.files {
        let what = || format!("send {} to {}", file.name, place.label());
        let (digest, size, path) = match packed.0.get(&file.digest) {
            Some(done) => done.clone(),
            None => {
                let (from, to) = (folder.join(&file.name), work.join(format!("{}.zst", file.digest)));
                let into = to.clone();
                let (digest, size) = tokio::task::spawn_blocking(move || pack(&from, &into)).await.trying(what)?.trying(what)?;
                packed.0.insert(file.digest.clone(), (digest, size, to.clone()));
                (digest, size, to)
            }
        };
        let repository = place.repository();
        if repository.blob_size(&digest).await? != Some(size) {
            let _permit = repository.limit().acquire().await;
            repository.upload(&digest, size, &FileSource(path), &|_| ()).await?;
        }
        let mut layer = Descriptor::new(FILE, digest, size);
        layer.annotations.insert(TITLE.into(), file.name.clone());
        layers.push(layer);
    }
    let config = serde_json::to_vec(kept).trying(|| "describe a checkpoint".into())?;
    place.put_blob(&config).await?;
    let config = Descriptor::new(CONFIG, Digest::of(&config), config.len() as u64);
    let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": CHECKPOINT, "config": config, "layers": layers });
    let manifest = serde_json::to_vec(&manifest).trying(|| "describe a checkpoint".into())?;
    let digest = Digest::of(&manifest);
    place.repository().put_manifest(&digest.to_string(), MANIFEST, &manifest).await?;
    Ok(digest)
}

/// Has the tag of a step lead to a checkpoint that was sent.
///
/// # Errors
/// When the registry refuses.
pub async fn point(place: &RemotePlace, step: &Key, digest: &Digest) -> Result<()> {
    let manifest = place.manifest(digest).await?;
    place.repository().put_manifest(&tag(step), MANIFEST, &manifest).await.map(drop)
}

fn pack(from: &Path, to: &Path) -> io::Result<(Digest, u64)> {
    let into = Hashing { inner: private(to)?, hasher: Sha256::new(), size: 0 };
    let mut encoder = zstd::stream::write::Encoder::new(into, LEVEL)?;
    io::copy(&mut File::open(from)?, &mut encoder)?;
    let into = encoder.finish()?;
    Ok((Digest::finish(into.hasher), into.size))
}

/// A file that is digested while it is written.
struct Hashing {
    inner: File,
    hasher: Sha256,
    size: u64,
}

impl io::Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

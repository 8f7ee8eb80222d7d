//! The manifests of images: made once from the disk, attached beside the bill
//! of materials, and read from wherever the image is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_contents::manifest::{FILES, Known, MANIFEST, Manifest, PART, digest_files, survey};
use kiln_disk::files::{DiskFiles, Pool};
use kiln_model::home::Home;
use kiln_model::machine::Files;
use kiln_model::{Digest, Result};
use kiln_store::place::read_attached;
use kiln_store::{Artifact, Layer, Place, Store};

/// From how many files on several threads read them.
const MANY: usize = 64;
/// Most threads.
const THREADS: usize = 4;

/// Where digests of files are remembered, which lie where they lay before.
pub(crate) fn cache(home: &Home) -> PathBuf {
    home.cache().join("files")
}

/// The manifest of an image of the store, from its disk. `None` when its file
/// system cannot be read.
///
/// # Errors
/// When the disk or a package database is damaged.
pub(crate) fn of_store(store: &Store, digest: &Digest, pool: &Pool, cache: Option<&Path>) -> Result<Option<Manifest>> {
    let record = store.record(digest)?;
    of_disk(&|| DiskFiles::of_image(store.disk_source(&record)?, record.map.clone(), pool), cache)
}

/// The manifest of a disk that `open` opens.
///
/// # Errors
/// When the disk or a package database is damaged.
pub(crate) fn of_disk(open: &dyn Fn() -> Result<Option<DiskFiles>>, cache: Option<&Path>) -> Result<Option<Manifest>> {
    let Some(first) = open()? else { return Ok(None) };
    let mut known = cache.map(Known::load).unwrap_or_default();
    let surveyed = survey(&first, &known)?;
    let mut readers: Vec<Box<dyn Files>> = vec![Box::new(first)];
    let threads = if surveyed.missing() < MANY { 1 } else { std::thread::available_parallelism().map_or(1, usize::from).min(THREADS) };
    while readers.len() < threads {
        match open()? {
            Some(more) => readers.push(Box::new(more)),
            None => break,
        }
    }
    let manifest = digest_files(surveyed, &mut readers, &mut known)?;
    if let Some(path) = cache {
        // What is not remembered is read again: no reason to fail.
        drop(known.save(path));
    }
    Ok(Some(manifest))
}

/// Attaches the manifest of an image of the store to it, unless it has one.
/// `None` when it has, or when it has no file system that can be read.
///
/// # Errors
/// When the disk or a package database is damaged, or it cannot be written.
pub(crate) fn attach_once(store: &Store, digest: &Digest, pool: &Pool, cache: Option<&Path>) -> Result<Option<Digest>> {
    if store.attached(digest)?.iter().any(|attached| attached.artifact_type == MANIFEST) || store.image(digest)?.disk_digest().is_none() {
        return Ok(None);
    }
    let Some(manifest) = of_store(store, digest, pool, cache)? else { return Ok(None) };
    let mut layers = Vec::new();
    for part in manifest.parts()? {
        let mut layer = Layer::new(part.media_type, part.bytes);
        if let Some(name) = part.name.filter(|_| part.media_type == FILES) {
            layer.annotations.insert(PART.to_owned(), name.to_owned());
        }
        layers.push(layer);
    }
    let artifact = Artifact { artifact_type: MANIFEST.to_owned(), layers, annotations: BTreeMap::new(), tag: None };
    store.attach(digest, &artifact).map(Some)
}

/// The manifest that is attached to an image, if there is one.
///
/// # Errors
/// When it cannot be read, or is damaged.
pub(crate) async fn attached(place: &dyn Place, digest: &Digest) -> Result<Option<Manifest>> {
    // The newest: whoever attaches another one has a reason.
    let all = place.attached(digest).await?;
    let Some(attached) = all.iter().rev().find(|attached| attached.artifact_type == MANIFEST) else { return Ok(None) };
    let artifact = read_attached(place, attached).await?;
    Manifest::of_parts(artifact.layers.iter().map(|layer| (layer.media_type.as_str(), layer.bytes.as_slice()))).map(Some)
}

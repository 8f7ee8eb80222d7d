//! From references to images.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use kiln_model::Digest;
use kiln_model::block::BlockSource;
use kiln_model::error::{Code, Error, Result};
use kiln_model::image::{BlockMap, CREATED, Config, DiskRecord, KIND, KIND_BASE, PackRef, Place};
use kiln_model::reference::{Pointer, Reference};

use crate::artifacts::{self, Attached};
use crate::blobs::Store;
use crate::blockmap::{self, MAP_LIMIT};
use crate::index::{AT, FIXED, Index, REF_NAME, ROOT_DISK};
use crate::manifest::{Descriptor, MANIFEST, MANIFEST_LIMIT, Manifest, parse_config};

/// An image in the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// Digest of its manifest: what it is.
    pub digest: Digest,
    /// Its manifest.
    pub manifest: Manifest,
    /// Its config.
    pub config: Config,
    /// What points to it: `web:1.4.0`, `web`.
    pub names: Vec<String>,
    /// Those of its names that do not move any more, and why (`pushed`).
    pub fixed: BTreeMap<String, String>,
    /// Whether it is a disk kept for bakes to start from.
    pub base: bool,
    /// When it was last published or tagged here, RFC 3339.
    pub at: Option<String>,
    /// Bytes of all its blobs, those that it shares with other images included.
    pub size: u64,
    /// What is attached to it and says so in the index.
    pub attached: Vec<Attached>,
}

impl Image {
    /// When it was made, RFC 3339.
    pub fn created(&self) -> Option<&str> {
        self.manifest.annotations.get(CREATED).map(String::as_str)
    }

    /// Whether it was revoked itself. That it descends from an image that was
    /// is for [`crate::revoke::revoked`] to say.
    pub fn is_revoked(&self) -> bool {
        self.attached.iter().any(|attached| attached.artifact_type == crate::revoke::REVOCATION)
    }

    /// Digest of its root disk.
    pub fn disk_digest(&self) -> Option<Digest> {
        self.config.disks.iter().find(|disk| disk.root).map(|disk| disk.digest)
    }
}

/// What is in the store.
#[derive(Debug, Default)]
pub struct Listing {
    /// The images, the newest first.
    pub images: Vec<Image>,
    /// Those whose manifest or config is damaged, by digest.
    pub damaged: Vec<(Digest, Error)>,
}

/// Names near `wanted`, the nearest first, or the first few of all.
pub(crate) fn near<'a>(wanted: &str, all: impl IntoIterator<Item = &'a str>) -> String {
    let mut all: Vec<&str> = all.into_iter().collect();
    if all.len() > 5 {
        all.sort_by_key(|name| strsim::damerau_levenshtein(wanted, name));
    }
    let more = if all.len() > 5 { ", …" } else { "" };
    format!("{}{more}", all.get(..5).unwrap_or(&all).join(", "))
}

/// Nothing has this name; says what has a similar one.
pub(crate) fn unknown(index: &Index, reference: &Reference) -> Error {
    let name = &reference.name;
    let versions = index.versions(name);
    if !versions.is_empty() {
        let what = match &reference.pointer {
            Pointer::Tag(Some(tag)) => format!("{name} has no version `{tag}` in the store"),
            _ => format!("{reference} is not in the store"),
        };
        let wanted = if let Pointer::Tag(Some(tag)) = &reference.pointer { tag.as_str() } else { "" };
        return Error::new(Code::NotFound, what).next(format!("it has {}", near(wanted, versions.iter().map(|(tag, _)| *tag))));
    }
    let names: BTreeSet<&str> = index
        .manifests
        .iter()
        .filter(|entry| entry.annotation(KIND) != Some(KIND_BASE))
        .filter_map(|entry| Some(entry.annotation(REF_NAME)?.split(':').next().unwrap_or_default()))
        .collect();
    let error = Error::new(Code::NotFound, format!("no image `{name}` is in the store"));
    let close = names
        .iter()
        .filter(|other| strsim::damerau_levenshtein(name, other) <= 2 + name.len() / 5)
        .min_by_key(|other| strsim::damerau_levenshtein(name, other));
    match close {
        _ if names.is_empty() => error.next("the store is empty: `kiln bake` or `kiln import` puts an image there"),
        Some(close) => error.next(format!("did you mean `{close}`?")),
        None => error.next(format!("there are: {}", near(name, names.iter().copied()))),
    }
}

impl Store {
    /// The manifest digest that a reference means. A name alone is the image
    /// that was last published under it.
    ///
    /// # Errors
    /// [`Code::NotFound`], with the names or tags that are near.
    pub fn resolve(&self, reference: &Reference) -> Result<Digest> {
        if reference.registry.is_some() {
            let error = Error::new(Code::NotFound, format!("{reference} is at a registry, not in the store"));
            return Err(error.next("references into the store have no registry: NAME or NAME:TAG"));
        }
        let index = self.index()?;
        let entry = match &reference.pointer {
            Pointer::Tag(Some(tag)) => index.entry(&format!("{}:{tag}", reference.name)),
            Pointer::Tag(None) => index.entry(&reference.name).or_else(|| index.versions(&reference.name).first().map(|(_, entry)| *entry)),
            Pointer::Digest(digest) => index.manifests.iter().find(|entry| entry.digest == *digest),
            Pointer::Channel(channel) => {
                let head = self.chain(&reference.name, channel)?.head().map(|head| head.record().image);
                let head = head.ok_or_else(|| crate::channel::unknown(&reference.name, channel, &self.channels_of(&reference.name)))?;
                let entry = index.manifests.iter().find(|entry| entry.digest == head);
                let gone = || Error::new(Code::NotFound, format!("{reference} is {head}, which is not in the store any more"));
                Some(entry.ok_or_else(|| gone().next("`kiln rollback` goes back to the image before it"))?)
            }
        };
        entry.map(|entry| entry.digest).ok_or_else(|| unknown(&index, reference))
    }

    /// The image with this manifest digest.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::Corrupt`] when its manifest or config is
    /// damaged.
    pub fn image(&self, digest: &Digest) -> Result<Image> {
        self.image_in(&self.index()?, digest)
    }

    fn image_in(&self, index: &Index, digest: &Digest) -> Result<Image> {
        let entries: Vec<_> = index.manifests.iter().filter(|entry| entry.digest == *digest).collect();
        if entries.is_empty() {
            return Err(Error::new(Code::NotFound, format!("no image {digest} is in the store")));
        }
        let manifest = Manifest::parse(&self.read_blob(digest, MANIFEST_LIMIT)?)?;
        self.image_of(*digest, manifest, &entries, self.attached_in(index, digest))
    }

    /// What the entries of an image say of it, and its config.
    fn image_of(&self, digest: Digest, manifest: Manifest, entries: &[&Descriptor], attached: Vec<Attached>) -> Result<Image> {
        let config = parse_config(&self.read_blob(&manifest.config.digest, MANIFEST_LIMIT)?, &manifest.config.digest)?;
        let name = |entry: &&Descriptor| entry.annotation(REF_NAME).map(ToOwned::to_owned);
        let mut names: Vec<String> = entries.iter().filter_map(&name).collect();
        names.sort_by_key(|name| (!name.contains(':'), name.clone()));
        let fixed = entries.iter().filter_map(|entry| Some((name(entry)?, entry.annotation(FIXED)?.to_owned()))).collect();
        Ok(Image {
            digest,
            names,
            fixed,
            base: entries.iter().all(|entry| entry.annotation(KIND) == Some(KIND_BASE)),
            at: entries.iter().filter_map(|entry| entry.annotation(AT)).max().map(Into::into),
            size: manifest.size().saturating_add(entries.first().map_or(0, |entry| entry.size)),
            attached,
            manifest,
            config,
        })
    }

    /// All images, the newest first; with the bases that bakes start from if
    /// `bases`. Other things in the layout (a container image that somebody
    /// copied there, what is attached to an image) are passed over.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn images(&self, bases: bool) -> Result<Listing> {
        let index = self.index()?;
        let mut listing = Listing::default();
        let mut entries: HashMap<Digest, Vec<&Descriptor>> = HashMap::new();
        let mut attached: HashMap<Digest, Vec<Attached>> = HashMap::new();
        let mut order = Vec::new();
        for entry in index.manifests.iter().filter(|entry| entry.media_type == MANIFEST) {
            if let Some(subject) = artifacts::subject(entry) {
                attached.entry(subject).or_default().push(Attached::of(entry));
                continue;
            }
            let of = entries.entry(entry.digest).or_default();
            if of.is_empty() {
                order.push(entry.digest);
            }
            of.push(entry);
        }
        // Only what is no image is `None`.
        let image = |digest: &Digest, bytes: Result<Vec<u8>>| -> Option<Result<Image>> {
            let of = entries.get(digest).map(Vec::as_slice).unwrap_or_default();
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(error) => return Some(Err(error)),
            };
            match Manifest::parse(&bytes) {
                Ok(manifest) => Some(self.image_of(*digest, manifest, of, attached.get(digest).cloned().unwrap_or_default())),
                Err(_) if is_foreign(&bytes) => None,
                Err(error) => Some(Err(error)),
            }
        };
        order.retain(|digest| {
            let of = entries.get(digest).map(Vec::as_slice).unwrap_or_default();
            bases || of.iter().any(|entry| entry.annotation(KIND) != Some(KIND_BASE))
        });
        let read = in_parallel(&order, |part| {
            let few = part.chunks(64);
            few.flat_map(|few| few.iter().zip(self.read_blobs(few, MANIFEST_LIMIT))).map(|(digest, bytes)| image(digest, bytes)).collect()
        });
        for (digest, image) in order.into_iter().zip(read) {
            match image {
                Some(Ok(image)) => listing.images.push(image),
                Some(Err(error)) => listing.damaged.push((digest, error)),
                None => {}
            }
        }
        listing.images.sort_by(|a, b| b.at.cmp(&a.at).then_with(|| a.names.cmp(&b.names)));
        Ok(listing)
    }

    /// The root disk of an image. Its packs are safe from `prune` as long as
    /// this store is open.
    ///
    /// # Errors
    /// As [`Store::image`]; [`Code::Corrupt`] when its map is damaged or a pack
    /// is missing.
    pub fn record(&self, digest: &Digest) -> Result<DiskRecord> {
        let image = self.image(digest)?;
        let root = image.config.disks.iter().find(|disk| disk.root).map(|disk| disk.name.clone());
        let root = root.ok_or_else(|| no_disk(&image.config, digest))?;
        self.disk(&image, &root)
    }

    /// Whether an image is there with all that it has, its disk included where
    /// it has one.
    pub fn has_image(&self, digest: &Digest) -> bool {
        match self.image(digest) {
            Ok(image) => image.disk_digest().is_none() || self.record(digest).is_ok(),
            Err(_) => false,
        }
    }

    /// A disk of an image by its name, as [`Store::record`].
    ///
    /// # Errors
    /// As [`Store::record`].
    pub fn disk(&self, image: &Image, name: &str) -> Result<DiskRecord> {
        let wrong = |why: &str| Error::new(Code::Corrupt, format!("image {} contradicts itself: {why}", image.digest));
        let config = image.config.disks.iter().find(|disk| disk.name == name).ok_or_else(|| wrong("a disk is missing"))?;
        let layer = image.manifest.map_of(name).ok_or_else(|| wrong("a disk has no block map"))?;
        let map = blockmap::decode(&self.read_blob(&layer.digest, MAP_LIMIT.min(layer.size))?)?;
        if map.size != config.size || map.disk_digest() != config.digest {
            return Err(wrong(&format!("the block map of `{name}` is of another disk")));
        }
        let listed = |pack: &PackRef| image.manifest.layers.iter().any(|layer| layer.digest == pack.digest && layer.size == pack.size);
        if !map.packs.iter().all(listed) {
            return Err(wrong(&format!("the block map of `{name}` needs packs that are not listed")));
        }
        let there = self.hold(&map.packs)?;
        if let Some(pack) = map.packs.iter().find(|pack| !there.contains(pack)) {
            let what = format!("blob {} is missing from the store, or cut short", pack.digest);
            return Err(Error::new(Code::Corrupt, what).next("`kiln verify` names every image that is damaged"));
        }
        let (name, digest, used) = (name.to_owned(), config.digest, used(&map));
        Ok(DiskRecord { name, digest, map_digest: layer.digest, map, stored: 0, used })
    }

    /// A disk with this disk digest, root disk of any image or base, if there
    /// is one that is whole.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn find_disk(&self, disk: &Digest) -> Result<Option<DiskRecord>> {
        let text = disk.to_string();
        let index = self.index()?;
        let entries = index.manifests.iter().filter(|entry| entry.annotation(ROOT_DISK) == Some(&text));
        Ok(entries.filter_map(|entry| self.record(&entry.digest).ok()).find(|record| record.digest == *disk))
    }

    /// The images whose root disk has this digest, bases included.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn images_with(&self, disk: &Digest) -> Result<Vec<Digest>> {
        let text = disk.to_string();
        let index = self.index()?;
        let mut images: Vec<Digest> =
            index.manifests.iter().filter(|entry| entry.annotation(ROOT_DISK) == Some(&text)).map(|entry| entry.digest).collect();
        images.sort();
        images.dedup();
        Ok(images)
    }

    /// The content of a disk, read at any place and checked block by block.
    ///
    /// # Errors
    /// When the lease cannot be written.
    pub fn disk_source(&self, record: &DiskRecord) -> Result<Box<dyn BlockSource>> {
        self.hold(&record.map.packs)?;
        let packs = std::sync::Arc::new(crate::disk::StorePacks::new(self));
        Ok(Box::new(kiln_disk::blocks::MapSource::new(std::sync::Arc::new(record.map.clone()), packs)?))
    }
}

/// Does `work` for parts of `digests`, on all processors when there are many;
/// gives the results in their order.
fn in_parallel<T: Send>(digests: &[Digest], work: impl Fn(&[Digest]) -> Vec<T> + Sync) -> Vec<T> {
    const FEW: usize = 32;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let parts = digests.chunks(digests.len().div_ceil(threads).max(FEW));
        let work = &work;
        let running: Vec<_> = parts.map(|part| scope.spawn(move || work(part))).collect();
        let done = running.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        done.flatten().collect()
    })
}

/// The error of an image whose root disk is not there: at a cloud, it need not
/// be.
pub(crate) fn no_disk(config: &Config, digest: &Digest) -> Error {
    match config.cloud.first() {
        Some(image) => Error::new(
            Code::NotFound,
            format!("{}:{} is {} in {}, and its disk was not brought here", config.name, config.version, image.id, image.region),
        )
        .next("bake it with --fetch, which reads its disk back; or use it at its cloud"),
        None => Error::new(Code::Corrupt, format!("image {digest} has no root disk")),
    }
}

/// Bytes of blocks that are not zero.
pub(crate) fn used(map: &BlockMap) -> u64 {
    map.blocks.iter().filter(|block| block.place != Place::Zero).count() as u64 * kiln_model::block::BLOCK
}

/// Whether a manifest is sound, and no kiln image.
fn is_foreign(bytes: &[u8]) -> bool {
    let value = serde_json::from_slice::<serde_json::Value>(bytes);
    value.is_ok_and(|value| value.get("artifactType").and_then(|kind| kind.as_str()) != Some(kiln_model::image::IMAGE))
}

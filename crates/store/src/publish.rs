//! Publishing images, and the names that point to them.

use std::collections::BTreeMap;
use std::fmt;

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::{CONFIG, CREATED, Config, DiskRecord, KIND, KIND_BASE, PackRef};
use kiln_model::reference::{Pointer, Reference, check_name, check_tag};

use crate::artifacts::EMPTY_BYTES;
use crate::blobs::Store;
use crate::index::{AT, BASE_DISK, CONFIG_DIGEST, FIXED, Index, REF_NAME, ROOT_DISK};
use crate::manifest::{Descriptor, MANIFEST, MANIFEST_LIMIT, Manifest, TITLE};

/// What to publish.
#[derive(Debug, Clone)]
pub struct Publish<'a> {
    /// The image's config; its disks are those of `disks`, in the same order.
    pub config: &'a Config,
    /// Its disks, as [`kiln_model::block::ImageSink::write_disk`] of this store
    /// gave them.
    pub disks: &'a [DiskRecord],
    /// Annotations of the manifest, such as the bake id. The time is added. An
    /// image whose [`KIND`] is [`KIND_BASE`] is hidden by [`Store::images`].
    pub annotations: &'a BTreeMap<String, String>,
    /// Tags beside the version.
    pub tags: &'a [String],
}

/// An image that was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Digest of its manifest.
    pub digest: Digest,
    /// Whether the same image was there already.
    pub existed: bool,
    /// Tags that pointed elsewhere before. Worth saying.
    pub moved: Vec<Moved>,
}

/// A tag that moved. Displays as `web:1.4.0 was sha256:ab…, now sha256:cd…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// The name and tag.
    pub name: String,
    /// Manifest digest before.
    pub from: Digest,
    /// Manifest digest now.
    pub to: Digest,
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was sha256:{}…, now sha256:{}…", self.name, self.from.short(), self.to.short())
    }
}

fn usage(why: &str) -> Error {
    Error::new(Code::Usage, why)
}

/// Now, in RFC 3339, always with nine digits of the second so that texts sort
/// as times do.
pub(crate) fn now() -> String {
    format!("{:.9}", jiff::Timestamp::now())
}

/// `name:tag` of a reference into this store.
pub(crate) fn tagged(reference: &Reference) -> Result<String> {
    match (&reference.registry, &reference.pointer) {
        (None, Pointer::Tag(Some(tag))) => Ok(format!("{}:{tag}", reference.name)),
        (Some(_), _) => Err(usage("the store has short names alone, without a registry")),
        _ => Err(usage("a tag is needed here").next(format!("write {}:TAG", reference.name))),
    }
}

impl Store {
    /// Makes an image of disks that are in the store and points its version,
    /// the bare name and `tags` to it. An image with the same config that is
    /// there already (whatever its time and bake id) is taken instead of a new
    /// one, so that the same content keeps its digest.
    ///
    /// # Errors
    /// [`Code::Refused`] when the version is fixed and has other content,
    /// [`Code::Usage`] when a name or tag is none, [`Code::Corrupt`] when a
    /// blob of the disks is missing.
    pub fn publish_as(&self, publish: &Publish<'_>) -> Result<Named> {
        self.publish_with(publish, true)
    }

    /// As [`Store::publish_as`], but nothing points to the image: it is found by
    /// its digest, until `prune`.
    ///
    /// # Errors
    /// As [`Store::publish_as`].
    pub fn publish_quietly(&self, publish: &Publish<'_>) -> Result<Digest> {
        self.publish_with(publish, false).map(|named| named.digest)
    }

    fn publish_with(&self, publish: &Publish<'_>, named: bool) -> Result<Named> {
        let Publish { config, disks, .. } = publish;
        check_name(&config.name).map_err(|why| usage(&format!("`{}` cannot name an image: {why}", config.name)))?;
        for tag in std::iter::once(&config.version).chain(publish.tags) {
            self.may_tag(&config.name, tag)?;
            check_tag(tag).map_err(|why| usage(&format!("`{tag}` cannot be a version or tag: {why}")))?;
        }
        let same = |(disk, said): (&DiskRecord, &kiln_model::image::DiskConfig)| {
            disk.name == said.name && disk.digest == said.digest && disk.map.size == said.size
        };
        if disks.len() != config.disks.len() || !disks.iter().zip(&config.disks).all(same) {
            return Err(Error::new(Code::Failed, "the config of an image names other disks than it has"));
        }
        let bytes = serde_json::to_vec(config).trying(|| "write the config".into())?;
        if bytes.len() as u64 > MANIFEST_LIMIT {
            return Err(usage("the config of the image is larger than 4 MiB").next("give it fewer labels or steps"));
        }
        let config_digest = self.write_blob(&bytes)?;
        let manifest = self.manifest(publish, Descriptor::new(CONFIG, config_digest, bytes.len() as u64))?;
        let bytes = serde_json::to_vec(&manifest).trying(|| "write the manifest".into())?;
        if bytes.len() as u64 > MANIFEST_LIMIT {
            return Err(usage("the manifest of the image is larger than 4 MiB").next("give it fewer annotations"));
        }
        let existing = self.same_config(&self.index()?, &config.name, &config_digest);
        let new = match &existing {
            Some(entry) => entry.clone(),
            None => Descriptor::new(MANIFEST, self.write_blob(&bytes)?, bytes.len() as u64),
        };
        self.update(|index| {
            // Another bake of the same may have been faster.
            let existing = self.same_config(index, &config.name, &config_digest);
            let mut entry = existing.clone().unwrap_or(new);
            entry.annotations.retain(|key, _| ![REF_NAME, FIXED, KIND].contains(&key.as_str()));
            entry.annotations.insert(AT.into(), now());
            entry.annotations.insert(CONFIG_DIGEST.into(), config_digest.to_string());
            if let Some(root) = config.as_base() {
                entry.annotations.insert(ROOT_DISK.into(), root.to_string());
            }
            if let Some(base) = config.base {
                entry.annotations.insert(BASE_DISK.into(), base.to_string());
            }
            if publish.annotations.get(KIND).is_some_and(|kind| kind == KIND_BASE) {
                entry.annotations.insert(KIND.into(), KIND_BASE.into());
            }
            if !named {
                // What has a name already keeps it.
                if existing.is_none() {
                    index.manifests.push(entry.clone());
                }
                return Ok(Named { digest: entry.digest, existed: existing.is_some(), moved: Vec::new() });
            }
            let names = std::iter::once(&config.version).chain(publish.tags).map(|tag| format!("{}:{tag}", config.name));
            let mut moved = Vec::new();
            for name in names {
                moved.extend(point(index, &name, &entry)?);
            }
            index.point(&config.name, entry.clone());
            Ok(Named { digest: entry.digest, existed: existing.is_some(), moved })
        })
    }

    fn manifest(&self, publish: &Publish<'_>, config: Descriptor) -> Result<Manifest> {
        let mut sizes = Vec::new();
        let mut needed = Vec::new();
        for disk in publish.disks {
            let size = std::fs::metadata(self.blob_path(&disk.map_digest)).map_or(0, |meta| meta.len());
            needed.push(PackRef { digest: disk.map_digest, size });
            needed.extend(&disk.map.packs);
            sizes.push(size);
        }
        if publish.disks.is_empty() {
            self.write_blob(EMPTY_BYTES)?;
        }
        let there = self.hold(&needed)?;
        if let Some(missing) = needed.iter().find(|blob| !there.contains(blob)) {
            return Err(Error::new(Code::Corrupt, format!("blob {} of a disk is missing from the store", missing.digest))
                .next("bake again: what is missing is stored again"));
        }
        let mut annotations = publish.annotations.clone();
        annotations.entry(CREATED.into()).or_insert_with(now);
        annotations.entry(TITLE.into()).or_insert_with(|| format!("{}:{}", publish.config.name, publish.config.version));
        Manifest::of(config, publish.disks, &sizes, annotations)
    }

    /// An image of this name with this config whose blobs are all there.
    fn same_config(&self, index: &Index, name: &str, config: &Digest) -> Option<Descriptor> {
        let mine = |entry: &&Descriptor| {
            entry
                .annotation(REF_NAME)
                .is_none_or(|full| full.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(':')))
        };
        let whole = |entry: &&Descriptor| {
            let manifest = self.read_blob(&entry.digest, MANIFEST_LIMIT).and_then(|bytes| Manifest::parse(&bytes));
            manifest.is_ok_and(|manifest| {
                manifest.config.digest == *config
                    && self.hold(&[PackRef { digest: entry.digest, size: entry.size }]).is_ok_and(|there| !there.is_empty())
                    && manifest.blobs().all(|blob| self.has_blob(&blob.digest, blob.size))
            })
        };
        let text = config.to_string();
        let hopeful = |entry: &&Descriptor| entry.annotation(CONFIG_DIGEST).is_none_or(|said| said == text);
        index.manifests.iter().rev().filter(mine).filter(hopeful).find(whole).cloned()
    }

    /// Points `to` at the image of `reference`.
    ///
    /// # Errors
    /// As [`Store::resolve`]; [`Code::Refused`] when `to` is fixed elsewhere.
    pub fn tag(&self, reference: &Reference, to: &Reference) -> Result<Option<Moved>> {
        let name = tagged(to)?;
        if let Pointer::Tag(Some(tag)) = &to.pointer {
            self.may_tag(&to.name, tag)?;
        }
        let digest = self.resolve(reference)?;
        self.update(|index| {
            let entry = index.manifests.iter().find(|entry| entry.digest == digest);
            let mut entry = entry.cloned().ok_or_else(|| Error::new(Code::NotFound, format!("{reference} was removed meanwhile")))?;
            entry.annotations.remove(FIXED);
            entry.annotations.insert(AT.into(), now());
            let moved = point(index, &name, &entry)?;
            if index.entry(&to.name).is_none() {
                index.point(&to.name, entry);
            }
            Ok(moved)
        })
    }

    /// Refuses tags that mean something else: names of channels, and what kiln
    /// and cosign keep at tags of a registry.
    ///
    /// # Errors
    /// [`Code::Usage`] with what it means.
    pub fn may_tag(&self, name: &str, tag: &str) -> Result<()> {
        crate::channel::not_reserved(tag)?;
        if kiln_model::reference::check_channel(tag).is_ok() && self.channels_of(name).iter().any(|channel| channel == tag) {
            return Err(crate::channel::is_a_channel(name, tag));
        }
        Ok(())
    }

    /// Keeps a manifest and all that it needs from [`Store::prune`], as long as
    /// this store is open.
    ///
    /// # Errors
    /// When the lease cannot be written.
    pub fn protect(&self, manifest: &Digest) -> Result<()> {
        self.hold(&[PackRef { digest: *manifest, size: 0 }]).map(|_| ())
    }

    /// Removes a tag. The image stays, under its digest, until `prune`; the bare
    /// name goes to the newest version that is left. A fixed tag is removed
    /// only with `fixed_too`.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::Refused`] when it is fixed.
    pub fn untag(&self, reference: &Reference, fixed_too: bool) -> Result<Digest> {
        let name = tagged(reference)?;
        self.update(|index| {
            if let Some(why) = index.entry(&name).and_then(|entry| entry.annotation(FIXED))
                && !fixed_too
            {
                return Err(Error::new(Code::Refused, format!("{name} was {why}, and stays")));
            }
            let Some(removed) = index.remove(&name) else { return Err(crate::resolve::unknown(index, reference)) };
            let bare_moves = index.entry(&reference.name).is_some_and(|bare| bare.digest == removed.digest)
                && !index.versions(&reference.name).iter().any(|(_, entry)| entry.digest == removed.digest);
            if bare_moves {
                match index.versions(&reference.name).first().map(|(_, entry)| (*entry).clone()) {
                    Some(mut newest) => {
                        newest.annotations.remove(FIXED);
                        index.point(&reference.name, newest);
                    }
                    None => drop(index.remove(&reference.name)),
                }
            }
            Ok(removed.digest)
        })
    }

    /// Makes a version tag immutable: it was `why` (`pushed`, `promoted`,
    /// `published`). Saying it again changes nothing.
    ///
    /// # Errors
    /// [`Code::NotFound`] when there is no such tag.
    pub fn fix(&self, reference: &Reference, why: &str) -> Result<()> {
        let name = tagged(reference)?;
        self.update(|index| match index.entry_mut(&name) {
            Some(entry) => {
                entry.annotations.entry(FIXED.into()).or_insert_with(|| why.into());
                Ok(())
            }
            None => Err(crate::resolve::unknown(index, reference)),
        })
    }
}

/// Points a tag somewhere unless it is fixed elsewhere.
pub(crate) fn point(index: &mut Index, name: &str, to: &Descriptor) -> Result<Option<Moved>> {
    let mut to = to.clone();
    if let Some(before) = index.entry(name)
        && let Some(why) = before.annotation(FIXED)
    {
        if before.digest != to.digest {
            let what = format!("{name} was {why} as sha256:{}… and never changes", before.digest.short());
            return Err(Error::new(Code::Refused, what).next("give the new content another version"));
        }
        to.annotations.insert(FIXED.into(), why.into());
    }
    let digest = to.digest;
    let from = index.point(name, to).filter(|from| *from != digest);
    Ok(from.map(|from| Moved { name: name.into(), from, to: digest }))
}

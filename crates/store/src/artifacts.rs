//! What is attached to an image: signatures, statements, bills of materials,
//! revocations.
//!
//! An artifact is a manifest of its own that names the image as its `subject`.
//! In the layout it is an entry of `index.json` without a name, found by the
//! annotation [`SUBJECT`], so that looking for it opens no blob; it lives as
//! long as its subject. The one exception is cosign's older form, which has no
//! subject and is found by a tag made of the image's digest; its entry says
//! that tag, for the day it goes to a registry.

use std::collections::BTreeMap;

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use serde_json::json;

use crate::blobs::Store;
use crate::index::{AT, CONFIG_DIGEST, Index, REF_NAME};
use crate::manifest::{Descriptor, MANIFEST, MANIFEST_LIMIT, links};

/// Annotation of an entry: digest of what it is attached to.
pub(crate) const SUBJECT: &str = "vnd.kiln.subject";
/// Annotation of an entry: the tag by which it is found in a registry.
pub(crate) const TAG: &str = "vnd.kiln.tag";
/// Field of an entry: what kind of artifact it is.
const ARTIFACT_TYPE: &str = "artifactType";

/// Media type of the config of an artifact that has none.
pub const EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// That config.
pub(crate) const EMPTY_BYTES: &[u8] = b"{}";
/// Media type of a container image's config; cosign's older form has one.
const CONTAINER_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Most layers of an artifact.
const MAX_LAYERS: usize = 1000;

/// One layer of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// What it is.
    pub media_type: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What else is said of it.
    pub annotations: BTreeMap<String, String>,
}

impl Layer {
    /// A layer without annotations.
    pub fn new(media_type: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        Self { media_type: media_type.into(), bytes: bytes.into(), annotations: BTreeMap::new() }
    }
}

/// Something to attach to an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// What kind it is.
    pub artifact_type: String,
    /// One or more.
    pub layers: Vec<Layer>,
    /// Annotations of its manifest.
    pub annotations: BTreeMap<String, String>,
    /// For cosign's older form, the tag (`sha256-<hex>.sig`): then it has no
    /// subject, and layers that are at this tag already stay.
    pub tag: Option<String>,
}

/// Something that is attached to an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Digest of its manifest.
    pub digest: Digest,
    /// What kind it is. An artifact of cosign's older form says none, and has
    /// the media type of its first layer here.
    pub artifact_type: String,
    /// Annotations of its manifest.
    pub annotations: BTreeMap<String, String>,
    /// The tag that finds it, where it has no subject.
    pub tag: Option<String>,
}

/// A manifest to be written, and the blobs that it names.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) manifest: Vec<u8>,
    pub(crate) blobs: Vec<Vec<u8>>,
}

impl Artifact {
    /// What has to be written so that this is attached to `subject`.
    /// `present` is the manifest that is at the tag now, if there is a tag.
    pub(crate) fn build(&self, subject: &Descriptor, present: Option<&[u8]>) -> Result<Built> {
        if self.layers.is_empty() {
            return Err(Error::new(Code::Usage, format!("an artifact of type {} without a layer", self.artifact_type)));
        }
        let descriptor = |layer: &Layer| Descriptor {
            annotations: layer.annotations.clone(),
            ..Descriptor::new(&layer.media_type, Digest::of(&layer.bytes), layer.bytes.len() as u64)
        };
        let mut layers: Vec<Descriptor> = Vec::new();
        if let Some(present) = present {
            layers = links(present)?.layers;
        }
        for layer in self.layers.iter().map(descriptor) {
            // What is signed again with the same key need not be there twice.
            if !layers.contains(&layer) {
                layers.push(layer);
            }
        }
        if layers.len() > MAX_LAYERS {
            return Err(Error::new(Code::Refused, format!("more than {MAX_LAYERS} signatures at one tag")));
        }
        let mut blobs: Vec<Vec<u8>> = self.layers.iter().map(|layer| layer.bytes.clone()).collect();
        let manifest = if self.tag.is_some() {
            let created = "0001-01-01T00:00:00Z";
            let config = serde_json::to_vec(&json!({
                "architecture": "", "created": created, "os": "", "config": {},
                "history": layers.iter().map(|_| json!({ "created": created })).collect::<Vec<_>>(),
                "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| layer.digest).collect::<Vec<_>>() },
            }))
            .trying(|| "write a config".into())?;
            let entry = Descriptor::new(CONTAINER_CONFIG, Digest::of(&config), config.len() as u64);
            blobs.push(config);
            json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": entry, "layers": layers })
        } else {
            blobs.push(EMPTY_BYTES.to_vec());
            json!({
                "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": self.artifact_type, "config": empty_config(),
                "layers": layers, "subject": bare(subject),
            })
        };
        let mut manifest = manifest;
        if let (false, Some(object)) = (self.annotations.is_empty(), manifest.as_object_mut()) {
            object.insert("annotations".into(), json!(self.annotations));
        }
        let manifest = serde_json::to_vec(&manifest).trying(|| "write a manifest".into())?;
        if manifest.len() as u64 > MANIFEST_LIMIT {
            return Err(Error::new(Code::Usage, "the manifest of an artifact would be larger than 4 MiB"));
        }
        Ok(Built { manifest, blobs })
    }
}

/// The descriptor of the empty config, which carries its two bytes.
pub(crate) fn empty_config() -> serde_json::Value {
    json!({ "mediaType": EMPTY, "digest": Digest::of(EMPTY_BYTES), "size": EMPTY_BYTES.len(), "data": "e30=" })
}

/// The empty config's bytes.
pub(crate) const fn empty_bytes() -> &'static [u8] {
    EMPTY_BYTES
}

/// Of a descriptor what a `subject` needs.
fn bare(descriptor: &Descriptor) -> Descriptor {
    Descriptor::new(&descriptor.media_type, descriptor.digest, descriptor.size)
}

/// What kind of artifact a manifest is, and its annotations.
pub(crate) fn kind(manifest: &[u8]) -> Result<(String, BTreeMap<String, String>)> {
    let links = links(manifest)?;
    let config = links.config.map(|config| config.media_type).unwrap_or_default();
    let first = || links.layers.first().map(|layer| layer.media_type.clone()).unwrap_or_default();
    let kind = match links.artifact_type {
        Some(kind) if !kind.is_empty() => kind,
        _ if config == CONTAINER_CONFIG || config == EMPTY => first(),
        _ => config,
    };
    Ok((kind, links.annotations))
}

impl Attached {
    /// Of an entry of the index that says what it is attached to.
    pub(crate) fn of(entry: &Descriptor) -> Self {
        let own = |key: &str| [SUBJECT, TAG, AT, REF_NAME].contains(&key);
        Self {
            digest: entry.digest,
            artifact_type: entry.other.get(ARTIFACT_TYPE).and_then(|kind| kind.as_str()).unwrap_or_default().to_owned(),
            annotations: entry.annotations.iter().filter(|(key, _)| !own(key)).map(|(k, v)| (k.clone(), v.clone())).collect(),
            tag: entry.annotation(TAG).map(Into::into),
        }
    }
}

/// The digest that an entry says it is attached to.
pub(crate) fn subject(entry: &Descriptor) -> Option<Digest> {
    entry.annotation(SUBJECT)?.parse().ok()
}

/// Whether an entry may be attached to something without saying so: nobody has
/// named it, and kiln has not made it.
fn unknown(entry: &Descriptor) -> bool {
    entry.media_type == MANIFEST && [REF_NAME, CONFIG_DIGEST, SUBJECT].iter().all(|key| entry.annotation(key).is_none())
}

impl Store {
    /// What is attached to the manifest `subject`, the oldest first.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn attached(&self, subject: &Digest) -> Result<Vec<Attached>> {
        Ok(self.attached_in(&self.index()?, subject))
    }

    pub(crate) fn attached_in(&self, index: &Index, to: &Digest) -> Vec<Attached> {
        let text = to.to_string();
        let of = |entry: &Descriptor| {
            if entry.annotation(SUBJECT) == Some(&text) {
                return Some(Attached::of(entry));
            }
            // Another program has put it there. One that is damaged says
            // nothing; `verify` names it.
            let bytes = unknown(entry).then(|| self.read_blob(&entry.digest, MANIFEST_LIMIT).ok())??;
            let (artifact_type, annotations) = (links(&bytes).ok()?.subject? == *to).then(|| kind(&bytes).ok())??;
            Some(Attached { digest: entry.digest, artifact_type, annotations, tag: None })
        };
        index.manifests.iter().filter_map(of).collect()
    }

    /// The images that a revocation is attached to.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn revoked_images(&self) -> Result<std::collections::HashSet<Digest>> {
        let revoked = |entry: &Descriptor| entry.other.get(ARTIFACT_TYPE).and_then(|kind| kind.as_str()) == Some(crate::revoke::REVOCATION);
        Ok(self.index()?.manifests.iter().filter(|entry| revoked(entry)).filter_map(subject).collect())
    }

    /// Attaches an artifact to a manifest of this store. Attaching the same
    /// again changes nothing.
    ///
    /// # Errors
    /// [`Code::NotFound`] when the store has no such manifest.
    pub fn attach(&self, subject: &Digest, artifact: &Artifact) -> Result<Digest> {
        loop {
            let index = self.index()?;
            let to = self.subject_in(&index, subject)?;
            let present = match &artifact.tag {
                Some(tag) => tagged(&index, subject, tag).map(|entry| entry.digest),
                None => None,
            };
            let bytes = present.map(|digest| self.read_blob(&digest, MANIFEST_LIMIT)).transpose()?;
            let built = artifact.build(&to, bytes.as_deref())?;
            for blob in &built.blobs {
                self.write_blob(blob)?;
            }
            // Somebody else may have signed in between.
            if let Some(digest) = self.put_attached(subject, &built.manifest, artifact.tag.as_deref(), Some(present))? {
                return Ok(digest);
            }
        }
    }

    /// Attaches a manifest as it is, such as one that was copied from
    /// elsewhere. The blobs that it names have to be in the store.
    ///
    /// # Errors
    /// [`Code::NotFound`] when the store has no manifest `subject`;
    /// [`Code::Corrupt`] when this one is attached to another, or a blob is
    /// missing.
    pub fn attach_manifest(&self, subject: &Digest, manifest: &[u8], tag: Option<&str>) -> Result<Digest> {
        let digest = Digest::of(manifest);
        let links = links(manifest)?;
        if links.subject.is_some_and(|other| other != *subject) || tag.is_none() && links.subject.is_none() {
            return Err(Error::new(Code::Corrupt, format!("the artifact {digest} is not attached to {subject}")));
        }
        let needed: Vec<_> = links.needs().map(|blob| kiln_model::image::PackRef { digest: blob.digest, size: blob.size }).collect();
        let there = self.hold(&needed)?;
        if let Some(missing) = needed.iter().find(|blob| !there.contains(blob)) {
            return Err(Error::new(Code::Corrupt, format!("blob {} of the artifact {digest} is missing from the store", missing.digest)));
        }
        self.put_attached(subject, manifest, tag, None)?;
        Ok(digest)
    }

    /// Writes a manifest and its entry. With a tag, only if what the tag finds
    /// is still `expected`, where that is said; `None` when it is not.
    fn put_attached(
        &self,
        subject: &Digest,
        manifest: &[u8],
        tag: Option<&str>,
        expected: Option<Option<Digest>>,
    ) -> Result<Option<Digest>> {
        let (artifact_type, annotations) = kind(manifest)?;
        let digest = self.write_blob(manifest)?;
        self.update(|index| {
            self.subject_in(index, subject)?;
            let present = tag.and_then(|tag| tagged(index, subject, tag)).map(|entry| entry.digest);
            if expected.is_some_and(|expected| expected != present) {
                return Ok(None);
            }
            if index.manifests.iter().any(|entry| entry.digest == digest && entry.annotation(SUBJECT).is_some()) {
                return Ok(Some(digest));
            }
            let mut entry = Descriptor::new(MANIFEST, digest, manifest.len() as u64);
            entry.annotations = annotations;
            entry.annotations.insert(SUBJECT.into(), subject.to_string());
            entry.annotations.insert(AT.into(), crate::publish::now());
            entry.other.insert(ARTIFACT_TYPE.into(), artifact_type.into());
            if let Some(tag) = tag {
                entry.annotations.insert(TAG.into(), tag.into());
            }
            index.manifests.retain(|other| other.digest != digest && present != Some(other.digest));
            index.manifests.push(entry);
            Ok(Some(digest))
        })
    }

    fn subject_in(&self, index: &Index, subject: &Digest) -> Result<Descriptor> {
        let entry = index.manifests.iter().find(|entry| entry.digest == *subject).cloned();
        // An image of an index has no entry of its own.
        let child = || {
            let size = std::fs::metadata(self.blob_path(subject)).ok()?.len();
            (size <= MANIFEST_LIMIT && index.manifests.iter().any(|entry| self.is_child(entry, subject)))
                .then(|| Descriptor::new(MANIFEST, *subject, size))
        };
        entry.or_else(child).ok_or_else(|| Error::new(Code::NotFound, format!("no image {subject} is in the store")))
    }

    /// Whether an entry is an index of several images, one of which is `digest`.
    fn is_child(&self, entry: &Descriptor, digest: &Digest) -> bool {
        entry.media_type == crate::manifest::INDEX
            && self
                .read_blob(&entry.digest, MANIFEST_LIMIT)
                .and_then(|bytes| links(&bytes))
                .is_ok_and(|links| links.manifests.iter().any(|child| child.digest == *digest))
    }
}

/// The entry that a tag finds.
fn tagged<'a>(index: &'a Index, subject: &Digest, tag: &str) -> Option<&'a Descriptor> {
    let subject = subject.to_string();
    index.manifests.iter().find(|entry| entry.annotation(TAG) == Some(tag) && entry.annotation(SUBJECT) == Some(&subject))
}

//! Where images are: the store, or a repository of a registry, behind one
//! trait, so that whoever promotes, signs or compares need not know which.

pub(crate) mod remote;

use std::collections::BTreeMap;

use async_trait::async_trait;
use kiln_model::Digest;
use kiln_model::channel::ChannelBackend;
use kiln_model::error::{Code, Error, Result};
use kiln_model::image::{Config, IMAGE};
use kiln_model::reference::Reference;

use crate::artifacts::{Artifact, Attached, Layer};
use crate::blobs::Store;
use crate::manifest::{Descriptor, INDEX, MANIFEST_LIMIT, Manifest, links, parse_config};
pub use crate::place::remote::RemotePlace;

/// Most bytes of an artifact's layer that is read into memory.
pub const LAYER_LIMIT: u64 = 64 * 1024 * 1024;

/// Where images are.
#[async_trait]
pub trait Place: Send + Sync {
    /// For people: `the store`, `r.example/shop/web`.
    fn label(&self) -> String;

    /// The manifest digest that a reference means: a tag, a digest, a channel.
    ///
    /// # Errors
    /// [`Code::NotFound`], with what is near.
    async fn resolve(&self, reference: &Reference) -> Result<Digest>;

    /// The bytes of a manifest, checked against its digest.
    ///
    /// # Errors
    /// [`Code::NotFound`] when it is not there.
    async fn manifest(&self, digest: &Digest) -> Result<Vec<u8>>;

    /// The bytes of a small blob, checked against its digest.
    ///
    /// # Errors
    /// When it is not there, damaged, or larger than `limit` bytes.
    async fn blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>>;

    /// What is attached to a manifest.
    ///
    /// # Errors
    /// When that cannot be read.
    async fn attached(&self, subject: &Digest) -> Result<Vec<Attached>>;

    /// Attaches an artifact to a manifest that is there.
    ///
    /// # Errors
    /// [`Code::NotFound`] when the manifest is not there.
    async fn attach(&self, subject: &Digest, artifact: &Artifact) -> Result<Digest>;

    /// The images that are here; in a registry those that have a tag.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn images(&self) -> Result<Vec<Held>>;

    /// The images whose root disk has this digest, where that can be told
    /// without reading every image: a registry cannot be asked, and gives none.
    ///
    /// # Errors
    /// When the store cannot be read.
    async fn with_disk(&self, disk: &Digest) -> Result<Vec<Digest>>;

    /// The channels of this place.
    fn channels(&self) -> &dyn ChannelBackend;
}

/// An image that is somewhere.
#[derive(Debug, Clone)]
pub struct Held {
    /// Digest of its manifest.
    pub digest: Digest,
    /// What points to it, as a reference would say it (`web:1.4.0`).
    pub names: Vec<String>,
    /// Its manifest.
    pub manifest: Manifest,
    /// Its config.
    pub config: Config,
}

impl Held {
    /// Digest of its root disk.
    pub fn disk_digest(&self) -> Option<Digest> {
        self.config.disks.iter().find(|disk| disk.root).map(|disk| disk.digest)
    }
}

/// The images behind a manifest digest: one, or one for each architecture when
/// it is an index of several.
///
/// # Errors
/// [`Code::NotFound`]; [`Code::Corrupt`] when it is no kiln image.
pub async fn images_of(place: &dyn Place, digest: &Digest) -> Result<Vec<Held>> {
    let bytes = place.manifest(digest).await?;
    let head = links(&bytes)?;
    if head.artifact_type.as_deref() == Some(IMAGE) || head.manifests.is_empty() {
        return Ok(vec![held(place, digest, &bytes).await?]);
    }
    let mut images = Vec::new();
    for part in &head.manifests {
        // What other tools put into an index beside the images.
        let kind = part.other.get("artifactType").and_then(|kind| kind.as_str());
        if part.media_type == INDEX || kind.is_some_and(|kind| kind != IMAGE) {
            continue;
        }
        images.push(held(place, &part.digest, &place.manifest(&part.digest).await?).await?);
    }
    if images.is_empty() {
        return Err(Error::new(Code::Corrupt, format!("{digest} is an index without a kiln image")));
    }
    Ok(images)
}

/// An image, of its manifest's bytes.
pub(crate) async fn held(place: &dyn Place, digest: &Digest, manifest: &[u8]) -> Result<Held> {
    let manifest = Manifest::parse(manifest)?;
    let Descriptor { digest: config, size, .. } = &manifest.config;
    let config = parse_config(&place.blob(config, MANIFEST_LIMIT.min(*size)).await?, config)?;
    Ok(Held { digest: *digest, names: Vec::new(), manifest, config })
}

/// The whole of something that is attached.
///
/// # Errors
/// When it is not there or damaged; a layer of more than [`LAYER_LIMIT`] is
/// refused.
pub async fn read_attached(place: &dyn Place, attached: &Attached) -> Result<Artifact> {
    let bytes = place.manifest(&attached.digest).await?;
    let mut layers = Vec::new();
    for layer in links(&bytes)?.layers {
        if layer.size > LAYER_LIMIT {
            return Err(Error::new(Code::Refused, format!("blob {} of the artifact {} is too large", layer.digest, attached.digest)));
        }
        let bytes = place.blob(&layer.digest, layer.size).await?;
        layers.push(Layer { media_type: layer.media_type, bytes, annotations: layer.annotations });
    }
    Ok(Artifact {
        artifact_type: attached.artifact_type.clone(),
        layers,
        annotations: attached.annotations.clone(),
        tag: attached.tag.clone(),
    })
}

#[async_trait]
impl Place for Store {
    fn label(&self) -> String {
        "the store".to_owned()
    }

    async fn resolve(&self, reference: &Reference) -> Result<Digest> {
        Self::resolve(self, reference)
    }

    async fn manifest(&self, digest: &Digest) -> Result<Vec<u8>> {
        if !self.blob_path(digest).exists() {
            return Err(Error::new(Code::NotFound, format!("no image {digest} is in the store")));
        }
        self.read_blob(digest, MANIFEST_LIMIT)
    }

    async fn blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        self.read_blob(digest, limit)
    }

    async fn attached(&self, subject: &Digest) -> Result<Vec<Attached>> {
        Self::attached(self, subject)
    }

    async fn attach(&self, subject: &Digest, artifact: &Artifact) -> Result<Digest> {
        Self::attach(self, subject, artifact)
    }

    async fn images(&self) -> Result<Vec<Held>> {
        let images = Self::images(self, true)?.images.into_iter();
        Ok(images.map(|image| Held { digest: image.digest, names: image.names, manifest: image.manifest, config: image.config }).collect())
    }

    async fn with_disk(&self, disk: &Digest) -> Result<Vec<Digest>> {
        self.images_with(disk)
    }

    fn channels(&self) -> &dyn ChannelBackend {
        self
    }
}

/// Annotations from pairs.
pub(crate) fn annotations<const N: usize>(pairs: [(&str, String); N]) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

//! Revocations: an image that must not be used any more, and all that was
//! baked from it.
//!
//! A revocation is an artifact attached to the image, so it travels with it. An
//! image descends from another when its config's `base` is the digest of the
//! other's root disk. Descendants that are known when an image is revoked get a
//! revocation of their own that names the first; those that are baked or come
//! later are found in the store by walking from base to base.

use std::collections::HashSet;

use kiln_model::Digest;
use kiln_model::channel::Actor;
use kiln_model::error::{Code, Error, Result, ResultExt};
use serde::{Deserialize, Serialize};

use crate::artifacts::{Artifact, Layer};
use crate::place::{Held, Place, images_of, read_attached};

/// `artifactType` of a revocation, media type of its first layer, and payload
/// type of its signature.
pub const REVOCATION: &str = "application/vnd.kiln.revocation.v1+json";
/// Media type of the signature over it, the second layer if there is one.
pub const ENVELOPE: &str = "application/vnd.dsse.envelope.v1+json";
/// How far back descent is followed.
const GENERATIONS: usize = 64;

/// That an image must not be used, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// 1.
    pub v: u32,
    /// Manifest digest of the image.
    pub image: Digest,
    /// Digest of its root disk: what its descendants name as their base.
    pub disk: Option<Digest>,
    /// Why.
    pub why: String,
    /// When, RFC 3339.
    pub time: String,
    /// Who.
    pub actor: Actor,
    /// For a descendant the image that was revoked.
    pub because: Option<Digest>,
}

impl Revocation {
    /// The bytes that are attached and signed.
    ///
    /// # Errors
    /// Never in practice.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).trying(|| "write a revocation".into())
    }

    /// What is attached.
    ///
    /// # Errors
    /// Never in practice.
    pub fn artifact(&self, signature: Option<&serde_json::Value>) -> Result<Artifact> {
        let mut layers = vec![Layer::new(REVOCATION, self.bytes()?)];
        if let Some(signature) = signature {
            layers.push(Layer::new(ENVELOPE, serde_json::to_vec(signature).trying(|| "write a signature".into())?));
        }
        let annotations = crate::place::annotations([("org.opencontainers.image.created", self.time.clone())]);
        Ok(Artifact { artifact_type: REVOCATION.into(), layers, annotations, tag: None })
    }
}

/// Why an image must not be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revoked {
    /// The image that was revoked: itself, or one that it was baked from.
    pub image: Digest,
    /// Why.
    pub why: String,
    /// The whole of it, where it can be read.
    pub revocation: Option<Revocation>,
}

impl Revoked {
    /// The refusal to do `what` with the image that people call `reference`.
    pub fn refuse(&self, reference: &str, digest: &Digest) -> Error {
        let what = if self.image == *digest {
            format!("{reference} was revoked: {}", self.why)
        } else {
            format!("{reference} was baked from {}, which was revoked: {}", self.image, self.why)
        };
        let mut error = Error::new(Code::Refused, what).next("use another image; --allow-revoked uses it all the same");
        if let Some(revocation) = &self.revocation {
            error = error.detail(format!("revoked {} by {}", revocation.time, revocation.actor));
        }
        error
    }
}

/// Whether an image, or one that it was baked from, was revoked.
///
/// # Errors
/// When the image or what is attached to it cannot be read.
pub async fn revoked(place: &dyn Place, digest: &Digest) -> Result<Option<Revoked>> {
    let mut seen = HashSet::new();
    let mut next = vec![*digest];
    for _ in 0..GENERATIONS {
        let mut before = Vec::new();
        for digest in std::mem::take(&mut next) {
            if !seen.insert(digest) {
                continue;
            }
            if let Some(revoked) = revoked_itself(place, &digest).await? {
                return Ok(Some(revoked));
            }
            for image in images_of(place, &digest).await? {
                if image.digest != digest
                    && let Some(revoked) = revoked_itself(place, &image.digest).await?
                {
                    return Ok(Some(revoked));
                }
                if let Some(base) = image.config.base {
                    before.extend(place.with_disk(&base).await?);
                }
            }
        }
        if before.is_empty() {
            return Ok(None);
        }
        next = before;
    }
    Err(Error::new(Code::Refused, format!("image {digest} has more than {GENERATIONS} generations of bases")))
}

/// Whether a revocation is attached to the manifest itself. One that cannot be
/// read still counts.
async fn revoked_itself(place: &dyn Place, digest: &Digest) -> Result<Option<Revoked>> {
    let attached = place.attached(digest).await?;
    let Some(first) = attached.iter().find(|attached| attached.artifact_type == REVOCATION) else { return Ok(None) };
    let read = read_attached(place, first).await.ok();
    let bytes = read.and_then(|artifact| Some(artifact.layers.into_iter().find(|layer| layer.media_type == REVOCATION)?.bytes));
    let revocation = bytes.and_then(|bytes| serde_json::from_slice::<Revocation>(&bytes).ok()).filter(|said| said.image == *digest);
    Ok(Some(match revocation {
        Some(said) => Revoked { image: said.because.unwrap_or(*digest), why: said.why.clone(), revocation: Some(said) },
        None => Revoked { image: *digest, why: "its revocation cannot be read".into(), revocation: None },
    }))
}

/// Of all `images` those that were baked from a disk of `disks`, or from one
/// that was, the nearest first.
pub fn descendants<'a>(disks: &[Digest], images: &'a [Held]) -> Vec<&'a Held> {
    let mut disks: HashSet<Digest> = disks.iter().copied().collect();
    let mut found: Vec<&Held> = Vec::new();
    loop {
        let known: HashSet<Digest> = found.iter().map(|image| image.digest).collect();
        let child = |image: &&Held| image.config.base.is_some_and(|base| disks.contains(&base)) && !known.contains(&image.digest);
        let new: Vec<&Held> = images.iter().filter(child).collect();
        if new.is_empty() {
            return found;
        }
        disks.extend(new.iter().filter_map(|image| image.config.as_base()));
        for image in new {
            if !found.iter().any(|other| other.digest == image.digest) {
                found.push(image);
            }
        }
    }
}

//! What is attached to an image and travels with it: signatures, provenance,
//! SBOMs, results. Either a manifest with the image as `subject`, or, in
//! cosign's older form, one at the tag `sha256-HEX.sig` (`.att`, `.sbom`).

use std::collections::{BTreeMap, HashMap};

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_registry::Repository;
use serde_json::Value;

use super::origin::{Raw, media_type};
use super::remote;
use crate::artifacts::{self, Attached, SUBJECT, TAG};
use crate::blobs::Store;
use crate::index::{AT, REF_NAME};
use crate::manifest::{Descriptor, MANIFEST_LIMIT, links};
use crate::publish::now;

/// What cosign puts behind `sha256-HEX`.
const SUFFIXES: [&str; 3] = ["sig", "att", "sbom"];

/// Most bytes of one attached blob: an SBOM of a whole distribution has a tenth.
pub(crate) const ATTACHED_LIMIT: u64 = 64 << 20;

/// Something attached.
#[derive(Debug, Clone)]
pub(crate) struct Artifact {
    pub(crate) manifest: Raw,
    /// The tag it has in a registry, where it is found by one.
    pub(crate) tag: Option<String>,
}

impl Artifact {
    /// The blobs it needs.
    pub(crate) fn blobs(&self) -> Result<Vec<Descriptor>> {
        let links = links(&self.manifest.bytes).trying(|| format!("read manifest {}", self.manifest.digest))?;
        Ok(links.needs().cloned().collect())
    }

    /// What kind it is, and its own annotations.
    pub(crate) fn kind(&self) -> Result<(String, BTreeMap<String, String>)> {
        artifacts::kind(&self.manifest.bytes).trying(|| format!("read manifest {}", self.manifest.digest))
    }

    /// Its entry in the index of a store.
    pub(crate) fn entry(&self, subject: &Digest) -> Result<Descriptor> {
        let (kind, annotations) = self.kind()?;
        let mut entry = Descriptor::new(&self.manifest.media_type, self.manifest.digest, self.manifest.bytes.len() as u64);
        entry.annotations = annotations;
        // A name would make it an image.
        entry.annotations.remove(REF_NAME);
        entry.annotations.insert(SUBJECT.into(), subject.to_string());
        entry.annotations.insert(AT.into(), now());
        if let Some(tag) = &self.tag {
            entry.annotations.insert(TAG.into(), tag.clone());
        }
        entry.other.insert("artifactType".into(), kind.into());
        Ok(entry)
    }

    /// What has to be at cosign's tag so that it holds what is `there` and what
    /// this one has: each signature is a layer. Nothing, when it is all there.
    pub(crate) fn merged(&self, there: &Raw) -> Result<Option<Raw>> {
        if there.digest == self.manifest.digest {
            return Ok(None);
        }
        let read = |raw: &Raw| serde_json::from_slice::<Value>(&raw.bytes).trying(|| format!("read manifest {}", raw.digest));
        let layers = |value: &Value| value.get("layers").and_then(Value::as_array).cloned().unwrap_or_default();
        let mut value = read(there)?;
        let (mut all, ours) = (layers(&value), layers(&read(&self.manifest)?));
        let count = all.len();
        all.extend(ours.iter().filter(|layer| !all.contains(layer)).cloned().collect::<Vec<_>>());
        if all.len() == count {
            return Ok(None);
        }
        if ours.len() == all.len() {
            // This one has all of theirs: it can stay as it is.
            return Ok(Some(self.manifest.clone()));
        }
        if let Some(object) = value.as_object_mut() {
            object.insert("layers".into(), Value::Array(all));
        }
        let bytes = serde_json::to_vec(&value).trying(|| "write a manifest".into())?;
        Ok(Some(Raw { digest: Digest::of(&bytes), media_type: there.media_type.clone(), bytes }))
    }
}

/// The tags under which cosign looks for what belongs to an image.
pub(crate) fn cosign_tags(subject: &Digest) -> impl Iterator<Item = String> {
    let hex = subject.hex();
    SUFFIXES.into_iter().map(move |suffix| format!("sha256-{hex}.{suffix}"))
}

/// What is attached to `subject` in a store.
pub(crate) fn in_store(store: &Store, subject: &Digest) -> Result<Vec<Artifact>> {
    let read = |found: Attached| {
        let bytes = store.read_blob(&found.digest, MANIFEST_LIMIT).trying(|| format!("read what is attached to {subject}"))?;
        Ok(Artifact { manifest: Raw { digest: found.digest, media_type: media_type(&bytes), bytes }, tag: found.tag })
    };
    store.attached(subject)?.into_iter().map(read).collect()
}

/// What is attached to `subject` in a repository.
pub(crate) async fn in_repository(repository: &Repository, subject: &Digest) -> Result<Vec<Artifact>> {
    let mut wanted: Vec<(Digest, Option<String>)> = Vec::new();
    for descriptor in repository.referrers(subject, None).await? {
        let digest = descriptor.get("digest").and_then(Value::as_str).and_then(|text| text.parse().ok());
        let digest = digest.ok_or_else(|| {
            let at = remote::label(repository);
            Error::new(Code::Corrupt, format!("{at} lists something attached to {subject} that has no sha256 digest"))
        })?;
        wanted.push((digest, None));
    }
    for tag in cosign_tags(subject) {
        if let Some(digest) = repository.resolve(&tag).await? {
            wanted.push((digest, Some(tag)));
        }
    }
    let mut artifacts: Vec<Artifact> = Vec::new();
    let mut places: HashMap<Digest, usize> = HashMap::new();
    for (digest, tag) in wanted {
        // Both found by its subject and tagged.
        if let Some(artifact) = places.get(&digest).and_then(|place| artifacts.get_mut(*place)) {
            artifact.tag = artifact.tag.take().or(tag);
            continue;
        }
        let found = repository.manifest(&digest.to_string()).await?.ok_or_else(|| remote::missing(repository, &digest))?;
        places.insert(digest, artifacts.len());
        artifacts.push(Artifact { manifest: Raw { digest: found.digest, media_type: found.media_type, bytes: found.bytes }, tag });
    }
    Ok(artifacts)
}

//! A repository of a registry as a place for images.

use std::time::Duration;

use async_trait::async_trait;
use kiln_model::Digest;
use kiln_model::channel::ChannelBackend;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::reference::{Pointer, Reference};
use kiln_registry::{BlobSource, Repository};
use tokio::io::AsyncRead;
use tokio::task::JoinSet;

use super::{Held, Place, held};
use crate::artifacts::{self, Artifact, Attached, empty_bytes};
use crate::manifest::{Descriptor, INDEX, MANIFEST, MANIFEST_LIMIT, Manifest, links};
use crate::resolve::near;

/// What cosign puts behind `sha256-HEX` in the tags of its older form.
const SUFFIXES: [&str; 3] = ["sig", "att", "sbom"];
/// How long another promotion is waited for that has begun and says no more.
const PATIENCE: Duration = Duration::from_secs(20);

/// A repository of a registry.
#[derive(Debug, Clone)]
pub struct RemotePlace {
    pub(crate) repository: Repository,
    pub(crate) patience: Duration,
}

impl RemotePlace {
    /// What is in `repository`.
    pub fn new(repository: Repository) -> Self {
        Self { repository, patience: PATIENCE }
    }

    /// How long another promotion of the same channel is waited for that has
    /// begun and says no more: its process may have died.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The repository.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Sends a small blob unless it is there.
    pub(crate) async fn put_blob(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        if self.repository.blob_size(&digest).await? != Some(bytes.len() as u64) {
            let _permit = self.repository.limit().acquire().await;
            self.repository.upload(&digest, bytes.len() as u64, &Bytes(bytes.to_vec()), &|_| ()).await?;
        }
        Ok(digest)
    }

    async fn descriptor(&self, digest: &Digest) -> Result<Descriptor> {
        let fetched = self.repository.manifest(&digest.to_string()).await?.ok_or_else(|| self.missing(digest))?;
        Ok(Descriptor::new(&fetched.media_type, *digest, fetched.bytes.len() as u64))
    }

    fn missing(&self, digest: &Digest) -> Error {
        Error::new(Code::NotFound, format!("no image {digest} is at {}", self.label()))
    }

    async fn unknown_tag(&self, tag: &str) -> Error {
        let error = Error::new(Code::NotFound, format!("{} has no tag `{tag}`", self.label()));
        let tags: Vec<String> = self.repository.tags().await.unwrap_or_default().into_iter().filter(|tag| is_version(tag)).collect();
        match tags.len() {
            0 => error.next("there is nothing under that name yet, or these credentials may not see it"),
            _ => error.next(format!("it has {}", near(tag, tags.iter().map(String::as_str)))),
        }
    }
}

/// Whether a tag is one that people gave: what kiln and cosign keep at tags is
/// nobody's version.
pub(crate) fn is_version(tag: &str) -> bool {
    !tag.starts_with("sha256-") && !tag.starts_with("kiln.")
}

/// Bytes to send.
struct Bytes(Vec<u8>);

#[async_trait]
impl BlobSource for Bytes {
    async fn open(&self, offset: u64) -> Result<Box<dyn AsyncRead + Send + Unpin>> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        Ok(Box::new(std::io::Cursor::new(self.0.get(from..).unwrap_or_default().to_vec())))
    }
}

#[async_trait]
impl Place for RemotePlace {
    fn label(&self) -> String {
        format!("{}/{}", self.repository.host(), self.repository.name())
    }

    async fn resolve(&self, reference: &Reference) -> Result<Digest> {
        let tag = match &reference.pointer {
            Pointer::Tag(tag) => tag.as_deref().unwrap_or("latest"),
            Pointer::Digest(digest) => {
                let there = self.repository.resolve(&digest.to_string()).await?;
                return there.map(|_| *digest).ok_or_else(|| self.missing(digest));
            }
            Pointer::Channel(channel) => {
                let name = self.repository.name();
                return match self.head(name, channel).await? {
                    Some(head) => Ok(head.record().image),
                    None => Err(crate::channel::unknown(&self.label(), channel, &self.list(name).await?)),
                };
            }
        };
        match self.repository.resolve(tag).await? {
            Some(digest) => Ok(digest),
            None => Err(self.unknown_tag(tag).await),
        }
    }

    async fn manifest(&self, digest: &Digest) -> Result<Vec<u8>> {
        let fetched = self.repository.manifest(&digest.to_string()).await?;
        fetched.map(|fetched| fetched.bytes).ok_or_else(|| self.missing(digest))
    }

    async fn blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        self.repository.blob(digest, limit).await
    }

    async fn attached(&self, subject: &Digest) -> Result<Vec<Attached>> {
        let mut found: Vec<Attached> = Vec::new();
        for value in self.repository.referrers(subject, None).await? {
            let descriptor: Descriptor = serde_json::from_value(value).map_err(|error| {
                Error::new(Code::Corrupt, format!("{} lists something attached to {subject} that is no descriptor", self.label()))
                    .because(error)
            })?;
            let said = descriptor.other.get("artifactType").and_then(|kind| kind.as_str()).unwrap_or_default().to_owned();
            let Descriptor { digest, annotations, .. } = descriptor;
            found.push(Attached { digest, artifact_type: said, annotations, tag: None });
        }
        for suffix in SUFFIXES {
            let tag = format!("sha256-{}.{suffix}", subject.hex());
            let Some(fetched) = self.repository.manifest(&tag).await? else { continue };
            match found.iter_mut().find(|attached| attached.digest == fetched.digest) {
                // Both found by its subject and tagged.
                Some(attached) => attached.tag = Some(tag),
                None => {
                    let (artifact_type, annotations) = artifacts::kind(&fetched.bytes).trying(|| format!("read {}:{tag}", self.label()))?;
                    found.push(Attached { digest: fetched.digest, artifact_type, annotations, tag: Some(tag) });
                }
            }
        }
        Ok(found)
    }

    async fn attach(&self, subject: &Digest, artifact: &Artifact) -> Result<Digest> {
        let to = self.descriptor(subject).await?;
        let Some(tag) = &artifact.tag else {
            let built = artifact.build(&to, None)?;
            for blob in &built.blobs {
                self.put_blob(blob).await?;
            }
            let (kind, annotations) = (&artifact.artifact_type, &artifact.annotations);
            return self.repository.attach(subject, MANIFEST, kind, &built.manifest, annotations).await;
        };
        // What others sign at the same time must not be lost: written, read
        // again, and merged until it is there.
        for _ in 0..16 {
            let present = self.repository.manifest(tag).await?;
            let built = artifact.build(&to, present.as_ref().map(|fetched| fetched.bytes.as_slice()))?;
            let digest = Digest::of(&built.manifest);
            if present.is_some_and(|fetched| fetched.digest == digest) {
                return Ok(digest);
            }
            for blob in &built.blobs {
                self.put_blob(blob).await?;
            }
            self.repository.put_manifest(tag, MANIFEST, &built.manifest).await?;
        }
        let what = format!("others sign {subject} at {} again and again", self.label());
        Err(Error::new(Code::Infrastructure, what).next("try again"))
    }

    async fn images(&self) -> Result<Vec<Held>> {
        let mut tasks = JoinSet::new();
        for tag in self.repository.tags().await?.into_iter().filter(|tag| is_version(tag)) {
            let place = self.clone();
            tasks.spawn(async move {
                let _permit = place.repository.limit().acquire().await;
                let Some(fetched) = place.repository.manifest(&tag).await? else { return Ok(None) };
                Ok::<_, Error>(Some((tag, fetched)))
            });
        }
        let mut images: Vec<Held> = Vec::new();
        let mut fetched = Vec::new();
        while let Some(done) = tasks.join_next().await {
            fetched.extend(done.trying(|| "ask the registry".into())??);
        }
        fetched.sort_by(|a, b| a.0.cmp(&b.0));
        for (tag, fetched) in fetched {
            let name = format!("{}:{tag}", self.label());
            let mut manifests = vec![(fetched.digest, fetched.bytes)];
            if fetched.media_type == INDEX {
                for part in links(&manifests.remove(0).1)?.manifests {
                    manifests.push((part.digest, self.manifest(&part.digest).await?));
                }
            }
            for (digest, bytes) in manifests {
                if let Some(image) = images.iter_mut().find(|image| image.digest == digest) {
                    image.names.push(name.clone());
                } else if bytes.len() as u64 <= MANIFEST_LIMIT && Manifest::parse(&bytes).is_ok() {
                    images.push(Held { names: vec![name.clone()], ..held(self, &digest, &bytes).await? });
                }
            }
        }
        Ok(images)
    }

    async fn with_disk(&self, _: &Digest) -> Result<Vec<Digest>> {
        Ok(Vec::new())
    }

    fn channels(&self) -> &dyn ChannelBackend {
        self
    }
}

/// The empty config has to be there before a manifest that names it.
pub(crate) async fn put_empty(place: &RemotePlace) -> Result<()> {
    place.put_blob(empty_bytes()).await.map(|_| ())
}

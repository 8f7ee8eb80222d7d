//! Where what is sent comes from: a store, or another repository.

use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use bytes::Bytes;
use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_registry::{BlobSource, FileSource, Repository};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::mpsc;

use super::attached::{self, Artifact};
use super::remote;
use crate::blobs::{Store, damaged};
use crate::manifest::{Descriptor, INDEX, MANIFEST, MANIFEST_LIMIT};

/// A manifest or index of any kind, as it is.
#[derive(Debug, Clone)]
pub(crate) struct Raw {
    pub(crate) digest: Digest,
    pub(crate) media_type: String,
    pub(crate) bytes: Vec<u8>,
}

impl Raw {
    pub(crate) fn is_index(&self) -> bool {
        self.media_type == INDEX || self.media_type == "application/vnd.docker.distribution.manifest.list.v2+json"
    }
}

/// What can be sent from.
#[async_trait]
pub(crate) trait Origin: Send + Sync {
    /// A manifest, whole and with the right digest.
    async fn manifest(&self, digest: &Digest) -> Result<Raw>;

    /// A small blob, likewise.
    async fn small(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>>;

    /// A blob to be streamed; its bytes are for the receiver to check.
    fn blob(&self, blob: &Descriptor) -> Box<dyn BlobSource>;

    /// What is attached to a manifest.
    async fn attached(&self, subject: &Digest) -> Result<Vec<Artifact>>;

    /// The repository to mount from, when this is one of `host`.
    fn repository(&self, host: &str) -> Option<&str>;

    /// Whether the receiver was right to refuse a blob: the damage here, if
    /// there is any.
    async fn damage(&self, blob: &Descriptor) -> Option<Error>;
}

/// A store as an origin. What is sent is held: `prune` leaves it alone.
pub(crate) struct FromStore(pub(crate) Store);

#[async_trait]
impl Origin for FromStore {
    async fn manifest(&self, digest: &Digest) -> Result<Raw> {
        let bytes = self.0.read_blob(digest, MANIFEST_LIMIT).trying(|| format!("read manifest {digest}"))?;
        Ok(Raw { digest: *digest, media_type: media_type(&bytes), bytes })
    }

    async fn small(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        self.0.read_blob(digest, limit)
    }

    fn blob(&self, blob: &Descriptor) -> Box<dyn BlobSource> {
        Box::new(FileSource(self.0.blob_path(&blob.digest)))
    }

    async fn attached(&self, subject: &Digest) -> Result<Vec<Artifact>> {
        attached::in_store(&self.0, subject)
    }

    fn repository(&self, _: &str) -> Option<&str> {
        None
    }

    async fn damage(&self, blob: &Descriptor) -> Option<Error> {
        let (store, blob) = (self.0.clone(), blob.clone());
        let look = move || {
            if !store.has_blob(&blob.digest, blob.size) {
                let what = format!("blob {} is missing from the store, or cut short", blob.digest);
                return Some(Error::new(Code::Corrupt, what).next("`kiln verify` names every image that is damaged"));
            }
            let mut file = store.open_blob(&blob.digest).ok()?;
            let (is, _) = Digest::of_reader(&mut file).ok()?;
            (is != blob.digest).then(|| damaged(&blob.digest))
        };
        tokio::task::spawn_blocking(look).await.ok().flatten()
    }
}

/// The media type that a manifest says it has.
pub(crate) fn media_type(bytes: &[u8]) -> String {
    let value = serde_json::from_slice::<serde_json::Value>(bytes).ok();
    let said = value.as_ref().and_then(|value| value.get("mediaType")).and_then(|kind| kind.as_str());
    said.unwrap_or(MANIFEST).to_owned()
}

#[async_trait]
impl Origin for Repository {
    async fn manifest(&self, digest: &Digest) -> Result<Raw> {
        match Repository::manifest(self, &digest.to_string()).await? {
            Some(found) => Ok(Raw { digest: found.digest, media_type: found.media_type, bytes: found.bytes }),
            None => Err(remote::missing(self, digest)),
        }
    }

    async fn small(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        Repository::blob(self, digest, limit).await
    }

    fn blob(&self, blob: &Descriptor) -> Box<dyn BlobSource> {
        Box::new(Relay { repository: self.clone(), digest: blob.digest, size: blob.size })
    }

    async fn attached(&self, subject: &Digest) -> Result<Vec<Artifact>> {
        attached::in_repository(self, subject).await
    }

    fn repository(&self, host: &str) -> Option<&str> {
        (self.host() == host).then(|| self.name())
    }

    async fn damage(&self, _: &Descriptor) -> Option<Error> {
        None
    }
}

/// A blob of one registry that another one reads while it arrives.
struct Relay {
    repository: Repository,
    digest: Digest,
    size: u64,
}

#[async_trait]
impl BlobSource for Relay {
    async fn open(&self, offset: u64) -> Result<Box<dyn AsyncRead + Send + Unpin>> {
        let mut body = self.repository.read(&self.digest, offset..self.size).await?;
        // A few chunks on their way are enough to keep both lines busy.
        let (sender, chunks) = mpsc::channel(4);
        tokio::spawn(async move {
            loop {
                let chunk = body.chunk().await;
                let last = !matches!(chunk, Ok(Some(_)));
                let Some(chunk) = chunk.transpose() else { return };
                if sender.send(chunk).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Box::new(Chunks { chunks, now: Bytes::new() }))
    }
}

/// Chunks as they come, as a reader.
struct Chunks {
    chunks: mpsc::Receiver<Result<Bytes>>,
    now: Bytes,
}

impl AsyncRead for Chunks {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        while self.now.is_empty() {
            match self.chunks.poll_recv(context) {
                Poll::Ready(Some(Ok(chunk))) => self.now = chunk,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(std::io::Error::other(error))),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
        }
        let count = self.now.len().min(into.remaining());
        into.put_slice(&self.now.split_to(count));
        Poll::Ready(Ok(()))
    }
}

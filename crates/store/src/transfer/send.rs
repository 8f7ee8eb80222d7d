//! Towards a registry: from a store ([`push`]) or from another repository
//! ([`copy`]), by the same rules.
//!
//! First everything is asked for, then what is missing is mounted or sent,
//! then what is attached gets its manifests and tags, and last the image its
//! tag. A sender that is killed has changed nothing that anybody sees, and the
//! next one finds the blobs that came.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::event::Reports;
use kiln_model::image::IMAGE;
use kiln_registry::Repository;
use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinSet;

use super::attached::{ATTACHED_LIMIT, Artifact};
use super::known::Known;
use super::meter::Meter;
use super::origin::{FromStore, Origin, Raw};
use super::remote::label;
use crate::blobs::Store;
use crate::manifest::{Descriptor, MANIFEST, MANIFEST_LIMIT, Manifest, links, parse_config};
use crate::publish::Moved;

/// Times that a manifest is put before a registry that stores something else
/// is given up.
const PUTS: u32 = 3;

/// Where something is sent to.
#[derive(Clone)]
pub struct Sending<'a> {
    /// The repository.
    pub repository: &'a Repository,
    /// The tag; without one it can be had by its digest alone.
    pub tag: Option<&'a str>,
    /// Where blobs can be mounted from.
    pub known: &'a Known,
    /// Where progress goes.
    pub reports: &'a Reports,
}

/// What came of sending.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sent {
    /// Digest of the image's manifest.
    pub digest: Digest,
    /// Bytes that were sent.
    pub bytes_sent: u64,
    /// Bytes of blobs that were there already.
    pub bytes_skipped: u64,
    /// Bytes of blobs that the registry took from another of its repositories.
    pub bytes_mounted: u64,
    /// How many blobs were sent.
    pub sent: usize,
    /// How many were there.
    pub skipped: usize,
    /// How many were mounted.
    pub mounted: usize,
    /// How many artifacts are attached to it there now because of this.
    pub attached: usize,
    /// Whether the tag was there already and meant the same.
    pub existed: bool,
    /// What the tag meant before, when that was something else.
    pub moved_from: Option<Digest>,
}

impl Sent {
    fn of(digest: Digest) -> Self {
        Self {
            digest,
            bytes_sent: 0,
            bytes_skipped: 0,
            bytes_mounted: 0,
            sent: 0,
            skipped: 0,
            mounted: 0,
            attached: 0,
            existed: false,
            moved_from: None,
        }
    }
}

/// Sends an image of the store, with what is attached to it. The image is safe
/// from `prune` as long as the store is open.
///
/// # Errors
/// [`Code::Refused`] when the tag is the version of another image;
/// [`Code::Corrupt`], naming the blob, when one is damaged here;
/// [`Code::Infrastructure`] when the registry does not carry it.
pub async fn push(store: &Store, image: &Digest, to: &Sending<'_>) -> Result<Sent> {
    let found = store.image(image)?;
    let blobs: Vec<_> = found.manifest.blobs().map(|blob| kiln_model::image::PackRef { digest: blob.digest, size: blob.size }).collect();
    let there = store.hold(&blobs)?;
    if let Some(missing) = blobs.iter().find(|blob| !there.contains(blob)) {
        let what = format!("blob {} is missing from the store, or cut short", missing.digest);
        return Err(Error::new(Code::Corrupt, what).next("`kiln verify` names every image that is damaged"));
    }
    store.protect(image)?;
    send(Arc::new(FromStore(store.clone())), image, to).await
}

/// Copies an image from one repository to another, with what is attached to
/// it. No byte of it touches a disk of this machine.
///
/// # Errors
/// As [`push`].
pub async fn copy(from: &Repository, image: &Digest, to: &Sending<'_>) -> Result<Sent> {
    send(Arc::new(from.clone()), image, to).await
}

/// Everything that belongs to one thing that is sent.
struct Load {
    /// The manifests of its tree, children first, itself last.
    manifests: Vec<Raw>,
    /// What is attached, and to which of them.
    attached: Vec<(Digest, Artifact)>,
    blobs: Vec<Descriptor>,
}

impl Load {
    async fn gather(origin: &dyn Origin, digest: &Digest) -> Result<Self> {
        let mut manifests = Vec::new();
        let mut open = vec![(*digest, 0)];
        while let Some((digest, depth)) = open.pop() {
            let raw = origin.manifest(&digest).await?;
            if raw.is_index() {
                if depth >= 4 {
                    return Err(Error::new(Code::Corrupt, format!("index {digest} is nested too deeply")));
                }
                open.extend(links(&raw.bytes)?.needs().map(|child| (child.digest, depth + 1)));
            }
            manifests.push(raw);
        }
        // Parents were read first.
        manifests.reverse();
        let (mut attached, mut blobs) = (Vec::new(), Vec::new());
        for raw in &manifests {
            if !raw.is_index() {
                blobs.extend(links(&raw.bytes).trying(|| format!("read manifest {}", raw.digest))?.needs().cloned());
            }
            attached.extend(origin.attached(&raw.digest).await?.into_iter().map(|artifact| (raw.digest, artifact)));
        }
        for (_, artifact) in &attached {
            blobs.extend(artifact.blobs()?);
        }
        let mut seen = HashSet::new();
        blobs.retain(|blob| seen.insert(blob.digest));
        Ok(Self { manifests, attached, blobs })
    }
}

/// Sends `digest` of `origin`.
pub(crate) async fn send(origin: Arc<dyn Origin>, digest: &Digest, to: &Sending<'_>) -> Result<Sent> {
    let load = Load::gather(&*origin, digest).await?;
    let mut sent = Sent::of(*digest);
    let version = version(&*origin, &load).await?;
    let before = may_point(to, digest, version.as_deref()).await?;
    move_blobs(&origin, &load.blobs, to, &mut sent).await?;
    for raw in load.manifests.iter().filter(|raw| raw.digest != *digest) {
        put(to.repository, &raw.digest.to_string(), raw).await?;
        sent.bytes_sent += raw.bytes.len() as u64;
    }
    for (subject, artifact) in &load.attached {
        sent.attached += usize::from(attach(to.repository, subject, artifact, &mut sent.bytes_sent).await?);
    }
    let raw = load.manifests.last().filter(|raw| raw.digest == *digest);
    let raw = raw.ok_or_else(|| Error::new(Code::Failed, format!("manifest {digest} was lost on the way")))?;
    match to.tag {
        Some(_) if before == Some(*digest) => sent.existed = true,
        Some(tag) => {
            // Others may have come while the blobs were on their way.
            sent.moved_from = may_point(to, digest, version.as_deref()).await?.filter(|was| was != digest);
            put(to.repository, tag, raw).await?;
            sent.bytes_sent += raw.bytes.len() as u64;
            confirm(to.repository, tag, digest).await?;
        }
        None => {
            sent.existed = to.repository.resolve(&digest.to_string()).await?.is_some();
            if !sent.existed {
                put(to.repository, &digest.to_string(), raw).await?;
                sent.bytes_sent += raw.bytes.len() as u64;
            }
        }
    }
    let blobs: Vec<Digest> = load.blobs.iter().map(|blob| blob.digest).collect();
    to.known.remember(to.repository.host(), to.repository.name(), &blobs);
    if let (Some(tag), Some(from)) = (to.tag, sent.moved_from) {
        to.reports.note(Moved { name: format!("{}:{tag}", label(to.repository)), from, to: *digest }.to_string());
    }
    Ok(sent)
}

/// The version of the image that is sent, when it is one of kiln's.
async fn version(origin: &dyn Origin, load: &Load) -> Result<Option<String>> {
    for raw in load.manifests.iter().filter(|raw| raw.media_type == MANIFEST) {
        if let Ok(manifest) = Manifest::parse(&raw.bytes) {
            let bytes = origin.small(&manifest.config.digest, MANIFEST_LIMIT.min(manifest.config.size)).await?;
            return Ok(Some(parse_config(&bytes, &manifest.config.digest)?.version));
        }
    }
    Ok(None)
}

/// Whether the tag may point to `digest`: gives what it points to now. A tag
/// that is the version of an image, of this one or of the one that is there,
/// never changes; the name of a channel is no tag.
pub(crate) async fn may_point(to: &Sending<'_>, digest: &Digest, version: Option<&str>) -> Result<Option<Digest>> {
    let Some(tag) = to.tag else { return Ok(None) };
    crate::channel::may_tag(to.repository, tag).await?;
    let Some(before) = to.repository.resolve(tag).await? else { return Ok(None) };
    if before == *digest {
        return Ok(Some(before));
    }
    if version == Some(tag) || version_at(to.repository, &before).await?.as_deref() == Some(tag) {
        let name = format!("{}:{tag}", label(to.repository));
        let what = format!("{name} was pushed as sha256:{}… and never changes: it is a version", before.short());
        return Err(Error::new(Code::Refused, what).next("give the new content another version"));
    }
    Ok(Some(before))
}

/// The version of the kiln image `digest`, when it is one.
async fn version_at(repository: &Repository, digest: &Digest) -> Result<Option<String>> {
    let Some(found) = repository.manifest(&digest.to_string()).await? else { return Ok(None) };
    let Ok(manifest) = Manifest::parse(&found.bytes) else { return Ok(None) };
    let bytes = repository.blob(&manifest.config.digest, MANIFEST_LIMIT).await?;
    Ok(parse_config(&bytes, &manifest.config.digest).ok().map(|config| config.version))
}

/// Puts a manifest; once more when something else arrived.
pub(crate) async fn put(repository: &Repository, at: &str, raw: &Raw) -> Result<()> {
    let mut tries = 1;
    loop {
        let done = repository.put_manifest(at, &raw.media_type, &raw.bytes).await;
        let error = match done {
            Ok(pushed) if pushed.digest == raw.digest => return Ok(()),
            Ok(pushed) => {
                let what = format!("{} took manifest {} for {}", label(repository), raw.digest, pushed.digest);
                Error::new(Code::DigestMismatch, what).next("something between here and the registry changes what is sent")
            }
            Err(error) => error,
        };
        if error.kind() != Code::DigestMismatch || tries >= PUTS {
            return Err(error);
        }
        tries += 1;
    }
}

/// Looks whether a tag that was put is still what it was put to.
async fn confirm(repository: &Repository, tag: &str, digest: &Digest) -> Result<()> {
    match repository.resolve(tag).await? {
        Some(now) if now == *digest => Ok(()),
        now => {
            let now = now.map_or("nothing".to_owned(), |now| now.to_string());
            let what = format!("somebody else pushed {}:{tag} at the same time: it is {now}, not {digest}", label(repository));
            Err(Error::new(Code::Refused, what).next("agree on one of them; the other needs another version"))
        }
    }
}

/// Attaches one artifact; tells whether that changed anything.
async fn attach(repository: &Repository, subject: &Digest, artifact: &Artifact, bytes: &mut u64) -> Result<bool> {
    let raw = &artifact.manifest;
    let has_subject = links(&raw.bytes)?.subject == Some(*subject);
    let mut changed = false;
    if has_subject {
        let there = repository.referrers(subject, None).await?;
        let text = raw.digest.to_string();
        if !there.iter().any(|entry| entry.get("digest").and_then(Value::as_str) == Some(&text)) {
            let (kind, annotations) = artifact.kind()?;
            repository.attach(subject, &raw.media_type, &kind, &raw.bytes, &annotations).await?;
            *bytes += raw.bytes.len() as u64;
            changed = true;
        }
    }
    match &artifact.tag {
        Some(tag) => {
            let merged = match repository.manifest(tag).await? {
                None => Some(raw.clone()),
                Some(there) => artifact.merged(&Raw { digest: there.digest, media_type: there.media_type, bytes: there.bytes })?,
            };
            let Some(merged) = merged else { return Ok(changed) };
            put(repository, tag, &merged).await?;
            *bytes += merged.bytes.len() as u64;
            Ok(true)
        }
        None if !has_subject => {
            let what = format!("{} is attached to {subject} by neither subject nor tag", raw.digest);
            Err(Error::new(Code::Corrupt, what))
        }
        None => Ok(changed),
    }
}

/// What became of one blob.
enum Outcome {
    There,
    Mounted,
    Sent,
}

/// Brings all blobs to the repository.
pub(crate) async fn move_blobs(origin: &Arc<dyn Origin>, blobs: &[Descriptor], to: &Sending<'_>, sent: &mut Sent) -> Result<()> {
    let limit = to.repository.limit();
    let mut asking = JoinSet::new();
    for (place, blob) in blobs.iter().cloned().enumerate() {
        let (repository, limit) = (to.repository.clone(), limit.clone());
        asking.spawn(async move {
            let _permit = limit.acquire().await;
            Ok::<_, Error>((place, repository.blob_size(&blob.digest).await?))
        });
    }
    let mut sizes = HashMap::new();
    while let Some(answer) = asking.join_next().await {
        let (place, size) = answer.trying(|| "ask the registry what it has".into())??;
        sizes.insert(place, size);
    }
    let mut missing = Vec::new();
    for (place, blob) in blobs.iter().enumerate() {
        match sizes.get(&place).copied().flatten() {
            Some(size) if size == blob.size => {
                sent.skipped += 1;
                sent.bytes_skipped += blob.size;
            }
            Some(size) => {
                let what = format!(
                    "blob {} is damaged at {}: it has {size} bytes there, and {} here",
                    blob.digest,
                    label(to.repository),
                    blob.size
                );
                return Err(Error::new(Code::Corrupt, what).next("remove it at the registry, and push again"));
            }
            None => missing.push(blob.clone()),
        }
    }
    let wanted: HashSet<Digest> = missing.iter().map(|blob| blob.digest).collect();
    let mut holders = to.known.holders(to.repository.host(), to.repository.name(), &wanted);
    let beside = origin.repository(to.repository.host()).filter(|name| *name != to.repository.name());
    let meter = Meter::new("push", missing.iter().map(|blob| blob.size).sum(), to.reports);
    let mut moving = JoinSet::new();
    for blob in missing {
        let mut from: Vec<String> = beside.map(ToOwned::to_owned).into_iter().collect();
        from.extend(holders.remove(&blob.digest).unwrap_or_default());
        let (origin, repository, limit, meter) = (origin.clone(), to.repository.clone(), limit.clone(), meter.clone());
        moving.spawn(async move {
            let _permit = limit.acquire().await;
            let outcome = move_blob(&*origin, &blob, &repository, &from, &meter).await?;
            Ok::<_, Error>((blob.size, outcome))
        });
    }
    while let Some(moved) = moving.join_next().await {
        let (size, outcome) = moved.trying(|| "send a blob".into())??;
        match outcome {
            Outcome::There => (sent.skipped, sent.bytes_skipped) = (sent.skipped + 1, sent.bytes_skipped + size),
            Outcome::Mounted => (sent.mounted, sent.bytes_mounted) = (sent.mounted + 1, sent.bytes_mounted + size),
            Outcome::Sent => (sent.sent, sent.bytes_sent) = (sent.sent + 1, sent.bytes_sent + size),
        }
    }
    meter.end();
    Ok(())
}

async fn move_blob(origin: &dyn Origin, blob: &Descriptor, repository: &Repository, from: &[String], meter: &Meter) -> Result<Outcome> {
    for other in from {
        if repository.mount(&blob.digest, other).await? {
            meter.add(blob.size);
            return Ok(Outcome::Mounted);
        }
    }
    let source = origin.blob(blob);
    let before = AtomicU64::new(0);
    let progress = |now: u64| meter.part(before.swap(now, Ordering::Relaxed), now);
    let Err(error) = repository.upload(&blob.digest, blob.size, &*source, &progress).await else { return Ok(Outcome::Sent) };
    // Named by what is wrong, not by who has noticed it.
    if let Some(damage) = origin.damage(blob).await {
        return Err(damage);
    }
    // Another sender of the same may have been faster.
    if error.kind() == Code::Failed && repository.blob_size(&blob.digest).await.ok().flatten() == Some(blob.size) {
        return Ok(Outcome::There);
    }
    Err(error)
}

/// Fetches the blobs of an artifact, small as they are.
pub(crate) async fn small_blobs(origin: &dyn Origin, artifact: &Artifact) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for blob in artifact.blobs()? {
        if blob.size > ATTACHED_LIMIT {
            let what = format!("{} is attached with {} bytes, more than kiln takes", blob.digest, blob.size);
            return Err(Error::new(Code::Corrupt, what));
        }
        all.push(origin.small(&blob.digest, blob.size).await?);
    }
    Ok(all)
}

/// Whether a manifest is a kiln image's.
pub(crate) fn is_image(bytes: &[u8]) -> bool {
    let value = serde_json::from_slice::<Value>(bytes).ok();
    value.is_some_and(|value| value.get("artifactType").and_then(Value::as_str) == Some(IMAGE))
}

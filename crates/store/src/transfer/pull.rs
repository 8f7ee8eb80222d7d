//! From a registry into the store.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::event::Reports;
use kiln_model::image::{PackRef, Place};
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::admit::{Admit, Names};
use super::attached::{self, Artifact};
use super::known::Known;
use super::local::Local;
use super::meter::Meter;
use super::partial::{Came, Expected, blocking, check_frames, fetch_pack};
use super::remote::{Disk, Remote, label};
use super::send::small_blobs;
use crate::blobs::Store;
use crate::publish::Moved;

/// What came of a pull.
#[derive(Debug, Clone, Serialize)]
pub struct Pulled {
    /// Digest of the image's manifest.
    pub digest: Digest,
    /// Bytes that came from the registry.
    pub bytes_fetched: u64,
    /// Bytes of packs that were there.
    pub bytes_skipped: u64,
    /// Bytes of new packs that were copied from packs that were there.
    pub bytes_reused: u64,
    /// Bytes that an interrupted pull had left.
    pub bytes_resumed: u64,
    /// How many packs came.
    pub fetched: usize,
    /// How many packs were there.
    pub skipped: usize,
    /// How many artifacts are attached to it.
    pub attached: usize,
    /// Names that meant something else before.
    #[serde(skip)]
    pub moved: Vec<Moved>,
}

/// Frames by pack, sorted, each once.
pub(crate) fn frames_of<'a>(disks: impl IntoIterator<Item = &'a kiln_model::image::BlockMap>) -> HashMap<Digest, Vec<Expected>> {
    let mut frames: HashMap<Digest, Vec<Expected>> = HashMap::new();
    for map in disks {
        for block in &map.blocks {
            if let Place::Pack { pack, offset, length } = block.place
                && let Some(pack) = map.packs.get(pack as usize)
            {
                frames.entry(pack.digest).or_default().push((offset, length, block.digest));
            }
        }
    }
    for list in frames.values_mut() {
        list.sort_unstable();
        list.dedup();
    }
    frames
}

/// Brings an image into the store, with what is attached to it.
///
/// # Errors
/// [`Code::DigestMismatch`] or [`Code::Corrupt`], naming the blob, when
/// something is damaged there or on the way; [`Code::Refused`] when the name
/// is fixed elsewhere in the store; [`Code::Infrastructure`] when the registry
/// does not carry it. What has come so far is gone on with next time.
pub async fn pull(image: &Remote, store: &Store, names: &Names, known: &Known, reports: &Reports) -> Result<Pulled> {
    let names = &as_tag(image, store, names).await?;
    store.may_name(&image.config, &image.digest(), names)?;
    let packs = image.packs();
    let mut pulled = Pulled {
        digest: image.digest(),
        bytes_fetched: 0,
        bytes_skipped: 0,
        bytes_reused: 0,
        bytes_resumed: 0,
        fetched: 0,
        skipped: 0,
        attached: 0,
        moved: Vec::new(),
    };
    let mut frames = frames_of(image.disks.iter().map(|disk| &disk.map));
    let local = {
        let (store, name) = (store.clone(), image.config.name.clone());
        let wanted: HashSet<Digest> = frames.values().flatten().map(|(_, _, block)| *block).collect();
        Arc::new(blocking(move || Local::find(&store, &wanted, &name)).await?)
    };
    let there: HashSet<Digest> = store.hold(&packs)?.iter().map(|pack| pack.digest).collect();
    let missing: Vec<PackRef> = packs.iter().filter(|pack| !there.contains(&pack.digest)).copied().collect();
    let meter = Meter::new("pull", missing.iter().map(|pack| pack.size).sum(), reports);
    let checking = Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, usize::from)));
    let mut coming = JoinSet::new();
    for pack in packs {
        let frames = frames.remove(&pack.digest).unwrap_or_default();
        let (store, local, checking) = (store.clone(), local.clone(), checking.clone());
        if there.contains(&pack.digest) {
            pulled.skipped += 1;
            pulled.bytes_skipped += pack.size;
            // It may be there because of a pull that was interrupted before
            // anybody looked into it.
            coming.spawn(async move {
                let _turn = checking.acquire().await;
                let what = format!("use pack {} of this store", pack.digest);
                let check = move || check_frames(&store.open_blob(&pack.digest)?, &pack, &frames, &local);
                blocking(check).await.trying(|| what).map(|()| None)
            });
            continue;
        }
        let (repository, meter) = (image.repository.clone(), meter.clone());
        coming.spawn(async move { fetch_pack(&store, &repository, pack, frames, local, &meter, &checking).await.map(Some) });
    }
    let attached = attached::in_repository(&image.repository, &image.digest()).await?;
    while let Some(came) = coming.join_next().await {
        if let Some(Came { fetched, reused, resumed }) = came.trying(|| "fetch a pack".into())?? {
            pulled.fetched += 1;
            pulled.bytes_fetched += fetched;
            pulled.bytes_reused += reused;
            pulled.bytes_resumed += resumed;
        }
    }
    meter.end();
    pulled.bytes_fetched += write_small(image, store, &attached).await?;
    pulled.attached = attached.len();
    let attached = store.merge_tagged(&image.digest(), attached)?;
    let admit = Admit {
        digest: image.digest(),
        size: image.raw.bytes.len() as u64,
        manifest: &image.manifest,
        config: &image.config,
        names,
        attached: &attached,
    };
    pulled.moved = store.admit(&[admit])?;
    let blobs: Vec<Digest> = image.manifest.blobs().map(|blob| blob.digest).collect();
    known.remember(image.repository.host(), image.repository.name(), &blobs);
    Ok(pulled)
}

/// The names, where a tag that was asked for is one: the tag of a channel's name
/// is a copy of where the channel is, here no more than there.
async fn as_tag(image: &Remote, store: &Store, names: &Names) -> Result<Names> {
    let Names::Tag(tag) = names else { return Ok(names.clone()) };
    let refused = match crate::channel::may_tag(&image.repository, tag).await {
        Ok(()) => store.may_tag(&image.config.name, tag).is_err(),
        Err(error) if error.kind() == Code::Usage => true,
        Err(error) => return Err(error),
    };
    Ok(if refused { Names::Version } else { names.clone() })
}

/// Stores everything but the packs; gives how many bytes of it came.
async fn write_small(image: &Remote, store: &Store, attached: &[Artifact]) -> Result<u64> {
    let mut blobs: Vec<Vec<u8>> = Vec::new();
    for artifact in attached {
        blobs.extend(small_blobs(&image.repository, artifact).await.trying(|| format!("fetch what is attached to {}", image.digest()))?);
        blobs.push(artifact.manifest.bytes.clone());
    }
    blobs.extend(image.disks.iter().map(|Disk { bytes, .. }| bytes.clone()));
    blobs.push(image.config_bytes.clone());
    blobs.push(image.raw.bytes.clone());
    let bytes = blobs.iter().map(|blob| blob.len() as u64).sum();
    let (store, manifest) = (store.clone(), image.digest());
    let at = label(&image.repository);
    blocking(move || {
        let mut last = None;
        for blob in &blobs {
            last = Some(store.write_blob(blob)?);
        }
        match last {
            Some(digest) if digest == manifest => Ok(()),
            _ => Err(Error::new(Code::DigestMismatch, format!("what {at} sends as manifest {manifest} is something else"))),
        }
    })
    .await?;
    Ok(bytes)
}

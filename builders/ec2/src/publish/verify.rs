//! A snapshot read back, and its disk digest computed from what AWS gives.
//!
//! A block that was never written reads as zeros and is not listed. A volume
//! has whole GiB, so the disk's own size comes from the snapshot's tag, and
//! what is after its end has to be zeros.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use kiln_model::block::BLOCK;
use kiln_model::event::Reports;
use kiln_model::image::{Block, BlockMap, Place, zero_block};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use serde::Serialize;
use tokio::task::JoinSet;

use super::plan::GIB;
use super::upload::UNDER_WAY;
use super::{Maps, Region};
use crate::api::Find;
use crate::api::ebs::ListedBlock;
use crate::api::error::CallExt as _;
use crate::tags;

/// Takes the blocks of a snapshot that is read, in any order.
pub type Take = Arc<dyn Fn(u32, &Bytes) -> Result<()> + Send + Sync>;

/// What a snapshot holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// SHA-256 of each block of the volume, zeros included.
    pub digests: Vec<Digest>,
    /// How many blocks were read; the others were never written.
    pub read: u64,
}

impl Contents {
    /// The digest of a disk of `size` bytes that these blocks begin with.
    pub fn disk_digest(&self, size: u64) -> Digest {
        let blocks = self.digests.iter().take(blocks(size)).map(|digest| Block { digest: *digest, place: Place::Zero }).collect();
        BlockMap { size, packs: Vec::new(), blocks }.disk_digest()
    }

    /// The first block after a disk of `size` bytes that is not zeros.
    pub fn after(&self, size: u64) -> Option<usize> {
        let zero = zero_block();
        (blocks(size)..self.digests.len()).find(|index| self.digests[*index] != zero)
    }
}

fn blocks(size: u64) -> usize {
    usize::try_from(size.div_ceil(BLOCK)).unwrap_or(usize::MAX)
}

/// Reads every block of a completed snapshot. Each is checked against the
/// digest that AWS gives with it, and handed to `take`.
///
/// # Errors
/// [`Code::Corrupt`] when a block is not what AWS says it is; those of `take`.
pub async fn read(region: &Region, snapshot: &str, take: Option<Take>, reports: &Reports) -> Result<Contents> {
    let name = format!("read {snapshot}");
    let (mut digests, mut read) = (Vec::new(), 0);
    let mut gets: JoinSet<Result<(u32, Digest)>> = JoinSet::new();
    let mut next: Option<String> = None;
    loop {
        let page = region.blocks.make(|| region.ebs.list_blocks(snapshot, next.as_deref())).await;
        let page = page.trying_to(|| format!("list the blocks of {snapshot}"))?;
        let count = usize::try_from(page.gib * (GIB / BLOCK)).unwrap_or(usize::MAX);
        if digests.is_empty() {
            digests.resize(count, zero_block());
        }
        for block in page.blocks {
            if block.index as usize >= count {
                return Err(Error::new(Code::Corrupt, format!("{snapshot} has a block {} and ends before it", block.index)));
            }
            while gets.len() >= UNDER_WAY {
                read += note(&mut gets, &mut digests).await?;
                reports.progress(&name, read * BLOCK, None);
            }
            let (region, snapshot, take) = (region.clone(), snapshot.to_owned(), take.clone());
            gets.spawn(async move { get(&region, &snapshot, &block, take).await });
        }
        next = page.next;
        if next.is_none() {
            break;
        }
    }
    while !gets.is_empty() {
        read += note(&mut gets, &mut digests).await?;
        reports.progress(&name, read * BLOCK, None);
    }
    Ok(Contents { digests, read })
}

/// Takes down what has arrived; gives how many blocks that were.
async fn note(gets: &mut JoinSet<Result<(u32, Digest)>>, digests: &mut [Digest]) -> Result<u64> {
    let Some(got) = gets.join_next().await else { return Ok(0) };
    let (index, digest) = got.trying(|| "read a block".into())??;
    digests[index as usize] = digest;
    Ok(1)
}

async fn get(region: &Region, snapshot: &str, block: &ListedBlock, take: Option<Take>) -> Result<(u32, Digest)> {
    let got = region.blocks.make(|| region.ebs.get_block(snapshot, block)).await;
    let (data, said) = got.trying_to(|| format!("read block {} of {snapshot}", block.index))?;
    let digest = Digest::of(&data);
    if data.len() as u64 != BLOCK || digest != said {
        let what = format!("block {} of {snapshot} is {digest}, and AWS says that it is {said}", block.index);
        return Err(Error::new(Code::Corrupt, what).next("read it again; if it stays so, ask AWS"));
    }
    if let Some(take) = take {
        take(block.index, &data)?;
    }
    Ok((block.index, digest))
}

/// What came of reading an AMI back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Its region.
    pub region: String,
    /// Its id.
    pub ami: String,
    /// The image that it says it is: its name and version.
    pub reference: Option<String>,
    /// Digest of that image's manifest.
    pub digest: Option<Digest>,
    /// Its disks, the root first.
    pub disks: Vec<VerifiedDisk>,
}

/// What came of reading a snapshot back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VerifiedDisk {
    /// The snapshot.
    pub snapshot: String,
    /// The disk's virtual size in bytes, as its tag has it.
    pub size: u64,
    /// Disk digest of what was read.
    pub disk_digest: Digest,
    /// What it should be.
    pub expected: Option<Digest>,
    /// How many blocks were read.
    pub blocks: u64,
    /// Blocks that differ, where the map of what it should be is known; at most
    /// a hundred.
    pub different: Vec<u32>,
    /// The first block after the disk's end that is not zeros.
    pub after_end: Option<u32>,
}

impl VerifiedDisk {
    /// Whether the snapshot holds what it should.
    pub fn is_sound(&self) -> bool {
        self.expected == Some(self.disk_digest) && self.after_end.is_none()
    }
}

/// Reads an AMI's snapshots back. `expected` are the disk digests that the
/// caller knows of, by the digest of the image; without one, what the
/// snapshots' tags say counts.
///
/// # Errors
/// [`Code::NotFound`] when the AMI is not there; [`Code::Usage`] when a snapshot
/// does not say how large its disk is.
pub async fn verify(
    region: &Region,
    ami: &str,
    expected: &(dyn Fn(&Digest) -> Result<Option<Vec<Digest>>> + Sync),
    maps: &dyn Maps,
    reports: &Reports,
) -> Result<Verified> {
    let find = Find::id(ami);
    let images = region.calls.make(|| region.images.images(&find)).await;
    let images = images.trying_to(|| format!("look at {ami} in {}", region.name))?;
    let Some(image) = images.into_iter().next() else {
        return Err(Error::new(Code::NotFound, format!("there is no {ami} in {}", region.name)).next("check the region"));
    };
    let tag = |tag: &str| image.tags.get(tag).cloned();
    let digest: Option<Digest> = tag(tags::DIGEST).and_then(|text| text.parse().ok());
    let expected = match &digest {
        Some(digest) => expected(digest)?,
        None => None,
    };
    let mut disks = image.disks.clone();
    disks.sort_by_key(|disk| (Some(&disk.device) != image.root.as_ref(), disk.device.clone()));
    let snapshots: Vec<String> = disks.into_iter().filter_map(|disk| disk.snapshot).collect();
    let mut verified = Verified {
        region: region.name.clone(),
        ami: image.id.clone(),
        reference: tag(tags::NAME).zip(tag(tags::VERSION)).map(|(name, version)| format!("{name}:{version}")),
        digest,
        disks: Vec::new(),
    };
    for (number, snapshot) in snapshots.iter().enumerate() {
        let own = describe(region, snapshot).await?;
        let Some(size) = own.get(tags::DISK_SIZE).and_then(|size| size.parse::<u64>().ok()) else {
            let what = format!("{snapshot} does not say how large the disk in it is");
            return Err(Error::new(Code::Usage, what).next("only what kiln has published can be verified: it has the tag kiln:disk-size"));
        };
        let said = own.get(tags::DISK_DIGEST).and_then(|digest| digest.parse().ok());
        let expected = expected.as_ref().map_or(said, |disks| disks.get(number).copied());
        let contents = read(region, snapshot, None, reports).await?;
        let disk_digest = contents.disk_digest(size);
        let mut different = Vec::new();
        if let Some(wanted) = expected.filter(|wanted| *wanted != disk_digest)
            && let Some(map) = maps.map(&wanted, digest.as_ref()).await?
        {
            let pairs = map.blocks.iter().zip(&contents.digests).enumerate();
            let differs = pairs.filter(|(_, (block, digest))| block.digest != **digest);
            different = differs.filter_map(|(index, _)| u32::try_from(index).ok()).take(100).collect();
        }
        verified.disks.push(VerifiedDisk {
            snapshot: snapshot.clone(),
            size,
            disk_digest,
            expected,
            blocks: contents.read,
            different,
            after_end: contents.after(size).and_then(|index| u32::try_from(index).ok()),
        });
    }
    Ok(verified)
}

/// The tags of a snapshot.
async fn describe(region: &Region, snapshot: &str) -> Result<BTreeMap<String, String>> {
    let find = Find::id(snapshot);
    let found = region.calls.make(|| region.images.snapshots(&find)).await;
    let found = found.trying_to(|| format!("look at the snapshot {snapshot} in {}", region.name))?;
    Ok(found.into_iter().next().map(|snapshot| snapshot.tags).unwrap_or_default())
}

//! Blocks: how a disk's content moves between the parts.

use std::collections::BTreeMap;

use crate::Digest;
use crate::base::Base;
use crate::error::Result;
use crate::image::{BlockMap, Config, DiskRecord};

/// Size of a block in bytes, always. The digests of blocks are those of the
/// EBS direct APIs, which fix this size.
pub const BLOCK: u64 = 512 * 1024;

/// What is known of a stretch of a disk without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Reads as zeros.
    Zero,
    /// Has to be read.
    Data,
    /// Unchanged from the base (the overlay's backing file).
    Backing,
}

/// A stretch of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// What is there.
    pub content: Content,
}

/// A disk's content as raw bytes.
pub trait BlockSource: Send {
    /// Virtual size in bytes.
    fn size(&self) -> u64;

    /// What is known without reading: ordered, without gaps or overlaps, from
    /// 0 to [`BlockSource::size`].
    ///
    /// # Errors
    /// When the disk cannot be read.
    fn extents(&mut self) -> Result<Vec<Extent>>;

    /// Fills `buffer` from `offset`; both lie within the size.
    ///
    /// # Errors
    /// When the disk cannot be read.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()>;
}

/// Takes disks apart into blocks that a store keeps.
pub trait ImageSink: Send + Sync {
    /// Reads, digests and stores a disk. Blocks that `parents` hold are not
    /// stored again; where the source says [`Content::Backing`], the digest is
    /// taken from `backing`, the base's map. Memory is bounded, whatever the
    /// size. `progress` is called with bytes done and in all.
    ///
    /// # Errors
    /// When reading or storing fails; then nothing of it can be seen.
    fn write_disk(
        &self,
        name: &str,
        source: &mut dyn BlockSource,
        backing: Option<&BlockMap>,
        parents: &[DiskRecord],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<DiskRecord>;

    /// Makes an image of disks that were written, and names it
    /// `name:version`. An image of the same content under that name is given
    /// back as it is. `annotations` go into the manifest.
    ///
    /// # Errors
    /// [`crate::Code::Refused`] when that version is immutable by now and
    /// something else; or when it cannot be written.
    fn publish(&self, config: &Config, disks: &[DiskRecord], annotations: &BTreeMap<String, String>) -> Result<Published>;

    /// As [`ImageSink::publish`], without a name: the image is found by its
    /// digest alone, and `name:version` stays what it is.
    ///
    /// # Errors
    /// When it cannot be written.
    fn publish_unnamed(&self, config: &Config, disks: &[DiskRecord], annotations: &BTreeMap<String, String>) -> Result<Digest>;

    /// Names an image that is there `name:version`, where it is not named so
    /// (any more); gives what that name meant before, when it was something
    /// else.
    ///
    /// # Errors
    /// [`crate::Code::Refused`] when that version is immutable by now and
    /// something else; or when it cannot be written.
    fn name_again(&self, name: &str, version: &str, image: &Digest) -> Result<Option<Digest>>;

    /// The blocks of a base that an earlier bake has stored.
    ///
    /// # Errors
    /// When they are there and cannot be read.
    fn base(&self, disk: &Digest) -> Result<Option<DiskRecord>>;

    /// Stores the blocks of a base under its disk digest, so that every bake
    /// on it stores only what differs. `label` is for people.
    ///
    /// # Errors
    /// As [`ImageSink::write_disk`].
    fn adopt(&self, base: &Base, label: &str, progress: &mut dyn FnMut(u64, u64)) -> Result<DiskRecord>;

    /// The root disk of the newest image of that name: its blocks need not be
    /// stored again either.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    fn predecessor(&self, name: &str) -> Result<Option<DiskRecord>>;
}

/// What came of publishing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Digest of the manifest.
    pub digest: Digest,
    /// What `name:version` meant before, when it was something else.
    pub moved_from: Option<Digest>,
}

/// Which blocks of a disk are known to be zero, to be unchanged, or have to be
/// read, from its extents. A block of several kinds has to be read, unless it
/// is zero and backing only in parts that are themselves zero.
pub fn classify(size: u64, extents: &[Extent]) -> Vec<Content> {
    let count = size.div_ceil(BLOCK);
    let mut blocks: Vec<Option<Content>> = vec![None; usize::try_from(count).unwrap_or(usize::MAX)];
    for extent in extents.iter().filter(|e| e.length > 0) {
        let first = extent.offset / BLOCK;
        let last = (extent.offset + extent.length - 1).min(size.saturating_sub(1)) / BLOCK;
        for index in first..=last {
            let Some(block) = usize::try_from(index).ok().and_then(|i| blocks.get_mut(i)) else { break };
            *block = match *block {
                None => Some(extent.content),
                Some(known) if known == extent.content => Some(known),
                Some(_) => Some(Content::Data),
            };
        }
    }
    blocks.into_iter().map(|block| block.unwrap_or(Content::Data)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_blocks_have_to_be_read() {
        let extents = [
            Extent { offset: 0, length: BLOCK, content: Content::Backing },
            Extent { offset: BLOCK, length: BLOCK / 2, content: Content::Backing },
            Extent { offset: BLOCK + BLOCK / 2, length: BLOCK, content: Content::Zero },
            Extent { offset: 2 * BLOCK + BLOCK / 2, length: BLOCK / 2 + 100, content: Content::Zero },
        ];
        let size = 3 * BLOCK + 100;
        assert_eq!(classify(size, &extents), [Content::Backing, Content::Data, Content::Zero, Content::Zero]);
    }
}

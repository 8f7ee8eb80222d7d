//! The image format: config, disks, block map. See `docs/image-format.md`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::Digest;
use crate::block::BLOCK;
use crate::key::Key;

/// `artifactType` of an image's manifest.
pub const IMAGE: &str = "application/vnd.kiln.image.v1+json";
/// Media type of an image's config.
pub const CONFIG: &str = "application/vnd.kiln.config.v1+json";
/// Media type of a disk's block map.
pub const BLOCK_MAP: &str = "application/vnd.kiln.blockmap.v1";
/// Media type of a pack: zstd frames of one block each.
pub const PACK: &str = "application/vnd.kiln.pack.v1+zstd";

/// Annotation with the time of the bake, RFC 3339.
pub const CREATED: &str = "org.opencontainers.image.created";
/// Annotation with the bake's id.
pub const BAKE: &str = "vnd.kiln.bake";
/// Annotation with what an image is kept for; see [`KIND_BASE`].
pub const KIND: &str = "vnd.kiln.kind";
/// Kept because bakes start from it, not because somebody baked it.
pub const KIND_BASE: &str = "base";

/// How firmware starts a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    /// SeaBIOS only.
    Bios,
    /// UEFI only.
    Uefi,
    /// Either.
    BiosUefi,
}

/// What an image's config says: what it is, without time or bake id, so that
/// the same content has the same digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Image name.
    pub name: String,
    /// Image version.
    pub version: String,
    /// Architecture in OCI's words (`amd64`).
    pub architecture: String,
    /// How it starts.
    pub firmware: Firmware,
    /// Whether its guest reads systemd credentials from the firmware: then
    /// kiln gets in without cloud-init.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub credentials: bool,
    /// Its disks.
    pub disks: Vec<DiskConfig>,
    /// Disk digest of the base; [`CloudImage::identity`] of one that is at a cloud.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Digest>,
    /// The steps that made it.
    #[serde(default)]
    pub steps: Vec<StepConfig>,
    /// Commit of the template's source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Labels from the template.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What it was captured as, where it was baked at a cloud. Then its disks
    /// are listed only if their blocks were read back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cloud: Vec<CloudImage>,
    /// Paths that its machines may change (`[drift] mutable`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mutable: Vec<String>,
}

impl Config {
    /// The config of an image of which no more is known than this.
    pub fn new(name: impl Into<String>, version: impl Into<String>, architecture: impl Into<String>, firmware: Firmware) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            architecture: architecture.into(),
            firmware,
            credentials: false,
            disks: Vec::new(),
            base: None,
            steps: Vec::new(),
            commit: None,
            labels: BTreeMap::new(),
            cloud: Vec::new(),
            mutable: Vec::new(),
        }
    }
}

/// An image that a cloud keeps. Clouds never change one under its id, so the
/// id stands for its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudImage {
    /// Which builder knows it (`ec2`).
    pub builder: String,
    /// Where it is (`eu-central-1`).
    pub region: String,
    /// Its id (`ami-0123456789abcdef0`).
    pub id: String,
    /// Size of its root disk in bytes, as the cloud counts it.
    pub size: u64,
    /// The snapshots behind its disks, that of the root disk first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<String>,
}

impl CloudImage {
    /// What stands in keys for a disk that nobody here has read: SHA-256 over
    /// the line `kiln-cloud-image-v1 <builder> <id>\n`. Ids are unique across
    /// regions.
    pub fn identity(&self) -> Digest {
        cloud_identity(&self.builder, &self.id)
    }
}

/// [`CloudImage::identity`], where no more than the id is known.
pub fn cloud_identity(builder: &str, id: &str) -> Digest {
    Digest::of(format!("kiln-cloud-image-v1 {builder} {id}\n"))
}

impl Config {
    /// What images that are baked from this one name as their base: the digest
    /// of the root disk, or, without a disk, what stands for it.
    pub fn as_base(&self) -> Option<Digest> {
        let disk = self.disks.iter().find(|disk| disk.root).map(|disk| disk.digest);
        disk.or_else(|| self.cloud.first().map(CloudImage::identity))
    }
}

/// One disk in the config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Its name (`root`).
    pub name: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// Its disk digest.
    pub digest: Digest,
    /// Whether it is the one that starts.
    pub root: bool,
}

/// One step in the config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepConfig {
    /// Its name.
    pub name: String,
    /// Its key.
    pub key: Key,
}

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: it is all zeros.
    Zero,
    /// A zstd frame in a pack.
    Pack {
        /// Index into [`BlockMap::packs`].
        pack: u32,
        /// First byte of the frame.
        offset: u32,
        /// Length of the frame in bytes.
        length: u32,
    },
}

/// One block of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// SHA-256 of the raw block, the last one zero-padded.
    pub digest: Digest,
    /// Where its bytes are.
    pub place: Place,
}

/// A pack as a map lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackRef {
    /// Digest of the pack's bytes.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// A disk's blocks in order, and the packs that hold them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockMap {
    /// Virtual size in bytes.
    pub size: u64,
    /// The packs, each once.
    pub packs: Vec<PackRef>,
    /// The blocks; as many as the size needs.
    pub blocks: Vec<Block>,
}

impl BlockMap {
    /// The disk digest: SHA-256 over the line
    /// `kiln-disk-v1 <virtual size in bytes> 524288\n` and the 32 raw bytes of
    /// each block's digest in order.
    pub fn disk_digest(&self) -> Digest {
        let mut hasher = Sha256::new();
        hasher.update(format!("kiln-disk-v1 {} {BLOCK}\n", self.size));
        for block in &self.blocks {
            hasher.update(block.digest.as_bytes());
        }
        Digest::finish(hasher)
    }
}

/// A disk in the store: its map and where that is.
#[derive(Debug, Clone)]
pub struct DiskRecord {
    /// Its name (`root`).
    pub name: String,
    /// Its disk digest.
    pub digest: Digest,
    /// Digest of the blob that holds the map.
    pub map_digest: Digest,
    /// The map.
    pub map: BlockMap,
    /// Bytes that had to be stored for it.
    pub stored: u64,
    /// Bytes of blocks that are not zero.
    pub used: u64,
}

/// The digest of a block of zeros.
pub fn zero_block() -> Digest {
    static ZERO: std::sync::OnceLock<Digest> = std::sync::OnceLock::new();
    *ZERO.get_or_init(|| Digest::of(vec![0; usize::try_from(BLOCK).unwrap_or(0)]))
}

/// This machine's architecture in OCI's words.
pub fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_of_an_empty_disk_is_as_documented() {
        let map = BlockMap { size: 2 * BLOCK, packs: vec![], blocks: vec![Block { digest: zero_block(), place: Place::Zero }; 2] };
        let mut expected = format!("kiln-disk-v1 {} 524288\n", 2 * BLOCK).into_bytes();
        expected.extend(zero_block().as_bytes());
        expected.extend(zero_block().as_bytes());
        assert_eq!(map.disk_digest(), Digest::of(expected));
    }
}

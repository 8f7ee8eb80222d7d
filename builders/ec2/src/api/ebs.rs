//! The EBS direct APIs: the blocks of a snapshot, written and read without a
//! volume or an instance.
//!
//! Source: <https://docs.aws.amazon.com/ebs/latest/APIReference/>.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use kiln_model::Digest;

use super::{Result, Tags};

/// A snapshot to be begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Client token: the same call with the same token gives the same snapshot.
    pub token: String,
    /// Size of its volumes in GiB; not less than its parent's.
    pub gib: u32,
    /// The snapshot from which blocks that are not written are taken; completed,
    /// of this account. Without, they read as zeros.
    pub parent: Option<String>,
    /// How it is encrypted; with a parent, as that one is.
    pub encryption: Encryption,
    /// For people.
    pub description: String,
    /// Tags of the snapshot.
    pub tags: Tags,
    /// After this time without a call AWS gives it up; 10 minutes to 3 days.
    pub timeout: Duration,
}

/// How a snapshot is encrypted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Encryption {
    /// As the parent is, or as the account does by default.
    #[default]
    Inherited,
    /// With this key: the ARN of a KMS key.
    Key(String),
}

/// Where a snapshot is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotState {
    /// Blocks are being written, by kiln or by AWS.
    Pending,
    /// It can be used.
    Completed,
    /// It cannot be used, ever.
    Failed,
}

/// A snapshot that was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// Its id (`snap-…`).
    pub id: String,
    /// Bytes of a block: always 524,288.
    pub block_size: u32,
    /// Where it is: not pending when an earlier call with the same token was
    /// carried through already.
    pub state: SnapshotState,
}

/// A block of a snapshot that was written at some time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedBlock {
    /// Its number, from 0.
    pub index: u32,
    /// What [`Ebs::get_block`] wants to see.
    pub token: String,
}

/// A block that differs between two snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedBlock {
    /// Its number, from 0.
    pub index: u32,
    /// Its token in the second snapshot; `None` when it is in the first alone.
    pub token: Option<String>,
}

/// One page of a list of blocks, by ascending index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// The blocks.
    pub blocks: Vec<T>,
    /// Size of the snapshot's volumes in GiB.
    pub gib: u64,
    /// What gives the next page; `None` with the last.
    pub next: Option<String>,
}

/// The EBS direct APIs of one region.
#[async_trait]
pub trait Ebs: Send + Sync {
    /// StartSnapshot.
    ///
    /// # Errors
    /// [`super::Kind::Exists`] when the token was used with other values.
    async fn start_snapshot(&self, snapshot: &NewSnapshot) -> Result<Started>;

    /// PutSnapshotBlock: writes `data`, 524,288 bytes with SHA-256 `digest`,
    /// which AWS checks. A block may be written again.
    ///
    /// # Errors
    /// [`super::Kind::Invalid`] when the data are not those of the digest.
    async fn put_block(&self, snapshot: &str, index: u32, data: Bytes, digest: &Digest) -> Result<()>;

    /// CompleteSnapshot: `changed` different blocks were written, and the
    /// SHA-256 over their raw digests by ascending index is `checksum`.
    ///
    /// # Errors
    /// [`super::Kind::Invalid`] when that is not so.
    async fn complete_snapshot(&self, snapshot: &str, changed: u32, checksum: &Digest) -> Result<SnapshotState>;

    /// ListSnapshotBlocks: the blocks of a completed snapshot that were ever
    /// written, in it or one it descends from. `next` is the last page's.
    ///
    /// # Errors
    /// When it is not there or not completed.
    async fn list_blocks(&self, snapshot: &str, next: Option<&str>) -> Result<Page<ListedBlock>>;

    /// ListChangedBlocks: what differs between two snapshots of one lineage.
    ///
    /// # Errors
    /// As [`Ebs::list_blocks`].
    async fn list_changed(&self, first: &str, second: &str, next: Option<&str>) -> Result<Page<ChangedBlock>>;

    /// GetSnapshotBlock: the data, and the digest that AWS says they have.
    ///
    /// # Errors
    /// When the token does not fit.
    async fn get_block(&self, snapshot: &str, block: &ListedBlock) -> Result<(Bytes, Digest)>;
}

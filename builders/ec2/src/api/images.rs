//! AMIs and snapshots.
//!
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/>.

use async_trait::async_trait;
use jiff::Timestamp;

use super::ebs::{Encryption, SnapshotState};
use super::{Find, Result, Tags};

/// Where an AMI is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageState {
    /// AWS is making it.
    Pending,
    /// It can be used.
    Available,
    /// It cannot be used, and will not be.
    Failed,
}

/// A disk that an AMI starts with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageDisk {
    /// Its name for EC2, such as `/dev/xvda`.
    pub device: String,
    /// What it is made from; not known while a copy is on its way.
    pub snapshot: Option<String>,
    /// Its size in GiB.
    pub gib: Option<u32>,
}

/// An AMI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its id (`ami-…`).
    pub id: String,
    /// Its name, of which an account has one in each region.
    pub name: String,
    /// Account that it belongs to.
    pub owner: String,
    /// Where it is on its way.
    pub state: ImageState,
    /// Why it is [`ImageState::Failed`], as AWS says it.
    pub reason: Option<String>,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// `x86_64` or `arm64`.
    pub architecture: String,
    /// `legacy-bios`, `uefi` or `uefi-preferred`.
    pub boot_mode: Option<String>,
    /// The device that it starts from.
    pub root: Option<String>,
    /// Its disks, those in instance stores left out.
    pub disks: Vec<ImageDisk>,
    /// Its tags.
    pub tags: Tags,
    /// From when on it is deprecated.
    pub deprecated: Option<Timestamp>,
}

impl Image {
    /// The snapshot that it starts from.
    pub fn root_snapshot(&self) -> Option<&str> {
        let root = self.root.as_deref()?;
        self.disks.iter().find(|disk| disk.device == root)?.snapshot.as_deref()
    }
}

/// An AMI to be made of snapshots. It always is an HVM image with ENA, whose
/// instances take IMDSv2 alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewImage {
    /// Its name: 3 to 128 letters, digits and `()[] ./-'@_`.
    pub name: String,
    /// For people.
    pub description: String,
    /// `x86_64` or `arm64`.
    pub architecture: String,
    /// `legacy-bios`, `uefi` or `uefi-preferred`.
    pub boot_mode: String,
    /// Its disks, each with a completed snapshot; the first is the root.
    pub disks: Vec<NewDisk>,
    /// Tags of the AMI.
    pub tags: Tags,
}

/// A disk of a [`NewImage`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDisk {
    /// Its name for EC2, such as `/dev/xvda`.
    pub device: String,
    /// What it is made from.
    pub snapshot: String,
    /// Its size in GiB.
    pub gib: u32,
    /// Volume type, such as `gp3`.
    pub volume_type: String,
}

/// A copy of an AMI from another region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageCopy {
    /// Client token: the same call with the same token gives the same AMI.
    pub token: String,
    /// The AMI to copy.
    pub source: String,
    /// Its region.
    pub source_region: String,
    /// Name of the copy.
    pub name: String,
    /// For people.
    pub description: String,
    /// How its snapshots are encrypted.
    pub encryption: Encryption,
    /// Tags of the copy and of its snapshots.
    pub tags: Tags,
}

/// A copy of a snapshot from another region, or with other encryption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotCopy {
    /// The snapshot to copy.
    pub source: String,
    /// Its region.
    pub source_region: String,
    /// For people.
    pub description: String,
    /// How the copy is encrypted.
    pub encryption: Encryption,
    /// Tags of the copy.
    pub tags: Tags,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id (`snap-…`).
    pub id: String,
    /// Where it is on its way.
    pub state: SnapshotState,
    /// Size of its volumes in GiB.
    pub gib: u32,
    /// When it was begun.
    pub started: Option<Timestamp>,
    /// ARN of the key that it is encrypted with.
    pub key: Option<String>,
    /// Whether it is encrypted at all.
    pub encrypted: bool,
    /// Its tags.
    pub tags: Tags,
}

/// Who else may use an image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Audience {
    /// An account, by its number.
    Account(String),
    /// An organisation, by its ARN.
    Organization(String),
    /// A unit of an organisation, by its ARN.
    Unit(String),
    /// Everybody.
    All,
}

/// Somebody that needs an AMI.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// The AMI's id, or `resolve:ssm:NAME` for what a parameter says.
    pub image: String,
    /// An instance's id (`i-…`) or a launch template's and its version
    /// (`lt-… version 3`).
    pub by: String,
}

/// Images and snapshots of one region.
#[async_trait]
pub trait Images: Send + Sync {
    /// DescribeImages, deprecated ones too.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn images(&self, find: &Find) -> Result<Vec<Image>>;

    /// RegisterImage. It has no client token: the name makes it happen once.
    ///
    /// # Errors
    /// [`super::Kind::Exists`] when there is an AMI of that name.
    async fn register(&self, image: &NewImage) -> Result<String>;

    /// DeregisterImage.
    ///
    /// # Errors
    /// [`super::Kind::NotFound`] when it is gone.
    async fn deregister(&self, image: &str) -> Result<()>;

    /// CopyImage, into this region. The copy is pending for a while.
    ///
    /// # Errors
    /// When the source cannot be copied.
    async fn copy_image(&self, copy: &ImageCopy) -> Result<String>;

    /// DescribeSnapshots.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn snapshots(&self, find: &Find) -> Result<Vec<Snapshot>>;

    /// CopySnapshot, into this region; it has no client token.
    ///
    /// # Errors
    /// When the source cannot be copied.
    async fn copy_snapshot(&self, copy: &SnapshotCopy) -> Result<String>;

    /// DeleteSnapshot.
    ///
    /// # Errors
    /// [`super::Kind::State`] while an AMI needs it; [`super::Kind::NotFound`]
    /// when it is gone.
    async fn delete_snapshot(&self, snapshot: &str) -> Result<()>;

    /// CreateTags, on resources of any kind.
    ///
    /// # Errors
    /// When one of them is not there.
    async fn tag(&self, ids: &[String], tags: &Tags) -> Result<()>;

    /// Lets these use an AMI beside those that may already
    /// (ModifyImageAttribute).
    ///
    /// # Errors
    /// When there is no such account, or the AMI may not be shared.
    async fn share_image(&self, image: &str, with: &[Audience]) -> Result<()>;

    /// Who else may use an AMI (DescribeImageAttribute).
    ///
    /// # Errors
    /// When it cannot be read.
    async fn shared_with(&self, image: &str) -> Result<Vec<Audience>>;

    /// Lets these accounts make volumes of a snapshot
    /// (ModifySnapshotAttribute).
    ///
    /// # Errors
    /// When there is no such account, or the snapshot may not be shared.
    async fn share_snapshot(&self, snapshot: &str, accounts: &[String]) -> Result<()>;

    /// EnableImageDeprecation: from `at` on (to the minute) the AMI is not
    /// shown to others.
    ///
    /// # Errors
    /// When the time is past.
    async fn deprecate(&self, image: &str, at: Timestamp) -> Result<()>;

    /// What uses AMIs: instances that are not terminated, and every version of
    /// every launch template.
    ///
    /// # Errors
    /// When that cannot be read.
    async fn uses(&self) -> Result<Vec<Use>>;
}

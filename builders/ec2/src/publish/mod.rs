//! An image as an AMI: the bits that were baked and tested are the bits that
//! boot.
//!
//! ```text
//!  block map ──► snapshot ──► AMI ──┬──► copies in other regions, side by side
//!   upload.rs                       ├──► accounts, organisations, deprecation
//!    plan.rs: which blocks          └──► parameters that follow a channel
//!    state.rs: what a kill leaves         follow.rs
//! ```
//!
//! Every part looks first whether what it is to make is there: snapshots are
//! found by the disk digest in their tags, AMIs by their name, which has the
//! image's digest in it and which an account has only once in a region. So the
//! same command run again does what is missing, however the first one ended.

pub mod follow;
mod image;
mod plan;
pub mod prune;
mod state;
mod upload;
pub mod verify;
#[cfg(test)]
#[path = "tests.rs"]
mod whole;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use kiln_model::event::Reports;
use kiln_model::image::{BlockMap, Firmware};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::api::images::Audience;
use crate::api::retry::{Calls, Pace};
use crate::api::{Cloud, Ebs, Images, Parameters, Tags};
use crate::tags;

pub use upload::Uploaded;

/// Calls of the EBS direct APIs under way at most.
const BLOCK_CALLS: usize = 64;
/// Other calls under way at most.
const OTHER_CALLS: usize = 8;

/// Reads the blocks of a disk, for one thread.
pub trait BlockReader: Send {
    /// The raw bytes of a block, 524,288; need not be checked, since AWS checks
    /// them against the digest.
    ///
    /// # Errors
    /// When it cannot be read.
    fn read(&mut self, index: usize) -> Result<Vec<u8>>;

    /// Checks that a block is what its digest says.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when it is not.
    fn check(&mut self, index: usize) -> Result<()>;
}

/// Where the blocks of a disk are.
pub trait Blocks: Send + Sync {
    /// A reader of them.
    ///
    /// # Errors
    /// When they cannot be opened.
    fn reader(&self) -> Result<Box<dyn BlockReader>>;
}

/// Finds block maps of earlier images.
#[async_trait]
pub trait Maps: Send + Sync {
    /// The map of the disk with this digest, perhaps one of the image with that
    /// manifest; `None` when it is not known here. It has that digest.
    ///
    /// # Errors
    /// When what is here cannot be read.
    async fn map(&self, disk: &Digest, image: Option<&Digest>) -> Result<Option<BlockMap>>;
}

/// A disk to be published.
#[derive(Clone)]
pub struct Disk {
    /// Its name in the image.
    pub name: String,
    /// Its disk digest.
    pub digest: Digest,
    /// Its blocks' digests.
    pub map: Arc<BlockMap>,
    /// Its blocks.
    pub blocks: Arc<dyn Blocks>,
}

/// An image to be published.
#[derive(Clone)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its architecture in OCI's words.
    pub architecture: String,
    /// How it starts.
    pub firmware: Firmware,
    /// Digest of its manifest.
    pub digest: Digest,
    /// Commit of the template's source.
    pub commit: Option<String>,
    /// The bake's id.
    pub bake: Option<String>,
    /// Its disks; the first is the root.
    pub disks: Vec<Disk>,
}

/// How it is to be published.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// Regions: the first gets the blocks, the others copies.
    pub regions: Vec<String>,
    /// Who else may use it.
    pub audience: Vec<Audience>,
    /// ARN of the KMS key to encrypt with, by region; empty for none.
    pub keys: BTreeMap<String, String>,
    /// Tags beside kiln's own.
    pub tags: Tags,
    /// From when on it is deprecated.
    pub deprecate: Option<Timestamp>,
    /// Type of the volumes that instances get.
    pub volume_type: String,
}

/// An AMI that was published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ami {
    /// Its region.
    pub region: String,
    /// Its id.
    pub ami: String,
    /// Its name.
    pub name: String,
    /// Its architecture in OCI's words.
    pub arch: String,
    /// Its snapshots, in the order of the image's disks.
    pub snapshots: Vec<String>,
    /// Whether it was there before.
    pub existed: bool,
}

/// What came of publishing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Published {
    /// The AMIs, in the order of the regions.
    pub amis: Vec<Ami>,
    /// Blocks that differ from what the snapshots are based on.
    pub blocks_written: u64,
    /// Blocks that this run has sent.
    pub blocks_sent: u64,
    /// The snapshots that the new ones are based on.
    pub parents: Vec<String>,
}

/// The services of one region, and what is known of how much it bears.
#[derive(Clone)]
pub struct Region {
    /// Its name, such as `eu-central-1`.
    pub name: String,
    pub(crate) ebs: Arc<dyn Ebs>,
    pub(crate) images: Arc<dyn Images>,
    pub(crate) parameters: Arc<dyn Parameters>,
    /// Calls of `ebs`.
    pub(crate) blocks: Arc<Calls>,
    /// All other calls.
    pub(crate) calls: Arc<Calls>,
}

impl Region {
    /// Those of `name`.
    ///
    /// # Errors
    /// [`Code::Usage`] when this is no name of a region.
    pub fn new(cloud: &dyn Cloud, name: &str, pace: Pace) -> Result<Self> {
        check_region(name)?;
        Ok(Self {
            name: name.to_owned(),
            ebs: cloud.ebs(name),
            images: cloud.images(name),
            parameters: cloud.parameters(name),
            blocks: Arc::new(Calls::new(pace, BLOCK_CALLS)),
            calls: Arc::new(Calls::new(pace, OTHER_CALLS)),
        })
    }
}

/// Checks that a text looks like a region's name (`eu-central-1`): it becomes
/// part of a host name and of file names.
///
/// # Errors
/// [`Code::Usage`] when it does not.
pub fn check_region(name: &str) -> Result<()> {
    let parts: Vec<&str> = name.split('-').collect();
    let number = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let word = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_lowercase());
    let good = parts.len() >= 3 && parts.last().is_some_and(number) && parts.iter().take(parts.len() - 1).all(word);
    if good && name.len() <= 40 {
        return Ok(());
    }
    Err(Error::new(Code::Usage, format!("`{name}` is no region of AWS")).next("write one such as eu-central-1"))
}

/// Publishes images.
pub struct Publisher<'a> {
    /// AWS.
    pub cloud: &'a dyn Cloud,
    /// How long to wait for what.
    pub pace: Pace,
    /// Block maps of earlier images.
    pub maps: &'a dyn Maps,
    /// Where unfinished uploads are noted: `$KILN_HOME/ec2/uploads`.
    pub folder: PathBuf,
    /// For people.
    pub reports: Reports,
}

impl Publisher<'_> {
    /// Publishes an image: what is there already is used, and what is missing
    /// made.
    ///
    /// # Errors
    /// [`Code::Usage`] when the wish cannot be fulfilled; [`Code::Infrastructure`]
    /// when AWS failed, and the same call may be made again.
    pub async fn publish(&self, subject: &Subject, wish: &Wish) -> Result<Published> {
        check(subject, wish)?;
        let mut regions = Vec::new();
        for name in &wish.regions {
            regions.push(Region::new(self.cloud, name, self.pace)?);
        }
        let Some((home, others)) = regions.split_first() else {
            return Err(Error::new(Code::Usage, "no region is named").next("write --to ec2:REGION"));
        };
        let mut published = Published { amis: Vec::new(), blocks_written: 0, blocks_sent: 0, parents: Vec::new() };
        let work = image::Work { subject: Arc::new(subject.clone()), wish: Arc::new(wish.clone()), reports: self.reports.clone() };
        let ami = match work.existing(home).await? {
            Some(there) => there,
            None => {
                let snapshots = self.snapshots(home, &work, &mut published).await?;
                work.register(home, &snapshots).await?
            }
        };
        work.finish(home, &ami).await?;
        published.amis.push(ami.clone());
        published.amis.extend(copies(&work, &ami, others).await?);
        Ok(published)
    }

    /// The disks as snapshots, one after the other.
    async fn snapshots(&self, home: &Region, work: &image::Work, published: &mut Published) -> Result<Vec<Uploaded>> {
        let mut snapshots = Vec::new();
        for disk in &work.subject.disks {
            let upload = upload::Upload {
                region: home,
                disk,
                maps: self.maps,
                key: work.wish.keys.get(&home.name).map(String::as_str),
                description: &work.description(),
                tags: &work.tags(),
                folder: &self.folder,
                reports: &self.reports,
            };
            let done = upload.run().await?;
            published.blocks_written += done.written;
            published.blocks_sent += done.sent;
            published.parents.extend(done.parent.clone());
            snapshots.push(done);
        }
        Ok(snapshots)
    }
}

/// Copies in the other regions, side by side. What fails in one does not end
/// the others.
async fn copies(work: &image::Work, source: &Ami, others: &[Region]) -> Result<Vec<Ami>> {
    let mut tasks = JoinSet::new();
    for (number, region) in others.iter().enumerate() {
        let (work, source, region) = (work.clone(), source.clone(), region.clone());
        tasks.spawn(async move {
            let copied = async {
                let ami = match work.existing(&region).await? {
                    Some(there) => there,
                    None => work.copy(&region, &source).await?,
                };
                work.finish(&region, &ami).await?;
                Ok::<_, Error>(ami)
            };
            (number, region.name.clone(), copied.await)
        });
    }
    let (mut amis, mut failed) = (Vec::new(), Vec::new());
    while let Some(done) = tasks.join_next().await {
        match done.trying(|| "copy an AMI".into())? {
            (number, _, Ok(ami)) => amis.push((number, ami)),
            (_, region, Err(error)) => failed.push((region, error)),
        }
    }
    failed.sort_by(|a, b| a.0.cmp(&b.0));
    if let Some((region, first)) = failed.pop() {
        let mut error = Error::new(first.kind(), format!("{} is not published in {region}", work.subject.called()));
        for (region, other) in failed {
            error = error.detail(format!("{region}: {}", other.chain()));
        }
        return Err(error.because(first).next("run the same command again: what was published stays, and the rest is made"));
    }
    amis.sort_by_key(|(number, _)| *number);
    Ok(amis.into_iter().map(|(_, ami)| ami).collect())
}

impl Subject {
    /// `name:version`.
    pub fn called(&self) -> String {
        format!("{}:{}", self.name, self.version)
    }
}

/// EC2's word for an architecture.
///
/// # Errors
/// [`Code::Usage`] when EC2 has none.
pub fn ec2_architecture(architecture: &str) -> Result<&'static str> {
    match architecture {
        "amd64" => Ok("x86_64"),
        "arm64" => Ok("arm64"),
        other => {
            Err(Error::new(Code::Usage, format!("EC2 has no machines of architecture {other}")).next("publish an image of amd64 or arm64"))
        }
    }
}

/// How EC2 starts an image: machines of both kinds of firmware take one that
/// starts with either, and those of arm64 have UEFI alone.
///
/// # Errors
/// [`Code::Usage`] when no machine of EC2 starts it.
pub fn boot_mode(architecture: &str, firmware: Firmware) -> Result<&'static str> {
    match (ec2_architecture(architecture)?, firmware) {
        ("arm64", Firmware::Bios) => Err(Error::new(Code::Usage, "machines of arm64 start with UEFI, and this image with BIOS")
            .next("bake it from a base that boots with UEFI")),
        ("arm64", _) | (_, Firmware::Uefi) => Ok("uefi"),
        (_, Firmware::Bios) => Ok("legacy-bios"),
        (_, Firmware::BiosUefi) => Ok("uefi-preferred"),
    }
}

/// What is wrong with a wish, before anything is made.
fn check(subject: &Subject, wish: &Wish) -> Result<()> {
    boot_mode(&subject.architecture, subject.firmware)?;
    if subject.disks.is_empty() || subject.disks.len() > 25 {
        let what = format!("{} has {} disks, and an AMI has 1 to 25", subject.called(), subject.disks.len());
        return Err(Error::new(Code::Usage, what));
    }
    for disk in &subject.disks {
        if !upload::is_of(&disk.map, &disk.digest) {
            let what = format!("the block map of the disk {} is not that of {}", disk.name, disk.digest);
            return Err(Error::new(Code::Corrupt, what).next("`kiln verify` names every image that is damaged"));
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    for region in &wish.regions {
        check_region(region)?;
        if !seen.insert(region) {
            return Err(Error::new(Code::Usage, format!("{region} is named twice")));
        }
        if !wish.keys.is_empty() && !wish.keys.contains_key(region) {
            return Err(Error::new(Code::Usage, format!("no KMS key of {region} is named"))
                .next("a key is of one region: name one for each with --kms-key"));
        }
    }
    if let Some(region) = wish.keys.keys().find(|region| !seen.contains(region)) {
        return Err(Error::new(Code::Usage, format!("a KMS key of {region} is named, and {region} is not published to")));
    }
    if let Some(tag) = wish.tags.keys().find(|tag| tag.starts_with("kiln:") || tag.starts_with("aws:") || tag.as_str() == tags::TITLE) {
        return Err(Error::new(Code::Usage, format!("the tag `{tag}` is not free to be given")).next("choose another name"));
    }
    if !wish.keys.is_empty() && wish.audience.contains(&Audience::All) {
        return Err(Error::new(Code::Usage, "an encrypted AMI cannot be shared with everybody"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions() {
        for good in ["eu-central-1", "us-gov-west-1", "ap-southeast-2"] {
            check_region(good).unwrap();
        }
        for bad in ["", "eu", "eu-central", "EU-central-1", "eu-central-1/x", "eu-central-1.evil.example", "eu--1", "../x-y-1"] {
            assert_eq!(check_region(bad).unwrap_err().kind(), Code::Usage, "{bad}");
        }
    }

    #[test]
    fn boot_modes() {
        for (architecture, firmware, expected) in [
            ("amd64", Firmware::Bios, Some("legacy-bios")),
            ("amd64", Firmware::Uefi, Some("uefi")),
            ("amd64", Firmware::BiosUefi, Some("uefi-preferred")),
            ("arm64", Firmware::BiosUefi, Some("uefi")),
            ("arm64", Firmware::Bios, None),
            ("riscv64", Firmware::Uefi, None),
        ] {
            assert_eq!(boot_mode(architecture, firmware).ok(), expected, "{architecture} {firmware:?}");
        }
    }
}

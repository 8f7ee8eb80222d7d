//! Baking on EC2: `[builder.ec2]` and `[base] ami`.
//!
//! ```text
//!  AMI ──► key pair, group, instance ──► guest answers ──► Machine ──► Stopped
//!  base.rs        start.rs               kiln-ssh        machine.rs      │
//!                                                                        ▼
//!                              regions, accounts ◄── AMI ◄── CreateImage
//!                                          capture.rs      (fetch.rs reads it back)
//! ```
//!
//! **Nothing is made that cannot be found again.** Before each call that makes
//! something, the ledger says what is about to be made and for which bake
//! ([`part`]). All of it carries two tags from its first moment on: the bake's
//! id, and that it is unfinished. So what a killed bake leaves is found by its
//! ledger, or, without that, by its tags ([`remove`]); and a finished image,
//! which has lost the second tag, is never taken for a leftover.
//!
//! **A call that makes something is never cut off.** It runs in a task of its
//! own: a bake that is interrupted meanwhile waits for its answer, and then
//! undoes what it names. Only after `kill -9` does the tag have to tell.
//!
//! **Nobody is let in but this machine.** The temporary group opens one port to
//! one address, once it is known; the host key is known before the first
//! connection; the metadata service takes IMDSv2 alone.
//!
//! **Undone in order**: the instance is terminated, and only when it is gone
//! can its group be deleted, and then the key pair. What is ended is waited
//! for, so that "cleaned up" is true when kiln says it.

mod base;
mod capture;
mod fetch;
mod machine;
mod network;
mod part;
mod region;
mod remove;
mod settings;
mod start;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod user_data;

use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::base::{Base, BaseSource};
use kiln_model::checkpoint::Checkpoint;
use kiln_model::event::Reports;
use kiln_model::guest::Guest;
use kiln_model::image::CloudImage;
use kiln_model::kind::Kind;
use kiln_model::machine::{Builder, Context, Machine, Start};
use kiln_model::settings::{Node, Problems};
use kiln_model::{Digest, Key, Result};
use kiln_ssh::Target;

use crate::api::Cloud;
use crate::api::retry::Pace;

pub use remove::{Leftovers, Reaped, reap_ledger, reap_region};
pub use settings::{Ami, Chosen, HostKey, Settings, Volume, Way};

/// The builder's kind, as templates, ledgers and records name it.
pub const EC2: &str = "ec2";

/// A future that can be sent elsewhere.
pub type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Gives the cloud once it is needed: reading a template asks nobody. Fails in
/// a kiln that was built without EC2.
pub type Access = Arc<dyn Fn() -> Boxed<Result<Arc<dyn Cloud>>> + Send + Sync>;

/// Tells the address by which the Internet sees this machine.
pub type OwnAddress = Arc<dyn Fn() -> Boxed<Result<IpAddr>> + Send + Sync>;

/// Connects to a guest, as [`kiln_ssh::connect`] does.
pub type Connect = Arc<dyn Fn(Target, Duration) -> Boxed<Result<Arc<dyn Guest>>> + Send + Sync>;

/// Publishes the disk of this digest, which the store has, in a region; gives
/// the AMI.
pub type PublishDisk = Arc<dyn Fn(Digest, String, Reports) -> Boxed<Result<String>> + Send + Sync>;

/// What the builder needs of what is around it.
#[derive(Clone)]
pub struct Around {
    /// The cloud.
    pub access: Access,
    /// For the temporary group.
    pub own_address: OwnAddress,
    /// The guest.
    pub connect: Connect,
    /// For bases that have a disk here and no AMI yet; without it, that is an
    /// error.
    pub publish: Option<PublishDisk>,
    /// How long what is waited for at AWS.
    pub pace: Pace,
    /// Folder for the keys of machines that are kept.
    pub kept: PathBuf,
}

impl Around {
    /// As kiln itself runs: guests are reached by SSH, kept keys are below `home`.
    pub fn new(access: Access, own_address: OwnAddress, home: &kiln_model::home::Home) -> Self {
        let connect = |target: Target, limit: Duration| -> Boxed<Result<Arc<dyn Guest>>> {
            Box::pin(async move { kiln_ssh::connect(target, limit).await.map(|guest| guest as Arc<dyn Guest>) })
        };
        let connect: Connect = Arc::new(connect);
        Self { access, own_address, connect, publish: None, pace: Pace::default(), kept: home.root().join("kept") }
    }
}

impl Around {
    /// Bases that have a disk here are published by this.
    #[must_use]
    pub fn publishing(mut self, publish: PublishDisk) -> Self {
        self.publish = Some(publish);
        self
    }
}

/// Size in GiB of a volume for so many bytes.
pub(crate) fn gib(size: u64) -> u32 {
    u32::try_from(size.div_ceil(1 << 30).max(1)).unwrap_or(u32::MAX)
}

/// The kind `ec2` of `[builder.NAME]`.
pub struct Ec2Kind(Around);

impl Ec2Kind {
    /// Builders with these surroundings.
    pub fn new(around: Around) -> Self {
        Self(around)
    }
}

impl Kind<dyn Builder> for Ec2Kind {
    fn name(&self) -> &'static str {
        EC2
    }

    fn keys(&self) -> &'static [&'static str] {
        settings::KEYS
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Builder>> {
        let settings = settings::read(settings, folder, problems)?;
        Some(Box::new(Ec2Builder { settings, around: self.0.clone() }))
    }
}

/// The kind `ami` of `[base]`.
pub struct AmiKind(Around);

impl AmiKind {
    /// Bases with these surroundings.
    pub fn new(around: Around) -> Self {
        Self(around)
    }
}

impl Kind<dyn BaseSource> for AmiKind {
    fn name(&self) -> &'static str {
        "ami"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["ami"]
    }

    fn read(&self, settings: &Node, _: &Path, problems: &mut Problems) -> Option<Box<dyn BaseSource>> {
        let ami = settings::read_ami(settings, problems)?;
        Some(Box::new(base::AmiSource::new(ami, self.0.clone())))
    }
}

/// Gives machines at EC2, all with the same settings.
pub struct Ec2Builder {
    pub(crate) settings: Settings,
    pub(crate) around: Around,
}

impl Ec2Builder {
    pub(crate) async fn region(&self) -> Result<region::Region> {
        let cloud = (self.around.access)().await?;
        Ok(region::Region::new(&cloud, &self.settings.region, self.around.pace))
    }
}

#[async_trait]
impl Builder for Ec2Builder {
    fn kind(&self) -> &'static str {
        EC2
    }

    fn at_cloud(&self) -> bool {
        true
    }

    fn region(&self) -> Option<&str> {
        Some(&self.settings.region)
    }

    async fn still_there(&self, images: &[CloudImage], _: &Context) -> Result<bool> {
        let mut wanted = std::iter::once(&self.settings.region).chain(&self.settings.copy_to);
        if !wanted.all(|region| images.iter().any(|image| image.builder == EC2 && image.region == *region)) {
            return Ok(false);
        }
        let cloud = (self.around.access)().await?;
        for image in images {
            if !region::Region::new(&cloud, &image.region, self.around.pace).has_image(&image.id).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn memory_key(&self, _: &Key, _: &Base, _: &Context) -> Result<Option<Key>> {
        Ok(None)
    }

    async fn start(&self, base: &Base, start: &Start, context: &Context) -> Result<Box<dyn Machine>> {
        Ok(Box::new(self.start_machine(base, start, context).await?))
    }

    async fn resume(&self, _: &Base, _: &Checkpoint, _: &Start, _: &Context) -> Result<Option<Box<dyn Machine>>> {
        Ok(None)
    }
}

//! AWS, as the commands reach it: what `ec2:…` means, and where the blocks and
//! maps of images come from.
//!
//! Without the feature `ec2` everything here is the same but for [`connect`],
//! which says that this kiln was built without it.

use std::str::FromStr;
use std::sync::Arc;

use async_trait::async_trait;
use kiln_disk::blocks::MapSource;
use kiln_ec2::api::Cloud;
use kiln_ec2::publish::{BlockReader, Blocks, Disk, Maps, Subject, check_region};
use kiln_model::image::{BAKE, BlockMap};
use kiln_model::{Code, Digest, Error, Result};
use kiln_store::place::images_of;
use kiln_store::{Place, Store, StorePacks, decode_block_map};

/// Most bytes of a block map at a registry: that of the largest disk.
const MAP_LIMIT: u64 = 256 * 1024 * 1024;

/// AWS, and the region that the environment names.
pub(crate) struct Aws {
    pub(crate) cloud: Box<dyn Cloud>,
    region: Option<String>,
}

impl Aws {
    /// The region that was named, or else the environment's.
    pub(crate) fn region(&self, named: Option<String>) -> Result<String> {
        named
            .or_else(|| self.region.clone())
            .ok_or_else(|| Error::new(Code::Usage, "no region is named").next("write ec2:REGION:AMI, or set AWS_REGION"))
    }
}

/// AWS with this user's credentials.
#[cfg(feature = "ec2")]
pub(crate) async fn connect() -> Result<Aws> {
    let aws = kiln_ec2::sdk::Aws::connect().await;
    let region = aws.region();
    Ok(Aws { cloud: Box::new(aws), region })
}

/// Refuses: AWS is not built in.
#[cfg(not(feature = "ec2"))]
pub(crate) async fn connect() -> Result<Aws> {
    Err(Error::new(Code::Usage, "this kiln was built without EC2")
        .next("build one with it: `cargo install --git https://github.com/kiln-images/kiln kiln --features ec2`"))
}

/// What `ec2:…` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// `ec2:REGION`.
    Region(String),
    /// `ec2:AMI` or `ec2:REGION:AMI`.
    Ami { region: Option<String>, ami: String },
}

/// Whether a text names something of EC2, and no image: a registry's port is a
/// number.
pub(crate) fn is_target(text: &str) -> bool {
    text.starts_with("ec2:") && !text.contains('/')
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong =
            || Error::new(Code::Usage, format!("`{text}` names nothing of EC2")).next("write ec2:REGION, ec2:AMI or ec2:REGION:AMI");
        let rest = text.strip_prefix("ec2:").ok_or_else(wrong)?;
        let ami = |ami: &str| {
            let hex = ami.strip_prefix("ami-").filter(|hex| !hex.is_empty() && hex.bytes().all(|byte| byte.is_ascii_hexdigit()));
            hex.map(|_| ami.to_owned()).ok_or_else(wrong)
        };
        match rest.split_once(':') {
            Some((region, id)) => {
                check_region(region)?;
                Ok(Self::Ami { region: Some(region.to_owned()), ami: ami(id)? })
            }
            None if rest.starts_with("ami-") => Ok(Self::Ami { region: None, ami: ami(rest)? }),
            None => check_region(rest).map(|()| Self::Region(rest.to_owned())),
        }
    }
}

/// The blocks of a disk in the store.
struct StoreBlocks {
    map: Arc<BlockMap>,
    packs: StorePacks,
}

impl Blocks for StoreBlocks {
    fn reader(&self) -> Result<Box<dyn BlockReader>> {
        Ok(Box::new(Reader(MapSource::new(self.map.clone(), Arc::new(self.packs.clone()))?)))
    }
}

struct Reader(MapSource);

impl BlockReader for Reader {
    fn read(&mut self, index: usize) -> Result<Vec<u8>> {
        let block = self.0.unchecked(index)?;
        block.ok_or_else(|| Error::new(Code::Failed, format!("block {index} is zeros, and is not read")))
    }

    fn check(&mut self, index: usize) -> Result<()> {
        self.0.block(index).map(drop)
    }
}

/// An image of the store as what is published. Its packs are safe from `prune`
/// as long as this store is open.
pub(crate) fn subject(store: &Store, digest: &Digest) -> Result<Subject> {
    let image = store.image(digest)?;
    if image.disk_digest().is_none() {
        // Says where its disk is.
        store.record(digest)?;
    }
    let mut disks = Vec::new();
    for config in &image.config.disks {
        let record = store.disk(&image, &config.name)?;
        let map = Arc::new(record.map);
        let blocks = StoreBlocks { map: map.clone(), packs: StorePacks::new(store) };
        let disk = Disk { name: config.name.clone(), digest: record.digest, map, blocks: Arc::new(blocks) };
        if config.root { disks.insert(0, disk) } else { disks.push(disk) }
    }
    Ok(Subject {
        name: image.config.name,
        version: image.config.version,
        architecture: image.config.architecture,
        firmware: image.config.firmware,
        digest: *digest,
        commit: image.config.commit,
        bake: image.manifest.annotations.get(BAKE).cloned(),
        disks,
    })
}

/// The disk digests of an image, the root first; `None` when it is not in the
/// store.
pub(crate) fn disks(store: &Store, digest: &Digest) -> Result<Option<Vec<Digest>>> {
    match store.image(digest) {
        Ok(image) => {
            let (root, others): (Vec<_>, Vec<_>) = image.config.disks.into_iter().partition(|disk| disk.root);
            Ok(Some(root.into_iter().chain(others).map(|disk| disk.digest).collect()))
        }
        Err(error) if error.kind() == Code::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Block maps of earlier images: those of the store, and those of the
/// repository that an image is published from, of which the maps alone are
/// fetched.
pub(crate) struct KnownMaps<'a> {
    store: &'a Store,
    repository: Option<&'a dyn Place>,
}

impl<'a> KnownMaps<'a> {
    pub(crate) fn new(store: &'a Store, repository: Option<&'a dyn Place>) -> Self {
        Self { store, repository }
    }

    async fn at_repository(&self, place: &dyn Place, disk: &Digest, image: &Digest) -> Result<Option<BlockMap>> {
        for held in images_of(place, image).await? {
            let Some(config) = held.config.disks.iter().find(|config| config.digest == *disk) else { continue };
            let Some(layer) = held.manifest.map_of(&config.name) else { continue };
            let map = decode_block_map(&place.blob(&layer.digest, MAP_LIMIT).await?)?;
            if map.disk_digest() == *disk {
                return Ok(Some(map));
            }
        }
        Ok(None)
    }
}

#[async_trait]
impl Maps for KnownMaps<'_> {
    async fn map(&self, disk: &Digest, image: Option<&Digest>) -> Result<Option<BlockMap>> {
        if let Some(record) = self.store.find_disk(disk)? {
            return Ok(Some(record.map));
        }
        let (Some(place), Some(image)) = (self.repository, image) else { return Ok(None) };
        // One that cannot be had is a missed chance: more is sent.
        Ok(self.at_repository(place, disk, image).await.unwrap_or(None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let ami = |region: Option<&str>| Target::Ami { region: region.map(Into::into), ami: "ami-0123abc".into() };
        for (text, expected) in [
            ("ec2:eu-central-1", Target::Region("eu-central-1".into())),
            ("ec2:ami-0123abc", ami(None)),
            ("ec2:eu-central-1:ami-0123abc", ami(Some("eu-central-1"))),
        ] {
            assert!(is_target(text));
            assert_eq!(text.parse::<Target>().unwrap(), expected, "{text}");
        }
        for text in ["eu-central-1", "ec2:", "ec2:europe", "ec2:ami-", "ec2:ami-xyz", "ec2:ami-1:ami-1", "ec2:eu-central-1:snap-1"] {
            assert_eq!(text.parse::<Target>().unwrap_err().kind(), Code::Usage, "{text}");
        }
        assert!(!is_target("ec2:5000/web:1"));
    }
}

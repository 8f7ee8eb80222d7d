//! An image at a registry, as far as it has to be known before its blocks are
//! fetched: manifest, config and block maps, all of them checked.

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::{BLOCK_MAP, BlockMap, Config, DiskConfig, PackRef, host_architecture};
use kiln_registry::Repository;
use serde_json::Value;

use super::origin::{Origin as _, Raw};
use crate::blockmap::{self, MAP_LIMIT};
use crate::manifest::{Descriptor, MANIFEST_LIMIT, Manifest, parse_config};

/// A disk of an image, and its map.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    pub(crate) config: DiskConfig,
    /// The map's bytes.
    pub(crate) bytes: Vec<u8>,
    pub(crate) map: BlockMap,
}

/// An image at a registry.
#[derive(Debug, Clone)]
pub struct Remote {
    pub(crate) repository: Repository,
    pub(crate) raw: Raw,
    pub(crate) manifest: Manifest,
    pub(crate) config: Config,
    pub(crate) config_bytes: Vec<u8>,
    pub(crate) disks: Vec<Disk>,
}

/// `host/namespace/name`.
pub(crate) fn label(repository: &Repository) -> String {
    format!("{}/{}", repository.host(), repository.name())
}

/// A manifest that is not there.
pub(crate) fn missing(repository: &Repository, digest: &Digest) -> Error {
    Error::new(Code::NotFound, format!("{} has no manifest {digest}", label(repository)))
}

impl Remote {
    /// Reads what `digest` is at `repository`. Of an index, the image of this
    /// machine's architecture.
    ///
    /// # Errors
    /// [`Code::NotFound`]; [`Code::Corrupt`] when it is no kiln image or
    /// contradicts itself.
    pub async fn open(repository: &Repository, digest: &Digest) -> Result<Self> {
        let mut raw = repository_manifest(repository, digest).await?;
        if raw.is_index() {
            let child = choose(&raw).trying(|| format!("use {}@{digest}", label(repository)))?;
            raw = repository_manifest(repository, &child).await?;
        }
        let what = || format!("use {}@{}", label(repository), raw.digest);
        let manifest = Manifest::parse(&raw.bytes).trying(what)?;
        let config_bytes = repository.small(&manifest.config.digest, MANIFEST_LIMIT.min(manifest.config.size)).await.trying(what)?;
        let config = parse_config(&config_bytes, &manifest.config.digest).trying(what)?;
        let mut disks = Vec::new();
        for disk in &config.disks {
            let layer = map_layer(&manifest, &disk.name).trying(what)?;
            let bytes = repository.small(&layer.digest, MAP_LIMIT.min(layer.size)).await.trying(what)?;
            disks.push(Disk { config: disk.clone(), map: read_map(&manifest, disk, &bytes).trying(what)?, bytes });
        }
        check(&manifest, &config).trying(what)?;
        Ok(Self { repository: repository.clone(), raw, manifest, config, config_bytes, disks })
    }

    /// Digest of its manifest.
    pub fn digest(&self) -> Digest {
        self.raw.digest
    }

    /// What it is.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it is: `host/namespace/name`.
    pub fn label(&self) -> String {
        label(&self.repository)
    }

    /// All its packs, each once.
    pub(crate) fn packs(&self) -> Vec<PackRef> {
        let mut packs: Vec<PackRef> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for disk in &self.disks {
            packs.extend(disk.map.packs.iter().filter(|pack| seen.insert(pack.digest)));
        }
        packs
    }

    /// The disk that starts.
    pub(crate) fn root(&self) -> Result<&Disk> {
        let root = self.disks.iter().find(|disk| disk.config.root);
        root.ok_or_else(|| crate::resolve::no_disk(&self.config, &self.raw.digest))
    }
}

async fn repository_manifest(repository: &Repository, digest: &Digest) -> Result<Raw> {
    super::origin::Origin::manifest(repository, digest).await
}

/// The layer of a disk's map.
pub(crate) fn map_layer<'a>(manifest: &'a Manifest, disk: &str) -> Result<&'a Descriptor> {
    manifest.map_of(disk).ok_or_else(|| wrong("a disk has no block map"))
}

/// Reads the map of a disk, and checks it against what config and manifest say.
pub(crate) fn read_map(manifest: &Manifest, disk: &DiskConfig, bytes: &[u8]) -> Result<BlockMap> {
    let map = blockmap::decode(bytes)?;
    if map.size != disk.size || map.disk_digest() != disk.digest {
        return Err(wrong(&format!("the block map of `{}` is of another disk", disk.name)));
    }
    let listed: std::collections::HashSet<(Digest, u64)> = manifest.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
    if !map.packs.iter().all(|pack| listed.contains(&(pack.digest, pack.size))) {
        return Err(wrong(&format!("the block map of `{}` needs packs that are not listed", disk.name)));
    }
    Ok(map)
}

/// Checks that a manifest has a map for each disk and no other.
pub(crate) fn check(manifest: &Manifest, config: &Config) -> Result<()> {
    let maps = manifest.layers.iter().filter(|layer| layer.media_type == BLOCK_MAP).count();
    if maps != config.disks.len() {
        return Err(wrong("it has other block maps than disks"));
    }
    kiln_model::reference::check_name(&config.name).map_err(|why| wrong(&format!("it is named `{}`: {why}", config.name)))?;
    kiln_model::reference::check_tag(&config.version).map_err(|why| wrong(&format!("its version is `{}`: {why}", config.version)))
}

fn wrong(why: &str) -> Error {
    Error::new(Code::Corrupt, format!("the image contradicts itself: {why}"))
}

/// The image of this machine's architecture in an index.
fn choose(index: &Raw) -> Result<Digest> {
    let value: Value = serde_json::from_slice(&index.bytes)
        .map_err(|error| Error::new(Code::Corrupt, format!("index {} is not well-formed", index.digest)).because(error))?;
    let entries = value.get("manifests").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let architecture = |entry: &Value| entry.get("platform")?.get("architecture")?.as_str().map(ToOwned::to_owned);
    let chosen = match entries {
        [only] => Some(only),
        _ => entries.iter().find(|entry| architecture(entry).as_deref() == Some(host_architecture())),
    };
    let digest = chosen.and_then(|entry| entry.get("digest")?.as_str()?.parse().ok());
    digest.ok_or_else(|| {
        let all: Vec<String> = entries.iter().filter_map(architecture).collect();
        Error::new(Code::NotFound, format!("index {} has no image for {}", index.digest, host_architecture()))
            .next(format!("it has {}; name one of them by its digest", if all.is_empty() { "nothing".to_owned() } else { all.join(", ") }))
    })
}

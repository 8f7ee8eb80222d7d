//! OCI manifests: the part of them that kiln writes and reads.
//!
//! Source: OCI image specification 1.1, `manifest.md` and `descriptor.md`.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result};
use kiln_model::image::{BLOCK_MAP, CONFIG, Config, DiskRecord, IMAGE, PACK};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::artifacts::{EMPTY, EMPTY_BYTES};

/// Media type of an image manifest.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an image index.
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Annotation: a file's name.
pub(crate) const TITLE: &str = "org.opencontainers.image.title";
/// Annotation of a block map's layer: the disk's name.
pub(crate) const DISK: &str = "vnd.kiln.disk.name";
/// Annotation of a block map's layer: the disk digest.
pub(crate) const DISK_DIGEST: &str = "vnd.kiln.disk.digest";

/// Most bytes of a manifest or a config; what registries take.
pub(crate) const MANIFEST_LIMIT: u64 = 4 * 1024 * 1024;
/// Most layers of an image.
pub(crate) const MAX_LAYERS: usize = 256;

/// Points to a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// What else is said of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Fields that kiln does not use, kept as they are.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

/// Written out, because the derived form of a flattened field keeps everything
/// aside first: an image has up to 256 layers, and a store thousands of images.
impl<'de> Deserialize<'de> for Descriptor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Descriptor;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a descriptor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Descriptor, A::Error> {
                /// A field may be there once.
                fn once<T, E: serde::de::Error>(field: &mut Option<T>, name: &'static str, value: T) -> std::result::Result<(), E> {
                    if field.replace(value).is_some() { Err(E::duplicate_field(name)) } else { Ok(()) }
                }
                let (mut media_type, mut digest, mut size, mut annotations) = (None, None, None, None);
                let mut other = serde_json::Map::new();
                while let Some(name) = map.next_key::<String>()? {
                    match name.as_str() {
                        "mediaType" => once(&mut media_type, "mediaType", map.next_value()?)?,
                        "digest" => once(&mut digest, "digest", map.next_value()?)?,
                        "size" => once(&mut size, "size", map.next_value()?)?,
                        "annotations" => once(&mut annotations, "annotations", map.next_value()?)?,
                        _ => drop(other.insert(name, map.next_value()?)),
                    }
                }
                let missing = serde::de::Error::missing_field;
                Ok(Descriptor {
                    media_type: media_type.ok_or_else(|| missing("mediaType"))?,
                    digest: digest.ok_or_else(|| missing("digest"))?,
                    size: size.ok_or_else(|| missing("size"))?,
                    annotations: annotations.unwrap_or_default(),
                    other,
                })
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

impl Descriptor {
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self { media_type: media_type.into(), digest, size, annotations: BTreeMap::new(), other: serde_json::Map::new() }
    }

    pub(crate) fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }
}

/// An image's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Always an OCI image manifest's.
    pub media_type: String,
    /// [`IMAGE`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The config.
    pub config: Descriptor,
    /// For each disk its block map, then the packs that no disk before it
    /// listed.
    pub layers: Vec<Descriptor>,
    /// What this one is attached to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// When it was made, and by which bake.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// The manifest of `disks`; `map_sizes` are the sizes of their maps' blobs.
    pub(crate) fn of(config: Descriptor, disks: &[DiskRecord], map_sizes: &[u64], annotations: BTreeMap<String, String>) -> Result<Self> {
        let mut layers = Vec::new();
        let mut listed = HashSet::new();
        for (disk, size) in disks.iter().zip(map_sizes) {
            let mut map = Descriptor::new(BLOCK_MAP, disk.map_digest, *size);
            map.annotations.insert(TITLE.into(), format!("{}.blockmap", disk.name));
            map.annotations.insert(DISK.into(), disk.name.clone());
            map.annotations.insert(DISK_DIGEST.into(), disk.digest.to_string());
            layers.push(map);
            for pack in disk.map.packs.iter().filter(|pack| listed.insert(pack.digest)) {
                layers.push(Descriptor::new(PACK, pack.digest, pack.size));
            }
        }
        if layers.is_empty() {
            // An image at a cloud alone. The specification asks for one layer at
            // least; this is the one that it gives to those who have none.
            let mut empty = Descriptor::new(EMPTY, Digest::of(EMPTY_BYTES), EMPTY_BYTES.len() as u64);
            empty.other.insert("data".into(), "e30=".into());
            layers.push(empty);
        }
        if layers.len() > MAX_LAYERS {
            let what = format!("the image would have {} layers, more than the {MAX_LAYERS} that registries take", layers.len());
            return Err(Error::new(Code::Failed, what).next("make the disks smaller: about 16 GiB of compressed data fit in one image"));
        }
        Ok(Self {
            schema_version: 2,
            media_type: MANIFEST.into(),
            artifact_type: Some(IMAGE.into()),
            config,
            layers,
            subject: None,
            annotations,
        })
    }

    /// Reads the manifest of a kiln image.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when it is something else.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let wrong = |why: &str| Error::new(Code::Corrupt, format!("this is not the manifest of a kiln image: {why}"));
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| wrong("it is not well-formed").because(error))?;
        if manifest.schema_version != 2 || manifest.media_type != MANIFEST {
            return Err(wrong("it is no OCI image manifest"));
        }
        if manifest.artifact_type.as_deref() != Some(IMAGE) || manifest.config.media_type != CONFIG {
            return Err(wrong("it is another kind of artifact"));
        }
        if manifest.layers.len() > MAX_LAYERS {
            return Err(wrong("it has too many layers"));
        }
        if !manifest.layers.iter().all(|layer| [BLOCK_MAP, PACK, EMPTY].contains(&layer.media_type.as_str())) {
            return Err(wrong("it has layers of a kind that this kiln does not know"));
        }
        Ok(manifest)
    }

    /// The layer that holds the map of the disk `name`.
    pub fn map_of(&self, name: &str) -> Option<&Descriptor> {
        self.layers.iter().find(|layer| layer.media_type == BLOCK_MAP && layer.annotation(DISK) == Some(name))
    }

    /// All blobs it names.
    pub fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        std::iter::once(&self.config).chain(&self.layers)
    }

    /// Bytes of all blobs it names.
    pub fn size(&self) -> u64 {
        self.blobs().map(|blob| blob.size).fold(0, u64::saturating_add)
    }
}

/// Reads a config.
pub(crate) fn parse_config(bytes: &[u8], digest: &Digest) -> Result<Config> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::new(Code::Corrupt, format!("config {digest} is not one that this kiln reads")).because(error))
}

/// What any manifest or index says, whoever wrote it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Links {
    /// What kind of artifact it is.
    pub(crate) artifact_type: Option<String>,
    /// Its config.
    pub(crate) config: Option<Descriptor>,
    /// Its layers.
    #[serde(default)]
    pub(crate) layers: Vec<Descriptor>,
    /// The manifests of an index.
    #[serde(default)]
    pub(crate) manifests: Vec<Descriptor>,
    #[serde(default, deserialize_with = "digest_of")]
    /// What it is attached to.
    pub(crate) subject: Option<Digest>,
    /// What else it says.
    #[serde(default)]
    pub(crate) annotations: BTreeMap<String, String>,
}

fn digest_of<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Digest>, D::Error> {
    Ok(Option::<Descriptor>::deserialize(deserializer)?.map(|subject| subject.digest))
}

impl Links {
    /// What it needs; what it is attached to apart.
    pub(crate) fn needs(&self) -> impl Iterator<Item = &Descriptor> {
        self.config.iter().chain(&self.layers).chain(&self.manifests)
    }
}

/// Reads what any manifest or index points to.
pub(crate) fn links(bytes: &[u8]) -> Result<Links> {
    serde_json::from_slice(bytes).map_err(|error| Error::new(Code::Corrupt, "this is no OCI manifest or index").because(error))
}

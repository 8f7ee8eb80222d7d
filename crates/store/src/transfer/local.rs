//! What the images of this store already hold of the blocks that are wanted.

use std::collections::{HashMap, HashSet};

use kiln_model::Digest;
use kiln_model::error::Result;
use kiln_model::image::{PackRef, Place};

use crate::blobs::Store;
use crate::blockmap::{self, MAP_LIMIT};
use crate::manifest::Manifest;

/// Block maps that are looked through at most. The newest images of the same
/// name come first, and what they do not have, older ones seldom do.
const MAPS: usize = 200;

/// A frame in a pack of this store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) pack: PackRef,
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

/// Where wanted blocks are.
#[derive(Debug, Default)]
pub(crate) struct Local {
    packs: Vec<PackRef>,
    places: HashMap<Digest, (u32, u32, u32)>,
}

impl Local {
    /// Looks for `wanted` in the images of `store`, those named `name` first.
    /// The packs that are found are held. Images that cannot be read are
    /// passed over: then more is fetched.
    pub(crate) fn find(store: &Store, wanted: &HashSet<Digest>, name: &str) -> Result<Self> {
        let mut found = Self::default();
        if wanted.is_empty() {
            return Ok(found);
        }
        let mut images = store.images(true)?.images;
        images.sort_by_key(|image| image.config.name != name);
        let mut looked = HashSet::new();
        for image in &images {
            for layer in maps(&image.manifest).filter(|layer| layer.size <= MAP_LIMIT) {
                if found.places.len() == wanted.len() || looked.len() >= MAPS {
                    return Ok(found);
                }
                if !looked.insert(layer.digest) {
                    continue;
                }
                let Ok(map) = store.read_blob(&layer.digest, layer.size).and_then(|bytes| blockmap::decode(&bytes)) else { continue };
                let there: HashSet<Digest> = store.hold(&map.packs)?.into_iter().map(|pack| pack.digest).collect();
                let first = u32::try_from(found.packs.len()).unwrap_or(u32::MAX);
                found.packs.extend(&map.packs);
                for block in map.blocks.iter().filter(|block| wanted.contains(&block.digest)) {
                    if let Place::Pack { pack, offset, length } = block.place
                        && map.packs.get(pack as usize).is_some_and(|pack| there.contains(&pack.digest))
                    {
                        found.places.entry(block.digest).or_insert((first + pack, offset, length));
                    }
                }
            }
        }
        Ok(found)
    }

    /// Where a block is.
    pub(crate) fn get(&self, block: &Digest) -> Option<Frame> {
        let (pack, offset, length) = *self.places.get(block)?;
        Some(Frame { pack: *self.packs.get(pack as usize)?, offset, length })
    }

    /// Whether an image of this store says the same of a frame: then it was
    /// checked when that image came.
    pub(crate) fn vouches(&self, block: &Digest, frame: &Frame) -> bool {
        self.get(block).is_some_and(|known| known == *frame)
    }
}

fn maps(manifest: &Manifest) -> impl Iterator<Item = &crate::manifest::Descriptor> {
    manifest.layers.iter().filter(|layer| layer.media_type == kiln_model::image::BLOCK_MAP)
}

//! The store: images as blobs, manifests and references in an OCI image layout
//! on disk.
//!
//! ```text
//!  STORE/oci-layout            what this folder is
//!  STORE/index.json            every image, and every name that points to one
//!  STORE/blobs/sha256/HEX      manifests, configs, block maps, packs
//!  STORE/.kiln/index.lock      held while index.json is replaced
//!  STORE/.kiln/blobs.lock      shared: a blob appears; alone: `prune` removes
//!  STORE/.kiln/leases/ID       what a living process needs; locked by it
//!  STORE/.kiln/tmp/ID.N        files being written by the holder of lease ID
//! ```
//!
//! A blob is written to `tmp`, synced, and renamed; the index is replaced the
//! same way, after everything it names: a crash leaves the old state or the
//! new one. What is written but not named yet is protected from
//! [`Store::prune`] by the writer's lease, a list of digests in a file that its
//! process holds locked: when the process is gone, so is the lock, and the next
//! prune clears up after it.
//!
//! The formats are described in `docs/image-format.md`.

mod blobs;
mod blockmap;
mod disk;
mod index;
mod lease;
mod manifest;
mod prune;
mod publish;
mod resolve;
mod verify;

pub use blobs::Store;
pub use blockmap::{decode as decode_block_map, encode as encode_block_map};
pub use disk::StorePacks;
pub use manifest::{Descriptor, Manifest};
pub use prune::{Keep, Pruned};
pub use publish::{Moved, Named, Publish};
pub use resolve::{Image, Listing};
pub use verify::{Damage, Verified};

//! The store: images as blobs, manifests and references in an OCI image layout
//! on disk.
//!
//! ```text
//!  STORE/oci-layout            what this folder is
//!  STORE/index.json            every image, and every name that points to one
//!  STORE/blobs/sha256/HEX      manifests, configs, block maps, packs
//!  STORE/channels/NAME/…       channels: their records, and policies
//!  STORE/.kiln/index.lock      held while index.json is replaced
//!  STORE/.kiln/blobs.lock      shared: a blob appears; alone: `prune` removes
//!  STORE/.kiln/leases/ID       what a living process needs; locked by it
//!  STORE/.kiln/tmp/ID.N        files being written by the holder of lease ID
//!  STORE/.kiln/partial/HEX     packs being fetched; locked by who fetches
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

mod artifacts;
mod blobs;
mod blockmap;
mod channel;
mod disk;
mod index;
pub mod kept;
mod lease;
mod manifest;
pub mod place;
mod prune;
mod publish;
mod resolve;
pub mod revoke;
pub mod transfer;
mod verify;

pub use artifacts::{Artifact, Attached, EMPTY, Layer};
pub use blobs::Store;
pub use blockmap::{decode as decode_block_map, encode as encode_block_map};
pub use disk::StorePacks;
pub use manifest::{Descriptor, Manifest};
pub use place::{Held, Place, RemotePlace};
pub use prune::{HISTORY, Keep, Pruned};
pub use publish::{Moved, Named, Publish};
pub use resolve::{Image, Listing};
pub use verify::{Damage, Verified};

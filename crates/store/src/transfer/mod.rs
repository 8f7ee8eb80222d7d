//! Images on their way: between a store and a registry, between registries,
//! into a file, and into archives.
//!
//! ```text
//!            push                     copy
//!   store ─────────► registry ──────────────────► registry
//!     ▲  ◄──────────    │  └──────────────────────► containerDisk
//!     │      pull       └── fetch ─► disk.raw, disk.qcow2
//!     └──► save ─► FILE.tar ─► load
//! ```
//!
//! What all of them keep to:
//!
//! - **Only what is missing moves.** Towards a registry, a blob is asked for
//!   first, then mounted from a repository that is known to hold it
//!   ([`Known`]), then sent. Towards the store, packs that are there stay, and
//!   a pack whose frames local images hold is put together from those.
//! - **Nothing is visible before all is there.** Blobs come first, then what
//!   is attached, then the image's manifest under its tag, or the store's index.
//! - **Nothing is believed.** A manifest and a config have their digest, a
//!   block map has the disk's, a pack its own, and every block that no image of
//!   the store vouches for is decompressed and compared.
//! - **What was interrupted goes on.** An upload at the server's offset; a pack
//!   in `.kiln/partial`; a disk file in the file beside it, whose blocks are
//!   looked at.

mod admit;
mod archive;
mod attached;
mod containerdisk;
mod fetch;
mod known;
mod local;
mod meter;
mod origin;
mod partial;
mod pull;
mod remote;
mod send;

pub use admit::Names;
pub use archive::{Loaded, LoadedImage, Saved, load, save, save_to};
pub use containerdisk::{Converted, Source, containerdisk};
pub use fetch::{Fetch, Written, fetch};
pub use known::Known;
pub use pull::{Pulled, pull};
pub use remote::Remote;
pub use send::{Sending, Sent, copy, push};

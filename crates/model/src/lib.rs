//! The words of kiln as types, and the traits between its parts.
//!
//! Every other crate may know this one; this one knows none of them. What
//! happens to a template on its way to a digest, in the words used here:
//!
//! ```text
//!  template ──► plan ──► base ──► machine ──► provisioners ──► seal
//!                       (BaseSource) (Builder)   (Provisioner)    │
//!                                                                 ▼
//!  reference ◄── image ◄── packs ◄── blocks ◄──────────────── stopped
//!  (ChannelBackend)      (ImageSink)  (BlockSource)          (Stopped)
//! ```
//!
//! Data flows from left to right only, and every arrow is a trait in this
//! crate, so that the parts on its two ends never see each other.

pub mod account;
pub mod base;
pub mod block;
pub mod channel;
pub mod checkpoint;
pub mod cleanup;
pub mod digest;
pub mod error;
pub mod event;
pub mod guest;
pub mod history;
pub mod home;
pub mod image;
pub mod key;
pub mod kind;
pub mod ledger;
pub mod machine;
pub mod provision;
pub mod reference;
pub mod secret;
pub mod settings;
pub mod tree;
pub mod trial;

pub use digest::Digest;
pub use error::{Code, Error, Result, ResultExt};
pub use key::Key;

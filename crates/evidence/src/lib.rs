//! Evidence: keys, signatures, statements about images, and the policies that
//! ask for them.
//!
//! Pure: bytes in, bytes out. What is attached to an image and where is the
//! store's business, or a registry's.
//!
//! ```text
//!  Account ──► statement ──► attachment ──► (attached by others)
//!              provenance    dsse, bundle, cosign      │
//!                                                      ▼
//!  policy ◄── Facts ◄── Examined ◄── examine ◄────── Found
//! ```
//!
//! A signature is over bytes, so bytes are what is kept and checked; nothing is
//! ever checked by writing it anew.
//!
//! The forms are described in `docs/evidence.md`.

pub mod attachment;
pub mod bundle;
pub mod cosign;
pub mod dsse;
pub mod examine;
mod failure;
pub mod junit;
mod keys;
pub mod policy;
pub mod provenance;
pub mod recipe;
mod signature;
pub mod statement;
pub mod verdict;

pub use attachment::{Attachment, Found, Layer};
pub use examine::{Examined, Subject, What, examine};
pub use failure::Failure;
pub use keys::{PrivateKey, PublicKey};
pub use policy::{Facts, Policy, Unmet};
pub use recipe::{OtherFile, Recipe, RecipeFile};
pub use verdict::Verdict;

//! AWS: images as AMIs, and machines at EC2.
//!
//! ```text
//!  publish ──► block map → snapshot → AMI → regions, accounts, parameters
//!  bake ─────► AMI → instance → guest → stopped → AMI → regions, accounts
//!     │
//!     ▼
//!    api ◄──── what AWS can do for kiln, as traits of plain types
//!     ▲
//!     │
//!    sdk       the same calls with Amazon's SDK (feature `sdk`)
//! ```
//!
//! The SDK takes minutes and gigabytes to compile, so nothing but the thin
//! layer of calls in `sdk` knows it: everything else is written against the
//! traits in [`api`], and tested against an API in memory that is as strict as
//! the real one is documented to be.

pub mod api;
pub mod bake;
pub mod publish;
#[cfg(feature = "sdk")]
pub mod sdk;
pub mod tags;
#[cfg(test)]
mod testing;

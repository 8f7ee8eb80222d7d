//! Reaching a guest: connect, execute, copy, keys.
//!
//! ```text
//!  Keys ──► Target ──► connect ──► SshGuest (one connection, many channels)
//!                                     │
//!                     ┌───────────────┼────────────────┐
//!                 command          copy out          copy in
//!              (lines, exit)     (tar ──► files)  (files ──► tar)
//! ```
//!
//! [`way_in`] is how the keys come into a guest that kiln did not make.
//!
//! Every byte that goes either way goes through one place, `command.rs`: a
//! channel whose process is known by its pid, so that a limit in time, or a
//! caller that stops waiting, ends what runs in the guest too.

mod command;
mod connect;
pub mod copy;
mod guest;
mod keys;
mod lines;
mod session;
#[cfg(feature = "testing")]
pub mod testing;
pub mod way_in;

pub use command::{Input, Outlet, Run, Sink};
pub use connect::{Target, connect};
pub use guest::SshGuest;
pub use keys::Keys;

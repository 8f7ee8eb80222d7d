//! What kiln keeps so that it need not be done again: machines after a step,
//! and what earlier bakes were made of.
//!
//! ```text
//!  HOME/cache/checkpoints/KEY/ID/                 a checkpoint of step KEY; locked while in use
//!  HOME/cache/checkpoints/KEY/ID/checkpoint.json  what it is; its mtime: when it was last used
//!  HOME/cache/checkpoints/KEY/ID/…                the builder's files
//!  HOME/cache/checkpoints/.new/ID.BYTES/          one being written; locked by its writer
//!  HOME/cache/checkpoints/.lock                   held while room is made or taken
//!  HOME/cache/claims/KEY                          locked by who makes what KEY names
//!  HOME/cache/results/DISK/TEST.json             what a test found on a disk
//!  HOME/history/NAME.jsonl                        one line for each bake of the image NAME
//! ```
//!
//! **Whole or not at all.** A checkpoint is written below `.new` and renamed to
//! its place, `checkpoint.json` included. On the way out `checkpoint.json` is
//! the first to go: a folder without it is none any more, and is removed once
//! nobody uses it. Only `checkpoint.json` and the folders are synced, since
//! gigabytes would have to wait for the disk otherwise; a file that did not
//! reach it before a power cut is found by its digest, as any damage is.
//!
//! **Locks tell who lives.** Whoever uses a checkpoint holds its folder locked
//! together with others, and who writes or removes it holds it alone. The
//! kernel lets go of the locks of a dead process, so that nothing has to be
//! known of it.
//!
//! **Room.** Builders hard-link the layers of a disk into several checkpoints,
//! so inodes are counted, each once, by the blocks that it takes. What goes
//! first is what saves the least time for the bytes that its going frees.

mod books;
mod checkpoints;
mod claim;
mod digest;
mod history;
mod label;
mod lock;
mod results;
mod room;
#[cfg(test)]
mod tests;

pub use checkpoints::Checkpoints;
pub use history::HistoryFiles;
pub use results::ResultFiles;
pub use room::{Listed, Pruned, Usage};

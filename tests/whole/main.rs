//! Whole-program tests: the real `kiln` on real guests with real packages.

// A test fails by panicking, and says why on standard error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, clippy::needless_pass_by_value, unreachable_pub)]

mod bases;
mod checkpoints;
mod context;
mod faults;
mod graph;
mod image;
mod shell;
mod steps;
mod store;
mod template;
mod twins;

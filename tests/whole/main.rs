//! Whole-program tests: the real `kiln` on real guests with real packages.

// A test fails by panicking, and says why on standard error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, clippy::needless_pass_by_value, unreachable_pub)]

mod ansible;
mod bases;
mod channels;
mod checkpoints;
mod configuration;
mod context;
mod drift;
mod evidence;
mod faults;
mod graph;
mod image;
mod pipelines;
mod rebake;
#[path = "../pipelines/repository.rs"]
mod repository;
mod salt;
mod shared_cache;
mod shell;
mod steps;
mod store;
mod template;
mod tests;
mod transfer;
mod twins;

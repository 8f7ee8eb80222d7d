//! Whole-program tests of AWS: the real `kiln`, built with the feature `ec2`,
//! before a front that is as strict as AWS is documented to be.

// A test fails by panicking, and says why on standard error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, clippy::needless_pass_by_value, unreachable_pub)]
// What only the other whole-program tests need.
#![allow(dead_code)]

mod bake;
#[path = "../whole/context.rs"]
mod context;
mod pipelines;
mod publish;
#[path = "../pipelines/repository.rs"]
mod repository;

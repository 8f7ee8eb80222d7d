//! The front, spoken to by plain HTTP: what AWS refuses is refused.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail")]

mod ebs;
mod ec2;
mod http;

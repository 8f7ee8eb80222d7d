//! Whole-program tests: the real `kiln` on real guests with real packages.

mod bases;
mod context;
mod faults;
mod image;
mod steps;
mod store;
mod template;

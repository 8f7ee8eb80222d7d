//! Raw and qcow2 disks, blocks, digests and packs.

pub mod process;
pub mod qemu_img;
mod recognise;
pub mod blocks;
pub mod pack;
pub mod packs;
pub mod raw;
mod export;
pub mod files;
pub mod gpt;
pub mod nbd;
pub mod overlay;

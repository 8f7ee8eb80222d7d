//! Raw and qcow2 disks, blocks, digests and packs.

pub mod blocks;
mod export;
pub mod files;
pub mod gpt;
mod inodes;
pub mod lanes;
pub mod nbd;
pub mod overlay;
pub mod pack;
pub mod packs;
pub mod qcow2;
pub mod qemu_img;
pub mod raw;
mod recognise;

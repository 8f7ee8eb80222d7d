//! Raw and qcow2 disks, blocks, digests and packs.

//! A qcow2 whose layout is known before its content: since a block map says
//! which blocks are stored, every table can be written first, and each block
//! has its place in the file from the start. So it can be filled in any order
//! from many threads, gone on with after a crash, or written to a pipe from
//! front to back, without QEMU and without a raw file in between.
//!
//! ```text
//!  header │ refcount table │ refcount blocks │ L1 │ L2 of each 512 MiB │ data
//! ```
//!
//! Source: QEMU's `docs/interop/qcow2.txt`. Version 3, clusters of 64 KiB
//! (QEMU's default), no backing file, nothing compressed. The same map always
//! gives the same bytes outside of the data.

use std::io::{self, Write};

use kiln_model::block::BLOCK;
use kiln_model::image::{BlockMap, Place};

/// Size of a cluster in bytes.
const CLUSTER: u64 = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;
/// Entries of an L2 table: one cluster of 8-byte entries.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Bytes of the disk that one L2 table covers.
const L2_REACH: u64 = L2_ENTRIES * CLUSTER;
/// Clusters whose 16-bit counts one refcount block holds.
const COUNTS: u64 = CLUSTER / 2;
/// In L1 and L2 entries: what it points to is used once, so it may be written
/// in place.
const COPIED: u64 = 1 << 63;
/// Blocks that one L2 table covers.
const L2_BLOCKS: usize = (L2_REACH / BLOCK) as usize;

/// Where everything is in the qcow2 of one disk.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Virtual size in bytes, a multiple of 512.
    size: u64,
    /// For each block how many stored ones are before it; none for zeros.
    ranks: Vec<Option<u32>>,
    /// Clusters of each part, in the order of the file.
    refcount_table: u64,
    refcount_blocks: u64,
    l1: u64,
    l2: u64,
    data: u64,
}

impl Layout {
    /// The layout for the disk of `map`.
    pub fn of(map: &BlockMap) -> Self {
        let size = map.size.next_multiple_of(512);
        let mut stored = 0;
        let rank = |place: &Place| {
            matches!(place, Place::Pack { .. }).then(|| {
                stored += 1;
                stored - 1
            })
        };
        let ranks: Vec<Option<u32>> = map.blocks.iter().map(|block| &block.place).map(rank).collect();
        let l1 = (size.div_ceil(L2_REACH) * 8).div_ceil(CLUSTER).max(1);
        let l2 = ranks.chunks(L2_BLOCKS).filter(|blocks| blocks.iter().any(Option::is_some)).count() as u64;
        let last = ranks.len().saturating_sub(1);
        let clusters = |index: usize| clusters_of(size, index);
        let data = match ranks.last() {
            Some(Some(before)) => u64::from(*before) * (BLOCK / CLUSTER) + clusters(last),
            _ => u64::from(stored) * (BLOCK / CLUSTER),
        };
        // The counts count themselves: a few rounds, since each adds little.
        let (mut table, mut blocks) = (1, 1);
        loop {
            let all = 1 + table + blocks + l1 + l2 + data;
            let (more_blocks, more_table) = (all.div_ceil(COUNTS), (all.div_ceil(COUNTS) * 8).div_ceil(CLUSTER));
            if (more_table, more_blocks) == (table, blocks) {
                break;
            }
            (table, blocks) = (more_table, more_blocks);
        }
        Self { size, ranks, refcount_table: table, refcount_blocks: blocks, l1, l2, data }
    }

    /// Clusters before the data.
    fn head(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.l1 + self.l2
    }

    /// Length of the whole file in bytes.
    pub fn length(&self) -> u64 {
        (self.head() + self.data) * CLUSTER
    }

    /// Length in bytes of what is written before the data.
    pub fn data_offset(&self) -> u64 {
        self.head() * CLUSTER
    }

    /// Where the bytes of a stored block are in the file, and how many of them
    /// there are: all of the block, except of the disk's last one. `None` for a
    /// block of zeros.
    pub fn place(&self, index: usize) -> Option<(u64, usize)> {
        let rank = (*self.ranks.get(index)?)?;
        let length = usize::try_from(clusters_of(self.size, index) * CLUSTER).unwrap_or(usize::MAX);
        Some((self.data_offset() + u64::from(rank) * BLOCK, length))
    }

    /// Writes everything before the data, table after table.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_head(&self, out: &mut dyn Write) -> io::Result<()> {
        let refcount_blocks = 1 + self.refcount_table;
        let l1 = refcount_blocks + self.refcount_blocks;
        let l2 = l1 + self.l1;
        let mut cluster = Vec::with_capacity(usize::try_from(CLUSTER).unwrap_or(0));
        let entries = self.size.div_ceil(L2_REACH);

        cluster.extend(b"QFI\xfb");
        cluster.extend(3_u32.to_be_bytes());
        // No backing file: its offset and the length of its name.
        cluster.extend([0; 12]);
        cluster.extend(CLUSTER_BITS.to_be_bytes());
        cluster.extend(self.size.to_be_bytes());
        // Not encrypted.
        cluster.extend(0_u32.to_be_bytes());
        cluster.extend(u32::try_from(entries).unwrap_or(u32::MAX).to_be_bytes());
        cluster.extend((l1 * CLUSTER).to_be_bytes());
        cluster.extend(CLUSTER.to_be_bytes());
        cluster.extend(u32::try_from(self.refcount_table).unwrap_or(u32::MAX).to_be_bytes());
        // No snapshots: their number and place; no features of the three kinds.
        cluster.extend([0; 12 + 24]);
        // Counts of 16 bits; length of this header. No extensions follow.
        cluster.extend(4_u32.to_be_bytes());
        cluster.extend(104_u32.to_be_bytes());
        pad(&mut cluster, out)?;

        for block in 0..self.refcount_blocks {
            cluster.extend(((refcount_blocks + block) * CLUSTER).to_be_bytes());
            flush_full(&mut cluster, out)?;
        }
        pad(&mut cluster, out)?;

        for _ in 0..self.head() + self.data {
            cluster.extend(1_u16.to_be_bytes());
            flush_full(&mut cluster, out)?;
        }
        pad(&mut cluster, out)?;

        let mut tables = 0;
        for blocks in self.ranks.chunks(L2_BLOCKS) {
            let there = blocks.iter().any(Option::is_some);
            let entry = if there { ((l2 + tables) * CLUSTER) | COPIED } else { 0 };
            tables += u64::from(there);
            cluster.extend(entry.to_be_bytes());
            flush_full(&mut cluster, out)?;
        }
        if tables == 0 && self.ranks.is_empty() {
            cluster.extend([0; 8]);
        }
        pad(&mut cluster, out)?;

        for (number, blocks) in self.ranks.chunks(L2_BLOCKS).enumerate() {
            if blocks.iter().all(Option::is_none) {
                continue;
            }
            for index in number * L2_BLOCKS..number * L2_BLOCKS + blocks.len() {
                let place = self.place(index);
                for cluster_of_block in 0..BLOCK / CLUSTER {
                    let at = cluster_of_block * CLUSTER;
                    let entry = place.filter(|(_, length)| at < *length as u64).map_or(0, |(offset, _)| (offset + at) | COPIED);
                    cluster.extend(entry.to_be_bytes());
                }
            }
            pad(&mut cluster, out)?;
        }
        Ok(())
    }
}

/// Clusters that a block takes: fewer where the disk ends in it.
fn clusters_of(size: u64, index: usize) -> u64 {
    size.saturating_sub(index as u64 * BLOCK).min(BLOCK).div_ceil(CLUSTER)
}

/// Writes what has grown to a cluster.
fn flush_full(cluster: &mut Vec<u8>, out: &mut dyn Write) -> io::Result<()> {
    if cluster.len() as u64 >= CLUSTER {
        out.write_all(cluster)?;
        cluster.clear();
    }
    Ok(())
}

/// Writes what there is, filled up to a cluster; nothing for nothing.
fn pad(cluster: &mut Vec<u8>, out: &mut dyn Write) -> io::Result<()> {
    if cluster.is_empty() {
        return Ok(());
    }
    cluster.resize(usize::try_from(CLUSTER).unwrap_or(0), 0);
    flush_full(cluster, out)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::process::Command;

    use kiln_model::Digest;
    use kiln_model::image::{Block, zero_block};

    use super::*;
    use kiln_process as process;

    /// A disk of `size` bytes with these blocks stored, as a qcow2 and as raw.
    fn check(size: u64, stored: &[usize]) {
        if process::find("qemu-img").is_none() {
            return;
        }
        let count = usize::try_from(size.div_ceil(BLOCK)).unwrap();
        let block = |index| match stored.contains(&index) {
            true => Block { digest: Digest::of([1]), place: Place::Pack { pack: 0, offset: 0, length: 1 } },
            false => Block { digest: zero_block(), place: Place::Zero },
        };
        let map = BlockMap { size, packs: vec![], blocks: (0..count).map(block).collect() };
        let layout = Layout::of(&map);
        let folder = tempfile::tempdir().unwrap();
        let (qcow2, raw, back) = (folder.path().join("a.qcow2"), folder.path().join("a.raw"), folder.path().join("b.raw"));
        let mut file = std::fs::File::create(&qcow2).unwrap();
        layout.write_head(&mut file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), layout.data_offset());
        file.set_len(layout.length()).unwrap();
        let plain = std::fs::File::create(&raw).unwrap();
        plain.set_len(size).unwrap();
        for index in stored.iter().copied() {
            let at = index as u64 * BLOCK;
            let mut bytes = vec![(index % 255) as u8 + 1; BLOCK as usize];
            let real = usize::try_from(size - at).unwrap().min(bytes.len());
            bytes[real..].fill(0);
            let (place, length) = layout.place(index).unwrap();
            file.write_all_at(&bytes[..length], place).unwrap();
            plain.write_all_at(&bytes[..real], at).unwrap();
        }
        let run = |arguments: &[&str]| {
            let mut command = Command::new("qemu-img");
            command.args(arguments);
            process::run(command).unwrap()
        };
        let path = |path: &std::path::Path| path.to_str().unwrap().to_owned();
        run(&["check", "-f", "qcow2", &path(&qcow2)]);
        run(&["compare", "-f", "qcow2", "-F", "raw", &path(&qcow2), &path(&raw)]);
        run(&["convert", "-f", "qcow2", "-O", "raw", &path(&qcow2), &path(&back)]);
        let found = virtual_size(&qcow2);
        assert_eq!(found, size.next_multiple_of(512));
    }

    fn virtual_size(path: &std::path::Path) -> u64 {
        let file = std::fs::File::open(path).unwrap();
        let length = file.metadata().unwrap().len();
        crate::qemu_img::recognise(&file, length).unwrap().size
    }

    #[test]
    fn qemu_reads_what_was_laid_out() {
        check(16 * BLOCK, &[0, 3, 15]);
        check(16 * BLOCK, &[]);
        check(16 * BLOCK, &(0..16).collect::<Vec<_>>());
        // Ends in the middle of a block, of a cluster, of a sector.
        for odd in [65536, 65536 + 512, 1000] {
            check(4 * BLOCK + odd, &[1, 4]);
            check(4 * BLOCK + odd, &[1]);
        }
        // Several L2 tables, one of them not there.
        check(1536 << 20, &[0, 1023, 2048, 3071]);
    }

    #[test]
    fn a_large_disk_has_many_counts() {
        if process::find("qemu-img").is_none() {
            return;
        }
        // 5 GiB of data: three blocks of counts. Holes will do.
        let block = Block { digest: Digest::of([1]), place: Place::Pack { pack: 0, offset: 0, length: 1 } };
        let layout = Layout::of(&BlockMap { size: 5 << 30, packs: vec![], blocks: vec![block; 10240] });
        assert_eq!(layout.refcount_blocks, 3);
        let file = tempfile::NamedTempFile::new().unwrap();
        layout.write_head(&mut file.as_file()).unwrap();
        file.as_file().set_len(layout.length()).unwrap();
        let mut command = Command::new("qemu-img");
        command.args(["check", "-f", "qcow2"]).arg(file.path());
        process::run(command).unwrap();
    }
}

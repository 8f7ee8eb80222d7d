//! Which blocks have to be written to a snapshot, from block maps alone.
//!
//! A block map is a list of the digests that EBS checks, so two maps tell what
//! differs without a byte being read or hashed. A block that is not written is
//! zero without a parent, and the parent's with one: then a block that became
//! zero has to be written as zeros.

use kiln_model::Digest;
use kiln_model::image::{BlockMap, zero_block};
use sha2::{Digest as _, Sha256};

/// Bytes of a GiB, the unit of volumes.
pub(crate) const GIB: u64 = 1 << 30;

/// A block that has to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Write {
    /// Its number, from 0.
    pub(crate) index: u32,
    /// SHA-256 of what is written.
    pub(crate) digest: Digest,
    /// Whether that is zeros.
    pub(crate) zero: bool,
}

/// Size in GiB of a volume for a disk of so many bytes.
pub(crate) fn gib(size: u64) -> u32 {
    u32::try_from(size.div_ceil(GIB).max(1)).unwrap_or(u32::MAX)
}

/// What has to be written, by ascending index, so that a snapshot has the
/// content of `map`, with zeros after its end.
pub(crate) fn writes(map: &BlockMap, parent: Option<&BlockMap>) -> Vec<Write> {
    let zero = zero_block();
    let before = parent.map_or(&[][..], |parent| &parent.blocks);
    let count = map.blocks.len().max(before.len());
    let at = |blocks: &[kiln_model::image::Block], index: usize| blocks.get(index).map_or(zero, |block| block.digest);
    let all = (0..count).filter_map(|index| {
        let digest = at(&map.blocks, index);
        let differs = digest != at(before, index);
        Some(Write { index: u32::try_from(index).ok()?, digest, zero: digest == zero }).filter(|_| differs)
    });
    all.collect()
}

/// The checksum with which a snapshot is completed: SHA-256 over the raw
/// digests of the blocks that were written, by ascending index (`LINEAR`).
pub(crate) fn checksum(writes: &[Write]) -> Digest {
    let mut hasher = Sha256::new();
    for write in writes {
        hasher.update(write.digest.as_bytes());
    }
    Digest::finish(hasher)
}

#[cfg(test)]
mod tests {
    use kiln_model::block::BLOCK;
    use kiln_model::image::{Block, Place};

    use super::*;

    /// A map of one letter per block, `.` being zeros.
    fn map(letters: &str) -> BlockMap {
        let block = |letter: char| match letter {
            '.' => Block { digest: zero_block(), place: Place::Zero },
            letter => Block { digest: Digest::of(letter.to_string()), place: Place::Pack { pack: 0, offset: 0, length: 1 } },
        };
        BlockMap { size: letters.len() as u64 * BLOCK, packs: Vec::new(), blocks: letters.chars().map(block).collect() }
    }

    fn drawn(map: &BlockMap, parent: Option<&BlockMap>) -> Vec<(u32, bool)> {
        writes(map, parent).iter().map(|write| (write.index, write.zero)).collect()
    }

    #[test]
    fn what_differs_is_written_and_what_became_zero_too() {
        for (before, after, expected) in [
            (None, "a.b.", &[(0, false), (2, false)][..]),
            (None, "....", &[]),
            (Some("a.b."), "a.b.", &[]),
            (Some("a.b."), "a...", &[(2, true)]),
            (Some("a.b."), "axb.", &[(1, false)]),
            // Grown, and shrunk: what is after the end has to be zeros.
            (Some("ab"), "ab.c", &[(3, false)]),
            (Some("ab.c"), "ab", &[(3, true)]),
            (Some("...."), "a", &[(0, false)]),
        ] {
            let before = before.map(map);
            assert_eq!(drawn(&map(after), before.as_ref()), expected, "{before:?} {after}");
        }
    }

    #[test]
    fn the_checksum_is_over_the_raw_digests_in_order() {
        let writes = writes(&map("a.b"), None);
        let raw = [*Digest::of("a").as_bytes(), *Digest::of("b").as_bytes()].concat();
        assert_eq!(checksum(&writes), Digest::of(raw));
        assert_eq!(checksum(&[]), Digest::of(""));
    }

    #[test]
    fn volumes_have_whole_gib() {
        assert_eq!([1, GIB, GIB + 1, 0].map(gib), [1, 1, 2, 1]);
    }
}

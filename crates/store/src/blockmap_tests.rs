use proptest::prelude::*;

use super::*;

/// Maps as `encode` takes them: packs in the order of first use.
fn maps() -> impl Strategy<Value = BlockMap> {
    let block = (any::<bool>(), any::<[u8; 32]>(), 0u32..5, 0u32..1000, 1u32..=FRAME_LIMIT);
    (proptest::collection::vec(block, 0..70), 1u64..=BLOCK, any::<u8>()).prop_map(|(rows, tail, salt)| {
        let size = (rows.len() as u64).checked_sub(1).map_or(0, |full| full * BLOCK + tail);
        let mut map = BlockMap { size, packs: vec![], blocks: vec![] };
        for (stored, digest, pack, offset, length) in rows {
            let place = if stored {
                let next = u32::try_from(map.packs.len()).unwrap();
                if pack >= next {
                    map.packs.push(PackRef { digest: Digest::of([salt, next as u8]), size: PACK_LIMIT - u64::from(next) });
                }
                Place::Pack { pack: pack.min(next), offset, length }
            } else {
                Place::Zero
            };
            let digest = if stored { Digest::from_bytes(digest) } else { zero_block() };
            map.blocks.push(Block { digest, place });
        }
        map
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn there_and_back(map in maps()) {
        let bytes = encode(&map).unwrap();
        prop_assert_eq!(decode(&bytes).unwrap(), map);
    }

    #[test]
    fn whatever_is_read_has_one_form(map in maps(), at in any::<proptest::sample::Index>(), flip in 1u8..) {
        let mut bytes = encode(&map).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let Ok(other) = decode(&bytes) {
            prop_assert_eq!(encode(&other).unwrap(), bytes.clone());
        }
        bytes.truncate(at);
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn noise_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
        prop_assert!(decode(&bytes).is_err());
    }
}

#[test]
fn what_is_refused() {
    let digest = Digest::of("pack");
    let other = Digest::of("other");
    let block = |pack, offset, length| Block { digest: other, place: Place::Pack { pack, offset, length } };
    let map = |packs: &[(Digest, u64)], blocks: Vec<Block>| BlockMap {
        size: blocks.len() as u64 * BLOCK,
        packs: packs.iter().map(|(digest, size)| PackRef { digest: *digest, size: *size }).collect(),
        blocks,
    };
    assert!(encode(&map(&[(digest, 100)], vec![block(0, 50, 50)])).is_ok());
    for (why, wrong) in [
        ("outside", map(&[(digest, 100)], vec![block(0, 51, 50)])),
        ("overflow", map(&[(digest, 100)], vec![block(0, u32::MAX, 2)])),
        ("empty frame", map(&[(digest, 100)], vec![block(0, 0, 0)])),
        ("unlisted", map(&[(digest, 100)], vec![block(1, 0, 9)])),
        ("unused", map(&[(digest, 100), (other, 100)], vec![block(0, 0, 9)])),
        ("order", map(&[(digest, 100), (other, 100)], vec![block(1, 0, 9), block(0, 0, 9)])),
        ("twice", map(&[(digest, 100), (digest, 100)], vec![block(0, 0, 9), block(1, 0, 9)])),
        ("large pack", map(&[(digest, PACK_LIMIT + 1)], vec![block(0, 0, 9)])),
        ("stored zero", map(&[(digest, 100)], vec![Block { digest: zero_block(), ..block(0, 0, 9) }])),
    ] {
        assert!(encode(&wrong).is_err(), "{why}");
    }
    for line in [
        r#"{"format":"kiln-blockmap-v2","size":0,"block":524288,"packs":[]}"#,
        r#"{"format":"kiln-blockmap-v1","size":0,"block":4096,"packs":[]}"#,
        r#"{"format":"kiln-blockmap-v1","size":18446744073709551615,"block":524288,"packs":[]}"#,
        r#"{"format":"kiln-blockmap-v1", "size":0,"block":524288,"packs":[]}"#,
        r#"{"format":"kiln-blockmap-v1","size":0,"block":524288,"packs":[],"more":1}"#,
    ] {
        assert_eq!(decode(format!("{line}\n").as_bytes()).unwrap_err().kind(), Code::Corrupt, "{line}");
    }
}

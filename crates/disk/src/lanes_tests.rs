use std::io::Write as _;

use proptest::prelude::*;

use super::*;

/// Every way that this machine has, and the one without lanes.
fn ways() -> Vec<Option<Kernel>> {
    let mut ways = vec![None, Kernel::best()];
    #[cfg(target_arch = "x86_64")]
    ways.extend([Kernel::avx2(), Kernel::avx512()]);
    ways
}

fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(length)
    .collect()
}

fn check(messages: &[Vec<u8>]) {
    let expected: Vec<Digest> = messages.iter().map(Digest::of).collect();
    let messages: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
    for way in ways() {
        assert_eq!(digests_with(way, &messages), expected, "{way:?}");
    }
    assert_eq!(digests(&messages), expected);
}

#[test]
fn the_examples_of_the_standard() {
    let text = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    let digests = digests(&[b"abc", b"", text.as_bytes(), b"abc", b"abc", b"abc", b"abc", b"abc", b"abc"]);
    assert_eq!(digests[0].hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!(digests[1].hex(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    assert_eq!(digests[2].hex(), "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    assert!(digests[3..].iter().all(|digest| *digest == digests[0]));
}

#[test]
fn each_length_around_the_padding_and_each_count() {
    for length in 0..=260 {
        check(&(0..LANES as u64).map(|seed| bytes(length, seed + 1)).collect::<Vec<_>>());
    }
    for count in 0..=2 * LANES as u64 + 1 {
        check(&(0..count).map(|seed| bytes(1000, seed + 1)).collect::<Vec<_>>());
    }
}

#[test]
fn whole_blocks() {
    check(&(0..LANES as u64).map(|seed| bytes(512 * 1024, seed + 1)).collect::<Vec<_>>());
}

#[test]
fn files_of_any_length_and_one_that_cannot_be_read() {
    let lengths = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 55, 5 * CHUNK + 64, 2 * CHUNK, 700];
    let contents: Vec<Vec<u8>> = lengths.iter().zip(1..).map(|(length, seed)| bytes(*length, seed)).collect();
    let files: Vec<File> = contents
        .iter()
        .map(|content| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(content).unwrap();
            file
        })
        .collect();
    let folder = File::open(std::env::temp_dir()).unwrap();
    let mut all: Vec<&File> = files.iter().collect();
    all.insert(3, &folder);
    let mut found = digests_of_files(&all);
    assert!(found.remove(3).is_err());
    for (found, content) in found.into_iter().zip(&contents) {
        assert_eq!(found.unwrap(), (Digest::of(content), content.len() as u64));
    }
    for way in ways() {
        for (found, content) in files_with(way, &all[4..]).into_iter().zip(&contents[3..]) {
            assert_eq!(found.unwrap().0, Digest::of(content), "{way:?}");
        }
    }
}

proptest! {
    #[test]
    fn lanes_give_what_sha2_gives(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..700), 0..20)) {
        check(&messages);
    }

    #[test]
    fn of_one_length_too(count in 1..12_u64, length in 0..5000_usize, seed in any::<u32>()) {
        check(&(0..count).map(|n| bytes(length, u64::from(seed) * 100 + n)).collect::<Vec<_>>());
    }
}

//! Damage of every kind is found, told, and removed.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;

use super::*;
use crate::label::{Label, Unusable};

/// Keeps a checkpoint, damages it, and gives the warning with which it was
/// dropped.
fn dropped_after(damage: impl FnOnce(&Path)) -> Option<String> {
    let place = Place::new(None);
    sample(&place);
    let folder = place.find(&key(1)).unwrap().folder;
    damage(&folder);
    let said = RefCell::new(Vec::new());
    let found = place.cache.find(&key(1), None, &|text| said.borrow_mut().push(text)).unwrap();
    let said = said.into_inner();
    assert_eq!(found.is_none(), said.len() == 1, "{said:?}");
    found.is_none().then(|| {
        assert!(!folder.exists());
        assert!(place.cache.peek(&key(1)).unwrap().is_none());
        said[0].clone()
    })
}

/// Two files of some chunks, with a hole in one.
fn sample(place: &Place) {
    let slot = slot(&place.cache, &key(1), 0);
    std::fs::write(slot.folder.join("small"), noise(100, 1)).unwrap();
    let large = std::fs::File::create(slot.folder.join("large")).unwrap();
    large.set_len(1 << 20).unwrap();
    large.write_all_at(&noise(200_000, 2), 300_000).unwrap();
    let written = Written { files: vec![undigested("small"), undigested("large")], ..Written::default() };
    place.cache.commit(slot, &written, Duration::from_secs(10)).unwrap();
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn one_flipped_byte_anywhere_is_found() {
    let large = [0, 65_535, 65_536, 299_999, 300_000, 400_000, 499_999, 500_000, 1 << 19, (1 << 20) - 1];
    for at in large {
        let said = dropped_after(|folder| flip(&folder.join("large"), at)).unwrap_or_else(|| panic!("byte {at}"));
        assert!(said.contains("large") && said.contains(&key(1).short()), "{said}");
    }
    for at in 0..100 {
        let said = dropped_after(|folder| flip(&folder.join("small"), at)).unwrap_or_else(|| panic!("byte {at}"));
        assert!(said.contains("small"), "{said}");
    }
}

#[test]
fn one_flipped_byte_in_the_label_is_found() {
    let place = Place::new(None);
    sample(&place);
    let good = std::fs::read(place.find(&key(1)).unwrap().folder.join("checkpoint.json")).unwrap();
    assert!(serde_json::from_slice::<serde_json::Value>(&good).is_ok());
    let is_found = |bad: &[u8]| matches!(Label::decode(bad), Err(Unusable::Damaged(_)));
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            assert!(is_found(&bad), "bit {bit} of byte {at}");
        }
        assert!(is_found(&good[..at]), "{at} bytes");
    }
    assert!(is_found(&[&good[..], b"\n"].concat()));
    let said = dropped_after(|folder| flip(&folder.join("checkpoint.json"), 200)).unwrap();
    assert!(said.contains("checkpoint.json"), "{said}");
}

#[test]
fn a_file_that_is_missing_or_of_another_length_is_found() {
    let resize = |name: &'static str, length| {
        move |folder: &Path| OpenOptions::new().write(true).open(folder.join(name)).unwrap().set_len(length).unwrap()
    };
    for length in [0, 1, (1 << 20) - 1, (1 << 20) + 1, 2 << 20] {
        assert!(dropped_after(resize("large", length)).unwrap().contains("large"));
    }
    assert!(dropped_after(resize("small", 99)).unwrap().contains("small has 99 bytes instead of 100"));
    for name in ["small", "large"] {
        assert_eq!(
            dropped_after(|folder| std::fs::remove_file(folder.join(name)).unwrap()).unwrap().split(": ").last(),
            Some(&*format!("{name} is missing"))
        );
    }
    let folder_instead = |folder: &Path| {
        std::fs::remove_file(folder.join("small")).unwrap();
        std::fs::create_dir(folder.join("small")).unwrap();
    };
    assert!(dropped_after(folder_instead).is_some());
}

#[test]
fn another_version_is_left_alone_and_another_step_is_not() {
    let place = Place::new(None);
    sample(&place);
    let folder = place.find(&key(1)).unwrap().folder;
    let text = std::fs::read_to_string(folder.join("checkpoint.json")).unwrap();
    let elsewhere = place.cache.root.join(key(2).hex());
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::rename(&folder, elsewhere.join("x")).unwrap();
    let said = RefCell::new(Vec::new());
    assert!(place.cache.find(&key(2), None, &|text| said.borrow_mut().push(text)).unwrap().is_none());
    assert!(said.borrow()[0].contains("another step"));
    assert!(!elsewhere.exists());

    sample(&place);
    let folder = place.find(&key(1)).unwrap().folder;
    let rest = text.split_once("\",").unwrap().1.replace("\"format\":1", "\"format\":2,\"files\":3,\"was\":1");
    let digest = blake3::hash(rest.as_bytes());
    std::fs::write(folder.join("checkpoint.json"), format!("{{\"blake3\":\"{digest}\",{rest}")).unwrap();
    assert!(place.find(&key(1)).is_none());
    assert!(place.cache.peek(&key(1)).unwrap().is_none());
    assert!(folder.exists());
    place.cache.prune(None, false).unwrap();
    assert!(!folder.exists(), "when room is needed, it goes first");
}

#[test]
fn an_older_whole_one_takes_the_place_of_a_damaged_one() {
    let place = Place::new(None);
    put(&place.cache, &key(1), 1, &[("disk", b"older")]);
    let older = place.find(&key(1)).unwrap();
    put(&place.cache, &key(1), 1, &[("disk", b"newer")]);
    let newer = place.find(&key(1)).unwrap();
    flip(&newer.folder.join("disk"), 2);
    drop(older);
    let said = RefCell::new(Vec::new());
    let found = place.cache.find(&key(1), None, &|text| said.borrow_mut().push(text)).unwrap().unwrap();
    assert_eq!(std::fs::read(found.folder.join("disk")).unwrap(), b"older");
    assert_eq!(said.borrow().len(), 1);
}

#[test]
fn what_a_builder_found_damaged_is_gone_once_nobody_uses_it() {
    let place = Place::new(None);
    put(&place.cache, &key(1), 1, &[("disk", b"x")]);
    let (one, two) = (place.find(&key(1)).unwrap(), place.find(&key(1)).unwrap());
    place.cache.drop_damaged(one).unwrap();
    assert!(place.find(&key(1)).is_none());
    assert!(place.steps().is_empty());
    assert!(two.folder.join("disk").exists(), "another still uses it");
    place.cache.prune(None, false).unwrap();
    assert!(two.folder.exists());
    assert!(place.usage() > 0, "it takes room as long as it is used");
    let folder = two.folder.clone();
    drop(two);
    drop(slot(&place.cache, &key(2), 0));
    assert!(!folder.exists());

    put(&place.cache, &key(1), 1, &[("disk", b"x")]);
    let mut strange = place.find(&key(1)).unwrap();
    strange.folder = place.folder.path().to_owned();
    assert!(place.cache.drop_damaged(strange).is_err());
    let one = place.find(&key(1)).unwrap();
    let folder = one.folder.clone();
    place.cache.drop_damaged(one).unwrap();
    assert!(!folder.exists());
}

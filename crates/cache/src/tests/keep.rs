//! Checkpoints written, found again, replaced and dropped; claims.

use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use kiln_model::Code;
use kiln_model::checkpoint::{FileDigest, Slot};

use super::*;

#[test]
fn what_was_kept_is_found_again() {
    let place = Place::new(None);
    let (step, memory) = (key("step"), key("memory"));
    assert_eq!(place.cache.peek(&step).unwrap(), None);
    let slot = place.cache.slot(&step, Some(&memory), 1000).unwrap().unwrap();
    assert_eq!(std::fs::metadata(&slot.folder).unwrap().permissions().mode() & 0o777, 0o700);
    std::fs::write(slot.folder.join("disk"), b"a disk").unwrap();
    std::fs::write(slot.folder.join("memory"), b"remembered").unwrap();
    std::fs::write(slot.folder.join("scratch"), b"of no use later").unwrap();
    std::fs::set_permissions(slot.folder.join("disk"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut digest = FileDigest::new();
    digest.add(0, b"remembered");
    let remembered = KeptFile { name: "memory".into(), length: 10, digest: digest.finish(10) };
    let note = serde_json::json!({"z": 1, "a": ["x", 0.5]});
    let written = Written { memory: true, files: vec![undigested("disk"), remembered.clone()], note: note.clone() };
    assert!(place.find(&step).is_none(), "seen before it was committed");
    place.cache.commit(slot, &written, Duration::from_millis(12_500)).unwrap();

    let found = place.find(&step).unwrap();
    assert_eq!((found.step, found.memory, found.worth), (step, Some(memory), Duration::from_millis(12_500)));
    assert_eq!(found.note.to_string(), note.to_string());
    assert_eq!(found.files[0].length, 6);
    assert_eq!(found.files[1], remembered);
    assert!(found.made.elapsed().unwrap() < Duration::from_secs(60));
    let mut names: Vec<_> = std::fs::read_dir(&found.folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["checkpoint.json", "disk", "memory"]);
    for name in names {
        assert_eq!(std::fs::metadata(found.folder.join(name)).unwrap().permissions().mode() & 0o777, 0o600);
    }
    let peek = place.cache.peek(&step).unwrap().unwrap();
    assert_eq!((peek.made, peek.memory), (found.made, Some(memory)));
    assert_eq!(place.drafts(), [] as [PathBuf; 0]);
    assert!(place.find(&key("another")).is_none());
}

#[test]
fn memory_has_a_key_only_where_it_was_kept() {
    let place = Place::new(None);
    let slot = place.cache.slot(&key(1), Some(&key("memory")), 0).unwrap().unwrap();
    commit(&place.cache, slot, 1);
    assert_eq!(place.find(&key(1)).unwrap().memory, None);
}

#[test]
fn one_that_is_too_old_is_not_found_and_the_newest_is() {
    let place = Place::new(None);
    put(&place.cache, &key(1), 1, &[("disk", b"old")]);
    let old = place.find(&key(1)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(place.cache.find(&key(1), Some(Duration::from_millis(10)), &|_| ()).unwrap().is_none());
    // The old one is in use, so it stays beside the new one.
    put(&place.cache, &key(1), 1, &[("disk", b"new")]);
    let new = place.cache.find(&key(1), Some(Duration::from_secs(60)), &|_| ()).unwrap().unwrap();
    assert_eq!(std::fs::read(new.folder.join("disk")).unwrap(), b"new");
    assert_eq!(place.cache.peek(&key(1)).unwrap().unwrap().made, new.made);
    assert_eq!(std::fs::read(old.folder.join("disk")).unwrap(), b"old");
    drop(old);
    put(&place.cache, &key(1), 1, &[("disk", b"newest")]);
    assert_eq!(place.steps().len(), 2, "the unused one went, the used one did not");
}

#[test]
fn what_came_from_elsewhere_is_as_old_as_it_was_there() {
    let mut place = Place::new(None);
    place.cache = place.cache.trusting(vec!["ci".into()]);
    let made = SystemTime::now() - Duration::from_secs(3600);
    let slot = place.cache.slot(&key(1), None, 0).unwrap().unwrap();
    std::fs::write(slot.folder.join("disk"), b"from elsewhere").unwrap();
    let written = Written { files: vec![undigested("disk")], ..Written::default() };
    place.cache.commit_signed(&slot, &written, Duration::from_secs(5), made, "ci").unwrap();
    drop(slot);
    assert_eq!(place.find(&key(1)).unwrap().made, made);
    assert_eq!(place.cache.peek(&key(1)).unwrap().unwrap().made, made);
    assert!(place.cache.find(&key(1), Some(Duration::from_secs(1800)), &|_| ()).unwrap().is_none());

    // A digest that was said, of other bytes, is noticed when it is looked for.
    let slot = place.cache.slot(&key(2), None, 0).unwrap().unwrap();
    std::fs::write(slot.folder.join("disk"), b"other bytes").unwrap();
    let said = KeptFile { name: "disk".into(), length: 11, digest: FileDigest::new().finish(11) };
    let written = Written { files: vec![said], ..Written::default() };
    place.cache.commit_signed(&slot, &written, Duration::from_secs(5), made, "ci").unwrap();
    drop(slot);
    let told = std::cell::Cell::new(false);
    assert!(place.cache.find(&key(2), None, &|_| told.set(true)).unwrap().is_none() && told.get());
}

#[test]
fn what_hangs_on_a_key_is_for_who_trusts_it() {
    let place = Place::new(None);
    let with = |keys: &[&str]| place.cache.trusting(keys.iter().map(|key| (*key).to_owned()).collect());
    let find = |cache: &Checkpoints, step: &Key| cache.find(step, None, &|text| panic!("{text}")).unwrap().is_some();
    let ours = with(&["ci", "other"]);
    put(&ours, &key("own"), 1, &[("disk", b"x")]);
    let slot = ours.slot(&key("signed"), None, 0).unwrap().unwrap();
    std::fs::write(slot.folder.join("disk"), b"from elsewhere").unwrap();
    let written = Written { files: vec![undigested("disk")], ..Written::default() };
    ours.commit_signed(&slot, &written, Duration::from_secs(1), SystemTime::now(), "ci").unwrap();
    // What is made of it hangs on it; what is made of this machine's own does not.
    assert!(find(&ours, &key("signed")));
    put(&ours, &key("of signed"), 1, &[("disk", b"y")]);
    assert!(find(&ours, &key("own")));
    put(&ours, &key("of own"), 1, &[("disk", b"z")]);
    for (keys, seen) in [(&["ci"][..], true), (&["other"][..], false), (&[][..], false)] {
        let cache = with(keys);
        for step in ["signed", "of signed"] {
            assert_eq!((find(&cache, &key(step)), cache.peek(&key(step)).unwrap().is_some()), (seen, seen), "{step} with {keys:?}");
        }
        assert!(find(&cache, &key("own")) && find(&cache, &key("of own")));
    }
}

#[test]
fn use_is_remembered() {
    let place = Place::new(None);
    put(&place.cache, &key(1), 1, &[("disk", b"x")]);
    let folder = place.find(&key(1)).unwrap().folder;
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    std::fs::File::open(folder.join("checkpoint.json")).unwrap().set_modified(long_ago).unwrap();
    assert_eq!(place.cache.list().unwrap()[0].last_used, long_ago);
    let found = place.find(&key(1)).unwrap();
    let listed = &place.cache.list().unwrap()[0];
    assert!(listed.last_used.elapsed().unwrap() < Duration::from_secs(60));
    assert!(listed.in_use);
    drop(found);
    assert!(!place.cache.list().unwrap()[0].in_use);
}

#[test]
fn a_slot_that_is_not_committed_leaves_nothing() {
    let place = Place::new(None);
    let slot = slot(&place.cache, &key(1), 100);
    std::fs::write(slot.folder.join("disk"), b"half").unwrap();
    drop(slot);
    assert_eq!(place.drafts(), [] as [PathBuf; 0]);
    assert!(place.find(&key(1)).is_none());
}

#[test]
fn a_holder_that_lives_on_after_the_commit_keeps_nobody_waiting() {
    let place = Place::new(None);
    let slot = slot(&place.cache, &key(1), 0);
    let hold = slot.hold.clone();
    commit(&place.cache, slot, 1);
    drop(place.find(&key(1)).unwrap());
    drop(hold);
    assert!(place.find(&key(1)).is_some());
}

#[test]
fn what_was_not_written_as_said_is_not_kept() {
    let place = Place::new(None);
    let try_it = |file: KeptFile| {
        let slot = slot(&place.cache, &key(1), 0);
        std::fs::write(slot.folder.join("disk"), b"12345").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", slot.folder.join("link")).unwrap();
        let written = Written { files: vec![undigested("disk"), file], ..Written::default() };
        let error = place.cache.commit(slot, &written, Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), Code::Failed);
        assert!(place.find(&key(1)).is_none());
        assert_eq!(place.drafts(), [] as [PathBuf; 0]);
    };
    for name in ["missing", "link", "..", "", ".", "../x", "/etc/passwd", "checkpoint.json", "disk", "disk/"] {
        try_it(undigested(name));
    }
    try_it(KeptFile { length: 6, digest: "00".into(), ..undigested("disk") });
    let strange = Slot { step: key(1), memory: None, folder: place.folder.path().to_owned(), hold: std::sync::Arc::new(()) };
    assert!(place.cache.commit(strange, &Written::default(), Duration::ZERO).is_err());
}

#[test]
fn holes_cost_nothing_and_are_the_same_as_zeros() {
    const LENGTH: u64 = 40 << 30;
    let place = Place::new(None);
    let slot = slot(&place.cache, &key(1), 1 << 20);
    let file = std::fs::File::create(slot.folder.join("disk")).unwrap();
    file.set_len(LENGTH).unwrap();
    for (offset, byte) in [(5, b"a"), (9 << 30, b"b"), ((9 << 30) + 70_000, b"\0"), (LENGTH - 1, b"c")] {
        file.write_all_at(byte, offset).unwrap();
    }
    commit(&place.cache, slot, 1);
    let found = place.find(&key(1)).unwrap();
    let mut digest = FileDigest::new();
    digest.add(9 << 30, b"b");
    digest.add(5, b"a");
    digest.add(LENGTH - 1, b"c");
    assert_eq!(found.files[0].digest, digest.finish(LENGTH));
    assert!(place.usage() < 1 << 20, "{}", place.usage());
}

#[test]
fn a_claim_has_one_holder_and_leaves_no_file() {
    let place = Place::new(None);
    let claim = place.cache.claim(&key(1)).unwrap().unwrap();
    assert!(place.cache.claim(&key(1)).unwrap().is_none());
    assert!(place.cache.claim(&key(2)).unwrap().is_some());
    // Sweeping takes nothing from the living, and what the dead left is gone.
    std::fs::write(place.cache.claims.join("dead"), b"").unwrap();
    place.cache.prune(None, true).unwrap();
    assert!(place.cache.claims.join("dead").exists());
    place.cache.prune(None, false).unwrap();
    assert!(!place.cache.claims.join("dead").exists());
    assert!(place.cache.claim(&key(1)).unwrap().is_none());
    drop(claim);
    assert!(place.cache.claim(&key(1)).unwrap().is_some());
    assert_eq!(std::fs::read_dir(&place.cache.claims).unwrap().count(), 0);
}

#[test]
fn threads_never_hold_the_same_claim() {
    let place = Place::new(None);
    let (inside, had) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while had.load(Ordering::SeqCst) < 500 {
                    if let Some(claim) = place.cache.claim(&key(1)).unwrap() {
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        had.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(claim);
                    }
                }
            });
        }
    });
}

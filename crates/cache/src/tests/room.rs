//! What is counted, and what goes for what.

use std::time::SystemTime;

use kiln_model::checkpoint::Hold;

use super::*;
use crate::books::value;
use crate::checkpoints::{Draft, NEW};

const MIB: u64 = 1 << 20;

fn put_noise(place: &Place, name: &str, worth: u64, mib: u64) {
    put(&place.cache, &key(name), worth, &[("disk", &noise((mib * MIB) as usize, mib))]);
}

/// The names of `all` that are still there.
fn left<'a>(place: &Place, all: &[&'a str]) -> Vec<&'a str> {
    let steps = place.steps();
    all.iter().copied().filter(|name| steps.contains(&key(name))).collect()
}

fn last_used(place: &Place, name: &str, days: u64) {
    let folder = place.find(&key(name)).unwrap().folder;
    let time = SystemTime::now() - Duration::from_secs(days * 24 * 3600);
    std::fs::File::open(folder.join("checkpoint.json")).unwrap().set_modified(time).unwrap();
}

#[test]
fn the_least_seconds_for_its_bytes_go_first() {
    let day = Duration::from_secs(24 * 3600);
    let minute = Duration::from_secs(60);
    assert!(value(minute, MIB, Duration::ZERO) > value(minute, 2 * MIB, Duration::ZERO));
    assert!(value(minute, MIB, Duration::ZERO) > value(minute / 2, MIB, Duration::ZERO));
    assert!(value(minute, MIB, Duration::ZERO) > value(minute, MIB, day));
    assert!(value(minute, 0, Duration::ZERO) > value(minute / 2, 0, Duration::ZERO));
    assert!(value(minute, 0, Duration::ZERO).is_finite());

    let place = Place::new(Some(13 * MIB));
    let all = ["quick", "slow", "large", "idle"];
    put_noise(&place, "quick", 10, 2);
    put_noise(&place, "slow", 1000, 2);
    put_noise(&place, "large", 400, 6);
    put_noise(&place, "idle", 1000, 2);
    last_used(&place, "idle", 99);
    assert_eq!(left(&place, &all), all);
    // Seconds for each MiB: quick 5, idle 5 (of 500, after 99 days), large 66, slow 500.
    drop(slot(&place.cache, &key("new"), 3 * MIB));
    assert_eq!(left(&place, &all), ["slow", "large"]);
    drop(slot(&place.cache, &key("new"), 9 * MIB));
    assert_eq!(left(&place, &all), ["slow"]);
}

#[test]
fn one_in_use_never_goes_and_nothing_goes_in_vain() {
    let place = Place::new(Some(10 * MIB));
    put_noise(&place, "used", 0, 4);
    put_noise(&place, "unused", 1000, 4);
    let used = place.find(&key("used")).unwrap();
    assert!(place.cache.slot(&key("new"), None, 11 * MIB).unwrap().is_none());
    assert!(place.cache.slot(&key("new"), None, 8 * MIB).unwrap().is_none());
    assert_eq!(left(&place, &["used", "unused"]), ["used", "unused"], "there would have been no room even so");
    let slot = slot(&place.cache, &key("new"), 5 * MIB);
    assert_eq!(left(&place, &["used", "unused"]), ["used"]);
    assert!(used.folder.join("disk").exists());
    drop((used, slot));
    assert!(place.cache.slot(&key("new"), None, 10 * MIB).unwrap().is_some());
    assert_eq!(place.usage(), 0);
}

#[test]
fn a_superseded_one_goes_before_any_other() {
    let place = Place::new(Some(7 * MIB));
    put_noise(&place, "twice", 1000, 2);
    let old = place.find(&key("twice")).unwrap();
    put_noise(&place, "twice", 1000, 2);
    put_noise(&place, "other", 1, 2);
    let folder = old.folder.clone();
    drop(old);
    drop(slot(&place.cache, &key("new"), 2 * MIB));
    assert!(!folder.exists());
    assert_eq!(left(&place, &["twice", "other"]), ["twice", "other"]);
}

/// Three checkpoints of a chain of disk layers: each has those of the ones
/// before it, and one of its own.
fn chain(place: &Place) {
    let mut before: Option<Checkpoint> = None;
    for n in 0..3 {
        let slot = slot(&place.cache, &key(n), 2 * MIB);
        for file in before.iter().flat_map(|before| &before.files) {
            std::fs::hard_link(before.as_ref().unwrap().folder.join(&file.name), slot.folder.join(&file.name)).unwrap();
        }
        std::fs::write(slot.folder.join(format!("layer-{n}")), noise(2 * MIB as usize, n)).unwrap();
        commit(&place.cache, slot, 10);
        before = place.find(&key(n));
    }
}

#[test]
fn linked_layers_count_once_and_go_with_the_last_who_has_them() {
    let place = Place::new(None);
    chain(&place);
    let used = place.usage();
    assert!((6 * MIB..7 * MIB).contains(&used), "{used}");
    let listed = place.cache.list().unwrap();
    let of = |n: u64| listed.iter().find(|listed| listed.step == key(n)).unwrap();
    assert!((6 * MIB..7 * MIB).contains(&of(2).bytes));
    assert!((2 * MIB..3 * MIB).contains(&of(2).frees), "only its own layer");
    assert!(of(0).frees < MIB, "others need what it has");

    // Whatever goes, what is said to become free is what does.
    for target in [5 * MIB, 3 * MIB] {
        let before = place.usage();
        let said = place.cache.prune(Some(target), true).unwrap();
        assert_eq!(place.usage(), before, "a dry run");
        assert_eq!(place.cache.prune(Some(target), false).unwrap(), said);
        assert_eq!(place.usage(), before - said.bytes);
        assert!(place.usage() <= target);
    }
    let rest = place.cache.list().unwrap();
    assert_eq!(rest.len(), 1, "the one that frees most went first: {rest:?}");
    assert_eq!(rest[0].step, key(0));
    assert!(place.find(&key(0)).is_some());
}

#[test]
fn what_is_linked_elsewhere_becomes_free_for_nobody() {
    let place = Place::new(None);
    let slot = slot(&place.cache, &key(1), 0);
    std::fs::write(place.folder.path().join("base"), noise(2 * MIB as usize, 1)).unwrap();
    std::fs::hard_link(place.folder.path().join("base"), slot.folder.join("base")).unwrap();
    commit(&place.cache, slot, 1);
    assert!(place.usage() > 2 * MIB);
    assert!(place.cache.list().unwrap()[0].frees < MIB);
    let pruned = place.cache.prune(None, false).unwrap();
    assert_eq!(pruned.checkpoints, 1);
    assert!(pruned.bytes < MIB);
    assert_eq!(place.usage(), 0);
}

#[test]
fn what_is_promised_is_not_given_twice() {
    let place = Place::new(Some(10 * MIB));
    let one = slot(&place.cache, &key(1), 6 * MIB);
    assert!(place.cache.slot(&key(2), None, 6 * MIB).unwrap().is_none());
    // What it writes is not counted on top of what it was promised.
    std::fs::write(one.folder.join("disk"), noise(5 * MIB as usize, 1)).unwrap();
    let two = slot(&place.cache, &key(2), 3 * MIB);
    drop(one);
    assert!(place.cache.slot(&key(3), None, 6 * MIB).unwrap().is_some());
    drop(two);
}

#[test]
fn the_file_system_keeps_its_share() {
    let mut place = Place::new(None);
    // A quarter of what is free.
    place.cache.space = |_| Ok(Space { total: 100 << 30, free: 40 << 30 });
    assert_eq!(place.cache.usage().unwrap().budget, 10 << 30);
    assert!(place.cache.slot(&key(1), None, 10 << 30).unwrap().is_some());
    assert!(place.cache.slot(&key(1), None, (10 << 30) + 1).unwrap().is_none());
    // 5 % of a large one, 2 GiB of a small one.
    place.cache.budget = Some(u64::MAX);
    assert!(place.cache.slot(&key(1), None, 35 << 30).unwrap().is_some());
    assert!(place.cache.slot(&key(1), None, (35 << 30) + 1).unwrap().is_none());
    // 5 GiB of a huge one.
    place.cache.space = |_| Ok(Space { total: 250 << 30, free: 40 << 30 });
    assert!(place.cache.slot(&key(1), None, 35 << 30).unwrap().is_some());
    assert!(place.cache.slot(&key(1), None, (35 << 30) + 1).unwrap().is_none());
    place.cache.space = |_| Ok(Space { total: 10 << 30, free: 3 << 30 });
    assert_eq!(place.cache.usage().unwrap().budget, 1 << 30);
    assert!(place.cache.slot(&key(1), None, 1 << 30).unwrap().is_some());
    assert!(place.cache.slot(&key(1), None, (1 << 30) + 1).unwrap().is_none());
    // On a disk that is nearly full, what is kept goes for it.
    put_noise(&place, "kept", 1, 2);
    place.cache.space = |_| Ok(Space { total: 10 << 30, free: 2 << 30 });
    assert!(place.cache.slot(&key(1), None, MIB).unwrap().is_some());
    assert_eq!(place.steps().len(), 0);
    place.cache.space = |_| Ok(Space { total: 10 << 30, free: 1 << 30 });
    assert!(place.cache.slot(&key(1), None, 1).unwrap().is_none());
    assert_eq!(place.cache.usage().unwrap().budget, 0);
}

#[test]
fn the_real_file_system_answers() {
    let space = Space::of(std::env::temp_dir().as_path()).unwrap();
    assert!(space.total >= space.free && space.total > MIB);
}

#[test]
fn prune_removes_all_but_what_is_in_use_and_what_the_dead_left() {
    let place = Place::new(None);
    put_noise(&place, "a", 1, 1);
    put_noise(&place, "b", 1, 1);
    let used = place.find(&key("a")).unwrap();
    let living = slot(&place.cache, &key("c"), 0);
    let dead = place.cache.root.join(NEW).join("dead.123");
    std::fs::create_dir(&dead).unwrap();
    std::fs::write(dead.join("disk"), noise(3 * MIB as usize, 1)).unwrap();
    // A dead one that had linked what another still has frees only its own.
    std::fs::hard_link(used.folder.join("disk"), dead.join("layer")).unwrap();
    let half_removed = place.cache.root.join(key("gone").hex()).join("x");
    std::fs::create_dir_all(&half_removed).unwrap();
    std::fs::write(place.cache.root.join(key("gone").hex()).join("stray"), b"no folder").unwrap();

    let said = place.cache.prune(None, true).unwrap();
    assert!(dead.exists() && half_removed.exists());
    let pruned = place.cache.prune(None, false).unwrap();
    assert_eq!(said, pruned);
    assert_eq!(pruned.checkpoints, 1);
    assert!((4 * MIB..5 * MIB).contains(&pruned.bytes), "{pruned:?}");
    assert!(!dead.exists() && !half_removed.exists());
    assert!(living.folder.exists());
    assert_eq!(place.steps(), [key("a")]);
    assert!(place.find(&key("a")).is_some());
}

#[test]
fn a_draft_is_known_by_its_lock_alone() {
    let place = Place::new(None);
    let folder = place.cache.root.join(NEW).join("living.7");
    let draft: Hold = std::sync::Arc::new(Draft::create(folder.clone()).unwrap());
    place.cache.prune(None, false).unwrap();
    assert!(folder.exists());
    drop(draft);
    assert!(!folder.exists());
}

//! Several processes at once, and processes that are killed. The children are
//! this test program again, told by the environment what to do.

use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::*;

const FOLDER: &str = "KILN_CACHE_TEST_FOLDER";

fn child(test: &str, folder: &Path) -> Child {
    let name = format!("tests::processes::{test}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &name, "--ignored", "--test-threads=1"]).env(FOLDER, folder);
    command.stdout(Stdio::null()).spawn().unwrap()
}

fn folder_of_child() -> PathBuf {
    std::env::var_os(FOLDER).unwrap().into()
}

#[test]
#[ignore = "a part of processes_never_hold_the_same_claim"]
fn child_claims() {
    let folder = folder_of_child();
    let cache = open(&folder, None);
    let inside = folder.join("inside");
    let mut had = 0;
    while had < 100 {
        if let Some(claim) = cache.claim(&key("contended")).unwrap() {
            // Fails when another is inside too.
            std::fs::OpenOptions::new().write(true).create_new(true).open(&inside).unwrap();
            std::fs::remove_file(&inside).unwrap();
            drop(claim);
            had += 1;
        }
    }
}

#[test]
fn processes_never_hold_the_same_claim() {
    let place = Place::new(None);
    let mut children: Vec<_> = (0..3).map(|_| child("child_claims", place.folder.path())).collect();
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(std::fs::read_dir(&place.cache.claims).unwrap().count(), 0);
}

#[test]
#[ignore = "a part of a_killed_process_leaves_no_half_and_no_lock"]
fn child_keeps_for_ever() {
    let cache = open(&folder_of_child(), None);
    // The parent has it for a moment each time that it asks whether it is taken.
    let _claim = std::iter::repeat_with(|| cache.claim(&key("held")).unwrap()).flatten().next().unwrap();
    let (one, two) = (noise(300_000, 1), noise(70_000, 2));
    for n in 0.. {
        put(&cache, &key(n % 5), 10, &[("one", &one), ("two", &two)]);
        drop(cache.find(&key(n % 5), None, &|text| panic!("{text}")).unwrap());
    }
}

#[test]
fn a_killed_process_leaves_no_half_and_no_lock() {
    let place = Place::new(None);
    let mut seen = 0;
    for round in 0..12_u64 {
        let mut child = child("child_keeps_for_ever", place.folder.path());
        let begun = Instant::now();
        while place.cache.claim(&key("held")).unwrap().is_some() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the child does not begin");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(round * 7_300));
        child.kill().unwrap();
        child.wait().unwrap();

        assert!(place.cache.claim(&key("held")).unwrap().is_some());
        for step in (0..5).map(key) {
            if place.cache.peek(&step).unwrap().is_some() {
                assert!(place.find(&step).is_some());
                seen += 1;
            }
        }
        // The next one clears up after it.
        let slot = slot(&place.cache, &key("next"), 0);
        assert_eq!(place.drafts(), std::slice::from_ref(&slot.folder));
        assert_eq!(place.cache.list().unwrap().len(), place.cache.usage().unwrap().checkpoints);
    }
    assert!(seen > 0);
    place.cache.prune(None, false).unwrap();
    assert_eq!(place.usage(), 0);
    assert_eq!(std::fs::read_dir(&place.cache.claims).unwrap().count(), 0);
    // The lock and the folder of drafts.
    assert_eq!(std::fs::read_dir(&place.cache.root).unwrap().count(), 2);
}

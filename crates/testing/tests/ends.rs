//! The registry ends with the test, however that ends.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::process::Command;
use std::time::{Duration, Instant};

use kiln_testing::Registry;

const CHILD: &str = "KILN_TESTING_CHILD";

fn gone_within(seconds: u64, check: impl Fn() -> bool) -> bool {
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(seconds) {
        if check() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

fn runs(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}/exe")).exists()
}

#[test]
fn dropped_it_is_gone() {
    let registry = Registry::builder().start().unwrap();
    let (pid, storage) = (registry.pid(), registry.storage());
    assert!(runs(pid));
    drop(registry);
    assert!(!runs(pid));
    assert!(!storage.parent().unwrap().exists());
}

#[test]
fn stopped_it_keeps_what_it_stored_and_comes_back() {
    let mut registry = Registry::builder().start().unwrap();
    let (pid, address) = (registry.pid(), registry.address().to_owned());
    std::fs::create_dir_all(registry.storage().join("x")).unwrap();
    registry.stop();
    assert!(!runs(pid));
    registry.start_again().unwrap();
    assert!(runs(registry.pid()) && registry.pid() != pid);
    assert_eq!(registry.address(), address);
    assert!(registry.storage().join("x").exists());
}

/// Run as a child by the test below; alone it does nothing.
#[test]
fn child_that_is_killed() {
    let Ok(told) = std::env::var(CHILD) else { return };
    let registry = Registry::builder().start().unwrap();
    std::fs::write(told, format!("{}\n{}", registry.pid(), registry.storage().parent().unwrap().display())).unwrap();
    let own = rustix::process::getpid();
    rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn it_ends_with_a_test_that_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let told = folder.path().join("told");
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "child_that_is_killed"]).env(CHILD, &told);
    assert!(!child.output().unwrap().status.success());
    let told = std::fs::read_to_string(told).unwrap();
    let (pid, storage) = told.split_once('\n').unwrap();
    let pid = pid.parse().unwrap();
    assert!(gone_within(10, || !runs(pid)), "{pid} still runs");
    assert!(gone_within(10, || !std::path::Path::new(storage).exists()), "{storage} is still there");
}

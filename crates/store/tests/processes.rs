//! Several processes in one store, and processes that are killed in it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail")]

mod common;

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Context, publish};
use kiln_disk::raw::RawSource;
use kiln_model::block::{BLOCK, ImageSink as _};
use kiln_store::{Keep, Store};

/// Publishes image after image, in a process of its own; does nothing when
/// it runs as an ordinary test.
#[test]
fn writer() {
    let (Some(root), Ok(number)) = (std::env::var_os("KILN_TEST_STORE"), std::env::var("KILN_TEST_NUMBER")) else { return };
    let number: u64 = number.parse().unwrap();
    let rounds = std::env::var("KILN_TEST_ROUNDS").map_or(u64::MAX, |rounds| rounds.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    for round in 0..rounds {
        let store = Store::open(root.as_ref()).unwrap();
        let blocks: Vec<_> = (0..20).map(|n| (n, number * 1_000_000 + round * 100 + n)).collect();
        common::raw(&path, 20 * BLOCK, &blocks);
        let disk = store.write_disk("root", &mut RawSource::open(&path).unwrap(), None, &[], &mut |_, _| {}).unwrap();
        publish(&store, "web", &format!("{number}.{round}"), &disk).unwrap();
    }
}

fn spawn(context: &Context, number: u64, rounds: Option<u64>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "writer"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.env("KILN_TEST_STORE", context.root()).env("KILN_TEST_NUMBER", number.to_string());
    if let Some(rounds) = rounds {
        command.env("KILN_TEST_ROUNDS", rounds.to_string());
    }
    command.spawn().unwrap()
}

#[test]
fn processes_do_not_lose_each_others_images() {
    let context = Context::new();
    let mut writers: Vec<_> = (0..4).map(|number| spawn(&context, number, Some(5))).collect();
    for writer in &mut writers {
        while writer.try_wait().unwrap().is_none() {
            context.store.prune(&Keep::default()).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(writer.wait().unwrap().success());
    }
    let listing = context.store.images(false).unwrap();
    assert_eq!((listing.images.len(), listing.damaged.len()), (20, 0));
    assert!(context.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
}

#[test]
fn a_killed_writer_leaves_an_old_state_or_a_new_one() {
    let context = Context::new();
    for number in 0..12u64 {
        let mut writer = spawn(&context, number, None);
        std::thread::sleep(Duration::from_millis(60 + number * 37 % 240));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let store = context.again();
        let report = store.verify(&mut |_, _| {}).unwrap();
        assert!(report.damaged.is_empty(), "{:?}", report.damaged);
        store.prune(&Keep::default()).unwrap();
        let left = |folder: &str| std::fs::read_dir(context.root().join(".kiln").join(folder)).unwrap().count();
        assert_eq!(left("tmp"), 0, "half files were left");
    }
}

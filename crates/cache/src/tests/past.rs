//! Records of earlier bakes.

use std::io::Write as _;

use kiln_model::Digest;
use kiln_model::history::{History as _, Record, StepRecord};

use super::*;
use crate::HistoryFiles;

fn record(name: &str, bake: &str) -> Record {
    let step = StepRecord {
        name: "packages".into(),
        kind: "shell".into(),
        key: key("packages"),
        parts: Vec::new(),
        made: 1_700_000_000,
        seconds: 12.25,
    };
    Record {
        bake: bake.into(),
        name: name.into(),
        version: "1.0".into(),
        finished: 1_700_000_100,
        base_label: "debian bookworm".into(),
        base: Digest::of("base"),
        start: key("start"),
        boot: Some(6.5),
        steps: vec![step],
        seal: key("seal"),
        seal_parts: Vec::new(),
        seal_seconds: 3.5,
        checked: None,
        tests: None,
        test_seconds: 0.0,
        image: Digest::of("image"),
        disk: Some(Digest::of("disk")),
        cloud: Vec::new(),
        base_at_cloud: false,
    }
}

fn history() -> (tempfile::TempDir, HistoryFiles) {
    let folder = tempfile::tempdir().unwrap();
    let history = HistoryFiles::open(&Home::open(Some(folder.path().to_owned())).unwrap()).unwrap();
    (folder, history)
}

fn bakes(history: &HistoryFiles, name: &str) -> Vec<String> {
    history.records(name).unwrap().into_iter().map(|record| record.bake).collect()
}

#[test]
fn records_come_back_oldest_first_and_by_name() {
    let (_folder, history) = history();
    assert!(history.records("web").unwrap().is_empty());
    history.add(&record("web", "1")).unwrap();
    history.add(&record("web", "2")).unwrap();
    history.add(&record("shop/web", "3")).unwrap();
    assert_eq!(history.records("web").unwrap(), [record("web", "1"), record("web", "2")]);
    assert_eq!(bakes(&history, "shop/web"), ["3"]);
}

#[test]
fn torn_and_unknown_lines_are_passed_over() {
    let (folder, history) = history();
    history.add(&record("web", "1")).unwrap();
    let path = folder.path().join("history/web.jsonl");
    let append = |bytes: &[u8]| std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(bytes).unwrap();
    append(b"{\"of\":\"a later kiln\"}\n\xff\xfe\n\n{\"bake\":\"to");
    assert_eq!(bakes(&history, "web"), ["1"]);
    history.add(&record("web", "2")).unwrap();
    assert_eq!(bakes(&history, "web"), ["1", "2"]);
    for n in 3..=99 {
        history.add(&record("web", &n.to_string())).unwrap();
    }
    // 102 lines: the shortening takes those that are not whole with it.
    let text = std::fs::read(&path).unwrap();
    assert!(String::from_utf8(text).is_ok());
    assert_eq!(bakes(&history, "web").last().unwrap(), "99");
}

#[test]
fn the_oldest_go_when_there_are_many() {
    let (folder, history) = history();
    for n in 1..=100 {
        history.add(&record("web", &n.to_string())).unwrap();
    }
    assert_eq!(bakes(&history, "web").len(), 100);
    history.add(&record("web", "101")).unwrap();
    let left = bakes(&history, "web");
    assert_eq!((left.len(), left[0].as_str(), left[49].as_str()), (50, "52", "101"));
    history.add(&record("web", "102")).unwrap();
    assert_eq!(bakes(&history, "web").len(), 51);
    let names: Vec<_> = std::fs::read_dir(folder.path().join("history")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn no_name_leads_out_of_the_folder_or_to_that_of_another() {
    let (folder, history) = history();
    let long = format!("{}x", "a/".repeat(127));
    let longer = format!("{}y", "a/".repeat(127));
    let names = ["..", ".", "../x", "/etc/x", "a/b", "a%2Fb", "a", "a.new", ".lock", "\0", "Ä", "", "A", &long, &longer];
    for name in names {
        history.add(&record(name, name)).unwrap();
    }
    for name in names {
        assert_eq!(bakes(&history, name), [name]);
    }
    assert_eq!(std::fs::read_dir(folder.path().join("history")).unwrap().count(), names.len() + 1);
}

#[test]
fn threads_lose_no_record() {
    let (_folder, history) = history();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let history = &history;
            scope.spawn(move || (0..10).for_each(|n| history.add(&record("web", &format!("{thread}-{n}"))).unwrap()));
        }
    });
    assert_eq!(history.records("web").unwrap().len(), 40);
}

//! Channels of a store: exact whatever happens at the same time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail")]

mod common;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::Context;
use kiln_model::channel::{Action, Actor, Chain, ChannelBackend as _, Entry, Identity, Record, Signed, VERSION};
use kiln_model::{Code, Digest, Result};
use kiln_store::{Keep, Store};

/// What comes next: `image`, unless the channel is at it.
fn next(chain: &Chain, image: Digest, from: &str, action: Action) -> Result<Option<Entry>> {
    if chain.head().is_some_and(|head| head.record().image == image) {
        return Ok(None);
    }
    let (seq, previous) = chain.next();
    Entry::new(Record {
        v: VERSION,
        name: "web".into(),
        channel: "production".into(),
        seq,
        previous,
        image,
        from: from.into(),
        action,
        time: "2026-01-02T03:04:05Z".into(),
        actor: Actor { name: "ann".into(), identity: Identity::Unproven },
        reason: Some("it is\nbetter".into()),
        evidence: vec![],
        policy: None,
    })
    .map(Some)
}

fn promote(store: &Store, image: Digest, from: &str) -> Option<Entry> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let appended = runtime.block_on(store.append("web", "production", &|chain: &Chain| next(chain, image, from, Action::Promote)));
    appended.unwrap().map(|appended| appended.entry)
}

fn file(context: &Context) -> PathBuf {
    context.root().join("channels/web/production.jsonl")
}

#[test]
fn a_channel_resolves_to_where_it_is() {
    let context = Context::new();
    let (one, two) = (context.image("web", "1", &[(1, 1)]), context.image("web", "2", &[(1, 2)]));
    let error = context.resolve("web@production").unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (Code::NotFound, "web has no channel `production`"));
    assert_eq!(promote(&context.store, one, "web:1").unwrap().record().seq, 1);
    assert!(promote(&context.store, one, "web:1").is_none(), "it is there already");
    assert_eq!(promote(&context.again(), two, "web:2").unwrap().record().seq, 2);
    assert_eq!(context.resolve("web@production").unwrap(), two);
    let error = context.resolve("web@prod").unwrap_err();
    assert!(error.next_move().unwrap().contains("it has production"), "{:?}", error.next_move());
    assert_eq!(context.store.all_channels().unwrap(), [("web".to_owned(), "production".to_owned())]);
    assert_eq!(context.store.heads().unwrap()[&two], ["web@production"]);
    let chain = context.store.chain("web", "production").unwrap();
    assert_eq!(chain.entries[1].record().previous, Some(chain.entries[0].digest()));
    assert_eq!(std::fs::read_to_string(file(&context)).unwrap().lines().count(), 2, "a line for each record, whatever is in it");

    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(file(&context)).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn tags_and_channels_keep_out_of_each_others_way() {
    let context = Context::new();
    let one = context.image("web", "1", &[(1, 1)]);
    let tag = |to: &str| context.store.tag(&"web:1".parse().unwrap(), &to.parse().unwrap());
    tag("web:production").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let append =
        || runtime.block_on(context.store.append("web", "production", &|chain: &Chain| next(chain, one, "web:1", Action::Promote)));
    let error = append().unwrap_err();
    assert!(error.kind() == Code::Refused && error.to_string().contains("has a tag `production` already"), "{error}");
    context.store.untag(&"web:production".parse().unwrap(), false).unwrap();
    append().unwrap().unwrap();
    for (to, said) in [
        ("web:production", "is a channel of web"),
        ("web:kiln.x", "is kept for"),
        (&format!("web:sha256-{}.sig", one.hex()), "is kept for"),
    ] {
        let error = tag(to).unwrap_err();
        assert!(error.kind() == Code::Usage && error.to_string().contains(said), "{error}");
    }
    tag("db:production").unwrap();
}

#[test]
fn a_line_that_a_crash_cut_short_counts_as_not_written() {
    let context = Context::new();
    let images: Vec<_> = (0..4).map(|seed| context.image("web", &format!("{seed}"), &[(1, seed + 1)])).collect();
    promote(&context.store, images[0], "web:0");
    promote(&context.store, images[1], "web:1");
    let whole = std::fs::read(file(&context)).unwrap();
    let line = whole.split_inclusive(|byte| *byte == b'\n').nth(1).unwrap().to_vec();
    let first = whole.len() - line.len();
    // Wherever the crash came, and with room for what was not written.
    let cuts = (0..line.len() - 1).step_by(37).chain([line.len() - 2]);
    for (cut, zeros) in cuts.flat_map(|cut| [(cut, 0), (cut, 100)]) {
        let mut bytes = whole[..first + cut].to_vec();
        bytes.extend(vec![0; zeros]);
        std::fs::write(file(&context), &bytes).unwrap();
        let chain = context.store.chain("web", "production").unwrap();
        assert_eq!((chain.entries.len(), chain.notes.len()), (1, usize::from(cut + zeros > 0)), "cut at {cut}");
        assert_eq!(context.resolve("web@production").unwrap(), images[0]);
        let entry = promote(&context.store, images[2], "web:2").unwrap();
        assert_eq!((entry.record().seq, entry.record().previous), (2, Some(chain.entries[0].digest())));
        let chain = context.store.chain("web", "production").unwrap();
        assert_eq!((chain.entries.len(), chain.notes.len()), (2, 0));
    }
    // Only the line's end is missing: the record is whole.
    std::fs::write(file(&context), &whole[..whole.len() - 1]).unwrap();
    assert_eq!(context.resolve("web@production").unwrap(), images[1]);
    assert_eq!(promote(&context.store, images[3], "web:3").unwrap().record().seq, 3);
    assert_eq!(context.store.chain("web", "production").unwrap().entries.len(), 3);
}

#[test]
fn every_change_of_what_was_written_is_found() {
    let context = Context::new();
    let images: Vec<_> = (0..3).map(|seed| context.image("web", &format!("{seed}"), &[(1, seed + 1)])).collect();
    for (number, image) in images.iter().enumerate() {
        promote(&context.store, *image, &format!("web:{number}"));
    }
    let whole = std::fs::read(file(&context)).unwrap();
    let lines: Vec<Vec<u8>> = whole.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    let refused = |bytes: &[u8], what: &str| {
        std::fs::write(file(&context), bytes).unwrap();
        let error = context.store.chain("web", "production").expect_err(what);
        assert_eq!(error.kind(), Code::Corrupt, "{what}: {error}");
        assert!(context.resolve("web@production").is_err() && context.store.prune(&Keep::default()).is_err(), "{what}");
    };
    refused(&[lines[0].clone(), lines[2].clone()].concat(), "a record taken out");
    refused(&[lines[1].clone(), lines[2].clone()].concat(), "the first record taken out");
    refused(&[lines[1].clone(), lines[0].clone(), lines[2].clone()].concat(), "two exchanged");
    refused(&[lines[0].clone(), lines[0].clone(), lines[1].clone()].concat(), "one twice");
    refused(&[b"x\n".to_vec(), lines[0].clone()].concat(), "something else");
    // Any byte of a record that has a successor.
    for at in (0..lines[0].len() + lines[1].len() - 1).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] = if bytes[at] == b'7' { b'8' } else { b'7' };
        std::fs::write(file(&context), &bytes).unwrap();
        let read = context.store.chain("web", "production");
        // What is outside the records' text says nothing.
        let same = |chain: &Chain| chain.entries.iter().map(Entry::digest).collect::<Vec<_>>();
        let original = || {
            std::fs::write(file(&context), &whole).unwrap();
            same(&context.store.chain("web", "production").unwrap())
        };
        if let Ok(chain) = read {
            assert_eq!(same(&chain), original(), "byte {at}");
        }
    }
    std::fs::write(file(&context), &whole).unwrap();
    // As the file of another channel.
    std::fs::write(context.root().join("channels/web/staging.jsonl"), &whole).unwrap();
    assert_eq!(context.resolve("web@staging").unwrap_err().kind(), Code::Corrupt);
}

#[test]
fn prune_keeps_what_channels_need() {
    let context = Context::new();
    let images: Vec<_> = (0..6).map(|seed| context.image("web", &format!("{seed}"), &[(1, seed + 1)])).collect();
    for (number, image) in images.iter().enumerate() {
        promote(&context.store, *image, &format!("web:{number}"));
    }
    for number in 0..6 {
        context.store.untag(&format!("web:{number}").parse().unwrap(), false).unwrap();
    }
    let root = context.root();
    let _folder = context.folder;
    drop(context.store);
    let store = Store::open(&root).unwrap();
    assert!(store.prune(&Keep::default()).unwrap().manifests.is_empty(), "ten states are kept unless it is said");
    let mut gone = images[..4].to_vec();
    gone.sort();
    assert_eq!(store.prune(&Keep { history: 2, ..Keep::default() }).unwrap().manifests, gone);
    assert_eq!(store.prune(&Keep { history: 0, ..Keep::default() }).unwrap().manifests, [images[4]], "where it is stays");
    assert_eq!(store.resolve(&"web@production".parse().unwrap()).unwrap(), images[5]);
    assert_eq!(store.chain("web", "production").unwrap().entries.len(), 6, "the history stays, too");
}

#[tokio::test]
async fn a_policy_is_kept_with_its_signature() {
    let context = Context::new();
    assert_eq!(context.store.policy("shop/web", "production").await.unwrap(), None);
    for text in ["one = 1\n", "two = 2\n"] {
        let policy = Signed { text: text.into(), signature: serde_json::json!({ "payload": text }) };
        context.store.set_policy("shop/web", "production", &policy).await.unwrap();
        assert_eq!(context.again().policy("shop/web", "production").await.unwrap(), Some(policy));
    }
    assert!(context.store.all_channels().unwrap().is_empty(), "a policy alone is no channel");
    std::fs::remove_file(context.root().join("channels/shop/web/production.policy.toml.sig")).unwrap();
    assert!(context.store.policy("shop/web", "production").await.unwrap_err().to_string().contains("not signed"));
}

/// Promotes in a process of its own; does nothing when it runs as an ordinary
/// test.
#[test]
fn promoter() {
    let (Some(root), Ok(number)) = (std::env::var_os("KILN_TEST_STORE"), std::env::var("KILN_TEST_NUMBER")) else { return };
    let store = Store::open(root.as_ref()).unwrap();
    let go = PathBuf::from(&root).join("go");
    while !go.exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
    let forever = std::env::var_os("KILN_TEST_FOREVER").is_some();
    for round in 0.. {
        let image = Digest::of(format!("{number} {round}"));
        let entry = promote(&store, image, &format!("web:{number}")).unwrap();
        if !forever {
            assert_eq!(entry.record().image, image);
            return;
        }
        // Whoever is told that it is written may rely on it.
        let mut told =
            std::fs::OpenOptions::new().create(true).append(true).open(PathBuf::from(&root).join(format!("told.{number}"))).unwrap();
        told.write_all(format!("{} {}\n", entry.record().seq, entry.digest()).as_bytes()).unwrap();
    }
}

fn spawn(context: &Context, number: usize, forever: bool) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "promoter"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.env("KILN_TEST_STORE", context.root()).env("KILN_TEST_NUMBER", number.to_string());
    if forever {
        command.env("KILN_TEST_FOREVER", "1");
    }
    command.spawn().unwrap()
}

#[test]
fn sixty_four_processes_make_sixty_four_records_in_a_chain() {
    let context = Context::new();
    let mut promoters: Vec<_> = (0..64).map(|number| spawn(&context, number, false)).collect();
    std::thread::sleep(Duration::from_millis(200));
    std::fs::write(context.root().join("go"), "").unwrap();
    for promoter in &mut promoters {
        assert!(promoter.wait().unwrap().success());
    }
    let chain = context.store.chain("web", "production").unwrap();
    let mut images: Vec<_> = chain.entries.iter().map(|entry| entry.record().image).collect();
    assert_eq!(chain.entries.iter().map(|entry| entry.record().seq).collect::<Vec<_>>(), (1..=64).collect::<Vec<_>>());
    images.sort();
    images.dedup();
    assert_eq!(images.len(), 64, "one record for each");
}

#[test]
fn a_promoter_that_is_killed_leaves_a_chain_with_all_that_it_told() {
    let context = Context::new();
    std::fs::write(context.root().join("go"), "").unwrap();
    for number in 0..10usize {
        let mut promoter = spawn(&context, number, true);
        std::thread::sleep(Duration::from_millis(40 + number as u64 * 23 % 120));
        promoter.kill().unwrap();
        promoter.wait().unwrap();
        let chain = context.store.chain("web", "production").unwrap();
        let told = std::fs::read_to_string(context.root().join(format!("told.{number}"))).unwrap_or_default();
        for line in told.lines() {
            let (seq, digest) = line.split_once(' ').unwrap();
            let entry = &chain.entries[seq.parse::<usize>().unwrap() - 1];
            assert_eq!(entry.digest().to_string(), digest);
        }
    }
    assert!(!context.store.chain("web", "production").unwrap().entries.is_empty());
}

#[test]
fn a_thousand_records_are_read_quickly() {
    let context = Context::new();
    let images: Vec<_> = (0..2).map(|seed| context.image("web", &format!("{seed}"), &[(1, seed + 1)])).collect();
    let mut chain = Chain::default();
    let mut text = String::new();
    for number in 0..1000 {
        let entry = next(&chain, images[number % 2], "web:1", Action::Promote).unwrap().unwrap();
        text.push_str(&serde_json::to_string(&serde_json::json!({ "record": entry.text(), "signature": null })).unwrap());
        text.push('\n');
        chain.entries.push(entry);
    }
    std::fs::create_dir_all(context.root().join("channels/web")).unwrap();
    std::fs::write(file(&context), text).unwrap();
    let since = Instant::now();
    assert_eq!(context.store.chain("web", "production").unwrap().entries.len(), 1000);
    assert_eq!(promote(&context.store, images[0], "web:0").unwrap().record().seq, 1001);
    assert!(since.elapsed() < Duration::from_secs(60), "{:?} without optimisation", since.elapsed());
}

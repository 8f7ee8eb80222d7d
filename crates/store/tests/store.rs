//! Images into the store, names, and out of it again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail")]

mod common;

use common::{Context, publish};
use kiln_model::Code;
use kiln_model::block::{BLOCK, ImageSink as _};
use kiln_model::image::{BLOCK_MAP, IMAGE, PACK};
use kiln_store::{Keep, Store};

#[test]
fn a_disk_goes_in_and_comes_out() {
    let context = Context::new();
    let disk = context.disk(&[(0, 1), (3, 2), (15, 3)], &[]);
    let named = context.publish("web", "1.0.0", &disk);
    let image = context.store.image(&named.digest).unwrap();
    assert_eq!(image.names, ["web:1.0.0", "web"]);
    assert_eq!(image.manifest.artifact_type.as_deref(), Some(IMAGE));
    let kinds: Vec<_> = image.manifest.layers.iter().map(|layer| layer.media_type.as_str()).collect();
    assert_eq!(kinds, [BLOCK_MAP, PACK]);
    assert!(image.created().unwrap().ends_with('Z'));

    let store = context.again();
    let record = store.record(&named.digest).unwrap();
    assert_eq!((record.digest, record.map_digest, &record.map), (disk.digest, disk.map_digest, &disk.map));
    let out = context.folder.path().join("out.raw");
    store.materialise(&record, &out, &mut |_, _| {}).unwrap();
    let bytes = std::fs::read(context.folder.path().join("disk.raw")).unwrap();
    assert_eq!(std::fs::read(&out).unwrap(), bytes);
    assert!(store.materialise(&record, &out, &mut |_, _| {}).is_err(), "an existing file was overwritten");
    let mut source = store.disk_source(&record).unwrap();
    let mut part = vec![0; 100];
    source.read_at(3 * BLOCK + 5, &mut part).unwrap();
    assert_eq!(part, bytes[3 * BLOCK as usize + 5..][..100]);

    use std::os::unix::fs::PermissionsExt as _;
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&context.root().join("index.json")), mode(&context.root().join("blobs"))), (0o600, 0o700));
    assert!(context.blobs().iter().all(|blob| mode(blob) == 0o600));
}

#[test]
fn the_same_content_keeps_its_digest() {
    let context = Context::new();
    let disk = context.disk(&[(1, 1), (2, 2)], &[]);
    let first = context.publish("web", "1", &disk);
    let same = context.disk(&[(1, 1), (2, 2)], std::slice::from_ref(&disk));
    assert!(same.stored < 1000, "{} bytes for nothing new", same.stored);
    let second = publish(&context.again(), "web", "1", &same).unwrap();
    assert_eq!((second.digest, second.existed, second.moved.len()), (first.digest, true, 0));
    // Back and forth: the digest is the first one again.
    let other = context.disk(&[(1, 9)], &[]);
    let moved = context.publish("web", "1", &other);
    assert_eq!(moved.moved[0].to_string(), format!("web:1 was sha256:{}…, now sha256:{}…", first.digest.short(), moved.digest.short()));
    assert_eq!(context.publish("web", "1", &disk).digest, first.digest);
    assert_eq!(context.resolve("web").unwrap(), first.digest);
}

#[test]
fn what_the_predecessor_holds_is_shared() {
    let context = Context::new();
    let base: Vec<_> = (0..10).map(|n| (n, n + 1)).collect();
    let first = context.disk(&base, &[]);
    context.publish("web", "1", &first);
    let parent = context.store.predecessor("web").unwrap().unwrap();
    assert!(context.store.predecessor("nothing").unwrap().is_none());
    let mut changed = base.clone();
    changed[4].1 = 99;
    let second = context.disk(&changed, &[parent]);
    assert!(second.stored < first.stored / 4, "{} of {}", second.stored, first.stored);
    assert_eq!(context.store.base(&second.digest).unwrap().map(|r| r.digest), None);
    context.publish("web", "2", &second);
    assert_eq!(context.store.base(&second.digest).unwrap().unwrap().map, second.map);
}

#[test]
fn names_tags_and_what_is_not_there() {
    let context = Context::new();
    assert!(context.resolve("web").unwrap_err().next_move().unwrap().contains("the store is empty"));
    let one = context.image("web", "1.4.0", &[(1, 1)]);
    let two = context.image("web", "1.5.0", &[(1, 2)]);
    let tag = |from: &str, to: &str| context.store.tag(&from.parse().unwrap(), &to.parse().unwrap());
    assert_eq!(context.resolve("web").unwrap(), two);
    assert_eq!(context.resolve(&format!("web@{one}")).unwrap(), one);
    assert!(tag("web:1.4.0", "web:stable").unwrap().is_none());
    assert!(tag("web:1.5.0", "web:stable").unwrap().is_some());
    assert_eq!(context.resolve("web:stable").unwrap(), two);
    for (reference, message, next) in [
        ("wbe", "no image `wbe` is in the store", "did you mean `web`?"),
        ("web:1.4.1", "web has no version `1.4.1` in the store", "1.4.0"),
        ("web@production", "web has no channel `production`", "web:TAG"),
        ("r.example/web:1", "r.example/web:1 is at a registry, not in the store", "NAME"),
    ] {
        let error = context.resolve(reference).unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (Code::NotFound, message));
        assert!(error.next_move().unwrap().contains(next), "{error:?} {:?}", error.next_move());
    }
    // The bare name goes back to what is left.
    context.store.untag(&"web:stable".parse().unwrap(), false).unwrap();
    assert_eq!(context.resolve("web").unwrap(), two);
    context.store.untag(&"web:1.5.0".parse().unwrap(), false).unwrap();
    assert_eq!(context.resolve("web").unwrap(), one);
    assert_eq!(context.store.image(&two).unwrap().names, Vec::<String>::new());
    context.store.untag(&"web:1.4.0".parse().unwrap(), false).unwrap();
    assert_eq!(context.resolve("web").unwrap_err().kind(), Code::NotFound);
}

#[test]
fn a_fixed_version_never_changes() {
    let context = Context::new();
    let disk = context.disk(&[(1, 1)], &[]);
    let first = context.publish("web", "1", &disk).digest;
    let reference = "web:1".parse().unwrap();
    context.store.fix(&reference, "pushed").unwrap();
    assert_eq!(context.publish("web", "1", &disk).digest, first);
    let other = context.disk(&[(1, 2)], &[]);
    let error = publish(&context.store, "web", "1", &other).unwrap_err();
    assert_eq!(error.kind(), Code::Refused);
    assert!(error.to_string().starts_with("web:1 was pushed as sha256:"), "{error}");
    assert_eq!(context.store.untag(&reference, false).unwrap_err().kind(), Code::Refused);
    assert_eq!(context.resolve("web:1").unwrap(), first);
    assert_eq!(context.store.image(&first).unwrap().fixed["web:1"], "pushed");
    context.store.untag(&reference, true).unwrap();
}

#[test]
fn bases_are_hidden_and_pruned_on_request() {
    let context = Context::new();
    let raw = context.raw(&[(1, 1), (2, 2)]);
    let base = kiln_model::base::Base {
        label: "debian bookworm".into(),
        disk: kiln_model::base::DiskFile { path: raw, format: kiln_model::base::DiskFormat::Raw, size: 16 * BLOCK }.into(),
        firmware: kiln_model::image::Firmware::BiosUefi,
        architecture: "amd64".into(),
        credentials: Some(true),
    };
    let record = context.store.adopt(&base, &base.label, &mut |_, _| {}).unwrap();
    assert_eq!(context.store.images(false).unwrap().images.len(), 0);
    let bases = context.store.images(true).unwrap().images;
    assert!(bases[0].base && bases[0].names[1] == "kiln-base/debian-bookworm");
    assert_eq!(context.store.base(&record.digest).unwrap().unwrap().map, record.map);
    let store = context.root();
    drop(context.store);
    let store = Store::open(&store).unwrap();
    assert_eq!(store.prune(&Keep { bases: true, ..Keep::default() }).unwrap().blobs, 0);
    assert_eq!(store.prune(&Keep::default()).unwrap().blobs, 4);
}

#[test]
fn bad_names_are_refused_before_anything_is_written() {
    let context = Context::new();
    let disk = context.disk(&[(1, 1)], &[]);
    for (name, version) in [("Web", "1"), ("", "1"), ("web", ""), ("web", "a b"), ("../x", "1")] {
        assert_eq!(publish(&context.store, name, version, &disk).unwrap_err().kind(), Code::Usage, "{name}:{version}");
    }
}

#[test]
fn a_thousand_versions_are_listed_quickly() {
    let context = Context::new();
    let disk = context.disk(&[(1, 1)], &[]);
    for version in 0..200 {
        context.publish("web", &format!("1.{version}"), &disk);
    }
    let since = std::time::Instant::now();
    assert_eq!(context.store.images(false).unwrap().images.len(), 200);
    assert!(since.elapsed().as_secs_f64() < 2.0, "{:?}", since.elapsed());
}

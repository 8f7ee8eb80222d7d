//! What is attached to images, and lineages.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail")]

mod common;

use std::collections::BTreeMap;

use common::{Context, config};
use kiln_model::Digest;
use kiln_model::channel::{Actor, Identity};
use kiln_model::image::DiskRecord;
use kiln_store::revoke::{Revocation, descendants, revoked};
use kiln_store::{Artifact, Keep, Layer, Place as _, Publish, Store};

fn artifact(kind: &str, text: &str) -> Artifact {
    Artifact {
        artifact_type: kind.into(),
        layers: vec![Layer::new(kind, text)],
        annotations: BTreeMap::from([("note".to_owned(), text.to_owned())]),
        tag: None,
    }
}

/// Publishes an image that was baked from the disk `base`.
fn child(store: &Store, name: &str, version: &str, disk: &DiskRecord, base: Option<Digest>) -> Digest {
    let config = kiln_model::image::Config { base, ..config(name, version, std::slice::from_ref(disk)) };
    let annotations = BTreeMap::new();
    store.publish_as(&Publish { config: &config, disks: std::slice::from_ref(disk), annotations: &annotations, tags: &[] }).unwrap().digest
}

#[tokio::test]
async fn what_is_attached_is_found_lives_with_its_image_and_is_no_image() {
    let context = Context::new();
    let (one, two) = (context.image("web", "1", &[(1, 1)]), context.image("web", "2", &[(1, 2)]));
    let first = context.store.attach(&one, &artifact("application/spdx+json", "packages")).unwrap();
    assert_eq!(context.store.attach(&one, &artifact("application/spdx+json", "packages")).unwrap(), first, "the same is not there twice");
    let second = context.store.attach(&first, &artifact("application/x-note", "of the packages")).unwrap();
    let other = context.store.attach(&two, &artifact("application/x-note", "of two")).unwrap();

    let attached = context.again().attached(&one).unwrap();
    assert_eq!(attached.len(), 1);
    assert_eq!((attached[0].digest, attached[0].artifact_type.as_str()), (first, "application/spdx+json"));
    assert_eq!(attached[0].annotations, BTreeMap::from([("note".to_owned(), "packages".to_owned())]));
    let whole = kiln_store::place::read_attached(&context.store, &attached[0]).await.unwrap();
    assert_eq!(whole.layers, [Layer::new("application/spdx+json", "packages")]);
    let manifest: serde_json::Value = serde_json::from_slice(&context.store.manifest(&first).await.unwrap()).unwrap();
    assert_eq!(manifest["subject"]["digest"], one.to_string());
    assert_eq!(manifest["config"]["data"], "e30=");

    let listing = context.store.images(true).unwrap();
    assert_eq!((listing.images.len(), listing.damaged.len()), (2, 0));
    assert_eq!(listing.images.iter().find(|image| image.digest == one).unwrap().attached.len(), 1);
    assert!(context.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
    assert!(context.store.attach(&Digest::of("nothing"), &artifact("x", "y")).is_err());

    context.store.untag(&"web:1".parse().unwrap(), false).unwrap();
    drop(context.store);
    let store = Store::open(&context.folder.path().join("store")).unwrap();
    let pruned = store.prune(&Keep::default()).unwrap();
    let mut expected = vec![one, first, second];
    expected.sort();
    assert_eq!(pruned.manifests, expected);
    assert_eq!(store.attached(&two).unwrap()[0].digest, other);
    assert!(store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
}

#[test]
fn signatures_at_a_tag_are_merged() {
    let context = Context::new();
    let image = context.image("web", "1", &[(1, 1)]);
    let tag = format!("sha256-{}.sig", image.hex());
    let sign = |text: &str| {
        let layer = Layer::new("application/vnd.dev.cosign.simplesigning.v1+json", text);
        let artifact = Artifact { artifact_type: String::new(), layers: vec![layer], annotations: BTreeMap::new(), tag: Some(tag.clone()) };
        context.store.attach(&image, &artifact).unwrap()
    };
    sign("one");
    let both = sign("two");
    assert_eq!(sign("one"), both, "a signature that is there is not added again");
    let attached = context.store.attached(&image).unwrap();
    assert_eq!(attached.len(), 1, "{attached:?}");
    assert_eq!((attached[0].digest, attached[0].tag.as_deref()), (both, Some(tag.as_str())));
    assert_eq!(attached[0].artifact_type, "application/vnd.dev.cosign.simplesigning.v1+json");
    let manifest: serde_json::Value = serde_json::from_slice(&context.store.read_blob(&both, 1 << 20).unwrap()).unwrap();
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 2);
    assert_eq!(manifest["subject"], serde_json::Value::Null);
    assert_eq!(manifest["config"]["mediaType"], "application/vnd.oci.image.config.v1+json");
}

#[test]
fn many_who_attach_at_once_lose_nothing() {
    let context = Context::new();
    let image = context.image("web", "1", &[(1, 1)]);
    let tag = format!("sha256-{}.sig", image.hex());
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (store, tag) = (context.again(), tag.clone());
            scope.spawn(move || {
                store.attach(&image, &artifact("application/x-note", &format!("note {number}"))).unwrap();
                let layer = Layer::new("application/vnd.dev.cosign.simplesigning.v1+json", format!("signature {number}"));
                let artifact = Artifact { artifact_type: String::new(), layers: vec![layer], annotations: BTreeMap::new(), tag: Some(tag) };
                store.attach(&image, &artifact).unwrap();
            });
        }
    });
    let attached = context.store.attached(&image).unwrap();
    assert_eq!(attached.len(), 9);
    let signatures = attached.iter().find(|attached| attached.tag.is_some()).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&context.store.read_blob(&signatures.digest, 1 << 20).unwrap()).unwrap();
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 8);
}

#[test]
fn damage_of_what_is_attached_names_the_image() {
    let context = Context::new();
    let image = context.image("web", "1", &[(1, 1)]);
    context.store.attach(&image, &artifact("application/spdx+json", "packages")).unwrap();
    let path = context.store.blob_path(&Digest::of("packages"));
    std::fs::write(path, "packaged").unwrap();
    let report = context.store.verify(&mut |_, _| {}).unwrap();
    assert_eq!(report.damaged.len(), 1);
    assert_eq!(report.damaged[0].images, ["application/spdx+json of web:1"]);
}

#[tokio::test]
async fn a_revocation_holds_for_descendants() {
    let context = Context::new();
    let disks: Vec<_> = (0..4).map(|seed| context.disk(&[(1, seed + 1)], &[])).collect();
    let base = child(&context.store, "debian", "12", &disks[0], None);
    let middle = child(&context.store, "web-base", "1", &disks[1], Some(disks[0].digest));
    let last = child(&context.store, "web", "1", &disks[2], Some(disks[1].digest));
    let other = child(&context.store, "db", "1", &disks[3], None);
    for image in [base, middle, last, other] {
        assert!(revoked(&context.store, &image).await.unwrap().is_none());
    }
    let all = kiln_store::Place::images(&context.store).await.unwrap();
    let found: Vec<Digest> = descendants(&[disks[0].digest], &all).iter().map(|image| image.digest).collect();
    assert_eq!(found, [middle, last]);

    let revocation = Revocation {
        v: 1,
        image: base,
        disk: Some(disks[0].digest),
        why: "CVE-2026-1".into(),
        time: "2026-01-02T03:04:05Z".into(),
        actor: Actor { name: "ann".into(), identity: Identity::Unproven },
        because: None,
    };
    context.store.attach(&base, &revocation.artifact(None).unwrap()).unwrap();
    for image in [base, middle, last] {
        let why = revoked(&context.store, &image).await.unwrap().unwrap();
        assert_eq!((why.image, why.why.as_str(), why.revocation.as_ref()), (base, "CVE-2026-1", Some(&revocation)));
        let error = why.refuse("web:1", &image);
        assert_eq!(error.kind(), kiln_model::Code::Refused);
        assert!(error.next_move().unwrap().contains("--allow-revoked"));
    }
    assert!(revoked(&context.store, &other).await.unwrap().is_none());
    assert!(context.store.image(&base).unwrap().is_revoked());
    assert_eq!(context.store.revoked_images().unwrap().into_iter().collect::<Vec<_>>(), [base]);

    // Without a name of its own, it stays as long as what was baked from it.
    for name in ["debian:12", "web-base:1"] {
        context.store.untag(&name.parse().unwrap(), false).unwrap();
    }
    let root = context.root();
    let folder = context.folder;
    drop(context.store);
    let store = Store::open(&root).unwrap();
    assert!(store.prune(&Keep::default()).unwrap().manifests.is_empty());
    assert!(revoked(&store, &last).await.unwrap().is_some());
    store.untag(&"web:1".parse().unwrap(), false).unwrap();
    assert_eq!(store.prune(&Keep::default()).unwrap().manifests.len(), 4);
    // One that cannot be read still counts.
    let again = store.attach(&other, &Artifact { layers: vec![Layer::new("x", "{")], ..revocation.artifact(None).unwrap() });
    again.unwrap();
    assert!(revoked(&store, &other).await.unwrap().unwrap().why.contains("cannot be read"));
    drop(folder);
}

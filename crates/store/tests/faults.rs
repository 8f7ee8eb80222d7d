//! Damage, crashes, and others at work in the same store.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail")]

mod common;

use std::sync::Barrier;

use common::{Context, publish};
use kiln_disk::raw::RawSource;
use kiln_model::Code;
use kiln_model::block::{BLOCK, BlockSource, Extent, ImageSink as _};
use kiln_store::{Keep, Store};

#[test]
fn every_flipped_byte_is_found_and_named() {
    flipped(12);
}

#[test]
#[ignore = "takes long; ci/prove runs it"]
fn a_thousand_flipped_bytes_are_found_and_named() {
    flipped(150);
}

/// Changes so many places of every blob, one at a time.
fn flipped(places: usize) {
    let context = Context::new();
    context.image("web", "1", &[(1, 1), (2, 2)]);
    context.image("db", "1", &[(1, 7)]);
    for path in context.blobs() {
        let good = std::fs::read(&path).unwrap();
        let name = format!("sha256:{}", path.file_name().unwrap().to_str().unwrap());
        for n in 0..places {
            let at = n * (good.len() - 1) / (places - 1);
            let mut bad = good.clone();
            bad[at] ^= 1 << (n % 8);
            std::fs::write(&path, &bad).unwrap();
            let report = context.store.verify(&mut |_, _| {}).unwrap();
            let damage = report.damaged.iter().find(|d| d.blob.to_string() == name);
            let damage = damage.unwrap_or_else(|| panic!("byte {at} of {name}"));
            assert_eq!(damage.error.kind(), Code::Corrupt);
            assert!(damage.images.iter().any(|image| image.contains(":1")), "{:?}", damage.images);
        }
        std::fs::remove_file(&path).unwrap();
        assert!(context.store.verify(&mut |_, _| {}).unwrap().damaged.iter().any(|d| d.blob.to_string() == name));
        std::fs::write(&path, &good).unwrap();
    }
    let report = context.store.verify(&mut |_, _| {}).unwrap();
    assert!(report.damaged.is_empty() && report.blocks == 3, "{:?}", report.damaged);
}

#[test]
fn damage_is_an_error_when_it_is_read_and_heals_when_it_is_stored_again() {
    let context = Context::new();
    let disk = context.disk(&[(1, 1), (2, 2)], &[]);
    let digest = context.publish("web", "1", &disk).digest;
    let pack = context.store.blob_path(&disk.map.packs[0].digest);
    let mut bytes = std::fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&pack, &bytes).unwrap();
    let out = context.folder.path().join("out");
    let record = context.store.record(&digest).unwrap();
    let error = context.store.materialise(&record, &out, &mut |_, _| {}).unwrap_err();
    assert_eq!(error.kind(), Code::Corrupt);
    assert!(error.chain().contains(&disk.map.packs[0].digest.to_string()), "{error:?}");
    assert!(!out.exists());
    std::fs::write(&pack, &bytes[..middle]).unwrap();
    assert_eq!(context.store.record(&digest).unwrap_err().kind(), Code::Corrupt);
    context.disk(&[(1, 1), (2, 2)], std::slice::from_ref(&disk));
    assert!(context.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
}

#[test]
fn a_damaged_index_or_layout_is_an_error_and_nothing_is_removed() {
    let context = Context::new();
    let digest = context.image("web", "1", &[(1, 1)]);
    let index = context.root().join("index.json");
    let good = std::fs::read(&index).unwrap();
    let blobs = context.blobs();
    for cut in 0..good.len() {
        std::fs::write(&index, &good[..cut]).unwrap();
        assert_eq!(context.resolve("web").unwrap_err().kind(), Code::Corrupt);
        if cut % 40 == 0 {
            assert_eq!(context.store.prune(&Keep::default()).unwrap_err().kind(), Code::Corrupt);
            assert_eq!(context.store.images(true).unwrap_err().kind(), Code::Corrupt);
            assert_eq!(context.store.verify(&mut |_, _| {}).unwrap_err().kind(), Code::Corrupt);
        }
    }
    std::fs::write(&index, &good).unwrap();
    // A manifest that cannot be read: what it needs is not known.
    let manifest = context.store.blob_path(&digest);
    std::fs::write(&manifest, "{}").unwrap();
    assert_eq!(context.store.prune(&Keep::default()).unwrap_err().kind(), Code::Corrupt);
    assert_eq!(context.store.images(true).unwrap().damaged[0].0, digest);
    assert_eq!(context.blobs(), blobs);
    std::fs::write(context.root().join("oci-layout"), "{\"imageLayoutVersion\":\"9\"}").unwrap();
    assert_eq!(Store::open(&context.root()).unwrap_err().kind(), Code::Corrupt);
}

#[test]
fn a_source_that_fails_leaves_nothing_to_be_seen() {
    struct Bad(RawSource);
    impl BlockSource for Bad {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn extents(&mut self) -> kiln_model::Result<Vec<Extent>> {
            self.0.extents()
        }
        fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> kiln_model::Result<()> {
            if offset >= 5 * BLOCK { Err(kiln_model::Error::new(Code::Base, "bad sector")) } else { self.0.read_at(offset, buffer) }
        }
    }
    let context = Context::new();
    let path = context.raw(&[(1, 1), (2, 2), (5, 5)]);
    let error = context.store.write_disk("root", &mut Bad(RawSource::open(&path).unwrap()), None, &[], &mut |_, _| {}).unwrap_err();
    assert_eq!(error.kind(), Code::Base);
    assert!(context.blobs().is_empty());
    assert_eq!(std::fs::read_dir(context.root().join(".kiln/tmp")).unwrap().count(), 0);
}

#[test]
fn what_dead_writers_left_goes_and_what_the_living_hold_stays() {
    let context = Context::new();
    let kept = context.image("web", "1", &[(1, 1)]);
    // As after `kill -9`: a lease nobody locks, a half pack, a blob without a name.
    let kiln = context.root().join(".kiln");
    std::fs::write(kiln.join("leases/1-2-3"), "sha256:00\n").unwrap();
    std::fs::write(kiln.join("tmp/1-2-3.0"), "half a pack").unwrap();
    std::fs::create_dir(kiln.join("tmp/1-2-3.1")).unwrap();
    let orphan = context.root().join("blobs/sha256").join(kiln_model::Digest::of("orphan").hex());
    std::fs::write(&orphan, "orphan").unwrap();
    // A bake that has stored a disk and not published it.
    let writer = context.again();
    let path = context.raw(&[(1, 50), (2, 51)]);
    let disk = writer.write_disk("root", &mut RawSource::open(&path).unwrap(), None, &[], &mut |_, _| {}).unwrap();

    let dry = context.store.prune(&Keep { dry_run: true, ..Keep::default() }).unwrap();
    assert!(orphan.exists() && dry.blobs == 1, "{dry:?}");
    context.store.prune(&Keep::default()).unwrap();
    assert!(!orphan.exists() && !kiln.join("leases/1-2-3").exists());
    assert!(!kiln.join("tmp/1-2-3.0").exists() && !kiln.join("tmp/1-2-3.1").exists());
    publish(&writer, "db", "1", &disk).unwrap();
    assert!(context.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());

    // The same again, but the bake gives up.
    let path = context.raw(&[(1, 60)]);
    let lost = writer.write_disk("root", &mut RawSource::open(&path).unwrap(), None, &[], &mut |_, _| {}).unwrap();
    drop(writer);
    context.store.prune(&Keep::default()).unwrap();
    assert!(!context.store.blob_path(&lost.map_digest).exists());
    assert_eq!(context.resolve("web").unwrap(), kept);
}

#[test]
fn a_nameless_image_goes_with_prune_unless_it_is_in_use() {
    let context = Context::new();
    let old = context.image("web", "1", &[(1, 1)]);
    context.image("web", "1", &[(1, 2)]);
    let root = context.root();
    drop(context.store);
    let (store, user) = (Store::open(&root).unwrap(), Store::open(&root).unwrap());
    let record = user.record(&old).unwrap();
    let pruned = store.prune(&Keep::default()).unwrap();
    assert_eq!(pruned.manifests, [old]);
    assert!(store.blob_path(&record.map.packs[0].digest).exists(), "a pack in use was removed");
    drop(user);
    assert!(store.prune(&Keep::default()).unwrap().blobs >= 1);
    assert!(!store.blob_path(&record.map.packs[0].digest).exists());
    assert!(store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
}

#[test]
fn many_publish_and_prune_at_once() {
    let context = Context::new();
    let barrier = Barrier::new(9);
    std::thread::scope(|scope| {
        for n in 0..8u64 {
            let (context, barrier) = (&context, &barrier);
            scope.spawn(move || {
                let store = context.again();
                let path = context.folder.path().join(format!("{n}.raw"));
                barrier.wait();
                for round in 0..4 {
                    common::raw(&path, 8 * BLOCK, &[(1, n * 100 + round), (2, 7)]);
                    let disk = store.write_disk("root", &mut RawSource::open(&path).unwrap(), None, &[], &mut |_, _| {}).unwrap();
                    publish(&store, "web", &format!("{n}.{round}"), &disk).unwrap();
                    publish(&store, &format!("own-{n}"), "1", &disk).unwrap();
                }
            });
        }
        barrier.wait();
        for _ in 0..20 {
            context.store.prune(&Keep::default()).unwrap();
        }
    });
    let images = context.store.images(false).unwrap();
    assert!(images.damaged.is_empty());
    assert_eq!(images.images.iter().flat_map(|image| &image.names).filter(|name| name.starts_with("web:")).count(), 32);
    assert!(context.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
}

#[test]
fn attached_artifacts_live_as_long_as_what_they_are_attached_to() {
    let context = Context::new();
    let subject = context.image("web", "1", &[(1, 1)]);
    let empty = context.store.write_blob(b"{}").unwrap();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": "application/example",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": empty, "size": 2}, "layers": [],
        "subject": {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": subject, "size": 1},
    });
    let manifest = context.store.write_blob(manifest.to_string().as_bytes()).unwrap();
    let index = context.root().join("index.json");
    let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    let size = std::fs::metadata(context.store.blob_path(&manifest)).unwrap().len();
    let entry = serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": size});
    value["manifests"].as_array_mut().unwrap().push(entry);
    std::fs::write(&index, value.to_string()).unwrap();
    let root = context.root();
    drop(context.store);
    let store = Store::open(&root).unwrap();
    assert_eq!(store.prune(&Keep::default()).unwrap().blobs, 0);
    assert_eq!(store.images(true).unwrap().images.len(), 1);
    store.untag(&"web:1".parse().unwrap(), false).unwrap();
    assert_eq!(store.prune(&Keep::default()).unwrap().blobs, 6);
}

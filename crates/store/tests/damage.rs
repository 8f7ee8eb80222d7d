//! Bytes that changed on their way to a registry, in it, or on their way back:
//! none goes unnoticed, and each is named.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail")]

mod common;
mod net;

use std::path::PathBuf;

use common::Context;
use kiln_model::base::DiskFormat;
use kiln_model::block::BLOCK;
use kiln_model::event::Reports;
use kiln_model::{Code, Digest};
use kiln_registry::Repository;
use kiln_store::transfer::{self, Fetch, Names, Remote};
use kiln_testing::{Fault, On};
use net::{Net, blocks, disk, fetch, known, pull, push, write};

/// Every blob that an image needs, as the registry has it.
async fn stored(net: &Net, image: &Remote, repository: &Repository) -> Vec<PathBuf> {
    let manifest = repository.manifest(&image.digest().to_string()).await.unwrap().unwrap();
    let value: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap();
    let layers = value["layers"].as_array().unwrap().iter().chain([&value["config"]]);
    let mut all: Vec<Digest> = layers.map(|blob| blob["digest"].as_str().unwrap().parse().unwrap()).collect();
    all.push(image.digest());
    all.iter().map(|digest| net.registry.blob(&digest.hex())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_flipped_byte_at_the_registry_is_found_and_named() {
    flipped_at_rest(25).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes; ci/prove runs it"]
async fn a_thousand_flipped_bytes_at_the_registry_are_found_and_named() {
    flipped_at_rest(250).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_flipped_byte_on_the_way_is_found_and_named() {
    flipped_on_the_way(5).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes; ci/prove runs it"]
async fn a_thousand_flipped_bytes_on_the_way_are_found_and_named() {
    flipped_on_the_way(250).await;
}

/// Changes so many places of every blob and of the manifest whenever the
/// registry sends them, one place at a time.
async fn flipped_on_the_way(places: usize) {
    let (net, context) = (Net::new(), Context::new());
    let one = context.image("web", "1", &[(1, 1), (2, 2), (9, 3)]);
    let repository = net.repository("web");
    push(&context, &one, &repository, "1").await.unwrap();
    let image = Remote::open(&repository, &one).await.unwrap();
    for path in stored(&net, &image, &repository).await {
        let length = std::fs::metadata(&path).unwrap().len();
        let name = path.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        for n in 0..places {
            let at = n as u64 * (length - 1) / (places as u64 - 1);
            net.proxy.fault(On::method("GET").path(&name).always(), Fault::FlipAnswer(at));
            let reader = Context::new();
            let tried = async {
                let image = Remote::open(&repository, &one).await?;
                transfer::pull(&image, &reader.store, &Names::Version, &known(&reader), &Reports::silent()).await
            };
            let error = tried.await.expect_err(&format!("byte {at} of {name}"));
            assert!(matches!(error.kind(), Code::DigestMismatch | Code::Corrupt), "byte {at} of {name}: {error:?}");
            assert!(error.chain().contains(&name), "byte {at} of {name}: {error:?}");
            assert!(reader.store.images(true).unwrap().images.is_empty());
            net.proxy.heal();
        }
    }
    pull(&Context::new(), &repository, "1").await.unwrap();
}

/// Changes so many places of every blob and of the manifest where the registry
/// keeps them, one at a time.
async fn flipped_at_rest(places: usize) {
    let (net, context) = (Net::new(), Context::new());
    let one = context.image("web", "1", &[(1, 1), (2, 2), (9, 3)]);
    let repository = net.repository("web");
    push(&context, &one, &repository, "1").await.unwrap();
    let image = Remote::open(&repository, &one).await.unwrap();
    let digest = Names::Version;
    for path in stored(&net, &image, &repository).await {
        let good = std::fs::read(&path).unwrap();
        let name = path.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        for n in 0..places {
            let at = n * (good.len() - 1) / (places - 1);
            let mut bad = good.clone();
            bad[at] ^= 1 << (n % 8);
            std::fs::write(&path, &bad).unwrap();
            let reader = Context::new();
            let tried = async {
                let image = Remote::open(&repository, &one).await?;
                transfer::pull(&image, &reader.store, &digest, &known(&reader), &Reports::silent()).await
            };
            let error = tried.await.expect_err(&format!("byte {at} of {name}"));
            // A manifest that it cannot read, docker-registry answers with 500.
            let kinds = [Code::DigestMismatch, Code::Corrupt, Code::Failed, Code::Infrastructure];
            assert!(kinds.contains(&error.kind()), "{error:?}");
            assert!(error.chain().contains(&name), "byte {at} of {name}: {error:?}");
            assert!(reader.store.images(true).unwrap().images.is_empty());
            let to = reader.folder.path().join("disk");
            let reports = Reports::silent();
            let tried = async {
                let image = Remote::open(&repository, &one).await?;
                transfer::fetch(&Fetch { image: &image, store: None, to: &to, format: DiskFormat::Raw, replace: false, reports: &reports })
                    .await
            };
            let error = tried.await.expect_err(&format!("byte {at} of {name}"));
            assert!(error.chain().contains(&name) && !to.exists(), "byte {at} of {name}: {error:?}");
        }
        std::fs::write(&path, &good).unwrap();
    }
    pull(&Context::new(), &repository, "1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_here_is_named_when_it_is_sent() {
    let (net, context) = (Net::new(), Context::new());
    let one = context.image("web", "1", &[(1, 1), (2, 2), (9, 3)]);
    for path in context.blobs() {
        let good = std::fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        for n in 0..4 {
            // One that has nothing yet: what is there is not sent.
            let repository = net.repository(&format!("r{n}/{name}"));
            let at = n * (good.len() - 1) / 3;
            let mut bad = good.clone();
            bad[at] ^= 1 << n;
            std::fs::write(&path, &bad).unwrap();
            let error = push(&context, &one, &repository, "1").await.expect_err(&format!("byte {at} of {name}"));
            assert_eq!(error.kind(), Code::Corrupt, "{error:?}");
            assert!(error.chain().contains(&name), "{error:?}");
            assert_eq!(repository.resolve("1").await.unwrap(), None);
        }
        std::fs::write(&path, &good).unwrap();
    }
    push(&context, &one, &net.repository("web"), "1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_flipped_on_the_way_is_asked_for_again_and_named_when_it_stays() {
    let (net, context) = (Net::new(), Context::new());
    let record = write(&context.store, &disk(context.folder.path(), 30 * BLOCK, &blocks(30)), &[]);
    let one = context.publish("web", "1", &record).digest;
    let repository = net.repository("web");
    net.proxy.fault(On::method("PATCH"), Fault::FlipRequest(70_000));
    push(&context, &one, &repository, "1").await.unwrap();
    net.proxy.heal();
    let pack = record.map.packs[0].digest.to_string();
    for place in [0, 1000, 300_000] {
        net.proxy.fault(On::method("GET").path(&pack), Fault::FlipAnswer(place));
        let reader = Context::new();
        pull(&reader, &repository, "1").await.unwrap();
        assert!(reader.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
        net.proxy.heal();
        net.proxy.fault(On::method("GET").path(&pack), Fault::FlipAnswer(place));
        let to = reader.folder.path().join("disk");
        let empty = Context::new();
        fetch(&empty, &repository, "1", &to, DiskFormat::Raw).await.unwrap();
        assert_eq!(Digest::of(std::fs::read(&to).unwrap()), Digest::of(std::fs::read(context.folder.path().join("large.raw")).unwrap()));
        net.proxy.heal();
        net.proxy.fault(On::method("GET").path(&pack).always(), Fault::FlipAnswer(place));
        for error in [
            pull(&Context::new(), &repository, "1").await.unwrap_err(),
            fetch(&empty, &repository, "1", &reader.folder.path().join("other"), DiskFormat::Raw).await.unwrap_err(),
        ] {
            assert!(matches!(error.kind(), Code::DigestMismatch | Code::Corrupt), "{error:?}");
            assert!(error.chain().contains(&pack), "{error:?}");
        }
        net.proxy.heal();
    }
}

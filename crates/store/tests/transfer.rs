//! Images to a real registry and back, between registries, and into files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail")]

mod common;
mod net;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::Context;
use kiln_model::base::DiskFormat;
use kiln_model::block::BLOCK;
use kiln_model::event::Reports;
use kiln_model::{Code, Digest};
use kiln_store::transfer::{self, Fetch, Known, Names, Remote, Sending, Source};
use kiln_store::{Keep, Store};
use kiln_testing::{Fault, On, Registry};
use net::{Net, blocks, client, disk, fetch, known, pull, push, run, write};

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_image_moves_what_changed() {
    let (net, context) = (Net::new(), Context::new());
    let mut all = blocks(80);
    let raw = disk(context.folder.path(), 80 * BLOCK + 1000, &all);
    let first = write(&context.store, &raw, &[]);
    let one = context.publish("web", "1", &first).digest;
    let repository = net.repository("shop/web");
    let sent = push(&context, &one, &repository, "1").await.unwrap();
    assert_eq!((sent.digest, sent.skipped, sent.mounted, sent.existed, sent.moved_from), (one, 0, 0, false, None));
    let whole = net.proxy.total().sent;
    assert!(sent.bytes_sent <= whole && sent.bytes_sent > 10 << 20, "{sent:?} {whole}");

    all[3].1 = 999;
    let raw = disk(context.folder.path(), 80 * BLOCK + 1000, &all);
    let second = write(&context.store, &raw, std::slice::from_ref(&first));
    let two = context.publish("web", "2", &second).digest;
    net.proxy.forget();
    let sent = push(&context, &two, &repository, "2").await.unwrap();
    let more = net.proxy.total().sent;
    assert!(more * 20 < whole, "{more} of {whole}: {sent:?}");
    net.proxy.forget();
    let again = push(&context, &two, &repository, "2").await.unwrap();
    assert!(again.existed && again.sent == 0 && net.proxy.total().sent == 0, "{again:?}");

    // To another repository of the same host nothing is sent.
    net.proxy.forget();
    let other = net.repository("shop/other");
    let sent = push(&context, &two, &other, "2").await.unwrap();
    assert_eq!((sent.sent, sent.mounted), (0, second.map.packs.len() + 2), "{sent:?}");
    assert_eq!(other.resolve("2").await.unwrap(), Some(two));

    // Somebody who has the first fetches what changed.
    let reader = Context::new();
    net.proxy.forget();
    let pulled = pull(&reader, &repository, "1").await.unwrap();
    assert_eq!((pulled.digest, pulled.skipped), (one, 0));
    let full = net.proxy.total().received;
    net.proxy.forget();
    let pulled = pull(&reader, &repository, "2").await.unwrap();
    let more = net.proxy.total().received;
    assert!(more * 10 < full, "{more} of {full}: {pulled:?}");
    assert_eq!(reader.resolve("web:2").unwrap(), two);
    assert_eq!(reader.resolve("web").unwrap(), one, "the bare name was free");
    assert_eq!(reader.store.image(&two).unwrap().fixed["web:2"], "pushed");
    assert!(reader.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
    let out = reader.folder.path().join("out.raw");
    reader.store.materialise(&reader.store.record(&two).unwrap(), &out, &mut |_, _| {}).unwrap();
    assert_eq!(Digest::of(std::fs::read(&out).unwrap()), Digest::of(std::fs::read(&raw).unwrap()));
    // Everything is there: nothing but manifest, config and map comes.
    let again = pull(&reader, &repository, "2").await.unwrap();
    assert_eq!((again.fetched, again.skipped), (0, second.map.packs.len()));
    assert_eq!(reader.store.prune(&Keep::default()).unwrap().blobs, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_is_put_together_from_blocks_that_are_there() {
    let (net, context) = (Net::new(), Context::new());
    let all = blocks(80);
    let first = write(&context.store, &disk(context.folder.path(), 80 * BLOCK, &all), &[]);
    let one = context.publish("web", "1", &first).digest;
    let repository = net.repository("web");
    push(&context, &one, &repository, "1").await.unwrap();

    // Another machine has baked nearly the same, in packs of its own.
    let reader = Context::new();
    let mut other = all.clone();
    (other[2].1, other[30].1) = (500, 501);
    let own = write(&reader.store, &disk(reader.folder.path(), 80 * BLOCK, &other), &[]);
    reader.publish("mine", "1", &own);
    net.proxy.forget();
    let pulled = pull(&reader, &repository, "1").await.unwrap();
    let came = net.proxy.total().received;
    assert!(pulled.bytes_reused > 9 << 20 && came < 2 << 20, "{pulled:?}, {came} came");
    assert!(reader.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());

    // What is damaged here is fetched whole.
    let reader = Context::new();
    let own = write(&reader.store, &disk(reader.folder.path(), 80 * BLOCK, &other), &[]);
    reader.publish("mine", "1", &own);
    let pack = reader.store.blob_path(&own.map.packs[0].digest);
    let mut bytes = std::fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    pull(&reader, &repository, "1").await.unwrap();
    let damaged = reader.store.verify(&mut |_, _| {}).unwrap().damaged;
    assert!(damaged.iter().all(|damage| damage.images.iter().all(|image| image.starts_with("mine"))), "{damaged:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn straight_into_files() {
    let (net, context) = (Net::new(), Context::new());
    let size = 81 * BLOCK + 70_000;
    let raw = disk(context.folder.path(), size, &blocks(82));
    let record = write(&context.store, &raw, &[]);
    let one = context.publish("web", "1", &record).digest;
    let repository = net.repository("web");
    push(&context, &one, &repository, "1").await.unwrap();
    let expected = Digest::of(std::fs::read(&raw).unwrap());

    let reader = Context::new();
    let (to, qcow2) = (reader.folder.path().join("disk.raw"), reader.folder.path().join("disk.qcow2"));
    let written = fetch(&reader, &repository, "1", &to, DiskFormat::Raw).await.unwrap();
    assert_eq!((written.disk_digest, written.bytes_local, written.bytes_resumed), (record.digest, 0, 0));
    assert_eq!(Digest::of(std::fs::read(&to).unwrap()), expected);
    use std::os::unix::fs::MetadataExt as _;
    assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < size - 10 * BLOCK, "zeros became no holes");
    assert_eq!(fetch(&reader, &repository, "1", &to, DiskFormat::Raw).await.unwrap_err().kind(), Code::Usage);
    assert_eq!(reader.blobs().len(), 0, "something was stored");

    fetch(&reader, &repository, "1", &qcow2, DiskFormat::Qcow2).await.unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    run("qemu-img", &["check", "-f", "qcow2", &text(&qcow2)]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &text(&qcow2), &text(&to)]);

    // Blocks that another image of the store has are not fetched.
    let mut other = blocks(82);
    other[5].1 = 700;
    let own = write(&reader.store, &disk(reader.folder.path(), size, &other), &[]);
    reader.publish("mine", "1", &own);
    let third = reader.folder.path().join("third.raw");
    net.proxy.forget();
    let written = fetch(&reader, &repository, "1", &third, DiskFormat::Raw).await.unwrap();
    assert!(net.proxy.total().received < 2 << 20 && written.bytes_local > 50 * BLOCK, "{written:?}");
    assert_eq!(Digest::of(std::fs::read(&third).unwrap()), expected);
    // Of a damaged store what is damaged is fetched.
    let pack = reader.store.blob_path(&own.map.packs[0].digest);
    let mut bytes = std::fs::read(&pack).unwrap();
    for place in [100, bytes.len() / 3, bytes.len() / 2] {
        bytes[place] ^= 16;
    }
    std::fs::write(&pack, bytes).unwrap();
    let fourth = reader.folder.path().join("fourth.raw");
    fetch(&reader, &repository, "1", &fourth, DiskFormat::Raw).await.unwrap();
    assert_eq!(Digest::of(std::fs::read(&fourth).unwrap()), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_file_goes_on_with_what_is_right_in_it() {
    let (net, context) = (Net::new(), Context::new());
    let size = 120 * BLOCK;
    let raw = disk(context.folder.path(), size, &blocks(120));
    let record = write(&context.store, &raw, &[]);
    let one = context.publish("web", "1", &record).digest;
    let repository = net.repository("web");
    push(&context, &one, &repository, "1").await.unwrap();
    let expected = Digest::of(std::fs::read(&raw).unwrap());
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let reader = Context::new();
        let to = reader.folder.path().join("disk");
        let digest = repository.resolve("1").await.unwrap().unwrap();
        let image = Remote::open(&repository, &digest).await.unwrap();
        let reports = Reports::silent();
        let wanted = Fetch { image: &image, store: None, to: &to, format, replace: false, reports: &reports };
        // Two requests are under way: whichever fails first has brought something.
        net.proxy.fault(On::method("GET").path("/blobs/").times(2), Fault::CutAnswer(5 << 20));
        net.proxy.fault(On::method("GET").path("/blobs/").always(), Fault::Reset);
        let error = transfer::fetch(&wanted).await.unwrap_err();
        assert_eq!(error.kind(), Code::Infrastructure, "{error:?}");
        assert!(!to.exists());
        net.proxy.heal();
        // Rubbish where a block and where zeros should be.
        let part = reader.folder.path().join(".disk.kiln-part");
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::File::options().write(true).open(&part).unwrap();
        file.write_all_at(b"rubbish", if format == DiskFormat::Raw { 4 * BLOCK + 17 } else { 3 << 20 }).unwrap();
        file.write_all_at(b"more of it", 6 << 20).unwrap();
        net.proxy.forget();
        let written = transfer::fetch(&wanted).await.unwrap();
        assert!(written.bytes_resumed >= 4 << 20, "{written:?}");
        assert!(written.bytes_fetched < written.bytes_used / 2, "{written:?}");
        assert!(!part.exists());
        let flat = reader.folder.path().join("flat");
        if format == DiskFormat::Qcow2 {
            run("qemu-img", &["check", "-f", "qcow2", to.to_str().unwrap()]);
            run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", to.to_str().unwrap(), flat.to_str().unwrap()]);
        } else {
            std::fs::rename(&to, &flat).unwrap();
        }
        assert_eq!(Digest::of(std::fs::read(&flat).unwrap()), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_pull_goes_on() {
    let (net, context) = (Net::new(), Context::new());
    let record = write(&context.store, &disk(context.folder.path(), 120 * BLOCK, &blocks(120)), &[]);
    let one = context.publish("web", "1", &record).digest;
    let repository = net.repository("web");
    push(&context, &one, &repository, "1").await.unwrap();
    let reader = Context::new();
    let pack = record.map.packs[0].digest.to_string();
    net.proxy.fault(On::method("GET").path(&pack).times(1), Fault::CutAnswer(5 << 20));
    net.proxy.fault(On::method("GET").path(&pack).always(), Fault::Reset);
    let error = pull(&reader, &repository, "1").await.unwrap_err();
    assert_eq!(error.kind(), Code::Infrastructure, "{error:?}");
    assert!(reader.store.images(true).unwrap().images.is_empty(), "something is to be seen");
    net.proxy.heal();
    // A restart of the program, and a prune, in between.
    let root = reader.root();
    drop(reader.store);
    let reader = Context { store: Store::open(&root).unwrap(), folder: reader.folder };
    reader.store.prune(&Keep::default()).unwrap();
    let pulled = pull(&reader, &repository, "1").await.unwrap();
    assert!(pulled.bytes_resumed > 4 << 20, "{pulled:?}");
    let partial = root.join(".kiln/partial");
    assert_eq!(std::fs::read_dir(&partial).unwrap().count(), 0);
    assert!(reader.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());

    // What was left is rubbish: it is fetched whole.
    let reader = Context::new();
    std::fs::write(reader.root().join(".kiln/partial").join(record.map.packs[0].digest.hex()), vec![7; 1 << 20]).unwrap();
    pull(&reader, &repository, "1").await.unwrap();
    assert!(reader.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
    // Nobody goes on with this one.
    let stale = reader.root().join(".kiln/partial").join("0".repeat(64));
    std::fs::write(&stale, "old").unwrap();
    reader.store.prune(&Keep::default()).unwrap();
    assert!(stale.exists());
    let old = std::time::SystemTime::now() - Duration::from_secs(3 * 24 * 3600);
    std::fs::File::options().write(true).open(&stale).unwrap().set_modified(old).unwrap();
    reader.store.prune(&Keep::default()).unwrap();
    assert!(!stale.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pulls_at_once_do_the_work_once() {
    let (net, context) = (Net::new(), Context::new());
    let record = write(&context.store, &disk(context.folder.path(), 120 * BLOCK, &blocks(120)), &[]);
    let one = context.publish("web", "1", &record).digest;
    let repository = net.repository("web");
    push(&context, &one, &repository, "1").await.unwrap();
    let reader = Context::new();
    let other = Context { store: reader.again(), folder: tempfile::tempdir().unwrap() };
    net.proxy.forget();
    let (a, b) = tokio::join!(pull(&reader, &repository, "1"), pull(&other, &repository, "1"));
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!((a.digest, b.digest), (one, one));
    let size: u64 = record.map.packs.iter().map(|pack| pack.size).sum();
    assert!(net.proxy.traffic("GET").received < size + (2 << 20));
    assert!(reader.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_never_change_and_other_tags_move() {
    let (net, context) = (Net::new(), Context::new());
    let one = context.image("web", "1", &[(1, 1)]);
    let two = context.image("web", "2", &[(1, 2)]);
    let repository = net.repository("web");
    push(&context, &one, &repository, "1").await.unwrap();
    let sent = push(&context, &one, &repository, "stable").await.unwrap();
    assert_eq!(sent.moved_from, None);
    let sent = push(&context, &two, &repository, "stable").await.unwrap();
    assert_eq!(sent.moved_from, Some(one));
    // Neither another content as version 1 nor anything else at its tag.
    let other = Context::new();
    let forged = other.image("web", "1", &[(1, 3)]);
    for (from, image) in [(&other, forged), (&context, two)] {
        let error = push(from, &image, &repository, "1").await.unwrap_err();
        assert_eq!(error.kind(), Code::Refused);
        assert!(error.to_string().contains(":1 was pushed as sha256:"), "{error}");
    }
    assert_eq!(repository.resolve("1").await.unwrap(), Some(one));
    // A local version that was fixed elsewhere is not replaced by a pull.
    other.store.fix(&"web:1".parse().unwrap(), "promoted").unwrap();
    let error = pull(&other, &repository, "1").await.unwrap_err();
    assert_eq!(error.kind(), Code::Refused, "{error:?}");
    assert_eq!(other.resolve("web:1").unwrap(), forged);
    // One that was not fixed moves, and is said.
    let third = Context::new();
    let mine = third.image("web", "1", &[(1, 4)]);
    let pulled = pull(&third, &repository, "1").await.unwrap();
    assert_eq!((pulled.moved[0].from, pulled.moved[0].to), (mine, one));
    let error = pull(&third, &repository, "3").await.unwrap_err();
    assert_eq!((error.kind(), error.next_move()), (Code::NotFound, Some("it has 1, stable")));
}

/// Attaches something to an image by `subject`, and a signature in cosign's
/// older form.
fn attach(context: &Context, subject: &Digest) -> (Digest, Digest) {
    let store = &context.store;
    let layer = store.write_blob(b"{\"spdxVersion\":\"SPDX-2.3\"}").unwrap();
    let empty = store.write_blob(b"{}").unwrap();
    let size = std::fs::metadata(store.blob_path(subject)).unwrap().len();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": "application/spdx+json",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": empty, "size": 2, "data": "e30="},
        "layers": [{"mediaType": "application/spdx+json", "digest": layer, "size": 26}],
        "subject": {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": subject, "size": size},
        "annotations": {"about": "what is in it"},
    });
    let sbom = manifest.to_string();
    let sig = signature(store, "one");
    let index = context.root().join("index.json");
    let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    let entries = value["manifests"].as_array_mut().unwrap();
    let mut ends = Vec::new();
    for (text, tag) in [(sbom, None), (sig, Some(format!("sha256-{}.sig", subject.hex())))] {
        let digest = store.write_blob(text.as_bytes()).unwrap();
        let mut annotations = serde_json::json!({"vnd.kiln.subject": subject});
        if let Some(tag) = tag {
            annotations["vnd.kiln.tag"] = tag.into();
        }
        let kind = "application/vnd.oci.image.manifest.v1+json";
        entries.push(serde_json::json!({"mediaType": kind, "digest": digest, "size": text.len(), "annotations": annotations}));
        ends.push(digest);
    }
    std::fs::write(&index, value.to_string()).unwrap();
    (ends[0], ends[1])
}

fn signature(store: &Store, text: &str) -> String {
    let payload = store.write_blob(text.as_bytes()).unwrap();
    let config = store.write_blob(b"{\"rootfs\":{}}").unwrap();
    serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 13},
        "layers": [{"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": payload, "size": text.len(),
            "annotations": {"dev.cosignproject.cosign/signature": text}}],
    })
    .to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_attached_travels_along() {
    let (net, context) = (Net::new(), Context::new());
    let one = context.image("web", "1", &[(1, 1), (2, 2)]);
    let (sbom, sig) = attach(&context, &one);
    let repository = net.repository("shop/web");
    let sent = push(&context, &one, &repository, "1").await.unwrap();
    assert_eq!(sent.attached, 2);
    let listed = |found: Vec<serde_json::Value>| found.iter().map(|d| d["digest"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(listed(repository.referrers(&one, None).await.unwrap()), [sbom.to_string()]);
    let tag = format!("sha256-{}.sig", one.hex());
    assert_eq!(repository.resolve(&tag).await.unwrap(), Some(sig));
    assert_eq!(push(&context, &one, &repository, "1").await.unwrap().attached, 0);

    // Into another store, and from there into an archive and a third.
    let reader = Context::new();
    let pulled = pull(&reader, &repository, "1").await.unwrap();
    assert_eq!(pulled.attached, 2);
    let file = reader.folder.path().join("web.tar");
    transfer::save_to(&reader.store, &["web:1".parse().unwrap()], &file, false, &Reports::silent()).unwrap();
    let third = Context::new();
    let loaded = load(&third, &file).unwrap();
    assert_eq!((loaded.images[0].digest, loaded.images[0].attached), (one, 2));
    for context in [&reader, &third] {
        let again = context.again();
        assert_eq!(again.prune(&Keep::default()).unwrap().blobs, 0);
        assert!(context.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
    }
    // From repository to repository, on the same host and on another.
    let (known, reports) = (known(&third), Reports::silent());
    let mirror = net.repository("mirror/web");
    let to = Sending { repository: &mirror, tag: Some("1"), known: &known, reports: &reports };
    net.proxy.forget();
    let sent = transfer::copy(&repository, &one, &to).await.unwrap();
    assert_eq!((sent.sent, sent.attached), (0, 2), "{sent:?}");
    assert!(sent.mounted > 3 && net.proxy.total().sent < 20_000, "{sent:?}");
    let far = Registry::builder().start().unwrap();
    let away = client().repository(far.address(), "away").unwrap();
    let to = Sending { repository: &away, tag: Some("1"), known: &known, reports: &reports };
    let sent = transfer::copy(&mirror, &one, &to).await.unwrap();
    assert_eq!((sent.digest, sent.attached, sent.mounted), (one, 2, 0));
    assert_eq!(listed(away.referrers(&one, None).await.unwrap()), [sbom.to_string()]);
    assert_eq!(away.resolve(&tag).await.unwrap(), Some(sig));

    // A second signature at the same tag stays beside the first.
    let other = signature(&context.store, "two");
    let digest = context.store.write_blob(other.as_bytes()).unwrap();
    let index = context.root().join("index.json");
    let text = std::fs::read_to_string(&index).unwrap().replace(&sig.to_string(), &digest.to_string());
    std::fs::write(
        &index,
        text.replace(&format!("\"size\":{}", signature(&context.store, "one").len()), &format!("\"size\":{}", other.len())),
    )
    .unwrap();
    assert_eq!(push(&context, &one, &repository, "1").await.unwrap().attached, 1);
    let merged = repository.manifest(&tag).await.unwrap().unwrap();
    let merged: serde_json::Value = serde_json::from_slice(&merged.bytes).unwrap();
    assert_eq!(merged["layers"].as_array().unwrap().len(), 2);
}

fn load(context: &Context, file: &Path) -> kiln_model::Result<transfer::Loaded> {
    let mut archive = std::fs::File::open(file).unwrap();
    let size = archive.metadata().unwrap().len();
    transfer::load(&context.store, &mut archive, size, &Reports::silent())
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_takes_what_was_pushed_and_saved() {
    let (net, context) = (Net::new(), Context::new());
    let one = context.image("web", "1", &[(1, 1), (5, 2)]);
    let repository = net.repository("shop/web");
    push(&context, &one, &repository, "1").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let to = format!("oci:{}:web:1", folder.path().join("layout").display());
    let from = format!("docker://{}/shop/web:1", net.registry.address());
    run("skopeo", &["--insecure-policy", "copy", "--src-tls-verify=false", &from, &to]);
    let index = std::fs::read_to_string(folder.path().join("layout/index.json")).unwrap();
    assert!(index.contains(&one.to_string()), "{index}");
    // And kiln what skopeo pushed.
    let back = format!("docker://{}/copied:1", net.registry.address());
    run("skopeo", &["--insecure-policy", "copy", "--dest-tls-verify=false", &to, &back]);
    let reader = Context::new();
    assert_eq!(pull(&reader, &net.repository("copied"), "1").await.unwrap().digest, one);
    // The same by archives.
    let file = folder.path().join("web.tar");
    transfer::save_to(&context.store, &["web:1".parse().unwrap()], &file, false, &Reports::silent()).unwrap();
    let archive = format!("oci-archive:{}:web:1", file.display());
    let other = format!("oci:{}:web:1", folder.path().join("other").display());
    run("skopeo", &["--insecure-policy", "copy", &archive, &other]);
    let made = folder.path().join("made.tar");
    run("skopeo", &["--insecure-policy", "copy", &other, &format!("oci-archive:{}:web:1", made.display())]);
    let loaded = load(&Context::new(), &made).unwrap();
    assert_eq!((loaded.images[0].digest, loaded.images[0].names.clone()), (one, vec!["web:1".to_owned(), "web".to_owned()]));
}

#[test]
fn archives_are_the_same_twice_and_believed_in_nothing() {
    let context = Context::new();
    let one = context.image("web", "1", &[(1, 1), (5, 2)]);
    let two = context.image("db", "7", &[(1, 1), (6, 2)]);
    let reports = Reports::silent();
    let images = ["web:1".parse().unwrap(), "db".parse().unwrap()];
    let (mut a, mut b) = (Vec::new(), Vec::new());
    transfer::save(&context.store, &images, &mut a, &reports).unwrap();
    transfer::save(&context.store, &images, &mut b, &reports).unwrap();
    assert!(a == b, "the archive differs");
    let file = context.folder.path().join("two.tar");
    std::fs::write(&file, &a).unwrap();
    let reader = Context::new();
    let loaded = load(&reader, &file).unwrap();
    assert_eq!(loaded.images.iter().map(|image| image.digest).collect::<Vec<_>>(), [one, two]);
    assert_eq!((reader.resolve("web:1").unwrap(), reader.resolve("db:7").unwrap()), (one, two));
    assert_eq!(load(&reader, &file).unwrap().bytes_stored, 0);

    // Cut anywhere, or with any byte changed, it is refused or the same.
    for cut in (0..a.len()).step_by(a.len() / 40) {
        std::fs::write(&file, &a[..cut]).unwrap();
        let reader = Context::new();
        // What fills up the end says nothing.
        match load(&reader, &file) {
            Ok(_) => assert!(a[cut..].iter().all(|byte| *byte == 0), "cut at {cut}"),
            Err(error) => {
                assert!(matches!(error.kind(), Code::Corrupt | Code::NotFound), "cut at {cut}: {error:?}");
                assert!(reader.store.images(true).unwrap().images.is_empty());
            }
        }
    }
    for place in (0..a.len()).step_by(a.len() / 80) {
        let mut bad = a.clone();
        bad[place] ^= 0x20;
        std::fs::write(&file, &bad).unwrap();
        let reader = Context::new();
        match load(&reader, &file) {
            Ok(_) => {
                assert!(reader.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
                let there: Vec<_> = reader.store.images(true).unwrap().images.iter().map(|image| image.digest).collect();
                assert!(there.len() == 2 && there.contains(&one) && there.contains(&two), "byte {place}");
            }
            Err(_) => assert!(reader.store.images(true).unwrap().images.is_empty(), "byte {place}"),
        }
    }

    // Names of files that lead out of it are not followed.
    let outside = context.folder.path().join("outside");
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |name: &str, kind: tar::EntryType, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_entry_type(kind);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        if kind.is_symlink() {
            header.set_link_name("/etc/passwd").unwrap();
        }
        header.set_cksum();
        tar.append(&header, bytes).unwrap();
    };
    add("oci-layout", tar::EntryType::Regular, b"{\"imageLayoutVersion\":\"1.0.0\"}");
    let path = outside.to_str().unwrap();
    let path = &path[path.len().saturating_sub(90)..];
    add(path, tar::EntryType::Regular, b"outside");
    add("../../../outside", tar::EntryType::Regular, b"outside");
    add("blobs/sha256/../../../../outside", tar::EntryType::Regular, b"outside");
    add("index.json", tar::EntryType::Regular, b"{\"schemaVersion\":2,\"manifests\":[]}");
    std::fs::write(&file, tar.get_ref()).unwrap();
    assert_eq!(load(&Context::new(), &file).unwrap_err().kind(), Code::NotFound);
    assert!(!outside.exists());
    let mut add = |name: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_path(name).unwrap();
        header.set_link_name("/etc/passwd").unwrap();
        header.set_cksum();
        tar.append(&header, &[][..]).unwrap();
    };
    add(&format!("blobs/sha256/{}", "0".repeat(64)));
    std::fs::write(&file, tar.get_ref()).unwrap();
    assert_eq!(load(&Context::new(), &file).unwrap_err().kind(), Code::Corrupt);
}

#[tokio::test(flavor = "multi_thread")]
async fn kubevirt_gets_a_container_with_the_disk() {
    let (net, context) = (Net::new(), Context::new());
    let raw = disk(context.folder.path(), 21 * BLOCK + 512, &blocks(22));
    let record = write(&context.store, &raw, &[]);
    let one = context.publish("shop/web", "1", &record).digest;
    let repository = net.repository("shop/web-disk");
    let (known, reports) = (known(&context), Reports::silent());
    let to = Sending { repository: &repository, tag: Some("1"), known: &known, reports: &reports };
    let made = transfer::containerdisk(&context.store, &Source::Store(&one), &to).await.unwrap();
    assert_eq!((made.image, made.file.as_str(), made.existed), (one, "disk/web.qcow2", false));
    assert!(transfer::containerdisk(&context.store, &Source::Store(&one), &to).await.unwrap().existed);
    assert_eq!(std::fs::read_dir(context.root().join(".kiln/tmp")).unwrap().count(), 0);

    // From a registry the same comes out.
    let source = net.repository("web");
    push(&context, &one, &source, "1").await.unwrap();
    let remote = Remote::open(&source, &one).await.unwrap();
    let other = Sending { tag: Some("other"), ..to.clone() };
    let again = transfer::containerdisk(&Context::new().store, &Source::Remote(&remote), &other).await.unwrap();
    assert_eq!(again.digest, made.digest);
    // Another image's version cannot take the tag.
    let two = context.image("shop/web", "1", &[(1, 77)]);
    let error = transfer::containerdisk(&context.store, &Source::Store(&two), &to).await.unwrap_err();
    assert_eq!(error.kind(), Code::Refused);

    let folder = tempfile::tempdir().unwrap();
    let layout = folder.path().join("layout");
    let from = format!("docker://{}/shop/web-disk:1", net.registry.address());
    run("skopeo", &["--insecure-policy", "copy", "--src-tls-verify=false", &from, &format!("oci:{}:1", layout.display())]);
    let manifest = repository.manifest("1").await.unwrap().unwrap();
    let value: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap();
    let layer: Digest = value["layers"][0]["digest"].as_str().unwrap().parse().unwrap();
    let path = layout.join("blobs/sha256").join(layer.hex());
    let listed = run("tar", &["--numeric-owner", "-tvzf", path.to_str().unwrap()]);
    assert!(
        listed.lines().all(|line| line.contains(" 107/107 "))
            && listed.contains("-r--r----- 107/107")
            && listed.ends_with("disk/web.qcow2\n"),
        "{listed}"
    );
    run("tar", &["-xzf", path.to_str().unwrap(), "-C", folder.path().to_str().unwrap()]);
    let qcow2 = folder.path().join("disk/web.qcow2");
    run("qemu-img", &["check", "-f", "qcow2", qcow2.to_str().unwrap()]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", qcow2.to_str().unwrap(), raw.to_str().unwrap()]);
    // The config says what is in the layer.
    let config: Digest = value["config"]["digest"].as_str().unwrap().parse().unwrap();
    let config: serde_json::Value = serde_json::from_slice(&repository.blob(&config, 1 << 20).await.unwrap()).unwrap();
    let plain =
        Command::new("gzip").args(["-dc", path.to_str().unwrap()]).output().or_else(|_| Command::new("zcat").arg(&path).output()).unwrap();
    assert_eq!(config["rootfs"]["diff_ids"][0].as_str().unwrap(), Digest::of(plain.stdout).to_string());
}

/// Pushes an image from a process of its own, to be killed in it; does nothing
/// when it runs as an ordinary test.
#[tokio::test(flavor = "multi_thread")]
async fn pusher() {
    let (Some(root), Ok(host)) = (std::env::var_os("KILN_TEST_STORE"), std::env::var("KILN_TEST_HOST")) else { return };
    let store = Store::open(root.as_ref()).unwrap();
    let image = store.resolve(&"web:1".parse().unwrap()).unwrap();
    let repository = client().repository(&host, &std::env::var("KILN_TEST_NAME").unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (known, reports) = (Known::new(folder.path()), Reports::silent());
    transfer::push(&store, &image, &Sending { repository: &repository, tag: Some("1"), known: &known, reports: &reports }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_push_leaves_nothing_to_be_seen_and_the_next_completes() {
    let (net, context) = (Net::new(), Context::new());
    let record = write(&context.store, &disk(context.folder.path(), 24 * BLOCK, &blocks(24)), &[]);
    let one = context.publish("web", "1", &record).digest;
    attach(&context, &one);
    let spawn = |name: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "pusher"]).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command.env("KILN_TEST_STORE", context.root()).env("KILN_TEST_HOST", net.proxy.address()).env("KILN_TEST_NAME", name);
        command.spawn().unwrap()
    };
    let since = std::time::Instant::now();
    assert!(spawn("whole").wait().unwrap().success());
    let whole = since.elapsed();
    let (mut done, mut killed) = (0, 0);
    for number in 0..50_u32 {
        let repository = net.repository(&format!("killed/{number}"));
        let mut child = spawn(&format!("killed/{number}"));
        // All over the time that one takes.
        tokio::time::sleep(whole * (number * 7 % 50) / 48).await;
        child.kill().unwrap();
        child.wait().unwrap();
        match repository.resolve("1").await.unwrap() {
            None => killed += 1,
            // It was faster.
            Some(digest) => {
                assert_eq!(digest, one);
                done += 1;
            }
        }
        let visible = repository.manifest(&one.to_string()).await.unwrap().is_some();
        assert_eq!(visible, repository.resolve("1").await.unwrap().is_some(), "half of it is there");
        if number % 5 == 0 {
            let sent = push(&context, &one, &repository, "1").await.unwrap();
            assert_eq!((sent.digest, repository.resolve("1").await.unwrap()), (one, Some(one)));
            let image = Remote::open(&repository, &one).await.unwrap();
            let reader = Context::new();
            let pulled = transfer::pull(&image, &reader.store, &Names::Version, &known(&reader), &Reports::silent()).await.unwrap();
            assert_eq!(pulled.attached, 2);
        }
    }
    assert!(killed > 20, "{killed} killed, {done} done");
}

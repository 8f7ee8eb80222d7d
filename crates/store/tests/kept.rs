//! Checkpoints at a registry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail")]

use std::path::{Path, PathBuf};

use kiln_model::checkpoint::KeptFile;
use kiln_model::key::KeyHasher;
use kiln_model::{Code, Digest, Key};
use kiln_registry::{Client, Options};
use kiln_store::kept::{self, Kept, Packed};
use kiln_store::{Place as _, RemotePlace};
use kiln_testing::{Fault, On, Proxy, Registry};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

struct Context {
    registry: Registry,
    proxy: Proxy,
    folder: tempfile::TempDir,
}

impl Context {
    fn new() -> Self {
        let registry = Registry::builder().start().unwrap();
        let proxy = Proxy::before(registry.address()).unwrap();
        Self { registry, proxy, folder: tempfile::tempdir().unwrap() }
    }

    fn place(&self) -> RemotePlace {
        let client = Client::new(Options::default()).unwrap();
        RemotePlace::new(client.repository(self.proxy.address(), "shop/cache").unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Writes files; gives what a cache would say of them.
    fn files(&self, folder: &str, files: &[(&str, &[u8])]) -> Vec<KeptFile> {
        let kept = |(name, bytes): &(&str, &[u8])| {
            std::fs::write(self.path(folder).join(name), bytes).unwrap();
            KeptFile { name: (*name).to_owned(), length: bytes.len() as u64, digest: Digest::of(bytes).hex() }
        };
        files.iter().map(kept).collect()
    }
}

fn step(name: &str) -> Key {
    let mut hasher = KeyHasher::new("step");
    hasher.field("name", name);
    hasher.finish()
}

fn layer(seed: u8) -> Vec<u8> {
    (0..300_000_u32).map(|n| (n.wrapping_mul(u32::from(seed) + 7) >> 9) as u8).collect()
}

async fn leave(context: &Context, kept: &Kept, folder: &str, packed: &mut Packed) -> Digest {
    let (place, work) = (context.place(), context.path("work"));
    let digest = kept::send(&place, kept, &context.path(folder), &work, packed).await.unwrap();
    kept::point(&place, &kept.step, &digest).await.unwrap();
    digest
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).unwrap()
}

#[tokio::test]
async fn what_one_leaves_another_takes() {
    let context = Context::new();
    let (one, two) = (layer(1), layer(2));
    let note = serde_json::json!({ "layers": 2 });
    let first = context.files("first", &[("layer-0.qcow2", &one), ("traces.json", b"{}")]);
    let second = context.files("second", &[("layer-0.qcow2", &one), ("layer-1.qcow2", &two), ("empty", b"")]);
    let mut packed = Packed::default();
    assert_eq!(kept::offered(&context.place(), &step("a")).await.unwrap(), None);
    leave(&context, &Kept::new(step("a"), 100, 2.5, note.clone(), first), "first", &mut packed).await;
    context.proxy.forget();
    let digest = leave(&context, &Kept::new(step("b"), 200, 5.0, note.clone(), second), "second", &mut packed).await;
    let uploads = context.proxy.requests().iter().filter(|seen| seen.method == "PUT" && seen.path.contains("/blobs/uploads/")).count();
    assert_eq!(uploads, 3, "the layer that both have is sent once: {:?}", context.proxy.requests());

    let place = context.place();
    let offered = kept::offered(&place, &step("b")).await.unwrap().unwrap();
    assert_eq!((offered.digest, offered.kept.made, &offered.kept.note), (digest, 200, &note));
    let to = context.path("taken");
    kept::fetch(&place, &offered, &to).await.unwrap();
    assert_eq!((read(&to, "layer-0.qcow2"), read(&to, "layer-1.qcow2"), read(&to, "empty")), (one, two, Vec::new()));
    let mut names: Vec<_> = std::fs::read_dir(&to).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["empty", "layer-0.qcow2", "layer-1.qcow2"], "nothing else stays");

    // A newer one of the same step takes its place.
    let newer = context.files("newer", &[("layer-0.qcow2", b"newer")]);
    leave(&context, &Kept::new(step("a"), 300, 2.5, note, newer), "newer", &mut packed).await;
    assert_eq!(kept::offered(&place, &step("a")).await.unwrap().unwrap().kept.made, 300);
}

#[tokio::test]
async fn a_changed_byte_is_noticed() {
    let context = Context::new();
    let files = context.files("first", &[("layer-0.qcow2", &layer(1))]);
    leave(&context, &Kept::new(step("a"), 1, 1.0, serde_json::Value::Null, files), "first", &mut Packed::default()).await;
    let place = context.place();
    let offered = kept::offered(&place, &step("a")).await.unwrap().unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&place.manifest(&offered.digest).await.unwrap()).unwrap();
    let blob = manifest["layers"][0]["digest"].as_str().unwrap().to_owned();
    context.proxy.fault(On::method("GET").path(&blob).always(), Fault::FlipAnswer(1000));
    let error = kept::fetch(&place, &offered, &context.path("taken")).await.unwrap_err();
    assert_eq!(error.kind(), Code::DigestMismatch, "{error:?}");
    context.proxy.heal();
    assert!(context.registry.blob(blob.trim_start_matches("sha256:")).exists());
}

#[tokio::test]
async fn only_a_checkpoint_of_the_step_is_one() {
    let context = Context::new();
    let place = context.place();
    let files = context.files("first", &[("layer-0.qcow2", b"bytes")]);
    let digest = leave(&context, &Kept::new(step("a"), 1, 1.0, serde_json::Value::Null, files), "first", &mut Packed::default()).await;

    // That of another step, put at this one's tag.
    kept::point(&place, &step("b"), &digest).await.unwrap();
    let error = kept::offered(&place, &step("b")).await.unwrap_err();
    assert_eq!(error.kind(), Code::Corrupt, "{error:?}");

    // Files with other lengths and names than those that were said.
    let said = |length: u64, name: &str| vec![KeptFile { name: name.into(), length, digest: Digest::of(format!("{name}{length}")).hex() }];
    for length in [3, 7] {
        let kept = Kept::new(step("c"), 1, 1.0, serde_json::Value::Null, said(length, "layer-0.qcow2"));
        leave(&context, &kept, "first", &mut Packed::default()).await;
        let offered = kept::offered(&place, &step("c")).await.unwrap().unwrap();
        let error = kept::fetch(&place, &offered, &context.path(&format!("of-{length}"))).await.unwrap_err();
        assert_eq!(error.kind(), Code::Corrupt, "{error:?}");
    }
    for name in ["../layer", "a/b", "", "..", ".hidden"] {
        let kept = Kept::new(step("d"), 1, 1.0, serde_json::Value::Null, said(5, name));
        let sent = kept::send(&place, &kept, &context.path("first"), &context.path("work"), &mut Packed::default()).await;
        assert_eq!(sent.unwrap_err().kind(), Code::Corrupt, "{name:?}");
    }

    // Another kind of artifact.
    let manifest: serde_json::Value = serde_json::from_slice(&place.manifest(&digest).await.unwrap()).unwrap();
    let mut other = manifest.clone();
    other["artifactType"] = "application/vnd.example.other".into();
    place.repository().put_manifest(&kept::tag(&step("e")), MANIFEST, other.to_string().as_bytes()).await.unwrap();
    assert_eq!(kept::offered(&place, &step("e")).await.unwrap_err().kind(), Code::Corrupt);
}

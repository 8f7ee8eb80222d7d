//! skopeo takes images from the store as it stands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may fail")]

mod common;

use std::process::Command;

use common::Context;
use kiln_model::Digest;

fn skopeo(args: &[&str]) -> Vec<u8> {
    let output = Command::new("skopeo").args(args).output().expect("skopeo is needed: apt-get install skopeo");
    assert!(output.status.success(), "skopeo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn copies_by_name_and_by_version_with_the_digest_unchanged() {
    let context = Context::new();
    let old = context.image("debian-nginx", "1.0.0", &[(1, 1)]);
    let new = context.image("debian-nginx", "v1.1-3-gabc_d.x", &[(1, 2), (5, 5)]);
    let nested = context.image("shop/web", "2", &[(3, 3)]);
    let store = context.root();
    for (reference, digest) in [
        ("debian-nginx", new),
        ("debian-nginx:1.0.0", old),
        ("debian-nginx:v1.1-3-gabc_d.x", new),
        ("shop/web", nested),
        ("shop/web:2", nested),
    ] {
        let from = format!("oci:{}:{reference}", store.display());
        assert_eq!(Digest::of(skopeo(&["inspect", "--raw", &from])), digest, "{reference}");
        let to = context.folder.path().join(reference.replace(['/', ':'], "-"));
        skopeo(&["copy", "--quiet", "--insecure-policy", &from, &format!("dir:{}", to.display())]);
        assert_eq!(Digest::of(std::fs::read(to.join("manifest.json")).unwrap()), digest, "{reference}");
        for blob in context.store.image(&digest).unwrap().manifest.blobs() {
            assert_eq!(Digest::of(std::fs::read(to.join(blob.digest.hex())).unwrap()), blob.digest);
        }
    }
}

#[test]
fn what_skopeo_puts_into_the_store_is_left_alone() {
    let context = Context::new();
    let digest = context.image("web", "1", &[(1, 1)]);
    let to = format!("oci:{}:copied", context.root().display());
    skopeo(&["copy", "--quiet", "--insecure-policy", &format!("oci:{}:web", context.root().display()), &to]);
    assert_eq!(context.resolve("web:1").unwrap(), digest);
    assert_eq!(context.resolve("copied").unwrap(), digest);
    context.store.prune(&kiln_store::Keep::default()).unwrap();
    assert!(context.store.verify(&mut |_, _| {}).unwrap().damaged.is_empty());
}

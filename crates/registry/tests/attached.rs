//! What is attached: the referrers API, and the tag that stands in for it.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::collections::BTreeMap;

use bytes::Bytes;
use common::{Bench, MANIFEST, image, manifest, noise, send};
use kiln_model::{Code, Digest};
use kiln_registry::Repository;
use kiln_testing::{Fault, Immutable, On};
use serde_json::{Value, json};

/// An artifact for `subject`, and what it is called.
fn artifact(subject: &Digest, number: usize) -> (Vec<u8>, String) {
    let kind = format!("application/x-kind-{}", number % 2);
    let subject = json!({ "mediaType": MANIFEST, "digest": subject, "size": 1 });
    (manifest(&[], &json!({ "artifactType": kind, "subject": subject, "annotations": { "number": number.to_string() } })), kind)
}

async fn attach(repository: &Repository, subject: &Digest, number: usize) -> kiln_model::Result<Digest> {
    let (bytes, kind) = artifact(subject, number);
    let annotations = BTreeMap::from([("number".to_owned(), number.to_string())]);
    repository.attach(subject, MANIFEST, &kind, &bytes, &annotations).await
}

fn digests(found: &[Value]) -> Vec<String> {
    let mut all: Vec<String> = found.iter().map(|entry| entry["digest"].as_str().unwrap().to_owned()).collect();
    all.sort();
    all
}

#[tokio::test]
async fn at_the_tag_where_there_is_no_api() {
    let bench = Bench::new();
    let web = bench.repository("web");
    let subject = image(&web, "1.0.0", &noise(10, 1)).await;
    assert!(web.referrers(&subject, None).await.unwrap().is_empty());
    let mut expected = Vec::new();
    for number in 0..3 {
        expected.push(attach(&web, &subject, number).await.unwrap().to_string());
        // Twice is once.
        attach(&web, &subject, number).await.unwrap();
    }
    expected.sort();
    let found = web.referrers(&subject, None).await.unwrap();
    assert_eq!(digests(&found), expected);
    let of_kind = web.referrers(&subject, Some("application/x-kind-1")).await.unwrap();
    assert_eq!(of_kind.len(), 1);
    assert_eq!(of_kind[0]["annotations"]["number"], "1");
    assert_eq!(of_kind[0]["mediaType"], MANIFEST);
    let tags = web.tags().await.unwrap();
    assert!(tags.contains(&format!("sha256-{}", subject.hex())), "{tags:?}");
    // Asked for once, and then known not to be there.
    assert_eq!(bench.proxy.requests().iter().filter(|seen| seen.path.contains("/referrers/")).count(), 1);
    // Nothing attached to something else.
    assert!(web.referrers(&Digest::of("x"), None).await.unwrap().is_empty());
}

#[tokio::test]
async fn nothing_is_lost_when_many_attach_at_once() {
    let bench = Bench::new();
    let subject = image(&bench.repository("web"), "1.0.0", &noise(10, 1)).await;
    let tasks: Vec<_> = (0..6)
        .map(|number| {
            // Each as a process of its own would.
            let web = bench.repository("web");
            tokio::spawn(async move { attach(&web, &subject, number).await.unwrap().to_string() })
        })
        .collect();
    let mut expected = Vec::new();
    for task in tasks {
        expected.push(task.await.unwrap());
    }
    expected.sort();
    assert_eq!(digests(&bench.repository("web").referrers(&subject, None).await.unwrap()), expected);
    // Of one process: in turn.
    let web = bench.repository("web");
    let (a, b) = tokio::join!(attach(&web, &subject, 10), attach(&web, &subject, 11));
    let found = digests(&web.referrers(&subject, None).await.unwrap());
    assert!(found.contains(&a.unwrap().to_string()) && found.contains(&b.unwrap().to_string()) && found.len() == 8);
}

#[tokio::test]
async fn by_the_api_where_there_is_one() {
    let bench = Bench::new();
    bench.proxy.referrers();
    let web = bench.repository("web");
    let subject = image(&web, "1.0.0", &noise(10, 1)).await;
    assert!(web.referrers(&subject, None).await.unwrap().is_empty());
    bench.proxy.forget();
    let one = attach(&web, &subject, 0).await.unwrap();
    // The registry keeps the list: nothing else was sent.
    assert_eq!(bench.proxy.total().requests, 1);
    let two = attach(&web, &subject, 1).await.unwrap();
    let mut expected = vec![one.to_string(), two.to_string()];
    expected.sort();
    assert_eq!(digests(&web.referrers(&subject, None).await.unwrap()), expected);
    assert_eq!(digests(&web.referrers(&subject, Some("application/x-kind-0")).await.unwrap()), [one.to_string()]);
    let pushed = web.put_manifest(&one.to_string(), MANIFEST, &artifact(&subject, 0).0).await.unwrap();
    assert!(pushed.subject_known);
}

#[tokio::test]
async fn answers_of_the_api() {
    let bench = Bench::new();
    let web = bench.repository("web");
    let subject = image(&web, "1.0.0", &noise(10, 1)).await;
    let page = |digest: &str, link: &[(&str, &str)]| {
        let body = json!({ "schemaVersion": 2, "manifests": [{ "digest": digest, "artifactType": "a" }] });
        Fault::answer(200, link, &body.to_string())
    };
    let on = || On::method("GET").path("/referrers/");
    bench.proxy.fault(on(), page("one", &[("Link", "<?page=2>; rel=\"next\"")]));
    bench.proxy.fault(on(), page("two", &[]));
    assert_eq!(digests(&web.referrers(&subject, None).await.unwrap()), ["one", "two"]);
    // A failure is not the absence of the API.
    bench.proxy.fault(on(), Fault::status(403));
    assert_eq!(web.referrers(&subject, None).await.unwrap_err().kind(), Code::Failed);
    bench.proxy.fault(on(), page("one", &[]));
    assert_eq!(web.referrers(&subject, None).await.unwrap().len(), 1);
    // A page for people is.
    bench.proxy.fault(on(), Fault::answer(200, &[("Content-Type", "text/html")], "<html>"));
    assert!(web.referrers(&subject, None).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_tag_that_may_not_be_moved_is_named() {
    let bench = Bench::new();
    let web = bench.repository("web");
    let subject = image(&web, "1.0.0", &noise(10, 1)).await;
    bench.proxy.immutable(Immutable::Precondition, |_| true);
    attach(&web, &subject, 0).await.unwrap();
    let error = attach(&web, &subject, 1).await.unwrap_err();
    assert_eq!(error.kind(), Code::Refused);
    assert!(error.next_move().unwrap_or_default().contains("sha256-"), "{:?}", error.next_move());
    // What else is at that tag is not overwritten.
    let other = send(&web, &Bytes::from_static(b"{}")).await;
    let tag = format!("sha256-{}", other.hex());
    web.put_manifest(&tag, MANIFEST, &manifest(&[], &json!({}))).await.unwrap();
    assert_eq!(web.referrers(&other, None).await.unwrap_err().kind(), Code::Corrupt);
}

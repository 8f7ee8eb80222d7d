//! Against docker-registry, undisturbed: everything once.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use bytes::Bytes;
use common::{Bench, MANIFEST, image, manifest, noise, send};
use kiln_http::Settings;
use kiln_model::{Code, Digest};
use kiln_registry::{Client, FileSource, Options};
use kiln_testing::{Fault, Immutable, On, Registry};
use serde_json::json;
use std::sync::Mutex;

#[tokio::test]
async fn blobs_go_there_and_come_back() {
    let bench = Bench::new();
    let web = bench.repository("team/web");
    let pack = noise(5_000_000, 1);
    let digest = Digest::of(&pack);
    assert_eq!(web.blob_size(&digest).await.unwrap(), None);
    assert_eq!(web.blob(&digest, 1 << 30).await.unwrap_err().kind(), Code::NotFound);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pack");
    std::fs::write(&path, &pack).unwrap();
    let told = Mutex::new(Vec::new());
    web.upload(&digest, pack.len() as u64, &FileSource(path), &|sent| told.lock().unwrap().push(sent)).await.unwrap();
    let told = told.into_inner().unwrap();
    assert!(told.is_sorted() && told.last() == Some(&5_000_000), "{told:?}");
    assert_eq!(bench.proxy.traffic("PATCH").sent, 5_000_000);

    assert_eq!(web.blob_size(&digest).await.unwrap(), Some(5_000_000));
    assert_eq!(web.blob(&digest, 5_000_000).await.unwrap(), pack);
    let error = web.blob(&digest, 4_999_999).await.unwrap_err();
    assert!(error.kind() == Code::Failed && error.chain().contains("5000000 bytes"), "{error:?}");

    // Only what is asked for comes.
    bench.proxy.forget();
    let mut body = web.read(&digest, 1_000_000..1_300_000).await.unwrap();
    let mut bytes = Vec::new();
    while let Some(chunk) = body.chunk().await.unwrap() {
        bytes.extend_from_slice(&chunk);
    }
    assert_eq!(bytes, pack[1_000_000..1_300_000]);
    assert_eq!(body.size(), Some(5_000_000));
    assert_eq!(bench.proxy.total().received, 300_000);
    assert!(web.read(&digest, 7..7).await.unwrap().chunk().await.unwrap().is_none());
    let error = web.read(&digest, 4_000_000..5_000_001).await.unwrap_err();
    assert!(error.chain().contains("it has 5000000"), "{error:?}");
    let error = web.read(&digest, 5_000_000..5_000_001).await.unwrap_err();
    assert!(error.kind() == Code::Failed && error.chain().contains("nothing from byte 5000000"), "{error:?}");

    // Nothing at all is a blob too.
    let empty = send(&web, &Bytes::new()).await;
    assert_eq!(web.blob(&empty, 0).await.unwrap(), b"");
    // What is small takes two requests.
    bench.proxy.forget();
    send(&web, &noise(1000, 2)).await;
    assert_eq!(bench.proxy.total().requests, 2);
    assert!(bench.heard.notes().is_empty(), "{:?}", bench.heard.notes());
}

#[tokio::test]
async fn manifests_and_tags() {
    let bench = Bench::new();
    let web = bench.repository("team/web");
    assert_eq!(web.tags().await.unwrap(), Vec::<String>::new());
    assert_eq!(web.resolve("1.0.0").await.unwrap(), None);
    assert!(web.manifest("1.0.0").await.unwrap().is_none());

    let one = image(&web, "1.0.0", &noise(100, 1)).await;
    let two = image(&web, "1.1.0", &noise(100, 2)).await;
    assert_eq!(web.resolve("1.0.0").await.unwrap(), Some(one));
    let fetched = web.manifest("1.1.0").await.unwrap().unwrap();
    assert_eq!((fetched.digest, fetched.media_type.as_str()), (two, MANIFEST));
    assert_eq!(web.manifest(&two.to_string()).await.unwrap().unwrap().bytes, fetched.bytes);
    assert_eq!(web.tags().await.unwrap(), ["1.0.0", "1.1.0"]);
    assert!(!web.put_manifest("1.0.0", MANIFEST, &fetched.bytes).await.unwrap().subject_known);
    assert_eq!(web.resolve("1.0.0").await.unwrap(), Some(two));

    let error = web.put_manifest(&one.to_string(), MANIFEST, &fetched.bytes).await.unwrap_err();
    assert_eq!(error.kind(), Code::DigestMismatch);
    let large = manifest(&[], &json!({ "annotations": { "x": "y".repeat(4 << 20) } }));
    assert_eq!(web.put_manifest("large", MANIFEST, &large).await.unwrap_err().kind(), Code::Failed);
    // The registry's reason is told.
    let error = web.put_manifest("x", MANIFEST, &manifest(&[&noise(9, 9)], &json!({}))).await.unwrap_err();
    assert!(error.kind() == Code::Failed && error.details().join(" ").contains("MANIFEST_BLOB_UNKNOWN"), "{error:?}");
    assert_eq!(web.manifest("no/tag").await.unwrap_err().kind(), Code::Usage);

    assert!(web.delete_manifest(&one).await.unwrap());
    assert!(!web.delete_manifest(&one).await.unwrap());
    assert!(web.manifest(&one.to_string()).await.unwrap().is_none());
}

#[tokio::test]
async fn blobs_are_taken_over_from_another_repository() {
    let bench = Bench::new();
    let client = bench.client();
    let repository = |name: &str| client.repository(bench.proxy.address(), name).unwrap();
    let (web, copy) = (repository("team/web"), repository("other/copy"));
    let pack = noise(500_000, 1);
    let digest = send(&web, &pack).await;
    assert!(copy.mount(&digest, "team/web").await.unwrap());
    assert_eq!(copy.blob_size(&digest).await.unwrap(), Some(500_000));
    assert_eq!(bench.proxy.total().sent, 500_000);

    // What cannot be taken over is sent, in the session that is open already.
    let other = noise(500_000, 2);
    bench.proxy.forget();
    assert!(!copy.mount(&Digest::of(&other), "team/web").await.unwrap());
    send(&copy, &other).await;
    assert_eq!(bench.proxy.traffic("POST").requests, 1);
    assert_eq!(copy.mount(&digest, "../x").await.unwrap_err().kind(), Code::Usage);
}

#[tokio::test]
async fn pages_of_tags_are_followed_to_their_end() {
    let bench = Bench::new();
    let web = bench.repository("web");
    let page = |tags: &str, link: &str| Fault::answer(200, &[("Link", link)], &format!(r#"{{"name":"web","tags":{tags}}}"#));
    let on = || On::method("GET").path("/tags/list");
    bench.proxy.fault(on(), page(r#"["a","b"]"#, r#"</v2/web/tags/list?last=b&n=2>; rel="next""#));
    bench.proxy.fault(on(), page(r#"["b","c"]"#, r#"<tags/../list?last=c&n=2>; rel="next""#));
    bench.proxy.fault(on(), page("null", r#"</v2/web/tags/list?last=0>; rel="prev""#));
    assert_eq!(web.tags().await.unwrap(), ["a", "b", "c"]);
    let paths: Vec<String> = bench.proxy.requests().into_iter().map(|seen| seen.path).filter(|path| path.contains("tags")).collect();
    assert_eq!(paths, ["/v2/web/tags/list?n=1000", "/v2/web/tags/list?last=b&n=2", "/v2/web/tags/list?last=c&n=2"]);

    bench.proxy.fault(on().always(), page(r#"["a"]"#, r#"</v2/web/tags/list?last=a>; rel="next""#));
    let error = web.tags().await.unwrap_err();
    assert!(error.chain().contains("never end"), "{error:?}");
    bench.proxy.heal();
    bench.proxy.fault(on(), Fault::answer(200, &[], "<html>"));
    assert_eq!(web.tags().await.unwrap_err().kind(), Code::Failed);
}

#[tokio::test]
async fn tls_and_a_password() {
    let registry = Registry::builder().basic_auth("me", "hunter2-hunter2").tls().start().unwrap();
    let config = registry.docker_config(&[]).unwrap();
    let http = Settings { ca_certificates: registry.authority().map(Into::into), ..Settings::default() };
    let options = || Options { docker_config: Some(config.clone()), patience: common::patience(), ..Options::default() };
    let client = Client::new(Options { http, ..options() }).unwrap();
    let web = client.repository(registry.address(), "team/web").unwrap();
    let pack = noise(3_000_000, 1);
    let digest = image(&web, "1.0.0", &pack).await;
    assert_eq!(web.manifest("1.0.0").await.unwrap().unwrap().digest, digest);
    assert_eq!(web.blob(&Digest::of(&pack), 1 << 30).await.unwrap(), pack);
    let (_, port) = registry.address().split_once(':').unwrap();
    let by_name = client.repository(&format!("localhost:{port}"), "team/web").unwrap();
    // There is no login for that name.
    let error = by_name.tags().await.unwrap_err();
    let next = error.next_move().unwrap_or_default();
    assert!(next.contains(&format!("docker login localhost:{port}")), "{error:?} {next}");
    assert!(error.details().join(" ").contains(&config.display().to_string()), "{error:?}");

    // A certificate that nobody vouches for ends it, and at once.
    let stranger = Client::new(options()).unwrap().repository(registry.address(), "team/web").unwrap();
    let error = stranger.tags().await.unwrap_err();
    assert_eq!(error.kind(), Code::Failed);
    assert!(error.next_move().unwrap_or_default().contains("ca_certificates"), "{error:?}");
    assert!(!format!("{client:?} {web:?} {options:?}", options = options()).contains("hunter2"));
}

#[tokio::test]
async fn a_wrong_password_is_said_and_not_shown() {
    let bench = Bench::of(Registry::builder().basic_auth("me", "right-password").start().unwrap());
    let wrong = tempfile::NamedTempFile::new().unwrap();
    let host = bench.proxy.address();
    let json = json!({ "auths": { host: { "username": "me", "password": "wrong-password" } } });
    std::fs::write(wrong.path(), json.to_string()).unwrap();
    let client = Client::new(Options { docker_config: Some(wrong.path().into()), ..bench.options() }).unwrap();
    let web = client.repository(host, "web").unwrap();
    let pack = noise(10, 1);
    for error in [
        web.tags().await.unwrap_err(),
        web.manifest("x").await.unwrap_err(),
        web.resolve("x").await.unwrap_err(),
        web.put_manifest("x", MANIFEST, b"{}").await.unwrap_err(),
        web.blob_size(&Digest::of("x")).await.unwrap_err(),
        web.read(&Digest::of("x"), 0..1).await.unwrap_err(),
        web.upload(&Digest::of(&pack), 10, &pack, &|_| ()).await.unwrap_err(),
        web.referrers(&Digest::of("x"), None).await.unwrap_err(),
    ] {
        let text = format!("{error:?} {:?}", error.next_move());
        assert_eq!(error.kind(), Code::Failed, "{text}");
        for part in [host, "web", "401", "`me`", &wrong.path().display().to_string(), &format!("docker login {host}")] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(!text.contains("wrong-password"), "{text}");
    }
    // Not asked again and again: that locks accounts.
    assert!(bench.heard.notes().is_empty());

    let right = bench.repository("web");
    image(&right, "1", &pack).await;
    assert_eq!(right.tags().await.unwrap(), ["1"]);
}

#[tokio::test]
async fn tags_that_may_not_be_moved() {
    for how in [Immutable::Conflict, Immutable::Precondition, Immutable::BadRequest] {
        let bench = Bench::new();
        let web = bench.repository("web");
        bench.proxy.immutable(how, |tag| tag != "latest");
        let one = image(&web, "1.0.0", &noise(10, 1)).await;
        let error = {
            let other = manifest(&[], &json!({}));
            web.put_manifest("1.0.0", MANIFEST, &other).await.unwrap_err()
        };
        assert_eq!(error.kind(), Code::Refused, "{how:?}: {error:?}");
        let text = error.chain();
        assert!(text.contains(&one.to_string()) && text.contains("web:1.0.0"), "{text}");
        // What is there already may be sent again, and other tags may be moved.
        assert_eq!(image(&web, "1.0.0", &noise(10, 1)).await, one);
        image(&web, "latest", &noise(10, 1)).await;
        image(&web, "latest", &noise(10, 2)).await;
        assert_eq!(web.resolve("1.0.0").await.unwrap(), Some(one));
    }
}

#[tokio::test]
async fn a_manifest_is_refused_when_it_is_damaged_where_it_lies() {
    let bench = Bench::new();
    let web = bench.repository("web");
    let digest = image(&web, "1.0.0", &noise(10, 1)).await;
    let path = bench.registry.blob(&digest.hex());
    let mut bytes = std::fs::read(&path).unwrap();
    // Inside the artifact type: still a manifest.
    let at = bytes.windows(6).position(|window| window == b"x-test").unwrap();
    bytes[at] = b'y';
    std::fs::write(&path, bytes).unwrap();
    for pointer in ["1.0.0", &digest.to_string()] {
        let error = web.manifest(pointer).await.unwrap_err();
        assert_eq!(error.kind(), Code::DigestMismatch, "{error:?}");
        assert!(error.chain().contains(&digest.to_string()), "{error:?}");
    }
}

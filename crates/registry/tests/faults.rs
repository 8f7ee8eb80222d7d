//! Against docker-registry behind a proxy that makes faults.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use bytes::Bytes;
use common::{Bench, MANIFEST, image, manifest, noise, send};
use kiln_model::{Code, Digest, Result};
use kiln_registry::{Body, Client, Options, Patience, Repository};
use kiln_testing::{Fault, On, Proxy};
use serde_json::json;
use std::time::{Duration, Instant};

async fn all(mut body: Body) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) = body.chunk().await? {
        assert!(!chunk.is_empty());
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// A bench with one blob of a million bytes.
async fn with_blob() -> (Bench, Repository, Bytes, Digest) {
    let bench = Bench::new();
    let web = bench.repository("web");
    let pack = noise(1_000_000, 1);
    let digest = send(&web, &pack).await;
    bench.proxy.forget();
    (bench, web, pack, digest)
}

#[tokio::test]
async fn reads_go_on_where_they_were_cut() {
    let (bench, web, pack, digest) = with_blob().await;
    let on = || On::method("GET").path("/blobs/sha256:");
    bench.proxy.fault(on(), Fault::CutAnswer(300_000));
    bench.proxy.fault(on(), Fault::EndAnswer(200_000));
    bench.proxy.fault(on(), Fault::status(502));
    bench.proxy.fault(on(), Fault::Reset);
    assert_eq!(all(web.read(&digest, 0..u64::MAX).await.unwrap()).await.unwrap(), pack);
    let ranges: Vec<Option<String>> = bench.proxy.requests().into_iter().map(|seen| seen.range).collect();
    assert_eq!(ranges[0], None);
    let starts: Vec<u64> =
        ranges[1..].iter().map(|range| range.as_deref().unwrap()[6..].split('-').next().unwrap().parse().unwrap()).collect();
    // All that came was used: at most what was in flight is lost.
    assert!(starts.is_sorted() && starts[0] <= 300_000 && *starts.last().unwrap() <= 500_000, "{starts:?}");
    assert!(starts[0] >= 200_000, "{starts:?}");
    assert_eq!(bench.heard.notes().len(), 4, "{:?}", bench.heard.notes());

    // A part, from a server that ignores ranges, and cuts.
    bench.proxy.fault(on(), Fault::IgnoreRange);
    assert_eq!(all(web.read(&digest, 400_000..500_000).await.unwrap()).await.unwrap(), pack[400_000..500_000]);
    bench.proxy.fault(on(), Fault::CutAnswer(30_000));
    bench.proxy.fault(on(), Fault::IgnoreRange);
    assert_eq!(all(web.read(&digest, 400_000..500_000).await.unwrap()).await.unwrap(), pack[400_000..500_000]);
    // Slowly is all right.
    bench.proxy.fault(on(), Fault::SlowAnswer(500_000));
    assert_eq!(all(web.read(&digest, 0..100_000).await.unwrap()).await.unwrap(), pack[..100_000]);
}

#[tokio::test]
async fn a_server_that_always_cuts_is_given_up() {
    let (bench, web, _, digest) = with_blob().await;
    bench.proxy.fault(On::method("GET").path("/blobs/").always(), Fault::EndAnswer(0));
    let error = web.blob(&digest, 1 << 30).await.unwrap_err();
    assert_eq!(error.kind(), Code::Infrastructure);
    assert_eq!(error.kind().exit_status(), 75);
    assert_eq!(bench.proxy.requests().len(), 6);
    for part in [bench.proxy.address(), "web", &digest.to_string()] {
        assert!(error.chain().contains(part), "{error:?}");
    }
    assert!(error.next_move().unwrap_or_default().contains("again"), "{error:?}");
}

#[tokio::test]
async fn a_changed_byte_never_passes() {
    let (bench, web, pack, digest) = with_blob().await;
    let blobs = || On::method("GET").path("/blobs/sha256:");
    // Once: read again, and told.
    bench.proxy.fault(blobs(), Fault::FlipAnswer(777_777));
    assert_eq!(web.blob(&digest, 1 << 30).await.unwrap(), pack);
    let notes = bench.heard.notes();
    assert!(notes.len() == 1 && notes[0].contains(&digest.to_string()), "{notes:?}");
    // Each time, at any place: refused.
    for at in [0, 1, 499_999, 999_999] {
        bench.proxy.fault(blobs().times(2), Fault::FlipAnswer(at));
        let error = web.blob(&digest, 1 << 30).await.unwrap_err();
        assert!(error.kind() == Code::DigestMismatch && error.chain().contains(&digest.to_string()), "{error:?}");
        bench.proxy.fault(blobs(), Fault::FlipAnswer(at));
        let error = all(web.read(&digest, 0..1_000_000).await.unwrap()).await.unwrap_err();
        assert_eq!(error.kind(), Code::DigestMismatch);
    }
    // Who verifies blocks gets the bytes as they are.
    bench.proxy.fault(blobs(), Fault::FlipAnswer(5));
    let bytes = all(web.read(&digest, 0..1_000_000).await.unwrap().checked_by_caller()).await.unwrap();
    assert_eq!(bytes.iter().zip(&pack).filter(|(a, b)| a != b).count(), 1);

    let image = image(&web, "1.0.0", &pack).await;
    let manifests = || On::method("GET").path("/manifests/");
    for pointer in ["1.0.0", &image.to_string()] {
        bench.proxy.fault(manifests(), Fault::FlipAnswer(40));
        assert_eq!(web.manifest(pointer).await.unwrap().unwrap().digest, image);
        bench.proxy.fault(manifests().times(2), Fault::FlipAnswer(40));
        let error = web.manifest(pointer).await.unwrap_err();
        assert!(error.kind() == Code::DigestMismatch && error.chain().contains(&image.to_string()), "{error:?}");
    }
}

#[tokio::test]
async fn what_is_sent_arrives_as_it_is() {
    let bench = Bench::new();
    let web = bench.repository("web");
    let pack = noise(1_000_000, 3);
    let digest = Digest::of(&pack);
    let upload = async |bytes: &Bytes| web.upload(&digest, 1_000_000, bytes, &|_| ()).await;
    // Changed on the way: the registry notices, and gets it anew.
    bench.proxy.fault(On::method("PATCH"), Fault::FlipRequest(1234));
    upload(&pack).await.unwrap();
    assert_eq!(web.blob(&digest, 1 << 30).await.unwrap(), pack);
    let other = noise(1_000_000, 4);
    bench.proxy.fault(On::method("PATCH").always(), Fault::FlipRequest(0));
    let error = web.upload(&Digest::of(&other), 1_000_000, &other, &|_| ()).await.unwrap_err();
    assert!(error.kind() == Code::DigestMismatch && error.chain().contains("other bytes arrived"), "{error:?}");
    bench.proxy.heal();
    // Changed before it was sent: said so.
    let error = web.upload(&Digest::of("something else"), 1_000_000, &other, &|_| ()).await.unwrap_err();
    assert!(error.kind() == Code::DigestMismatch && error.chain().contains("what is to be sent"), "{error:?}");
    // Shorter than promised.
    let error = web.upload(&Digest::of(&other), 2_000_000, &other, &|_| ()).await.unwrap_err();
    assert!(error.chain().contains("too early"), "{error:?}");
    assert_eq!(web.blob_size(&Digest::of(&other)).await.unwrap(), None);
    // A manifest that is changed on the way.
    send(&web, &Bytes::from_static(b"{}")).await;
    let bytes = manifest(&[], &json!({}));
    let at = bytes.windows(6).position(|window| window == b"x-test").unwrap() as u64;
    bench.proxy.fault(On::method("PUT").path("/manifests/"), Fault::FlipRequest(at));
    assert_eq!(web.put_manifest("1", MANIFEST, &bytes).await.unwrap_err().kind(), Code::DigestMismatch);
}

#[tokio::test]
async fn uploads_outlive_whatever_passes() {
    let bench = Bench::new();
    let web = bench.repository("web");
    let cases: [(On, Fault); 11] = [
        (On::method("POST"), Fault::Reset),
        (On::method("POST"), Fault::status(500)),
        (On::method("PATCH"), Fault::Reset),
        (On::method("PATCH"), Fault::status(503)),
        (On::method("PATCH"), Fault::CutRequest(400_000)),
        (On::method("PATCH"), Fault::LoseAnswer),
        (On::method("PATCH"), Fault::LoseSession),
        (On::method("PUT"), Fault::Reset),
        (On::method("PUT"), Fault::status(504)),
        (On::method("PUT"), Fault::LoseAnswer),
        (On::method("PUT"), Fault::LoseSession),
    ];
    for (seed, (on, fault)) in cases.into_iter().enumerate() {
        let pack = noise(900_000, 100 + seed as u64);
        bench.proxy.fault(on.clone(), fault.clone());
        let before = bench.heard.notes().len();
        let digest = send(&web, &pack).await;
        assert_eq!(web.blob(&digest, 1 << 30).await.unwrap(), pack, "{on:?} {fault:?}");
        assert!(bench.heard.notes().len() > before, "{on:?} {fault:?}: nothing was told");
        bench.proxy.heal();
        // The same for what goes with the closing request.
        let small = noise(5_000, 200 + seed as u64);
        bench.proxy.fault(on, fault);
        send(&web, &small).await;
        bench.proxy.heal();
    }
    // One after the other.
    let pack = noise(900_000, 300);
    bench.proxy.fault(On::method("PATCH").times(2), Fault::CutRequest(100_000));
    bench.proxy.fault(On::method("POST").skip(1), Fault::status(502));
    bench.proxy.fault(On::method("PUT"), Fault::LoseAnswer);
    assert_eq!(web.blob(&send(&web, &pack).await, 1 << 30).await.unwrap(), pack);
}

#[tokio::test]
async fn uploads_go_on_where_the_registry_is() {
    let bench = Bench::new();
    let web = bench.repository("web");
    bench.proxy.resumable();
    bench.proxy.fault(On::method("PATCH"), Fault::CutRequest(400_000));
    bench.proxy.fault(On::method("PATCH"), Fault::CutRequest(100_001));
    let pack = noise(1_000_000, 1);
    let digest = send(&web, &pack).await;
    assert_eq!(web.blob(&digest, 1 << 30).await.unwrap(), pack);
    let patches: Vec<_> = bench.proxy.requests().into_iter().filter(|seen| seen.method == "PATCH").collect();
    let ranges: Vec<Option<&str>> = patches.iter().map(|seen| seen.content_range.as_deref()).collect();
    assert_eq!(ranges, [None, Some("400000-999999"), Some("500001-999999")]);
    assert_eq!(patches.iter().map(|seen| seen.sent).sum::<u64>(), 1_000_000);
    assert_eq!(bench.proxy.traffic("POST").requests, 1);
}

#[tokio::test]
async fn who_takes_no_large_requests_gets_pieces() {
    let bench = Bench::new();
    let web = bench.repository("web");
    bench.proxy.largest(3 << 20);
    let pack = noise(9_000_000, 1);
    let digest = send(&web, &pack).await;
    assert_eq!(web.blob(&digest, 1 << 30).await.unwrap(), pack);
    let pieces = bench.proxy.requests().into_iter().filter(|seen| seen.method == "PATCH" && seen.status == Some(202)).count();
    assert!(pieces >= 3, "{pieces}");
    // A piece that is cut off before it begins: the rest stays.
    let pack = noise(9_000_000, 2);
    bench.proxy.forget();
    bench.proxy.fault(On::method("PATCH").skip(3), Fault::Reset);
    assert_eq!(web.blob(&send(&web, &pack).await, 1 << 30).await.unwrap(), pack);
    assert_eq!(bench.proxy.traffic("POST").requests, 1);
    assert_eq!(bench.proxy.traffic("PATCH").sent, 9_000_000);
}

#[tokio::test]
async fn servers_are_left_alone_as_long_as_they_ask() {
    let bench = Bench::new();
    let web = bench.repository("web");
    let digest = image(&web, "1.0.0", &noise(10, 1)).await;
    let bound = web.limit().bound();
    bench.proxy.fault(On::any(), Fault::retry_after(429, "1"));
    let since = Instant::now();
    assert_eq!(web.resolve("1.0.0").await.unwrap(), Some(digest));
    assert!(since.elapsed() >= Duration::from_secs(1), "{:?}", since.elapsed());
    assert!(web.limit().bound() < bound, "{:?}", web.limit());
    // A date that is long gone is no wait.
    bench.proxy.fault(On::any().times(3), Fault::retry_after(503, "Wed, 21 Oct 2015 07:28:00 GMT"));
    assert_eq!(web.resolve("1.0.0").await.unwrap(), Some(digest));
    // Longer than there is patience: said, and not waited for.
    bench.proxy.fault(On::any(), Fault::retry_after(429, "3600"));
    let since = Instant::now();
    let error = web.resolve("1.0.0").await.unwrap_err();
    assert!(since.elapsed() < Duration::from_secs(60));
    assert_eq!(error.kind(), Code::Infrastructure);
    assert!(error.next_move().unwrap_or_default().contains("3600 s"), "{:?}", error.next_move());
}

#[tokio::test]
async fn a_registry_that_is_restarted_is_waited_for() {
    let mut bench = Bench::new();
    let digest = image(&bench.repository("web"), "1.0.0", &noise(10, 1)).await;
    let patience = Patience { failures: 10, first: Duration::from_millis(50), longest: Duration::from_secs(3) };
    // Without the proxy, which would answer for it.
    let client = Client::new(Options { patience, ..bench.options() }).unwrap();
    let web = client.repository(bench.registry.address(), "web").unwrap();
    assert_eq!(web.resolve("1.0.0").await.unwrap(), Some(digest));
    bench.registry.stop();
    let asked = tokio::spawn({
        let web = web.clone();
        async move { web.resolve("1.0.0").await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    bench.registry.start_again().unwrap();
    assert_eq!(asked.await.unwrap().unwrap(), Some(digest));
    assert!(bench.heard.notes().iter().any(|note| note.contains("cannot be reached")), "{:?}", bench.heard.notes());
}

#[tokio::test]
async fn a_host_that_is_not_there_is_given_up_soon() {
    let bench = Bench::new();
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let host = format!("127.0.0.1:{port}");
    let web = bench.client().repository(&host, "web").unwrap();
    let error = web.tags().await.unwrap_err();
    assert_eq!(error.kind(), Code::Infrastructure);
    assert!(error.chain().contains(&host), "{error:?}");
    assert_eq!(bench.heard.notes().len(), 2, "{:?}", bench.heard.notes());
}

#[tokio::test]
async fn credentials_go_to_the_registry_alone() {
    let bench = Bench::new();
    let elsewhere = Proxy::before(bench.registry.address()).unwrap();
    bench.proxy.tokens(kiln_testing::Tokens {
        user: "me".into(),
        password: "hunter2-hunter2".into(),
        lifetime: Duration::from_secs(300),
        anonymous: false,
    });
    let config = tempfile::NamedTempFile::new().unwrap();
    let json = json!({ "auths": { bench.proxy.address(): { "username": "me", "password": "hunter2-hunter2" } } });
    std::fs::write(config.path(), json.to_string()).unwrap();
    let client = Client::new(Options { docker_config: Some(config.path().into()), ..bench.options() }).unwrap();
    let web = client.repository(bench.proxy.address(), "web").unwrap();
    let pack = noise(500_000, 1);
    let digest = send(&web, &pack).await;
    bench.proxy.forget();
    let to = format!("http://{}", elsewhere.address());
    bench.proxy.fault(On::any().path("/blobs/sha256:").always(), Fault::Redirect(to));
    elsewhere.fault(On::method("GET"), Fault::CutAnswer(200_000));
    assert_eq!(web.blob(&digest, 1 << 30).await.unwrap(), pack);
    assert_eq!(web.blob_size(&digest).await.unwrap(), Some(500_000));
    assert!(bench.proxy.requests().iter().all(|seen| seen.authorization.is_some()));
    let requests = elsewhere.requests();
    assert_eq!(requests.len(), 3);
    assert!(requests.iter().all(|seen| seen.authorization.is_none()), "{requests:?}");
    // What the other one answers is said to be its answer.
    elsewhere.fault(On::method("GET"), Fault::status(403));
    let error = web.blob(&digest, 1 << 30).await.unwrap_err();
    assert!(error.chain().contains(&format!("{} answered 403", elsewhere.address())), "{error:?}");
    assert!(!format!("{error:?} {:?}", bench.heard.notes()).contains("hunter2"));
}

#[tokio::test]
async fn a_registry_that_falls_silent_is_taken_for_gone() {
    let bench = Bench::new();
    let client = Client::new(Options { silence: Duration::from_millis(1500), ..bench.options() }).unwrap();
    let web = client.repository(bench.proxy.address(), "web").unwrap();
    let pack = noise(1_000_000, 1);
    for (method, path) in [("POST", "/blobs/"), ("PATCH", "/blobs/"), ("PUT", "/blobs/"), ("GET", "/blobs/sha256:")] {
        bench.proxy.fault(On::method(method).path(path), Fault::Hang);
    }
    let digest = send(&web, &pack).await;
    assert_eq!(web.blob(&digest, 1 << 30).await.unwrap(), pack);
    let notes = bench.heard.notes();
    assert!(notes.iter().filter(|note| note.contains("said nothing")).count() == 4, "{notes:?}");
    // Slow is not silent, in either direction: two seconds in all.
    bench.proxy.fault(On::method("PATCH"), Fault::SlowRequest(500_000));
    bench.proxy.fault(On::method("GET"), Fault::SlowAnswer(500_000));
    let other = noise(1_000_000, 2);
    let before = bench.heard.notes().len();
    assert_eq!(web.blob(&send(&web, &other).await, 1 << 30).await.unwrap(), other);
    assert_eq!(bench.heard.notes().len(), before, "{:?}", bench.heard.notes());
}

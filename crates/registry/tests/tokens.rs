//! Bearer tokens: a real registry behind a proxy that gives tokens out and
//! checks them.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{Bench, image, noise, send};
use kiln_model::Code;
use kiln_registry::{Client, Options};
use kiln_testing::{Fault, On, Tokens};
use serde_json::{Value, json};
use std::time::Duration;

const PASSWORD: &str = "hunter2-hunter2";

fn bench(lifetime: u64) -> Bench {
    let bench = Bench::new();
    bench.proxy.tokens(Tokens { user: "me".into(), password: PASSWORD.into(), lifetime: Duration::from_secs(lifetime), anonymous: true });
    bench
}

/// A client with this entry for the proxy.
fn client(bench: &Bench, entry: &Value) -> Client {
    let path = bench.config.with_file_name("tokens.json");
    std::fs::write(&path, json!({ "auths": { bench.proxy.address(): entry } }).to_string()).unwrap();
    Client::new(Options { docker_config: Some(path), ..bench.options() }).unwrap()
}

fn me() -> Value {
    json!({ "username": "me", "password": PASSWORD })
}

#[tokio::test]
async fn one_token_for_each_kind_of_work() {
    let bench = bench(300);
    let client = client(&bench, &me());
    let web = client.repository(bench.proxy.address(), "team/web").unwrap();
    let pack = noise(500_000, 1);
    image(&web, "1.0.0", &pack).await;
    assert_eq!(bench.proxy.tokens_issued(), 1);
    assert_eq!(web.tags().await.unwrap(), ["1.0.0"]);
    assert!(web.manifest("1.0.0").await.unwrap().is_some());
    assert_eq!(bench.proxy.tokens_issued(), 2);
    // One for both repositories.
    let copy = client.repository(bench.proxy.address(), "copy").unwrap();
    assert!(copy.mount(&kiln_model::Digest::of(&pack), "team/web").await.unwrap());
    assert_eq!(bench.proxy.tokens_issued(), 3);
    // No request but the very first ones was refused.
    let refused = bench.proxy.requests().iter().filter(|seen| seen.status == Some(401)).count();
    assert!(refused <= 2, "{refused}");
    assert!(bench.heard.notes().is_empty(), "{:?}", bench.heard.notes());
}

#[tokio::test]
async fn many_at_once_get_one_token() {
    let bench = bench(300);
    let web = client(&bench, &me()).repository(bench.proxy.address(), "web").unwrap();
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let web = web.clone();
            tokio::spawn(async move { web.resolve("x").await })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.unwrap().unwrap(), None);
    }
    assert!(bench.proxy.tokens_issued() <= 2, "{}", bench.proxy.tokens_issued());
}

#[tokio::test]
async fn tokens_are_renewed() {
    let bench = bench(1);
    let web = client(&bench, &me()).repository(bench.proxy.address(), "web").unwrap();
    let digest = image(&web, "1.0.0", &noise(10, 1)).await;
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert_eq!(web.resolve("1.0.0").await.unwrap(), Some(digest));
    }
    assert!(bench.proxy.tokens_issued() >= 3);
    // One that ends sooner than its server said, in the middle of an upload.
    let pack = noise(1_000_000, 2);
    bench.proxy.fault(
        On::method("PATCH"),
        Fault::answer(
            401,
            &[("WWW-Authenticate", &format!("Bearer realm=\"http://{}/token\",service=\"kiln-tests\"", bench.proxy.address()))],
            "",
        ),
    );
    assert_eq!(web.blob(&send(&web, &pack).await, 1 << 30).await.unwrap(), pack);
}

#[tokio::test]
async fn without_a_login_one_may_read() {
    let bench = bench(300);
    let address = bench.proxy.address().to_owned();
    let mine = client(&bench, &me());
    let digest = image(&mine.repository(&address, "web").unwrap(), "1.0.0", &noise(10, 1)).await;
    let nobody = Client::new(bench.options()).unwrap().repository(&address, "web").unwrap();
    assert_eq!(nobody.resolve("1.0.0").await.unwrap(), Some(digest));
    let pack = noise(10, 2);
    let error = nobody.upload(&kiln_model::Digest::of(&pack), 10, &pack, &|_| ()).await.unwrap_err();
    assert_eq!(error.kind(), Code::Failed);
    assert!(error.details().join(" ").contains("without a login"), "{error:?}");
    assert_eq!(error.next_move().map(|next| next.contains(&format!("docker login {address}"))), Some(true));
}

#[tokio::test]
async fn refresh_tokens_and_wrong_ones() {
    let bench = bench(300);
    let address = bench.proxy.address().to_owned();
    let web = client(&bench, &json!({ "auth": "bWU6", "identitytoken": PASSWORD })).repository(&address, "web").unwrap();
    image(&web, "1.0.0", &noise(10, 1)).await;
    for entry in [json!({ "identitytoken": "hunter3-hunter3" }), json!({ "username": "me", "password": "hunter3-hunter3" })] {
        let web = client(&bench, &entry).repository(&address, "web").unwrap();
        let error = web.tags().await.unwrap_err();
        let text = format!("{error:?} {:?}", error.next_move());
        assert!(error.kind() == Code::Failed && text.contains("docker login"), "{text}");
        assert!(!text.contains("hunter3"), "{text}");
    }
    // The token server's troubles pass like all others.
    let web = client(&bench, &me()).repository(&address, "web").unwrap();
    bench.proxy.fault(On::method("GET").path("/tags/"), Fault::status(503));
    assert_eq!(web.tags().await.unwrap(), ["1.0.0"]);
}

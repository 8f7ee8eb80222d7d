//! A registry, a proxy before it, and a client that remembers what was told.

#![allow(dead_code, reason = "not every test uses all of it")]
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use kiln_model::Digest;
use kiln_model::event::{Event, Reporter, Reports};
use kiln_model::secret::Redactor;
use kiln_registry::{Client, Options, Patience, Repository};
use kiln_testing::{Proxy, Registry};
use serde_json::{Value, json};

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Remembers what was reported.
#[derive(Default)]
pub(crate) struct Heard(Mutex<Vec<String>>);

impl Reporter for Heard {
    fn report(&self, event: Event) {
        if let Event::Note { message } | Event::Warning { message } = event {
            self.0.lock().unwrap().push(message);
        }
    }
}

impl Heard {
    pub(crate) fn notes(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

pub(crate) struct Bench {
    pub(crate) registry: Registry,
    pub(crate) proxy: Proxy,
    pub(crate) heard: Arc<Heard>,
    pub(crate) config: PathBuf,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::of(Registry::builder().start().unwrap())
    }

    pub(crate) fn of(registry: Registry) -> Self {
        let proxy = Proxy::before(registry.address()).unwrap();
        let config = registry.docker_config(&[proxy.address()]).unwrap();
        Self { registry, proxy, heard: Arc::default(), config }
    }

    pub(crate) fn options(&self) -> Options {
        Options {
            docker_config: Some(self.config.clone()),
            reports: Reports::new(self.heard.clone(), Redactor::default()),
            patience: patience(),
            ..Options::default()
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.options()).unwrap()
    }

    /// A repository, through the proxy.
    pub(crate) fn repository(&self, name: &str) -> Repository {
        self.client().repository(self.proxy.address(), name).unwrap()
    }
}

pub(crate) fn patience() -> Patience {
    Patience { failures: 6, first: Duration::from_millis(5), longest: Duration::from_secs(3) }
}

/// Bytes that do not repeat.
pub(crate) fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed ^ 0x2545_f491_4f6c_dd1d;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

/// Sends `bytes` as a blob.
pub(crate) async fn send(repository: &Repository, bytes: &Bytes) -> Digest {
    let digest = Digest::of(bytes);
    repository.upload(&digest, bytes.len() as u64, bytes, &|_| ()).await.unwrap();
    digest
}

/// A manifest with these layers, whose config is the empty one.
pub(crate) fn manifest(layers: &[&Bytes], more: &Value) -> Vec<u8> {
    let layers: Vec<Value> = layers
        .iter()
        .map(|layer| json!({ "mediaType": "application/octet-stream", "digest": Digest::of(layer), "size": layer.len() }))
        .collect();
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": "application/x-test",
        "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of("{}"), "size": 2, "data": "e30=" },
        "layers": layers,
    });
    if let (Some(manifest), Some(more)) = (manifest.as_object_mut(), more.as_object()) {
        manifest.extend(more.clone());
    }
    serde_json::to_vec(&manifest).unwrap()
}

/// Sends a manifest with one layer of these bytes to a tag.
pub(crate) async fn image(repository: &Repository, tag: &str, layer: &Bytes) -> Digest {
    send(repository, &Bytes::from_static(b"{}")).await;
    send(repository, layer).await;
    repository.put_manifest(tag, MANIFEST, &manifest(&[layer], &json!({}))).await.unwrap().digest
}

//! A client of OCI distribution registries.
//!
//! It knows hosts, repositories, manifests and blobs, and nothing of what is in
//! them.
//!
//! ```text
//!  Client ──► Repository          manifests, tags               repository.rs
//!    │           ├── referrers, attach                           referrers.rs
//!    │           ├── blob_size, mount, blob, read ──► Body       blob.rs
//!    │           └── upload ◄── BlobSource                       upload.rs
//!    └── Host   one request; redirects; waiting for what passes  host.rs
//!           ├── Auth    passwords and tokens                     auth.rs, challenge.rs
//!           ├── Logins  config.json, credential helpers          config.rs
//!           └── Limit   how many transfers at once               limit.rs
//! ```
//!
//! What holds everywhere:
//!
//! - Every byte is verified where a digest is known: manifests and whole blobs
//!   here, parts of blobs by the caller, who knows the digests of their blocks.
//! - Whatever passes is waited for ([`Patience`]): connections that are refused,
//!   reset or silent, 408, 425, 429 and 5xx, as long as `Retry-After` says.
//!   Each wait is told as a note. Reads go on at the byte where they were cut,
//!   uploads at the byte that the registry holds.
//! - https, but for loopback and on request, where https is tried first.
//!   Credentials go to the registry and to the token server that it names, and
//!   to nobody that one of them redirects to.
//! - Passwords and tokens are in no error, no event and no `Debug`.

mod auth;
mod blob;
mod challenge;
mod config;
mod headers;
mod host;
mod limit;
mod referrers;
mod repository;
mod upload;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use kiln_http::{Patience, Settings};
use kiln_model::event::Reports;
use kiln_model::{Code, Error, Result};
use reqwest::Url;

pub use blob::Body;
pub use limit::{Limit, Permit};
pub use repository::{Fetched, Pushed, Repository};
pub use upload::{BlobSource, FileSource};

use host::{Host, Shared};

/// How a [`Client`] is to behave. Write `Options { …, ..Options::default() }`.
#[derive(Clone)]
pub struct Options {
    /// Proxy and certificates.
    pub http: Settings,
    /// Whether plain http may be spoken with hosts other than this machine,
    /// when they do not answer https.
    pub plain_http: bool,
    /// The file of credentials. By default all of `$REGISTRY_AUTH_FILE`,
    /// `$DOCKER_CONFIG/config.json` (or `~/.docker/config.json`) and
    /// `$XDG_RUNTIME_DIR/containers/auth.json`, of which the first that knows
    /// the host counts.
    pub docker_config: Option<PathBuf>,
    /// Where waits are told, as notes. Passwords and tokens are added to its
    /// redactor.
    pub reports: Reports,
    /// How long to wait for what passes.
    pub patience: Patience,
    /// A registry that neither sends nor takes a byte for this long is taken
    /// for gone, which passes.
    pub silence: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            http: Settings::default(),
            plain_http: false,
            docker_config: None,
            reports: Reports::silent(),
            // A minute in all: registries are restarted and moved while they are used.
            patience: Patience { failures: 8, ..Patience::default() },
            silence: kiln_http::STALL,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("plain_http", &self.plain_http)
            .field("docker_config", &self.docker_config)
            .field("patience", &self.patience)
            .field("silence", &self.silence)
            .finish_non_exhaustive()
    }
}

/// A client of registries; one per process. Clones share connections, tokens
/// and what is known of each host.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    known: Arc<Mutex<Known>>,
}

/// What was asked for before, which shares more than its name.
#[derive(Default)]
struct Known {
    hosts: HashMap<String, Arc<Host>>,
    repositories: HashMap<(String, String), Repository>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

impl Client {
    /// A client. Touches no network.
    ///
    /// # Errors
    /// [`Code::Usage`] for a proxy or a file of certificates that cannot be
    /// used.
    pub fn new(options: Options) -> Result<Self> {
        let shared = Shared::new(options);
        // Mistakes in the settings are told now, and not in the middle.
        if let Ok(url) = Url::parse("http://registry.invalid/") {
            shared.client(&url)?;
        }
        Ok(Self { shared: Arc::new(shared), known: Arc::default() })
    }

    /// The repository `name` at `host` (`host` or `host:port`). Touches no
    /// network.
    ///
    /// # Errors
    /// [`Code::Usage`] when either is not what it should be.
    pub fn repository(&self, host: &str, name: &str) -> Result<Repository> {
        let wrong = |what: String| Error::new(Code::Usage, what).next("write HOST/NAMESPACE/NAME, or HOST:PORT/NAMESPACE/NAME");
        let plain = Url::parse(&format!("https://{host}/")).is_ok_and(|url| {
            url.host_str().is_some_and(|host| !host.is_empty())
                && url.path() == "/"
                && url.username().is_empty()
                && url.password().is_none()
        });
        if host.is_empty() || !plain || host.contains(['/', '?', '#', '@', '\\']) || host.contains(char::is_whitespace) {
            return Err(wrong(format!("`{host}` is not the name of a registry's host")));
        }
        if !is_name(name) {
            return Err(wrong(format!("`{name}` is not the name of a repository")));
        }
        // Docker's own registry keeps what has no namespace in one of its own.
        let hub = matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io");
        let name = if hub && !name.contains('/') { format!("library/{name}") } else { name.to_owned() };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Known { hosts, repositories } = &mut *known;
        let at = hosts.entry(host.to_owned()).or_insert_with(|| Arc::new(Host::new(host, self.shared.clone())));
        let key = (host.to_owned(), name.clone());
        Ok(repositories.entry(key).or_insert_with(|| Repository::new(at.clone(), name)).clone())
    }
}

/// Whether `name` is a repository's, after the distribution specification.
fn is_name(name: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && part.ends_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
            && !part.contains("..")
    };
    name.len() <= 255 && name.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_names() {
        let client = Client::new(Options::default()).unwrap();
        for (host, name) in [("ghcr.io", "a/b-c.d_e/f0"), ("localhost:5000", "web"), ("[::1]:5000", "web"), ("registry", "a")] {
            let repository = client.repository(host, name).unwrap();
            assert_eq!((repository.host(), repository.name()), (host, name));
        }
        assert_eq!(client.repository("docker.io", "debian").unwrap().name(), "library/debian");
        for (host, name) in [
            ("", "a"),
            ("h/x", "a"),
            ("u:p@h", "a"),
            ("h?x", "a"),
            ("h:99999", "a"),
            ("h h", "a"),
            ("h", ""),
            ("h", "A"),
            ("h", "a//b"),
            ("h", "../a"),
            ("h", "a/../b"),
            ("h", "a..b"),
            ("h", "a:b"),
            ("h", "-a"),
        ] {
            let error = client.repository(host, name).map(|_| ()).unwrap_err();
            assert_eq!(error.kind(), Code::Usage, "{host} {name}");
        }
    }

    /// What is awaited can be spawned, also behind `dyn`.
    #[allow(dead_code, reason = "that it compiles is the test")]
    fn futures_are_send(repository: &Repository, body: &mut Body, source: &dyn BlobSource) {
        fn send<T: Send>(_: T) {}
        let digest = kiln_model::Digest::of("");
        send(repository.resolve(""));
        send(repository.manifest(""));
        send(repository.put_manifest("", "", b""));
        send(repository.delete_manifest(&digest));
        send(repository.tags());
        send(repository.referrers(&digest, None));
        send(repository.attach(&digest, "", "", b"", &std::collections::BTreeMap::new()));
        send(repository.blob_size(&digest));
        send(repository.mount(&digest, ""));
        send(repository.blob(&digest, 0));
        send(repository.read(&digest, 0..0));
        send(repository.upload(&digest, 0, source, &|_| ()));
        send(body.chunk());
        send(repository.limit().acquire());
    }

    #[test]
    fn wrong_settings_are_told_at_once() {
        let http = Settings { ca_certificates: Some("/nowhere/ca.pem".into()), ..Settings::default() };
        let error = Client::new(Options { http, ..Options::default() }).map(|_| ()).unwrap_err();
        assert!(error.chain().contains("/nowhere/ca.pem"), "{error:?}");
    }
}

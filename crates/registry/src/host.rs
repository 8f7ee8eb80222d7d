//! One registry: how it is reached, asked, waited for and understood.
//!
//! ```text
//!  ask ──► send ──► follow          one request, redirects, 401 answered once
//!   │        └── auth.rs            the header that proves who one is
//!   └── Retry                       what passes is waited for, and told
//! ```

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kiln_http::{Failed, Kind, Manner, is_loopback, may_follow, passes, retry_after};
use kiln_model::secret::Secret;
use kiln_model::{Code, Error, Result};
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;

use crate::Options;
use crate::auth::{Auth, Scope};
use crate::config::{Login, Logins};
use crate::headers::text;
use crate::limit::Limit;

/// An error's explanation is read up to this many bytes.
const EXPLANATION: u64 = 64 << 10;
/// A host that never answered is not asked more often than this.
const STRANGER: u32 = 3;
/// How long a host has to show whether it speaks TLS.
const PROBE: Duration = Duration::from_secs(10);

/// What all hosts share.
pub(crate) struct Shared {
    pub(crate) options: Options,
    logins: Logins,
    /// By loopback and TLS, which is what they differ in.
    clients: Mutex<HashMap<(bool, bool), Client>>,
}

impl Shared {
    pub(crate) fn new(options: Options) -> Self {
        let logins = Logins::new(options.docker_config.clone());
        Self { options, logins, clients: Mutex::default() }
    }

    pub(crate) fn client(&self, url: &Url) -> Result<Client> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (is_loopback(url), url.scheme() == "https");
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let client = kiln_http::client(&self.options.http, url, Manner::Bare)?;
        clients.insert(key, client.clone());
        Ok(client)
    }
}

/// One registry.
pub(crate) struct Host {
    name: String,
    /// `name`, but for Docker's own registry, whose name is not its address.
    address: String,
    shared: Arc<Shared>,
    base: tokio::sync::OnceCell<Url>,
    auth: Auth,
    pub(crate) limit: Limit,
    /// Whether it ever answered.
    reached: AtomicBool,
    /// Whether it is known to have no referrers API.
    pub(crate) without_referrers: AtomicBool,
    /// Until when it asked to be left alone.
    quiet: Mutex<Option<Instant>>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("name", &self.name).field("base", &self.base.get()).field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// Where a request goes.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    /// Below `/v2/`.
    Path(String),
    /// Where an answer pointed.
    At(Url),
}

/// A request that can be sent again.
#[derive(Debug, Clone)]
pub(crate) struct Ask<'a> {
    /// For people, after `cannot`.
    pub(crate) what: String,
    pub(crate) repository: &'a str,
    pub(crate) method: Method,
    pub(crate) target: Target,
    pub(crate) scope: Scope,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Bytes that the answer may have.
    pub(crate) limit: u64,
}

impl<'a> Ask<'a> {
    pub(crate) fn new(repository: &'a str, what: String, method: Method, target: Target, scope: Scope) -> Self {
        Self { what, repository, method, target, scope, headers: HeaderMap::new(), body: Bytes::new(), limit: EXPLANATION }
    }

    pub(crate) fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }

    pub(crate) fn body(mut self, body: Bytes) -> Self {
        self.body = body;
        self
    }

    pub(crate) fn limit(mut self, limit: u64) -> Self {
        self.limit = limit.max(EXPLANATION);
        self
    }
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) bytes: Vec<u8>,
    /// Who answered, after redirects.
    pub(crate) url: Url,
    /// Whether an earlier attempt failed, which may have been done all the same.
    pub(crate) again: bool,
}

impl Answer {
    /// What the registry says went wrong, in its words.
    pub(crate) fn said(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Body {
            errors: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        let plain = |text: &str| -> String {
            let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
            text.trim().to_owned()
        };
        if let Ok(body) = serde_json::from_slice::<Body>(&self.bytes) {
            let one = |entry: &Entry| plain(&format!("{}: {}", entry.code, entry.message));
            let all: Vec<String> = body.errors.iter().take(3).map(one).collect();
            return (!all.is_empty()).then(|| all.join("; "));
        }
        let html = text(&self.headers, header::CONTENT_TYPE).is_some_and(|kind| kind.contains("html"));
        let first = std::str::from_utf8(&self.bytes).ok()?.lines().map(plain).find(|line| !line.is_empty())?;
        (!html).then_some(first)
    }
}

impl Host {
    pub(crate) fn new(name: &str, shared: Arc<Shared>) -> Self {
        let address = if matches!(name, "docker.io" | "index.docker.io") { "registry-1.docker.io" } else { name };
        Self {
            name: name.to_owned(),
            address: address.to_owned(),
            shared,
            base: tokio::sync::OnceCell::new(),
            auth: Auth::default(),
            limit: Limit::default(),
            reached: AtomicBool::new(false),
            without_referrers: AtomicBool::new(false),
            quiet: Mutex::new(None),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// After how long without a byte it is taken for gone.
    pub(crate) fn silence(&self) -> Duration {
        self.shared.options.silence
    }

    /// Whether plain http may be spoken with it.
    pub(crate) fn may_be_plain(&self) -> bool {
        self.shared.options.plain_http || Url::parse(&format!("http://{}/", self.address)).is_ok_and(|url| is_loopback(&url))
    }

    pub(crate) fn client_for(&self, url: &Url) -> Result<Client> {
        self.shared.client(url)
    }

    /// Sees to it that `secret` is in no event.
    pub(crate) fn keep_secret(&self, secret: &Secret) {
        self.shared.options.reports.redactor().add(secret);
    }

    /// Who one is there.
    pub(crate) async fn login(&self, repository: &str) -> Result<Option<Login>> {
        let login = self.shared.logins.find(&self.name, repository).await?;
        if let Some(login) = &login {
            self.keep_secret(login.secret());
        }
        Ok(login)
    }

    pub(crate) fn note(&self, message: impl Into<String>) {
        self.shared.options.reports.note(message);
    }

    /// Where its addresses begin: https, but for hosts that may be plain and
    /// answer nothing else.
    pub(crate) async fn base(&self) -> Result<Url, Failed> {
        self.base.get_or_try_init(|| self.find_base()).await.cloned()
    }

    /// Whether `url` is the registry itself, and not where it redirects to.
    pub(crate) fn is_own(&self, url: &Url) -> bool {
        self.base.get().is_some_and(|base| base.origin() == url.origin())
    }

    async fn find_base(&self) -> Result<Url, Failed> {
        let what = format!("reach the registry {}", self.name);
        let parse = |scheme: &str| {
            Url::parse(&format!("{scheme}://{}/v2/", self.address))
                .map_err(|_| Error::new(Code::Usage, format!("`{}` is not the name of a host", self.name)))
        };
        let https = parse("https")?;
        if !self.may_be_plain() {
            return Ok(https);
        }
        // Nothing that is asked here proves who one is.
        if let Ok(client) = self.client_for(&https) {
            match tokio::time::timeout(PROBE, client.get(https.clone()).send()).await {
                Ok(Ok(response)) => {
                    self.met(&response).await;
                    return Ok(https);
                }
                // Who speaks TLS, however badly, is not asked in the clear.
                Ok(Err(error)) if kiln_http::speaks_tls(&error) => return Err(self.broken(&what, &https, error)),
                Ok(Err(_)) | Err(_) => {}
            }
        }
        let http = parse("http")?;
        match tokio::time::timeout(PROBE, self.client_for(&http)?.get(http.clone()).send()).await {
            Ok(Ok(response)) => {
                self.met(&response).await;
                Ok(http)
            }
            Ok(Err(error)) => Err(self.broken(&what, &http, error)),
            Err(_) => Err(silent(&what, &self.name, PROBE)),
        }
    }

    async fn met(&self, response: &Response) {
        self.reached.store(true, Ordering::Relaxed);
        if response.status() == StatusCode::UNAUTHORIZED {
            self.auth.learn(response.headers(), &Scope::on("", ""), None).await;
        }
    }

    /// Resolves where an answer points to, such as an upload session.
    ///
    /// # Errors
    /// When that leaves https.
    pub(crate) async fn located(&self, from: &Url, location: &str) -> Result<Url, Failed> {
        let base = self.base().await?;
        let wrong = |why: String| Error::new(Code::Failed, format!("{} points to an address that cannot be used: {why}", self.name));
        let mut url = from.join(location).map_err(|error| wrong(error.to_string()))?;
        // Registries behind a proxy often do not know that it speaks TLS.
        if base.scheme() == "https" && url.scheme() == "http" && url.host_str() == base.host_str() {
            let _ = url.set_scheme("https");
            let _ = url.set_port(base.port());
        }
        may_follow(std::slice::from_ref(&base), &url).map_err(wrong)?;
        Ok(url)
    }

    /// Waits while it has asked to be left alone.
    pub(crate) async fn leave_alone(&self) {
        let until = *self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(until) = until {
            tokio::time::sleep_until(until.into()).await;
        }
    }

    fn quiet_for(&self, wait: Duration) {
        let until = Instant::now() + wait;
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        *quiet = Some(quiet.map_or(until, |old| old.max(until)));
    }

    /// The header that proves who one is, for an address that may see it.
    pub(crate) async fn authorization(&self, url: &Url, repository: &str, scope: &Scope) -> Result<Option<HeaderValue>, Failed> {
        // Nobody but the registry itself is told.
        if url.origin() != self.base().await?.origin() {
            return Ok(None);
        }
        self.auth.header(self, repository, scope).await
    }

    /// Learns from a 401; tells whether asking again can help.
    pub(crate) async fn learn(&self, response: &Response, scope: &Scope, sent: Option<&HeaderValue>) -> bool {
        self.is_own(response.url()) && self.auth.learn(response.headers(), scope, sent).await
    }

    /// Sends a request once. The answer's status is the caller's to judge.
    pub(crate) async fn send(&self, ask: &Ask<'_>) -> Result<Response, Failed> {
        let base = self.base().await?;
        let url = match &ask.target {
            Target::Path(path) => {
                base.join(path).map_err(|_| Error::new(Code::Usage, format!("cannot {}: that is no address", ask.what)))?
            }
            Target::At(url) => url.clone(),
        };
        let mut learnt = false;
        loop {
            self.leave_alone().await;
            let sent = self.authorization(&url, ask.repository, &ask.scope).await?;
            let response = self.follow(ask, &base, url.clone(), sent.as_ref()).await?;
            self.reached.store(true, Ordering::Relaxed);
            if response.status() == StatusCode::UNAUTHORIZED && !learnt && self.learn(&response, &ask.scope, sent.as_ref()).await {
                learnt = true;
                continue;
            }
            return Ok(response);
        }
    }

    async fn follow(&self, ask: &Ask<'_>, base: &Url, mut url: Url, sent: Option<&HeaderValue>) -> Result<Response, Failed> {
        let mut chain = Vec::new();
        loop {
            let mut request = self.client_for(&url)?.request(ask.method.clone(), url.clone()).headers(ask.headers.clone());
            if let Some(sent) = sent.filter(|_| url.origin() == base.origin()) {
                request = request.header(header::AUTHORIZATION, sent.clone());
            }
            if !ask.body.is_empty() || matches!(ask.method, Method::POST | Method::PUT) {
                request = request.body(ask.body.clone());
            }
            let response = match tokio::time::timeout(self.silence(), request.send()).await {
                Ok(response) => response.map_err(|error| self.broken(&ask.what, &url, error))?,
                Err(_) => return Err(silent(&ask.what, &named(&url), self.silence())),
            };
            let may = match response.status().as_u16() {
                307 | 308 => true,
                301..=303 => matches!(ask.method, Method::GET | Method::HEAD),
                _ => false,
            };
            let Some(location) = text(response.headers(), header::LOCATION).filter(|_| may) else { return Ok(response) };
            let wrong = |why: String| {
                Failed::Final(
                    Error::new(Code::Failed, format!("cannot {}: {} redirects where kiln does not follow: {why}", ask.what, named(&url)))
                        .next("tell whoever runs the registry"),
                )
            };
            let next = url.join(location).map_err(|error| wrong(error.to_string()))?;
            chain.push(url.clone());
            may_follow(&chain, &next).map_err(wrong)?;
            url = next;
        }
    }

    /// Reads an answer to its end, of at most `limit` bytes.
    pub(crate) async fn collect(&self, what: &str, mut response: Response, limit: u64) -> Result<Answer, Failed> {
        let (status, headers, url) = (response.status(), response.headers().clone(), response.url().clone());
        let mut bytes = Vec::new();
        loop {
            match tokio::time::timeout(self.silence(), response.chunk()).await {
                Ok(Ok(Some(chunk))) => bytes.extend_from_slice(&chunk),
                Ok(Ok(None)) => return Ok(Answer { status, headers, bytes, url, again: false }),
                Ok(Err(error)) => return Err(self.broken(what, &url, error)),
                Err(_) => return Err(silent(what, &named(&url), self.silence())),
            }
            if bytes.len() as u64 > limit {
                let error = Error::new(Code::Failed, format!("cannot {what}: the answer of {} has more than {limit} bytes", named(&url)));
                return Err(Failed::Final(error.next("check that this is what you meant: nothing of the kind is that large")));
            }
        }
    }

    /// Sends a request that is not the registry's (to a token server), once.
    pub(crate) async fn receive(&self, request: RequestBuilder, what: &str, limit: u64) -> Result<Answer, Failed> {
        let (client, request) = request.build_split();
        let request = request
            .map_err(|error| Error::new(Code::Failed, format!("cannot {what}: the request cannot be made")).because(error.without_url()))?;
        let url = request.url().clone();
        match tokio::time::timeout(self.silence(), client.execute(request)).await {
            Ok(Ok(response)) => self.collect(what, response, limit).await,
            Ok(Err(error)) => Err(self.broken(what, &url, error)),
            Err(_) => Err(silent(what, &named(&url), self.silence())),
        }
    }

    /// Asks until there is an answer other than one that passes.
    ///
    /// # Errors
    /// [`Code::Infrastructure`] when the host fails for longer than there is
    /// patience.
    pub(crate) async fn ask(self: &Arc<Self>, ask: &Ask<'_>) -> Result<Answer> {
        let mut retry = Retry::new(self);
        loop {
            let failed = match self.ask_once(ask).await {
                Ok(answer) if !passes(answer.status) => return Ok(Answer { again: retry.failures > 0, ..answer }),
                Ok(answer) => self.sort(&ask.what, &named(&answer.url), &answer, None),
                Err(failed) => failed,
            };
            retry.pause(failed).await?;
        }
    }

    async fn ask_once(&self, ask: &Ask<'_>) -> Result<Answer, Failed> {
        let response = self.send(ask).await?;
        self.collect(&ask.what, response, ask.limit).await
    }

    /// The error for an answer that is not the one hoped for.
    pub(crate) async fn refused(&self, ask: &Ask<'_>, answer: &Answer) -> Error {
        match self.sorted(&ask.what, ask.repository, answer).await {
            Failed::Final(error) | Failed::Passing { error, .. } => error,
        }
    }

    /// Sorts an answer that is not the one hoped for.
    pub(crate) async fn sorted(&self, what: &str, repository: &str, answer: &Answer) -> Failed {
        let login = self.login(repository).await.ok().flatten();
        self.sort(what, &named(&answer.url), answer, login.as_ref())
    }

    /// Sorts an answer of `who` that is not the one hoped for.
    pub(crate) fn sort(&self, what: &str, who: &str, answer: &Answer, login: Option<&Login>) -> Failed {
        let status = answer.status;
        let mut error = Error::new(Code::Failed, format!("cannot {what}: {who} answered {status}"));
        if let Some(said) = answer.said() {
            error = error.detail(format!("{who} says: {}", self.shared.options.reports.redactor().clean(&said)));
        }
        if passes(status) {
            return Failed::Passing { error: error.code(Code::Infrastructure), wait: retry_after(&answer.headers) };
        }
        let name = &self.name;
        Failed::Final(match status.as_u16() {
            401 | 403 => {
                let how = match login {
                    Some(login) => format!("It was asked {}.", login.shown()),
                    None => format!("It was asked without a login: there is none for {name} in {}.", self.shared.logins.shown()),
                };
                error
                    .detail(how)
                    .next(format!("log in with `docker login {name}` as somebody who may do this, then run the same command again"))
            }
            404 => error.code(Code::NotFound).next("check the name of the host, of the repository, and the tag or digest"),
            407 => error.next("the proxy wants a login: write `[proxy] url = \"http://user:password@host:port\"`"),
            413 => error.next("ask whoever runs the registry to allow larger requests"),
            507 => error.code(Code::Infrastructure).next("the registry is full: make room there"),
            _ => error.next("look into the registry's log; if it works with other programs, tell kiln's authors"),
        })
    }

    /// Sorts the failure of a request to `url`, or of its answer's body.
    pub(crate) fn broken(&self, what: &str, url: &Url, error: reqwest::Error) -> Failed {
        let error = error.without_url();
        let kind = kiln_http::kind(&error);
        let who = named(url);
        let failed = |code, why: &str| Error::new(code, format!("cannot {what}: {who} {why}"));
        match kind {
            Kind::Passing if error.is_connect() => {
                Failed::Passing { error: failed(Code::Infrastructure, "cannot be reached").because(error), wait: None }
            }
            Kind::Passing => Failed::Passing { error: failed(Code::Infrastructure, "broke the connection off").because(error), wait: None },
            Kind::Certificate => {
                Failed::Final(failed(Code::Failed, "has a certificate that nobody here vouches for").because(error).next(
                    "check the address; for a registry with a certificate of your own, set `ca_certificates` in kiln's configuration",
                ))
            }
            Kind::Address => Failed::Final(failed(Code::Failed, "is no address that can be asked").because(error)),
        }
    }
}

/// The host (and port) of an address, for people.
pub(crate) fn named(url: &Url) -> String {
    let host = url.host_str().unwrap_or("a nameless host");
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The failure of a host that says nothing.
pub(crate) fn silent(what: &str, who: &str, for_long: Duration) -> Failed {
    let error = Error::new(Code::Infrastructure, format!("cannot {what}: {who} said nothing for {} s", for_long.as_secs()));
    Failed::Passing { error, wait: None }
}

/// Waiting for what passes: counts failures in a row, tells them, and gives up.
pub(crate) struct Retry {
    host: Arc<Host>,
    failures: u32,
}

impl Retry {
    pub(crate) fn new(host: &Arc<Host>) -> Self {
        Self { host: host.clone(), failures: 0 }
    }

    /// Something got further: the count begins anew.
    pub(crate) fn progressed(&mut self) {
        self.failures = 0;
    }

    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Waits before the next attempt, or gives the error up when there is to be
    /// none.
    pub(crate) async fn pause(&mut self, failed: Failed) -> Result<()> {
        let (error, asked) = match failed {
            Failed::Final(error) => return Err(error),
            Failed::Passing { error, wait } => (error, wait),
        };
        self.failures += 1;
        let host = &self.host;
        host.limit.too_much();
        let patience = &host.shared.options.patience;
        if let Some(asked) = asked.filter(|asked| *asked > patience.longest) {
            return Err(error.next(format!("{} asks to come back in {} s: run the same command then", host.name, asked.as_secs())));
        }
        let reached = host.reached.load(Ordering::Relaxed);
        if self.failures >= if reached { patience.failures } else { patience.failures.min(STRANGER) } {
            let check = if reached { "wait until the registry is well" } else { "check the name of the registry and the network" };
            return Err(error.next(format!("{check}, then run the same command again: it goes on with what is missing")));
        }
        // Not all at the same moment again.
        let wait = asked.unwrap_or_else(|| patience.wait(self.failures));
        let wait = wait + wait.mul_f64(random() * 0.2);
        if asked.is_some() {
            host.quiet_for(wait);
        }
        host.note(format!("{}; trying again in {:.1} s", error.chain(), wait.as_secs_f64()));
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

/// A random number from 0 to 1.
pub(crate) fn random() -> f64 {
    // Each RandomState has keys of its own.
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

//! A proxy before a registry, that makes faults, counts, and keeps tags from
//! being moved.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE, TRANSFER_ENCODING};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use kiln_model::{Digest, Result, ResultExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot};

use crate::answer::{answer, error};
use crate::fault::{Fault, Immutable, On};
use crate::flow::{End, Flow, Outgoing};
use crate::tokens::{Office, Tokens};

/// Manifests, and what else is looked into, are smaller than this many bytes.
const SMALL: usize = 8 << 20;

/// One request that came.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its method.
    pub method: String,
    /// Its path and query.
    pub path: String,
    /// Its `Range`.
    pub range: Option<String>,
    /// Its `Content-Range`.
    pub content_range: Option<String>,
    /// Its `Authorization`.
    pub authorization: Option<String>,
    /// The status that was answered; none when there was no answer.
    pub status: Option<u16>,
    /// Bytes of its body that came.
    pub sent: u64,
    /// Bytes of the answer's body that went.
    pub received: u64,
}

/// Requests and bytes of their bodies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// How many requests.
    pub requests: usize,
    /// Bytes that came from clients.
    pub sent: u64,
    /// Bytes that went to clients.
    pub received: u64,
}

/// A proxy on a loopback port, before a registry that speaks plain http.
///
/// Runs in a thread of its own, until it is dropped. Settings hold for the
/// requests that come after.
pub struct Proxy {
    name: String,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

type Which = Arc<dyn Fn(&str) -> bool + Send + Sync>;

struct Shared {
    name: String,
    registry: Mutex<String>,
    faults: Mutex<Vec<(On, Fault)>>,
    log: Mutex<Vec<Arc<Entry>>>,
    office: Mutex<Option<Office>>,
    immutable: Mutex<Option<(Immutable, Which)>>,
    /// Held while a tag is looked at and moved.
    moving: tokio::sync::Mutex<()>,
    largest: Mutex<Option<u64>>,
    /// Where upload sessions are now, by their path, if they are kept.
    sessions: Mutex<Option<HashMap<String, String>>>,
    referrers: Mutex<bool>,
}

struct Entry {
    seen: Mutex<Seen>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    /// One before the registry at `address` (`127.0.0.1:PORT`).
    ///
    /// # Errors
    /// When there is no port or no thread for it.
    pub fn before(address: &str) -> Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").trying(|| "listen on a port".into())?;
        listener.set_nonblocking(true).trying(|| "listen on a port".into())?;
        let name = listener.local_addr().trying(|| "listen on a port".into())?.to_string();
        let shared = Arc::new(Shared {
            name: name.clone(),
            registry: Mutex::new(address.to_owned()),
            faults: Mutex::default(),
            log: Mutex::default(),
            office: Mutex::default(),
            immutable: Mutex::default(),
            moving: tokio::sync::Mutex::default(),
            largest: Mutex::default(),
            sessions: Mutex::default(),
            referrers: Mutex::default(),
        });
        let (stop, stopped) = oneshot::channel();
        let for_thread = shared.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().trying(|| "start a proxy".into())?;
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = stopped => {}
                    () = accept(listener, for_thread) => {}
                }
            });
            // Whoever is in the middle of something is left there.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("proxy".into()).spawn(run).trying(|| "start a proxy".into())?;
        Ok(Self { name, shared, stop: Some(stop), thread: Some(thread) })
    }

    /// `127.0.0.1:PORT`: the host to give to clients.
    pub fn address(&self) -> &str {
        &self.name
    }

    /// Passes on to another registry from now on.
    pub fn to(&self, address: &str) {
        *lock(&self.shared.registry) = address.to_owned();
    }

    /// Does `fault` to the requests that `on` says. A request gets one fault,
    /// the first that was set and is for it.
    pub fn fault(&self, on: On, fault: Fault) -> &Self {
        lock(&self.shared.faults).push((on, fault));
        self
    }

    /// Takes all faults back.
    pub fn heal(&self) {
        lock(&self.shared.faults).clear();
    }

    /// Keeps the tags that `which` names from being moved: a manifest with
    /// another digest is refused as `how` says. Exact, however many ask at once.
    pub fn immutable(&self, how: Immutable, which: impl Fn(&str) -> bool + Send + Sync + 'static) -> &Self {
        *lock(&self.shared.immutable) = Some((how, Arc::new(which)));
        self
    }

    /// Wants tokens (`Bearer`), which it gives out itself. The registry behind
    /// sees no credentials.
    pub fn tokens(&self, tokens: Tokens) -> &Self {
        *lock(&self.shared.office) = Some(Office::new(tokens));
        self
    }

    /// How many tokens it gave out.
    pub fn tokens_issued(&self) -> usize {
        lock(&self.shared.office).as_ref().map_or(0, Office::issued)
    }

    /// Answers 413 to requests with a larger body than so many bytes.
    pub fn largest(&self, bytes: u64) -> &Self {
        *lock(&self.shared.largest) = Some(bytes);
        self
    }

    /// Makes of docker-registry, which forgets an upload session when a PATCH is
    /// cut, a registry that keeps what came ([`Fault::CutRequest`]).
    pub fn resumable(&self) -> &Self {
        lock(&self.shared.sessions).get_or_insert_default();
        self
    }

    /// Makes of it a registry that answers `OCI-Subject`, and 200 at its
    /// referrers API: with the index at the fallback tag, which it keeps itself.
    pub fn referrers(&self) -> &Self {
        *lock(&self.shared.referrers) = true;
        self
    }

    /// Every request that came, in order.
    pub fn requests(&self) -> Vec<Seen> {
        let seen = |entry: &Arc<Entry>| {
            let (sent, received) = (entry.sent.load(Ordering::SeqCst), entry.received.load(Ordering::SeqCst));
            Seen { sent, received, ..lock(&entry.seen).clone() }
        };
        lock(&self.shared.log).iter().map(seen).collect()
    }

    /// The requests with this method, and the bytes of their bodies.
    pub fn traffic(&self, method: &str) -> Traffic {
        self.sum(|seen| seen.method == method)
    }

    /// All requests, and the bytes of their bodies.
    pub fn total(&self) -> Traffic {
        self.sum(|_| true)
    }

    fn sum(&self, of: impl Fn(&Seen) -> bool) -> Traffic {
        self.requests().iter().filter(|seen| of(seen)).fold(Traffic::default(), |sum, seen| Traffic {
            requests: sum.requests + 1,
            sent: sum.sent + seen.sent,
            received: sum.received + seen.received,
        })
    }

    /// Forgets the requests that came, so that counting begins anew.
    pub fn forget(&self) {
        lock(&self.shared.log).clear();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The client's connection, to be reset.
pub(crate) struct Line(std::net::TcpStream);

impl Line {
    /// Of a connection.
    pub(crate) fn of(stream: std::net::TcpStream) -> Self {
        Self(stream)
    }

    /// Whatever is closed from now on is reset.
    fn cut(&self) {
        let _ = rustix::net::sockopt::set_socket_linger(&self.0, Some(Duration::ZERO));
    }

    /// The failure that makes hyper close the connection.
    pub(crate) fn reset(&self) -> io::Error {
        self.cut();
        io::Error::new(io::ErrorKind::ConnectionReset, "reset on demand")
    }
}

async fn accept(listener: std::net::TcpListener, shared: Arc<Shared>) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        tokio::spawn(serve(stream, shared.clone()));
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    let line = Arc::new(Line::of(stream.try_clone()?));
    let stream = TcpStream::from_std(stream)?;
    let service = service_fn(move |request| {
        let (shared, line) = (shared.clone(), line.clone());
        async move { shared.handle(request, line).await }
    });
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    Ok(())
}

/// What becomes of a request that is passed on.
#[derive(Default)]
struct Plan {
    request: Flow,
    answer: Flow,
    lose: bool,
    /// Bytes after which the request ends, while the registry keeps them.
    keep: Option<u64>,
}

impl Shared {
    async fn handle(&self, request: Request<Incoming>, line: Arc<Line>) -> io::Result<Response<Outgoing>> {
        let text = |name: HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let seen = Seen {
            method: method.to_string(),
            path: path.clone(),
            range: text(RANGE),
            content_range: text(hyper::header::CONTENT_RANGE),
            authorization: text(AUTHORIZATION),
            status: None,
            sent: 0,
            received: 0,
        };
        let entry = Arc::new(Entry { seen: Mutex::new(seen), sent: Arc::default(), received: Arc::default() });
        lock(&self.log).push(entry.clone());
        let response = self.respond(request, &path, &line, &entry).await?;
        lock(&entry.seen).status = Some(response.status().as_u16());
        if let Outgoing::Whole(bytes) = response.body() {
            entry.received.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        }
        Ok(response)
    }

    async fn respond(&self, mut request: Request<Incoming>, path: &str, line: &Arc<Line>, entry: &Entry) -> io::Result<Response<Outgoing>> {
        let method = request.method().clone();
        let (bare, query) = path.split_once('?').unwrap_or((path, ""));
        if bare == "/token" {
            return self.token(request, query).await;
        }
        {
            let office = lock(&self.office);
            if let Some(office) = office.as_ref() {
                if let Some(refusal) = office.check(&self.name, &method, bare, query, request.headers()) {
                    return Ok(refusal);
                }
                request.headers_mut().remove(AUTHORIZATION);
            }
        }
        let fault = lock(&self.faults).iter_mut().find_map(|(on, fault)| on.hits(method.as_str(), path).then(|| fault.clone()));
        let length = request.body().size_hint().exact();
        let largest = *lock(&self.largest);
        if largest.is_some_and(|largest| length.is_some_and(|length| length > largest)) {
            drain(request.into_body()).await;
            return Ok(answer(413, &[("Connection", "close")], ""));
        }
        let mut plan = Plan::default();
        match fault {
            None => {}
            Some(Fault::Reset) => return Err(line.reset()),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Answer { status, headers, body }) => {
                drain(request.into_body()).await;
                let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
                return Ok(answer(status, &headers, body));
            }
            Some(Fault::Redirect(to)) => return Ok(answer(307, &[("Location", &format!("{to}{path}"))], "")),
            Some(Fault::LoseSession) => {
                drain(request.into_body()).await;
                let _ = self.plain(Method::DELETE, &self.now(path), &HeaderMap::new(), Bytes::new()).await;
                return Ok(error(404, &[], "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry"));
            }
            Some(Fault::IgnoreRange) => {
                request.headers_mut().remove(RANGE);
            }
            Some(Fault::CutRequest(after)) if lock(&self.sessions).is_some() => plan.keep = Some(after),
            Some(Fault::CutRequest(after)) => plan.request.end = Some((after, End::Broken)),
            Some(Fault::LoseAnswer) => plan.lose = true,
            Some(Fault::CutAnswer(after)) => plan.answer.end = Some((after, End::Broken)),
            Some(Fault::EndAnswer(after)) => plan.answer.end = Some((after, End::Orderly)),
            Some(Fault::FlipAnswer(at)) => plan.answer.flip = Some(at),
            Some(Fault::FlipRequest(at)) => plan.request.flip = Some(at),
            Some(Fault::SlowAnswer(speed)) => plan.answer.speed = Some(speed),
            Some(Fault::SlowRequest(speed)) => plan.request.speed = Some(speed),
        }
        let manifest = bare.contains("/manifests/");
        let referrers = *lock(&self.referrers);
        if manifest && method == Method::PUT && (lock(&self.immutable).is_some() || referrers) {
            return self.put_manifest(request, path, line, entry, &plan).await;
        }
        if referrers && let Some((name, digest)) = bare.split_once("/referrers/") {
            return self.list(name, digest).await;
        }
        self.pass(request, path, line, entry, plan).await
    }

    async fn token(&self, request: Request<Incoming>, query: &str) -> io::Result<Response<Outgoing>> {
        let (parts, body) = request.into_parts();
        let form = whole(body).await?;
        let mut office = lock(&self.office);
        let Some(office) = office.as_mut() else { return Ok(answer(404, &[], "")) };
        Ok(office.give(&parts.method, query, &parts.headers, &String::from_utf8_lossy(&form)))
    }

    /// Passes a request on, with what `plan` says.
    async fn pass(
        &self,
        request: Request<Incoming>,
        path: &str,
        line: &Arc<Line>,
        entry: &Entry,
        mut plan: Plan,
    ) -> io::Result<Response<Outgoing>> {
        let (mut parts, body) = request.into_parts();
        strip(&mut parts.headers);
        if let Some(after) = plan.keep {
            let kept = self.keep(&parts.method, path, &parts.headers, body, after, entry).await;
            return Err(kept.err().unwrap_or_else(|| line.reset()));
        }
        let broken = Arc::new(Notify::new());
        plan.request.count = Some(entry.sent.clone());
        let notify = broken.clone();
        plan.request.ended = Some(Box::new(move || notify.notify_one()));
        let body = if body.is_end_stream() { Outgoing::Empty } else { plan.request.start(body) };
        let mut request = Request::new(body);
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = self.now(path).parse::<Uri>().map_err(io::Error::other)?;
        *request.headers_mut() = parts.headers;
        let response = tokio::select! {
            response = self.send(request) => response,
            () = broken.notified() => return Err(line.reset()),
        };
        let response = match response {
            Ok(response) => response,
            Err(error) => return Ok(answer(502, &[("X-Proxy-Error", &error.to_string())], "")),
        };
        if plan.lose {
            drain(response.into_body()).await;
            return Err(line.reset());
        }
        let (mut parts, body) = response.into_parts();
        strip(&mut parts.headers);
        self.remember(&parts.headers, path);
        plan.answer.count = Some(entry.received.clone());
        let line = line.clone();
        if plan.answer.end.is_some_and(|(_, end)| end == End::Broken) {
            plan.answer.ended = Some(Box::new(move || line.cut()));
        }
        let body = if body.is_end_stream() { Outgoing::Empty } else { plan.answer.start(body) };
        Ok(Response::from_parts(parts, body))
    }

    /// Passes on the first `after` bytes of a PATCH as if they were all.
    async fn keep(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        mut body: Incoming,
        after: u64,
        entry: &Entry,
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < after {
            let Some(frame) = body.frame().await else { break };
            if let Ok(data) = frame.map_err(io::Error::other)?.into_data() {
                bytes.extend_from_slice(&data);
            }
        }
        bytes.truncate(usize::try_from(after).unwrap_or(usize::MAX));
        entry.sent.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        let mut headers = headers.clone();
        headers.remove(CONTENT_LENGTH);
        let (_, headers, _) = self.plain(method.clone(), &self.now(path), &headers, bytes.into()).await?;
        self.remember(&headers, path);
        Ok(())
    }

    /// Remembers where an upload session is after this.
    fn remember(&self, headers: &HeaderMap, path: &str) {
        let mut sessions = lock(&self.sessions);
        let Some(sessions) = sessions.as_mut() else { return };
        let Some(location) = headers.get(LOCATION).and_then(|value| value.to_str().ok()) else { return };
        let location: Uri = match location.parse() {
            Ok(location) => location,
            Err(_) => return,
        };
        if path.contains("/blobs/uploads/") && location.path().contains("/blobs/uploads/") {
            sessions.insert(location.path().to_owned(), location.query().unwrap_or_default().to_owned());
        }
    }

    /// The path of an upload session as it is now, or else `path` itself.
    fn now(&self, path: &str) -> String {
        let (bare, query) = path.split_once('?').unwrap_or((path, ""));
        match lock(&self.sessions).as_ref().and_then(|sessions| sessions.get(bare)) {
            Some(state) => {
                let digest = query.split('&').find(|pair| pair.starts_with("digest="));
                format!("{bare}?{state}{}", digest.map_or_else(String::new, |digest| format!("&{digest}")))
            }
            None => path.to_owned(),
        }
    }

    /// Stores a manifest unless its tag may not be moved; keeps the index of
    /// what is attached to its subject.
    async fn put_manifest(
        &self,
        request: Request<Incoming>,
        path: &str,
        line: &Line,
        entry: &Entry,
        plan: &Plan,
    ) -> io::Result<Response<Outgoing>> {
        let (mut parts, body) = request.into_parts();
        strip(&mut parts.headers);
        let mut bytes = whole(body).await?.to_vec();
        entry.sent.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        if plan.request.end.is_some() || plan.keep.is_some() {
            return Err(line.reset());
        }
        if let Some(at) = plan.request.flip {
            let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len().saturating_sub(1));
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 0x01;
            }
        }
        // Nobody looks or writes in between.
        let _moving = self.moving.lock().await;
        let tag = path.rsplit('/').next().unwrap_or_default().to_owned();
        let rule = lock(&self.immutable).clone();
        if let Some((how, which)) = rule
            && !tag.contains(':')
            && which(&tag)
        {
            let mut headers = HeaderMap::new();
            headers.insert(hyper::header::ACCEPT, HeaderValue::from_static("*/*"));
            for value in parts.headers.get_all(AUTHORIZATION) {
                headers.append(AUTHORIZATION, value.clone());
            }
            for kind in ["application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"] {
                headers.append(hyper::header::ACCEPT, HeaderValue::from_static(kind));
            }
            let (status, _, now) = self.plain(Method::GET, path, &headers, Bytes::new()).await?;
            if status.is_success() && Digest::of(&now) != Digest::of(&bytes) {
                return Ok(match how {
                    Immutable::Conflict => error(409, &[], "CONFLICT", "the tag is immutable"),
                    Immutable::Precondition => error(412, &[], "PRECONDITION", &format!("'{tag}' configured as immutable.")),
                    Immutable::BadRequest => {
                        let message =
                            format!("The image tag '{tag}' already exists and cannot be overwritten because the repository is immutable.");
                        error(400, &[], "TAG_INVALID", &message)
                    }
                });
            }
        }
        let (status, mut headers, said) = self.plain(Method::PUT, path, &parts.headers, bytes.clone().into()).await?;
        if *lock(&self.referrers) && status.is_success() {
            self.attach(path, &parts.headers, &bytes, &mut headers).await?;
        }
        if plan.lose {
            return Err(line.reset());
        }
        strip(&mut headers);
        let mut response = answer(status.as_u16(), &[], said);
        *response.headers_mut() = headers;
        Ok(response)
    }

    /// Adds a manifest with a subject to the index that [`Shared::list`] shows.
    async fn attach(&self, path: &str, sent: &HeaderMap, bytes: &[u8], headers: &mut HeaderMap) -> io::Result<()> {
        let Ok(manifest) = serde_json::from_slice::<serde_json::Value>(bytes) else { return Ok(()) };
        let Some(subject) = manifest["subject"]["digest"].as_str() else { return Ok(()) };
        let Some((name, _)) = path.split_once("/manifests/") else { return Ok(()) };
        let at = format!("{name}/manifests/{}", subject.replace(':', "-"));
        let mut entries = self.index(&at).await?;
        let digest = Digest::of(bytes).to_string();
        if !entries.iter().any(|entry| entry["digest"].as_str() == Some(&digest)) {
            let kind = manifest["artifactType"].as_str().or(manifest["config"]["mediaType"].as_str());
            let media_type = sent.get(hyper::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
            entries.push(serde_json::json!({
                "mediaType": media_type, "digest": digest, "size": bytes.len(), "artifactType": kind, "annotations": manifest["annotations"],
            }));
        }
        let index = index(&entries);
        let mut kind = HeaderMap::new();
        kind.insert(hyper::header::CONTENT_TYPE, HeaderValue::from_static("application/vnd.oci.image.index.v1+json"));
        self.plain(Method::PUT, &at, &kind, index.into()).await?;
        if let Ok(subject) = HeaderValue::from_str(subject) {
            headers.insert("oci-subject", subject);
        }
        Ok(())
    }

    async fn list(&self, name: &str, digest: &str) -> io::Result<Response<Outgoing>> {
        let entries = self.index(&format!("{name}/manifests/{}", digest.replace(':', "-"))).await?;
        Ok(answer(200, &[("Content-Type", "application/vnd.oci.image.index.v1+json")], index(&entries)))
    }

    async fn index(&self, path: &str) -> io::Result<Vec<serde_json::Value>> {
        let mut headers = HeaderMap::new();
        headers.insert(hyper::header::ACCEPT, HeaderValue::from_static("application/vnd.oci.image.index.v1+json"));
        let (_, _, bytes) = self.plain(Method::GET, path, &headers, Bytes::new()).await?;
        let index = serde_json::from_slice::<serde_json::Value>(&bytes).unwrap_or_default();
        Ok(index["manifests"].as_array().cloned().unwrap_or_default())
    }

    /// Asks the registry, and reads the whole of a short answer.
    async fn plain(&self, method: Method, path: &str, headers: &HeaderMap, body: Bytes) -> io::Result<(StatusCode, HeaderMap, Bytes)> {
        let mut request = Request::new(if body.is_empty() { Outgoing::Empty } else { Outgoing::Whole(body) });
        *request.method_mut() = method;
        *request.uri_mut() = path.parse::<Uri>().map_err(io::Error::other)?;
        *request.headers_mut() = headers.clone();
        request.headers_mut().remove(CONTENT_LENGTH);
        if !request.headers().contains_key(hyper::header::HOST) {
            let host = HeaderValue::from_str(&self.name).map_err(io::Error::other)?;
            request.headers_mut().insert(hyper::header::HOST, host);
        }
        let (parts, body) = self.send(request).await?.into_parts();
        Ok((parts.status, parts.headers, whole(body).await?))
    }

    async fn send(&self, request: Request<Outgoing>) -> io::Result<Response<Incoming>> {
        let registry: SocketAddr = lock(&self.registry).parse().map_err(io::Error::other)?;
        let stream = TcpStream::connect(registry).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        tokio::spawn(connection);
        sender.send_request(request).await.map_err(io::Error::other)
    }
}

fn index(entries: &[serde_json::Value]) -> String {
    let kind = "application/vnd.oci.image.index.v1+json";
    serde_json::json!({ "schemaVersion": 2, "mediaType": kind, "manifests": entries }).to_string()
}

/// Takes out what is of one connection alone.
fn strip(headers: &mut HeaderMap) {
    headers.remove(CONNECTION);
    headers.remove(TRANSFER_ENCODING);
}

async fn whole(body: Incoming) -> io::Result<Bytes> {
    Ok(Limited::new(body, SMALL).collect().await.map_err(io::Error::other)?.to_bytes())
}

/// Takes what still comes, so that the answer is read.
async fn drain(mut body: Incoming) {
    while let Some(Ok(_)) = body.frame().await {}
}

//! Sending blobs.
//!
//! ```text
//!  POST uploads/ ──► session ──► PATCH … ──► PUT ?digest=
//!                      ▲            │ cut
//!                      └── GET: how much is there?
//! ```
//!
//! A blob goes in one PATCH, and what is small with the closing PUT. After a
//! cut the registry is asked how much it holds, and sending goes on there; when
//! it has forgotten the session (docker-registry does after each PATCH that was
//! cut), it begins anew. A registry, or a proxy before it, that takes no
//! request of that size gets the blob in pieces.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use kiln_http::{Failed, passes};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use reqwest::header::{self, HeaderMap};
use reqwest::{Method, Response, StatusCode, Url};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _, ReadBuf};

use crate::auth::Scope;
use crate::headers::{text, upload_offset};
use crate::host::{Ask, Retry, Target, named, silent};
use crate::repository::Repository;

/// What is at most so large is sent with the closing request.
const SMALL: u64 = 256 << 10;
/// What is read and handed on at once.
const PIECE: usize = 256 << 10;
/// Pieces for those who take no more; halved until they do.
const CHUNK: u64 = 16 << 20;
/// Nobody means a limit that is lower than this.
const LEAST: u64 = 1 << 20;
/// How often the progress is told.
const TELL: Duration = Duration::from_millis(100);
/// Bytes per second with which a registry at least digests and stores what it
/// holds, before it answers the closing request.
const STORED: u64 = 20 << 20;
/// How often a blob that arrived damaged is sent again.
const DAMAGED: u32 = 2;

/// Where the bytes of an upload come from. Opened anew, at some offset, each
/// time that sending starts again.
#[async_trait]
pub trait BlobSource: Send + Sync {
    /// The bytes from `offset` to the end.
    ///
    /// # Errors
    /// When they cannot be read.
    async fn open(&self, offset: u64) -> Result<Box<dyn AsyncRead + Send + Unpin>>;
}

/// The bytes of a file.
#[derive(Debug, Clone)]
pub struct FileSource(pub PathBuf);

#[async_trait]
impl BlobSource for FileSource {
    async fn open(&self, offset: u64) -> Result<Box<dyn AsyncRead + Send + Unpin>> {
        let open = async {
            let mut file = tokio::fs::File::open(&self.0).await?;
            file.set_max_buf_size(PIECE);
            file.seek(io::SeekFrom::Start(offset)).await?;
            Ok::<_, io::Error>(file)
        };
        Ok(Box::new(open.await.trying(|| format!("read {}", self.0.display()))?))
    }
}

#[async_trait]
impl BlobSource for Bytes {
    async fn open(&self, offset: u64) -> Result<Box<dyn AsyncRead + Send + Unpin>> {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX).min(self.len());
        Ok(Box::new(io::Cursor::new(self.slice(offset..))))
    }
}

/// An upload that a registry has open.
#[derive(Debug)]
struct Session {
    url: Url,
    /// Bytes that the registry holds.
    offset: u64,
    /// Whether that must be asked first.
    unsure: bool,
}

/// Why an attempt at sending failed.
enum Trouble {
    /// Sorted as everywhere.
    Failed(Failed),
    /// The registry no longer knows the session.
    Lost {
        /// For people.
        error: Error,
        /// Whether this was found out after waiting for something else.
        waited: bool,
    },
    /// The request was too large for somebody.
    TooLarge(Failed),
    /// What the registry holds is not what the digest says.
    Damaged(Error),
}

impl From<Failed> for Trouble {
    fn from(failed: Failed) -> Self {
        Self::Failed(failed)
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Failed(Failed::Final(error))
    }
}

/// One blob on its way.
struct Upload<'a> {
    repository: &'a Repository,
    digest: &'a Digest,
    size: u64,
    source: &'a dyn BlobSource,
    progress: &'a (dyn Fn(u64) + Sync),
    session: Option<Session>,
    /// The least that a request but the last has to send.
    least: u64,
    /// The most that a request may send.
    most: u64,
    /// The furthest that the registry ever confirmed.
    furthest: u64,
}

impl Repository {
    /// Sends a blob of `size` bytes. `progress` is called with the bytes of it
    /// that were sent so far; the number falls when something is sent again.
    /// Does not ask whether it is there already.
    ///
    /// # Errors
    /// [`Code::DigestMismatch`] when the source gives other bytes than
    /// `digest` names, or the registry receives others again and again. Those
    /// of the source. Else as [`Repository::manifest`].
    pub async fn upload(&self, digest: &Digest, size: u64, source: &dyn BlobSource, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
        let session = self.take_session(digest).map(|url| Session { url, offset: 0, unsure: false });
        let mut upload = Upload { repository: self, digest, size, source, progress, session, least: 0, most: u64::MAX, furthest: 0 };
        let mut retry = Retry::new(&self.host);
        let mut damaged = 0;
        loop {
            let before = upload.furthest;
            let result = upload.attempt().await;
            if upload.furthest > before {
                retry.progressed();
            }
            match result {
                Ok(()) => return Ok(()),
                Err(Trouble::Failed(failed)) => {
                    retry.pause(failed).await?;
                    // Whoever drops what is too large does not always say so.
                    if retry.failures() >= 3 && upload.furthest == 0 {
                        upload.smaller();
                    }
                    upload.doubt();
                }
                Err(Trouble::Lost { error, waited }) => {
                    upload.session = None;
                    if waited {
                        self.host.note(error.chain());
                    } else {
                        retry.pause(Failed::Passing { error, wait: None }).await?;
                    }
                    // Perhaps because it was closed, and only the answer got lost.
                    if self.blob_size(digest).await? == Some(size) {
                        progress(size);
                        return Ok(());
                    }
                }
                Err(Trouble::TooLarge(failed)) => {
                    if !upload.smaller() {
                        retry.pause(failed).await?;
                    }
                    upload.doubt();
                }
                Err(Trouble::Damaged(error)) => {
                    upload.session = None;
                    upload.check_source().await?;
                    damaged += 1;
                    if damaged > DAMAGED {
                        return Err(error);
                    }
                    retry.pause(Failed::Passing { error, wait: None }).await?;
                }
            }
        }
    }
}

impl<'a> Upload<'a> {
    fn what(&self) -> String {
        format!("send the blob {} to {}", self.digest, self.repository.shown())
    }

    fn ask(&self, method: Method, target: Target) -> Ask<'a> {
        let repository = &self.repository.name;
        Ask::new(repository, self.what(), method, target, Scope::on(repository, "pull,push"))
    }

    /// How long the answer may take after the last byte was handed over: what
    /// lies in buffers on the way has still to arrive.
    fn within(&self) -> Duration {
        self.repository.host.silence() * 2
    }

    /// What the registry holds must be asked.
    fn doubt(&mut self) {
        if let Some(session) = &mut self.session {
            session.unsure = true;
        }
    }

    /// Sends less at once from now on; tells whether that is possible.
    fn smaller(&mut self) -> bool {
        let most = (self.most.min(self.size) / 2).min(CHUNK).max(self.least);
        let possible = most < self.most && most < self.size && most >= LEAST;
        if possible {
            self.most = most;
        }
        possible
    }

    async fn attempt(&mut self) -> Result<(), Trouble> {
        let mut session = match self.session.take() {
            Some(session) => session,
            None => match self.open().await? {
                Some(session) => session,
                None => return Ok(()),
            },
        };
        let result = self.transfer(&mut session).await;
        self.session = Some(session);
        result
    }

    async fn transfer(&mut self, session: &mut Session) -> Result<(), Trouble> {
        if session.unsure {
            self.look(session).await?;
        }
        if session.offset == 0 && self.size <= SMALL.min(self.most) {
            return self.close(session, self.size).await;
        }
        while session.offset < self.size {
            self.patch(session).await?;
        }
        self.close(session, 0).await
    }

    /// Opens a session; none when the registry says that it has the blob.
    async fn open(&mut self) -> Result<Option<Session>, Trouble> {
        let path = format!("{}/blobs/uploads/", self.repository.name);
        let ask = self.ask(Method::POST, Target::Path(path));
        let answer = self.repository.host.ask(&ask).await?;
        match answer.status {
            StatusCode::CREATED => return Ok(None),
            StatusCode::ACCEPTED => {}
            _ => return Err(self.repository.host.refused(&ask, &answer).await.into()),
        }
        let least = text(&answer.headers, header::HeaderName::from_static("oci-chunk-min-length")).and_then(|text| text.parse().ok());
        let Some(location) = text(&answer.headers, header::LOCATION) else {
            let error = format!("cannot {}: {} opened a session and did not say where", self.what(), named(&answer.url));
            return Err(Error::new(Code::Failed, error).next("check that the host is a registry").into());
        };
        let url = self.repository.host.located(&answer.url, location).await?;
        self.least = least.unwrap_or(0);
        (self.progress)(0);
        Ok(Some(Session { url, offset: 0, unsure: false }))
    }

    /// Asks how much the registry holds.
    async fn look(&mut self, session: &mut Session) -> Result<(), Trouble> {
        let ask = self.ask(Method::GET, Target::At(session.url.clone()));
        let answer = self.repository.host.ask(&ask).await?;
        let offset = text(&answer.headers, header::RANGE).and_then(upload_offset);
        match (answer.status.as_u16(), offset) {
            (200 | 202 | 204, Some(offset)) if offset <= self.size => {
                self.moved(session, &answer.url, &answer.headers, offset).await?;
                session.unsure = false;
                (self.progress)(offset);
                Ok(())
            }
            (401 | 403, _) => Err(self.repository.host.refused(&ask, &answer).await.into()),
            _ => Err(self.lost("does not say how much of it arrived", true)),
        }
    }

    fn lost(&self, why: &str, waited: bool) -> Trouble {
        let error = format!("cannot go on to {}: {} {why}; it is sent anew", self.what(), self.repository.host.name());
        Trouble::Lost { error: Error::new(Code::Infrastructure, error), waited }
    }

    /// The registry holds `offset` bytes, and says where to go on.
    async fn moved(&mut self, session: &mut Session, from: &Url, headers: &HeaderMap, offset: u64) -> Result<(), Trouble> {
        if let Some(location) = text(headers, header::LOCATION) {
            session.url = self.repository.host.located(from, location).await?;
        }
        session.offset = offset;
        self.furthest = self.furthest.max(offset);
        Ok(())
    }

    /// Sends what follows, as much as goes at once.
    async fn patch(&mut self, session: &mut Session) -> Result<(), Trouble> {
        let first = session.offset;
        let length = (self.size - first).min(self.most);
        let mut headers = HeaderMap::new();
        // Without, one PATCH of the whole is what every registry takes.
        if first > 0 || length < self.size {
            let range = header::HeaderValue::from_str(&format!("{first}-{}", first + length - 1));
            headers.insert(header::CONTENT_RANGE, range.trying(|| self.what())?);
        }
        let response = self.send(Method::PATCH, session.url.clone(), headers, first, length, self.within()).await?;
        if response.status().is_success() {
            let held = text(response.headers(), header::RANGE).and_then(upload_offset);
            let held = held.filter(|held| *held > first).unwrap_or(first + length);
            if held > first + length {
                return Err(self.lost("says that more arrived than was sent", false));
            }
            let (url, headers) = (response.url().clone(), response.headers().clone());
            return self.moved(session, &url, &headers, held).await;
        }
        Err(self.failed(response).await)
    }

    /// Sends the last `length` bytes and closes the session.
    async fn close(&mut self, session: &Session, length: u64) -> Result<(), Trouble> {
        let mut url = session.url.clone();
        url.query_pairs_mut().append_pair("digest", &self.digest.to_string());
        let within = self.within() + Duration::from_secs(self.size / STORED);
        let response = self.send(Method::PUT, url, HeaderMap::new(), self.size - length, length, within).await?;
        if !response.status().is_success() {
            return Err(self.failed(response).await);
        }
        let digest = header::HeaderName::from_static("docker-content-digest");
        let stored = text(response.headers(), digest).and_then(|stored| stored.parse::<Digest>().ok());
        if let Some(stored) = stored.filter(|stored| stored != self.digest) {
            return Err(self.damaged(&format!("it stored {stored}")));
        }
        self.furthest = self.size;
        (self.progress)(self.size);
        Ok(())
    }

    fn damaged(&self, why: &str) -> Trouble {
        let error = format!("cannot {}: other bytes arrived at {} than were sent: {why}", self.what(), self.repository.host.name());
        Trouble::Damaged(
            Error::new(Code::DigestMismatch, error).next("something between here and the registry changes what is sent: look for a proxy"),
        )
    }

    /// Sorts an answer to PATCH or PUT.
    async fn failed(&self, response: Response) -> Trouble {
        let ask = self.ask(Method::PATCH, Target::At(response.url().clone()));
        let answer = match self.repository.host.collect(&ask.what, response, ask.limit).await {
            Ok(answer) => answer,
            Err(failed) => return failed.into(),
        };
        let said = answer.said().unwrap_or_default();
        match answer.status.as_u16() {
            413 => Trouble::TooLarge(Failed::Final(self.repository.host.refused(&ask, &answer).await)),
            400 | 422 if said.contains("DIGEST_INVALID") || said.contains("SIZE_INVALID") => self.damaged(&said),
            // 416: what arrived is not what we believe; registries that cannot
            // tell how much it is say so when they are asked.
            404 | 409 | 410 | 416 => self.lost(&format!("has lost the upload session ({})", answer.status), false),
            400 if said.contains("UPLOAD") || said.contains("RANGE_INVALID") => {
                self.lost(&format!("has lost the upload session ({said})"), false)
            }
            _ => self.repository.host.sorted(&ask.what, &self.repository.name, &answer).await.into(),
        }
    }

    /// Sends `length` bytes from `first` on, and watches them go.
    async fn send(
        &self,
        method: Method,
        url: Url,
        mut headers: HeaderMap,
        first: u64,
        length: u64,
        within: Duration,
    ) -> Result<Response, Trouble> {
        let (host, what) = (&self.repository.host, self.what());
        let scope = Scope::on(&self.repository.name, "pull,push");
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/octet-stream"));
        let mut learnt = false;
        loop {
            host.leave_alone().await;
            let sent = host.authorization(&url, &self.repository.name, &scope).await?;
            let mut request = host.client_for(&url)?.request(method.clone(), url.clone()).headers(headers.clone());
            if let Some(sent) = &sent {
                request = request.header(header::AUTHORIZATION, sent.clone());
            }
            let state = Arc::new(State::default());
            request = if length == 0 {
                request.body(Bytes::new())
            } else {
                let reader = Mutex::new(self.source.open(first).await?.take(length));
                let body = Sending { reader, left: length, piece: Vec::new(), state: state.clone() };
                request.header(header::CONTENT_LENGTH, length).body(reqwest::Body::wrap(body))
            };
            let response = self.watch(request.send(), &state, first, within, &what).await?;
            let response = match response {
                Ok(response) => response,
                Err(error) => {
                    return Err(match state.take_failure() {
                        Some(error) => Error::new(Code::Failed, format!("cannot {what}: its bytes cannot be read")).because(error).into(),
                        None => host.broken(&what, &url, error).into(),
                    });
                }
            };
            if response.status() == StatusCode::UNAUTHORIZED && !learnt && host.learn(&response, &scope, sent.as_ref()).await {
                learnt = true;
                continue;
            }
            if passes(response.status()) {
                return Err(self.failed(response).await);
            }
            return Ok(response);
        }
    }

    /// Waits for the answer as long as bytes go out, and `within` after that.
    async fn watch(
        &self,
        sending: impl Future<Output = reqwest::Result<Response>>,
        state: &State,
        first: u64,
        within: Duration,
        what: &str,
    ) -> Result<reqwest::Result<Response>, Failed> {
        let mut sending = std::pin::pin!(sending);
        let (mut seen, mut since) = (0, Instant::now());
        loop {
            let answer = tokio::time::timeout(TELL, &mut sending).await;
            let sent = state.sent.load(Ordering::Relaxed);
            if sent > seen {
                self.repository.host.limit.moved(sent - seen);
                (self.progress)(first + sent);
                (seen, since) = (sent, Instant::now());
            }
            match answer {
                Ok(answer) => return Ok(answer),
                Err(_) if since.elapsed() > within => return Err(silent(what, self.repository.host.name(), within)),
                Err(_) => {}
            }
        }
    }

    /// Fails when it is the source that gives other bytes.
    async fn check_source(&self) -> Result<()> {
        use sha2::{Digest as _, Sha256};
        let mut reader = self.source.open(0).await?.take(self.size);
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; PIECE];
        loop {
            let read = reader.read(&mut buffer).await.trying(|| format!("read the blob {}", self.digest))?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
        }
        let actual = Digest::finish(hasher);
        if actual == *self.digest {
            return Ok(());
        }
        Err(Error::new(Code::DigestMismatch, format!("cannot {}: what is to be sent is {actual}", self.what()))
            .next("the blob is damaged here: take it anew from where it came from"))
    }
}

/// What the sender of a body tells whoever watches it.
#[derive(Default)]
struct State {
    sent: AtomicU64,
    /// Why the source gave no more.
    failure: Mutex<Option<io::Error>>,
}

impl State {
    fn take_failure(&self) -> Option<io::Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A body of known length, read from a source.
struct Sending {
    /// Never locked: bodies have to be shareable, which readers are not.
    reader: Mutex<tokio::io::Take<Box<dyn AsyncRead + Send + Unpin>>>,
    left: u64,
    piece: Vec<u8>,
    state: Arc<State>,
}

impl Sending {
    fn fail(&self, error: io::Error) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let copy = io::Error::new(error.kind(), "the source failed");
        *self.state.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        Poll::Ready(Some(Err(copy)))
    }
}

impl http_body::Body for Sending {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let this = &mut *self;
        this.piece.resize(PIECE.min(usize::try_from(this.left).unwrap_or(PIECE)), 0);
        let mut buffer = ReadBuf::new(&mut this.piece);
        let reader = this.reader.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = ready!(Pin::new(reader).poll_read(context, &mut buffer)) {
            return self.fail(error);
        }
        let read = buffer.filled().len();
        if read == 0 {
            let error = format!("its source ended {} bytes too early", this.left);
            return self.fail(io::Error::new(io::ErrorKind::UnexpectedEof, error));
        }
        let mut piece = std::mem::take(&mut this.piece);
        piece.truncate(read);
        this.left -= read as u64;
        this.state.sent.fetch_add(read as u64, Ordering::Relaxed);
        Poll::Ready(Some(Ok(Frame::data(piece.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

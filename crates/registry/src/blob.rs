//! Blobs: whether they are there, taking them over, and reading them.

use std::ops::Range;

use bytes::Bytes;
use kiln_http::Failed;
use kiln_model::{Code, Digest, Error, Result};
use reqwest::{Method, Response, StatusCode, header};
use sha2::{Digest as _, Sha256};

use crate::auth::Scope;
use crate::headers::{ContentRange, content_range, text};
use crate::host::{Ask, Retry, named, silent};
use crate::repository::Repository;

/// A server's error is read up to this many bytes.
const EXPLANATION: u64 = 64 << 10;

impl Repository {
    /// The size of a blob in bytes; none when it is not there.
    ///
    /// # Errors
    /// As [`Repository::manifest`].
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>> {
        let what = format!("look for the blob {digest} in {}", self.shown());
        let ask = self.request(what.clone(), Method::HEAD, &format!("blobs/{digest}"), "pull");
        let answer = self.host.ask(&ask).await?;
        match answer.status {
            StatusCode::OK => {
                let length = text(&answer.headers, header::CONTENT_LENGTH).and_then(|length| length.parse().ok());
                if let Some(length) = length {
                    return Ok(Some(length));
                }
            }
            StatusCode::NOT_FOUND => return Ok(None),
            // Where it redirects to may know GET alone.
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::FORBIDDEN if !self.host.is_own(&answer.url) => {}
            _ => return Err(self.host.refused(&ask, &answer).await),
        }
        let ask = self.request(what, Method::GET, &format!("blobs/{digest}"), "pull").header(header::RANGE, "bytes=0-0");
        let mut retry = Retry::new(&self.host);
        loop {
            let failed = match self.host.send(&ask).await {
                Ok(response) => {
                    let range = text(response.headers(), header::CONTENT_RANGE).map(content_range).unwrap_or_default();
                    match (response.status(), range.total, response.content_length()) {
                        (StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE, Some(total), _) => return Ok(Some(total)),
                        (StatusCode::OK, _, Some(length)) => return Ok(Some(length)),
                        (StatusCode::NOT_FOUND, ..) => return Ok(None),
                        _ => self.judged(&ask, response).await,
                    }
                }
                Err(failed) => failed,
            };
            retry.pause(failed).await?;
        }
    }

    /// Takes a blob over from the repository `from` of the same registry;
    /// tells whether that was possible. Where it was not, the session that the
    /// registry opened instead is used by the next [`Repository::upload`] of
    /// this blob.
    ///
    /// # Errors
    /// As [`Repository::manifest`].
    pub async fn mount(&self, digest: &Digest, from: &str) -> Result<bool> {
        if !crate::is_name(from) {
            return Err(Error::new(Code::Usage, format!("`{from}` is not the name of a repository")));
        }
        let what = format!("take the blob {digest} over from {from} into {}", self.shown());
        let mut ask = self.request(what, Method::POST, &format!("blobs/uploads/?mount={digest}&from={from}"), "pull,push");
        // One token for both.
        ask.scope = Scope::on(&self.name, "pull,push").and(from, "pull");
        let answer = self.host.ask(&ask).await?;
        match answer.status {
            StatusCode::CREATED => Ok(true),
            StatusCode::ACCEPTED => {
                if let Some(location) = text(&answer.headers, header::LOCATION)
                    && let Ok(session) = self.host.located(&answer.url, location).await
                {
                    self.sessions.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(*digest, session);
                }
                Ok(false)
            }
            // Who may not read the other repository, or not at all there, sends
            // the bytes: whether that is refused too, the upload tells.
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Ok(false),
            _ => Err(self.host.refused(&ask, &answer).await),
        }
    }

    /// A whole blob of at most `limit` bytes, verified.
    ///
    /// # Errors
    /// [`Code::NotFound`] when it is not there, [`Code::Failed`] when it is
    /// larger. Else as [`Repository::manifest`].
    pub async fn blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let mut again = false;
        loop {
            match self.read_whole(digest, limit).await {
                Err(error) if error.kind() == Code::DigestMismatch && !again => self.host.note(format!("{error}; it is read again")),
                result => return result,
            }
            again = true;
        }
    }

    async fn read_whole(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let mut body = self.read(digest, 0..u64::MAX).await?;
        let mut bytes = Vec::new();
        let too_large = |size: u64| {
            Error::new(
                Code::Failed,
                format!("cannot {}: it has {size} bytes or more, and what is expected there has at most {limit}", body_of(digest, self)),
            )
            .next("check that this is what you meant")
        };
        if let Some(size) = body.size().filter(|size| *size > limit) {
            return Err(too_large(size));
        }
        while let Some(chunk) = body.chunk().await? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > limit {
                return Err(too_large(bytes.len() as u64));
            }
        }
        Ok(bytes)
    }

    /// A part of a blob as a stream that goes on where it was cut; an end of
    /// [`u64::MAX`] means the blob's. A whole blob is verified when its last
    /// byte has come, unless [`Body::checked_by_caller`]; parts of one are the
    /// caller's to verify.
    ///
    /// # Errors
    /// [`Code::NotFound`] when it is not there, [`Code::Failed`] when it is
    /// shorter than `range`. Else as [`Repository::manifest`].
    pub async fn read(&self, digest: &Digest, range: Range<u64>) -> Result<Body> {
        let mut body = Body {
            repository: self.clone(),
            digest: *digest,
            next: range.start,
            end: range.end.max(range.start),
            size: None,
            response: None,
            skip: 0,
            hasher: (range.start == 0).then(Sha256::new),
            retry: Retry::new(&self.host),
        };
        if body.next < body.end {
            body.connect().await?;
        } else {
            body.hasher = None;
        }
        Ok(body)
    }

    /// Sorts an answer that is not the one hoped for, whose body is still to
    /// be read.
    pub(crate) async fn judged(&self, ask: &Ask<'_>, response: Response) -> Failed {
        match self.host.collect(&ask.what, response, EXPLANATION).await {
            Ok(answer) => self.host.sorted(&ask.what, &self.name, &answer).await,
            Err(failed) => failed,
        }
    }
}

fn body_of(digest: &Digest, repository: &Repository) -> String {
    format!("read the blob {digest} of {}", repository.shown())
}

/// A part of a blob that is coming.
pub struct Body {
    repository: Repository,
    digest: Digest,
    /// The place of the next byte that the caller gets.
    next: u64,
    /// The place after the last one; [`u64::MAX`] until the blob's is known.
    end: u64,
    /// The whole blob's size, once known.
    size: Option<u64>,
    response: Option<Response>,
    /// Bytes that the answer holds before `next`: it is of the whole.
    skip: u64,
    /// Of all from the first byte, as long as it can become the whole.
    hasher: Option<Sha256>,
    retry: Retry,
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let part = self.next..self.end;
        f.debug_struct("Body").field("digest", &self.digest).field("part", &part).finish_non_exhaustive()
    }
}

impl Body {
    /// Leaves out the digest of the whole: for callers who verify every block.
    #[must_use]
    pub fn checked_by_caller(mut self) -> Self {
        self.hasher = None;
        self
    }

    /// The size of the whole blob in bytes, where the registry says it.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// The next bytes, never none of them; nothing at the end. May be dropped
    /// while it waits, and called again.
    ///
    /// # Errors
    /// [`Code::DigestMismatch`] at the end of a whole blob. Else as
    /// [`Repository::read`], after all patience.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.next >= self.end {
                self.response = None;
                return self.verify().map(|()| None);
            }
            self.connect().await?;
            let Some(response) = self.response.as_mut() else { continue };
            let url = response.url().clone();
            let silence = self.repository.host.silence();
            let failed = match tokio::time::timeout(silence, response.chunk()).await {
                Ok(Ok(Some(chunk))) => match self.taken(chunk) {
                    Some(chunk) => return Ok(Some(chunk)),
                    None => continue,
                },
                Ok(Ok(None)) if self.end == u64::MAX && self.skip == 0 => {
                    // A server that does not say how much comes: the digest tells.
                    (self.end, self.size) = (self.next, Some(self.next));
                    continue;
                }
                Ok(Ok(None)) => self.cut(),
                Ok(Err(error)) => self.repository.host.broken(&self.what(), &url, error),
                Err(_) => silent(&self.what(), &named(&url), silence),
            };
            self.response = None;
            self.retry.pause(failed).await?;
        }
    }

    fn what(&self) -> String {
        body_of(&self.digest, &self.repository)
    }

    /// What of `chunk` the caller wants.
    fn taken(&mut self, mut chunk: Bytes) -> Option<Bytes> {
        self.repository.host.limit.moved(chunk.len() as u64);
        let skipped = self.skip.min(chunk.len() as u64);
        self.skip -= skipped;
        let mut chunk = chunk.split_off(usize::try_from(skipped).unwrap_or(chunk.len()));
        // Servers that ignore the range go on after its end.
        chunk.truncate(usize::try_from(self.end - self.next).unwrap_or(usize::MAX));
        if chunk.is_empty() {
            return None;
        }
        self.next += chunk.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&chunk);
        }
        self.retry.progressed();
        Some(chunk)
    }

    fn cut(&self) -> Failed {
        let who = self.repository.host.name();
        let error = Error::new(Code::Infrastructure, format!("cannot {}: {who} ended the answer after byte {}", self.what(), self.next));
        Failed::Passing { error, wait: None }
    }

    fn verify(&mut self) -> Result<()> {
        let Some(hasher) = self.hasher.take() else { return Ok(()) };
        if self.size != Some(self.end) {
            return Ok(());
        }
        let actual = Digest::finish(hasher);
        if actual == self.digest { Ok(()) } else { Err(self.repository.not_what_it_says(&self.what(), &self.digest, &actual)) }
    }

    /// Sees to it that there is an answer to read from.
    async fn connect(&mut self) -> Result<()> {
        while self.response.is_none() {
            let failed = match self.try_connect().await {
                Ok(()) => return Ok(()),
                Err(failed) => failed,
            };
            self.retry.pause(failed).await?;
        }
        Ok(())
    }

    async fn try_connect(&mut self) -> Result<(), Failed> {
        let what = self.what();
        let mut ask = self
            .repository
            .request(what.clone(), Method::GET, &format!("blobs/{}", self.digest), "pull")
            .header(header::ACCEPT_ENCODING, "identity");
        let whole = self.next == 0 && self.end == u64::MAX;
        if !whole {
            let last = if self.end == u64::MAX { String::new() } else { (self.end - 1).to_string() };
            ask = ask.header(header::RANGE, &format!("bytes={}-{last}", self.next));
        }
        let response = self.repository.host.send(&ask).await?;
        let range = text(response.headers(), header::CONTENT_RANGE).map(content_range).unwrap_or_default();
        let size = match response.status() {
            StatusCode::OK => {
                self.skip = self.next;
                response.content_length()
            }
            StatusCode::PARTIAL_CONTENT if range.first == Some(self.next) => {
                self.skip = 0;
                range.total
            }
            StatusCode::PARTIAL_CONTENT => return Err(self.other_range(range)),
            StatusCode::RANGE_NOT_SATISFIABLE => {
                let size = range.total.map_or_else(String::new, |total| format!(", which has {total} bytes"));
                let error = format!("cannot {what}{size}: {} has nothing from byte {} on", self.repository.host.name(), self.next);
                return Err(Failed::Final(Error::new(Code::Failed, error).next("the blob is not what its manifest says: push it again")));
            }
            _ => return Err(self.repository.judged(&ask, response).await),
        };
        self.size = size.or(self.size);
        if let Some(size) = self.size {
            if self.end == u64::MAX {
                self.end = size;
            }
            if self.end > size {
                let error = format!("cannot {what} up to byte {}: it has {size}", self.end);
                return Err(Failed::Final(Error::new(Code::Failed, error).next("the blob is not what its manifest says: push it again")));
            }
            if self.end != size {
                self.hasher = None;
            }
        }
        self.response = Some(response);
        Ok(())
    }

    fn other_range(&self, range: ContentRange) -> Failed {
        let first = range.first.map_or_else(|| "an unknown byte".into(), |first| format!("byte {first}"));
        let error = format!("cannot {}: asked for byte {}, {} sends from {first} on", self.what(), self.next, self.repository.host.name());
        Failed::Passing { error: Error::new(Code::Infrastructure, error), wait: None }
    }
}

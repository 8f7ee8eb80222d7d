//! Downloads that are verified while they stream and go on where they were
//! interrupted.
//!
//! What has come so far is kept in `<name>.part`, with what the server called
//! this version of it (`<name>.part.json`), and goes on with `Range` and
//! `If-Range` (RFC 9110, 13.1.5 and 14.2). A server that ignores either sends
//! the whole from the start: then so do we. Bytes are stored as they are on
//! the wire: a `Content-Encoding` is never decoded, since the digest is that
//! of the file as published.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_http::{Failed, Patience, shown};
use kiln_model::event::Reports;
use kiln_model::{Code, Error, Result, ResultExt as _};
use reqwest::{Client, StatusCode, Url, header};
use serde::{Deserialize, Serialize};

use super::Site;
use super::checksum::{Algorithm, Checksum, Hasher};
use super::http;

/// Lists of checksums are smaller than this many bytes.
const LIST: usize = 4 << 20;
/// How often the progress is told.
const TELL: Duration = Duration::from_millis(100);

/// Downloads from one address.
pub(crate) struct Downloader {
    client: Client,
    url: Url,
    patience: Patience,
    reports: Reports,
}

/// What the server called the version that a partial download is of.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Origin {
    /// For `If-Range`: a strong entity tag, or a date of modification.
    version: Option<String>,
    /// A `Content-Encoding`, for the message when the digest is not right.
    encoding: Option<String>,
}

impl Origin {
    fn of(response: &reqwest::Response) -> Self {
        let text = |name| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        // A weak tag may not be used with If-Range.
        let tag = text(header::ETAG).filter(|t: &String| !t.starts_with("W/"));
        Self {
            version: tag.or_else(|| text(header::LAST_MODIFIED)),
            encoding: text(header::CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity")),
        }
    }
}

/// What has come so far. Written with plain blocking calls, each of a few KiB
/// into the page cache: so nothing is in flight when the download is dropped
/// (Ctrl-C), and what lies on disk is exactly what was digested.
struct Partial {
    path: PathBuf,
    file: File,
    algorithm: Algorithm,
    hasher: Hasher,
    length: u64,
    origin: Origin,
    /// Whether it was put together from more than one answer.
    joined: bool,
}

impl Partial {
    /// Opens what an earlier run has left, digesting it, or an empty one.
    async fn open(path: &Path, algorithm: Algorithm) -> Result<Self> {
        let what = || format!("read the partial download {}", path.display());
        let mut file = OpenOptions::new().create(true).truncate(false).read(true).append(true).open(path).trying(what)?;
        let mut hasher = Hasher::new(algorithm);
        let length = digest_into(&mut file, &mut hasher, &mut |_| ()).await.trying(what)?;
        // Of no use when it cannot be read: then the server is asked without.
        let origin = std::fs::read(origin_of(path)).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
        Ok(Self { path: path.to_owned(), file, algorithm, hasher, length, origin, joined: length > 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).trying(|| format!("write {}", self.path.display()))?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Starts over, with what `origin` says of what comes now.
    fn restart(&mut self, origin: Origin) -> Result<()> {
        self.file.set_len(0).trying(|| format!("empty {}", self.path.display()))?;
        self.hasher = Hasher::new(self.algorithm);
        (self.length, self.joined) = (0, false);
        // Before the first byte: a partial is never taken for another version.
        let path = origin_of(&self.path);
        let write = || -> std::io::Result<()> { std::fs::write(&path, serde_json::to_vec(&origin)?) };
        write().trying(|| format!("write {}", path.display()))?;
        self.origin = origin;
        Ok(())
    }

    fn remove(&self) -> Result<()> {
        kiln_model::cleanup::remove_path(&self.path)?;
        kiln_model::cleanup::remove_path(&origin_of(&self.path))
    }
}

fn origin_of(part: &Path) -> PathBuf {
    let mut name = part.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

/// Digests the rest of `file`; gives its length. `progress` is called with the
/// bytes so far. Can be dropped between any two MiB.
///
/// # Errors
/// When it cannot be read.
pub(crate) async fn digest_into(file: &mut File, hasher: &mut Hasher, progress: &mut (dyn FnMut(u64) + Send)) -> std::io::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(length),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                length += n as u64;
                progress(length);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        tokio::task::yield_now().await;
    }
}

impl Downloader {
    /// Downloads from `url`, as `site` says.
    ///
    /// # Errors
    /// As [`http::client`].
    pub(crate) fn new(site: &Site, url: Url, patience: Patience, reports: Reports) -> Result<Self> {
        Ok(Self { client: http::client(site, &url)?, url, patience, reports })
    }

    /// A short text, such as a list of checksums.
    ///
    /// # Errors
    /// [`Code::Infrastructure`] when the server cannot be reached,
    /// [`Code::Base`] when it refuses or the text is no short text.
    pub(crate) async fn text(&self) -> Result<String> {
        let mut failures = 0;
        loop {
            let failed = match self.try_text().await {
                Ok(text) => return Ok(text),
                Err(failed) => failed,
            };
            failures += 1;
            self.pause(failed, failures, 0).await?;
        }
    }

    async fn try_text(&self) -> Result<String, Failed> {
        let failed = |error| http::sort(&self.url, error);
        let request = self.client.get(self.url.clone()).header(header::ACCEPT_ENCODING, "identity");
        let mut response = request.send().await.map_err(failed)?;
        if response.status() != StatusCode::OK {
            return Err(http::refused(&self.url, &response));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > LIST {
                let error =
                    Error::new(Code::Base, format!("{} is no list of checksums: it is over {} MiB long", shown(&self.url), LIST >> 20));
                return Err(Failed::Final(error.next("check `checksum` in [base]")));
            }
        }
        // A clear-text signature may hold a name in another encoding.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Downloads to `part`, going on with what an earlier run has left there.
    /// When this returns, `part` is whole, is what `expected` says, and is on
    /// disk. Whoever calls this holds a lock on `part`.
    ///
    /// # Errors
    /// [`Code::DigestMismatch`] with both digests; then nothing is kept.
    /// [`Code::Infrastructure`] when the server or the network fail for longer
    /// than [`Patience`]; then what came is kept. [`Code::Base`] when the server
    /// refuses, or redirects from https to http.
    pub(crate) async fn download(&self, expected: &Checksum, part: &Path) -> Result<()> {
        let mut again = true;
        loop {
            let mut partial = Partial::open(part, expected.algorithm).await?;
            if partial.length > 0 {
                self.reports.note(format!("the download of {} goes on after {} MiB", shown(&self.url), partial.length >> 20));
            }
            self.fill(&mut partial).await?;
            let actual = partial.hasher.clone().finish();
            if actual == *expected {
                partial.file.sync_all().trying(|| format!("write {}", part.display()))?;
                return kiln_model::cleanup::remove_path(&origin_of(part));
            }
            partial.remove()?;
            // Parts that do not fit together (the file was replaced, and the
            // server has no name for its versions) say nothing of the whole.
            if partial.joined && again {
                again = false;
                self.reports.note(format!("the parts of {} do not fit together; it is downloaded anew", shown(&self.url)));
                continue;
            }
            return Err(mismatch(&shown(&self.url), expected, &actual, partial.origin.encoding.as_deref()));
        }
    }

    async fn fill(&self, partial: &mut Partial) -> Result<()> {
        let mut failures = 0;
        // The furthest it has come, so that a server which ignores Range and
        // cuts every answer at the same place is given up.
        let mut furthest = partial.length;
        loop {
            let failed = match self.attempt(partial).await {
                Ok(()) => return Ok(()),
                Err(failed) => failed,
            };
            failures = if partial.length > furthest { 1 } else { failures + 1 };
            furthest = furthest.max(partial.length);
            self.pause(failed, failures, partial.length).await?;
        }
    }

    async fn attempt(&self, partial: &mut Partial) -> Result<(), Failed> {
        let failed = |error| http::sort(&self.url, error);
        let mut request = self.client.get(self.url.clone()).header(header::ACCEPT_ENCODING, "identity");
        if partial.length > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", partial.length));
            if let Some(version) = &partial.origin.version {
                request = request.header(header::IF_RANGE, version);
            }
        }
        let mut response = request.send().await.map_err(failed)?;
        let range = response.headers().get(header::CONTENT_RANGE).and_then(|v| v.to_str().ok()).map(content_range).unwrap_or_default();
        let total = match response.status() {
            StatusCode::OK => {
                partial.restart(Origin::of(&response))?;
                response.content_length()
            }
            StatusCode::PARTIAL_CONTENT if partial.length > 0 && range.first == Some(partial.length) => {
                partial.joined = true;
                range.total.or_else(|| response.content_length().map(|rest| partial.length + rest))
            }
            // Nothing is left to send: it was interrupted after the last byte.
            StatusCode::RANGE_NOT_SATISFIABLE if partial.length > 0 && range.total == Some(partial.length) => return Ok(()),
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                partial.restart(Origin::default())?;
                let error = Error::new(
                    Code::Infrastructure,
                    format!("cannot download {}: the server sent another range than the one asked for", shown(&self.url)),
                );
                return Err(Failed::Passing { error, wait: None });
            }
            _ => return Err(http::refused(&self.url, &response)),
        };
        let mut told = None::<Instant>;
        let result = loop {
            match response.chunk().await {
                Ok(Some(chunk)) => partial.write(&chunk)?,
                Ok(None) => break Ok(()),
                Err(error) => break Err(failed(error)),
            }
            if told.is_none_or(|at| at.elapsed() >= TELL) {
                told = Some(Instant::now());
                self.reports.progress("download", partial.length, total);
            }
        };
        self.reports.progress("download", partial.length, total);
        result?;
        match total {
            Some(total) if partial.length < total => {
                let error = Error::new(
                    Code::Infrastructure,
                    format!("the download of {} ended after {} of {total} bytes", shown(&self.url), partial.length),
                );
                Err(Failed::Passing { error, wait: None })
            }
            _ => Ok(()),
        }
    }

    /// Waits before the next attempt, or gives the error up when there is to be
    /// none.
    async fn pause(&self, failed: Failed, failures: u32, have: u64) -> Result<()> {
        let (error, asked) = match failed {
            Failed::Final(error) => return Err(error),
            Failed::Passing { error, wait } => (error, wait),
        };
        let kept = if have > 0 { format!("; it goes on after the {} MiB that came", have >> 20) } else { String::new() };
        if let Some(asked) = asked.filter(|asked| *asked > self.patience.longest) {
            return Err(error.next(format!("the server asks to come back in {} s: run the same command then{kept}", asked.as_secs())));
        }
        if failures >= self.patience.failures {
            return Err(error.next(format!("check the network, then run the same command again{kept}")));
        }
        let wait = asked.unwrap_or_else(|| self.patience.wait(failures));
        self.reports.note(format!("{}; trying again in {:.1} s", error.chain(), wait.as_secs_f64()));
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct ContentRange {
    first: Option<u64>,
    total: Option<u64>,
}

/// Reads `bytes 100-199/200`, `bytes 100-199/*`, `bytes */200`.
fn content_range(text: &str) -> ContentRange {
    let Some((range, total)) = text.trim().strip_prefix("bytes ").and_then(|t| t.split_once('/')) else { return ContentRange::default() };
    ContentRange { first: range.split_once('-').and_then(|(first, _)| first.trim().parse().ok()), total: total.trim().parse().ok() }
}

/// The error for bytes that are not what they should be.
pub(crate) fn mismatch(what: &str, expected: &Checksum, actual: &Checksum, encoding: Option<&str>) -> Error {
    let error = Error::new(Code::DigestMismatch, format!("{what} is not what `checksum` says: expected {expected}, but it is {actual}"))
        .next("nothing of it was kept. If the publisher replaced the file, take the new checksum from a source you trust; otherwise do not use it");
    match encoding {
        Some(encoding) => error.detail(format!(
            "The server sent it with Content-Encoding: {encoding}, which is not decoded: the checksum is compared with what was sent."
        )),
        None => error,
    }
}

#[cfg(test)]
mod tests;

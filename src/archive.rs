//! Archives of packages, as they are now: fetched over http, and kept in the
//! cache.
//!
//! ```text
//! cache/archives/release-HEX.json   what a suite said last, and when (HEX: of its address)
//! cache/archives/HEX                an index, by the SHA-256 that the suite names
//! ```
//!
//! What a suite says is asked anew when it is older than [`FRESH`], with the
//! server's own tag, so that nothing moves when nothing has changed. An index is
//! what its digest says, and is fetched once, however many images need it.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_contents::archive::{Index, Part, Release, Source};
use kiln_http::{Manner, Patience, Settings, Url, shown};
use kiln_model::event::Reports;
use kiln_model::home::Home;
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use kiln_qemu::base::Site;
use serde::{Deserialize, Serialize};

/// How long what a suite says is believed without asking again.
const FRESH: Duration = Duration::from_secs(600);
/// What nobody has used for so long is removed.
const FORGOTTEN: Duration = Duration::from_secs(30 * 86_400);
/// Most bytes of what a suite says of itself.
const RELEASE: u64 = 16 << 20;
/// Most bytes of an index as it is sent.
const INDEX: u64 = 256 << 20;
/// Attempts at a server that fails in passing.
const ATTEMPTS: u32 = 3;

/// What was fetched of a suite.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Kept {
    url: String,
    /// What the server calls this state of it.
    tag: Option<String>,
    /// When the server says that it was changed.
    modified: Option<String>,
    /// When it was last asked, in seconds since 1970.
    asked: u64,
    text: String,
}

/// Fetches and keeps.
pub(crate) struct Archives {
    folder: PathBuf,
    site: Site,
    offline: bool,
    reports: Reports,
    patience: Patience,
    releases: HashMap<String, std::result::Result<Arc<Release>, (Code, String)>>,
    indexes: HashMap<Digest, Arc<Index>>,
}

impl Archives {
    /// Those of a site. `offline`: what was fetched before has to do.
    pub(crate) fn new(home: &Home, site: Site, offline: bool, reports: Reports) -> Result<Self> {
        let folder = home.cache().join("archives");
        std::fs::create_dir_all(&folder).trying(|| format!("make {}", folder.display()))?;
        let (releases, indexes) = (HashMap::new(), HashMap::new());
        Ok(Self { folder, site, offline, reports, patience: Patience::default(), releases, indexes })
    }

    /// What a suite says of itself.
    ///
    /// # Errors
    /// [`Code::Infrastructure`] when it cannot be asked and was not before;
    /// [`Code::NotFound`] when there is no such suite, or `offline` and it was
    /// never asked.
    pub(crate) async fn release(&mut self, uri: &str, suite: &str) -> Result<Arc<Release>> {
        let address = format!("{}/dists/{suite}", self.mirrored(uri));
        if let Some(known) = self.releases.get(&address) {
            return known.clone().map_err(|(code, why)| Error::new(code, why));
        }
        let found = self.ask(&address).await.map(Arc::new);
        let known = found.as_ref().map(Arc::clone).map_err(|error| (error.kind(), error.chain()));
        self.releases.insert(address, known);
        found
    }

    /// The packages of a component.
    ///
    /// # Errors
    /// As [`Archives::release`]; [`Code::DigestMismatch`] when an index is not
    /// what its suite says.
    pub(crate) async fn index(&mut self, source: &Source, arch: &str) -> Result<Arc<Index>> {
        let release = self.release(&source.uri, &source.suite).await?;
        let parts: Vec<&Part> = release.packages(&source.component, arch).collect();
        // The smallest form that this machine can read.
        let readable = |part: &&&Part| match part.path.rsplit_once('.').map(|(_, form)| form) {
            Some("xz") => kiln_process::find("xz").is_some(),
            Some("gz") => kiln_process::find("gzip").is_some(),
            _ => true,
        };
        let Some(part) = parts.iter().filter(readable).min_by_key(|part| part.size) else {
            let what = format!("{} {} has no packages of {} for {arch}", source.uri, source.suite, source.component);
            return Err(match parts.is_empty() {
                true => Error::new(Code::NotFound, what),
                false => Error::new(Code::Missing, what + " that this machine can read").next("apt-get install xz-utils"),
            });
        };
        if let Some(index) = self.indexes.get(&part.digest) {
            return Ok(index.clone());
        }
        let path = self.folder.join(part.digest.hex());
        if !whole(&path, part) {
            let by_hash = || Some(format!("{}/by-hash/SHA256/{}", part.path.rsplit_once('/')?.0, part.digest.hex()));
            let below = release.by_hash.then(by_hash).flatten().unwrap_or_else(|| part.path.clone());
            let address = format!("{}/dists/{}/{below}", self.mirrored(&source.uri), source.suite);
            self.fetch_index(&address, part, &path).await?;
        }
        // So that what is used stays.
        if let Ok(file) = File::options().append(true).open(&path) {
            let _ = file.set_modified(SystemTime::now());
        }
        let form = part.path.rsplit_once('.').map(|(_, form)| form.to_owned()).unwrap_or_default();
        let read = tokio::task::spawn_blocking(move || read(&path, &form)).await;
        let index = Arc::new(read.trying(|| "read an index".into())??);
        self.indexes.insert(part.digest, index.clone());
        Ok(index)
    }

    /// Removes what nobody has used for long.
    pub(crate) fn tidy(&self) {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let old = entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
            if old.is_some_and(|age| age > FORGOTTEN) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// An address at the site's own mirror, where it has one and the address is
    /// Debian's.
    fn mirrored(&self, uri: &str) -> String {
        let Some(mirror) = &self.site.mirror else { return uri.to_owned() };
        mirror_of(mirror, uri).unwrap_or_else(|| uri.to_owned())
    }

    async fn ask(&self, address: &str) -> Result<Release> {
        let path = self.folder.join(format!("release-{}.json", Digest::of(address).hex()));
        let kept = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
        let age = kept.as_ref().map(|kept| Duration::from_secs(now().saturating_sub(kept.asked)));
        let fresh = age.is_some_and(|age| age < FRESH);
        let kept = match kept {
            Some(kept) if fresh || self.offline => kept,
            None if self.offline => {
                return Err(Error::new(Code::NotFound, format!("{address} was not asked before, and --offline asks nobody"))
                    .next("run it once without --offline"));
            }
            kept => match (self.fetch_release(address, kept.as_ref()).await, kept) {
                (Ok(new), _) => {
                    let text = serde_json::to_vec(&new).trying(|| "keep what a suite says".into())?;
                    write(&path, &text)?;
                    new
                }
                (Err(error), Some(kept)) if error.kind() == Code::Infrastructure => {
                    let old = kiln_bake::explain::span(age.unwrap_or_default());
                    self.reports.warn(format!("{}; what it said {old} ago has to do", error.chain()));
                    kept
                }
                (Err(error), _) => return Err(error),
            },
        };
        Release::read(&kept.text).ok_or_else(|| Error::new(Code::NotFound, format!("{} names no files, so it is no suite", kept.url)))
    }

    async fn fetch_release(&self, address: &str, kept: Option<&Kept>) -> Result<Kept> {
        let mut missing = None;
        for name in ["InRelease", "Release"] {
            let url = format!("{address}/{name}");
            let kept = kept.filter(|kept| kept.url == url);
            match self.get(&url, kept, RELEASE).await {
                Ok(Answer::Same) => {
                    if let Some(kept) = kept {
                        return Ok(Kept { asked: now(), ..kept.clone() });
                    }
                }
                Ok(Answer::New { bytes, tag, modified }) => {
                    return Ok(Kept { url, tag, modified, asked: now(), text: String::from_utf8_lossy(&bytes).into_owned() });
                }
                Err(error) if error.kind() == Code::NotFound => missing = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(missing.unwrap_or_else(|| Error::new(Code::NotFound, format!("there is no suite at {address}"))))
    }

    async fn fetch_index(&self, address: &str, part: &Part, path: &Path) -> Result<()> {
        if self.offline {
            return Err(Error::new(Code::NotFound, format!("{address} was not fetched before, and --offline fetches nothing"))
                .next("run it once without --offline"));
        }
        if part.size > INDEX {
            return Err(Error::new(Code::Failed, format!("{address} is said to have {} MiB, which no index has", part.size >> 20)));
        }
        let Answer::New { bytes, .. } = self.get(address, None, part.size).await? else {
            return Err(Error::new(Code::Infrastructure, format!("{address} was answered with nothing")));
        };
        let is = Digest::of(&bytes);
        if is != part.digest {
            return Err(Error::new(Code::DigestMismatch, format!("{address} is {is}, and its suite says {}", part.digest))
                .next("the mirror may be in the middle of an update: try again later"));
        }
        self.reports.note(format!("fetched {}", address.split("/by-hash/").next().unwrap_or(address)));
        write(path, &bytes)
    }

    /// Gets at most `limit` bytes.
    async fn get(&self, address: &str, kept: Option<&Kept>, limit: u64) -> Result<Answer> {
        let url = Url::parse(address).map_err(|error| Error::new(Code::NotFound, format!("{address} is no address")).because(error))?;
        let settings = Settings { proxy: self.site.proxy.clone(), ca_certificates: self.site.ca_certificates.clone() };
        let client = kiln_http::client(&settings, &url, Manner::Simple)?;
        let mut failures = 0;
        loop {
            failures += 1;
            let mut request = client.get(url.clone()).header("Accept-Encoding", "identity");
            if let Some(kept) = kept {
                request = match (&kept.tag, &kept.modified) {
                    (Some(tag), _) => request.header("If-None-Match", tag),
                    (None, Some(modified)) => request.header("If-Modified-Since", modified),
                    (None, None) => request,
                };
            }
            let passing = |what: String| Error::new(Code::Infrastructure, what).next("check the network; --offline asks nobody");
            let error = match request.send().await {
                Err(error) if kiln_http::kind(&error) != kiln_http::Kind::Passing => {
                    return Err(passing(format!("cannot fetch {}", shown(&url))).because(error.without_url()));
                }
                Err(error) => passing(format!("cannot fetch {}", shown(&url))).because(error.without_url()),
                Ok(answer) => match answer.status().as_u16() {
                    304 => return Ok(Answer::Same),
                    200 => match body(answer, limit).await {
                        Ok(answer) => return Ok(answer),
                        Err(Some(error)) => passing(format!("cannot fetch {}", shown(&url))).because(error),
                        Err(None) => {
                            return Err(Error::new(
                                Code::Failed,
                                format!("{} is longer than {limit} bytes, which it may not be", shown(&url)),
                            ));
                        }
                    },
                    status if kiln_http::passes(answer.status()) => passing(format!("{} is answered with status {status}", shown(&url))),
                    status => return Err(Error::new(Code::NotFound, format!("{} is answered with status {status}", shown(&url)))),
                },
            };
            if failures >= ATTEMPTS {
                return Err(error);
            }
            tokio::time::sleep(self.patience.wait(failures)).await;
        }
    }
}

/// Removes all that was fetched; gives how many bytes that are.
pub(crate) fn prune(home: &Home, dry_run: bool) -> Result<u64> {
    let folder = home.cache().join("archives");
    let mut freed = 0;
    for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
        freed += entry.metadata().map_or(0, |meta| meta.len());
        if !dry_run {
            std::fs::remove_file(entry.path()).trying(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(freed)
}

/// What a server gave.
enum Answer {
    /// Nothing has changed.
    Same,
    /// This.
    New { bytes: Vec<u8>, tag: Option<String>, modified: Option<String> },
}

/// The body of an answer. An error is the network's; none: it is too long.
async fn body(mut answer: kiln_http::Response, limit: u64) -> std::result::Result<Answer, Option<kiln_http::Broken>> {
    let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
    let (tag, modified) = (header("etag"), header("last-modified"));
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|error| Some(error.without_url()))? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() as u64 > limit {
            return Err(None);
        }
    }
    Ok(Answer::New { bytes, tag, modified })
}

/// Whether an index is there as its suite has it.
fn whole(path: &Path, part: &Part) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.len() == part.size)
        && std::fs::read(path).is_ok_and(|bytes| Digest::of(bytes) == part.digest)
}

/// Reads an index through the program that decompresses it.
fn read(path: &Path, form: &str) -> Result<Index> {
    let mut command = match form {
        // As much as the format's highest level asks for.
        "xz" => {
            let mut command = Command::new("xz");
            command.arg("--memlimit-decompress=256MiB");
            command
        }
        "gz" => Command::new("gzip"),
        _ => return Index::read(File::open(path).trying(|| format!("open {}", path.display()))?),
    };
    let what = || format!("decompress {}", path.display());
    command.arg("-dc").stdin(File::open(path).trying(what)?).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().trying(what)?;
    let index = match child.stdout.take() {
        Some(stdout) => Index::read(stdout),
        None => Index::read(&b""[..]),
    };
    if index.is_err() {
        let _ = child.kill();
    }
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(4096).read_to_string(&mut said);
    }
    let status = child.wait().trying(what)?;
    let index = index?;
    if status.success() { Ok(index) } else { Err(Error::new(Code::Corrupt, format!("cannot {}", what())).detail(said)) }
}

/// Writes a file in one piece.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let part = path.with_file_name(format!(".{}", ulid::Ulid::generate()));
    let written = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path));
    if written.is_err() {
        drop(std::fs::remove_file(&part));
    }
    written.trying(|| format!("write {}", path.display()))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What a mirror of Debian has in place of `uri`: the archive, or the security
/// archive beside it, as a base is built from them.
fn mirror_of(mirror: &str, uri: &str) -> Option<String> {
    let mirror = mirror.trim_end_matches('/');
    let rest = uri.strip_prefix("https://").or_else(|| uri.strip_prefix("http://"))?;
    let (host, path) = rest.split_once('/')?;
    if host != "debian.org" && !host.ends_with(".debian.org") {
        return None;
    }
    match path.trim_end_matches('/') {
        "debian" => Some(mirror.to_owned()),
        "debian-security" => {
            // `…/debian`, or a snapshot of a certain time: `…/debian/TIME`.
            let (start, last) = mirror.rsplit_once('/')?;
            match (last, start.strip_suffix("/debian")) {
                ("debian", _) => Some(format!("{start}/debian-security")),
                (time, Some(start)) => Some(format!("{start}/debian-security/{time}")),
                _ => None,
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_stand_for_debians_archives_alone() {
        let debian = "http://deb.debian.org/debian";
        let security = "http://security.debian.org/debian-security";
        assert_eq!(mirror_of("https://m.example/debian/", debian).as_deref(), Some("https://m.example/debian"));
        assert_eq!(mirror_of("https://m.example/debian", security).as_deref(), Some("https://m.example/debian-security"));
        assert_eq!(mirror_of("http://s.example/debian/2024", security).as_deref(), Some("http://s.example/debian-security/2024"));
        assert_eq!(mirror_of("https://m.example/pub", security), None);
        assert_eq!(mirror_of("https://m.example/debian", "https://own.example/debian"), None);
        assert_eq!(mirror_of("https://m.example/debian", "https://debian.org.example/debian"), None);
    }

    #[test]
    fn indexes_are_read_in_every_form_and_a_damaged_one_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("Packages");
        std::fs::write(&plain, "Package: a\nVersion: 1\nArchitecture: all\n\n").unwrap();
        assert_eq!(read(&plain, "").unwrap().len(), 1);
        for (program, form) in [("gzip", "gz"), ("xz", "xz")] {
            let packed = Command::new(program).arg("-kc").arg(&plain).output().unwrap().stdout;
            let path = folder.path().join(form);
            std::fs::write(&path, &packed).unwrap();
            assert_eq!(read(&path, form).unwrap().len(), 1, "{form}");
            std::fs::write(&path, &packed[..packed.len() - 4]).unwrap();
            assert_eq!(read(&path, form).unwrap_err().kind(), Code::Corrupt, "{form}");
        }
    }
}

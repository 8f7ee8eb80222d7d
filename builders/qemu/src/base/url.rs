//! `[base] url`: a disk from an address, with the checksum that it must have.
//!
//! Cached by that checksum: the same disk from another address is not
//! downloaded again.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use async_trait::async_trait;
use kiln_http::{Patience, is_loopback, shown};
use kiln_model::base::{Base, BaseSource};
use kiln_model::kind::Kind;
use kiln_model::machine::Context;
use kiln_model::settings::{Entry, Node, Problems, Reader};
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use reqwest::Url;

use super::cache::{self, Card, Made, Shelf};
use super::checksum::{self, Checksum, Hasher};
use super::download::{Downloader, digest_into, mismatch};
use super::{Site, inspect};

/// Reads `url` and `checksum` of `[base]`.
pub(super) struct UrlKind {
    cache: PathBuf,
    site: Site,
}

impl UrlKind {
    pub(super) fn new(cache: PathBuf, site: Site) -> Self {
        Self { cache, site }
    }
}

const FORMS: &str = "\"sha256:…\", \"sha512:…\", or the publisher's list: \"file:https://…/SHA512SUMS\"";

impl Kind<dyn BaseSource> for UrlKind {
    fn name(&self) -> &'static str {
        "url"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["url", "checksum"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn BaseSource>> {
        let before = problems.0.len();
        let mut reader = Reader::new(settings, "[base]", problems)?;
        let at = reader.entry("url");
        let text = reader.string("url", problems);
        let sum_at = reader.entry("checksum");
        let sum = reader.string("checksum", problems);
        reader.finish(problems);
        let (at, text) = (at?, text?);
        let url = address(at, text, problems);
        if sum_at.is_none() {
            problems.add(at.node.place, "`url` needs a `checksum` beside it").help(format!(
                "write checksum = {FORMS}; where the publisher gives none, download the file from a source that you trust and run `sha256sum`"
            ));
        }
        let wanted = sum_at.zip(sum).and_then(|(at, sum)| wanted(at, sum, folder, problems));
        let (url, wanted) = (url?, wanted?);
        if matches!(wanted, Wanted::Listed(_)) && last_part(&url).is_none() {
            problems.add(at.node.place, "`url` does not end in a file's name, so its checksum cannot be looked up in a list");
        }
        (problems.0.len() == before).then(|| {
            let (cache, site) = (self.cache.clone(), self.site.clone());
            Box::new(UrlSource { url, wanted, cache, site, patience: Patience::default(), found: OnceLock::new() }) as _
        })
    }
}

fn address(at: &Entry, text: &str, problems: &mut Problems) -> Option<Url> {
    match Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Some(url),
        Ok(url) if url.scheme() == "file" && url.to_file_path().is_ok() => Some(url),
        Ok(_) => {
            problems.add(at.node.place, "`url` must be an http, https or file address");
            None
        }
        Err(error) => {
            let problem = problems.add(at.node.place, format!("`url` is not an address: {error}"));
            problem.help("for a disk on this machine write `file = \"…\"` instead");
            None
        }
    }
}

fn wanted(at: &Entry, text: &str, folder: &Path, problems: &mut Problems) -> Option<Wanted> {
    let Some(list) = text.strip_prefix("file:") else {
        return match Checksum::parse(text) {
            Ok(checksum) => Some(Wanted::Given(checksum)),
            Err(why) => {
                problems.add(at.node.place, format!("`checksum` cannot be used: {why}")).help(format!("write {FORMS}"));
                None
            }
        };
    };
    let url = match Url::parse(list) {
        Ok(url) => url,
        // A list beside the template, or `file:///…`.
        Err(_) => {
            let path = std::path::absolute(folder.join(list)).ok().filter(|path| path.is_file());
            let Some(url) = path.and_then(|path| Url::from_file_path(path).ok()) else {
                problems.add(at.node.place, format!("`checksum` names a list that is not there: {list}")).help(format!("write {FORMS}"));
                return None;
            };
            url
        }
    };
    // Over plain http anyone on the way can write the list and the disk both.
    let fine = match url.scheme() {
        "https" => url.has_host(),
        "http" => is_loopback(&url),
        "file" => url.to_file_path().is_ok(),
        _ => false,
    };
    if !fine {
        let problem = problems.add(at.node.place, "a list of checksums must come over https");
        problem.help("what comes over another way can be replaced together with the disk; or write the digest itself here");
        return None;
    }
    Some(Wanted::Listed(url))
}

/// The last part of an address, decoded: the name in a list of checksums.
fn last_part(url: &Url) -> Option<String> {
    let part = url.path_segments()?.next_back()?.as_bytes();
    let mut name = Vec::new();
    let mut at = 0;
    while let Some(byte) = part.get(at) {
        let digits = part.get(at + 1..at + 3).and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()).filter(|_| *byte == b'%') {
            Some(decoded) => {
                name.push(decoded);
                at += 3;
            }
            None => {
                name.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8(name).ok().filter(|name| !name.is_empty())
}

/// Where the checksum comes from.
#[derive(Debug)]
enum Wanted {
    /// The template.
    Given(Checksum),
    /// A list. It is asked at every bake, since it may name a newer disk; so
    /// nothing is known of the base before.
    Listed(Url),
}

/// What is to be got, once the checksum is known.
struct Found {
    checksum: Checksum,
    shelf: Shelf,
}

struct UrlSource {
    url: Url,
    wanted: Wanted,
    cache: PathBuf,
    site: Site,
    patience: Patience,
    found: OnceLock<Found>,
}

impl UrlSource {
    fn found(&self, checksum: &Checksum) -> &Found {
        self.found.get_or_init(|| Found { checksum: checksum.clone(), shelf: Shelf::new(&self.cache, &shelf_id(checksum)) })
    }

    async fn find(&self, context: &Context) -> Result<&Found> {
        let list = match &self.wanted {
            Wanted::Given(checksum) => return Ok(self.found(checksum)),
            Wanted::Listed(list) => list,
        };
        if let Some(found) = self.found.get() {
            return Ok(found);
        }
        let text = match list.to_file_path() {
            Ok(path) if list.scheme() == "file" => {
                let bytes = std::fs::read(&path).trying(|| format!("read the checksums in {}", path.display()))?;
                String::from_utf8_lossy(&bytes).into_owned()
            }
            _ => Downloader::new(&self.site, list.clone(), self.patience, context.reports.clone())?.text().await?,
        };
        let name = last_part(&self.url).unwrap_or_default();
        let checksum = checksum::find(&text, &name).map_err(|why| {
            Error::new(Code::Base, format!("{} has no checksum for the base: {why}", shown(list)))
                .next("check that `url` and `checksum` in [base] belong together")
        })?;
        context.reports.note(format!("{} says {checksum} for {name}", shown(list)));
        Ok(self.found(&checksum))
    }

    /// Gets the file to `part`, verified.
    async fn get(&self, checksum: &Checksum, part: &Path, context: &Context) -> Result<()> {
        let Some(source) = self.url.to_file_path().ok().filter(|_| self.url.scheme() == "file") else {
            let downloader = Downloader::new(&self.site, self.url.clone(), self.patience, context.reports.clone())?;
            return downloader.download(checksum, part).await;
        };
        // Copied first and digested then: what is checked is what is used.
        let (from, to) = (source.clone(), part.to_owned());
        let copied = tokio::task::spawn_blocking(move || std::fs::copy(from, to)).await.map_err(std::io::Error::other).flatten();
        copied.trying(|| format!("copy {}", source.display()))?;
        let actual = digest(part, checksum, context).await?;
        if actual != *checksum {
            kiln_model::cleanup::remove_path(part)?;
            return Err(mismatch(&source.display().to_string(), checksum, &actual, None));
        }
        Ok(())
    }

    /// Whether a cached disk is still what it was.
    async fn is_whole(&self, made: &Made, checksum: &Checksum, context: &Context) -> Result<bool> {
        let whole = digest(&made.disk(), checksum, context).await? == *checksum;
        if whole {
            context.reports.note(format!("the cached copy of the base still is {checksum}"));
        } else {
            context.reports.warn(format!("the cached copy of the base is no longer {checksum}: it is downloaded anew"));
        }
        Ok(whole)
    }

    fn base(&self, made: &Made) -> Result<Base> {
        let unknown = || Error::new(Code::Corrupt, format!("{} is of another kiln", made.folder.display())).next("run again with --fresh");
        made.card.base(&self.label(), made.disk()).ok_or_else(unknown)
    }
}

/// What a base is called in the cache.
fn shelf_id(checksum: &Checksum) -> String {
    format!("{}-{}", checksum.algorithm.name(), checksum.hex)
}

async fn digest(path: &Path, like: &Checksum, context: &Context) -> Result<Checksum> {
    let what = || format!("read {}", path.display());
    let mut file = File::open(path).trying(what)?;
    let total = file.metadata().trying(what)?.len();
    let mut hasher = Hasher::new(like.algorithm);
    let mut told = 0;
    let mut progress = |done| {
        if done - told >= 64 << 20 || done == total {
            told = done;
            context.reports.progress("base", done, Some(total));
        }
    };
    digest_into(&mut file, &mut hasher, &mut progress).await.trying(what)?;
    Ok(hasher.finish())
}

#[async_trait]
impl BaseSource for UrlSource {
    fn label(&self) -> String {
        format!("url {}", shown(&self.url))
    }

    fn known(&self) -> Result<Option<Digest>> {
        let found = match &self.wanted {
            Wanted::Given(checksum) => self.found(checksum),
            Wanted::Listed(_) => match self.found.get() {
                Some(found) => found,
                None => return Ok(None),
            },
        };
        Ok(found.shelf.current()?.and_then(|made| made.card.disk))
    }

    async fn fetch(&self, fresh: bool, context: &Context) -> Result<Base> {
        let Found { checksum, shelf } = self.find(context).await?;
        if !fresh && let Some(made) = shelf.take()? {
            return self.base(&made);
        }
        let _making = shelf.making(&self.label(), context).await?;
        // By now another bake may have got it. Nothing about a digest changes,
        // so `fresh` only asks whether what is there is still what it was.
        if let Some(made) = shelf.take()?
            && (!fresh || self.is_whole(&made, checksum, context).await?)
        {
            return self.base(&made);
        }
        // Not registered for removal: what came is what the next run goes on with.
        let part = cache::part(&self.cache, &shelf_id(checksum), self.url.as_str());
        let downloads = part.parent().unwrap_or(&self.cache);
        std::fs::create_dir_all(downloads).trying(|| format!("make {}", downloads.display()))?;
        self.get(checksum, &part, context).await?;
        let draft = shelf.draft(context)?;
        std::fs::rename(&part, draft.disk()).trying(|| format!("move {}", part.display()))?;
        let found = inspect(&draft.disk(), &format!("what {} gives", shown(&self.url)), &context.work).await?;
        let length = std::fs::metadata(draft.disk()).trying(|| format!("read {}", draft.disk().display()))?.len();
        let card = Card::new(&self.label(), &found.disk, length, found.firmware, None);
        let made = shelf.commit(draft, card, context).await?;
        self.base(&made.ok_or_else(|| Error::new(Code::Failed, "the base vanished from the cache while it was put there"))?)
    }

    fn remember(&self, base: &Base, digest: &Digest) -> Result<()> {
        match self.found.get() {
            Some(found) => found.shelf.remember(&base.file()?.path, digest),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;

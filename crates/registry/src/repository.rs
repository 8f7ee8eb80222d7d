//! Manifests and tags of one repository.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use kiln_model::{Code, Digest, Error, Result};
use reqwest::{Method, StatusCode, Url, header};
use serde::Deserialize;

use crate::auth::Scope;
use crate::headers::{next_link, text};
use crate::host::{Answer, Ask, Host, Target, named};
use crate::limit::Limit;

/// Manifests end here, at every registry.
pub(crate) const MANIFEST: u64 = 4 << 20;
/// A page of tags or referrers.
const PAGE: u64 = 16 << 20;
/// Nobody has more pages than this: a registry whose pages point in a circle.
const PAGES: usize = 10_000;
/// Tags asked for at once.
const TAGS: usize = 1000;
/// What a registry may answer with.
pub(crate) const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.artifact.manifest.v1+json;q=0.5";

const DIGEST: header::HeaderName = header::HeaderName::from_static("docker-content-digest");
const SUBJECT: header::HeaderName = header::HeaderName::from_static("oci-subject");

/// A manifest that came.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// Of the bytes; verified.
    pub digest: Digest,
    /// What the registry calls it.
    pub media_type: String,
    /// As they are stored.
    pub bytes: Vec<u8>,
}

/// A manifest that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    /// Of the bytes; the registry confirmed it where it says any.
    pub digest: Digest,
    /// Whether the registry answered that it knows the manifest's `subject`
    /// (`OCI-Subject`): else the fallback tag is the client's to keep, as
    /// [`Repository::attach`] does.
    pub subject_known: bool,
}

/// One repository of one registry. Clones share everything.
#[derive(Debug, Clone)]
pub struct Repository {
    pub(crate) host: Arc<Host>,
    pub(crate) name: Arc<str>,
    /// Upload sessions that a registry opened where it could not mount.
    pub(crate) sessions: Arc<Mutex<HashMap<Digest, Url>>>,
    /// Held while an index at a fallback tag is merged.
    pub(crate) merging: Arc<tokio::sync::Mutex<()>>,
}

impl Repository {
    pub(crate) fn new(host: Arc<Host>, name: String) -> Self {
        Self { host, name: name.into(), sessions: Arc::default(), merging: Arc::default() }
    }

    /// `host` or `host:port`, as it was given.
    pub fn host(&self) -> &str {
        self.host.name()
    }

    /// `namespace/name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many transfers this host bears at once; shared by all its
    /// repositories. [`Repository::read`] and [`Repository::upload`] tell it
    /// what they see, but never wait for it: whoever starts several transfers
    /// takes a permit for each.
    pub fn limit(&self) -> Limit {
        self.host.limit.clone()
    }

    /// For people.
    pub(crate) fn shown(&self) -> String {
        format!("{}/{}", self.host.name(), self.name)
    }

    /// A request below this repository.
    pub(crate) fn request(&self, what: String, method: Method, path: &str, actions: &str) -> Ask<'_> {
        Ask::new(&self.name, what, method, Target::Path(format!("{}/{path}", self.name)), Scope::on(&self.name, actions))
    }

    /// What `tag` points to; none when there is no such tag.
    ///
    /// # Errors
    /// As [`Repository::manifest`].
    pub async fn resolve(&self, tag: &str) -> Result<Option<Digest>> {
        check_pointer(tag)?;
        let what = format!("resolve {}", self.pointed(tag));
        let ask = self.request(what, Method::HEAD, &format!("manifests/{tag}"), "pull").header(header::ACCEPT, MANIFESTS);
        let answer = self.host.ask(&ask).await?;
        match answer.status {
            StatusCode::OK => {
                if let Some(digest) = text(&answer.headers, DIGEST).and_then(|digest| digest.parse().ok()) {
                    return Ok(Some(digest));
                }
            }
            StatusCode::NOT_FOUND => return Ok(None),
            // Says nothing of why, having no body: the same question with one does.
            _ => {}
        }
        Ok(self.manifest(tag).await?.map(|manifest| manifest.digest))
    }

    /// The manifest that a tag or a digest (`sha256:…`) names; none when there
    /// is none.
    ///
    /// # Errors
    /// [`Code::DigestMismatch`] when the bytes are not what the digest says.
    /// [`Code::Infrastructure`] when the registry cannot be reached, or fails
    /// for longer than [`crate::Patience`]. [`Code::Failed`] when it refuses.
    pub async fn manifest(&self, tag_or_digest: &str) -> Result<Option<Fetched>> {
        check_pointer(tag_or_digest)?;
        let what = format!("read the manifest {}", self.pointed(tag_or_digest));
        let ask = self
            .request(what, Method::GET, &format!("manifests/{tag_or_digest}"), "pull")
            .header(header::ACCEPT, MANIFESTS)
            .limit(MANIFEST);
        let mut again = false;
        loop {
            let answer = self.host.ask(&ask).await?;
            match answer.status {
                StatusCode::OK => {}
                StatusCode::NOT_FOUND => return Ok(None),
                _ => return Err(self.host.refused(&ask, &answer).await),
            }
            let digest = Digest::of(&answer.bytes);
            // For a tag, what the registry says that it sends is all there is.
            let named = tag_or_digest.parse().ok().or_else(|| text(&answer.headers, DIGEST)?.parse().ok());
            match named.filter(|named| *named != digest) {
                None => return Ok(Some(Fetched { digest, media_type: media_type(&answer), bytes: answer.bytes })),
                Some(named) if again => return Err(self.not_what_it_says(&ask.what, &named, &digest)),
                Some(named) => self.read_again(&ask.what, &named, &digest),
            }
            again = true;
        }
    }

    /// The error for bytes that are not those of their digest.
    pub(crate) fn not_what_it_says(&self, what: &str, named: &Digest, actual: &Digest) -> Error {
        Error::new(Code::DigestMismatch, format!("cannot {what}: what {} sent is {actual}, and not {named}", self.host.name()))
            .next("nothing of it was kept. It is damaged at the registry or changed on the way: push it again from where it is whole")
    }

    /// Tells that bytes which are not those of their digest are read once more.
    pub(crate) fn read_again(&self, what: &str, named: &Digest, actual: &Digest) {
        self.host.note(format!("cannot {what}: what {} sent is {actual}, and not {named}; it is read again", self.host.name()));
    }

    /// Stores a manifest under a tag or its digest.
    ///
    /// # Errors
    /// [`Code::Refused`] when the tag points to something else and the
    /// registry does not let tags be moved. [`Code::DigestMismatch`] when
    /// `tag_or_digest` or the registry's answer is not the digest of `bytes`.
    /// Else as [`Repository::manifest`].
    pub async fn put_manifest(&self, tag_or_digest: &str, media_type: &str, bytes: &[u8]) -> Result<Pushed> {
        check_pointer(tag_or_digest)?;
        let what = format!("store the manifest {}", self.pointed(tag_or_digest));
        let digest = Digest::of(bytes);
        let by_digest = tag_or_digest.parse::<Digest>().ok();
        if let Some(named) = by_digest.filter(|named| *named != digest) {
            return Err(Error::new(Code::DigestMismatch, format!("cannot {what}: its bytes are {digest}, and not {named}")));
        }
        if bytes.len() as u64 > MANIFEST {
            return Err(Error::new(Code::Failed, format!("cannot {what}: it has {} bytes, and registries take {MANIFEST}", bytes.len())));
        }
        let ask = self
            .request(what, Method::PUT, &format!("manifests/{tag_or_digest}"), "pull,push")
            .header(header::CONTENT_TYPE, media_type)
            .body(Bytes::copy_from_slice(bytes));
        let answer = self.host.ask(&ask).await?;
        if !answer.status.is_success() {
            if by_digest.is_none() && is_immutable(&answer) {
                return self.immutable(tag_or_digest, &ask, &answer, digest).await;
            }
            return Err(self.host.refused(&ask, &answer).await);
        }
        if let Some(stored) = text(&answer.headers, DIGEST).and_then(|stored| stored.parse::<Digest>().ok()).filter(|s| *s != digest) {
            return Err(Error::new(
                Code::DigestMismatch,
                format!("cannot {}: {} stored {stored}, and not the {digest} that was sent", ask.what, self.host.name()),
            )
            .next("run the same command again; if it stays so, something between here and the registry changes what is sent"));
        }
        Ok(Pushed { digest, subject_known: answer.headers.contains_key(SUBJECT) })
    }

    /// What is to be said when a tag may not be moved.
    async fn immutable(&self, tag: &str, ask: &Ask<'_>, answer: &Answer, digest: Digest) -> Result<Pushed> {
        let now = self.resolve(tag).await?;
        if now == Some(digest) {
            // Some refuse even what changes nothing, as when the answer to the
            // first attempt was lost. Whether the subject is known, the
            // manifest's own address tells.
            let by_digest = self.request(ask.what.clone(), Method::PUT, &format!("manifests/{digest}"), "pull,push");
            let by_digest = Ask { headers: ask.headers.clone(), body: ask.body.clone(), ..by_digest };
            let again = self.host.ask(&by_digest).await?;
            let subject_known = again.status.is_success() && again.headers.contains_key(SUBJECT);
            return Ok(Pushed { digest, subject_known });
        }
        let points = now.map_or_else(|| "exists".to_owned(), |now| format!("is {now}"));
        let mut error = Error::new(
            Code::Refused,
            format!("cannot {}: {}:{tag} {points}, and the registry does not let it become {digest}", ask.what, self.shown()),
        )
        .next("what was published under this tag stays: push under another one");
        error = error.detail(format!("{} answered {}", named(&answer.url), answer.status));
        if let Some(said) = answer.said() {
            error = error.detail(said);
        }
        Err(error)
    }

    /// Removes a manifest; tells whether there was one.
    ///
    /// # Errors
    /// [`Code::Failed`] when the registry does not remove. Else as
    /// [`Repository::manifest`].
    pub async fn delete_manifest(&self, digest: &Digest) -> Result<bool> {
        let what = format!("remove the manifest {digest} from {}", self.shown());
        let ask = self.request(what, Method::DELETE, &format!("manifests/{digest}"), "pull,push,delete");
        let answer = self.host.ask(&ask).await?;
        match answer.status {
            status if status.is_success() => Ok(true),
            // Perhaps it was the lost answer's doing.
            StatusCode::NOT_FOUND => Ok(answer.again),
            StatusCode::METHOD_NOT_ALLOWED => {
                Err(self.host.refused(&ask, &answer).await.next("this registry does not remove by request: use its own means"))
            }
            _ => Err(self.host.refused(&ask, &answer).await),
        }
    }

    /// All tags, sorted; none when the repository is unknown.
    ///
    /// # Errors
    /// As [`Repository::manifest`].
    pub async fn tags(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            tags: Option<Vec<String>>,
        }

        let what = format!("list the tags of {}", self.shown());
        let ask = self.request(what, Method::GET, &format!("tags/list?n={TAGS}"), "pull").limit(PAGE);
        let mut tags = Vec::new();
        let found = self
            .pages(ask, |answer| {
                let page: Page = serde_json::from_slice(&answer.bytes)?;
                tags.extend(page.tags.unwrap_or_default());
                Ok(())
            })
            .await?;
        match found {
            Pages::All => {}
            Pages::Refused(refused) => {
                let (ask, answer) = *refused;
                if answer.status == StatusCode::NOT_FOUND {
                    return Ok(Vec::new());
                }
                return Err(self.host.refused(&ask, &answer).await);
            }
        }
        // Not every registry sorts, and pages overlap when tags are made meanwhile.
        tags.sort();
        tags.dedup();
        Ok(tags)
    }

    /// Reads page after page, each given to `take`.
    pub(crate) async fn pages<'a>(
        &'a self,
        mut ask: Ask<'a>,
        mut take: impl FnMut(&Answer) -> Result<(), serde_json::Error>,
    ) -> Result<Pages<'a>> {
        let mut seen = std::collections::HashSet::new();
        for _ in 0..PAGES {
            let answer = self.host.ask(&ask).await?;
            if answer.status != StatusCode::OK {
                return Ok(Pages::Refused(Box::new((ask, answer))));
            }
            take(&answer).map_err(|error| {
                Error::new(Code::Failed, format!("cannot {}: {} answered with something else", ask.what, named(&answer.url)))
                    .because(error)
                    .next("check that the host is a registry")
            })?;
            let Some(next) = next_link(&answer.headers) else { return Ok(Pages::All) };
            let next = match self.host.located(&answer.url, &next).await {
                Ok(next) => next,
                Err(kiln_http::Failed::Final(error) | kiln_http::Failed::Passing { error, .. }) => return Err(error),
            };
            if !seen.insert(next.clone()) {
                break;
            }
            ask.target = Target::At(next);
        }
        Err(Error::new(Code::Failed, format!("cannot {}: the pages of {} never end", ask.what, self.host.name()))
            .next("tell whoever runs the registry"))
    }

    /// A tag or digest of this repository, for people.
    fn pointed(&self, tag_or_digest: &str) -> String {
        let mark = if tag_or_digest.contains(':') { '@' } else { ':' };
        format!("{}{mark}{tag_or_digest}", self.shown())
    }

    pub(crate) fn take_session(&self, digest: &Digest) -> Option<Url> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(digest)
    }
}

/// How reading page after page ended.
pub(crate) enum Pages<'a> {
    /// There is no further one.
    All,
    /// With another answer to this request.
    Refused(Box<(Ask<'a>, Answer)>),
}

/// # Errors
/// [`Code::Usage`] for what is no tag and no digest, and would be another
/// address.
fn check_pointer(text: &str) -> Result<()> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let tag = text.len() <= 128 && text.bytes().next().is_some_and(word) && text.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    if tag || text.parse::<Digest>().is_ok() {
        return Ok(());
    }
    Err(Error::new(Code::Usage, format!("`{text}` is neither a tag nor a digest")).next("write TAG or sha256:<64 hex digits>"))
}

/// The media type that the registry names, or else the manifest itself.
fn media_type(answer: &Answer) -> String {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Manifest {
        media_type: Option<String>,
    }
    let named = text(&answer.headers, header::CONTENT_TYPE).map(|kind| kind.split(';').next().unwrap_or(kind).trim().to_owned());
    match named {
        Some(named) if !matches!(named.as_str(), "" | "application/json" | "application/octet-stream" | "text/plain") => named,
        _ => {
            let own = serde_json::from_slice(&answer.bytes).ok().and_then(|manifest: Manifest| manifest.media_type);
            own.or(named).unwrap_or_else(|| "application/vnd.oci.image.manifest.v1+json".into())
        }
    }
}

/// Whether an answer to a PUT says that a tag may not be moved. There is no
/// standard for it: Harbor answers 412, Quay and others 409, ECR 400 with
/// `TAG_INVALID` and "immutable", ACR 405 for what is locked.
fn is_immutable(answer: &Answer) -> bool {
    match answer.status.as_u16() {
        409 | 412 => true,
        400 | 403 | 405 | 422 => {
            let body = String::from_utf8_lossy(&answer.bytes).to_lowercase();
            ["immutable", "cannot be overwritten", "already exists", "operation is disallowed", "locked"]
                .iter()
                .any(|word| body.contains(word))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, kind: &str, body: &str) -> Answer {
        let mut headers = header::HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, kind.parse().unwrap());
        let url = Url::parse("https://h/v2/").unwrap();
        Answer { status: StatusCode::from_u16(status).unwrap(), headers, bytes: body.into(), url, again: false }
    }

    #[test]
    fn how_registries_say_that_a_tag_stays() {
        let ecr = r#"{"errors":[{"code":"TAG_INVALID","message":"The image tag '1' already exists in the 'x' repository and cannot be overwritten because the repository is immutable."}]}"#;
        for (status, body, expected) in [
            (409, "", true),
            (
                412,
                r#"{"errors":[{"code":"PRECONDITION","message":"Failed to process request due to 'web:1' configured as immutable."}]}"#,
                true,
            ),
            (400, ecr, true),
            (
                405,
                r#"{"errors":[{"code":"UNSUPPORTED","message":"The operation is disallowed on this registry, repository or image."}]}"#,
                true,
            ),
            (400, r#"{"errors":[{"code":"MANIFEST_INVALID","message":"manifest invalid"}]}"#, false),
            (403, r#"{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}"#, false),
            (500, "immutable", false),
        ] {
            assert_eq!(is_immutable(&answer(status, "application/json", body)), expected, "{status} {body}");
        }
        assert_eq!(answer(400, "application/json", ecr).said().unwrap().split(':').next(), Some("TAG_INVALID"));
        assert_eq!(answer(502, "text/html", "<html>\n").said(), None);
        assert_eq!(answer(502, "text/plain", "\n bad\x1b[2J gateway\n").said().as_deref(), Some("bad [2J gateway"));
    }

    #[test]
    fn media_types() {
        let own = r#"{"mediaType":"application/x"}"#;
        assert_eq!(media_type(&answer(200, "application/y; charset=utf-8", own)), "application/y");
        assert_eq!(media_type(&answer(200, "application/json", own)), "application/x");
        assert_eq!(media_type(&answer(200, "application/json", "{}")), "application/json");
    }

    #[test]
    fn tags_and_digests() {
        let digest = Digest::of("x").to_string();
        for right in ["1.4.0", "latest", "_x", "kiln.production.000017", digest.as_str(), &"a".repeat(128)] {
            assert!(check_pointer(right).is_ok(), "{right}");
        }
        for wrong in ["", ".x", "-x", "a/b", "../x", "a?b", "a b", "sha256:12", "a:b", &"a".repeat(129)] {
            assert_eq!(check_pointer(wrong).unwrap_err().kind(), Code::Usage, "{wrong}");
        }
    }
}

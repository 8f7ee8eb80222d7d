//! The HTTP client of the downloads and the registries: certificates, proxy,
//! redirects, and which failures pass when one waits.
//!
//! What an address means, and what is to be done when it fails for good, is
//! known to the caller alone: this crate sorts failures, the caller words them.

use std::error::Error as StdError;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use kiln_model::{Code, Error, Result, ResultExt as _};
use reqwest::header::{self, HeaderMap};
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, NoProxy, Proxy, StatusCode};
pub use reqwest::{Error as Broken, Response, Url};

/// A redirect chain longer than this is a loop.
const REDIRECTS: usize = 10;
const CONNECT: Duration = Duration::from_secs(20);
/// A connection that was idle for this long is not used again: the server may
/// be about to close it, and what is being sent then could not be sent again.
const IDLE: Duration = Duration::from_secs(20);
/// A server that sends nothing for this long is taken for gone.
pub const STALL: Duration = Duration::from_secs(60);

/// What the site says of its network.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Proxy for http and https, `http://host:port`. Without one, what the
    /// environment says (`https_proxy`, `no_proxy`).
    pub proxy: Option<String>,
    /// A file of PEM certificates to trust beside the system's.
    pub ca_certificates: Option<PathBuf>,
}

/// How often and how long to wait for what passes.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Failures in a row, without a byte between them, until it is given up.
    pub failures: u32,
    /// Wait after the first; doubled after each further one.
    pub first: Duration,
    /// A server that asks for a longer wait than this is not waited for.
    pub longest: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { failures: 6, first: Duration::from_millis(500), longest: Duration::from_secs(120) }
    }
}

impl Patience {
    /// The wait after so many failures in a row.
    pub fn wait(&self, failures: u32) -> Duration {
        self.first.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(self.longest)
    }
}

/// Why an attempt failed.
#[derive(Debug)]
pub enum Failed {
    /// Trying again may help, after `wait` if the server named one.
    Passing {
        /// What happened.
        error: Error,
        /// `Retry-After`.
        wait: Option<Duration>,
    },
    /// Trying again does not help.
    Final(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Who follows redirects, and who notices that nothing comes any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// The client does both: redirects are followed as [`may_follow`] allows,
    /// and a server that sends nothing for [`STALL`] is taken for gone.
    Simple,
    /// The caller does both, since the client would take the time that a body
    /// is being *sent* for silence. Each connection carries one request at a
    /// time (HTTP/1.1), so that a reset ends one transfer and not all of them.
    Bare,
}

/// A client for `url` and others at the same host.
///
/// TLS is rustls with ring. Roots are the system's and, beside them, those of
/// `settings.ca_certificates`. Loopback is never asked through a proxy.
///
/// # Errors
/// [`Code::Usage`] for a proxy or a file of certificates that cannot be used,
/// [`Code::Missing`] when the machine has no certificates and `url` is https.
pub fn client(settings: &Settings, url: &Url, manner: Manner) -> Result<Client> {
    // Fails when somebody has installed one already: just as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = || -> Result<reqwest::ClientBuilder> {
        let mut builder = Client::builder().user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION"))).connect_timeout(CONNECT);
        builder = match manner {
            Manner::Simple => builder.read_timeout(STALL).redirect(Policy::custom(redirect)),
            Manner::Bare => builder.redirect(Policy::none()).http1_only().pool_idle_timeout(IDLE),
        };
        if is_loopback(url) {
            builder = builder.no_proxy();
        } else if let Some(proxy) = &settings.proxy {
            let proxy = Proxy::all(proxy).map_err(|error| {
                Error::new(Code::Usage, "the proxy of the site's configuration is not a URL")
                    .because(error.without_url())
                    .next("write `[proxy]` as \"http://host:port\"")
            })?;
            builder = builder.proxy(proxy.no_proxy(NoProxy::from_env()));
        }
        Ok(builder)
    };
    let mut own = Vec::new();
    if let Some(path) = &settings.ca_certificates {
        let pem = std::fs::read(path).trying(|| format!("read the certificates in {}", path.display()))?;
        own = Certificate::from_pem_bundle(&pem).map_err(|error| {
            Error::new(Code::Usage, format!("{} holds no certificates in PEM form", path.display()))
                .because(error)
                .next("give `ca_certificates` a file of PEM certificates")
        })?;
    }
    match builder()?.tls_certs_merge(own).build() {
        Ok(client) => Ok(client),
        // A machine without any certificates can still fetch over plain http.
        Err(_) if url.scheme() == "http" => builder()?.tls_certs_only([]).build().trying(|| "make an HTTP client".into()),
        Err(error) => Err(Error::new(Code::Missing, "cannot check the certificates of https servers").because(error).next(
            "install the system's certificates (`apt-get install ca-certificates`), or set `ca_certificates` in kiln's configuration",
        )),
    }
}

fn redirect(attempt: reqwest::redirect::Attempt<'_>) -> reqwest::redirect::Action {
    match may_follow(attempt.previous(), attempt.url()) {
        Ok(()) => attempt.follow(),
        Err(why) => attempt.error(why),
    }
}

/// Whether a redirect to `next` may be followed, after `previous`.
///
/// # Errors
/// Why not: the chain is too long, or leaves https.
pub fn may_follow(previous: &[Url], next: &Url) -> Result<(), String> {
    if previous.len() > REDIRECTS {
        return Err(format!("more than {REDIRECTS} redirects"));
    }
    // What was asked for over https is not taken from a line that anyone can
    // write to, whatever its digest will say.
    if previous.iter().any(|url| url.scheme() == "https") && next.scheme() != "https" {
        return Err(format!("it redirects from https to plain {} at {}", next.scheme(), next.host_str().unwrap_or("no host")));
    }
    Ok(())
}

/// Whether `url` leads to this machine.
pub fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// `url` for people: without user, password, query and fragment, any of which
/// may be a secret.
pub fn shown(url: &Url) -> String {
    let mut url = url.clone();
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

/// What kind of failure of a request or of a body it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The network or the server; trying again may help.
    Passing,
    /// TLS refused the peer's certificate.
    Certificate,
    /// A redirect that may not be followed, or a request that cannot be made.
    Address,
}

/// Sorts the failure of a request or of a body.
pub fn kind(error: &reqwest::Error) -> Kind {
    if certificate(error) {
        Kind::Certificate
    } else if error.is_redirect() || error.is_builder() {
        Kind::Address
    } else {
        Kind::Passing
    }
}

/// Whether TLS refused the peer: the next attempt would get the same answer.
fn certificate(error: &(dyn StdError + 'static)) -> bool {
    matches!(tls_error(error), Some(rustls::Error::InvalidCertificate(_)))
}

/// Whether a request failed within TLS, with a peer that speaks it.
pub fn speaks_tls(error: &reqwest::Error) -> bool {
    // What is no message of TLS at all comes from one that does not.
    tls_error(error).is_some_and(|error| !matches!(error, rustls::Error::InvalidMessage(_)))
}

/// The error of TLS among the causes of `error`.
fn tls_error<'e>(error: &'e (dyn StdError + 'static)) -> Option<&'e rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(tls) = error.downcast_ref() {
            return Some(tls);
        }
        // An io::Error hides what it wraps, maybe another one, from source().
        let inner = error.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref());
        cause = inner.map_or_else(|| error.source(), |inner| Some(inner as &(dyn StdError + 'static)));
    }
    None
}

/// Whether an answer with this status may be another one when asked again.
pub fn passes(status: StatusCode) -> bool {
    status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED && status != StatusCode::HTTP_VERSION_NOT_SUPPORTED
        || matches!(status.as_u16(), 408 | 425 | 429)
}

/// How long a server asks to be left alone (`Retry-After`, RFC 9110, 10.2.3):
/// seconds, or until a date. A date that has passed is no wait at all.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    // By the server's own clock, where it tells it: ours may be off.
    let now = headers.get(header::DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
    Some(until.duration_since(now.unwrap_or_else(SystemTime::now)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_shown_without_secrets() {
        let url = Url::parse("https://user:hunter2@example.org/disk.qcow2?X-Signature=abc#frag").unwrap();
        assert_eq!(shown(&url), "https://example.org/disk.qcow2");
    }

    #[test]
    fn https_is_never_left() {
        let url = |text: &str| Url::parse(text).unwrap();
        assert!(may_follow(&[url("http://a/")], &url("http://b/")).is_ok());
        assert!(may_follow(&[url("http://a/")], &url("https://b/")).is_ok());
        assert!(may_follow(&[url("https://a/")], &url("https://b/")).is_ok());
        let error = may_follow(&[url("https://a/")], &url("http://b/")).unwrap_err();
        assert_eq!(error, "it redirects from https to plain http at b");
        assert!(may_follow(&[url("http://a/"), url("https://b/")], &url("http://c/")).is_err());
        assert!(may_follow(&vec![url("http://a/"); 11], &url("http://a/")).is_err());
    }

    #[test]
    fn loopback() {
        for (text, expected) in [
            ("http://localhost:80/x", true),
            ("http://127.0.0.1:5000/x", true),
            ("http://[::1]/x", true),
            ("http://127.0.0.1.example.org/", false),
            ("https://example.org/", false),
        ] {
            assert_eq!(is_loopback(&Url::parse(text).unwrap()), expected, "{text}");
        }
    }

    #[test]
    fn waits_grow_and_end() {
        let patience = Patience::default();
        assert_eq!(patience.wait(1), Duration::from_millis(500));
        assert_eq!(patience.wait(3), Duration::from_secs(2));
        assert_eq!(patience.wait(u32::MAX), patience.longest);
    }

    #[test]
    fn servers_name_a_wait_in_seconds_or_by_a_date() {
        let wait = |value: &str, date: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, value.parse().unwrap());
            if let Some(date) = date {
                headers.insert(header::DATE, date.parse().unwrap());
            }
            retry_after(&headers)
        };
        let now = Some("Wed, 21 Oct 2015 07:27:30 GMT");
        assert_eq!(wait(" 7 ", None), Some(Duration::from_secs(7)));
        assert_eq!(wait("Wed, 21 Oct 2015 07:28:00 GMT", now), Some(Duration::from_secs(30)));
        assert_eq!(wait("Wednesday, 21-Oct-15 07:28:00 GMT", now), Some(Duration::from_secs(30)));
        assert_eq!(wait("Wed, 21 Oct 2015 07:28:00 GMT", None), Some(Duration::ZERO));
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(90));
        assert!(wait(&soon, None).is_some_and(|wait| wait > Duration::from_secs(80) && wait <= Duration::from_secs(90)));
        assert_eq!(wait("soon", None), None);
        assert_eq!(wait("-1", None), None);
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }

    #[test]
    fn errors_of_tls_are_found_however_deep() {
        let untrusted = || rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let once = std::io::Error::new(std::io::ErrorKind::InvalidData, untrusted());
        assert!(certificate(&once));
        let twice = std::io::Error::other(once);
        assert!(certificate(&twice));
        let own = Error::new(Code::Failed, "outer").because(twice);
        assert!(certificate(&own));
        assert!(!certificate(&std::io::Error::other(rustls::Error::HandshakeNotComplete)));
        assert!(tls_error(&std::io::Error::from(std::io::ErrorKind::ConnectionReset)).is_none());
    }

    #[test]
    fn only_what_may_change_passes() {
        for (status, expected) in
            [(429, true), (408, true), (500, true), (503, true), (501, false), (505, false), (404, false), (401, false)]
        {
            assert_eq!(passes(StatusCode::from_u16(status).unwrap()), expected, "{status}");
        }
    }
}

//! The HTTP client of the downloads: certificates, proxy, redirects, and which
//! failures pass when one waits.

use std::error::Error as StdError;
use std::time::Duration;

use kiln_model::{Code, Error, Result, ResultExt as _};
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, NoProxy, Proxy, Response, StatusCode, Url, header};

use super::Site;

/// A redirect chain longer than this is a loop.
const REDIRECTS: usize = 10;
const CONNECT: Duration = Duration::from_secs(20);
/// A server that sends nothing for this long is taken for gone.
const STALL: Duration = Duration::from_secs(60);

/// How often and how long to wait for what passes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// Failures in a row, without a byte between them, until it is given up.
    pub(crate) failures: u32,
    /// Wait after the first; doubled after each further one.
    pub(crate) first: Duration,
    /// A server that asks for a longer wait than this is not waited for.
    pub(crate) longest: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { failures: 6, first: Duration::from_millis(500), longest: Duration::from_secs(120) }
    }
}

impl Patience {
    /// The wait after so many failures in a row.
    pub(crate) fn wait(&self, failures: u32) -> Duration {
        self.first.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(self.longest)
    }
}

/// Why an attempt failed.
#[derive(Debug)]
pub(crate) enum Failed {
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

/// A client for `url`.
///
/// TLS is rustls with ring. Roots are the system's and, beside them, those of
/// `site.ca_certificates`. Loopback is never asked through a proxy.
///
/// # Errors
/// [`Code::Usage`] for a proxy or a file of certificates that cannot be used,
/// [`Code::Missing`] when the machine has no certificates and `url` is https.
pub(crate) fn client(site: &Site, url: &Url) -> Result<Client> {
    // Fails when somebody has installed one already: just as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = || -> Result<reqwest::ClientBuilder> {
        let mut builder = Client::builder()
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .read_timeout(STALL)
            .redirect(Policy::custom(redirect));
        if is_loopback(url) {
            builder = builder.no_proxy();
        } else if let Some(proxy) = &site.proxy {
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
    if let Some(path) = &site.ca_certificates {
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

fn may_follow(previous: &[Url], next: &Url) -> Result<(), String> {
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
pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// `url` for people: without user, password, query and fragment, any of which
/// may be a secret.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

/// Sorts the failure of a request or of a body.
pub(crate) fn sort(url: &Url, error: reqwest::Error) -> Failed {
    let error = error.without_url();
    let (redirect, builder) = (error.is_redirect(), error.is_builder());
    let certificate = certificate(&error);
    let failed = Error::new(Code::Infrastructure, format!("cannot download {}", shown(url)));
    if certificate {
        return Failed::Final(
            failed
                .code(Code::Base)
                .because(error)
                .next("check the address; for a server with a certificate of your own, set `ca_certificates` in kiln's configuration"),
        );
    }
    if redirect || builder {
        return Failed::Final(failed.code(Code::Base).because(error).next("check `url` in [base]"));
    }
    Failed::Passing { error: failed.because(error), wait: None }
}

/// Whether TLS refused the peer: the next attempt would get the same answer.
fn certificate(error: &(dyn StdError + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        // An io::Error hides what it wraps from source().
        let inner = error.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref());
        let tls = inner.and_then(|e| e.downcast_ref()).or_else(|| error.downcast_ref::<rustls::Error>());
        if matches!(tls, Some(rustls::Error::InvalidCertificate(_))) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Sorts an answer that is not the one hoped for.
pub(crate) fn refused(url: &Url, response: &Response) -> Failed {
    let status = response.status();
    let passing = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED && status != StatusCode::HTTP_VERSION_NOT_SUPPORTED
        || matches!(status.as_u16(), 408 | 425 | 429);
    let error = Error::new(Code::Infrastructure, format!("cannot download {}: the server answered {status}", shown(url)));
    if passing {
        return Failed::Passing { error, wait: retry_after(response) };
    }
    let next = match status.as_u16() {
        401 | 403 | 407 => "check that this address may be read without a login",
        404 | 410 => "check the address: publishers remove old disks; take a newer one, with its checksum",
        _ => "check `url` in [base]",
    };
    Failed::Final(error.code(Code::Base).next(next))
}

/// `Retry-After` in seconds. (Its other form, a date, is answered by our own
/// backing off.)
fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
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
}

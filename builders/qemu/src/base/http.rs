//! What the failures of [`kiln_http`] mean to a download of a base.

use kiln_http::{Failed, Kind, Manner, Settings, passes, retry_after, shown};
use kiln_model::{Code, Error, Result};
use reqwest::{Client, Response, Url};

use super::Site;

/// A client for `url`, as `site` says.
///
/// # Errors
/// As [`kiln_http::client`].
pub(crate) fn client(site: &Site, url: &Url) -> Result<Client> {
    let settings = Settings { proxy: site.proxy.clone(), ca_certificates: site.ca_certificates.clone() };
    kiln_http::client(&settings, url, Manner::Simple)
}

/// Sorts the failure of a request or of a body.
pub(crate) fn sort(url: &Url, error: reqwest::Error) -> Failed {
    let error = error.without_url();
    let kind = kiln_http::kind(&error);
    let failed = Error::new(Code::Infrastructure, format!("cannot download {}", shown(url))).because(error);
    match kind {
        Kind::Passing => Failed::Passing { error: failed, wait: None },
        Kind::Certificate => Failed::Final(
            failed
                .code(Code::Base)
                .next("check the address; for a server with a certificate of your own, set `ca_certificates` in kiln's configuration"),
        ),
        Kind::Address => Failed::Final(failed.code(Code::Base).next("check `url` in [base]")),
    }
}

/// Sorts an answer that is not the one hoped for.
pub(crate) fn refused(url: &Url, response: &Response) -> Failed {
    let status = response.status();
    let error = Error::new(Code::Infrastructure, format!("cannot download {}: the server answered {status}", shown(url)));
    if passes(status) {
        return Failed::Passing { error, wait: retry_after(response.headers()) };
    }
    let next = match status.as_u16() {
        401 | 403 | 407 => "check that this address may be read without a login",
        404 | 410 => "check the address: publishers remove old disks; take a newer one, with its checksum",
        _ => "check `url` in [base]",
    };
    Failed::Final(error.code(Code::Base).next(next))
}

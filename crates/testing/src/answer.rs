//! Answers that the proxy makes itself.

use bytes::Bytes;
use hyper::header::{HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use crate::flow::Outgoing;

/// An answer with this status, these headers and this body.
pub(crate) fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Response<Outgoing> {
    let body = body.into();
    let mut response = Response::new(if body.is_empty() { Outgoing::Empty } else { Outgoing::Whole(body) });
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(*name), HeaderValue::from_str(value)) {
            response.headers_mut().append(name, value);
        }
    }
    response
}

/// An error in a registry's form.
pub(crate) fn error(status: u16, headers: &[(&str, &str)], code: &str, message: &str) -> Response<Outgoing> {
    let body = serde_json::json!({ "errors": [{ "code": code, "message": message }] }).to_string();
    let mut all = vec![("Content-Type", "application/json")];
    all.extend_from_slice(headers);
    answer(status, &all, body)
}

//! The server: reads a request, counts it, lets it fail where that is planned,
//! and gives it to who knows the service.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HeaderMap};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use super::calls::Calls;
use super::ebs::{self, Refusal};
use super::faults::{Failure, Faults, Verdict};
use super::images::Image;
use super::moto::Upstream;
use super::query::Query;
use super::snapshots::{Shelf, Snapshot};
use super::{REGION, ec2};
use crate::answer::answer;
use crate::flow::Outgoing;
use crate::proxy::Line;

/// No request is larger than so many bytes.
const LARGEST: usize = 4 << 20;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the connections share.
pub(crate) struct Shared {
    /// None where the EBS direct APIs are all that is wanted.
    pub(crate) moto: Option<Upstream>,
    pub(crate) shelf: Shelf,
    pub(crate) state: Mutex<State>,
    pub(crate) faults: Mutex<Faults>,
    pub(crate) calls: Mutex<Calls>,
    /// Held while something is made that a client token names.
    pub(crate) starting: tokio::sync::Mutex<()>,
    /// What the tokens of blocks and pages are made with.
    pub(crate) secret: String,
}

/// What was made.
pub(crate) struct State {
    pub(crate) snapshots: HashMap<String, Snapshot>,
    pub(crate) images: HashMap<String, Image>,
    /// Snapshots that moto makes up for every image.
    pub(crate) phantoms: HashSet<String>,
    /// By region, call and token: the request, and what came of it.
    pub(crate) tokens: HashMap<(String, String, String), (String, String)>,
    /// Instances on their way to a state, and until when.
    pub(crate) moves: BTreeMap<String, (Instant, &'static str)>,
    /// How long what was begun takes: a snapshot, an image, an instance.
    pub(crate) settling: Duration,
    /// Most calls of EBS at once.
    pub(crate) at_once: usize,
    /// Most entries of a page.
    pub(crate) page: usize,
    /// What the root volume of every instance holds.
    pub(crate) disk: Option<std::path::PathBuf>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            snapshots: HashMap::new(),
            images: HashMap::new(),
            phantoms: HashSet::new(),
            tokens: HashMap::new(),
            moves: BTreeMap::new(),
            settling: Duration::from_millis(200),
            at_once: usize::MAX,
            page: usize::MAX,
            disk: None,
        }
    }
}

/// How a service is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    /// The EBS direct APIs.
    Ebs,
    /// EC2's query protocol.
    Ec2,
    /// JSON with the call in a header, such as SSM.
    Json,
    /// The query protocol of the others, such as STS.
    Query,
}

/// One request.
pub(crate) struct Ask {
    pub(crate) method: Method,
    /// Without the query.
    pub(crate) path: String,
    pub(crate) parameters: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) region: String,
    pub(crate) service: Service,
    pub(crate) action: String,
}

impl Ask {
    async fn read(request: Request<Incoming>) -> io::Result<Self> {
        let (parts, body) = request.into_parts();
        let body = Limited::new(body, LARGEST).collect().await.map_err(io::Error::other)?.to_bytes();
        let (path, parameters) = (parts.uri.path().to_owned(), parts.uri.query().unwrap_or_default().to_owned());
        let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
        let (region, signed_for) = scope(header(AUTHORIZATION.as_str()).unwrap_or_default());
        let (service, action) = if path.starts_with("/snapshots") {
            (Service::Ebs, ebs::action(parts.method.as_str(), &path).unwrap_or("Unknown").to_owned())
        } else if let Some(target) = header("x-amz-target") {
            (Service::Json, target.rsplit('.').next().unwrap_or_default().to_owned())
        } else {
            let action = Query::parse(&body).action().to_owned();
            (if signed_for == "ec2" { Service::Ec2 } else { Service::Query }, action)
        };
        Ok(Self { method: parts.method, path, parameters, headers: parts.headers, body, region, service, action })
    }

    /// A header, if it is text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// What the path's query says.
    pub(crate) fn parameter(&self, name: &str) -> Option<String> {
        Query::parse(self.parameters.as_bytes()).get(name).map(str::to_owned)
    }

    /// Path and query.
    pub(crate) fn target(&self) -> String {
        if self.parameters.is_empty() { self.path.clone() } else { format!("{}?{}", self.path, self.parameters) }
    }
}

/// Region and service in `Credential=KEY/20261121/eu-central-1/ec2/aws4_request`.
fn scope(authorization: &str) -> (String, String) {
    let credential = authorization.split_once("Credential=").map_or("", |(_, rest)| rest.split([',', ' ']).next().unwrap_or_default());
    let mut parts = credential.rsplit('/').skip(1);
    let service = parts.next().unwrap_or_default();
    let region = parts.next().filter(|region| !region.is_empty()).unwrap_or(REGION);
    (region.to_owned(), service.to_owned())
}

pub(crate) async fn accept(listener: std::net::TcpListener, shared: Arc<Shared>) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        tokio::spawn(serve(stream, shared.clone()));
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    let line = Arc::new(Line::of(stream.try_clone()?));
    let stream = TcpStream::from_std(stream)?;
    let service = service_fn(move |request| {
        let (shared, line) = (shared.clone(), line.clone());
        async move { shared.handle(Ask::read(request).await?, &line).await }
    });
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    Ok(())
}

/// Ends a call in the books, also when the client is gone before its answer.
struct Under<'a> {
    calls: &'a Mutex<Calls>,
    number: usize,
    status: u16,
}

impl Drop for Under<'_> {
    fn drop(&mut self) {
        lock(self.calls).end(self.number, self.status);
    }
}

impl Shared {
    async fn handle(self: &Arc<Self>, ask: Ask, line: &Line) -> io::Result<Response<Outgoing>> {
        let (number, crowded) = {
            let mut calls = lock(&self.calls);
            (calls.begin(&ask.action, &ask.region), calls.under_way() > lock(&self.state).at_once)
        };
        let mut under = Under { calls: &self.calls, number, status: 0 };
        let mut verdict = lock(&self.faults).judge(&ask.action);
        if verdict == Verdict::Go && crowded && ask.service == Service::Ebs {
            verdict = Verdict::Throttled;
        }
        let response = match verdict {
            Verdict::Fails(Failure::Broken) => return Err(line.reset()),
            Verdict::Fails(Failure::Refused { status, code }) => refusal(ask.service, status, &code, "failed on demand"),
            Verdict::Throttled => throttled(ask.service),
            Verdict::Go => self.answer(&ask).await?,
            Verdict::Fails(Failure::Lost) => {
                self.answer(&ask).await?;
                return Err(line.reset());
            }
        };
        under.status = response.status().as_u16();
        Ok(response)
    }

    async fn answer(self: &Arc<Self>, ask: &Ask) -> io::Result<Response<Outgoing>> {
        match ask.service {
            Service::Ebs => Ok(self.ebs(ask).await),
            Service::Ec2 => Ok(self.ec2(ask).await),
            Service::Json | Service::Query => match &self.moto {
                Some(moto) => moto.pass(ask).await,
                None => Ok(refusal(ask.service, 501, "NotImplemented", "there is no moto behind this front")),
            },
        }
    }
}

/// How each service says that there are too many requests.
fn throttled(service: Service) -> Response<Outgoing> {
    match service {
        Service::Ebs => {
            let reason = "ACCOUNT_THROTTLED";
            Refusal { status: 400, kind: "RequestThrottledException", reason, message: "throttled on demand".into() }.answer()
        }
        Service::Ec2 => refusal(service, 503, "RequestLimitExceeded", "Request limit exceeded."),
        Service::Json => refusal(service, 400, "ThrottlingException", "Rate exceeded"),
        Service::Query => refusal(service, 400, "Throttling", "Rate exceeded"),
    }
}

/// An error in the service's form.
pub(crate) fn refusal(service: Service, status: u16, code: &str, message: &str) -> Response<Outgoing> {
    match service {
        Service::Ebs => {
            let body = serde_json::json!({ "Message": message }).to_string();
            answer(status, &[("Content-Type", "application/json"), ("x-amzn-ErrorType", code)], body)
        }
        Service::Ec2 => ec2::refuse(status, code, message),
        Service::Json => {
            let body = serde_json::json!({ "__type": code, "message": message }).to_string();
            answer(status, &[("Content-Type", "application/x-amz-json-1.1"), ("x-amzn-ErrorType", code)], body)
        }
        Service::Query => {
            let body = format!(
                "<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error><RequestId>0</RequestId></ErrorResponse>"
            );
            answer(status, &[("Content-Type", "text/xml")], body)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn region_and_service_are_what_was_signed() {
        let signed = "AWS4-HMAC-SHA256 Credential=AK/20261121/eu-central-1/ec2/aws4_request, SignedHeaders=host, Signature=0";
        assert_eq!(scope(signed), ("eu-central-1".into(), "ec2".into()));
        assert_eq!(scope(""), (REGION.into(), String::new()));
    }
}

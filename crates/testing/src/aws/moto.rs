//! moto, from PyPI, in a virtual environment of its own, as a child process.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, TRANSFER_ENCODING};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use kiln_model::{Code, Error, Result, ResultExt as _};
use tempfile::TempDir;
use tokio::net::TcpStream;

use super::query::Query;
use super::server::Ask;
use super::xml::Element;
use crate::flow::Outgoing;
use crate::watch::Watched;

/// What is installed. The version is named so that a test means the same next
/// year.
const PACKAGE: &str = "moto[server,ec2,ebs,ssm]==5.2.5";
/// The folder of that version.
const FOLDER: &str = "moto-5.2.5";
/// How long it may take to listen: Python reads some hundred modules first.
const START: Duration = Duration::from_secs(120);
/// Largest answer: moto knows some thousand images.
const LARGEST: usize = 64 << 20;

/// moto's server on a loopback port. It is gone when this is dropped, and when
/// the process of the test dies.
///
/// It proves that calls are right in form, and keeps what EC2 keeps (images,
/// instances, groups, tags). It does not prove that they are right: that is
/// what [`crate::Aws`] before it is for.
#[derive(Debug)]
pub struct Moto {
    address: String,
    _process: Watched,
    _folder: TempDir,
}

impl Moto {
    /// Installs it, unless that was done before, and starts it; returns when it
    /// listens.
    ///
    /// # Errors
    /// [`Code::Missing`] when it cannot be installed, [`Code::Failed`] with its
    /// log when it does not start.
    pub fn start() -> Result<Self> {
        let server = install()?;
        let folder = tempfile::Builder::new().prefix("kiln-moto-").tempdir().trying(|| "make a folder for moto".into())?;
        let log = folder.path().join("log");
        // `-u`: a line of the log is there when it is written.
        let process = Watched::start(&server, &["-H", "127.0.0.1", "-p", "0"], &log, folder.path())?;
        let since = Instant::now();
        loop {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(address) = listening(&said) {
                return Ok(Self { address, _process: process, _folder: folder });
            }
            if !process.runs() || since.elapsed() > START {
                let error = Error::new(Code::Failed, format!("{} does not start", server.display())).detail(said);
                return Err(error.next("remove its folder: it is installed again then"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// The address in ` * Running on http://127.0.0.1:35821`.
fn listening(log: &str) -> Option<String> {
    let (_, rest) = log.split_once("Running on http://")?;
    let end = rest.find(char::is_whitespace)?;
    Some(rest[..end].trim_end_matches('/').to_owned())
}

/// The program `moto_server`, installed into the user's cache if it is not there.
fn install() -> Result<PathBuf> {
    let env = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = env("XDG_CACHE_HOME").or_else(|| env("HOME").map(|home| home.join(".cache")));
    let cache = cache.ok_or_else(|| Error::new(Code::Missing, "no home directory is known").next("set XDG_CACHE_HOME"))?;
    let folder = cache.join("kiln-tests").join(FOLDER);
    let server = folder.join("bin/moto_server");
    let done = folder.join("installed");
    std::fs::create_dir_all(&folder).trying(|| format!("make the folder {}", folder.display()))?;
    // Several tests may want it at once; one installs it.
    let lock = folder.join("lock");
    let file = std::fs::File::create(&lock).trying(|| format!("make {}", lock.display()))?;
    file.lock().trying(|| format!("lock {}", lock.display()))?;
    if done.exists() {
        return Ok(server);
    }
    let run = |program: &Path, arguments: &[&str]| {
        let what = || format!("run {} {}", program.display(), arguments.join(" "));
        let output = Command::new(program).args(arguments).output().trying(what)?;
        if output.status.success() {
            return Ok(());
        }
        let said = [output.stdout, output.stderr].concat();
        let error = Error::new(Code::Missing, format!("cannot {}", what())).detail(String::from_utf8_lossy(&said));
        Err(error.next("moto needs python3-venv, and PyPI"))
    };
    let at = folder.to_string_lossy().into_owned();
    run(Path::new("python3"), &["-m", "venv", "--clear", &format!("{at}/venv")])?;
    run(&folder.join("venv/bin/pip"), &["install", "--quiet", "--disable-pip-version-check", PACKAGE])?;
    std::fs::create_dir_all(folder.join("bin")).trying(|| format!("make the folder {at}/bin"))?;
    let script = format!("#!/bin/sh\nPYTHONUNBUFFERED=1 exec '{at}/venv/bin/moto_server' \"$@\"\n");
    std::fs::write(&server, script).trying(|| format!("write {}", server.display()))?;
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&server, executable).trying(|| format!("write {}", server.display()))?;
    std::fs::write(&done, "").trying(|| format!("write {}", done.display()))?;
    Ok(server)
}

/// moto, as the front speaks to it.
#[derive(Debug, Clone)]
pub(crate) struct Upstream(String);

impl Upstream {
    /// At `127.0.0.1:PORT`.
    pub(crate) fn new(address: &str) -> Self {
        Self(address.into())
    }

    /// Passes a request on as it came.
    pub(crate) async fn pass(&self, ask: &Ask) -> io::Result<Response<Outgoing>> {
        let (status, headers, body) = self.send(ask.method.clone(), &ask.target(), ask.headers.clone(), ask.body.clone()).await?;
        let mut response = Response::new(if body.is_empty() { Outgoing::Empty } else { Outgoing::Whole(body) });
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }

    /// What EC2 in a region answers; `Err` is its own refusal: status and body.
    pub(crate) async fn ec2(&self, region: &str, query: &Query) -> Result<Element, (u16, Bytes)> {
        let kind = "application/x-www-form-urlencoded; charset=utf-8";
        let sent = self.signed(region, "ec2", Method::POST, "/", kind, query.encode().into()).await;
        let (status, body) = sent.map_err(|error| (502, Bytes::from(error.to_string())))?;
        let parsed = status.is_success().then(|| Element::parse(&String::from_utf8_lossy(&body))).flatten();
        parsed.ok_or((status.as_u16(), body))
    }

    /// Has moto begin a snapshot, so that it knows its name, tags and size.
    pub(crate) async fn start_snapshot(&self, region: &str, body: &serde_json::Value) -> io::Result<String> {
        let (_, said) = self.signed(region, "ebs", Method::POST, "/snapshots", "application/json", body.to_string().into()).await?;
        let said: serde_json::Value = serde_json::from_slice(&said).unwrap_or_default();
        said["SnapshotId"].as_str().map(str::to_owned).ok_or_else(|| io::Error::other(format!("no snapshot: {said}")))
    }

    async fn signed(
        &self,
        region: &str,
        service: &str,
        method: Method,
        path: &str,
        kind: &'static str,
        body: Bytes,
    ) -> io::Result<(StatusCode, Bytes)> {
        let mut headers = HeaderMap::new();
        let scope = format!("AWS4-HMAC-SHA256 Credential=front/20260101/{region}/{service}/aws4_request, SignedHeaders=host, Signature=0");
        headers.insert(AUTHORIZATION, HeaderValue::from_str(&scope).map_err(io::Error::other)?);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        let (status, _, body) = self.send(method, path, headers, body).await?;
        Ok((status, body))
    }

    async fn send(&self, method: Method, path: &str, mut headers: HeaderMap, body: Bytes) -> io::Result<(StatusCode, HeaderMap, Bytes)> {
        for name in [CONNECTION, TRANSFER_ENCODING, CONTENT_LENGTH] {
            headers.remove(name);
        }
        headers.insert(HOST, HeaderValue::from_str(&self.0).map_err(io::Error::other)?);
        let mut request = Request::new(if body.is_empty() { Outgoing::Empty } else { Outgoing::Whole(body) });
        *request.method_mut() = method;
        *request.uri_mut() = path.parse::<Uri>().map_err(io::Error::other)?;
        *request.headers_mut() = headers;
        let address: SocketAddr = self.0.parse().map_err(io::Error::other)?;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        tokio::spawn(connection);
        let (mut parts, body) = sender.send_request(request).await.map_err(io::Error::other)?.into_parts();
        let body = Limited::new(body, LARGEST).collect().await.map_err(io::Error::other)?.to_bytes();
        for name in [CONNECTION, TRANSFER_ENCODING, CONTENT_LENGTH] {
            parts.headers.remove(name);
        }
        Ok((parts.status, parts.headers, body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_from_the_log() {
        let log = " * Serving\nWARNING: x\n * Running on http://127.0.0.1:41525\nPress CTRL+C to quit\n";
        assert_eq!(listening(log).as_deref(), Some("127.0.0.1:41525"));
        assert_eq!(listening(" * Running on http://127.0.0.1:4"), None, "the line is not whole yet");
    }
}

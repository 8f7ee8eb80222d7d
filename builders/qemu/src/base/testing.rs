//! A small HTTP server with faults, for the tests: what a real server will not
//! do on demand.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use kiln_model::cleanup::Scope;
use kiln_model::event::{Event, Reporter, Reports};
use kiln_model::ledger::Ledger;
use kiln_model::machine::Context;
use kiln_model::secret::Redactor;
use reqwest::Url;

/// What the server does to one request.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Sends so many bytes of the body, then closes the connection.
    Cut(usize),
    /// Sends so many bytes of the body, then nothing more.
    Hang(usize),
    /// Answers with this status line and these headers, without a body.
    Answer(&'static str, String),
    /// Answers as if there was no Range.
    Whole,
    /// Both: as if there was no Range, and not all of it.
    WholeCut(usize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) if_range: Option<String>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) files: Vec<(String, Vec<u8>)>,
    pub(crate) tag: Option<String>,
    pub(crate) headers: String,
    pub(crate) faults: VecDeque<Fault>,
    /// Every request that came.
    pub(crate) requests: Vec<Request>,
    /// Bytes of bodies sent.
    pub(crate) served: usize,
}

pub(crate) struct Server {
    state: Arc<Mutex<State>>,
    port: u16,
}

impl Server {
    /// Serves `body` as `/disk.raw`.
    pub(crate) fn start(body: &[u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let files = vec![("/disk.raw".to_owned(), body.to_vec())];
        let state = Arc::new(Mutex::new(State { files, tag: Some("\"one\"".into()), ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let state = shared.clone();
                std::thread::spawn(move || {
                    let _ = answer(&stream.unwrap(), &state);
                });
            }
        });
        Self { state, port }
    }

    pub(crate) fn url(&self, path: &str) -> Url {
        format!("http://127.0.0.1:{}{path}", self.port).parse().unwrap()
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn fault(&self, fault: Fault) -> &Self {
        self.state().faults.push_back(fault);
        self
    }

    pub(crate) fn ranges(&self) -> Vec<Option<String>> {
        self.state().requests.iter().map(|r| r.range.clone()).collect()
    }
}

fn answer(mut stream: &TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut request = Request { path, range: None, if_range: None };
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = Some(value.into()),
            "if-range" => request.if_range = Some(value.into()),
            _ => {}
        }
    }
    let mut state = state.lock().unwrap();
    state.requests.push(request.clone());
    let fault = state.faults.pop_front();
    if let Some(Fault::Answer(status, headers)) = &fault {
        return write!(stream, "HTTP/1.1 {status}\r\n{headers}Content-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let Some((_, body)) = state.files.iter().find(|(p, _)| *p == request.path).cloned() else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let same = request.if_range.is_none() || request.if_range == state.tag;
    let first = request.range.as_deref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let first = first.filter(|_| same && !matches!(fault, Some(Fault::Whole | Fault::WholeCut(_))));
    let mut head = match first {
        Some(first) if first >= body.len() => {
            return write!(
                stream,
                "HTTP/1.1 416 No\r\nContent-Range: bytes */{}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                body.len()
            );
        }
        Some(first) => format!("HTTP/1.1 206 Part\r\nContent-Range: bytes {first}-{}/{}\r\n", body.len() - 1, body.len()),
        None => "HTTP/1.1 200 OK\r\n".into(),
    };
    if let Some(tag) = &state.tag {
        head += &format!("ETag: {tag}\r\n");
    }
    let rest = &body[first.unwrap_or(0)..];
    head += &format!("{}Content-Length: {}\r\nConnection: close\r\n\r\n", state.headers, rest.len());
    let (length, hang) = match fault {
        Some(Fault::Cut(n) | Fault::WholeCut(n)) => (n.min(rest.len()), false),
        Some(Fault::Hang(n)) => (n.min(rest.len()), true),
        _ => (rest.len(), false),
    };
    state.served += length;
    drop(state);
    stream.write_all(head.as_bytes())?;
    stream.write_all(&rest[..length])?;
    stream.flush()?;
    if hang {
        // Until the client goes away.
        reader.read_line(&mut line)?;
    }
    stream.shutdown(Shutdown::Write)
}

/// Remembers what was reported.
#[derive(Default)]
pub(crate) struct Heard(Mutex<Vec<Event>>);

impl Reporter for Heard {
    fn report(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

impl Heard {
    pub(crate) fn notes(&self) -> Vec<String> {
        let events = self.0.lock().unwrap();
        events.iter().filter_map(|e| if let Event::Note { message } = e { Some(message.clone()) } else { None }).collect()
    }
}

/// A bake's context in `folder`, and what it reports.
pub(crate) fn context(folder: &Path, bake: &str) -> (Context, Arc<Heard>) {
    let heard = Arc::new(Heard::default());
    let (ledger, work) = (folder.join("ledger"), folder.join("work").join(bake));
    std::fs::create_dir_all(&ledger).unwrap();
    std::fs::create_dir_all(&work).unwrap();
    let scope = Arc::new(Scope::new(Ledger::create(&ledger, bake).unwrap()));
    let reports = Reports::new(heard.clone(), Redactor::default());
    (Context { bake: bake.into(), scope, reports, work }, heard)
}

/// Bytes that a disk could begin with: boot code, then noise.
pub(crate) fn disk(length: usize) -> Vec<u8> {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes: Vec<u8> = (0..length)
        .map(|_| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed.to_le_bytes()[3]
        })
        .collect();
    bytes[0] = 0xeb;
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes[446..510].fill(0);
    bytes
}

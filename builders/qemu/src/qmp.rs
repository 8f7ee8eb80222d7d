//! QMP: QEMU's control connection.
//!
//! One JSON object per line in each direction. QEMU greets, the client
//! negotiates capabilities, then commands carry an id that their answer
//! repeats, and events come at any time. Source: QEMU's
//! `docs/interop/qmp-spec.txt`. The connection is one half of a socket pair
//! that QEMU inherits: there is no socket to be found by others, no path that
//! could be too long, and nothing to wait for.

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_model::{Code, Error, Result, ResultExt as _};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

/// The longest line that is taken, in bytes; QEMU's own are far shorter.
const LINE: u64 = 4 << 20;

/// How long a command may take to be answered: most are at once, but a host
/// that swaps or compiles can make QEMU wait.
const ANSWER: Duration = Duration::from_secs(60);

/// An event, such as `SHUTDOWN`.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    /// Its name.
    pub(crate) name: String,
    /// Its data; null if it has none.
    pub(crate) data: Value,
}

/// A line from QEMU.
#[derive(Debug, Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    id: Option<u64>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

type Answer = std::result::Result<Value, String>;

#[derive(Default)]
struct State {
    next: u64,
    /// Commands without an answer; `None` once QEMU is gone.
    waiting: Option<HashMap<u64, oneshot::Sender<Answer>>>,
}

/// A connection to a running QEMU. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Qmp {
    state: Arc<Mutex<State>>,
    writer: Arc<tokio::sync::Mutex<OwnedWriteHalf>>,
}

impl Qmp {
    /// Takes over the connection: reads the greeting and negotiates. The events
    /// end when QEMU does.
    ///
    /// # Errors
    /// [`Code::MachineEnded`] when QEMU ends before it has greeted.
    pub(crate) async fn connect(stream: StdUnixStream) -> Result<(Self, mpsc::UnboundedReceiver<Event>)> {
        stream.set_nonblocking(true).trying(|| "talk to QEMU".into())?;
        let (reader, writer) = UnixStream::from_std(stream).trying(|| "talk to QEMU".into())?.into_split();
        let state = Arc::new(Mutex::new(State { next: 0, waiting: Some(HashMap::new()) }));
        let (send, events) = mpsc::unbounded_channel();
        let (greeted, greeting) = oneshot::channel();
        tokio::spawn(read(reader, state.clone(), send, greeted));
        let qmp = Self { state, writer: Arc::new(tokio::sync::Mutex::new(writer)) };
        tokio::time::timeout(ANSWER, greeting).await.map_err(|_| silent("its greeting"))?.map_err(|_| gone())?;
        qmp.execute("qmp_capabilities", Value::Null).await?;
        Ok((qmp, events))
    }

    /// Executes a command; gives what it returns.
    ///
    /// # Errors
    /// [`Code::MachineEnded`] when QEMU is gone, [`Code::Timeout`] when it does
    /// not answer, [`Code::Failed`] with QEMU's words when it refuses.
    pub(crate) async fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        self.send(command, arguments, None).await
    }

    /// Gives QEMU a descriptor (`getfd`), which a later command may name.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub(crate) async fn pass(&self, name: &str, descriptor: OwnedFd) -> Result<()> {
        self.send("getfd", json!({ "fdname": name }), Some(descriptor)).await.map(|_| ())
    }

    async fn send(&self, command: &str, arguments: Value, descriptor: Option<OwnedFd>) -> Result<Value> {
        let (tell, answer) = oneshot::channel();
        let id = {
            let mut state = lock(&self.state);
            state.next += 1;
            let id = state.next;
            state.waiting.as_mut().ok_or_else(gone)?.insert(id, tell);
            id
        };
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let mut line = message.to_string();
        line.push('\n');
        // Whole lines only: a dropped future must not leave half of one.
        let writer = self.writer.clone();
        let written = tokio::spawn(async move {
            let mut writer = writer.lock().await;
            let sent = match &descriptor {
                None => 0,
                Some(descriptor) => send_with(writer.as_ref(), line.as_bytes(), descriptor).await?,
            };
            writer.write_all(&line.as_bytes()[sent..]).await
        })
        .await;
        if !matches!(written, Ok(Ok(()))) {
            return Err(gone());
        }
        match tokio::time::timeout(ANSWER, answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(words))) => Err(Error::new(Code::Failed, format!("QEMU refused `{command}`: {words}"))),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(silent(&format!("`{command}`"))),
        }
    }

    /// Executes a command of the human monitor, where QMP has none.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub(crate) async fn monitor(&self, line: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line })).await?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }
}

/// Sends the first bytes with a descriptor beside them (unix(7), `SCM_RIGHTS`);
/// gives how many those were.
async fn send_with(stream: &UnixStream, bytes: &[u8], descriptor: &OwnedFd) -> std::io::Result<usize> {
    let work = || {
        let descriptors = [descriptor.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        beside.push(SendAncillaryMessage::ScmRights(&descriptors));
        Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL)?)
    };
    stream.async_io(tokio::io::Interest::WRITABLE, work).await
}

async fn read(reader: OwnedReadHalf, state: Arc<Mutex<State>>, events: mpsc::UnboundedSender<Event>, greeted: oneshot::Sender<()>) {
    let mut reader = BufReader::new(reader);
    let mut greeted = Some(greeted);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LINE).read_until(b'\n', &mut line).await {
            Ok(1..) => {}
            _ => break,
        }
        // What cannot be read is skipped: a newer QEMU may say more than this
        // client knows.
        let Ok(message) = serde_json::from_slice::<Message>(&line) else { continue };
        if message.greeting.is_some() {
            if let Some(greeted) = greeted.take() {
                let _ = greeted.send(());
            }
        } else if let Some(name) = message.event {
            let _ = events.send(Event { name, data: message.data });
        } else if let Some(id) = message.id {
            let waiting = lock(&state).waiting.as_mut().and_then(|waiting| waiting.remove(&id));
            if let Some(waiting) = waiting {
                let _ = waiting.send(message.error.map_or_else(|| Ok(message.answer.unwrap_or_default()), |refusal| Err(refusal.desc)));
            }
        }
    }
    // Nobody will answer any more: dropping the senders tells all who wait.
    lock(&state).waiting = None;
}

fn gone() -> Error {
    Error::new(Code::MachineEnded, "QEMU is gone")
}

fn silent(what: &str) -> Error {
    Error::new(Code::Timeout, format!("QEMU did not give {what} within {} s", ANSWER.as_secs()))
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, Write as _};

    use super::*;

    /// A QEMU that answers what it is told to.
    fn pretend(mut stream: StdUnixStream, answers: Vec<&'static str>) -> std::thread::JoinHandle<Vec<Value>> {
        std::thread::spawn(move || {
            let mut lines = std::io::BufReader::new(stream.try_clone().unwrap()).lines();
            stream.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").unwrap();
            let mut seen = Vec::new();
            for answer in answers {
                let command: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
                let answer = answer.replace("ID", &command["id"].to_string());
                seen.push(command);
                stream.write_all(answer.as_bytes()).unwrap();
                stream.write_all(b"\r\n").unwrap();
            }
            seen
        })
    }

    #[tokio::test]
    async fn answers_events_and_the_end() {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let qemu = pretend(
            theirs,
            vec![
                "{\"return\": {}, \"id\": ID}",
                "{\"event\": \"RESET\", \"data\": {\"guest\": true}}\n{\"novelty\": 1}\nnonsense\n{\"return\": \"text\", \"id\": ID}",
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}, \"id\": ID}",
            ],
        );
        let (qmp, mut events) = Qmp::connect(ours).await.unwrap();
        assert_eq!(qmp.monitor("info usernet").await.unwrap(), "text");
        let error = qmp.execute("nothing", json!({"a": 1})).await.unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (Code::Failed, "QEMU refused `nothing`: no such thing"));
        let event = events.recv().await.unwrap();
        assert_eq!((event.name.as_str(), &event.data["guest"]), ("RESET", &Value::Bool(true)));
        let seen = qemu.join().unwrap();
        assert_eq!(seen[0]["execute"], "qmp_capabilities");
        assert_eq!(seen[2]["arguments"]["a"], 1);
        assert!(events.recv().await.is_none());
        assert_eq!(qmp.execute("anything", Value::Null).await.unwrap_err().kind(), Code::MachineEnded);
    }

    #[tokio::test]
    async fn a_qemu_that_dies_at_once() {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(Qmp::connect(ours).await.err().unwrap().kind(), Code::MachineEnded);
    }
}

//! One connection to the agent: requests at the same time, each with a channel.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_model::event::Stream;
use kiln_model::guest::Exit;
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_ssh::{Input, Outlet, Sink};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::Port;
use super::protocol::{self, Frame, HEAD, Kind, Nonce, PAYLOAD, WINDOW};

/// Frames that may wait for whoever asked.
const WAITING: usize = 8;

/// How long killing a command may take, under emulation.
const KILLING: Duration = Duration::from_secs(30);

/// Who waits for what comes on a channel.
type Waiting = Arc<Mutex<BTreeMap<u32, mpsc::Sender<Frame>>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lost() -> Error {
    Error::new(Code::Unreachable, "the connection to the guest's agent was lost")
}

/// The connection.
pub(super) struct Link {
    /// Takes whole frames.
    send: mpsc::Sender<Vec<u8>>,
    waiting: Waiting,
    next: AtomicU32,
    lost: watch::Receiver<bool>,
    tasks: [AbortHandle; 2],
}

impl Drop for Link {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Link {
    /// Takes up with the agent; with one that was just started, by dropping what
    /// comes before it says `nonce` too.
    pub(super) async fn open(port: &Port, nonce: Option<(&Nonce, Duration)>) -> Result<Arc<Self>> {
        let what = || "take up with the guest's agent".into();
        let stream = port.stream.try_clone().trying(what)?;
        stream.set_nonblocking(true).trying(what)?;
        // Not `into_split`, whose halves end the stream for the next link too.
        let (mut read, mut write) = tokio::io::split(UnixStream::from_std(stream).trying(what)?);
        let mut closings = port.closings.clone();
        closings.mark_unchanged();
        if let Some((nonce, limit)) = nonce {
            let greet = async {
                write.write_all(nonce).await?;
                let mut seen = Nonce::default();
                while seen != *nonce {
                    seen.rotate_left(1);
                    read.read_exact(&mut seen[15..]).await?;
                }
                Ok::<_, std::io::Error>(())
            };
            let greeted = timeout(limit, greet).await;
            greeted.map_err(|_| Error::new(Code::Timeout, "the guest's agent does not answer"))?.trying(what)?;
        }
        let waiting = Waiting::default();
        let (send, mut frames) = mpsc::channel::<Vec<u8>>(WAITING);
        let (tell, lost) = watch::channel(false);
        let writer = tokio::spawn(async move {
            while let Some(frame) = frames.recv().await {
                if write.write_all(&frame).await.is_err() {
                    break;
                }
            }
        });
        let reader = tokio::spawn({
            let waiting = waiting.clone();
            async move {
                tokio::select! {
                    () = receive(read, &waiting) => {}
                    _ = closings.changed() => {}
                }
                // In this order: who comes now is told by the one or the other.
                tell.send_replace(true);
                lock(&waiting).clear();
            }
        });
        let tasks = [writer.abort_handle(), reader.abort_handle()];
        Ok(Arc::new(Self { send, waiting, next: AtomicU32::new(1), lost, tasks }))
    }

    pub(super) fn is_lost(&self) -> bool {
        *self.lost.borrow()
    }

    /// Asks for something that is answered by yes or no.
    ///
    /// # Errors
    /// What the agent says; [`Code::Timeout`] after `limit`.
    pub(super) async fn ask(&self, kind: Kind, payload: &[u8], limit: Duration) -> Result<()> {
        let mut channel = self.channel();
        let work = async {
            channel.send(kind, payload).await?;
            match channel.receive().await? {
                Frame { kind: Kind::Failed, payload, .. } => Err(failed(&payload)),
                _ => Ok(()),
            }
        };
        let done = timeout(limit, work).await;
        channel.ended = true;
        done.unwrap_or_else(|_| Err(Error::new(Code::Timeout, format!("the guest's agent did not answer within {} s", limit.as_secs()))))
    }

    /// Runs a command.
    pub(super) async fn run(&self, line: &str, input: Input, limit: Option<Duration>, sink: Sink<'_>) -> Result<Exit> {
        if line.len() > PAYLOAD {
            return Err(Error::new(Code::Usage, format!("a command of {} bytes is too long", line.len())));
        }
        let mut channel = self.channel();
        let work = pump(&mut channel, line, input, sink);
        match limit {
            None => work.await,
            Some(limit) => match timeout(limit, work).await {
                Ok(done) => done,
                Err(_) => {
                    let error = Error::new(Code::Timeout, format!("the command took over {limit:?}")).next("raise its `timeout`");
                    let killed = channel.kill().await;
                    Err(if killed { error } else { error.detail("it could not be killed in the guest, where it may still run") })
                }
            },
        }
    }

    fn channel(&self) -> Channel {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel(WAITING);
        lock(&self.waiting).insert(number, sender);
        if self.is_lost() {
            lock(&self.waiting).clear();
        }
        Channel { number, send: self.send.clone(), receiver, waiting: self.waiting.clone(), ended: false }
    }
}

/// Gives each frame to whoever waits for it.
async fn receive(mut read: ReadHalf<UnixStream>, waiting: &Waiting) {
    loop {
        let mut head = [0; HEAD];
        if read.read_exact(&mut head).await.is_err() {
            return;
        }
        let Some((kind, channel, length)) = protocol::head(&head) else { return };
        let mut payload = vec![0; length];
        if read.read_exact(&mut payload).await.is_err() {
            return;
        }
        let sender = lock(waiting).get(&channel).cloned();
        if let Some(sender) = sender {
            // Whoever does not wait any more misses nothing.
            let _ = sender.send(Frame { kind, channel, payload }).await;
        }
    }
}

fn failed(payload: &[u8]) -> Error {
    Error::new(Code::Failed, String::from_utf8_lossy(payload).into_owned())
}

/// A request on its way. A command that is not waited for to its end is killed.
struct Channel {
    number: u32,
    send: mpsc::Sender<Vec<u8>>,
    receiver: mpsc::Receiver<Frame>,
    waiting: Waiting,
    ended: bool,
}

impl Channel {
    async fn send(&self, kind: Kind, payload: &[u8]) -> Result<()> {
        self.send.send(protocol::frame(kind, self.number, payload)).await.map_err(|_| lost())
    }

    async fn receive(&mut self) -> Result<Frame> {
        self.receiver.recv().await.ok_or_else(lost)
    }

    /// Kills the command; whether that is certain.
    async fn kill(&mut self) -> bool {
        self.ended = true;
        let work = async {
            self.send(Kind::Kill, &[]).await?;
            while self.receive().await?.kind != Kind::Exit {}
            Ok::<_, Error>(())
        };
        timeout(KILLING, work).await.is_ok_and(|done| done.is_ok())
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        lock(&self.waiting).remove(&self.number);
        if self.ended {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (send, kill) = (self.send.clone(), protocol::frame(Kind::Kill, self.number, &[]));
            runtime.spawn(async move { send.send(kill).await });
        }
    }
}

async fn pump(channel: &mut Channel, line: &str, input: Input, sink: Sink<'_>) -> Result<Exit> {
    channel.send(Kind::Execute, line.as_bytes()).await?;
    let window = Semaphore::new(WINDOW);
    let feed = feed(channel.send.clone(), channel.number, &window, input);
    tokio::pin!(feed);
    let mut fed = false;
    let mut outlet = Outlet::new(sink);
    let exit = loop {
        let frame = tokio::select! {
            () = &mut feed, if !fed => { fed = true; continue }
            frame = channel.receiver.recv() => frame.ok_or_else(lost),
        };
        let Frame { kind, payload, .. } = match frame {
            Ok(frame) => frame,
            Err(error) => {
                channel.ended = true;
                return Err(error);
            }
        };
        match kind {
            Kind::Stdout => outlet.take(Stream::Stdout, &payload).await?,
            Kind::Stderr => outlet.take(Stream::Stderr, &payload).await?,
            Kind::Taken => {
                let taken = protocol::number(&mut &payload[..]).unwrap_or_default();
                window.add_permits(taken as usize);
            }
            Kind::Exit => break exit(&payload),
            Kind::Failed => {
                channel.ended = true;
                return Err(failed(&payload)).trying(|| "run a command in the guest".into());
            }
            _ => {}
        }
    };
    channel.ended = true;
    outlet.finish();
    Ok(exit)
}

fn exit(mut payload: &[u8]) -> Exit {
    let mut number = || protocol::number(&mut payload).unwrap_or(u32::MAX);
    match (number(), number()) {
        (1, signal) => Exit::Signal(signal_name(signal)),
        (_, status) => Exit::Status(status),
    }
}

/// A signal's name (Linux: include/uapi/asm-generic/signal.h).
fn signal_name(number: u32) -> String {
    let name = match number {
        1 => "HUP",
        2 => "INT",
        3 => "QUIT",
        4 => "ILL",
        6 => "ABRT",
        7 => "BUS",
        8 => "FPE",
        9 => "KILL",
        10 => "USR1",
        11 => "SEGV",
        12 => "USR2",
        13 => "PIPE",
        14 => "ALRM",
        15 => "TERM",
        other => return format!("{other}"),
    };
    name.to_owned()
}

/// Sends the input, as fast as the command reads it. It need not: that is no
/// failure.
async fn feed(send: mpsc::Sender<Vec<u8>>, channel: u32, window: &Semaphore, input: Input) {
    let give = async |bytes: &[u8]| {
        for part in bytes.chunks(PAYLOAD) {
            let room = window.acquire_many(u32::try_from(part.len()).unwrap_or(u32::MAX)).await;
            room.map_err(|_| ())?.forget();
            send.send(protocol::frame(Kind::Stdin, channel, part)).await.map_err(|_| ())?;
        }
        Ok::<_, ()>(())
    };
    match input {
        Input::Bytes(bytes) => {
            if give(&bytes).await.is_err() {
                return;
            }
        }
        Input::Chunks(mut chunks) => {
            while let Some(chunk) = chunks.recv().await {
                if give(&chunk).await.is_err() {
                    return;
                }
            }
        }
    }
    let _ = send.send(protocol::frame(Kind::StdinEnd, channel, &[])).await;
}

//! One command on one channel: its input, its output, its end.

use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::event::Stream;
use kiln_model::guest::{Exit, OnLine, quote};
use kiln_model::{Code, Error, Result};
use russh::client::Msg;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::lines::Lines;
use crate::session::Session;

/// How long output may stay away after a command has ended and before its
/// channel closes. A daemon that it left behind may hold its output open for
/// ever; what the command itself wrote is on its way already.
const AFTER_EXIT: Duration = Duration::from_secs(5);
/// How long killing may take, under emulation.
const KILLING: Duration = Duration::from_secs(30);
/// Bytes of standard error that are kept for an error's detail.
const TAIL: usize = 4096;

/// Runs commands with any input and output, over whatever way there is.
#[async_trait]
pub trait Run: Send + Sync {
    /// Runs `line`, as [`kiln_model::guest::Guest::execute`] does.
    ///
    /// # Errors
    /// The same.
    async fn run(&self, line: &str, input: Input, limit: Option<Duration>, sink: Sink<'_>) -> Result<Exit>;
}

/// What a command reads.
pub enum Input {
    /// These bytes, then its end.
    Bytes(Vec<u8>),
    /// What comes out of here, then its end.
    Chunks(mpsc::Receiver<Vec<u8>>),
}

/// Where a command's output goes.
pub enum Sink<'a> {
    /// Both streams as lines.
    Lines(OnLine<'a>),
    /// Standard output as it comes; the end of standard error is kept.
    Bytes {
        /// Takes standard output.
        stdout: mpsc::Sender<Vec<u8>>,
        /// Gets the end of standard error.
        stderr: &'a mut String,
    },
}

/// Brings what comes out of a command to its [`Sink`].
pub struct Outlet<'a> {
    sink: Sink<'a>,
    stdout: Lines,
    stderr: Lines,
}

impl<'a> Outlet<'a> {
    /// Nothing has come yet.
    pub fn new(sink: Sink<'a>) -> Self {
        Self { sink, stdout: Lines::default(), stderr: Lines::default() }
    }

    /// Whether every byte counts, so that one must wait for the stream's end.
    pub fn is_patient(&self) -> bool {
        matches!(self.sink, Sink::Bytes { .. })
    }

    /// Takes what came on one of the streams.
    ///
    /// # Errors
    /// [`Code::Failed`] when nobody takes it.
    pub async fn take(&mut self, stream: Stream, data: &[u8]) -> Result<()> {
        match (&mut self.sink, stream) {
            (Sink::Lines(on_line), Stream::Stdout) => self.stdout.push(data, |line| on_line(Stream::Stdout, line)),
            (Sink::Lines(on_line), Stream::Stderr) => self.stderr.push(data, |line| on_line(Stream::Stderr, line)),
            (Sink::Bytes { .. }, Stream::Stdout) if data.is_empty() => {}
            (Sink::Bytes { stdout, .. }, Stream::Stdout) => {
                if stdout.send(data.to_vec()).await.is_err() {
                    return Err(Error::new(Code::Failed, "what the guest sent could not be taken"));
                }
            }
            (Sink::Bytes { stderr, .. }, Stream::Stderr) => self.stderr.push(data, |line| keep(stderr, line)),
        }
        Ok(())
    }

    /// The streams have ended.
    pub fn finish(mut self) {
        match &mut self.sink {
            Sink::Lines(on_line) => {
                self.stdout.finish(|line| on_line(Stream::Stdout, line));
                self.stderr.finish(|line| on_line(Stream::Stderr, line));
            }
            Sink::Bytes { stderr, .. } => self.stderr.finish(|line| keep(stderr, line)),
        }
    }
}

/// 64 bits that nothing in the guest can guess.
fn nonce() -> String {
    format!("{:016x}", std::hash::RandomState::new().build_hasher().finish())
}

/// Wraps `line` so that its process is known: `/bin/sh` says its pid in the
/// first line of its standard output, and then *is* the command. sshd has made
/// that process the leader of a session of its own.
fn wrapped(user: &str, marker: &str, line: &str) -> String {
    let script = quote(&format!("echo {marker} $$\n{line}"));
    // Whatever the login shell is, it is replaced.
    if user == "root" { format!("exec /bin/sh -c {script}") } else { format!("exec sudo -n -H -- /bin/sh -c {script}") }
}

/// Kills a process, its session, its process group and all its descendants,
/// those that made sessions of their own among them. Each is stopped when it
/// is found, so that none can start another unseen.
const KILL: &str = r#"
all=" $root "; kill -STOP "$root" 2>/dev/null; found=1
while [ "$found" ]; do
  found=
  for stat in /proc/[0-9]*/stat; do
    { read -r line < "$stat"; } 2>/dev/null || continue
    pid=${line%% *}; set -- ${line##*) }
    case "$all" in *" $pid "*) continue;; esac
    case "$all" in *" $2 "*) ;; *) [ "$3" = "$root" ] || [ "$4" = "$root" ] || continue;; esac
    all="$all$pid "; kill -STOP "$pid" 2>/dev/null; found=1
  done
done
kill -KILL $all 2>/dev/null
:
"#;

/// Finds the first line of standard output, which names the pid. What a login
/// shell's start-up file printed before it is dropped.
struct Prelude {
    marker: String,
    buffer: Vec<u8>,
    pid: Option<u32>,
}

impl Prelude {
    /// Takes bytes; gives those that are the command's own.
    fn take<'a>(&mut self, bytes: &'a [u8]) -> std::borrow::Cow<'a, [u8]> {
        if self.pid.is_some() {
            return bytes.into();
        }
        self.buffer.extend_from_slice(bytes);
        let marker = self.marker.as_bytes();
        if let Some(at) = self.buffer.windows(marker.len()).position(|window| window == marker) {
            let rest = &self.buffer[at + marker.len()..];
            if let Some(end) = rest.iter().position(|b| *b == b'\n') {
                self.pid = std::str::from_utf8(&rest[..end]).ok().and_then(|pid| pid.trim().parse().ok()).or(Some(0));
                return rest[end + 1..].to_vec().into();
            }
        } else if self.buffer.len() > 64 * 1024 {
            self.buffer.drain(..self.buffer.len() - marker.len());
        }
        (&[][..]).into()
    }
}

/// A command that runs. When it is dropped before its end (a limit in time, a
/// caller that stopped waiting), it is killed.
struct Running {
    session: Arc<Session>,
    user: String,
    write: Arc<ChannelWriteHalf<Msg>>,
    read: Option<ChannelReadHalf>,
    prelude: Prelude,
    ended: bool,
}

impl Running {
    /// Kills what runs in the guest; whether that is certain.
    async fn kill(&mut self) -> bool {
        self.ended = true;
        if self.session.is_closed() {
            return false;
        }
        let work = async {
            if let Some(mut read) = self.read.take() {
                // Its pid may still be on the way.
                while self.prelude.pid.is_none() {
                    match read.wait().await {
                        Some(ChannelMsg::Data { data }) => drop(self.prelude.take(&data)),
                        Some(_) => {}
                        None => break,
                    }
                }
                // Dropped here: output that nobody takes would block every
                // other channel.
            }
            let Some(root) = self.prelude.pid.filter(|pid| *pid > 1) else { return false };
            let Ok(mut channel) = self.session.open().await else { return false };
            let line = wrapped(&self.user, "-", &format!("root={root}{KILL}"));
            if channel.exec(true, line).await.is_err() {
                return false;
            }
            let mut done = false;
            while let Some(message) = channel.wait().await {
                done |= matches!(message, ChannelMsg::ExitStatus { exit_status: 0 });
            }
            let _ = self.write.close().await;
            done
        };
        if timeout(KILLING, work).await.unwrap_or(false) {
            return true;
        }
        // Better than nothing: sshd itself (since OpenSSH 7.9) kills the process
        // group. Not sooner: it would orphan descendants with sessions of their
        // own before they are found.
        let _ = self.write.signal(Sig::KILL).await;
        let _ = self.write.close().await;
        false
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let mut rest = Self {
                session: Arc::clone(&self.session),
                user: std::mem::take(&mut self.user),
                write: Arc::clone(&self.write),
                read: self.read.take(),
                prelude: Prelude { marker: std::mem::take(&mut self.prelude.marker), buffer: Vec::new(), pid: self.prelude.pid },
                ended: true,
            };
            rest.prelude.buffer = std::mem::take(&mut self.prelude.buffer);
            runtime.spawn(async move { rest.kill().await });
        }
    }
}

/// Runs `line` as root on a channel that was opened for it.
///
/// # Errors
/// [`Code::Timeout`] after `limit`, when everything it started is killed;
/// [`Code::Unreachable`] when the connection is lost.
pub(crate) async fn run(
    session: &Arc<Session>,
    channel: Channel<Msg>,
    user: &str,
    line: &str,
    input: Input,
    limit: Option<Duration>,
    sink: Sink<'_>,
) -> Result<Exit> {
    let (read, write) = channel.split();
    let marker = format!("kiln-{}", nonce());
    let line = wrapped(user, &marker, line);
    let mut running = Running {
        session: Arc::clone(session),
        user: user.to_owned(),
        write: Arc::new(write),
        read: Some(read),
        prelude: Prelude { marker, buffer: Vec::new(), pid: None },
        ended: false,
    };
    let work = pump(&mut running, line, input, sink);
    let result = match limit {
        None => work.await,
        Some(limit) => match timeout(limit, work).await {
            Ok(result) => result,
            Err(_) => {
                let mut error = Error::new(Code::Timeout, format!("the command took over {limit:?}")).next("raise its `timeout`");
                if !running.kill().await {
                    error = error.detail("it could not be killed in the guest, where it may still run");
                }
                return Err(error);
            }
        },
    };
    // Otherwise what still runs (a transfer whose other end failed) is killed.
    running.ended = result.is_ok() || running.session.is_closed();
    result
}

async fn pump(running: &mut Running, line: String, input: Input, sink: Sink<'_>) -> Result<Exit> {
    let Running { session, write, read, prelude, .. } = running;
    let Some(read) = read.as_mut() else { return Err(session.lost("before the command began")) };
    if write.exec(true, line).await.is_err() {
        return Err(session.lost("before the command began"));
    }
    let feed = feed(Arc::clone(write), input);
    tokio::pin!(feed);
    let mut fed = false;
    let mut outlet = Outlet::new(sink);
    let patient = outlet.is_patient();
    let mut exit = None;
    loop {
        let next =
            async { if exit.is_none() || patient { read.wait().await } else { timeout(AFTER_EXIT, read.wait()).await.unwrap_or(None) } };
        let message = tokio::select! {
            () = &mut feed, if !fed => { fed = true; continue }
            message = next => message,
        };
        match message {
            None => break,
            Some(ChannelMsg::Data { data }) => outlet.take(Stream::Stdout, &prelude.take(&data)).await?,
            Some(ChannelMsg::ExtendedData { data, ext: 1 }) => outlet.take(Stream::Stderr, &data).await?,
            Some(ChannelMsg::ExitStatus { exit_status }) => exit = Some(Exit::Status(exit_status)),
            Some(ChannelMsg::ExitSignal { signal_name: Sig::Custom(name), .. }) => exit = Some(Exit::Signal(name)),
            Some(ChannelMsg::ExitSignal { signal_name, .. }) => exit = Some(Exit::Signal(format!("{signal_name:?}"))),
            Some(ChannelMsg::Failure) => return Err(Error::new(Code::Unreachable, "the guest's sshd refused to run a command")),
            Some(_) => {}
        }
    }
    outlet.finish();
    if !session.is_closed() {
        let _ = write.close().await;
    }
    exit.ok_or_else(|| session.lost("while a command ran"))
}

/// Sends the input. A command need not read it: that is no failure.
async fn feed(write: Arc<ChannelWriteHalf<Msg>>, input: Input) {
    match input {
        Input::Bytes(bytes) => {
            if write.data_bytes(bytes).await.is_err() {
                return;
            }
        }
        Input::Chunks(mut chunks) => {
            while let Some(chunk) = chunks.recv().await {
                if write.data_bytes(chunk).await.is_err() {
                    return;
                }
            }
        }
    }
    let _ = write.eof().await;
}

fn keep(tail: &mut String, line: &str) {
    tail.push_str(line);
    tail.push('\n');
    while tail.len() > TAIL {
        let end = tail.find('\n').map_or(tail.len(), |at| at + 1);
        tail.drain(..end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pid_is_found_behind_noise_and_in_pieces() {
        let mut prelude = Prelude { marker: "kiln-x".into(), buffer: Vec::new(), pid: None };
        assert!(prelude.take(b"motd\nki").is_empty());
        assert!(prelude.take(b"ln-x 4").is_empty());
        assert_eq!(&*prelude.take(b"2\nout"), b"out");
        assert_eq!(prelude.pid, Some(42));
        assert_eq!(&*prelude.take(b"kiln-x 7\n"), b"kiln-x 7\n");
    }
}

//! Running other programs so that none of them outlives kiln.
//!
//! Every child leads its own process group, so that Ctrl-C at the terminal
//! does not reach it (cleanup still wants to talk to it) and so that killing
//! it takes its own children along. The kernel kills it when kiln dies, even
//! by SIGKILL: `PR_SET_PDEATHSIG`. That signal follows the *thread* that
//! spawned the child, not the process (prctl(2)), so that one thread, which
//! lives as long as the process, spawns all of them.

use std::ffi::OsStr;
use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kiln_model::cleanup::{Scope, Ticket};
use kiln_model::event::Stream;
use kiln_model::ledger::Resource;
use kiln_model::{Code, Error, Result, ResultExt as _};
use rustix::process::{Pid, Signal};
use tokio::sync::watch;

/// How much of a child's standard error is kept, in bytes: its end.
const TAIL: usize = 16 * 1024;

/// How long after its end a program's output may be held open by others.
const STRAGGLERS: Duration = Duration::from_secs(2);

type Job = Box<dyn FnOnce() + Send>;

/// A program that is running. Dropping the last clone kills its group.
#[derive(Clone)]
pub struct Child(Arc<Inner>);

struct Inner {
    pid: Pid,
    start: u64,
    what: String,
    ended: watch::Receiver<Option<ExitStatus>>,
    /// Held while the child is reaped and while a signal is sent, so that no
    /// signal goes to a pid that is no longer its own.
    reaping: Arc<Mutex<()>>,
    tail: Arc<Mutex<Vec<u8>>>,
    stdout: Mutex<Option<ChildStdout>>,
    stdin: Mutex<Option<ChildStdin>>,
}

/// What a program printed.
#[derive(Debug, Clone)]
pub struct Output {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// The end of standard error.
    pub stderr: String,
}

impl Child {
    /// Its process id, which is its group's id too.
    pub fn pid(&self) -> u32 {
        self.0.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// When it started, in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub fn start(&self) -> u64 {
        self.0.start
    }

    /// What the ledger records of it.
    pub fn resource(&self) -> Resource {
        Resource::Process { pid: self.pid(), start: self.start(), what: self.0.what.clone() }
    }

    /// How it ended; `None` while it runs.
    pub fn status(&self) -> Option<ExitStatus> {
        *self.0.ended.borrow()
    }

    /// Waits until it has ended. May be called any number of times.
    pub async fn ended(&self) -> ExitStatus {
        let mut ended = self.0.ended.clone();
        let status = ended.wait_for(Option::is_some).await.ok().and_then(|status| *status);
        status.unwrap_or_default()
    }

    /// As [`Child::ended`], for code that is not async.
    pub fn wait(&self) -> ExitStatus {
        // A short poll, so that no async runtime is needed.
        let mut pause = Duration::from_micros(200);
        loop {
            if let Some(status) = self.status() {
                return status;
            }
            if self.0.ended.has_changed().is_err() {
                return self.status().unwrap_or_default();
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// Sends SIGKILL to the whole group, if it has not ended.
    pub fn kill(&self) {
        self.0.signal(Signal::KILL);
    }

    /// Sends SIGTERM to the whole group, if it has not ended.
    pub fn terminate(&self) {
        self.0.signal(Signal::TERM);
    }

    /// Standard output, if it was piped and not taken yet.
    pub fn take_stdout(&self) -> Option<ChildStdout> {
        lock(&self.0.stdout).take()
    }

    /// Standard input, if it was piped and not taken yet.
    pub fn take_stdin(&self) -> Option<ChildStdin> {
        lock(&self.0.stdin).take()
    }

    /// The end of what it wrote to standard error so far (if that was piped).
    pub fn stderr_tail(&self) -> String {
        String::from_utf8_lossy(&lock(&self.0.tail)).trim_end().to_owned()
    }

    /// The error for a program that ended as it should not have.
    pub fn failure(&self, status: ExitStatus) -> Error {
        let error = Error::new(Code::Failed, format!("{} failed ({})", self.0.what, describe(status)));
        match self.stderr_tail() {
            tail if tail.is_empty() => error,
            tail if tail.contains("No space left on device") => error.because(io::Error::from(io::ErrorKind::StorageFull)).detail(tail),
            tail => error.detail(tail),
        }
    }
}

impl Inner {
    fn signal(&self, signal: Signal) {
        let _reaping = lock(&self.reaping);
        if self.ended.borrow().is_none() {
            let _ = rustix::process::kill_process_group(self.pid, signal);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// How a program ended, in words.
pub fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(9)) => "killed by SIGKILL".into(),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// Starts a program. Standard streams are as `command` says; if standard error
/// is piped ([`piped`] does that) its end is kept for messages. The descriptors
/// in `inherit` are open in the child under the same numbers.
///
/// # Errors
/// [`Code::Missing`] with the command that installs it when the program is not
/// there.
pub fn spawn(mut command: Command, what: &str, inherit: Vec<OwnedFd>) -> Result<Child> {
    command.process_group(0);
    let numbers: Vec<RawFd> = inherit.iter().map(|fd| fd.as_raw_fd()).collect();
    prepare(&mut command, numbers);
    let program = command.get_program().to_owned();
    let what = if what.is_empty() { program.to_string_lossy().into_owned() } else { what.to_owned() };

    let (answer, spawned) = mpsc::sync_channel(1);
    let job: Job = Box::new(move || {
        let child = command.spawn();
        // The parent's copies: when the child ends, its peers must see it.
        drop(command);
        drop(inherit);
        let _ = answer.send(child);
    });
    spawner().send(job).map_err(|_| Error::new(Code::Failed, "the thread that starts programs is gone"))?;
    let spawned = spawned.recv().map_err(|_| Error::new(Code::Failed, "the thread that starts programs is gone"))?;
    let mut child = spawned.map_err(|error| cannot_start(&program, error))?;

    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let pid = Pid::from_child(&child);
    let start = start_time(child.id()).unwrap_or(0);
    let tail = Arc::new(Mutex::new(Vec::new()));
    let tail_reader = stderr.map(|stderr| keep_tail(stderr, tail.clone()));
    let reaping = Arc::new(Mutex::new(()));
    let (tell, ended) = watch::channel(None);
    let waiter_lock = reaping.clone();
    thread::Builder::new()
        .name("kiln-wait".into())
        .spawn(move || {
            use rustix::process::{WaitId, WaitIdOptions, waitid};
            // Wait without reaping, so that the pid stays ours until the lock is held.
            while let Err(rustix::io::Errno::INTR) = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {}
            // The leader is gone; whatever is left of its group goes too.
            let held = lock(&waiter_lock);
            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
            drop(held);
            // What it printed last belongs to the error, so it is read first; but
            // a process outside the group that holds the pipe must not hold this up.
            if let Some(reader) = tail_reader {
                let limit = Instant::now() + STRAGGLERS;
                while !reader.is_finished() && Instant::now() < limit {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            let _held = lock(&waiter_lock);
            let status = child.wait().unwrap_or_default();
            let _ = tell.send(Some(status));
        })
        .trying(|| format!("watch {what}"))?;
    Ok(Child(Arc::new(Inner { pid, start, what, ended, reaping, tail, stdout: Mutex::new(stdout), stdin: Mutex::new(stdin) })))
}

/// Starts a program that is registered in `scope` before it is started; its
/// undo kills it.
///
/// # Errors
/// As [`spawn`], and when the ledger cannot be written.
pub fn spawn_registered(scope: &Scope, command: Command, what: &str, inherit: Vec<OwnedFd>) -> Result<(Child, Ticket)> {
    let slot: Arc<Mutex<Option<Child>>> = Arc::default();
    let undo = slot.clone();
    let intended = Resource::Process { pid: 0, start: 0, what: what.to_owned() };
    let ticket = scope.before(intended, &format!("end {what}"), Duration::from_secs(30), move || async move {
        let child = lock(&undo).take();
        if let Some(child) = child {
            child.kill();
            child.ended().await;
        }
        Ok(())
    })?;
    match spawn(command, what, inherit) {
        Ok(child) => {
            *lock(&slot) = Some(child.clone());
            scope.amend(ticket, child.resource())?;
            Ok((child, ticket))
        }
        Err(error) => {
            let _ = scope.forget(ticket);
            Err(error)
        }
    }
}

/// A command with no input, and output that is collected.
pub fn piped(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a program to its end; blocks. Standard input is empty.
///
/// # Errors
/// When it cannot be started or fails; with the end of its standard error.
pub fn run(mut command: Command) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = spawn(command, "", Vec::new())?;
    let mut stdout = Vec::new();
    if let Some(mut pipe) = child.take_stdout() {
        pipe.read_to_end(&mut stdout).trying(|| format!("read from {}", child.0.what))?;
    }
    finish(&child, child.wait(), stdout)
}

/// As [`run`], giving way to other tasks; a dropped future kills the program.
///
/// # Errors
/// As [`run`].
pub async fn run_async(command: Command) -> Result<Output> {
    let (child, status, stdout) = run_to_end(command).await?;
    finish(&child, status, stdout)
}

/// As [`run_async`], for programs whose status says more than success: gives
/// the ended child, its status and its standard output.
///
/// # Errors
/// When it cannot be started.
pub async fn run_to_end(mut command: Command) -> Result<(Child, ExitStatus, Vec<u8>)> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = spawn(command, "", Vec::new())?;
    let pipe = child.take_stdout();
    // Reads until the program has closed its output, which killing it does.
    let reader = tokio::task::spawn_blocking(move || {
        let mut stdout = Vec::new();
        pipe.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut stdout)).map(|_| stdout)
    });
    let status = child.ended().await;
    let stdout = reader.await.trying(|| format!("read from {}", child.0.what))?;
    let stdout = stdout.trying(|| format!("read from {}", child.0.what))?;
    Ok((child, status, stdout))
}

/// Runs a program and gives each line it prints as it comes. Registered in
/// `scope` as long as it runs, so that unwinding ends it when the future is
/// dropped.
///
/// # Errors
/// As [`run`].
pub async fn run_lines(scope: &Scope, mut command: Command, what: &str, on_line: &mut (dyn FnMut(Stream, &str) + Send)) -> Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let (out, child_out) = io::pipe().trying(|| format!("make a pipe for {what}"))?;
    let (err, child_err) = io::pipe().trying(|| format!("make a pipe for {what}"))?;
    command.stdout(child_out).stderr(child_err);
    let (child, ticket) = spawn_registered(scope, command, what, Vec::new())?;
    let (send, mut lines) = tokio::sync::mpsc::channel::<(Stream, String)>(64);
    for (stream, pipe) in [(Stream::Stdout, out), (Stream::Stderr, err)] {
        let send = send.clone();
        tokio::task::spawn_blocking(move || {
            let mut reader = BufReader::new(pipe);
            let mut line = Vec::new();
            while let Ok(1..) = reader.by_ref().take(TAIL as u64).read_until(b'\n', &mut line) {
                let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
                if send.blocking_send((stream, text)).is_err() {
                    break;
                }
                line.clear();
            }
        });
    }
    drop(send);
    while let Some((stream, line)) = lines.recv().await {
        let mut tail = lock(&child.0.tail);
        let _ = writeln!(tail, "{line}");
        trim(&mut tail);
        drop(tail);
        on_line(stream, &line);
    }
    let status = child.ended().await;
    scope.forget(ticket)?;
    if status.success() { Ok(()) } else { Err(child.failure(status)) }
}

/// Kills the process group that was led by `pid` if its leader is still the
/// process that began at `start`; waits until the leader is gone. Tells
/// whether there was one.
///
/// # Errors
/// [`Code::Timeout`] when it does not go away within 10 seconds,
/// [`Code::Failed`] when it may not be killed.
pub fn reap_process(pid: u32, start: u64) -> Result<bool> {
    let Some(group) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(false) };
    if start == 0 || start_time(pid) != Some(start) {
        return Ok(false);
    }
    match rustix::process::kill_process_group(group, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(io::Error::from(error)).trying(|| format!("kill process group {pid}")),
    }
    let limit = Instant::now() + Duration::from_secs(10);
    while start_time(pid) == Some(start) && !is_zombie(pid) {
        if Instant::now() > limit {
            return Err(Error::new(Code::Timeout, format!("process {pid} did not end within 10 s of SIGKILL")));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(true)
}

/// When a process started, in clock ticks since boot; `None` if there is none.
pub fn start_time(pid: u32) -> Option<u64> {
    stat_fields(pid)?.get(19)?.parse().ok()
}

fn is_zombie(pid: u32) -> bool {
    stat_fields(pid).is_some_and(|fields| fields.first().is_some_and(|state| state == "Z" || state == "X"))
}

/// The fields of `/proc/PID/stat` from the third (`state`) on; the second, the
/// program's name in brackets, may itself hold spaces and brackets (proc(5)).
fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(Into::into).collect())
}

/// Where a program is found in `PATH`.
pub fn find(program: &str) -> Option<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let runs = |path: &std::path::Path| std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
    if program.contains('/') {
        return Some(program.into()).filter(|path: &std::path::PathBuf| runs(path));
    }
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(program)).find(|path| runs(path))
}

/// The command that installs `program` on Debian and its children, if known.
pub fn install_hint(program: &str) -> Option<&'static str> {
    let name = program.rsplit('/').next().unwrap_or(program);
    // QEMU's two packages always go together: installing the first alone can
    // remove the second when that came from backports.
    Some(match name {
        "qemu-img" | "qemu-nbd" | "qemu-storage-daemon" | "qemu-system-x86_64" => "apt-get install qemu-system-x86 qemu-utils",
        "mmdebstrap" => "apt-get install mmdebstrap",
        "mke2fs" | "resize2fs" | "debugfs" => "apt-get install e2fsprogs",
        "mkfs.vfat" => "apt-get install dosfstools",
        "sfdisk" => "apt-get install fdisk",
        "newuidmap" | "newgidmap" => "apt-get install uidmap",
        "unshare" => "apt-get install util-linux",
        "ssh" => "apt-get install openssh-client",
        "ansible-playbook" => "apt-get install ansible-core",
        _ => return None,
    })
}

fn cannot_start(program: &OsStr, error: io::Error) -> Error {
    let name = program.to_string_lossy();
    if error.kind() != io::ErrorKind::NotFound {
        return Error::new(Code::Failed, format!("cannot start {name}")).because(error);
    }
    let missing = Error::new(Code::Missing, format!("the program `{name}` is missing on this machine")).because(error);
    match install_hint(&name) {
        Some(hint) => missing.next(format!("install it with `{hint}`; `kiln doctor` shows everything that is needed")),
        None => missing.next("install it, or add its folder to PATH"),
    }
}

fn finish(child: &Child, status: ExitStatus, stdout: Vec<u8>) -> Result<Output> {
    if status.success() { Ok(Output { stdout, stderr: child.stderr_tail() }) } else { Err(child.failure(status)) }
}

fn keep_tail(mut stderr: ChildStderr, tail: Arc<Mutex<Vec<u8>>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stderr.read(&mut buffer) {
            let mut tail = lock(&tail);
            tail.extend_from_slice(&buffer[..count]);
            trim(&mut tail);
        }
    })
}

fn trim(tail: &mut Vec<u8>) {
    let excess = tail.len().saturating_sub(TAIL);
    tail.drain(..excess);
}

/// The one thread that starts programs; it lives as long as the process.
fn spawner() -> &'static mpsc::Sender<Job> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (send, jobs) = mpsc::channel::<Job>();
        // If this thread cannot be made, the receiver is dropped and every
        // send fails: spawn() reports that.
        let _ = thread::Builder::new().name("kiln-spawn".into()).spawn(move || {
            for job in jobs {
                job();
            }
        });
        send
    })
}

/// What the child does between fork and exec.
///
/// `pre_exec` is unsafe since its closure runs in a fork of a program with
/// threads: only async-signal-safe calls are allowed. These are three plain
/// system calls, and nothing allocates.
#[allow(unsafe_code)]
fn prepare(command: &mut Command, inherit: Vec<RawFd>) {
    let parent = rustix::process::getpid();
    let before_exec = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // If the parent died before that call, the signal will never come.
        if rustix::process::getppid() != Some(parent) {
            return Err(io::Error::from(rustix::io::Errno::SRCH));
        }
        for fd in &inherit {
            // SAFETY: the caller of `spawn` keeps these open until after it.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: see above.
    unsafe {
        command.pre_exec(before_exec);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

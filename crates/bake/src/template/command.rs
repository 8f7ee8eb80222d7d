//! Running a variable's command, for a bounded time.

use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long a variable's command may take: long enough for a person to type a
/// passphrase into the password manager that it asks.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// What went wrong with a command. What it wrote is kept apart, since it must
/// not be shown where its output is sensitive.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) message: String,
    pub(super) stderr: String,
}

/// Runs `command` with `sh` in `folder` and gives what it wrote to standard
/// output. It shares kiln's process group, so that Ctrl-C ends it and a
/// password manager may ask on the terminal.
pub(super) fn run(command: &str, folder: &Path, limit: Duration) -> Result<String, Failure> {
    let failure = |message: String| Failure { message, stderr: String::new() };
    let started = Instant::now();
    let mut child = Command::new("sh")
        .args(["-c", command])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failure(format!("cannot run `sh`: {error}")))?;

    // Read beside each other: a full pipe would stop the command for ever. A
    // reader is never joined, since a descendant may hold the pipe open.
    let stdout = child.stdout.take().map(read_all);
    let stderr = child.stderr.take().map(read_all);
    let left = || limit.saturating_sub(started.elapsed());
    let collect = |pipe: Option<mpsc::Receiver<Vec<u8>>>| pipe.and_then(|pipe| pipe.recv_timeout(left()).ok());
    let output = collect(stdout);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if left().is_zero() => break None,
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(failure(format!("cannot wait for the command: {error}"))),
        }
    };
    let (Some(status), Some(output)) = (status, output) else {
        kill_tree(child.id());
        let _ = child.wait();
        return Err(failure(format!("the command took longer than {} s", limit.as_secs())));
    };
    if !status.success() {
        let stderr = collect(stderr).map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned()).unwrap_or_default();
        let how = status.code().map_or_else(|| "was killed by a signal".to_owned(), |code| format!("ended with status {code}"));
        return Err(Failure { message: format!("the command {how}"), stderr });
    }
    String::from_utf8(output).map_err(|_| failure("the command's output is not UTF-8".to_owned()))
}

fn read_all(mut pipe: impl std::io::Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // More than this is no value of a variable.
        let _ = pipe.by_ref().take(1 << 20).read_to_end(&mut bytes);
        let _ = send.send(bytes);
    });
    receive
}

/// Kills a process and its descendants, children first known, then killed, so
/// that none is lost to another parent in between.
fn kill_tree(id: u32) {
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
    if let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
    children.split_whitespace().filter_map(|child| child.parse().ok()).for_each(kill_tree);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_status_and_limit() {
        let here = Path::new("/");
        assert_eq!(run("printf abc", here, LIMIT).unwrap(), "abc");
        let failure = run("echo no >&2; exit 3", here, LIMIT).unwrap_err();
        assert_eq!((failure.message.as_str(), failure.stderr.as_str()), ("the command ended with status 3", "no"));
        let started = Instant::now();
        let failure = run("sleep 77 & sleep 77; true", here, Duration::from_millis(300)).unwrap_err();
        assert!(failure.message.contains("took longer"), "{}", failure.message);
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}

//! The real agent, on this machine: a socket is its port.

use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use kiln_model::guest::Output;
use tokio::sync::mpsc;

use super::*;

/// An agent that runs here, and the link to it. It ends with this.
struct Here {
    link: Arc<Link>,
    port: Port,
    agent: Child,
    close: watch::Sender<u32>,
    _folder: tempfile::TempDir,
}

impl Drop for Here {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

impl Here {
    /// What an agent before this one has left in the stream comes first.
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("kiln-agent");
        std::fs::write(&program, BINARY.unwrap()).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &ours, b"half a frame of another host").unwrap();
        std::io::Write::write_all(&mut &theirs, b"\x20\0\0\0\0\xff\xff\0\0 and of another agent").unwrap();
        let nonce = nonce().unwrap();
        let hex: String = nonce.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut command = std::process::Command::new(program);
        let agent = command.args(["-", &hex]).stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
        let (close, closings) = watch::channel(0);
        let port = Port { stream: ours, closings };
        let link = Link::open(&port, Some((&nonce, STARTING))).await.unwrap();
        Self { link, port, agent, close, _folder: folder }
    }

    async fn run(&self, line: &str, input: &[u8], limit: Option<Duration>) -> Result<Output> {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let on_line: OnLine<'_> = &mut |stream, line| {
            let into = if stream == kiln_model::event::Stream::Stdout { &mut stdout } else { &mut stderr };
            into.push_str(line);
            into.push('\n');
        };
        let exit = self.link.run(line, Input::Bytes(input.to_vec()), limit, Sink::Lines(on_line)).await?;
        Ok(Output { exit, stdout, stderr })
    }
}

#[tokio::test]
async fn commands_say_what_they_print_and_how_they_end() {
    let here = Here::start().await;
    let output = here.run("cat; echo err >&2; exit 7", b"one\ntwo", None).await.unwrap();
    assert_eq!((output.exit, output.stdout.as_str(), output.stderr.as_str()), (Exit::Status(7), "one\ntwo\n", "err\n"));
    assert_eq!(here.run("kill -9 $$", b"", None).await.unwrap().exit, Exit::Signal("KILL".into()));
    assert_eq!(here.run("nonsense-that-is-no-command", b"", None).await.unwrap().exit, Exit::Status(127));
    // Nobody reads the input, and much of it is on its way.
    assert!(here.run("true", &vec![b'x'; 3 << 20], None).await.unwrap().exit.success());
    // A daemon that holds the output open does not hold up its parent.
    assert!(here.run("sleep 1000 & echo $!", b"", None).await.unwrap().stdout.trim().parse::<u32>().is_ok());
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_killed_with_what_it_started() {
    let here = Here::start().await;
    let mark = format!("{}.5", 100_000 + std::process::id());
    let error = here.run(&format!("sleep {mark} & sleep {mark}"), b"", Some(Duration::from_millis(300))).await.unwrap_err();
    assert_eq!(error.kind(), Code::Timeout);
    let found = here.run(&format!("pgrep -fx 'sleep {mark}'"), b"", None).await.unwrap();
    assert_eq!(found.stdout, "", "both are gone");
}

#[tokio::test]
async fn streams_of_any_size_go_through_beside_each_other() {
    let here = Here::start().await;
    let size = 20 << 20;
    let pass = async |input: Vec<u8>| {
        let (stdout, mut chunks) = mpsc::channel(2);
        let mut stderr = String::new();
        let (sink, expected) = (Sink::Bytes { stdout, stderr: &mut stderr }, input.clone());
        let take = async {
            let mut all = Vec::new();
            while let Some(chunk) = chunks.recv().await {
                all.extend_from_slice(&chunk);
            }
            all
        };
        let (exit, all) = tokio::join!(here.link.run("cat", Input::Bytes(input), None, sink), take);
        assert_eq!(exit.unwrap(), Exit::Status(0));
        assert!(all == expected);
    };
    tokio::join!(pass(vec![1; size]), pass((0..size).map(|at| at as u8).collect()));
}

#[tokio::test]
async fn nobody_waits_for_an_agent_that_is_gone() {
    let here = Here::start().await;
    let (close, end) = (here.close.clone(), here.run("sleep 1000", b"", None));
    let close = async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        close.send_modify(|count| *count += 1);
    };
    let (ended, ()) = tokio::join!(end, close);
    assert_eq!(ended.unwrap_err().kind(), Code::Unreachable);
    assert!(here.link.is_lost());
    assert_eq!(here.run("true", b"", None).await.unwrap_err().kind(), Code::Unreachable);
}

#[tokio::test]
async fn the_end_of_one_link_does_not_end_the_next() {
    let mut here = Here::start().await;
    // As after a reboot, where the old one goes when the new one is there.
    here.link = Link::open(&here.port, None).await.unwrap();
    assert!(here.run("true", b"", None).await.unwrap().exit.success());
}

#[test]
fn a_refresh_survives_its_way() {
    let refresh = protocol::Refresh {
        seed: std::array::from_fn(|at| at as u8),
        now: 1_700_000_000_123_456_789,
        files: vec![("/run/kiln/a".into(), 0o600, b"bytes".to_vec()), ("/b".into(), 0o644, Vec::new())],
    };
    assert!(protocol::Refresh::read(&refresh.write()) == Some(refresh.clone()));
    assert!(protocol::Refresh::read(&refresh.write()[..500]).is_none());
}

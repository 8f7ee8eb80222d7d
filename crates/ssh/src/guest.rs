//! A guest that is reached over SSH.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::guest::{Command, Exit, Guest, OnLine, SshAccess};
use kiln_model::tree::Tree;
use kiln_model::{Code, Error, Result, ResultExt as _};
use russh::Channel;
use russh::client::Msg;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{Instant, sleep, timeout};

use crate::command::{self, Input, Run, Sink};
use crate::connect::{Target, reach};
use crate::copy;
use crate::session::Session;

/// How long a lost connection is tried to be made again.
const AGAIN: Duration = Duration::from_secs(30);
/// Commands at a time. sshd allows 10 channels on a connection
/// (`MaxSessions`); the rest is for killing.
const AT_A_TIME: usize = 8;

/// A guest behind an SSH server whose host key is pinned. One connection
/// carries everything, as channels; when it is lost, the next call makes
/// another with the same pin.
pub struct SshGuest {
    target: Arc<Target>,
    session: Mutex<Option<Arc<Session>>>,
    turns: Semaphore,
}

impl SshGuest {
    pub(crate) fn new(target: Arc<Target>, session: Session) -> Self {
        Self { target, session: Mutex::new(Some(Arc::new(session))), turns: Semaphore::new(AT_A_TIME) }
    }

    /// A guest that is not connected to before something is asked of it.
    pub fn unconnected(target: Target) -> Arc<Self> {
        Arc::new(Self { target: Arc::new(target), session: Mutex::new(None), turns: Semaphore::new(AT_A_TIME) })
    }

    /// Takes leave of the guest. The next call would connect again.
    pub async fn close(&self) {
        if let Some(session) = self.session.lock().await.take() {
            session.disconnect().await;
        }
    }

    /// The connection; made again within `deadline` if it was lost.
    async fn session(&self, deadline: Duration) -> Result<Arc<Session>> {
        let mut kept = self.session.lock().await;
        if let Some(session) = kept.as_ref().filter(|session| !session.is_closed()) {
            return Ok(Arc::clone(session));
        }
        // Nothing half-made is kept if this is cancelled.
        *kept = None;
        let session = Arc::new(reach(&self.target, deadline).await?);
        *kept = Some(Arc::clone(&session));
        Ok(session)
    }

    async fn forget(&self, session: &Arc<Session>) {
        let mut kept = self.session.lock().await;
        if kept.as_ref().is_some_and(|other| Arc::ptr_eq(other, session)) {
            *kept = None;
        }
    }

    /// A channel. As long as nothing was asked of the guest, a connection that
    /// turns out to be dead is made again.
    async fn channel(&self) -> Result<(Arc<Session>, Channel<Msg>)> {
        let end = Instant::now() + AGAIN;
        loop {
            let session = self.session(AGAIN).await?;
            match session.open().await {
                Ok(channel) => return Ok((session, channel)),
                // sshd counts a session until it has buried its process, which
                // may be after it closed the channel.
                Err(russh::Error::ChannelOpenFailure(_)) if Instant::now() < end => sleep(Duration::from_millis(50)).await,
                Err(russh::Error::ChannelOpenFailure(why)) => {
                    return Err(Error::new(Code::Unreachable, format!("the guest's sshd opens no channel: {why:?}")));
                }
                Err(_) if Instant::now() < end => self.forget(&session).await,
                Err(error) => return Err(session.lost("before the command began").because(error)),
            }
        }
    }

    /// The boot id, asked within `limit` over a connection made within
    /// `deadline`.
    async fn current_boot(&self, deadline: Duration, limit: Duration) -> Result<String> {
        let session = self.session(deadline).await?;
        let work = async {
            let channel = session.open().await.map_err(|error| session.lost("before the command began").because(error))?;
            let mut id = String::new();
            let mut on_line = |_, line: &str| id.push_str(line);
            let line = "cat /proc/sys/kernel/random/boot_id";
            command::run(&session, channel, &self.target.user, line, Input::Bytes(Vec::new()), None, Sink::Lines(&mut on_line)).await?;
            Ok(id.trim().to_owned())
        };
        match timeout(limit, work).await {
            Ok(Ok(id)) if !id.is_empty() => Ok(id),
            Ok(Err(error)) => {
                self.forget(&session).await;
                Err(error)
            }
            Ok(Ok(_)) => Err(Error::new(Code::Unreachable, "the guest gave no boot id")),
            Err(_) => {
                self.forget(&session).await;
                Err(Error::new(Code::Unreachable, "the guest did not say its boot id in time"))
            }
        }
    }

    fn access(&self) -> Result<SshAccess> {
        let Target { host, port, user, keys, folder } = &*self.target;
        let (key_file, known_hosts) = (folder.join("id_ed25519"), folder.join("known_hosts"));
        let name = if *port == 22 { host.clone() } else { format!("[{host}]:{port}") };
        private_file(&key_file, keys.client_private_openssh())?;
        private_file(&known_hosts, &format!("{name} {}\n", keys.host_public()))?;
        Ok(SshAccess { host: host.clone(), port: *port, user: user.clone(), key_file, known_hosts })
    }
}

/// Writes a file of mode 0600, whole or not at all.
fn private_file(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    let write = || {
        let _ = std::fs::remove_file(&new);
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?.write_all(text.as_bytes())?;
        std::fs::rename(&new, path)
    };
    write().trying(|| format!("write {}", path.display()))
}

#[async_trait]
impl Run for SshGuest {
    async fn run(&self, line: &str, input: Input, limit: Option<Duration>, sink: Sink<'_>) -> Result<Exit> {
        let _turn = self.turns.acquire().await.trying(|| "run a command".into())?;
        let (session, channel) = self.channel().await?;
        command::run(&session, channel, &self.target.user, line, input, limit, sink).await
    }
}

#[async_trait]
impl Guest for SshGuest {
    async fn execute(&self, command: &Command, on_line: OnLine<'_>) -> Result<Exit> {
        self.run(&command.line, Input::Bytes(command.stdin.clone()), command.timeout, Sink::Lines(on_line)).await
    }

    async fn upload(&self, tree: &Tree, destination: &str) -> Result<()> {
        copy::upload(self, tree, destination).await
    }

    async fn download(&self, source: &str, destination: &Path) -> Result<()> {
        copy::download(self, source, destination).await
    }

    async fn wait_for_new_boot(&self, boot_id: &str, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let mut last = None;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let error = Error::new(Code::Unreachable, format!("the guest did not boot again within {} s", deadline.as_secs()));
                return Err(match last {
                    Some(seen) => error.because(seen),
                    None => error.detail("it still answers, and has not gone down"),
                });
            }
            // A guest that goes down may say nothing more on a connection that
            // looks alive, so no question waits for long.
            match self.current_boot(left, left.min(Duration::from_secs(15))).await {
                Ok(id) if id != boot_id => return Ok(()),
                Ok(_) => last = None,
                Err(error) if error.kind() == Code::HostKey => return Err(error),
                Err(error) => last = Some(error),
            }
            sleep(Duration::from_millis(300)).await;
        }
    }

    fn ssh_access(&self) -> Option<SshAccess> {
        self.access().ok()
    }
}

//! The agent in the guest, from outside: putting it there, running commands
//! through it, and having it bring the guest to rest and make it a fresh one.
//!
//! The agent itself is a program of its own, in `agent/` of this crate.

mod link;
#[path = "../../agent/protocol.rs"]
#[allow(dead_code, reason = "the agent's half is used there")]
mod protocol;
#[cfg(test)]
mod tests;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use kiln_model::guest::{Command, Exit, Guest, GuestExt as _, OnLine, SshAccess};
use kiln_model::tree::Tree;
use kiln_model::{Code, Error, Result, ResultExt as _};
use kiln_ssh::{Input, Run, Sink, SshGuest, copy};
use tokio::sync::watch;

use link::Link;
use protocol::{Kind, Nonce};

/// The name of its port.
pub(crate) const PORT: &str = "org.kiln.agent";

/// Changes with what is said over it.
pub(crate) const VERSION: u32 = protocol::VERSION;

/// The program; none where it cannot be made.
pub(crate) const BINARY: Option<&[u8]> = include!(concat!(env!("OUT_DIR"), "/agent.rs"));

/// How long sending and starting it may take, under emulation.
const STARTING: Duration = Duration::from_secs(120);

/// How long the guest may take to write what it holds in memory.
const QUIESCING: Duration = Duration::from_secs(300);

/// How long waking it may take.
const THAWING: Duration = Duration::from_secs(60);

/// The host's end of the agent's port.
pub(crate) struct Port {
    pub(crate) stream: UnixStream,
    /// How often the guest's end was closed.
    pub(crate) closings: watch::Receiver<u32>,
}

/// What makes a resumed guest another one than its siblings.
pub(crate) struct Refresh {
    pub(crate) seed: [u8; 512],
    pub(crate) now: SystemTime,
    /// Path, mode and bytes.
    pub(crate) files: Vec<(String, u32, Vec<u8>)>,
}

/// A guest that is reached through its agent; over SSH where that is gone.
pub(crate) struct AgentGuest {
    ssh: Arc<SshGuest>,
    port: Port,
    link: Mutex<Option<Arc<Link>>>,
}

impl AgentGuest {
    /// Puts the agent into a guest that SSH reaches.
    ///
    /// # Errors
    /// When the guest cannot have it.
    pub(crate) async fn bring(port: Port, ssh: &Arc<SshGuest>) -> Result<Arc<Self>> {
        let link = install(&port, ssh).await?;
        Ok(Arc::new(Self { ssh: ssh.clone(), port, link: Mutex::new(Some(link)) }))
    }

    /// Takes up with the agent of a guest that was resumed, all of whose other
    /// processes stand still until it has made the guest a fresh one.
    ///
    /// # Errors
    /// When it does not answer in time, or could not.
    pub(crate) async fn wake(port: Port, ssh: &Arc<SshGuest>, refresh: Refresh, limit: Duration) -> Result<Arc<Self>> {
        let link = Link::open(&port, None).await?;
        let Refresh { seed, now, files } = refresh;
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        let request = protocol::Refresh { seed, now, files }.write();
        link.ask(Kind::Refresh, &request, limit).await.trying(|| "make the resumed guest a fresh one".into())?;
        Ok(Arc::new(Self { ssh: ssh.clone(), port, link: Mutex::new(Some(link)) }))
    }

    fn link(&self) -> Option<Arc<Link>> {
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        link.clone().filter(|link| !link.is_lost())
    }

    /// Whether the agent is there.
    pub(crate) fn is_there(&self) -> bool {
        self.link().is_some()
    }

    /// Makes all processes of the guest stand still, and its disk hold what they
    /// have written.
    ///
    /// # Errors
    /// When it cannot; everything runs then.
    pub(crate) async fn quiesce(&self) -> Result<()> {
        let link = self.link().ok_or_else(|| Error::new(Code::Unreachable, "the guest has no agent"))?;
        match link.ask(Kind::Quiesce, &[], QUIESCING).await {
            // It may have done it all the same.
            Err(error) if error.kind() == Code::Timeout => {
                let _ = self.thaw().await;
                Err(error)
            }
            done => done,
        }
    }

    /// Lets the guest's processes go on.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub(crate) async fn thaw(&self) -> Result<()> {
        let link = self.link().ok_or_else(|| Error::new(Code::Unreachable, "the guest's agent is gone"))?;
        link.ask(Kind::Thaw, &[], THAWING).await
    }
}

/// Sends the agent and starts it. `/dev/shm` is where a guest holds programs in
/// memory alone; `/run` is often mounted without the right to run them.
async fn install(port: &Port, ssh: &SshGuest) -> Result<Arc<Link>> {
    const LINE: &str = "umask 077; f=/dev/shm/kiln-agent; rm -f $f; cat > $f && chmod 700 $f && exec $f";
    let binary = BINARY.ok_or_else(|| Error::new(Code::Missing, "this kiln was built without its agent"))?;
    let nonce = nonce()?;
    let hex: String = nonce.iter().map(|byte| format!("{byte:02x}")).collect();
    let command = Command::new(format!("{LINE} {PORT} {hex}")).stdin(binary).timeout(STARTING);
    let output = ssh.output(&command).await.trying(|| "put kiln's agent into the guest".into())?;
    if !output.exit.success() {
        let error = Error::new(Code::Failed, format!("cannot start kiln's agent in the guest ({})", output.exit));
        return Err(error.detail(output.stderr));
    }
    Link::open(port, Some((&nonce, STARTING))).await
}

fn nonce() -> Result<Nonce> {
    use std::io::Read as _;
    let mut nonce = Nonce::default();
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut nonce));
    read.trying(|| "read /dev/urandom".into()).map(|()| nonce)
}

#[async_trait]
impl Run for AgentGuest {
    async fn run(&self, line: &str, input: Input, limit: Option<Duration>, sink: Sink<'_>) -> Result<Exit> {
        match self.link() {
            Some(link) => link.run(line, input, limit, sink).await,
            None => self.ssh.run(line, input, limit, sink).await,
        }
    }
}

#[async_trait]
impl Guest for AgentGuest {
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
        self.ssh.wait_for_new_boot(boot_id, deadline).await?;
        // A guest that cannot have it again is reached over SSH from now on.
        let link = install(&self.port, &self.ssh).await.ok();
        if link.is_some() {
            self.ssh.close().await;
        }
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = link;
        Ok(())
    }

    fn ssh_access(&self) -> Option<SshAccess> {
        self.ssh.ssh_access()
    }
}

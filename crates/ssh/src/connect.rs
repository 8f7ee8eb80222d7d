//! From a port that somebody listens on to a connection with the right guest.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kiln_model::{Code, Error, Result};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::guest::SshGuest;
use crate::keys::Keys;
use crate::session::Session;

/// Pause between attempts that end at once.
const PAUSE: Duration = Duration::from_millis(250);
/// How long an attempt stays alone without a banner before the next one is
/// started beside it.
const ALONE: Duration = Duration::from_secs(1);
/// How long an attempt may wait for its banner.
const BANNER: Duration = Duration::from_secs(10);

/// Where a guest is, and by which keys it is known.
#[derive(Debug, Clone)]
pub struct Target {
    /// Address of the guest's sshd as seen from here.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Login name. Another than `root` must be allowed `sudo` without a
    /// password.
    pub user: String,
    /// The bake's keys.
    pub keys: Arc<Keys>,
    /// A folder (0700) where the key and known_hosts files are written when
    /// something asks for [`kiln_model::guest::Guest::ssh_access`].
    pub folder: PathBuf,
}

/// Connects to a guest that may still be booting.
///
/// Tries until it answers. Between the attempts lies no more than a quarter of
/// a second; `deadline` is when no new attempt is made, and one that has shown
/// its banner by then has another 60 s for the handshake, which is slow under
/// emulation.
///
/// # Errors
/// [`Code::HostKey`] at once when another host answers, naming both
/// fingerprints; [`Code::Unreachable`] after `deadline` with what the last
/// attempt saw.
pub async fn connect(target: Target, deadline: Duration) -> Result<Arc<SshGuest>> {
    let target = Arc::new(target);
    let session = reach(&target, deadline).await?;
    Ok(Arc::new(SshGuest::new(target, session)))
}

/// As [`connect`], for the connection alone.
pub(crate) async fn reach(target: &Arc<Target>, deadline: Duration) -> Result<Session> {
    let end = Instant::now() + deadline;
    let mut last = Error::new(Code::Unreachable, "no attempt was made");
    loop {
        match banner(target, end, last).await {
            Err(seen) => {
                return Err(Error::new(
                    Code::Unreachable,
                    format!("the guest did not answer SSH on {}:{} within {} s", target.host, target.port, deadline.as_secs()),
                )
                .because(seen));
            }
            Ok(stream) => match Session::start(target, stream).await {
                Ok(session) => return Ok(session),
                Err(error) if error.kind() == Code::HostKey => return Err(error),
                Err(error) => last = error,
            },
        }
        sleep(PAUSE).await;
    }
}

/// A connection on which an SSH server has begun to speak.
///
/// QEMU's user network accepts a connection before the guest listens, and such
/// a connection may hang for good; but a loaded guest may also take seconds to
/// say its first word. So attempts overlap: each has [`BANNER`], and the next
/// one starts after [`ALONE`].
async fn banner(target: &Target, end: Instant, mut last: Error) -> Result<TcpStream> {
    let mut attempts = JoinSet::new();
    while Instant::now() < end {
        let (host, port) = (target.host.clone(), target.port);
        attempts.spawn(async move { timeout(BANNER, listen(&host, port)).await });
        let alone = (Instant::now() + ALONE).min(end);
        while let Ok(Some(attempt)) = timeout_at(alone, attempts.join_next()).await {
            match attempt {
                Ok(Ok(Ok(stream))) => return Ok(stream),
                Ok(Ok(Err(error))) => last = error,
                Ok(Err(_)) => {
                    last = Error::new(
                        Code::Unreachable,
                        format!("the connection was accepted, but no SSH banner came in {} s", BANNER.as_secs()),
                    )
                }
                Err(_) => {}
            }
            if attempts.is_empty() {
                sleep(PAUSE).await;
                break;
            }
        }
    }
    // An attempt that hung at the deadline says more than an older refusal.
    Err(if attempts.is_empty() { last } else { Error::new(Code::Unreachable, "the connection was accepted, but no SSH banner came") })
}

async fn listen(host: &str, port: u16) -> Result<TcpStream> {
    let unreachable = |what: &str| Error::new(Code::Unreachable, what.to_owned());
    let stream = TcpStream::connect((host, port)).await.map_err(|error| unreachable("the connection failed").because(error))?;
    let mut first = [0; 4];
    // Only looked at: the handshake reads it again.
    match stream.peek(&mut first).await {
        Ok(0) => Err(unreachable("the connection was closed without an SSH banner")),
        Ok(_) => Ok(stream),
        Err(error) => Err(unreachable("the connection was cut off before an SSH banner").because(error)),
    }
}

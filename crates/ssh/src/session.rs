//! One SSH connection whose host key was checked.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_model::{Code, Error, Result};
use russh::client::{self, AuthResult, DisconnectReason, Handle, Msg};
use russh::keys::{Algorithm, EcdsaCurve, HashAlg, PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::{AlgorithmKind, Channel, Disconnect, cipher, kex};
use tokio::net::TcpStream;

use crate::connect::Target;

/// A handshake under emulation takes 2 s on an idle machine, and a multiple
/// of that beside a compiler.
const HANDSHAKE: Duration = Duration::from_secs(60);

/// What the handler, which lives in the connection's own task, has seen.
#[derive(Default)]
struct Seen {
    /// Fingerprint of a host key that is not the pinned one.
    other_host: Option<String>,
    /// Why the connection ended.
    end: Option<String>,
}

struct Watcher {
    target: Arc<Target>,
    seen: Arc<Mutex<Seen>>,
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl client::Handler for Watcher {
    type Error = russh::Error;

    async fn check_server_key(&mut self, offered: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        let key = offered.public_key();
        let pinned = matches!(offered, PublicKeyOrCertificate::PublicKey { .. }) && self.target.keys.is_host(&key);
        if !pinned {
            lock(&self.seen).other_host = Some(key.fingerprint(HashAlg::Sha256).to_string());
        }
        Ok(pinned)
    }

    async fn disconnected(&mut self, reason: DisconnectReason<russh::Error>) -> Result<(), russh::Error> {
        let (text, result) = match reason {
            DisconnectReason::ReceivedDisconnect(info) => (format!("the guest disconnected: {}", info.message), Ok(())),
            DisconnectReason::Error(error) => (error.to_string(), Err(error)),
        };
        lock(&self.seen).end.get_or_insert(text);
        result
    }
}

/// A connection that is authenticated. Dropping the last reference takes leave
/// of the peer.
pub(crate) struct Session {
    handle: Arc<Handle<Watcher>>,
    seen: Arc<Mutex<Seen>>,
}

/// Cheap ones first, for a guest whose processor is emulated: no post-quantum
/// key exchange on a loopback connection, and ciphers that bring their own
/// authentication.
fn config() -> client::Config {
    client::Config {
        nodelay: true,
        // Half a minute without a sign of life, then three more tries: a guest
        // that is being checkpointed stands still for seconds.
        keepalive_interval: Some(Duration::from_secs(15)),
        keepalive_max: 4,
        preferred: russh::Preferred {
            kex: Cow::Borrowed(&[
                kex::CURVE25519,
                kex::CURVE25519_PRE_RFC_8731,
                kex::EXTENSION_SUPPORT_AS_CLIENT,
                kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
            ]),
            // The pinned key is Ed25519. The others are there to name the
            // fingerprint of a host that has none.
            key: Cow::Borrowed(&[
                Algorithm::Ed25519,
                Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
                Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
            ]),
            cipher: Cow::Borrowed(&[cipher::CHACHA20_POLY1305, cipher::AES_256_GCM, cipher::AES_128_GCM]),
            ..russh::Preferred::DEFAULT
        },
        ..client::Config::default()
    }
}

impl Session {
    /// Handshake and authentication on a connection that has shown a banner.
    ///
    /// # Errors
    /// [`Code::HostKey`] when the host key is another one,
    /// [`Code::Unreachable`] otherwise.
    pub(crate) async fn start(target: &Arc<Target>, stream: TcpStream) -> Result<Self> {
        let unreachable = |what: String| Error::new(Code::Unreachable, what);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let work = async {
            let _ = stream.set_nodelay(true);
            let watcher = Watcher { target: Arc::clone(target), seen: Arc::clone(&seen) };
            let mut handle = match client::connect_stream(Arc::new(config()), stream, watcher).await {
                Ok(handle) => handle,
                Err(error) => return Err(refused(target, &seen, error)),
            };
            let key = PrivateKeyWithHashAlg::new(target.keys.client(), None);
            match handle.authenticate_publickey(&target.user, key).await {
                Ok(AuthResult::Success) => Ok(handle),
                Ok(AuthResult::Failure { .. }) => Err(unreachable(format!("the guest refused this bake's key for `{}`", target.user))),
                Err(error) => Err(unreachable("the SSH login failed".into()).because(error)),
            }
        };
        match tokio::time::timeout(HANDSHAKE, work).await {
            Ok(handle) => Ok(Self { handle: Arc::new(handle?), seen }),
            Err(_) => Err(unreachable(format!("the SSH handshake took over {} s", HANDSHAKE.as_secs()))),
        }
    }

    /// Whether it has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.handle.is_closed()
    }

    /// Opens a channel for one command.
    pub(crate) async fn open(&self) -> Result<Channel<Msg>, russh::Error> {
        self.handle.channel_open_session().await
    }

    /// The error of something that was cut off.
    pub(crate) fn lost(&self, what: &str) -> Error {
        let error = Error::new(Code::Unreachable, format!("the connection to the guest was lost {what}"));
        match lock(&self.seen).end.clone() {
            Some(end) => error.detail(end),
            None => error,
        }
    }

    /// Takes leave of the peer.
    pub(crate) async fn disconnect(&self) {
        disconnect(&self.handle).await;
    }
}

async fn disconnect(handle: &Handle<Watcher>) {
    let leave = handle.disconnect(Disconnect::ByApplication, "done", "en");
    let _ = tokio::time::timeout(Duration::from_secs(2), leave).await;
}

impl Drop for Session {
    fn drop(&mut self) {
        // Dropping a handle says nothing to the peer, which would keep its
        // processes until it notices.
        if let (false, Ok(runtime)) = (self.is_closed(), tokio::runtime::Handle::try_current()) {
            let handle = Arc::clone(&self.handle);
            runtime.spawn(async move { disconnect(&handle).await });
        }
    }
}

fn refused(target: &Target, seen: &Mutex<Seen>, error: russh::Error) -> Error {
    let pinned = target.keys.host_fingerprint();
    let offered = match (&error, lock(seen).other_host.take()) {
        (_, Some(other)) => format!("the key {other}"),
        (russh::Error::NoCommonAlgo { kind: AlgorithmKind::Key, theirs, .. }, None) => format!("only keys of type {}", theirs.join(", ")),
        _ => return Error::new(Code::Unreachable, "the SSH handshake failed").because(error),
    };
    Error::new(Code::HostKey, format!("{}:{} is another host: it has {offered}, this bake's guest has {pinned}", target.host, target.port))
        .next("something else listens on that port, or the guest ignored the host key it was given; nothing was sent to it")
}

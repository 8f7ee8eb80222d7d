//! The keys of one bake.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use kiln_model::{Result, ResultExt as _};
use russh::keys::key::safe_rng;
use russh::keys::ssh_key::LineEnding;
use russh::keys::{Algorithm, HashAlg, PrivateKey, PublicKey};

/// Comment of the client's key in the guest's `authorized_keys`; the seal
/// looks for it.
const COMMENT: &str = "kiln-bake";

/// The Ed25519 client key and Ed25519 host key of one bake. They live in
/// memory; whoever hands one to a guest or a child writes it to a file of mode
/// 0600 and removes that.
pub struct Keys {
    client: Arc<PrivateKey>,
    host: PublicKey,
    client_public: String,
    client_private: Text,
    host_public: String,
    host_private: Text,
}

/// Text that is overwritten when it is dropped.
type Text = Box<dyn Deref<Target = String> + Send + Sync>;

/// In place of a private key that is not known.
struct NoKey(String);

impl Deref for NoKey {
    type Target = String;

    fn deref(&self) -> &String {
        &self.0
    }
}

impl Keys {
    /// Makes new ones.
    ///
    /// # Errors
    /// When the machine gives no random numbers.
    pub fn generate() -> Result<Self> {
        let pair = || PrivateKey::random(&mut safe_rng(), Algorithm::Ed25519).trying(|| "make an SSH key".into());
        let (mut client, host) = (pair()?, pair()?);
        client.set_comment(COMMENT);
        Ok(Self {
            client_public: client.public_key().to_openssh().trying(|| "write an SSH key".into())?,
            client_private: Box::new(client.to_openssh(LineEnding::LF).trying(|| "write an SSH key".into())?),
            host_public: host.public_key().to_openssh().trying(|| "write an SSH key".into())?,
            host_private: Box::new(host.to_openssh(LineEnding::LF).trying(|| "write an SSH key".into())?),
            host: host.public_key().clone(),
            client: Arc::new(client),
        })
    }

    /// The same client's keys for a host whose public key (`ssh-ed25519 AAAA…`)
    /// is known from elsewhere; there is no private key of it then.
    ///
    /// # Errors
    /// When the line is no public key.
    pub fn of_host(&self, line: &str) -> Result<Self> {
        let host = PublicKey::from_openssh(line).trying(|| format!("read the host key `{line}`"))?;
        Ok(Self {
            client: Arc::clone(&self.client),
            host_public: host.to_openssh().trying(|| "write an SSH key".into())?,
            host,
            client_public: self.client_public.clone(),
            client_private: Box::new(self.client.to_openssh(LineEnding::LF).trying(|| "write an SSH key".into())?),
            host_private: Box::new(NoKey(String::new())),
        })
    }

    /// The client's public key as a line of `authorized_keys`, without its end.
    pub fn client_public(&self) -> &str {
        &self.client_public
    }

    /// The client's private key in OpenSSH's format. Secret.
    pub fn client_private_openssh(&self) -> &str {
        &self.client_private
    }

    /// The host's public key: `ssh-ed25519 AAAA…`, no comment.
    pub fn host_public(&self) -> &str {
        self.host_public.trim_end()
    }

    /// The host's private key in OpenSSH's format, for
    /// `/etc/ssh/ssh_host_ed25519_key`. Secret. Empty where it is not known
    /// ([`Keys::of_host`]).
    pub fn host_private_openssh(&self) -> &str {
        &self.host_private
    }

    /// SHA-256 fingerprint of the host's key, as `ssh-keygen -l` shows it.
    pub fn host_fingerprint(&self) -> String {
        self.host.fingerprint(HashAlg::Sha256).to_string()
    }

    pub(crate) fn client(&self) -> Arc<PrivateKey> {
        Arc::clone(&self.client)
    }

    pub(crate) fn is_host(&self, key: &PublicKey) -> bool {
        self.host.key_data() == key.key_data()
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys(host {})", self.host_fingerprint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_may_be_known_from_elsewhere() {
        let (keys, other) = (Keys::generate().unwrap(), Keys::generate().unwrap());
        let known = keys.of_host(other.host_public()).unwrap();
        assert_eq!((known.client_public(), known.host_public()), (keys.client_public(), other.host_public()));
        assert_eq!(known.client_private_openssh(), keys.client_private_openssh());
        assert!(known.is_host(&other.host) && !known.is_host(&keys.host));
        assert!(known.host_private_openssh().is_empty());
        assert!(keys.of_host("ssh-ed25519").is_err());
    }

    #[test]
    fn keys_are_read_by_openssh_and_not_shown() {
        let keys = Keys::generate().unwrap();
        assert!(keys.client_public().starts_with("ssh-ed25519 AAAA") && keys.client_public().ends_with(" kiln-bake"));
        assert_eq!(keys.host_public().split(' ').count(), 2);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        for (private, public) in [(keys.client_private_openssh(), keys.client_public()), (keys.host_private_openssh(), keys.host_public())]
        {
            std::fs::write(&path, private).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            let output = std::process::Command::new("ssh-keygen").arg("-y").arg("-f").arg(&path).output().unwrap();
            let read = String::from_utf8(output.stdout).unwrap();
            assert_eq!(read.split(' ').nth(1).unwrap().trim(), public.split(' ').nth(1).unwrap());
        }
        assert!(!format!("{keys:?}").contains("PRIVATE"));
        let output = std::process::Command::new("ssh-keygen").arg("-l").arg("-f").arg(&path).output().unwrap();
        assert!(String::from_utf8(output.stdout).unwrap().contains(&keys.host_fingerprint()));
    }
}

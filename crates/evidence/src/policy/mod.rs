//! Policies: what has to be true of an image before a channel may point to it.
//!
//! ```toml
//! channel = "web@production"          # optional: where this policy holds
//! followers = ["ssm:eu-central-1:/images/web/production/{arch}"]   # optional
//!
//! [keys]
//! release = '''
//! -----BEGIN PUBLIC KEY-----
//! …
//! -----END PUBLIC KEY-----
//! '''
//!
//! [require]
//! signed_by = ["release"]             # signed by one of these keys
//! statements_by = ["ci"]              # whose statements count; else those of all [keys]
//! tests_passed = true
//! hygiene_clean = true
//! converged = true
//! source = ["https://github.com/acme/shop"]
//! max_age = "30d"
//! base_current = true
//! came_through = ["staging"]
//! ```
//!
//! A policy says whose word counts: what is claimed of tests, hygiene and source
//! counts when one of its keys has signed it. Only a policy that names no key
//! at all believes what nobody has signed.
//!
//! Deciding has no side effects and asks nobody: [`check`] is told everything as
//! [`Facts`], so that whoever promotes and whoever consumes decide alike.

mod check;
mod read;

use std::collections::BTreeMap;
use std::time::Duration;

use kiln_model::channel::Follower;
use kiln_model::{Code, Digest, Error, Result};

pub use check::{Base, Facts, Unmet, check};

use crate::dsse::Envelope;
use crate::failure::Failure;
use crate::keys::{PrivateKey, PublicKey};

/// Payload type of a signed policy.
pub const SIGNED: &str = "application/vnd.kiln.policy.v1+toml";

/// A policy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// `name@channel` where it holds, when it says so.
    pub channel: Option<String>,
    /// The keys that it knows, by name.
    pub keys: BTreeMap<String, PublicKey>,
    /// What it requires.
    pub require: Require,
    /// What follows the channel.
    pub followers: Vec<Follower>,
}

/// What a policy requires.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Require {
    /// A signature by one of these keys, by name. Empty: none is required.
    pub signed_by: Vec<String>,
    /// Statements count when one of these keys signed them, by name. Empty:
    /// one of all the policy's keys.
    pub statements_by: Vec<String>,
    /// That the tests have passed.
    pub tests_passed: bool,
    /// That the hygiene check found nothing.
    pub hygiene_clean: bool,
    /// That one run of the tools that configured it was proved to be enough.
    pub converged: bool,
    /// Provenance from one of these repositories, by URL. Empty: from anywhere.
    pub source: Vec<String>,
    /// That it was baked not longer ago.
    pub max_age: Option<Duration>,
    /// That its base is the newest there is.
    pub base_current: bool,
    /// Channels that have pointed to it, all of them.
    pub came_through: Vec<String>,
}

impl Policy {
    /// Whether it holds for `name@channel`: it says so, or says nothing.
    pub fn is_for(&self, name: &str, channel: &str) -> bool {
        self.channel.as_ref().is_none_or(|own| *own == format!("{name}@{channel}"))
    }

    /// All its keys, to examine evidence with.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.keys.values().cloned().collect()
    }

    /// Ids of the keys with these names, or of all keys when there are none.
    fn ids(&self, names: &[String]) -> Vec<Digest> {
        let wanted = |(name, _): &(&String, &PublicKey)| names.is_empty() || names.contains(name);
        self.keys.iter().filter(wanted).map(|(_, key)| key.id()).collect()
    }

    /// The signature over a policy's text: a DSSE envelope in JSON.
    ///
    /// # Errors
    /// Never, unless kiln itself is broken.
    pub fn sign(text: &str, key: &PrivateKey) -> Result<Vec<u8>> {
        let envelope = Envelope::sign(SIGNED, text.as_bytes(), key).to_json();
        envelope.map_err(|failure| Error::new(Code::Failed, "the policy cannot be signed").because(failure))
    }

    /// Which of `keys` have signed a policy's text.
    ///
    /// # Errors
    /// Why the signature does not count.
    pub fn signers(text: &str, signature: &[u8], keys: &[PublicKey]) -> Result<Vec<Digest>, Failure> {
        let envelope = Envelope::parse(signature)?;
        let (payload, signers) = envelope.verify(keys)?;
        if envelope.payload_type() != SIGNED {
            return Err(Failure::malformed("what is signed is no policy"));
        }
        if payload == text.as_bytes() { Ok(signers) } else { Err(Failure::Payload) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::tests::key;

    /// The repository that the policy of [`all`] wants.
    pub(super) const REPOSITORY: &str = "https://github.com/acme/shop";

    pub(super) fn policy(require: Require) -> Policy {
        let keys = [("release", 1), ("ci", 2)].map(|(name, number)| (name.to_owned(), key(number).public().clone()));
        Policy { channel: None, keys: BTreeMap::from(keys), require, followers: Vec::new() }
    }

    pub(super) fn all() -> Require {
        Require {
            signed_by: vec!["release".into()],
            statements_by: vec!["ci".into()],
            tests_passed: true,
            hygiene_clean: true,
            converged: true,
            source: vec![REPOSITORY.into()],
            max_age: Some(Duration::from_secs(30 * 86_400)),
            base_current: true,
            came_through: vec!["staging".into()],
        }
    }

    #[test]
    fn a_signed_policy_is_that_text_and_no_other() {
        let signature = Policy::sign("text", &key(1)).unwrap();
        let keys = [key(1).public().clone()];
        assert_eq!(Policy::signers("text", &signature, &keys), Ok(vec![key(1).id()]));
        assert_eq!(Policy::signers("test", &signature, &keys), Err(Failure::Payload));
        assert!(matches!(Policy::signers("text", &signature, &[key(2).public().clone()]), Err(Failure::Key { .. })));
        let other = Envelope::sign("text/plain", b"text", &key(1)).to_json().unwrap();
        assert!(matches!(Policy::signers("text", &other, &keys), Err(Failure::Malformed(_))));
    }
}

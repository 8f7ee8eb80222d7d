//! One signature over some bytes, and which of several keys made it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_model::Digest;

use crate::failure::Failure;
use crate::keys::PublicKey;

/// What a signature says of the key that made it. Only a hint: it is not
/// signed itself, and is used to say what is wrong, never to accept something.
fn names(hint: &str, key: &PublicKey) -> bool {
    let id = key.id();
    hint == id.to_string() || hint == id.hex() || hint == key_hint(key)
}

/// A key's id as sigstore bundles write it.
pub(crate) fn key_hint(key: &PublicKey) -> String {
    STANDARD.encode(key.id().as_bytes())
}

/// A hint as people are shown it.
fn shown(hint: &str) -> String {
    let id = STANDARD.decode(hint).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    id.map_or_else(|| hint.to_owned(), |bytes| Digest::from_bytes(bytes).to_string())
}

/// The id of the key that accepts a signature.
pub(crate) fn signer(keys: &[PublicKey], hint: Option<&str>, accepts: impl Fn(&PublicKey) -> bool) -> Result<Digest, Failure> {
    if let Some(key) = keys.iter().find(|key| accepts(key)) {
        return Ok(key.id());
    }
    Err(match hint.filter(|hint| !hint.is_empty()) {
        Some(hint) if keys.iter().any(|key| names(hint, key)) => Failure::Payload,
        Some(hint) => Failure::Key { says: shown(hint) },
        None => Failure::Signature,
    })
}

/// Bytes in base64.
pub(crate) fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// Bytes from base64; `what` they are is said when they are none.
pub(crate) fn decode(text: &str, what: &str) -> Result<Vec<u8>, Failure> {
    STANDARD.decode(text).map_err(|_| Failure::malformed(format!("{what} is not in base64")))
}

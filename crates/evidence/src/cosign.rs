//! cosign's first form of a signature: a payload that names the image, in a
//! layer of a manifest at the tag `sha256-<hex>.sig`, with the signature as an
//! annotation of that layer.
//!
//! Source: github.com/sigstore/cosign, `specs/SIGNATURE_SPEC.md`.

use kiln_model::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::failure::Failure;
use crate::keys::{PrivateKey, PublicKey};
use crate::signature;

/// Media type of a payload.
pub const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// `artifactType` of the manifest that holds payloads.
pub const SIGNATURES: &str = "application/vnd.dev.cosign.artifact.sig.v1+json";
/// Annotation of a payload's layer: its signature in base64.
pub const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// Annotation of a payload's layer: the id of the key that signed it. Only a
/// hint.
pub const KEY: &str = "vnd.kiln.key";

const TYPE: &str = "cosign container image signature";

/// The tag at which an image's signatures are.
pub fn tag(image: &Digest) -> String {
    format!("sha256-{}.sig", image.hex())
}

/// What is signed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Payload {
    critical: Critical,
    #[serde(default)]
    optional: Value,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Critical {
    identity: Identity,
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Identity {
    docker_reference: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    docker_manifest_digest: String,
}

impl Payload {
    /// The payload for `image`, which its owner calls `reference`.
    pub fn new(reference: &str, image: &Digest) -> Self {
        Self {
            critical: Critical {
                identity: Identity { docker_reference: reference.to_owned() },
                image: Image { docker_manifest_digest: image.to_string() },
                kind: TYPE.to_owned(),
            },
            optional: Value::Null,
        }
    }

    /// The payload's bytes.
    ///
    /// # Errors
    /// [`Failure::Malformed`] never, unless kiln itself is broken.
    pub fn to_json(&self) -> Result<Vec<u8>, Failure> {
        serde_json::to_vec(self).map_err(|error| Failure::malformed(error.to_string()))
    }

    /// Reads a payload. Its signature has to be checked over the bytes.
    ///
    /// # Errors
    /// [`Failure::Malformed`].
    pub fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        let payload: Self =
            serde_json::from_slice(bytes).map_err(|error| Failure::malformed(format!("it is no payload of cosign's ({error})")))?;
        // Newer versions of cosign name the type of their statements here.
        if payload.critical.kind == TYPE || payload.critical.kind == crate::statement::SIGNATURE {
            Ok(payload)
        } else {
            Err(Failure::malformed(format!("it is a payload of the type `{}`", payload.critical.kind)))
        }
    }

    /// What its owner calls the image.
    pub fn reference(&self) -> &str {
        &self.critical.identity.docker_reference
    }

    /// Whether it is about `image`.
    ///
    /// # Errors
    /// [`Failure::Digest`].
    pub fn about(&self, image: &Digest) -> Result<(), Failure> {
        let says = &self.critical.image.docker_manifest_digest;
        if *says == image.to_string() { Ok(()) } else { Err(Failure::Digest { says: says.clone(), wanted: *image }) }
    }
}

/// The signature over a payload's bytes, as the annotation holds it.
pub fn sign(payload: &[u8], key: &PrivateKey) -> String {
    signature::encode(&key.sign(payload))
}

/// Which of `keys` has signed a payload's bytes. `annotation` is the signature,
/// `hint` what is said of the key.
///
/// # Errors
/// Why the signature does not count.
pub fn verify(payload: &[u8], annotation: &str, hint: Option<&str>, keys: &[PublicKey]) -> Result<Digest, Failure> {
    let made = signature::decode(annotation, "the signature")?;
    signature::signer(keys, hint, |key| key.accepts(payload, &made))
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    use super::*;
    use crate::keys::tests::{key, openssl};

    #[test]
    fn the_payload_is_as_the_specification_has_it() {
        let image = Digest::of("image");
        let payload = Payload::new("registry.example/shop/web:1.4.0", &image);
        let expected = format!(
            "{{\"critical\":{{\"identity\":{{\"docker-reference\":\"registry.example/shop/web:1.4.0\"}},\
             \"image\":{{\"docker-manifest-digest\":\"{image}\"}},\"type\":\"cosign container image signature\"}},\"optional\":null}}"
        );
        assert_eq!(String::from_utf8(payload.to_json().unwrap()).unwrap(), expected);
        let read = Payload::parse(expected.as_bytes()).unwrap();
        assert_eq!(read, payload);
        assert_eq!((read.reference(), read.about(&image)), ("registry.example/shop/web:1.4.0", Ok(())));
        let other = Digest::of("other");
        assert_eq!(read.about(&other), Err(Failure::Digest { says: image.to_string(), wanted: other }));
        assert_eq!(tag(&image), format!("sha256-{}.sig", image.hex()));
        // cosign's own `optional` may hold anything.
        let text = expected.replace("null", r#"{"creator":"x","timestamp":1}"#);
        assert!(Payload::parse(text.as_bytes()).is_ok());
        let text = expected.replace("cosign container image", "another");
        assert!(matches!(Payload::parse(text.as_bytes()), Err(Failure::Malformed(_))));
    }

    #[test]
    fn openssl_accepts_the_signature_over_the_payload() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let payload = Payload::new("web:1", &Digest::of("image")).to_json().unwrap();
        std::fs::write(at("payload"), &payload).unwrap();
        std::fs::write(at("signature"), STANDARD.decode(sign(&payload, &key(5))).unwrap()).unwrap();
        std::fs::write(at("pub"), key(5).public().to_pem().unwrap()).unwrap();
        let said = openssl(&["dgst", "-sha256", "-verify", &at("pub"), "-signature", &at("signature"), &at("payload")]);
        assert_eq!(String::from_utf8_lossy(&said).trim(), "Verified OK");
    }

    #[test]
    fn what_failed_is_said() {
        let payload = Payload::new("web:1", &Digest::of("image")).to_json().unwrap();
        let made = sign(&payload, &key(5));
        let id = key(5).id().to_string();
        let (mine, other) = ([key(5).public().clone()], [key(6).public().clone()]);
        assert_eq!(verify(&payload, &made, Some(&id), &mine), Ok(key(5).id()));
        assert_eq!(verify(&payload, &made, None, &mine), Ok(key(5).id()));
        assert_eq!(verify(&payload, &made, Some(&id), &other), Err(Failure::Key { says: id.clone() }));
        assert_eq!(verify(&payload, &made, None, &other), Err(Failure::Signature));
        assert_eq!(verify(b"{}", &made, Some(&id), &mine), Err(Failure::Payload));
        assert!(matches!(verify(&payload, "?", Some(&id), &mine), Err(Failure::Malformed(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any byte of payload, signature or public key.
        #[test]
        fn every_changed_byte_is_refused(what in 0..3, at in any::<prop::sample::Index>(), by in 1..=255_u8) {
            let key = key(5);
            let mut payload = Payload::new("web:1", &Digest::of("image")).to_json().unwrap();
            let mut made = sign(&payload, &key).into_bytes();
            let mut pem = key.public().to_pem().unwrap().into_bytes();
            let bytes = match what { 0 => &mut payload, 1 => &mut made, _ => &mut pem };
            let at = at.index(bytes.len());
            bytes[at] ^= by;
            let keys: Vec<PublicKey> = String::from_utf8(pem).ok().and_then(|pem| PublicKey::from_pem(&pem).ok()).into_iter().collect();
            let accepted = String::from_utf8(made).ok().is_some_and(|made| verify(&payload, &made, None, &keys).is_ok());
            // A line end that became a blank is the same key.
            prop_assert!(!accepted || what == 2 && keys.iter().all(|same| same == key.public()));
        }
    }
}

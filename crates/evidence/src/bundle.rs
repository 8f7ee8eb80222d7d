//! Sigstore bundles, version 0.3: one file with a signature and what is needed
//! to check it. cosign 3 attaches them by `subject`.
//!
//! Sources: github.com/sigstore/protobuf-specs, `sigstore_bundle.proto`, in its
//! JSON form; github.com/sigstore/cosign, `specs/BUNDLE_SPEC.md`.
//!
//! kiln writes bundles of DSSE envelopes that are signed with a key. It reads
//! those, and message signatures as well; certificates and transparency logs
//! it does not check.

use kiln_model::Digest;
use serde::{Deserialize, Serialize};

use crate::dsse::Envelope;
use crate::failure::Failure;
use crate::keys::{PrivateKey, PublicKey};
use crate::signature;

/// Media type of a bundle, and `artifactType` of the manifest that holds one.
pub const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
/// Annotation of that manifest: what is in the bundle.
pub const CONTENT: &str = "dev.sigstore.bundle.content";
/// Annotation of that manifest: predicate type of the statement in the bundle.
pub const PREDICATE_TYPE: &str = "dev.sigstore.bundle.predicateType";

/// A bundle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bundle {
    media_type: String,
    verification_material: Material,
    #[serde(flatten)]
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Material {
    #[serde(skip_serializing_if = "Option::is_none")]
    public_key: Option<Hint>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
struct Hint {
    hint: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Content {
    DsseEnvelope(Envelope),
    MessageSignature(MessageSignature),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MessageSignature {
    #[serde(default)]
    message_digest: Option<MessageDigest>,
    signature: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MessageDigest {
    algorithm: String,
    digest: String,
}

/// What a bundle was found to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// A payload of some type.
    Payload {
        /// Its type.
        kind: String,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// A signature over the bytes of the subject's manifest.
    Subject,
}

impl Bundle {
    /// Signs a payload and puts it into a bundle.
    pub fn sign(payload_type: &str, payload: &[u8], key: &PrivateKey) -> Self {
        Self {
            media_type: BUNDLE.to_owned(),
            verification_material: Material { public_key: Some(Hint { hint: signature::key_hint(key.public()) }) },
            content: Content::DsseEnvelope(Envelope::sign(payload_type, payload, key)),
        }
    }

    /// The bundle in JSON.
    ///
    /// # Errors
    /// [`Failure::Malformed`] never, unless kiln itself is broken.
    pub fn to_json(&self) -> Result<Vec<u8>, Failure> {
        serde_json::to_vec(self).map_err(|error| Failure::malformed(error.to_string()))
    }

    /// Reads a bundle. Nothing is checked yet.
    ///
    /// # Errors
    /// [`Failure::Malformed`].
    pub fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        let bundle: Self =
            serde_json::from_slice(bytes).map_err(|error| Failure::malformed(format!("it is no sigstore bundle ({error})")))?;
        match bundle.media_type.as_str() {
            BUNDLE | "application/vnd.dev.sigstore.bundle+json;version=0.3" => Ok(bundle),
            other => Err(Failure::malformed(format!("it is a bundle of the type `{other}`, and version 0.3 is read"))),
        }
    }

    /// What is in it, whoever signed it.
    ///
    /// # Errors
    /// [`Failure::Malformed`].
    pub fn held(&self) -> Result<Held, Failure> {
        Ok(match &self.content {
            Content::DsseEnvelope(envelope) => Held::Payload { kind: envelope.payload_type().to_owned(), bytes: envelope.payload()? },
            Content::MessageSignature(_) => Held::Subject,
        })
    }

    /// Which of `keys` have signed it. `subject` is the image it is attached to.
    ///
    /// # Errors
    /// Why no signature counts.
    pub fn verify(&self, subject: &Digest, keys: &[PublicKey]) -> Result<Vec<Digest>, Failure> {
        let Some(Hint { hint }) = &self.verification_material.public_key else { return Err(Failure::Certificate) };
        match &self.content {
            Content::DsseEnvelope(envelope) => envelope.verify(keys).map(|(_, signers)| signers),
            Content::MessageSignature(made) => {
                if let Some(said) = &made.message_digest {
                    let bytes = signature::decode(&said.digest, "the digest")?;
                    if said.algorithm != "SHA2_256" || bytes != subject.as_bytes() {
                        let says = format!("{}:{}", said.algorithm, kiln_model::digest::hex(&bytes));
                        return Err(Failure::Digest { says, wanted: *subject });
                    }
                }
                let bytes = signature::decode(&made.signature, "the signature")?;
                signature::signer(keys, Some(hint), |key| key.accepts_digest(subject, &bytes)).map(|id| vec![id])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::keys::tests::key;

    #[test]
    fn a_bundle_is_as_sigstore_has_it() {
        let bundle = Bundle::sign("application/vnd.in-toto+json", b"{}", &key(1));
        let value: Value = serde_json::from_slice(&bundle.to_json().unwrap()).unwrap();
        let envelope = &value["dsseEnvelope"];
        assert_eq!(value["mediaType"], "application/vnd.dev.sigstore.bundle.v0.3+json");
        assert_eq!(value["verificationMaterial"]["publicKey"]["hint"], signature::encode(key(1).id().as_bytes()));
        assert_eq!((&envelope["payload"], &envelope["payloadType"]), (&json!("e30="), &json!("application/vnd.in-toto+json")));
        assert_eq!(envelope["signatures"].as_array().map(Vec::len), Some(1));
        let read = Bundle::parse(&bundle.to_json().unwrap()).unwrap();
        assert_eq!(read, bundle);
        assert_eq!(read.verify(&Digest::of("any"), &[key(1).public().clone()]), Ok(vec![key(1).id()]));
        assert_eq!(read.verify(&Digest::of("any"), &[key(2).public().clone()]), Err(Failure::Key { says: key(1).id().to_string() }));
    }

    #[test]
    fn a_signature_over_the_manifest_itself() {
        let manifest = br#"{"schemaVersion":2}"#;
        let image = Digest::of(manifest);
        let keys = [key(1).public().clone()];
        let text = |digest: &Digest| {
            json!({
                "mediaType": "application/vnd.dev.sigstore.bundle+json;version=0.3",
                "verificationMaterial": { "publicKey": { "hint": "" }, "tlogEntries": [] },
                "messageSignature": {
                    "messageDigest": { "algorithm": "SHA2_256", "digest": signature::encode(digest.as_bytes()) },
                    "signature": signature::encode(&key(1).sign(manifest)),
                },
            })
            .to_string()
        };
        let bundle = Bundle::parse(text(&image).as_bytes()).unwrap();
        assert_eq!((bundle.held(), bundle.verify(&image, &keys)), (Ok(Held::Subject), Ok(vec![key(1).id()])));
        let other = Digest::of("other");
        assert!(matches!(bundle.verify(&other, &keys), Err(Failure::Digest { .. })));
        // A digest that was changed with it does not help.
        let moved = Bundle::parse(text(&other).as_bytes()).unwrap();
        assert_eq!(moved.verify(&other, &keys), Err(Failure::Signature));
    }

    #[test]
    fn what_is_not_checked_is_not_accepted() {
        let bundle = Bundle::sign("text/plain", b"x", &key(1));
        let mut value: Value = serde_json::from_slice(&bundle.to_json().unwrap()).unwrap();
        value["verificationMaterial"] = json!({ "certificate": { "rawBytes": "AAAA" } });
        let bundle = Bundle::parse(value.to_string().as_bytes()).unwrap();
        assert_eq!(bundle.verify(&Digest::of("x"), &[key(1).public().clone()]), Err(Failure::Certificate));
        value["mediaType"] = json!("application/vnd.dev.sigstore.bundle+json;version=0.1");
        assert!(matches!(Bundle::parse(value.to_string().as_bytes()), Err(Failure::Malformed(_))));
        assert!(matches!(Bundle::parse(b"{}"), Err(Failure::Malformed(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever byte is changed: what is then accepted is what was signed.
        #[test]
        fn every_changed_byte_is_refused(at in any::<prop::sample::Index>(), by in 1..=255_u8) {
            let image = Digest::of("image");
            let bundle = Bundle::sign("text/plain", b"what was signed", &key(1));
            let mut bytes = bundle.to_json().unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= by;
            if let Ok(read) = Bundle::parse(&bytes)
                && read.verify(&image, &[key(1).public().clone()]).is_ok()
            {
                prop_assert_eq!(read.held(), bundle.held());
            }
        }
    }
}

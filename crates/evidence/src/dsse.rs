//! DSSE envelopes: a payload, its type, and signatures over both.
//!
//! Source: github.com/secure-systems-lab/dsse, `protocol.md` and `envelope.md`,
//! version 1.

use kiln_model::Digest;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::keys::{PrivateKey, PublicKey};
use crate::signature;

/// A signed payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Envelope {
    /// The payload in base64.
    payload: String,
    /// What it is.
    payload_type: String,
    /// The signatures.
    signatures: Vec<Signature>,
}

/// A signature in an envelope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// What it says of its key; not signed itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    keyid: String,
    /// The signature (ASN.1 DER) in base64.
    sig: String,
}

/// What is signed: type and payload, so that neither can be taken for another.
pub fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

impl Envelope {
    /// Signs a payload.
    pub fn sign(payload_type: &str, payload: &[u8], key: &PrivateKey) -> Self {
        let signature = key.sign(&pre_authentication_encoding(payload_type, payload));
        Self {
            payload: signature::encode(payload),
            payload_type: payload_type.to_owned(),
            signatures: vec![Signature { keyid: key.id().to_string(), sig: signature::encode(&signature) }],
        }
    }

    /// Reads an envelope in JSON. Nothing is checked yet.
    ///
    /// # Errors
    /// [`Failure::Malformed`].
    pub fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        serde_json::from_slice(bytes).map_err(|error| Failure::malformed(format!("it is no DSSE envelope ({error})")))
    }

    /// The envelope in JSON.
    ///
    /// # Errors
    /// [`Failure::Malformed`] never, unless kiln itself is broken.
    pub fn to_json(&self) -> Result<Vec<u8>, Failure> {
        serde_json::to_vec(self).map_err(|error| Failure::malformed(error.to_string()))
    }

    /// What the payload is said to be.
    pub fn payload_type(&self) -> &str {
        &self.payload_type
    }

    /// The payload, whoever signed it.
    ///
    /// # Errors
    /// [`Failure::Malformed`].
    pub fn payload(&self) -> Result<Vec<u8>, Failure> {
        signature::decode(&self.payload, "the payload")
    }

    /// The payload, when at least one of `keys` has signed it, and the ids of
    /// those that have.
    ///
    /// # Errors
    /// Why none of the signatures counts.
    pub fn verify(&self, keys: &[PublicKey]) -> Result<(Vec<u8>, Vec<Digest>), Failure> {
        let payload = self.payload()?;
        let message = pre_authentication_encoding(&self.payload_type, &payload);
        let mut signers = Vec::new();
        let mut failure = None;
        for made in &self.signatures {
            let found = signature::decode(&made.sig, "a signature")
                .and_then(|bytes| signature::signer(keys, Some(&made.keyid), |key| key.accepts(&message, &bytes)));
            match found {
                Ok(id) if !signers.contains(&id) => signers.push(id),
                Ok(_) => {}
                Err(why) => failure = failure.or(Some(why)),
            }
        }
        match failure {
            _ if !signers.is_empty() => Ok((payload, signers)),
            Some(why) => Err(why),
            None => Err(Failure::malformed("the envelope has no signature")),
        }
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use p256::ecdsa::{self, SigningKey};
    use pkcs8::EncodePrivateKey as _;
    use proptest::prelude::*;

    use super::*;
    use crate::keys::tests::key;

    const TYPE: &str = "http://example.com/HelloWorld";

    /// The private key of the specification's test vector:
    /// 97358161215184420915383655311931858321456579547487070936769975997791359926199.
    const VECTOR_KEY: [u8; 32] = [
        0xd7, 0x3e, 0xc4, 0x37, 0xfd, 0x63, 0x46, 0xe3, 0x61, 0x9c, 0x5e, 0xbf, 0xdf, 0xff, 0x0f, 0x69, 0x16, 0x80, 0x49, 0x55, 0xad, 0x32,
        0xac, 0x9a, 0xc4, 0x92, 0xb0, 0xed, 0xe1, 0xf6, 0xff, 0xb7,
    ];

    #[test]
    fn the_vector_of_the_specification() {
        assert_eq!(pre_authentication_encoding(TYPE, b"hello world"), b"DSSEv1 29 http://example.com/HelloWorld 11 hello world");
        let pem = SigningKey::from_slice(&VECTOR_KEY).unwrap().to_pkcs8_pem(pkcs8::LineEnding::LF).unwrap();
        let key = PrivateKey::from_pem(&pem, || panic!("it is not encrypted")).unwrap();
        let envelope = Envelope::sign(TYPE, b"hello world", &key);
        assert_eq!(envelope.payload, "aGVsbG8gd29ybGQ=");
        // The vector has r and s one after the other; DSSE leaves the form open,
        // and the rest of the world writes DER.
        let der = STANDARD.decode(&envelope.signatures[0].sig).unwrap();
        let raw = ecdsa::Signature::from_der(&der).unwrap().to_bytes();
        let vector = "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA==";
        assert_eq!(STANDARD.encode(raw), vector);
        // And an envelope as the specification writes it is read.
        let text =
            format!(r#"{{"payload":"aGVsbG8gd29ybGQ=","payloadType":"{TYPE}","signatures":[{{"sig":"{}"}}]}}"#, STANDARD.encode(&der));
        let read = Envelope::parse(text.as_bytes()).unwrap();
        assert_eq!(read.verify(&[key.public().clone()]), Ok((b"hello world".to_vec(), vec![key.id()])));
    }

    #[test]
    fn what_failed_is_said() {
        let envelope = Envelope::sign(TYPE, b"x", &key(1));
        let (one, two) = (key(1).public().clone(), key(2).public().clone());
        assert_eq!(envelope.verify(&[two.clone(), one.clone()]).unwrap().1, [key(1).id()]);
        assert_eq!(envelope.verify(std::slice::from_ref(&two)), Err(Failure::Key { says: key(1).id().to_string() }));
        assert_eq!(envelope.verify(&[]), Err(Failure::Key { says: key(1).id().to_string() }));
        let other = Envelope { payload: STANDARD.encode("y"), ..envelope.clone() };
        assert_eq!(other.verify(std::slice::from_ref(&one)), Err(Failure::Payload));
        let other = Envelope { payload_type: "text/plain".into(), ..envelope.clone() };
        assert_eq!(other.verify(std::slice::from_ref(&one)), Err(Failure::Payload));
        let mut unnamed = envelope.clone();
        unnamed.signatures[0].keyid.clear();
        assert!(unnamed.verify(std::slice::from_ref(&one)).is_ok());
        assert_eq!(unnamed.verify(&[two]), Err(Failure::Signature));
        let none = Envelope { signatures: Vec::new(), ..envelope };
        assert!(matches!(none.verify(&[one]), Err(Failure::Malformed(_))));
        assert!(matches!(Envelope::parse(b"{}"), Err(Failure::Malformed(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever byte of an envelope is changed: what is then accepted is what
        /// was signed, or nothing.
        #[test]
        fn every_changed_byte_is_refused(payload in prop::collection::vec(any::<u8>(), 1..64), at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let key = key(3);
            let keys = [key.public().clone()];
            let mut bytes = Envelope::sign(TYPE, &payload, &key).to_json().unwrap();
            let at = at.index(bytes.len());
            prop_assume!(bytes[at] != to);
            bytes[at] = to;
            if let Ok(envelope) = Envelope::parse(&bytes)
                && let Ok((accepted, _)) = envelope.verify(&keys)
            {
                // The hint of the key is not signed, and the only thing that may differ.
                prop_assert_eq!(accepted, payload);
                prop_assert_eq!(envelope.payload_type(), TYPE);
            }
        }
    }
}

//! What is attached to an image, and in which form.

use std::collections::BTreeMap;

use kiln_model::{Code, Digest, Error, Result};

use crate::bundle::{self, Bundle};
use crate::cosign::{self, Payload};
use crate::failure::Failure;
use crate::keys::PrivateKey;
use crate::statement::{IN_TOTO, SIGNATURE, Statement};

/// Annotation of an unsigned statement's manifest: its predicate type. Signed
/// ones have [`bundle::PREDICATE_TYPE`].
pub const UNSIGNED_PREDICATE_TYPE: &str = "in-toto.io/predicate-type";

/// A manifest to be attached to an image, with an empty config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Its `artifactType`.
    pub artifact_type: String,
    /// Its layers.
    pub layers: Vec<Layer>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// The tag at which it is looked for as well.
    pub tag: Option<String>,
}

/// A layer of an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// What its bytes are.
    pub media_type: String,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Something that was found attached to an image, its bytes checked against
/// their digests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Digest of its manifest.
    pub digest: Digest,
    /// What it is.
    pub attachment: Attachment,
}

fn broken(failure: Failure) -> Error {
    Error::new(Code::Failed, "evidence cannot be written down").because(failure)
}

fn map<const N: usize>(entries: [(&str, &str); N]) -> BTreeMap<String, String> {
    entries.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// A signature in cosign's first form. A tag has one manifest, and each
/// signature is a layer of it: whoever attaches this keeps the layers that are
/// there. The same key's signature of the same has the same bytes.
///
/// # Errors
/// Never, unless kiln itself is broken.
pub fn signature_at_tag(reference: &str, image: &Digest, key: &PrivateKey) -> Result<Attachment> {
    let payload = Payload::new(reference, image).to_json().map_err(broken)?;
    let made = cosign::sign(&payload, key);
    let id = key.id().to_string();
    let annotations = map([(cosign::SIGNATURE, &made), (cosign::KEY, &id)]);
    Ok(Attachment {
        artifact_type: cosign::SIGNATURES.into(),
        layers: vec![Layer { media_type: cosign::PAYLOAD.into(), bytes: payload, annotations }],
        annotations: BTreeMap::new(),
        tag: Some(cosign::tag(image)),
    })
}

/// A signature as a sigstore bundle, cosign 3's form.
///
/// # Errors
/// Never, unless kiln itself is broken.
pub fn signature_bundle(reference: &str, image: &Digest, key: &PrivateKey) -> Result<Attachment> {
    statement(&Statement::new(image, Some(reference.to_owned()), SIGNATURE, serde_json::json!({})), Some(key))
}

/// A statement: in a signed bundle when there is a key, bare otherwise.
///
/// # Errors
/// Never, unless kiln itself is broken.
pub fn statement(statement: &Statement, key: Option<&PrivateKey>) -> Result<Attachment> {
    let bytes = statement.to_json().map_err(broken)?;
    let kind = statement.predicate_type.as_str();
    let (artifact_type, bytes, annotations) = match key {
        Some(key) => {
            let bundle = Bundle::sign(IN_TOTO, &bytes, key).to_json().map_err(broken)?;
            (bundle::BUNDLE, bundle, map([(bundle::CONTENT, "dsse-envelope"), (bundle::PREDICATE_TYPE, kind)]))
        }
        None => (IN_TOTO, bytes, map([(UNSIGNED_PREDICATE_TYPE, kind)])),
    };
    let layer = Layer { media_type: artifact_type.into(), bytes, annotations: BTreeMap::new() };
    Ok(Attachment { artifact_type: artifact_type.into(), layers: vec![layer], annotations, tag: None })
}

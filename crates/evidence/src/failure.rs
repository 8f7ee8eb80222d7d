//! Why a piece of evidence does not count.

use std::fmt;

use kiln_model::Digest;

/// What is wrong with a piece of evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It is kept, or was made, for another tag.
    Tag {
        /// The tag it says.
        says: String,
        /// The tag it is wanted for.
        wanted: String,
    },
    /// It is about another image.
    Digest {
        /// The digest it says, in its own words.
        says: String,
        /// The image it is attached to.
        wanted: Digest,
    },
    /// It was signed by a key that is none of the given ones.
    Key {
        /// What it says of its key.
        says: String,
    },
    /// A given key is said to have signed it, but not these bytes: payload or
    /// signature were changed.
    Payload,
    /// No given key has signed these bytes, and nothing says which key should
    /// have: it was signed by another key, or payload or signature were changed.
    Signature,
    /// It is signed with a certificate, which kiln does not check.
    Certificate,
    /// It is not what it says it is.
    Malformed(String),
}

impl Failure {
    /// What failed, in one word for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tag { .. } => "tag",
            Self::Digest { .. } => "digest",
            Self::Key { .. } => "key",
            Self::Payload => "payload",
            Self::Signature => "signature",
            Self::Certificate => "certificate",
            Self::Malformed(_) => "malformed",
        }
    }

    pub(crate) fn malformed(why: impl Into<String>) -> Self {
        Self::Malformed(why.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag { says, wanted } => write!(f, "it is for the tag {says}, not {wanted}"),
            Self::Digest { says, wanted } => write!(f, "it is about another image, {says}, not {wanted}"),
            Self::Key { says } => write!(f, "it was signed by another key, {says}"),
            Self::Payload => f.write_str("what was signed, or the signature, was changed"),
            Self::Signature => f.write_str("none of the given keys has signed it: another has, or it was changed"),
            Self::Certificate => f.write_str("it is signed with a certificate, which kiln does not check"),
            Self::Malformed(why) => write!(f, "it cannot be read: {why}"),
        }
    }
}

impl std::error::Error for Failure {}

//! Keys: what everything cached is named by.
//!
//! A key is the SHA-256 over a sequence of named, length-prefixed fields, so
//! that no two different sequences give the same bytes. Times, host names,
//! absolute paths and memory size never enter a step's key.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::Digest;
use crate::account::Input;
use crate::digest::NotADigest;

/// Version of the way keys are made. A change makes every cached thing miss.
pub const FORMAT: &str = "kiln-key-v1";

/// The key of a step, a memory image, or a seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Key(Digest);

impl Key {
    /// The 64 hex digits, for file names.
    pub fn hex(&self) -> String {
        self.0.hex()
    }

    /// The first 12 hex digits, for people.
    pub fn short(&self) -> String {
        self.0.short()
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for Key {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        text.parse().map(Self)
    }
}

/// What one thing in a key was when the key was made: not its value, which may
/// be large, but enough to tell whether it has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is, for people: `script`, `env GREETING`, `site/index.html`.
    pub name: String,
    /// The first 16 hex digits of the SHA-256 of what it was.
    pub digest: String,
}

/// Builds a [`Key`] field by field, and remembers its parts and the files that
/// went into it.
pub struct KeyHasher {
    hash: Sha256,
    parts: Vec<Part>,
    inputs: Vec<Input>,
}

impl KeyHasher {
    /// A hasher for one kind of key (`"step"`, `"seal"`, `"memory"`).
    pub fn new(kind: &str) -> Self {
        let mut hasher = Self { hash: Sha256::new(), parts: Vec::new(), inputs: Vec::new() };
        hasher.hidden("format", FORMAT).hidden("kind", kind);
        hasher
    }

    /// Adds one field, which is a part of its own.
    pub fn field(&mut self, name: &str, value: impl AsRef<[u8]>) -> &mut Self {
        self.part(name, value.as_ref());
        self.hidden(name, value)
    }

    /// Adds one field that [`KeyHasher::part`] tells of, or that is nobody's
    /// business.
    pub fn hidden(&mut self, name: &str, value: impl AsRef<[u8]>) -> &mut Self {
        let value = value.as_ref();
        for part in [name.as_bytes(), value] {
            self.hash.update((part.len() as u64).to_be_bytes());
            self.hash.update(part);
        }
        self
    }

    /// Remembers a part under a name for people; the key is not changed by it.
    pub fn part(&mut self, name: impl Into<String>, value: impl AsRef<[u8]>) -> &mut Self {
        let digest = Digest::of(value).hex()[..16].to_owned();
        self.parts.push(Part { name: name.into(), digest });
        self
    }

    /// Remembers a file under a name for people; the key is not changed by it.
    pub fn input(&mut self, name: impl Into<String>, digest: Digest) -> &mut Self {
        self.inputs.push(Input { name: name.into(), digest });
        self
    }

    /// The files that were remembered, in order.
    pub fn take_inputs(&mut self) -> Vec<Input> {
        std::mem::take(&mut self.inputs)
    }

    /// Adds named values whose order means nothing; each is a part.
    pub fn map<'a>(&mut self, name: &str, values: impl IntoIterator<Item = (&'a str, &'a str)>) -> &mut Self {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_unstable();
        self.hidden(name, values.len().to_string());
        for (key, value) in values {
            self.part(format!("{name} {key}"), value);
            self.hidden(key, value);
        }
        self
    }

    /// The key, and what it is made of.
    pub fn finish_with_parts(self) -> (Key, Vec<Part>) {
        (Key(Digest::finish(self.hash)), self.parts)
    }

    /// The key.
    pub fn finish(self) -> Key {
        Key(Digest::finish(self.hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(fields: &[(&str, &str)]) -> Key {
        let mut hasher = KeyHasher::new("step");
        for (name, value) in fields {
            hasher.field(name, value);
        }
        hasher.finish()
    }

    #[test]
    fn fields_do_not_run_into_each_other() {
        assert_ne!(key(&[("a", "bc")]), key(&[("ab", "c")]));
        assert_ne!(key(&[("a", ""), ("b", "")]), key(&[("a", "b")]));
    }

    #[test]
    fn the_order_of_a_map_means_nothing() {
        let mut one = KeyHasher::new("step");
        one.map("env", [("A", "1"), ("B", "2")]);
        let mut two = KeyHasher::new("step");
        two.map("env", [("B", "2"), ("A", "1")]);
        assert_eq!(one.finish(), two.finish());
    }
}

//! Values that must never be shown.

use std::fmt;
use std::sync::{Arc, RwLock};

/// A sensitive value. Its `Debug` and `Display` show stars; only
/// [`Secret::expose`] gives the value.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<Arc<str>>) -> Self {
        Self(value.into())
    }

    /// The value itself, for the one place that hands it to the guest.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Replaces every known secret in text that is about to be shown or stored.
///
/// Each line of a multi-line secret is replaced as well, since output reaches
/// people line by line. Values (and lines) under four characters are left
/// alone: replacing them would make every log unreadable and hide nothing.
#[derive(Clone, Default)]
pub struct Redactor(Arc<RwLock<Vec<String>>>);

impl Redactor {
    /// Adds a secret.
    pub fn add(&self, secret: &Secret) {
        let mut needles = self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let whole = secret.expose().trim();
        for needle in std::iter::once(whole).chain(whole.lines().map(str::trim)) {
            if needle.chars().count() >= 4 && !needles.iter().any(|n| n == needle) {
                needles.push(needle.to_owned());
            }
        }
        needles.sort_by_key(|needle| std::cmp::Reverse(needle.len()));
    }

    /// `text` with stars in place of every secret.
    pub fn clean(&self, text: &str) -> String {
        let needles = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        needles.iter().fold(
            text.to_owned(),
            |text, needle| {
                if text.contains(needle.as_str()) { text.replace(needle.as_str(), "***") } else { text }
            },
        )
    }
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Redactor")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_and_their_lines_are_hidden() {
        let redactor = Redactor::default();
        redactor.add(&Secret::new("-----BEGIN\nabcdef\nab\n"));
        assert_eq!(redactor.clean("x abcdef ab"), "x *** ab");
        assert_eq!(format!("{:?}", Secret::new("hunter22")), "***");
    }
}

//! References, as everywhere else: `host/namespace/name:tag@sha256:…`; short
//! names mean the store; `name@channel` names a channel.

use std::fmt;
use std::str::FromStr;

use crate::Digest;
use crate::error::{Code, Error, Result};

/// What a reference points with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pointer {
    /// A tag (a version); none means the newest.
    Tag(Option<String>),
    /// A digest.
    Digest(Digest),
    /// A channel.
    Channel(String),
}

/// A reference to an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `host` or `host:port` of a registry; none for the store.
    pub registry: Option<String>,
    /// `namespace/name`.
    pub name: String,
    /// Tag, digest or channel.
    pub pointer: Pointer,
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            Error::new(Code::Usage, format!("`{text}` is not a reference: {why}"))
                .next("write NAME, NAME:TAG, NAME@CHANNEL, NAME@sha256:… or HOST/NAMESPACE/NAME:TAG")
        };
        let (rest, at) = match text.split_once('@') {
            Some((rest, at)) => (rest, Some(at)),
            None => (text, None),
        };
        let (registry, path) = match rest.split_once('/') {
            Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => {
                let plain = host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[');
                if !plain || !host.chars().all(|c| c.is_ascii_alphanumeric() || ".-:[]".contains(c)) {
                    return Err(wrong("what stands before the first `/` is no host"));
                }
                (Some(host.to_owned()), path)
            }
            _ => (None, rest),
        };
        let (name, tag) = match path.rsplit_once(':') {
            Some((name, tag)) => (name, Some(tag)),
            None => (path, None),
        };
        check_name(name).map_err(wrong)?;
        if let Some(tag) = tag {
            check_tag(tag).map_err(wrong)?;
        }
        let pointer = match at {
            None => Pointer::Tag(tag.map(Into::into)),
            // `name:tag@digest`: the digest decides, as everywhere else.
            Some(digest) if digest.contains(':') => Pointer::Digest(digest.parse().map_err(|_| wrong("what follows `@` is no digest"))?),
            Some(_) if tag.is_some() => return Err(wrong("a tag and a channel exclude each other")),
            Some(channel) => {
                check_channel(channel).map_err(wrong)?;
                Pointer::Channel(channel.to_owned())
            }
        };
        Ok(Self { registry, name: name.to_owned(), pointer })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(registry) = &self.registry {
            write!(f, "{registry}/")?;
        }
        f.write_str(&self.name)?;
        match &self.pointer {
            Pointer::Tag(None) => Ok(()),
            Pointer::Tag(Some(tag)) => write!(f, ":{tag}"),
            Pointer::Digest(digest) => write!(f, "@{digest}"),
            Pointer::Channel(channel) => write!(f, "@{channel}"),
        }
    }
}

/// Checks an image name: lower-case parts between slashes, as OCI
/// distribution has it.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    let part_is_good = |part: &str| {
        let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = part.as_bytes();
        let ends = bytes.first().is_some_and(|b| alphanumeric(*b)) && bytes.last().is_some_and(|b| alphanumeric(*b));
        ends && bytes.iter().all(|b| alphanumeric(*b) || b"._-".contains(b))
    };
    if name.is_empty() {
        Err("the name is missing")
    } else if name.len() > 255 || !name.split('/').all(part_is_good) {
        Err("a name is made of lower-case letters, digits and single `.`, `_`, `-` between them")
    } else {
        Ok(())
    }
}

/// Checks a tag: `[A-Za-z0-9_][A-Za-z0-9._-]{0,127}`, as OCI distribution has it.
///
/// # Errors
/// What is wrong with it.
pub fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = tag.as_bytes();
    if bytes.first().is_some_and(|b| word(*b)) && bytes.len() <= 128 && bytes.iter().all(|b| word(*b) || b".-".contains(b)) {
        Ok(())
    } else {
        Err("a tag is made of at most 128 letters, digits, `_`, `.` and `-`, and begins with neither `.` nor `-`")
    }
}

/// Whether a tag looks like a version, `1.4.0` or `v2`, and so means one thing
/// for ever.
pub fn is_version(tag: &str) -> bool {
    let digit = |text: &str| text.starts_with(|c: char| c.is_ascii_digit());
    digit(tag) || tag.strip_prefix('v').is_some_and(digit)
}

/// Checks a channel's name, which cannot look like a version.
///
/// # Errors
/// What is wrong with it.
pub fn check_channel(channel: &str) -> Result<(), &'static str> {
    let bytes = channel.as_bytes();
    if is_version(channel) {
        Err("a channel's name cannot look like a version")
    } else if bytes.first().is_some_and(u8::is_ascii_lowercase)
        && bytes.len() <= 64
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
    {
        Ok(())
    } else {
        Err("a channel's name is made of lower-case letters, digits and `-`, and begins with a letter")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let digest = Digest::of(b"x");
        for (text, registry, name, pointer) in [
            ("web", None, "web", Pointer::Tag(None)),
            ("shop/web:1.4.0", None, "shop/web", Pointer::Tag(Some("1.4.0".into()))),
            ("web@production", None, "web", Pointer::Channel("production".into())),
            ("localhost:5000/shop/web:1", Some("localhost:5000"), "shop/web", Pointer::Tag(Some("1".into()))),
            (&format!("r.example/web:1@{digest}"), Some("r.example"), "web", Pointer::Digest(digest)),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.registry.as_deref(), reference.name.as_str(), reference.pointer), (registry, name, pointer), "{text}");
        }
    }

    #[test]
    fn what_is_refused() {
        for text in
            ["", "Web", "web:", "web:.x", "web@", "web@1.2", "web@v2", "web:1@production", "web@sha256:12", "../web", "web/", "a//b"]
        {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }
}

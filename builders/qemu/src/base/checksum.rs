//! Checksums of downloads: what a template may say, and the lists of them that
//! publishers put beside their disks.

use std::fmt;

use kiln_model::digest::hex;
use sha2::{Digest as _, Sha256, Sha512};

/// Algorithms that are strong enough to trust a download by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Algorithm {
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    /// Its name before the colon.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Hex digits of its digests.
    const fn digits(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }

    /// The one whose digests have that many hex digits.
    fn by_digits(digits: usize) -> Option<Self> {
        [Self::Sha256, Self::Sha512].into_iter().find(|a| a.digits() == digits)
    }
}

/// A digest of one of the [`Algorithm`]s, as `sha512:<lower-case hex>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checksum {
    /// Which algorithm.
    pub(crate) algorithm: Algorithm,
    /// Its digits, lower case.
    pub(crate) hex: String,
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl Checksum {
    /// Reads `sha256:…` or `sha512:…`; the error says what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (name, digits) = text.split_once(':').ok_or_else(|| "it does not say which algorithm".to_owned())?;
        let algorithm = [Algorithm::Sha256, Algorithm::Sha512]
            .into_iter()
            .find(|a| a.name() == name)
            .ok_or_else(|| format!("`{name}` is not an algorithm that kiln trusts"))?;
        let wanted = algorithm.digits();
        if digits.len() != wanted || !is_hex(digits) {
            return Err(format!("a {name} digest is {wanted} hexadecimal digits"));
        }
        Ok(Self { algorithm, hex: digits.to_ascii_lowercase() })
    }
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Digests bytes as they pass.
#[derive(Debug, Clone)]
pub(crate) enum Hasher {
    /// SHA-256.
    Sha256(Sha256),
    /// SHA-512.
    Sha512(Box<Sha512>),
}

impl Hasher {
    /// One that has seen nothing.
    pub(crate) fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(Sha256::new()),
            Algorithm::Sha512 => Self::Sha512(Box::new(Sha512::new())),
        }
    }

    /// Takes the next bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// The digest of all of them.
    pub(crate) fn finish(self) -> Checksum {
        match self {
            Self::Sha256(hasher) => Checksum { algorithm: Algorithm::Sha256, hex: hex(&hasher.finalize()) },
            Self::Sha512(hasher) => Checksum { algorithm: Algorithm::Sha512, hex: hex(&hasher.finalize()) },
        }
    }
}

/// Finds the checksum of `name` in a list of them, in the form of coreutils
/// (`<hex>  name`, `<hex> *name`), of BSD and `--tag` (`SHA512 (name) = <hex>`),
/// or a single digest alone. The algorithm follows from the length, so that
/// the list's own name need not say it; the stronger one wins. Anything else in
/// the list (a clear-text signature, comments) is passed over. The error says
/// what was not found.
///
/// Source: the manual of `sha512sum` in GNU coreutils 9, "cksum output modes".
pub(crate) fn find(list: &str, name: &str) -> Result<Checksum, String> {
    let mut best: Option<Checksum> = None;
    let mut weak = false;
    let mut names = Vec::new();
    let lines = || list.lines().map(str::trim).filter(|l| !l.is_empty());
    for (digits, listed) in lines().filter_map(entry) {
        // Lists made with `find` say `./name`.
        if listed.rsplit('/').next() != Some(name) {
            names.push(listed);
            continue;
        }
        let Some(algorithm) = Algorithm::by_digits(digits.len()) else {
            weak = true;
            continue;
        };
        let found = Checksum { algorithm, hex: digits.to_ascii_lowercase() };
        match &best {
            Some(known) if known.algorithm == algorithm && *known != found => {
                return Err(format!("it gives two different {} digests for `{name}`", algorithm.name()));
            }
            Some(known) if known.algorithm >= algorithm => {}
            _ => best = Some(found),
        }
    }
    if let Some(best) = best {
        return Ok(best);
    }
    if weak {
        return Err(format!("it has only weak digests (MD5, SHA-1) of `{name}`"));
    }
    let mut all = lines();
    if let (Some(only), None) = (all.next(), all.next())
        && is_hex(only)
        && let Some(algorithm) = Algorithm::by_digits(only.len())
    {
        return Ok(Checksum { algorithm, hex: only.to_ascii_lowercase() });
    }
    match kiln_model::settings::nearest(name, names.iter().copied()) {
        Some(near) => Err(format!("it does not list `{name}` (the nearest is `{near}`)")),
        None => Err(format!("it does not list `{name}`")),
    }
}

/// The digits and the name in one line of a list.
fn entry(line: &str) -> Option<(&str, &str)> {
    // A leading backslash says that the name is escaped; names with line
    // breaks are not looked for, so it is only taken off.
    let line = line.strip_prefix('\\').unwrap_or(line);
    if let Some((digits, rest)) = line.split_once([' ', '\t'])
        && is_hex(digits)
        && digits.len() >= 32
    {
        let rest = rest.trim_start();
        return Some((digits, rest.strip_prefix('*').unwrap_or(rest)));
    }
    let (before, digits) = line.rsplit_once(" = ")?;
    let (_, name) = before.split_once(" (")?;
    let name = name.strip_suffix(')')?;
    let digits = digits.trim();
    (is_hex(digits) && digits.len() >= 32).then_some((digits, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(algorithm: Algorithm, text: &str) -> String {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(text.as_bytes());
        hasher.finish().hex
    }

    #[test]
    fn checksums_of_a_template() {
        let hex = of(Algorithm::Sha256, "x");
        assert_eq!(Checksum::parse(&format!("sha256:{}", hex.to_uppercase())).unwrap().hex, hex);
        for (wrong, why) in [
            ("abc", "which algorithm"),
            ("md5:d41d8cd98f00b204e9800998ecf8427e", "not an algorithm"),
            ("sha256:abc", "64"),
            ("sha512:", "128"),
            (&format!("sha256:{}", "g".repeat(64)), "64"),
        ] {
            let error = Checksum::parse(wrong).unwrap_err();
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }

    #[test]
    fn every_form_of_a_list() {
        let (a, b) = (of(Algorithm::Sha256, "a"), of(Algorithm::Sha512, "b"));
        for (list, expected) in [
            (format!("{a}  other.raw\n{b}  disk.qcow2\n"), &b),
            (format!("{b} *disk.qcow2\r\n"), &b),
            (format!("{a}  ./amd64/disk.qcow2"), &a),
            (format!("SHA512 (disk.qcow2) = {b}\n"), &b),
            (format!("SHA256 (disk.qcow2) = {a}\nSHA512 (disk.qcow2) = {b}\n"), &b),
            (format!("{b}  disk.qcow2\n{a}  disk.qcow2\n"), &b),
            (format!("{}\n", a.to_uppercase()), &a),
            (format!("-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n{a}  disk.qcow2\n-----BEGIN PGP SIGNATURE-----\n"), &a),
        ] {
            assert_eq!(find(&list, "disk.qcow2").as_ref().map(|c| &c.hex), Ok(expected), "{list}");
        }
    }

    #[test]
    fn a_list_that_does_not_help_says_why() {
        let (a, b) = (of(Algorithm::Sha256, "a"), of(Algorithm::Sha256, "b"));
        for (list, why) in [
            (format!("{a}  disk2.qcow2"), "nearest is `disk2.qcow2`"),
            (format!("{a}  xdisk.qcow2"), "does not list"),
            (format!("{a}  disk.qcow2\n{b}  disk.qcow2"), "two different"),
            ("d41d8cd98f00b204e9800998ecf8427e  disk.qcow2".into(), "weak"),
            ("<html>not found</html>".into(), "does not list"),
            (String::new(), "does not list"),
        ] {
            let error = find(&list, "disk.qcow2").unwrap_err();
            assert!(error.contains(why), "{list}: {error}");
        }
    }
}

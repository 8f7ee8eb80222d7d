//! `InRelease`: what a suite says of itself, and the digests of its indexes.
//!
//! Source: Debian's wiki, "DebianRepository/Format". The signature around it is
//! not checked here; the digests of what it names are.

use jiff::Timestamp;
use kiln_model::Digest;

/// A suite of an archive at some time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Release {
    /// Who publishes it (`Debian`).
    pub origin: String,
    /// What they call it (`Debian-Security`).
    pub label: String,
    /// `stable`, `oldstable-security`.
    pub suite: String,
    /// `bookworm`.
    pub codename: String,
    /// Its point release (`12.8`); empty where it has none.
    pub version: String,
    /// When it was made.
    pub date: Option<Timestamp>,
    /// Whether files can be fetched under their digests, which do not change
    /// between one request and the next.
    pub by_hash: bool,
    /// Its files.
    pub files: Vec<Part>,
}

/// A file of a suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its path below `dists/SUITE/`.
    pub path: String,
    /// SHA-256 of its bytes.
    pub digest: Digest,
    /// Their number.
    pub size: u64,
}

impl Release {
    /// Reads `InRelease` or `Release`. `None` when it is neither: no file is
    /// named.
    pub fn read(text: &str) -> Option<Self> {
        let mut release = Self::default();
        let mut section = String::new();
        let body = text.split("-----BEGIN PGP SIGNATURE-----").next().unwrap_or_default();
        for line in body.lines() {
            if let Some(entry) = line.strip_prefix([' ', '\t']) {
                if section == "SHA256" {
                    release.files.extend(part(entry));
                }
                continue;
            }
            let Some((name, value)) = line.split_once(':') else { continue };
            name.clone_into(&mut section);
            let value = value.trim();
            match name {
                "Origin" => value.clone_into(&mut release.origin),
                "Label" => value.clone_into(&mut release.label),
                "Suite" => value.clone_into(&mut release.suite),
                "Codename" => value.clone_into(&mut release.codename),
                "Version" => value.clone_into(&mut release.version),
                "Date" => release.date = date(value),
                "Acquire-By-Hash" => release.by_hash = value == "yes",
                _ => {}
            }
        }
        (!release.files.is_empty()).then_some(release)
    }

    /// The indexes of a component and an architecture, in whatever forms there
    /// are. Where Debian's `main` is meant, `updates/main` has been seen as its
    /// name in the list of components, but never in a path.
    pub fn packages(&self, component: &str, arch: &str) -> impl Iterator<Item = &Part> {
        let start = format!("{component}/binary-{arch}/Packages");
        self.files.iter().filter(move |part| part.path.strip_prefix(&start).is_some_and(|rest| matches!(rest, "" | ".xz" | ".gz")))
    }

    /// Whether it is there for security updates.
    pub fn is_security(&self) -> bool {
        let ends = |text: &str| text.to_ascii_lowercase().ends_with("-security");
        ends(&self.label) || ends(&self.suite) || ends(&self.codename)
    }
}

/// `digest size path`.
fn part(entry: &str) -> Option<Part> {
    let mut words = entry.split_whitespace();
    let digest = format!("sha256:{}", words.next()?).parse().ok()?;
    let size = words.next()?.parse().ok()?;
    let path = words.next()?.to_owned();
    // It becomes part of an address.
    let plain = path.split('/').all(|part| !matches!(part, "" | "." | "..")) && !path.contains(['?', '#', '\\', '%']);
    plain.then_some(Part { path, digest, size })
}

/// `Sat, 09 Nov 2024 10:08:39 UTC`.
fn date(text: &str) -> Option<Timestamp> {
    let text = text.strip_suffix("UTC").or_else(|| text.strip_suffix("GMT"))?;
    let parsed = jiff::fmt::strtime::parse("%a, %d %b %Y %H:%M:%S %z", format!("{}+0000", text)).ok()?;
    parsed.to_timestamp().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> String {
        Digest::of(text).hex()
    }

    fn sample() -> String {
        format!(
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nOrigin: Debian\nLabel: Debian\nSuite: oldstable\nVersion: 12.8\n\
             Codename: bookworm\nDate: Sat, 09 Nov 2024 10:08:39 UTC\nAcquire-By-Hash: yes\nMD5Sum:\n 0123 5 main/binary-amd64/Packages.xz\n\
             SHA256:\n {} 10 main/binary-amd64/Packages\n {} 5 main/binary-amd64/Packages.xz\n {} 7 main/binary-arm64/Packages.xz\n \
             {} 7 main/binary-amd64/../../../x\n-----BEGIN PGP SIGNATURE-----\n\nVersion: 99\n-----END PGP SIGNATURE-----\n",
            hex("a"),
            hex("b"),
            hex("c"),
            hex("d")
        )
    }

    #[test]
    fn a_signed_release_is_read() {
        let release = Release::read(&sample()).unwrap();
        assert_eq!((release.origin.as_str(), release.codename.as_str(), release.version.as_str()), ("Debian", "bookworm", "12.8"));
        assert_eq!(release.date, Some("2024-11-09T10:08:39Z".parse().unwrap()));
        assert!(release.by_hash && !release.is_security());
        let found: Vec<_> = release.packages("main", "amd64").map(|part| (part.path.as_str(), part.size)).collect();
        assert_eq!(found, [("main/binary-amd64/Packages", 10), ("main/binary-amd64/Packages.xz", 5)]);
        assert_eq!(release.packages("main", "arm64").next().unwrap().digest, Digest::of("c"));
        assert_eq!(release.packages("contrib", "amd64").count(), 0);
        assert!(release.files.iter().all(|part| !part.path.contains("..")), "a path that leaves the suite is none");
    }

    #[test]
    fn security_is_told_by_any_of_its_names() {
        let named = |label: &str, suite: &str| Release { label: label.into(), suite: suite.into(), ..Release::default() };
        assert!(named("Debian-Security", "stable-security").is_security());
        assert!(named("Ubuntu", "jammy-security").is_security());
        assert!(!named("Debian", "stable-updates").is_security());
    }

    #[test]
    fn other_texts_are_no_release() {
        for text in ["", "<html>not found</html>", "Origin: Debian\nSHA256:\n", "SHA256:\n zz 1 main/x\n"] {
            assert_eq!(Release::read(text), None, "{text}");
        }
    }
}

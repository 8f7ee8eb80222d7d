//! What a distribution's archive holds now, and which packages of an image are
//! behind it.
//!
//! ```text
//!  Files ──► sources.rs   where the image's own apt would look     Source
//!            release.rs   what a suite says of itself (InRelease)  Release
//!            index.rs     the packages it has (Packages)           Index
//!  Inventory + Index ──► outdated()
//! ```
//!
//! Nothing here asks a network: whoever has one brings the texts.

mod index;
mod release;
mod sources;

use std::cmp::Ordering;

use serde::Serialize;

pub use index::Index;
pub use release::{Part, Release};
pub use sources::{Source, Sources};

use crate::packages::{Inventory, Kind};

/// A package of an image that its archive has a newer version of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outdated {
    /// Its name.
    pub name: String,
    /// Its architecture.
    pub arch: String,
    /// The version in the image.
    pub installed: String,
    /// The newest one that there is.
    pub available: String,
    /// Whether a version newer than the installed one came as a security
    /// update.
    pub security: bool,
}

/// A suite's packages, and whether they are security updates.
#[derive(Debug, Clone, Copy)]
pub struct Available<'a> {
    /// The packages.
    pub index: &'a Index,
    /// Whether the suite is there for security updates.
    pub security: bool,
}

/// The packages of dpkg that the archive has newer versions of: security
/// updates first, then by name. What is in no index (a package that somebody
/// built himself) is not behind anything.
pub fn outdated(inventory: &Inventory, available: &[Available<'_>]) -> Vec<Outdated> {
    let mut found = Vec::new();
    for package in inventory.packages.iter().filter(|package| package.kind == Kind::Deb) {
        let (mut newest, mut security) = (None::<&str>, false);
        for part in available {
            for version in part.index.versions(&package.name, &package.arch) {
                if Kind::Deb.compare(version, &package.version) != Ordering::Greater {
                    continue;
                }
                security |= part.security;
                if newest.is_none_or(|newest| Kind::Deb.compare(version, newest) == Ordering::Greater) {
                    newest = Some(version);
                }
            }
        }
        if let Some(newest) = newest {
            found.push(Outdated {
                name: package.name.clone(),
                arch: package.arch.clone(),
                installed: package.version.clone(),
                available: newest.to_owned(),
                security,
            });
        }
    }
    found.sort_by(|a, b| b.security.cmp(&a.security).then_with(|| (&a.name, &a.arch).cmp(&(&b.name, &b.arch))));
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Tree;

    /// What dpkg says is installed.
    fn inventory(packages: &[(&str, &str, &str)]) -> Inventory {
        let stanza = |(name, version, arch): &(&str, &str, &str)| {
            format!("Package: {name}\nStatus: install ok installed\nVersion: {version}\nArchitecture: {arch}\n\n")
        };
        let status: String = packages.iter().map(stanza).collect();
        let tree = Tree::of(&[("/etc/os-release", "ID=debian\nVERSION_ID=12\n"), ("/var/lib/dpkg/status", &status)]);
        crate::packages::read(&tree).unwrap()
    }

    fn index(packages: &[(&str, &str, &str)]) -> Index {
        let text: String =
            packages.iter().map(|(name, version, arch)| format!("Package: {name}\nVersion: {version}\nArchitecture: {arch}\n\n")).collect();
        Index::read(text.as_bytes()).unwrap()
    }

    #[test]
    fn what_is_behind_is_named_with_the_newest_version_and_security_first() {
        let inventory = inventory(&[
            ("zlib1g", "1:1.2.13.dfsg-1", "amd64"),
            ("openssl", "3.0.15-1~deb12u1", "amd64"),
            ("tzdata", "2024a-0+deb12u1", "all"),
            ("own", "1.0", "amd64"),
            ("curl", "7.88.1-10+deb12u8", "amd64"),
            ("newer", "2.0", "amd64"),
            ("bash", "5.2.15-2+b7", "amd64"),
        ]);
        let main = index(&[
            ("zlib1g", "1:1.2.13.dfsg-1", "amd64"),
            ("openssl", "3.0.16-1~deb12u1", "amd64"),
            ("curl", "7.88.1-10+deb12u9", "amd64"),
            ("newer", "2.0~rc1", "amd64"),
            // Another architecture's is nobody's update.
            ("bash", "5.2.15-2+b9", "arm64"),
        ]);
        let updates = index(&[("tzdata", "2024b-0+deb12u1", "all"), ("tzdata", "2024a-0+deb12u1", "all")]);
        let security = index(&[("openssl", "3.0.15-1~deb12u2", "amd64"), ("curl", "7.88.1-10+deb12u7", "amd64")]);
        let found = outdated(
            &inventory,
            &[
                Available { index: &main, security: false },
                Available { index: &updates, security: false },
                Available { index: &security, security: true },
            ],
        );
        let shown: Vec<_> = found.iter().map(|o| (o.name.as_str(), o.available.as_str(), o.security)).collect();
        assert_eq!(
            shown,
            [
                // The newest version is main's, but a security update is among the newer ones.
                ("openssl", "3.0.16-1~deb12u1", true),
                ("curl", "7.88.1-10+deb12u9", false),
                ("tzdata", "2024b-0+deb12u1", false),
            ]
        );
    }
}

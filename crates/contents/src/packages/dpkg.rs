//! dpkg's database: stanzas of fields, as deb-control(5) has them.
//!
//! Images without dpkg (distroless) have one file for each package in
//! `status.d`, without a `Status` field.

use std::collections::HashSet;

use kiln_model::Result;
use kiln_model::machine::Files;

use super::{Kind, Package, said};

const STATUS: &str = "/var/lib/dpkg/status";
const FOLDER: &str = "/var/lib/dpkg/status.d";
const INFO: &str = "/var/lib/dpkg/info";

pub(super) fn read(files: &dyn Files) -> Result<Vec<Package>> {
    let mut packages = Vec::new();
    if super::is_file(files, STATUS)? {
        packages = parse(&files.read(STATUS)?);
    }
    for name in files.list(FOLDER)? {
        let path = format!("{FOLDER}/{name}");
        if !name.ends_with(".md5sums") && super::is_file(files, &path)? {
            packages.extend(parse(&files.read(&path)?));
        }
    }
    Ok(packages)
}

/// Reads the lists of files of packages, where there are any.
pub(super) fn read_files<'a>(files: &dyn Files, packages: impl Iterator<Item = &'a mut Package>) -> Result<()> {
    let lists: HashSet<String> = files.list(INFO)?.into_iter().collect();
    for package in packages {
        // With the architecture where several can be installed beside each other.
        let names = [format!("{}.list", package.name), format!("{}:{}.list", package.name, package.arch)];
        if let Some(name) = names.iter().find(|name| lists.contains(*name)) {
            let list = files.read(&format!("{INFO}/{name}"))?;
            let paths = list.split(|byte| *byte == b'\n').filter(|path| !path.is_empty() && *path != b"/.");
            package.files = paths.map(<[u8]>::to_vec).collect();
        }
    }
    Ok(())
}

/// The packages of a status file that are on the disk: unpacked ones too, but
/// not those of which only the configuration stayed.
pub(crate) fn parse(bytes: &[u8]) -> Vec<Package> {
    let text = String::from_utf8_lossy(bytes);
    let mut packages = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.trim().is_empty() {
            packages.extend(package(&std::mem::take(&mut fields)));
        } else if line.starts_with([' ', '\t']) {
            // The rest of a value; only first lines are needed.
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    packages
}

fn package(fields: &[(String, String)]) -> Option<Package> {
    let field = |name: &str| fields.iter().find(|(field, _)| field == name).and_then(|(_, value)| said(value));
    let state = field("status").and_then(|status| status.split_whitespace().nth(2).map(ToOwned::to_owned));
    if state.is_some_and(|state| matches!(state.as_str(), "not-installed" | "config-files")) {
        return None;
    }
    let mut package = Package::new(Kind::Deb, &field("package")?, &field("version")?, &field("architecture").unwrap_or_default());
    // `name`, or `name (version)` when the source has another version.
    package.source = field("source").map(|source| match source.split_once('(') {
        Some((name, version)) => (name.trim().to_owned(), version.trim().trim_end_matches(')').to_owned()),
        None => (source, package.version.clone()),
    });
    package.maintainer = field("maintainer");
    package.homepage = field("homepage");
    package.summary = field("description");
    // KiB, rounded up.
    package.size = field("installed-size").and_then(|size| size.parse::<u64>().ok()).and_then(|size| size.checked_mul(1024));
    Some(package)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Tree;

    const SAMPLE: &str = "\
Package: libstdc++6
Status: install ok installed
Installed-Size: 2753
Maintainer: Debian GCC Maintainers <debian-gcc@lists.debian.org>
Architecture: amd64
Multi-Arch: same
Source: gcc-12 (12.2.0-14)
Version: 12.2.0-14+b1
Conffiles:
 /etc/a 0123
Description: GNU Standard C++ Library v3
 Package: not-a-package
 .
 more
Homepage: http://gcc.gnu.org/

package: lower
STATUS: install ok triggers-awaited
version: 1:2-3
architecture: all

Package: gone
Status: deinstall ok config-files
Version: 1
Architecture: amd64

Package: never
Status: purge ok not-installed

Package: half
Status: install reinstreq half-installed
Version: 3~rc1
Architecture: amd64
";

    #[test]
    fn stanzas() {
        let packages = parse(SAMPLE.as_bytes());
        let names: Vec<_> = packages.iter().map(|p| (p.name.as_str(), p.version.as_str(), p.arch.as_str())).collect();
        assert_eq!(names, [("libstdc++6", "12.2.0-14+b1", "amd64"), ("lower", "1:2-3", "all"), ("half", "3~rc1", "amd64")]);
        assert_eq!(packages[0].source, Some(("gcc-12".into(), "12.2.0-14".into())));
        assert_eq!(packages[0].summary.as_deref(), Some("GNU Standard C++ Library v3"));
        assert_eq!((packages[0].size, packages[0].link()), (Some(2753 * 1024), Some("http://gcc.gnu.org/")));
    }

    #[test]
    fn where_it_is() {
        let tree = Tree::of(&[
            (STATUS, SAMPLE),
            ("/var/lib/dpkg/info/libstdc++6:amd64.list", "/.\n/usr\n/usr/lib/libstdc++.so.6\n"),
            ("/var/lib/dpkg/info/lower.list", "/.\n/etc/lower\n"),
            ("/var/lib/dpkg/status.d/base", "Package: base-files\nVersion: 12.4\nArchitecture: amd64\n"),
            ("/var/lib/dpkg/status.d/base.md5sums", "Package: no\nVersion: 1\n"),
        ]);
        let mut found = crate::packages::read(&tree).unwrap();
        crate::packages::read_files(&tree, &mut found, &|package| package.name != "half").unwrap();
        let names: Vec<_> = found.packages.iter().map(|p| (p.name.as_str(), p.files.len())).collect();
        assert_eq!(names, [("base-files", 0), ("half", 0), ("libstdc++6", 2), ("lower", 1)]);
    }

    #[test]
    fn what_is_no_database_gives_nothing() {
        for text in ["", "\n\n\n", "no field here\n", "Package: a\n", ": b\n", "Version: 1\n\nPackage: \nVersion: 2\n"] {
            assert!(parse(text.as_bytes()).is_empty(), "{text:?}");
        }
        assert_eq!(parse(b"Package: \xff\xfe\nVersion: 1\n").len(), 1);
    }
}

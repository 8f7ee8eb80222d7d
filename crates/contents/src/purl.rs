//! Package URLs, after the purl specification (ECMA-427): a name for a package
//! that scanners look vulnerabilities up by.

use std::fmt::Write as _;

use crate::packages::{Distribution, Kind, Package};

/// Percent-encodes a component: letters, digits, `.`, `-`, `_`, `~` and `:`
/// stand for themselves.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b".-_~:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// `pkg:kind/namespace/name@version?qualifiers`; empty parts are left out, and
/// qualifiers sorted by their names.
pub(crate) fn purl(kind: &str, namespace: &str, name: &str, version: &str, qualifiers: &[(&str, &str)]) -> String {
    let mut text = format!("pkg:{kind}/");
    if !namespace.is_empty() {
        let _ = write!(text, "{}/", encode(namespace));
    }
    text.push_str(&encode(name));
    if !version.is_empty() {
        let _ = write!(text, "@{}", encode(version));
    }
    let mut qualifiers: Vec<_> = qualifiers.iter().filter(|(_, value)| !value.is_empty()).collect();
    qualifiers.sort();
    for (number, (name, value)) in qualifiers.iter().enumerate() {
        let _ = write!(text, "{}{name}={}", if number == 0 { '?' } else { '&' }, encode(value));
    }
    text
}

/// The package URL of a package of `distribution`.
///
/// `upstream` names the source package where it is another one, as syft and
/// grype do: Debian's security tracker goes by source packages.
pub(crate) fn of(package: &Package, distribution: &Distribution) -> String {
    let id = distribution.id.to_ascii_lowercase();
    let distro = distribution.label();
    let arch = package.arch.as_str();
    match package.kind {
        Kind::Deb | Kind::Apk => {
            let fallback = if package.kind == Kind::Deb { "debian" } else { "alpine" };
            let upstream = match &package.source {
                Some((name, version)) if *name != package.name && !version.is_empty() => format!("{name}@{version}"),
                Some((name, _)) if *name != package.name => name.clone(),
                // The same name, but the binary was built again (`+b1`).
                Some((name, version)) if !version.is_empty() && *version != package.version => format!("{name}@{version}"),
                _ => String::new(),
            };
            let namespace = if id.is_empty() { fallback } else { &id };
            let qualifiers = [("arch", arch), ("distro", distro.as_str()), ("upstream", upstream.as_str())];
            purl(package.kind.name(), namespace, &package.name.to_ascii_lowercase(), &package.version, &qualifiers)
        }
        Kind::Rpm => {
            // The vendor, under the name that the specification gives it.
            let namespace = match id.as_str() {
                "rhel" => "redhat",
                other if other.starts_with("opensuse") => "opensuse",
                other => other,
            };
            let (epoch, version) = package.version.split_once(':').unwrap_or(("", &package.version));
            let upstream = package.source.as_ref().map_or("", |(name, _)| name.as_str());
            let qualifiers = [("arch", arch), ("distro", distro.as_str()), ("epoch", epoch), ("upstream", upstream)];
            purl("rpm", namespace, &package.name, version, &qualifiers)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(kind: Kind, name: &str, version: &str, arch: &str, source: Option<(&str, &str)>) -> Package {
        let source = source.map(|(name, version)| (name.to_owned(), version.to_owned()));
        Package { source, ..Package::new(kind, name, version, arch) }
    }

    fn distribution(id: &str, version: &str) -> Distribution {
        Distribution { id: id.into(), version: version.into(), ..Distribution::default() }
    }

    #[test]
    fn of_each_type() {
        let debian = distribution("debian", "12");
        let deb = package(Kind::Deb, "libstdc++6", "12.2.0-14+deb12u1", "amd64", Some(("gcc-12", "12.2.0-14+deb12u1")));
        assert_eq!(
            of(&deb, &debian),
            "pkg:deb/debian/libstdc%2B%2B6@12.2.0-14%2Bdeb12u1?arch=amd64&distro=debian-12&upstream=gcc-12%4012.2.0-14%2Bdeb12u1"
        );
        let epoch = package(Kind::Deb, "attr", "1:2.4.47-2+b1", "amd64", None);
        assert_eq!(of(&epoch, &debian), "pkg:deb/debian/attr@1:2.4.47-2%2Bb1?arch=amd64&distro=debian-12");
        let apk = package(Kind::Apk, "curl", "7.83.0-r0", "x86", Some(("curl", "")));
        assert_eq!(of(&apk, &distribution("alpine", "3.18.4")), "pkg:apk/alpine/curl@7.83.0-r0?arch=x86&distro=alpine-3.18.4");
        let rpm = package(Kind::Rpm, "Curl", "1:7.50.3-1.fc25", "i386", Some(("curl-7.50.3-1.fc25.src.rpm", "")));
        assert_eq!(
            of(&rpm, &distribution("fedora", "25")),
            "pkg:rpm/fedora/Curl@7.50.3-1.fc25?arch=i386&distro=fedora-25&epoch=1&upstream=curl-7.50.3-1.fc25.src.rpm"
        );
        assert_eq!(of(&package(Kind::Rpm, "bash", "5-1", "noarch", None), &distribution("rhel", "9.3")), {
            "pkg:rpm/redhat/bash@5-1?arch=noarch&distro=rhel-9.3"
        });
    }

    #[test]
    fn nothing_in_a_name_gets_out_of_its_place() {
        let evil = package(Kind::Deb, "a/b?c#d@e%f g\n", "1?x=y&z", "", None);
        assert_eq!(of(&evil, &Distribution::default()), "pkg:deb/debian/a%2Fb%3Fc%23d%40e%25f%20g%0A@1%3Fx%3Dy%26z");
        assert_eq!(
            purl("oci", "", "web", "sha256:ab", &[("tag", "1.4.0"), ("arch", "amd64")]),
            "pkg:oci/web@sha256:ab?arch=amd64&tag=1.4.0"
        );
    }
}

//! apk's database: stanzas of lines with a letter, a colon and a value.
//!
//! Source: apk-tools' `apk-v2` format, "installed database v2". Letters mean
//! different things in lower and upper case. Files come as `F:` folder lines,
//! each followed by the `R:` lines of the files in it.

use kiln_model::Result;
use kiln_model::machine::Files;

use super::{Depth, Kind, Package, said};

pub(super) fn read(files: &dyn Files, depth: Depth) -> Result<Vec<Package>> {
    match super::first_file(files, &["/lib/apk/db/installed", "/usr/lib/apk/db/installed"])? {
        Some(path) => Ok(parse(&files.read(path)?, depth)),
        None => Ok(Vec::new()),
    }
}

pub(crate) fn parse(bytes: &[u8], depth: Depth) -> Vec<Package> {
    let mut packages = Vec::new();
    let mut package = Package::new(Kind::Apk, "", "", "");
    let mut folder: Vec<u8> = Vec::new();
    for line in bytes.split(|byte| *byte == b'\n').chain([b"".as_slice()]) {
        if line.is_empty() {
            let done = std::mem::replace(&mut package, Package::new(Kind::Apk, "", "", ""));
            if !done.name.is_empty() && !done.version.is_empty() {
                packages.push(done);
            }
            folder.clear();
            continue;
        }
        let [letter, b':', value @ ..] = line else { continue };
        let text = || String::from_utf8_lossy(value).trim().to_owned();
        match letter {
            b'P' => package.name = text(),
            b'V' => package.version = text(),
            b'A' => package.arch = text(),
            b'o' => package.source = Some((text(), package.version.clone())),
            b'L' => package.license = said(&text()),
            b'm' => package.maintainer = said(&text()),
            b'U' => package.homepage = said(&text()),
            b'T' => package.summary = said(&text()),
            b'I' => package.size = text().parse().ok(),
            b'F' if depth == Depth::Files => {
                folder = [b"/".as_slice(), value].concat();
                if !value.is_empty() {
                    package.files.push(folder.clone());
                    folder.push(b'/');
                }
            }
            b'R' if depth == Depth::Files => package.files.push([folder.as_slice(), value].concat()),
            _ => {}
        }
    }
    packages
}

#[cfg(test)]
mod tests {
    use crate::testing::Tree;

    const SAMPLE: &str = "\
C:Q1Wn0Kcwk8M1W0yQyG8YQ7Y+3bGd0=
P:musl
V:1.2.4-r2
A:x86_64
S:383152
I:622592
T:the musl c library (libc) implementation
U:https://musl.libc.org/
L:MIT
o:musl
m:Timo Teräs <timo.teras@iki.fi>
t:1696605012
c:abc
p:so:libc.musl-x86_64.so.1=1
F:lib
R:ld-musl-x86_64.so.1
a:0:0:755
Z:Q1abc=
R:libc.musl-x86_64.so.1

C:Q1x=
P:libcurl
V:8.5.0-r0
A:x86_64
I:100
o:curl
L:curl
F:
R:top
F:usr/lib
R:libcurl.so.4

P:no-version

V:1
";

    #[test]
    fn stanzas() {
        let tree = Tree::of(&[("/lib/apk/db/installed", SAMPLE), ("/etc/os-release", "ID=alpine\nVERSION_ID=3.18.4\n")]);
        let mut found = crate::packages::read(&tree).unwrap();
        assert!(found.packages.iter().all(|package| package.files.is_empty()));
        crate::packages::read_files(&tree, &mut found, &|_| true).unwrap();
        let [curl, musl] = found.packages.as_slice() else { panic!("{:?}", found.packages) };
        assert_eq!((musl.version.as_str(), musl.size, musl.license.as_deref()), ("1.2.4-r2", Some(622_592), Some("MIT")));
        assert_eq!(musl.files, [b"/lib".to_vec(), b"/lib/ld-musl-x86_64.so.1".to_vec(), b"/lib/libc.musl-x86_64.so.1".to_vec()]);
        assert_eq!(curl.source, Some(("curl".into(), "8.5.0-r0".into())));
        assert_eq!(curl.files, [b"/top".to_vec(), b"/usr/lib".to_vec(), b"/usr/lib/libcurl.so.4".to_vec()]);
        let purl = crate::purl::of(curl, &found.distribution);
        assert_eq!(purl, "pkg:apk/alpine/libcurl@8.5.0-r0?arch=x86_64&distro=alpine-3.18.4&upstream=curl%408.5.0-r0");
    }
}

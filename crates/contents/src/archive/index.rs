//! `Packages`: the packages of one component and architecture of a suite, in
//! the form of deb-control(5).

use std::collections::HashMap;
use std::io::{BufRead, Read};

use kiln_model::{Code, Error, Result, ResultExt as _};

/// Most bytes of an index when it is not compressed. Debian's `main` has 50 MB.
const LIMIT: u64 = 1 << 30;
/// Longest line that is looked at: dependencies may be long, but what is wanted
/// is short.
const LINE: usize = 64 * 1024;

/// The versions of each package, by name.
#[derive(Debug, Clone, Default)]
pub struct Index {
    packages: HashMap<String, Vec<(String, String)>>,
}

impl Index {
    /// Reads an index.
    ///
    /// # Errors
    /// When it cannot be read, or is larger than any index is.
    pub fn read(text: impl Read) -> Result<Self> {
        let mut reader = std::io::BufReader::with_capacity(1 << 16, text.take(LIMIT));
        let mut index = Self::default();
        let (mut name, mut version, mut arch) = (String::new(), String::new(), String::new());
        let (mut line, mut read) = (Vec::new(), 0);
        loop {
            line.clear();
            let length = reader.read_until(b'\n', &mut line).trying(|| "read an index of packages".into())?;
            read += length as u64;
            if read >= LIMIT {
                return Err(Error::new(Code::Failed, format!("an index of packages is larger than {} MiB", LIMIT >> 20)));
            }
            let text = String::from_utf8_lossy(line.get(..line.len().min(LINE)).unwrap_or_default());
            let text = text.trim_end();
            if text.is_empty() {
                index.add(std::mem::take(&mut name), std::mem::take(&mut version), std::mem::take(&mut arch));
                if length == 0 {
                    return Ok(index);
                }
                continue;
            }
            // The rest of a value begins with a space, and has no name.
            let Some((field, value)) = text.split_once(':') else { continue };
            let into = match field {
                "Package" => &mut name,
                "Version" => &mut version,
                "Architecture" => &mut arch,
                _ => continue,
            };
            value.trim().clone_into(into);
        }
    }

    fn add(&mut self, name: String, version: String, arch: String) {
        if !name.is_empty() && !version.is_empty() {
            self.packages.entry(name).or_default().push((version, arch));
        }
    }

    /// How many packages it has.
    pub fn len(&self) -> usize {
        self.packages.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.packages.is_empty()
    }

    /// The versions of a package that can be installed where one of
    /// architecture `arch` is: those for it, and those for all.
    pub fn versions<'a>(&'a self, name: &str, arch: &'a str) -> impl Iterator<Item = &'a str> {
        let all = self.packages.get(name).map(Vec::as_slice).unwrap_or_default();
        let fits = move |(_, other): &&(String, String)| other == arch || other == "all" || arch == "all" || arch.is_empty();
        all.iter().filter(fits).map(|(version, _)| version.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stanzas_are_read_and_what_is_none_is_passed_over() {
        let text = "Package: a\nVersion: 1:2-3\nArchitecture: amd64\nDescription: x\n Version: no\nDepends: b (>= 1)\n\n\
                    Package: a\nArchitecture: all\nVersion: 2\n\nPackage: half\n\nVersion: 1\n\nPackage: last\nVersion: 9";
        let index = Index::read(text.as_bytes()).unwrap();
        assert_eq!(index.len(), 2);
        assert_eq!(index.versions("a", "amd64").collect::<Vec<_>>(), ["1:2-3", "2"]);
        assert_eq!(index.versions("a", "arm64").collect::<Vec<_>>(), ["2"]);
        assert_eq!(index.versions("a", "all").count(), 2);
        assert_eq!(index.versions("last", "amd64").count(), 0, "it names no architecture");
        assert_eq!(index.versions("b", "amd64").count(), 0);
        assert!(Index::read(&b""[..]).unwrap().is_empty());
        assert_eq!(Index::read(&b"Package: \xff\nVersion: 1\n"[..]).unwrap().len(), 1);
    }
}

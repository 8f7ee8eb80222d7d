//! Where an image's own apt would look: `sources.list` and what is beside it.
//!
//! Source: sources.list(5), both its forms.

use kiln_model::Result;
use kiln_model::machine::{FileKind, Files};

const LIST: &str = "/etc/apt/sources.list";
const FOLDER: &str = "/etc/apt/sources.list.d";

/// Most bytes of a file that are looked at.
const LIMIT: u64 = 1 << 20;

/// A suite of an archive, and what of it is wanted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    /// Address of the archive, without a slash at its end.
    pub uri: String,
    /// The suite (`bookworm-security`).
    pub suite: String,
    /// The component (`main`).
    pub component: String,
}

/// What an image's apt is told to use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    /// The sources, each once.
    pub all: Vec<Source>,
    /// What cannot be asked, and why.
    pub notes: Vec<String>,
}

impl Sources {
    /// Reads those of an image.
    ///
    /// # Errors
    /// When the disk is damaged.
    pub fn read(files: &dyn Files) -> Result<Self> {
        let mut paths = vec![LIST.to_owned()];
        let mut names = files.list(FOLDER)?;
        names.sort();
        paths.extend(names.iter().map(|name| format!("{FOLDER}/{name}")));
        let mut found = Self::default();
        for path in paths {
            if !matches!(files.kind(&path)?, Some(FileKind::File(size)) if size <= LIMIT) {
                continue;
            }
            let bytes = files.read(&path)?;
            let text = String::from_utf8_lossy(&bytes);
            if path.ends_with(".list") {
                found.one_line(&text);
            } else if path.ends_with(".sources") {
                found.deb822(&text);
            }
        }
        found.all.sort();
        found.all.dedup();
        found.notes.dedup();
        Ok(found)
    }

    /// `deb [options] URI SUITE COMPONENT…`
    fn one_line(&mut self, text: &str) {
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let Some(rest) = line.strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t', '['])) else { continue };
            let rest = rest.trim_start();
            let rest = match rest.strip_prefix('[') {
                Some(options) => options.split_once(']').map_or("", |(_, rest)| rest),
                None => rest,
            };
            let mut words = rest.split_whitespace();
            let (Some(uri), Some(suite)) = (words.next(), words.next()) else { continue };
            self.add(uri, suite, words);
        }
    }

    /// Stanzas with `Types`, `URIs`, `Suites` and `Components`.
    fn deb822(&mut self, text: &str) {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in text.lines().chain([""]) {
            if line.starts_with('#') {
                continue;
            }
            if line.trim().is_empty() {
                self.stanza(&std::mem::take(&mut fields));
            } else if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push(' ');
                    value.push_str(line.trim());
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
    }

    fn stanza(&mut self, fields: &[(String, String)]) {
        let words = |name: &str| -> Vec<&str> {
            fields.iter().filter(|(field, _)| field == name).flat_map(|(_, value)| value.split_whitespace()).collect()
        };
        if !words("types").contains(&"deb") || words("enabled").first().is_some_and(|enabled| matches!(*enabled, "no" | "false")) {
            return;
        }
        for uri in words("uris") {
            for suite in words("suites") {
                self.add(uri, suite, words("components").into_iter());
            }
        }
    }

    fn add<'a>(&mut self, uri: &str, suite: &str, components: impl Iterator<Item = &'a str>) {
        let plain = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "-._~+/:".contains(c)) && !text.contains("..");
        if !(uri.starts_with("http://") || uri.starts_with("https://")) {
            self.notes.push(format!("the archive {} is not asked: it is not at an http address", crate::text::line(uri)));
        } else if suite.ends_with('/') {
            self.notes.push(format!("the archive {} is not asked: it has no suites", crate::text::line(uri)));
        } else if !plain(suite) || uri.contains(['@', '?', '#']) {
            self.notes.push(format!(
                "a suite of {} is not asked: its address is no plain one",
                crate::text::line(uri.split('@').next_back().unwrap_or_default())
            ));
        } else {
            for component in components.filter(|component| plain(component)) {
                let uri = uri.trim_end_matches('/').to_owned();
                self.all.push(Source { uri, suite: suite.to_owned(), component: component.to_owned() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Tree;

    fn source(uri: &str, suite: &str, component: &str) -> Source {
        Source { uri: uri.into(), suite: suite.into(), component: component.into() }
    }

    #[test]
    fn both_forms_are_read() {
        let tree = Tree::of(&[
            (
                "/etc/apt/sources.list",
                "# deb http://no/ no no\ndeb http://deb.debian.org/debian/ bookworm main contrib # rest\n\
                 deb-src http://deb.debian.org/debian bookworm main\ndeb http://deb.debian.org/debian bookworm main\n\
                 deb [arch=amd64 signed-by=/x] https://own.example/deb stable main\ndeb cdrom:[Debian] bookworm main\ndeb http://flat.example/ ./\n",
            ),
            (
                "/etc/apt/sources.list.d/debian.sources",
                "Types: deb deb-src\nURIs: http://security.debian.org/debian-security\nSuites: bookworm-security\n# why\nComponents: main\n  non-free\n\n\
                 Types: deb\nEnabled: no\nURIs: http://off.example\nSuites: x\nComponents: main\n\nTypes: deb-src\nURIs: http://src.example\nSuites: x\nComponents: main\n",
            ),
            ("/etc/apt/sources.list.d/saved.list.save", "deb http://save.example x main\n"),
        ]);
        let found = Sources::read(&tree).unwrap();
        assert_eq!(
            found.all,
            [
                source("http://deb.debian.org/debian", "bookworm", "contrib"),
                source("http://deb.debian.org/debian", "bookworm", "main"),
                source("http://security.debian.org/debian-security", "bookworm-security", "main"),
                source("http://security.debian.org/debian-security", "bookworm-security", "non-free"),
                source("https://own.example/deb", "stable", "main"),
            ]
        );
        assert_eq!(found.notes.len(), 2, "{:?}", found.notes);
        assert!(found.notes.iter().any(|note| note.contains("cdrom:") && note.contains("not at an http address")));
        assert!(found.notes.iter().any(|note| note.contains("flat.example") && note.contains("no suites")));
    }

    #[test]
    fn what_could_lead_elsewhere_is_not_asked() {
        let tree = Tree::of(&[("/etc/apt/sources.list", "deb http://user:word@x.example/d s main\ndeb http://x.example/d ../../s main\n")]);
        let found = Sources::read(&tree).unwrap();
        assert_eq!(found.all, []);
        assert!(found.notes.iter().all(|note| !note.contains("word")), "{:?}", found.notes);
    }

    #[test]
    fn an_image_without_apt_has_none() {
        assert_eq!(Sources::read(&Tree::of(&[("/etc/os-release", "ID=alpine\n")])).unwrap(), Sources::default());
    }
}

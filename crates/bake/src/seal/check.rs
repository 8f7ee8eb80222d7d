//! Reads the stopped disk: is everything gone that must not be cloned?

use kiln_model::Result;
use kiln_model::machine::{FileKind, Files};

use super::rules::{Action, RULES, kept, part_matches};

/// Something that stayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Leftover {
    /// What it is about.
    pub what: &'static str,
    /// Where it is.
    pub path: String,
}

/// Everything on the disk that the rules name and `keep` does not.
pub(super) fn leftovers(files: &dyn Files, keep: &[String]) -> Result<Vec<Leftover>> {
    let mut found = Vec::new();
    for rule in RULES {
        let mut add = |path: String| {
            if !kept(keep, &path) {
                found.push(Leftover { what: rule.what, path });
            }
        };
        for pattern in rule.patterns {
            for path in matches(files, pattern)? {
                match rule.action {
                    Action::Remove => {
                        // A folder may stay when it holds only what is kept.
                        if files.kind(&path)? == Some(FileKind::Directory) && keep.iter().any(|k| k.starts_with(&format!("{path}/"))) {
                            below(files, &path, &mut |path, kind| {
                                if kind != FileKind::Directory {
                                    add(path)
                                }
                            })?;
                        } else {
                            add(path);
                        }
                    }
                    Action::Empty => {
                        for name in files.list(&path)? {
                            add(format!("{path}/{name}"));
                        }
                    }
                    Action::Files => below(files, &path, &mut |path, kind| {
                        if matches!(kind, FileKind::File(_)) {
                            add(path)
                        }
                    })?,
                    Action::Truncate => {
                        if matches!(files.kind(&path)?, Some(FileKind::File(size)) if size > 0) {
                            add(path);
                        }
                    }
                }
            }
        }
    }
    Ok(found)
}

/// The paths that a pattern names.
fn matches(files: &dyn Files, pattern: &str) -> Result<Vec<String>> {
    let mut paths = vec![String::new()];
    for part in pattern.split('/').skip(1) {
        let mut next = Vec::new();
        for path in paths {
            if part.contains('*') {
                let folder = if path.is_empty() { "/" } else { &path };
                next.extend(files.list(folder)?.into_iter().filter(|name| part_matches(part, name)).map(|name| format!("{path}/{name}")));
            } else {
                let path = format!("{path}/{part}");
                if files.kind(&path)?.is_some() {
                    next.push(path);
                }
            }
        }
        paths = next;
    }
    Ok(paths)
}

fn below(files: &dyn Files, path: &str, visit: &mut dyn FnMut(String, FileKind)) -> Result<()> {
    for name in files.list(path)? {
        let path = format!("{path}/{name}");
        if let Some(kind) = files.kind(&path)? {
            if kind == FileKind::Directory {
                below(files, &path, visit)?;
            }
            visit(path, kind);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// A file system of paths.
    struct Fake(BTreeMap<&'static str, u64>);

    impl Files for Fake {
        fn kind(&self, path: &str) -> Result<Option<FileKind>> {
            let folder = format!("{}/", path.trim_end_matches('/'));
            Ok(match self.0.get(path) {
                Some(size) => Some(FileKind::File(*size)),
                None => self.0.keys().any(|p| p.starts_with(&folder)).then_some(FileKind::Directory),
            })
        }
        fn list(&self, path: &str) -> Result<Vec<String>> {
            let folder = format!("{}/", path.trim_end_matches('/'));
            let mut names: Vec<String> =
                self.0.keys().filter_map(|p| p.strip_prefix(&folder)).filter_map(|rest| rest.split('/').next()).map(Into::into).collect();
            names.dedup();
            Ok(names)
        }
        fn read(&self, _: &str) -> Result<Vec<u8>> {
            Ok(Vec::new())
        }
        fn open(&self, _: &[u8]) -> Result<Box<dyn std::io::Read + '_>> {
            Ok(Box::new(std::io::empty()))
        }
        fn walk(&self) -> Result<kiln_model::machine::Walk<'_>> {
            Ok(Box::new(std::iter::empty()))
        }
    }

    fn paths(files: &[(&'static str, u64)], keep: &[&str]) -> Vec<String> {
        let keep: Vec<String> = keep.iter().map(|k| (*k).to_owned()).collect();
        let mut paths: Vec<String> =
            leftovers(&Fake(files.iter().copied().collect()), &keep).unwrap().into_iter().map(|left| left.path).collect();
        paths.dedup();
        paths
    }

    #[test]
    fn a_clean_disk_has_none() {
        assert!(paths(&[("/etc/machine-id", 0), ("/etc/passwd", 9), ("/usr/bin/true", 9)], &[]).is_empty());
    }

    #[test]
    fn what_stayed_is_found() {
        let files = [
            ("/etc/machine-id", 33),
            ("/etc/ssh/ssh_host_rsa_key", 9),
            ("/home/eve/.ssh/authorized_keys", 9),
            ("/tmp/.hidden", 0),
            ("/var/lib/systemd/random-seed", 32),
            ("/var/log/journal/abc/system.journal", 9),
        ];
        let found = paths(&files, &[]);
        assert_eq!(
            found,
            [
                "/etc/machine-id",
                "/etc/ssh/ssh_host_rsa_key",
                "/var/lib/systemd/random-seed",
                "/home/eve/.ssh",
                "/var/log/journal/abc/system.journal",
                "/tmp/.hidden"
            ]
        );
    }

    #[test]
    fn what_is_kept_is_no_leftover_but_its_neighbours_are() {
        let files = [("/home/deploy/.ssh/authorized_keys", 9), ("/home/deploy/.ssh/id_ed25519", 9)];
        assert!(paths(&files, &["/home/deploy/.ssh"]).is_empty());
        assert_eq!(paths(&files, &["/home/deploy/.ssh/authorized_keys"]), ["/home/deploy/.ssh/id_ed25519"]);
    }
}

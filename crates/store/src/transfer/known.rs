//! Which repositories of a host hold which blobs, as far as this machine has
//! seen. A registry mounts a blob from another repository of its own, but has
//! no way to ask where it is, so kiln remembers what it has pushed and pulled.
//!
//! One file per host in the cache, `HEX REPOSITORY` a line, only appended to.
//! It is a memory and no truth: a line that cannot be read is passed over, and
//! a blob that is not where it is said to be is sent.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use kiln_model::Digest;

/// Bytes that one host's file may grow to before its oldest lines are forgotten.
const LIMIT: u64 = 8 << 20;

/// Bytes that are kept of it then.
const KEPT: usize = 6 << 20;

/// Repositories that are tried for one blob.
const TRIES: usize = 3;

/// The memory. Nothing that goes wrong in it is an error: then a blob is sent
/// that need not have been.
#[derive(Debug, Clone)]
pub struct Known {
    folder: PathBuf,
}

impl Known {
    /// Kept in `folder`, which is made when it is needed.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn path(&self, host: &str) -> PathBuf {
        self.folder.join(host.replace(['/', '\\'], "_"))
    }

    /// The repositories of `host`, without `except`, that hold one of `wanted`;
    /// the last one seen comes first.
    pub(crate) fn holders(&self, host: &str, except: &str, wanted: &HashSet<Digest>) -> HashMap<Digest, Vec<String>> {
        let mut holders: HashMap<Digest, Vec<String>> = HashMap::new();
        let Ok(text) = std::fs::read_to_string(self.path(host)) else { return holders };
        for (digest, repository) in text.lines().rev().filter_map(parse) {
            if repository == except || !wanted.contains(&digest) {
                continue;
            }
            let list = holders.entry(digest).or_default();
            if list.len() < TRIES && !list.iter().any(|known| known == repository) {
                list.push(repository.to_owned());
            }
        }
        holders
    }

    /// Remembers that `repository` of `host` holds `blobs`.
    pub(crate) fn remember(&self, host: &str, repository: &str, blobs: &[Digest]) {
        drop(self.append(host, repository, blobs));
    }

    fn append(&self, host: &str, repository: &str, blobs: &[Digest]) -> std::io::Result<()> {
        use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let path = self.path(host);
        let mut file = File::options().read(true).append(true).create(true).mode(0o600).open(&path)?;
        file.lock()?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let there: HashSet<Digest> =
            text.lines().filter_map(parse).filter(|(_, name)| *name == repository).map(|(digest, _)| digest).collect();
        let new: String = blobs.iter().filter(|blob| !there.contains(blob)).map(|blob| format!("{} {repository}\n", blob.hex())).collect();
        // After a crash in the middle of a line.
        let gap = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
        if text.len() as u64 + new.len() as u64 > LIMIT {
            let all = format!("{text}{gap}{new}");
            let from = all.len().saturating_sub(KEPT);
            let kept = all.as_bytes().get(from..).unwrap_or_default();
            let line = kept.iter().position(|byte| *byte == b'\n').map_or(kept.len(), |end| end + 1);
            file.set_len(0)?;
            return file.write_all(kept.get(line..).unwrap_or_default());
        }
        file.write_all(format!("{gap}{new}").as_bytes())
    }
}

fn parse(line: &str) -> Option<(Digest, &str)> {
    let (hex, repository) = line.split_once(' ')?;
    Some((format!("sha256:{hex}").parse().ok()?, repository))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_last_is_tried_first() {
        let folder = tempfile::tempdir().unwrap();
        let known = Known::new(&folder.path().join("registries"));
        let (a, b) = (Digest::of("a"), Digest::of("b"));
        let wanted = HashSet::from([a, b]);
        assert!(known.holders("h:5000", "x", &wanted).is_empty());
        known.remember("h:5000", "one", &[a, b]);
        known.remember("h:5000", "two", &[a, a]);
        known.remember("h:5000", "one", &[a]);
        known.remember("other", "three", &[a]);
        std::fs::File::options().append(true).open(folder.path().join("registries/h:5000")).unwrap().write_all(b"half a li").unwrap();
        known.remember("h:5000", "four", &[b]);
        let holders = known.holders("h:5000", "x", &wanted);
        assert_eq!(holders[&a], ["two", "one"]);
        assert_eq!(holders[&b], ["four", "one"]);
        assert_eq!(known.holders("h:5000", "one", &HashSet::from([a]))[&a], ["two"]);
    }

    #[test]
    fn the_file_does_not_grow_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let known = Known::new(folder.path());
        let blobs: Vec<Digest> = (0..60_000_u32).map(|n| Digest::of(n.to_le_bytes())).collect();
        for repository in ["one", "two", "three"] {
            known.remember("h", repository, &blobs);
        }
        assert!(std::fs::metadata(folder.path().join("h")).unwrap().len() < LIMIT);
        assert!(known.holders("h", "", &HashSet::from([blobs[0]]))[&blobs[0]].contains(&"three".to_owned()));
    }
}

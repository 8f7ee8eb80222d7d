//! Local files and folders that go into a guest, and their place in a key.

use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::Digest;
use crate::error::{Code, Error, Result, ResultExt};
use crate::key::KeyHasher;

/// What a tree's entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file with its size in bytes.
    File(u64),
    /// A folder.
    Folder,
    /// A symbolic link and where it points.
    Link(PathBuf),
}

/// One entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path below the tree's root, with `/` between parts; empty for the root
    /// itself.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// What it is.
    pub kind: Kind,
}

/// A local file or folder, walked once, in sorted order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// Where it is.
    pub root: PathBuf,
    /// Its entries; the root first.
    pub entries: Vec<Entry>,
}

impl Tree {
    /// Walks `root`.
    ///
    /// # Errors
    /// When something cannot be read, or is a socket, pipe or device.
    pub fn walk(root: &Path) -> Result<Self> {
        let mut tree = Self { root: root.to_owned(), entries: Vec::new() };
        // A root that is a link is followed: the user named what it points to.
        let meta = std::fs::metadata(root).trying(|| format!("read {}", root.display()))?;
        tree.add(root, "", &meta)?;
        Ok(tree)
    }

    /// Whether it is a folder.
    pub fn is_folder(&self) -> bool {
        self.entries.first().is_some_and(|root| root.kind == Kind::Folder)
    }

    /// Where an entry is.
    pub fn location(&self, entry: &Entry) -> PathBuf {
        if entry.path.is_empty() { self.root.clone() } else { self.root.join(&entry.path) }
    }

    /// Bytes of all its files.
    pub fn size(&self) -> u64 {
        self.entries.iter().map(|entry| if let Kind::File(size) = entry.kind { size } else { 0 }).sum()
    }

    /// Adds path, mode and bytes of everything in it to a key.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        hasher.hidden("entries", self.entries.len().to_string());
        let root = self.root.file_name().unwrap_or_default().to_string_lossy();
        for entry in &self.entries {
            let mode = format!("{:o}", entry.mode);
            let name = if entry.path.is_empty() { root.to_string() } else { format!("{root}/{}", entry.path) };
            hasher.hidden("path", &entry.path).hidden("mode", &mode);
            let (kind, content) = match &entry.kind {
                Kind::Folder => ("folder", Vec::new()),
                Kind::Link(target) => ("link", target.as_os_str().as_encoded_bytes().to_vec()),
                Kind::File(_) => {
                    let path = self.location(entry);
                    let digest = File::open(&path).and_then(|mut file| Digest::of_reader(&mut file));
                    let digest = digest.trying(|| format!("read {}", path.display()))?.0;
                    hasher.input(&name, digest);
                    ("file", digest.as_bytes().to_vec())
                }
            };
            hasher.hidden(kind, &content);
            hasher.part(name, [mode.as_bytes(), kind.as_bytes(), &content].concat());
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, name: &str, meta: &std::fs::Metadata) -> Result<()> {
        let kind = if meta.is_dir() {
            Kind::Folder
        } else if meta.is_symlink() {
            Kind::Link(std::fs::read_link(path).trying(|| format!("read the link {}", path.display()))?)
        } else if meta.is_file() {
            Kind::File(meta.len())
        } else {
            return Err(Error::new(Code::Usage, format!("{} is neither a file, a folder nor a link", path.display())));
        };
        let folder = kind == Kind::Folder;
        let mode = if meta.is_symlink() { 0o777 } else { meta.permissions().mode() & 0o7777 };
        self.entries.push(Entry { path: name.to_owned(), mode, kind });
        if folder {
            let mut children = std::fs::read_dir(path)
                .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
                .trying(|| format!("read the folder {}", path.display()))?;
            children.sort_by_key(std::fs::DirEntry::file_name);
            for child in children {
                let Ok(part) = child.file_name().into_string() else {
                    return Err(Error::new(Code::Usage, format!("the name of {} is not UTF-8", child.path().display())));
                };
                let meta = child.metadata().trying(|| format!("read {}", child.path().display()))?;
                let name = if name.is_empty() { part } else { format!("{name}/{part}") };
                self.add(&child.path(), &name, &meta)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(tree: &Path) -> crate::Key {
        let mut hasher = KeyHasher::new("step");
        Tree::walk(tree).unwrap().key(&mut hasher).unwrap();
        hasher.finish()
    }

    #[test]
    fn paths_modes_and_bytes_make_the_key_and_the_place_does_not() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for root in [one.path(), two.path()] {
            std::fs::create_dir(root.join("a")).unwrap();
            std::fs::write(root.join("a/b"), "x").unwrap();
            std::os::unix::fs::symlink("b", root.join("a/c")).unwrap();
        }
        assert_eq!(key(one.path()), key(two.path()));
        std::fs::set_permissions(two.path().join("a/b"), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_ne!(key(one.path()), key(two.path()));
        std::fs::set_permissions(two.path().join("a/b"), std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::set_permissions(one.path().join("a/b"), std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(key(one.path()), key(two.path()));
        std::fs::write(two.path().join("a/b"), "y").unwrap();
        assert_ne!(key(one.path()), key(two.path()));
    }
}

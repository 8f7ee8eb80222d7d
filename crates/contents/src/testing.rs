//! Files that are not on a disk, for tests.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use kiln_model::machine::{Entry, EntryKind, FileKind, Files, Walk};
use kiln_model::{Code, Error, Result};

/// Regular files by their paths.
#[derive(Default)]
pub(crate) struct Tree(BTreeMap<String, Vec<u8>>);

impl Tree {
    pub(crate) fn of(files: &[(&str, &str)]) -> Self {
        Self(files.iter().map(|(path, text)| ((*path).to_owned(), text.as_bytes().to_vec())).collect())
    }

    pub(crate) fn add(&mut self, path: &str, bytes: Vec<u8>) {
        self.0.insert(path.to_owned(), bytes);
    }
}

impl Files for Tree {
    fn kind(&self, path: &str) -> Result<Option<FileKind>> {
        let folder = format!("{}/", path.trim_end_matches('/'));
        Ok(match self.0.get(path) {
            Some(bytes) => Some(FileKind::File(bytes.len() as u64)),
            None => self.0.keys().any(|p| p.starts_with(&folder)).then_some(FileKind::Directory),
        })
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        let folder = format!("{}/", path.trim_end_matches('/'));
        let names = self.0.keys().filter_map(|p| p.strip_prefix(&folder)?.split('/').next());
        let mut names: Vec<String> = names.map(Into::into).collect();
        names.dedup();
        Ok(names)
    }

    fn read(&self, path: &str) -> Result<Vec<u8>> {
        self.0.get(path).cloned().ok_or_else(|| Error::new(Code::NotFound, format!("no {path}")))
    }

    fn open(&self, path: &[u8]) -> Result<Box<dyn io::Read + '_>> {
        let path = String::from_utf8_lossy(path);
        let bytes = self.0.get(path.as_ref()).ok_or_else(|| Error::new(Code::NotFound, format!("no {path}")))?;
        Ok(Box::new(bytes.as_slice()))
    }

    fn walk(&self) -> Result<Walk<'_>> {
        let entry = |(path, bytes): (&String, &Vec<u8>)| Entry {
            path: path.clone().into_bytes(),
            kind: EntryKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: bytes.len() as u64,
            modified: 0,
            attributes: None,
            place: None,
            position: 0,
        };
        Ok(Box::new(self.0.iter().map(entry).map(Ok)))
    }
}

/// A program in the usual places.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].iter().map(|folder| PathBuf::from(folder).join(name)).find(|path| path.exists())
}

/// An image that does not exist.
pub(crate) fn facts() -> crate::ImageFacts {
    use kiln_model::Digest;
    use kiln_model::image::{Config, DiskConfig, Firmware};
    crate::ImageFacts {
        config: Config {
            disks: vec![DiskConfig { name: "root".into(), size: 4 << 30, digest: Digest::of("disk"), root: true }],
            base: Some(Digest::of("base")),
            commit: Some("0123abc".into()),
            ..Config::new("shop/web", "1.4.0", "amd64", Firmware::BiosUefi)
        },
        digest: Some(Digest::of("image")),
        created: Some("2026-11-21T10:00:00.123456Z".into()),
    }
}

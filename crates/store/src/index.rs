//! `index.json`: every manifest, once for each name that points to it.
//!
//! skopeo takes the text after `oci:DIR:` whole and compares it with the
//! annotation `org.opencontainers.image.ref.name`, so the annotation holds what
//! a person would write: `web:1.4.0`, and `web` for the newest.

use std::path::PathBuf;

use kiln_model::Digest;
use kiln_model::error::{Code, Error, Result, ResultExt};
use serde::{Deserialize, Serialize};

use crate::blobs::Store;
use crate::manifest::{Descriptor, INDEX};

/// Annotation: the name that points to the manifest.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation: when this entry was last pointed somewhere, RFC 3339.
pub(crate) const AT: &str = "vnd.kiln.at";
/// Annotation: why the entry may not move any more (`pushed`).
pub(crate) const FIXED: &str = "vnd.kiln.fixed";
/// Annotation: disk digest of the root disk.
pub(crate) const ROOT_DISK: &str = "vnd.kiln.root";
/// Annotation: disk digest of what the image was baked from.
pub(crate) const BASE_DISK: &str = "vnd.kiln.base";
/// Annotation: digest of the config, so that finding it opens no manifest.
pub(crate) const CONFIG_DIGEST: &str = "vnd.kiln.config";

/// Most bytes of an index: some 100,000 entries.
const INDEX_LIMIT: u64 = 64 * 1024 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Index {
    schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
    pub(crate) manifests: Vec<Descriptor>,
    /// Fields that kiln does not use, kept as they are.
    #[serde(flatten)]
    other: serde_json::Map<String, serde_json::Value>,
}

impl Index {
    fn empty() -> Self {
        Self { schema_version: 2, media_type: Some(INDEX.into()), manifests: Vec::new(), other: serde_json::Map::new() }
    }

    /// The entry of a name.
    pub(crate) fn entry(&self, name: &str) -> Option<&Descriptor> {
        self.manifests.iter().find(|entry| entry.annotation(REF_NAME) == Some(name))
    }

    pub(crate) fn entry_mut(&mut self, name: &str) -> Option<&mut Descriptor> {
        self.manifests.iter_mut().find(|entry| entry.annotation(REF_NAME) == Some(name))
    }

    /// Points `name` to what `to` describes; gives where it pointed before. A
    /// manifest that loses its last name stays, without one, until `prune`.
    pub(crate) fn point(&mut self, name: &str, mut to: Descriptor) -> Option<Digest> {
        to.annotations.insert(REF_NAME.into(), name.into());
        // An entry without a name is not needed beside one with a name.
        self.manifests.retain(|entry| entry.digest != to.digest || entry.annotation(REF_NAME).is_some());
        let Some(entry) = self.entry_mut(name) else {
            self.manifests.push(to);
            return None;
        };
        let before = std::mem::replace(entry, to);
        let digest = before.digest;
        self.keep_nameless(before);
        Some(digest)
    }

    /// Removes a name; gives what it pointed to.
    pub(crate) fn remove(&mut self, name: &str) -> Option<Descriptor> {
        let at = self.manifests.iter().position(|entry| entry.annotation(REF_NAME) == Some(name))?;
        let entry = self.manifests.remove(at);
        self.keep_nameless(entry.clone());
        Some(entry)
    }

    fn keep_nameless(&mut self, mut entry: Descriptor) {
        if !self.manifests.iter().any(|other| other.digest == entry.digest) {
            for name in [REF_NAME, FIXED] {
                entry.annotations.remove(name);
            }
            self.manifests.push(entry);
        }
    }

    /// Names that point to versions of the image `name`, newest first.
    pub(crate) fn versions<'a>(&'a self, name: &'a str) -> Vec<(&'a str, &'a Descriptor)> {
        let tag = |entry: &'a Descriptor| Some((entry.annotation(REF_NAME)?.strip_prefix(name)?.strip_prefix(':')?, entry));
        let mut versions: Vec<_> = self.manifests.iter().filter_map(tag).collect();
        versions.sort_by(|a, b| b.1.annotation(AT).cmp(&a.1.annotation(AT)).then_with(|| b.0.cmp(a.0)));
        versions
    }
}

impl Store {
    pub(crate) fn index_path(&self) -> PathBuf {
        self.root().join("index.json")
    }

    /// Reads the index as it is now.
    pub(crate) fn index(&self) -> Result<Index> {
        let path = self.index_path();
        let corrupt = |why: &str| {
            Error::new(Code::Corrupt, format!("{} is damaged: {why}", path.display()))
                .next("put a copy of it back, or move the store away and bake again: the blobs are not touched")
        };
        let meta = std::fs::metadata(&path).trying(|| format!("read {}", path.display()))?;
        if meta.len() > INDEX_LIMIT {
            return Err(corrupt("it is too large"));
        }
        let bytes = std::fs::read(&path).trying(|| format!("read {}", path.display()))?;
        let index: Index = serde_json::from_slice(&bytes).map_err(|error| corrupt("it is not an OCI image index").because(error))?;
        if index.schema_version != 2 {
            return Err(corrupt("it is an index of another version"));
        }
        Ok(index)
    }

    /// Changes the index, alone, and in one piece.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut Index) -> Result<T>) -> Result<T> {
        let (temp, file) = self.temp()?;
        let _lock = self.lock_index()?;
        let before = self.index()?;
        let mut index = before.clone();
        let result = change(&mut index)?;
        if index != before {
            self.put_index(&index, temp, file)?;
        }
        Ok(result)
    }

    /// Held while the index is replaced. Whoever needs the blobs lock as well
    /// takes it second.
    pub(crate) fn lock_index(&self) -> Result<std::fs::File> {
        let lock = self.lock_file("index.lock")?;
        lock.lock().trying(|| "lock the store's index".into())?;
        Ok(lock)
    }

    /// Makes an empty index where there is none.
    pub(crate) fn make_index(&self) -> Result<()> {
        if self.index_path().exists() {
            return Ok(());
        }
        let (temp, file) = self.temp()?;
        let _lock = self.lock_index()?;
        if self.index_path().exists() { Ok(()) } else { self.put_index(&Index::empty(), temp, file) }
    }

    pub(crate) fn put_index(&self, index: &Index, temp: crate::blobs::Temp, mut file: std::fs::File) -> Result<()> {
        use std::io::Write as _;
        let what = || format!("write {}", self.index_path().display());
        let bytes = serde_json::to_vec(index).trying(what)?;
        // The blobs' names have to last before anything points to them.
        crate::blobs::sync_folder(&self.blobs())?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).trying(what)?;
        temp.place(&self.index_path())?;
        crate::blobs::sync_folder(self.root())
    }
}

//! What the tests of the store share: small disks and configs.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use kiln_disk::raw::RawSource;
use kiln_model::Digest;
use kiln_model::block::{BLOCK, ImageSink as _};
use kiln_model::image::{Config, DiskConfig, DiskRecord, Firmware};
use kiln_store::{Named, Publish, Store};

/// A store in a temporary folder.
pub(crate) struct Context {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) store: Store,
}

impl Context {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        Self { folder, store }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// A raw disk of `blocks` (index, seed).
    pub(crate) fn raw(&self, blocks: &[(u64, u64)]) -> PathBuf {
        let path = self.folder.path().join("disk.raw");
        raw(&path, 16 * BLOCK, blocks);
        path
    }

    pub(crate) fn disk(&self, blocks: &[(u64, u64)], parents: &[DiskRecord]) -> DiskRecord {
        let path = self.raw(blocks);
        self.store.write_disk("root", &mut RawSource::open(&path).unwrap(), None, parents, &mut |_, _| {}).unwrap()
    }

    /// Publishes a disk as `name:version`.
    pub(crate) fn publish(&self, name: &str, version: &str, disk: &DiskRecord) -> Named {
        publish(&self.store, name, version, disk).unwrap()
    }

    pub(crate) fn image(&self, name: &str, version: &str, blocks: &[(u64, u64)]) -> Digest {
        let disk = self.disk(blocks, &[]);
        self.publish(name, version, &disk).digest
    }

    pub(crate) fn resolve(&self, reference: &str) -> kiln_model::Result<Digest> {
        self.store.resolve(&reference.parse().unwrap())
    }

    /// The same store as another process would open it.
    pub(crate) fn again(&self) -> Store {
        Store::open(&self.root()).unwrap()
    }

    pub(crate) fn blobs(&self) -> Vec<PathBuf> {
        let mut paths: Vec<_> = std::fs::read_dir(self.root().join("blobs/sha256")).unwrap().map(|e| e.unwrap().path()).collect();
        paths.sort();
        paths
    }
}

pub(crate) fn publish(store: &Store, name: &str, version: &str, disk: &DiskRecord) -> kiln_model::Result<Named> {
    let config = config(name, version, std::slice::from_ref(disk));
    let annotations = BTreeMap::from([("vnd.kiln.bake".to_owned(), format!("bake-{:?}", std::time::Instant::now()))]);
    store.publish_as(&Publish { config: &config, disks: std::slice::from_ref(disk), annotations: &annotations, tags: &[] })
}

pub(crate) fn config(name: &str, version: &str, disks: &[DiskRecord]) -> Config {
    let disk =
        |disk: &DiskRecord| DiskConfig { name: disk.name.clone(), size: disk.map.size, digest: disk.digest, root: disk.name == "root" };
    Config {
        disks: disks.iter().map(disk).collect(),
        steps: vec![],
        labels: BTreeMap::from([("team".to_owned(), "shop".to_owned())]),
        ..Config::new(name, version, "amd64", Firmware::BiosUefi)
    }
}

pub(crate) fn raw(path: &Path, size: u64, blocks: &[(u64, u64)]) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (index, seed) in blocks {
        // 8 KiB of noise in a block: enough to be unlike any other.
        file.write_all_at(&noise(*seed, 8192), index * BLOCK).unwrap();
    }
}

pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..length.div_ceil(8)).flat_map(|_| next()).take(length).collect()
}

//! Disks into the store and out of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use kiln_disk::overlay::OverlayDisk;
use kiln_disk::pack::{self, Packed, Parents};
use kiln_disk::packs::{NewPack, PackSink, Packs};
use kiln_disk::raw::RawSource;
use kiln_model::Digest;
use kiln_model::base::{Base, DiskFile, DiskFormat};
use kiln_model::block::{BlockSource, ImageSink, Published};
use kiln_model::error::{Code, Result, ResultExt};
use kiln_model::image::{BlockMap, Config, DiskConfig, DiskRecord, KIND, KIND_BASE, PackRef};
use kiln_model::reference::{Pointer, Reference};

use crate::blobs::{Store, Temp};
use crate::blockmap;
use crate::publish::{Named, Publish};
use crate::resolve::used;

/// The packs of a store.
#[derive(Debug, Clone)]
pub struct StorePacks(Store);

impl StorePacks {
    /// Those of `store`.
    pub fn new(store: &Store) -> Self {
        Self(store.clone())
    }
}

impl Packs for StorePacks {
    fn open(&self, pack: &PackRef) -> Result<File> {
        self.0.open_blob(&pack.digest)
    }

    fn has(&self, pack: &PackRef) -> bool {
        self.0.has_blob(&pack.digest, pack.size)
    }
}

/// Takes new packs.
struct Sink<'a>(&'a Store);

impl PackSink for Sink<'_> {
    fn create(&mut self) -> Result<Box<dyn NewPack>> {
        let (temp, file) = self.0.temp()?;
        Ok(Box::new(Pack { store: self.0.clone(), temp, file }))
    }
}

/// One that is being written.
struct Pack {
    store: Store,
    temp: Temp,
    file: File,
}

impl NewPack for Pack {
    fn file(&self) -> &File {
        &self.file
    }

    fn sync(&mut self) -> Result<()> {
        self.file.sync_all().trying(|| "write a pack".into())
    }

    fn keep(self: Box<Self>, pack: &PackRef) -> Result<()> {
        self.store.place_blob(self.temp, &pack.digest)
    }
}

impl Store {
    fn take_apart(
        &self,
        source: &mut dyn BlockSource,
        backing: Option<&BlockMap>,
        parents: &[DiskRecord],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Packed> {
        let maps: Vec<&BlockMap> = parents.iter().map(|parent| &parent.map).collect();
        for map in maps.iter().copied().chain(backing) {
            self.hold(&map.packs)?;
        }
        let packs = StorePacks::new(self);
        pack::pack(source, &Parents { backing, maps: &maps, packs: &packs }, &mut Sink(self), progress)
    }

    /// Writes a disk to a new sparse raw file at `to`, checking every block.
    /// `progress` is called with bytes written and bytes to write. What is
    /// written is removed again when it fails.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when a block is damaged; when `to` exists or cannot be
    /// written.
    pub fn materialise(&self, record: &DiskRecord, to: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        self.hold(&record.map.packs)?;
        let file = crate::blobs::create_private(to)?;
        let done = kiln_disk::blocks::write_raw(&record.map, &StorePacks::new(self), &file, progress);
        if done.is_err() {
            drop(std::fs::remove_file(to));
        }
        done.trying(|| format!("write {}", to.display()))
    }

    /// Makes an image of a disk from elsewhere: a raw file or a qcow2 that has
    /// been checked to stand alone. `config` says what it is; its disks are
    /// filled in, and an empty version with the first digits of the disk digest.
    /// Blocks that the image of that name has already are not stored again.
    ///
    /// # Errors
    /// As [`ImageSink::write_disk`] and [`Store::publish_as`].
    pub fn import(
        &self,
        disk: &DiskFile,
        config: &Config,
        annotations: &BTreeMap<String, String>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(Named, DiskRecord)> {
        // After the source: its server has its socket in there.
        let folder;
        let mut source: Box<dyn BlockSource> = match disk.format {
            DiskFormat::Raw => Box::new(RawSource::open(&disk.path)?),
            DiskFormat::Qcow2 => {
                folder = self.temp_folder()?;
                // A disk that stands alone has one layer, which is its own.
                Box::new(OverlayDisk::open(disk, 1, folder.path(), None)?)
            }
        };
        let parents: Vec<DiskRecord> = self.predecessor(&config.name)?.into_iter().collect();
        let record = self.write_disk("root", &mut *source, None, &parents, progress)?;
        let mut config = config.clone();
        if config.version.is_empty() {
            config.version = record.digest.short();
        }
        config.disks = vec![DiskConfig { name: record.name.clone(), size: record.map.size, digest: record.digest, root: true }];
        let named = self.publish_as(&Publish { config: &config, disks: std::slice::from_ref(&record), annotations, tags: &[] })?;
        Ok((named, record))
    }
}

/// An image name made of what a template calls a base.
fn base_name(label: &str) -> String {
    let words = label.to_ascii_lowercase();
    let words: Vec<&str> = words.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let mut name = words.join("-");
    name.truncate(100);
    format!("kiln-base/{}", if name.is_empty() { "disk" } else { name.trim_end_matches('-') })
}

impl ImageSink for Store {
    fn write_disk(
        &self,
        name: &str,
        source: &mut dyn BlockSource,
        backing: Option<&BlockMap>,
        parents: &[DiskRecord],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<DiskRecord> {
        let Packed { map, new } = self.take_apart(source, backing, parents, progress)?;
        let bytes = blockmap::encode(&map)?;
        let map_digest = self.write_blob(&bytes)?;
        let stored = new.iter().map(|pack| pack.size).sum::<u64>() + bytes.len() as u64;
        Ok(DiskRecord { name: name.to_owned(), digest: map.disk_digest(), map_digest, stored, used: used(&map), map })
    }

    fn publish(&self, config: &Config, disks: &[DiskRecord], annotations: &BTreeMap<String, String>) -> Result<Published> {
        let named = self.publish_as(&Publish { config, disks, annotations, tags: &[] })?;
        Ok(Published { digest: named.digest, moved_from: named.moved.first().map(|moved| moved.from) })
    }

    fn publish_unnamed(&self, config: &Config, disks: &[DiskRecord], annotations: &BTreeMap<String, String>) -> Result<Digest> {
        self.publish_quietly(&Publish { config, disks, annotations, tags: &[] })
    }

    fn base(&self, disk: &Digest) -> Result<Option<DiskRecord>> {
        self.find_disk(disk)
    }

    fn adopt(&self, base: &Base, label: &str, progress: &mut dyn FnMut(u64, u64)) -> Result<DiskRecord> {
        let config = Config {
            name: base_name(label),
            // Filled in by `import`: the content tells bases of one label apart.
            version: String::new(),
            architecture: base.architecture.clone(),
            firmware: base.firmware,
            credentials: base.credentials == Some(true),
            disks: Vec::new(),
            base: None,
            steps: Vec::new(),
            commit: None,
            labels: BTreeMap::from([("label".to_owned(), label.to_owned())]),
            cloud: Vec::new(),
            mutable: Vec::new(),
        };
        let annotations = BTreeMap::from([(KIND.to_owned(), KIND_BASE.to_owned())]);
        self.import(base.file()?, &config, &annotations, progress).map(|(_, record)| record)
    }

    fn name_again(&self, name: &str, version: &str, image: &Digest) -> Result<Option<Digest>> {
        let to = Reference { registry: None, name: name.to_owned(), pointer: Pointer::Tag(Some(version.to_owned())) };
        match self.resolve(&to) {
            Ok(there) if there == *image => return Ok(None),
            Err(error) if error.kind() != Code::NotFound => return Err(error),
            _ => {}
        }
        let from = Reference { registry: None, name: name.to_owned(), pointer: Pointer::Digest(*image) };
        Ok(self.tag(&from, &to)?.map(|moved| moved.from))
    }

    fn predecessor(&self, name: &str) -> Result<Option<DiskRecord>> {
        let reference = Reference { registry: None, name: name.to_owned(), pointer: Pointer::Tag(None) };
        match self.resolve(&reference) {
            // A damaged one is only a missed chance: everything is stored anew.
            Ok(digest) => Ok(self.record(&digest).ok()),
            Err(error) if error.kind() == Code::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

//! A store for one image that nobody is to see: it lies in the bake's own work
//! folder and is removed with it. The packs of the base and of the image that
//! is baked again are in it as hard links, so that what is the same is neither
//! compressed nor written again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use kiln_model::base::Base;
use kiln_model::block::{BlockSource, ImageSink, Published};
use kiln_model::image::{BlockMap, Config, DiskRecord, PackRef};
use kiln_model::{Digest, Result, ResultExt as _};
use kiln_store::Store;

/// The store, and the one whose bases it uses.
pub(crate) struct Scratch {
    main: Arc<Store>,
    own: Store,
    first: DiskRecord,
}

impl Scratch {
    /// An empty one in `folder`, for an image that is likely to be much like
    /// `first` of the store `main`.
    pub(crate) fn new(main: Arc<Store>, folder: &Path, first: DiskRecord) -> Result<Self> {
        std::fs::create_dir_all(folder).trying(|| format!("make {}", folder.display()))?;
        Ok(Self { main, own: Store::open(folder)?, first })
    }

    /// What it holds.
    pub(crate) fn store(&self) -> &Store {
        &self.own
    }

    fn link(&self, packs: &[PackRef]) -> Result<()> {
        // Nobody may remove them between here and there.
        self.main.hold(packs)?;
        for pack in packs {
            let (from, to) = (self.main.blob_path(&pack.digest), self.own.blob_path(&pack.digest));
            if to.exists() || !from.exists() {
                continue;
            }
            let linked = std::fs::hard_link(&from, &to).or_else(|_| std::fs::copy(&from, &to).map(drop));
            linked.trying(|| format!("bring {} to {}", from.display(), to.display()))?;
        }
        Ok(())
    }
}

impl ImageSink for Scratch {
    fn write_disk(
        &self,
        name: &str,
        source: &mut dyn BlockSource,
        backing: Option<&BlockMap>,
        parents: &[DiskRecord],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<DiskRecord> {
        for map in parents.iter().map(|parent| &parent.map).chain(backing) {
            self.link(&map.packs)?;
        }
        self.own.write_disk(name, source, backing, parents, progress)
    }

    fn publish(&self, config: &Config, disks: &[DiskRecord], annotations: &BTreeMap<String, String>) -> Result<Published> {
        self.own.publish(config, disks, annotations)
    }

    fn publish_unnamed(&self, config: &Config, disks: &[DiskRecord], annotations: &BTreeMap<String, String>) -> Result<Digest> {
        self.own.publish_unnamed(config, disks, annotations)
    }

    fn name_again(&self, _: &str, _: &str, _: &Digest) -> Result<Option<Digest>> {
        Ok(None)
    }

    fn base(&self, disk: &Digest) -> Result<Option<DiskRecord>> {
        self.main.base(disk)
    }

    fn adopt(&self, base: &Base, label: &str, progress: &mut dyn FnMut(u64, u64)) -> Result<DiskRecord> {
        self.main.adopt(base, label, progress)
    }

    fn predecessor(&self, _: &str) -> Result<Option<DiskRecord>> {
        Ok(Some(self.first.clone()))
    }
}

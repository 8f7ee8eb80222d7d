//! The base that an image was baked from, by its disk digest.

use std::fs::File;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use kiln_model::base::{Base, BaseSource};
use kiln_model::home::Home;
use kiln_model::machine::Context;
use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Digest, Result};
use kiln_store::Store;

use crate::image_base::unpack;

/// A disk of the store in place of what a template names: the same that was
/// started from then, whatever the name means by now.
pub(crate) struct StoredBase {
    home: Home,
    label: String,
    image: Reference,
    disk: Digest,
    in_use: Mutex<Option<File>>,
}

impl StoredBase {
    /// The base with this disk digest, where the store has it whole.
    pub(crate) fn find(home: &Home, store: &Store, disk: &Digest, label: &str) -> Result<Option<Self>> {
        for digest in store.images_with(disk)? {
            if store.record(&digest).is_ok_and(|record| record.digest == *disk) {
                let name = store.image(&digest)?.config.name;
                let image = Reference { registry: None, name, pointer: Pointer::Digest(digest) };
                let (home, label) = (home.clone(), label.to_owned());
                return Ok(Some(Self { home, label, image, disk: *disk, in_use: Mutex::default() }));
            }
        }
        Ok(None)
    }
}

#[async_trait]
impl BaseSource for StoredBase {
    fn label(&self) -> String {
        self.label.clone()
    }

    fn known(&self) -> Result<Option<Digest>> {
        Ok(Some(self.disk))
    }

    async fn fetch(&self, _fresh: bool, context: &Context) -> Result<Base> {
        let store = Store::open(&self.home.store())?;
        let (base, lock) = unpack(&self.home, &store, &self.image, context).await?;
        *self.in_use.lock().unwrap_or_else(PoisonError::into_inner) = Some(lock);
        Ok(Base { label: self.label(), ..base })
    }

    fn remember(&self, _: &Base, _: &Digest) -> Result<()> {
        // The store knows it already.
        Ok(())
    }
}

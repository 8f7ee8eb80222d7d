//! Bases: the disks to start from.

use std::path::PathBuf;

use async_trait::async_trait;

use crate::Digest;
use crate::error::{Code, Error, Result};
use crate::image::{CloudImage, Firmware};
use crate::machine::Context;
use crate::reference::Reference;

/// A file that holds a disk, in a format that is known and was checked: a
/// qcow2 among them has no backing or data file from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFile {
    /// Where it is. Never written to.
    pub path: PathBuf,
    /// What it is.
    pub format: DiskFormat,
    /// Virtual size in bytes.
    pub size: u64,
}

/// Formats in which a disk can be started from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// The bytes themselves.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl DiskFormat {
    /// QEMU's name of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A base that is ready to be started from.
#[derive(Debug, Clone)]
pub struct Base {
    /// What the template called it, for people (`debian bookworm`).
    pub label: String,
    /// Its disk.
    pub disk: BaseDisk,
    /// How it starts.
    pub firmware: Firmware,
    /// Architecture in OCI's words.
    pub architecture: String,
    /// Whether its guest reads systemd credentials; `None`: not known, so
    /// every way in is offered.
    pub credentials: Option<bool>,
}

/// The disk of a base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseDisk {
    /// A file of this machine.
    File(DiskFile),
    /// An image that a cloud keeps, once for each region that has it; no byte
    /// of it is here. Never empty.
    Cloud(Vec<CloudImage>),
}

impl From<DiskFile> for BaseDisk {
    fn from(file: DiskFile) -> Self {
        Self::File(file)
    }
}

impl Base {
    /// Its disk as a file of this machine.
    ///
    /// # Errors
    /// [`Code::Base`] when it is at a cloud.
    pub fn file(&self) -> Result<&DiskFile> {
        match &self.disk {
            BaseDisk::File(file) => Ok(file),
            BaseDisk::Cloud(images) => {
                let (id, builder) = images.first().map_or(("", ""), |image| (image.id.as_str(), image.builder.as_str()));
                Err(Error::new(Code::Base, format!("the base {} is {id}, whose disk is not on this machine", self.label))
                    .next(format!("bake it with [builder.{builder}]; or bake the base with --fetch, which brings its disk here")))
            }
        }
    }

    /// Virtual size of its disk in bytes.
    pub fn size(&self) -> u64 {
        match &self.disk {
            BaseDisk::File(file) => file.size,
            BaseDisk::Cloud(images) => images.first().map_or(0, |image| image.size),
        }
    }
}

/// A way to get a base. One for each key of `[base]`.
#[async_trait]
pub trait BaseSource: Send + Sync {
    /// What the template called it, for people.
    fn label(&self) -> String;

    /// The disk digest, where it is known without doing the work; of a base
    /// that is at a cloud, [`CloudImage::identity`].
    ///
    /// # Errors
    /// When what is known cannot be read.
    fn known(&self) -> Result<Option<Digest>>;

    /// The image that it is, where it is one.
    fn image(&self) -> Option<&Reference> {
        None
    }

    /// Where the template's builder has its machines: a base at a cloud is
    /// looked for there, unless it says itself where it is.
    fn builder_is_at(&mut self, _region: &str) {}

    /// From now on it is the image of this digest, wherever its name leads to.
    /// For one that is no image this means nothing.
    fn pin(&mut self, _image: Digest) {}

    /// Gets it: from the cache, or, when it is not there or `fresh`, anew.
    /// Cached under a lock, so that two bakes do the work once. Work folders and
    /// processes are registered in the context's scope before they are made.
    ///
    /// # Errors
    /// [`crate::Code::Base`] when it cannot be used,
    /// [`crate::Code::DigestMismatch`] when it is not what it should be.
    async fn fetch(&self, fresh: bool, context: &Context) -> Result<Base>;

    /// Remembers the disk digest of a base that was fetched, now that a store
    /// has its blocks. Not called for one that is at a cloud.
    ///
    /// # Errors
    /// When that cannot be written.
    fn remember(&self, base: &Base, digest: &Digest) -> Result<()>;
}

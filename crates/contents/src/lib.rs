//! What is in an image: packages, files, bills of materials, differences.
//!
//! ```text
//!  Files (a disk, no guest) ──► packages/   dpkg · apk · rpm · os-release ──► Inventory
//!                           ├─► diff/       a walk through two disks at once
//!                           ├─► archive/    what the distribution has by now
//!                           └─► manifest/   every path, package and unit ──► drift/   a machine beside it
//!
//!  Inventory + ImageFacts ──► spdx.rs · cyclonedx.rs    a bill of materials
//!  two of everything      ──► diff/ ──► html.rs         what changed, and a page of it
//! ```
//!
//! Everything is read from the stopped disk: no guest is asked, so an image
//! cannot say of itself what is not so, and one of another architecture is read
//! like any other. What is read was written by whoever made the image: sizes
//! are bounded, and names are text for nobody before `text.rs` has seen them.
//!
//! Documents are the same for the same image: their only time is the image's
//! own, and their ids are made of its digests.

pub mod archive;
mod cyclonedx;
pub mod diff;
pub mod drift;
mod html;
mod license;
pub mod manifest;
pub mod packages;
mod purl;
mod spdx;
pub mod text;
mod version;

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use kiln_model::image::Config;
use kiln_model::machine::Files;
use kiln_model::{Code, Digest, Error, Result};

pub use html::page;
pub use packages::{Inventory, Package};

/// The program that documents name as their maker.
pub(crate) const TOOL: &str = "kiln";
/// Its version.
pub(crate) const TOOL_VERSION: &str = env!("CARGO_PKG_VERSION");
/// Where names that have to be URIs are rooted.
pub(crate) const HOME: &str = "https://github.com/kiln-images/kiln";

/// What is known of an image beside its files.
#[derive(Debug, Clone)]
pub struct ImageFacts {
    /// Its config.
    pub config: Config,
    /// Digest of its manifest; none while it is not published.
    pub digest: Option<Digest>,
    /// When it was made, RFC 3339.
    pub created: Option<String>,
}

impl ImageFacts {
    /// Digest of its root disk.
    pub fn disk(&self) -> Option<Digest> {
        self.config.disks.iter().find(|disk| disk.root).map(|disk| disk.digest)
    }

    /// When it was made, in whole seconds and UTC, as documents want it; the
    /// beginning of 1970 when nobody knows.
    pub(crate) fn time(&self) -> String {
        let time = self.created.as_deref().and_then(|text| text.parse::<jiff::Timestamp>().ok()).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }

    /// A digest over what makes a document about this image one of its own.
    pub(crate) fn identity(&self, kind: &str) -> Digest {
        let image = self.digest.or_else(|| self.disk()).map(|digest| digest.to_string()).unwrap_or_default();
        Digest::of(format!("{kind}\n{TOOL} {TOOL_VERSION}\n{}\n{}\n{image}\n", self.config.name, self.config.version))
    }

    /// Its package URL, once it has a digest.
    pub(crate) fn purl(&self) -> Option<String> {
        let name = self.config.name.rsplit('/').next().unwrap_or_default();
        let qualifiers = [("arch", self.config.architecture.as_str()), ("tag", &self.config.version)];
        self.digest.map(|digest| purl::purl("oci", "", name, &digest.to_string(), &qualifiers))
    }
}

/// A form of a bill of materials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// SPDX 2.3, JSON.
    Spdx,
    /// CycloneDX 1.6, JSON.
    CycloneDx,
    /// CycloneDX 1.5, JSON, for readers that do not know 1.6 yet.
    CycloneDx15,
}

impl Format {
    /// What people write.
    pub const NAMES: [&'static str; 3] = ["spdx", "cyclonedx", "cyclonedx-1.5"];

    /// Its media type, which is also the artifact type when it is attached.
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::Spdx => "application/spdx+json",
            Self::CycloneDx | Self::CycloneDx15 => "application/vnd.cyclonedx+json",
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "spdx" => Ok(Self::Spdx),
            "cyclonedx" | "cyclonedx-1.6" => Ok(Self::CycloneDx),
            "cyclonedx-1.5" => Ok(Self::CycloneDx15),
            _ => {
                let what = format!("`{text}` is no form of a bill of materials");
                Err(Error::new(Code::Usage, what).next(format!("there are: {}", Self::NAMES.join(", "))))
            }
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Spdx => "SPDX 2.3",
            Self::CycloneDx => "CycloneDX 1.6",
            Self::CycloneDx15 => "CycloneDX 1.5",
        })
    }
}

/// A bill of materials.
#[derive(Debug, Clone)]
pub struct Document {
    /// Its form.
    pub format: Format,
    /// JSON, indented, with a line's end.
    pub bytes: Vec<u8>,
    /// How many packages it lists.
    pub packages: usize,
    /// What could not be read, so that the document lacks it; it says so itself.
    pub notes: Vec<String>,
}

/// The bill of materials of an image, from its files.
///
/// # Errors
/// When a package database is damaged, or the disk cannot be read.
pub fn sbom(files: &dyn Files, image: &ImageFacts, format: Format) -> Result<Document> {
    Ok(document(&packages::read(files)?, image, format))
}

/// The bill of materials of what was read before.
pub fn document(inventory: &Inventory, image: &ImageFacts, format: Format) -> Document {
    let value = match format {
        Format::Spdx => spdx::document(inventory, image),
        Format::CycloneDx => cyclonedx::document(inventory, image, "1.6"),
        Format::CycloneDx15 => cyclonedx::document(inventory, image, "1.5"),
    };
    let bytes = format!("{value:#}\n").into_bytes();
    Document { format, bytes, packages: inventory.packages.len(), notes: inventory.notes.clone() }
}

/// `id`, or with a number when it is taken: names that differ on the disk may
/// be one in a document.
pub(crate) fn unique(taken: &mut HashSet<String>, id: &str) -> String {
    let mut free = id.to_owned();
    let mut number = 1;
    while !taken.insert(free.clone()) {
        number += 1;
        free = format!("{id}-{number}");
    }
    free
}

#[cfg(test)]
pub(crate) mod testing;

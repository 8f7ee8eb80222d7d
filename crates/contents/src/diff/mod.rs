//! What changed from one image to another.
//!
//! Packages are compared by their managers' databases, files by a walk through
//! both disks at once, configs and provenance field by field. The answer is
//! data; `text.rs` and `html.rs` show it, and `--json` gives it as it is.
//!
//! Nothing is ignored. What changes in every bake (caches, logs, package
//! databases) is put together in groups, so that what somebody has to look at
//! stands alone; a group says how many files it has and how much they grew.

pub(crate) mod config;
mod files;
pub(crate) mod packages;
pub(crate) mod table;

use kiln_model::machine::Files;
use kiln_model::{Digest, Result};
use serde::Serialize;
use serde_json::Value;

pub use config::Field;
pub use files::{Change, FileChange, FileFacts, FileKindName, Group, GroupName, What};
pub(crate) use files::{order, readable};
pub use packages::{PackageChange, PackageChangeKind};
pub use table::table;

use crate::ImageFacts;
use crate::packages::Inventory;

/// One of the two images, and what is known of it beside its files.
#[derive(Debug, Clone)]
pub struct Side {
    /// How people call it: `web:1.4.0`.
    pub reference: String,
    /// Its config, digest and time.
    pub facts: ImageFacts,
    /// Bytes of blocks that are not zero, over all its disks.
    pub used: u64,
    /// Bytes of all its blobs.
    pub stored: u64,
    /// What its base is called where it is known: `web-base:3`.
    pub base: Option<String>,
    /// The image of its name that was made before it.
    pub predecessor: Option<String>,
    /// The channels that point to it.
    pub channels: Vec<String>,
    /// Its provenance: a SLSA statement or the predicate of one.
    pub provenance: Option<Value>,
}

/// An image as the answer names it.
#[derive(Debug, Clone, Serialize)]
pub struct Named {
    /// As it was asked for.
    pub reference: String,
    /// Digest of its manifest.
    pub digest: Option<Digest>,
    /// Digest of its root disk.
    pub disk_digest: Option<Digest>,
    /// Its name and version, as it says itself.
    pub name: String,
    /// The version.
    pub version: String,
    /// When it was made, RFC 3339.
    pub created: Option<String>,
    /// Disk digest of its base.
    pub base_digest: Option<Digest>,
    /// What its base is called.
    pub base: Option<String>,
    /// The image of its name that was made before it.
    pub predecessor: Option<String>,
    /// The channels that point to it.
    pub channels: Vec<String>,
    /// Commit of the template's source.
    pub commit: Option<String>,
    /// Its distribution, as os-release has it.
    pub distribution: Option<String>,
    /// Virtual size of its disks in bytes.
    pub disk_size: u64,
    /// Bytes of blocks that are not zero.
    pub used: u64,
    /// Bytes of its blobs.
    pub stored: u64,
    /// Whether provenance is attached.
    pub provenance: bool,
}

/// What changed from one image to another.
#[derive(Debug, Clone, Serialize)]
pub struct Difference {
    /// The first image.
    pub from: Named,
    /// The second one.
    pub to: Named,
    /// Whether anything differs at all.
    pub differs: bool,
    /// Whether the disks' bytes are the same.
    pub same_disk: bool,
    /// Packages, in the order of their names.
    pub packages: Vec<PackageChange>,
    /// Files, in groups; within one in the order of their paths.
    pub files: Vec<Group>,
    /// Fields of the config.
    pub config: Vec<Field>,
    /// Fields of the provenance, when both have one; without times and ids,
    /// which always differ.
    pub provenance: Vec<Field>,
    /// What could not be compared, and why.
    pub notes: Vec<String>,
}

impl Difference {
    /// How many files changed, over all groups.
    pub fn file_count(&self) -> usize {
        self.files.iter().map(|group| group.added + group.removed + group.changed).sum()
    }
}

/// Compares two images. Files are `None` when the file system cannot be read;
/// then only the rest is compared, and a note says so.
///
/// # Errors
/// When a disk or a package database is damaged.
pub fn diff(from: (&Side, Option<&dyn Files>), to: (&Side, Option<&dyn Files>)) -> Result<Difference> {
    let (a, b) = (from.0, to.0);
    let same_disk = a.facts.disk().is_some() && a.facts.disk() == b.facts.disk();
    let mut notes = Vec::new();
    let (mut changes, mut groups) = (Vec::new(), Vec::new());
    let mut names = (None, None);
    if let (Some(old), Some(new)) = (from.1, to.1) {
        let mut one = crate::packages::read(old)?;
        names.0 = distribution(&one);
        if same_disk {
            // The same files: there is nothing to walk through.
            names.1.clone_from(&names.0);
        } else {
            let mut other = crate::packages::read(new)?;
            names.1 = distribution(&other);
            for (side, inventory) in [(a, &one), (b, &other)] {
                notes.extend(inventory.notes.iter().map(|note| format!("{}: {note}", side.reference)));
            }
            changes = packages::compare(&one.packages, &other.packages);
            groups = files::compare((old, &mut one), (new, &mut other), &changes)?;
        }
    } else if !same_disk {
        for (side, files) in [from, to] {
            if files.is_none() {
                notes.push(format!("{}: its file system cannot be read, so neither packages nor files are compared", side.reference));
            }
        }
    }
    let fields = config::config(a, b);
    let mut proven = Vec::new();
    match (&a.provenance, &b.provenance) {
        (Some(x), Some(y)) => proven = config::values(x, y),
        (None, None) => {}
        (Some(_), None) => notes.push(format!("{} has no provenance attached", b.reference)),
        (None, Some(_)) => notes.push(format!("{} has no provenance attached", a.reference)),
    }
    let same = same_disk && changes.is_empty() && groups.is_empty() && fields.is_empty() && proven.is_empty();
    Ok(Difference {
        from: named(a, names.0),
        to: named(b, names.1),
        differs: !same,
        same_disk,
        packages: changes,
        files: groups,
        config: fields,
        provenance: proven,
        notes,
    })
}

fn distribution(inventory: &Inventory) -> Option<String> {
    let distribution = &inventory.distribution;
    let name = if distribution.name.is_empty() { distribution.label() } else { distribution.name.clone() };
    (!name.is_empty()).then_some(name)
}

fn named(side: &Side, distribution: Option<String>) -> Named {
    let config = &side.facts.config;
    Named {
        reference: side.reference.clone(),
        digest: side.facts.digest,
        disk_digest: side.facts.disk(),
        name: config.name.clone(),
        version: config.version.clone(),
        created: side.facts.created.clone(),
        base_digest: config.base,
        base: side.base.clone(),
        predecessor: side.predecessor.clone(),
        channels: side.channels.clone(),
        commit: config.commit.clone(),
        distribution,
        disk_size: config.disks.iter().map(|disk| disk.size).sum(),
        used: side.used,
        stored: side.stored,
        provenance: side.provenance.is_some(),
    }
}

#[cfg(test)]
mod tests;

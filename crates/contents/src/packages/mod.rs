//! The packages in an image, as its package managers' own databases have them.
//!
//! | Manager | Database |
//! |---|---|
//! | dpkg | `/var/lib/dpkg/status`, and `status.d/` of images without dpkg |
//! | apk | `/lib/apk/db/installed`, or below `/usr` |
//! | rpm | `rpmdb.sqlite` in `/usr/lib/sysimage/rpm` or `/var/lib/rpm` |
//!
//! An image may have several, and all are read: a Debian image with rpm's tools
//! on it has an rpm database too.

pub(crate) mod apk;
pub(crate) mod dpkg;
mod os_release;
mod rpm;

use std::collections::HashMap;
use std::fmt;

use kiln_model::machine::{FileKind, Files};
use kiln_model::{Code, Error, Result};
use serde::Serialize;

pub use os_release::Distribution;

/// Which manager a package belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// dpkg's.
    Deb,
    /// apk's.
    Apk,
    /// rpm's.
    Rpm,
}

impl Kind {
    /// As package URLs have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deb => "deb",
            Self::Apk => "apk",
            Self::Rpm => "rpm",
        }
    }

    /// Which of two versions is newer, by the manager's own rules.
    pub fn compare(self, a: &str, b: &str) -> std::cmp::Ordering {
        match self {
            Self::Deb => crate::version::deb(a, b),
            Self::Apk => crate::version::apk(a, b),
            Self::Rpm => crate::version::rpm(a, b),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An installed package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Whose it is.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Its whole version, as its manager shows it: epoch and release included.
    pub version: String,
    /// Its architecture in the manager's words; empty when it says none.
    pub arch: String,
    /// The source package it was built from, and that one's version, which is
    /// empty where the name holds it (rpm) or it is not known.
    pub source: Option<(String, String)>,
    /// The licence it declares, in whatever words.
    pub license: Option<String>,
    /// Who maintains or packages it.
    pub maintainer: Option<String>,
    /// Its home page.
    pub homepage: Option<String>,
    /// What it is, in one line.
    pub summary: Option<String>,
    /// Bytes that it takes when installed, as it says itself.
    pub size: Option<u64>,
    /// Absolute paths of its files; empty until [`read_files`].
    pub files: Vec<Vec<u8>>,
}

impl Package {
    pub(crate) fn new(kind: Kind, name: &str, version: &str, arch: &str) -> Self {
        let (name, version, arch) = (name.to_owned(), version.to_owned(), arch.to_owned());
        let (source, license, maintainer, homepage, summary, size) = (None, None, None, None, None, None);
        Self { kind, name, version, arch, source, license, maintainer, homepage, summary, size, files: Vec::new() }
    }

    /// Its home page, when that is an address that may be linked to.
    pub(crate) fn link(&self) -> Option<&str> {
        let page = self.homepage.as_deref()?;
        let address = page.strip_prefix("https://").or_else(|| page.strip_prefix("http://"))?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-._~:/?#@!$&'()*+,;=%".contains(c);
        let host = address.starts_with(|c: char| c.is_ascii_alphanumeric());
        (host && page.len() < 500 && page.chars().all(allowed)).then_some(page)
    }
}

/// What an image says it is, and all packages in it.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// From os-release.
    pub distribution: Distribution,
    /// In the order of kind, name, version and architecture.
    pub packages: Vec<Package>,
    /// Databases that are there and cannot be read.
    pub notes: Vec<String>,
}

/// Whether the files of packages are wanted too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    Packages,
    Files,
}

/// Reads all packages.
///
/// # Errors
/// When a database or the disk is damaged.
pub fn read(files: &dyn Files) -> Result<Inventory> {
    let mut inventory = Inventory { distribution: os_release::read(files)?, ..Inventory::default() };
    inventory.packages.extend(dpkg::read(files)?);
    inventory.packages.extend(apk::read(files, Depth::Packages)?);
    inventory.packages.extend(rpm::read(files, Depth::Packages, &mut inventory.notes)?);
    let key = |p: &Package| (p.kind, p.name.clone(), p.version.clone(), p.arch.clone());
    inventory.packages.sort_by_cached_key(key);
    inventory.packages.dedup_by_key(|p| key(p));
    Ok(inventory)
}

/// Reads which files are those of the packages that are `wanted`. dpkg has a
/// list for each package, so that few are read for few.
///
/// # Errors
/// As [`read`].
pub fn read_files(files: &dyn Files, inventory: &mut Inventory, wanted: &dyn Fn(&Package) -> bool) -> Result<()> {
    let mut of: Vec<&mut Package> = inventory.packages.iter_mut().filter(|package| wanted(package)).collect();
    dpkg::read_files(files, of.iter_mut().filter(|package| package.kind == Kind::Deb).map(|package| &mut **package))?;
    let has = |kind| of.iter().any(|package| package.kind == kind);
    let mut again = if has(Kind::Apk) { apk::read(files, Depth::Files)? } else { Vec::new() };
    if has(Kind::Rpm) {
        again.extend(rpm::read(files, Depth::Files, &mut Vec::new())?);
    }
    type Id = (Kind, String, String, String);
    let id = |p: &Package| -> Id { (p.kind, p.name.clone(), p.version.clone(), p.arch.clone()) };
    let mut again: HashMap<Id, Vec<Vec<u8>>> = again.into_iter().map(|package| (id(&package), package.files)).collect();
    for package in of {
        if let Some(paths) = again.remove(&id(package)) {
            package.files = paths;
        }
    }
    Ok(())
}

/// Whether there is a regular file.
fn is_file(files: &dyn Files, path: &str) -> Result<bool> {
    Ok(matches!(files.kind(path)?, Some(FileKind::File(_))))
}

/// The first of `paths` that is a regular file. Several may name the same one,
/// where one directory is a link to another.
fn first_file<'a>(files: &dyn Files, paths: &[&'a str]) -> Result<Option<&'a str>> {
    for path in paths {
        if is_file(files, path)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn damaged(what: &str, why: &str) -> Error {
    Error::new(Code::Failed, format!("cannot read the packages of the image: {what} is damaged: {why}"))
}

/// Text that says something, without what surrounds it.
fn said(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

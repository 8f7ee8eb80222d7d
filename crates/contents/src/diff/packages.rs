//! Packages of two images.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::Serialize;

use crate::packages::{Kind, Package};

/// What happened to a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PackageChangeKind {
    /// Only the second image has it.
    Added,
    /// Only the first image has it.
    Removed,
    /// The second image has a newer version.
    Upgraded,
    /// The second image has an older version.
    Downgraded,
}

/// A package that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PackageChange {
    /// What happened to it.
    pub change: PackageChangeKind,
    /// Whose it is.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Its architecture.
    pub arch: String,
    /// The version in the first image.
    pub from: Option<String>,
    /// The version in the second image.
    pub to: Option<String>,
    /// What it is, in one line.
    pub summary: Option<String>,
    /// Bytes that it says it takes in the first image.
    pub size_from: Option<u64>,
    /// Bytes that it says it takes in the second image.
    pub size_to: Option<u64>,
}

type Sides<'a> = (Vec<&'a Package>, Vec<&'a Package>);

/// What differs, in the order of name, kind and architecture. A name may be
/// there in several versions at once (kernels of rpm): those that both have are
/// the same, and only a single one left on each side is an upgrade.
pub(crate) fn compare(from: &[Package], to: &[Package]) -> Vec<PackageChange> {
    let mut all: BTreeMap<(&str, Kind, &str), Sides<'_>> = BTreeMap::new();
    for package in from {
        all.entry((&package.name, package.kind, &package.arch)).or_default().0.push(package);
    }
    for package in to {
        all.entry((&package.name, package.kind, &package.arch)).or_default().1.push(package);
    }
    let mut changes = Vec::new();
    for (old, new) in all.into_values() {
        let gone: Vec<_> = old.iter().filter(|a| !new.iter().any(|b| a.version == b.version)).copied().collect();
        let come: Vec<_> = new.iter().filter(|b| !old.iter().any(|a| a.version == b.version)).copied().collect();
        if let ([a], [b]) = (gone.as_slice(), come.as_slice()) {
            let change = match a.kind.compare(&a.version, &b.version) {
                Ordering::Greater => PackageChangeKind::Downgraded,
                _ => PackageChangeKind::Upgraded,
            };
            changes.push(changed(change, Some(a), Some(b)));
            continue;
        }
        changes.extend(gone.into_iter().map(|package| changed(PackageChangeKind::Removed, Some(package), None)));
        changes.extend(come.into_iter().map(|package| changed(PackageChangeKind::Added, None, Some(package))));
    }
    changes
}

fn changed(change: PackageChangeKind, from: Option<&Package>, to: Option<&Package>) -> PackageChange {
    let any = to.or(from);
    PackageChange {
        change,
        kind: any.map_or(Kind::Deb, |package| package.kind),
        name: any.map(|package| package.name.clone()).unwrap_or_default(),
        arch: any.map(|package| package.arch.clone()).unwrap_or_default(),
        from: from.map(|package| package.version.clone()),
        to: to.map(|package| package.version.clone()),
        summary: any.and_then(|package| package.summary.clone()),
        size_from: from.and_then(|package| package.size),
        size_to: to.and_then(|package| package.size),
    }
}

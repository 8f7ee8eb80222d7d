//! What a machine has become since it was baked.
//!
//! ```text
//!  Manifest (at the bake) ──────────────────────────────┐
//!  script.rs ──► ssh ──► answer ──► host.rs ──► Host ───┼──► compare ──► Drift ──► table.rs
//!  a copy of its disk ──► crate::manifest ──► Host ─────┘     own.rs, pattern.rs: what may differ
//! ```
//!
//! Units are compared by what is on the disk, on both sides by the same rules;
//! of a running machine also what `/run` masks until the next boot.

mod host;
mod own;
mod pattern;
mod script;
mod table;

use std::collections::{BTreeMap, HashMap, HashSet};

use kiln_model::Digest;
use serde::Serialize;

pub use host::{By, Host};
pub use pattern::Pattern;
pub use script::{Asking, command, script};
pub use table::table;

use crate::diff::{Change, What};
use crate::manifest::{Attributes, Installed, Manifest, Node, NodeKind, UnitState, under};
use crate::packages::{Kind, Package};
use crate::text;
use own::{Free, Own};

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Its permission bits, in octal: `0644`.
    pub mode: String,
    /// Number of its user.
    pub uid: u32,
    /// Number of its group.
    pub gid: u32,
    /// Bytes of a regular file.
    pub size: u64,
    /// SHA-256 of its bytes, where it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Where a link leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Extended attributes, their values as text or in hex.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
}

impl Facts {
    fn of(node: &Node) -> Self {
        let attributes: &[_] = node.attributes.as_deref().unwrap_or_default();
        Self {
            kind: node.kind.word(),
            mode: format!("{:04o}", node.mode),
            uid: node.uid,
            gid: node.gid,
            size: node.size,
            digest: node.digest,
            target: (node.kind == NodeKind::Link).then(|| text::shown(&node.target)),
            attributes: attributes.iter().map(|(name, value)| (text::shown(name), crate::diff::readable(value))).collect(),
        }
    }
}

/// A path that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileDrift {
    /// The path, with escapes for what is no plain text (`text.rs`).
    pub path: String,
    /// What happened to it.
    pub change: Change,
    /// What of it differs, when both have it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub what: Vec<What>,
    /// In the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<Facts>,
    /// On the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<Facts>,
    /// The package that it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// The user who owns it on the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// When its content was last changed, as it says itself (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modified: Option<String>,
    /// When it was last touched at all, which nobody sets (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub touched: Option<String>,
    /// What it is a part of: a package that was changed, a file system that
    /// hides it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub because: Option<String>,
    /// Whether what it is a part of is itself among the findings.
    pub explained: bool,
}

/// A package that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PackageDrift {
    /// What happened to it: added, removed, upgraded, downgraded.
    pub change: crate::diff::PackageChangeKind,
    /// Whose it is.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Its architecture.
    pub arch: String,
    /// The version in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The version on the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Who did it, as the package manager's logs say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<By>,
    /// How many of the paths that differ are its own.
    pub files: usize,
}

/// A unit that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnitDrift {
    /// Its name.
    pub name: String,
    /// In the image, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// On the machine, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The package that brought or took it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
}

/// What differs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Drift {
    /// Whether anything does.
    pub differs: bool,
    /// Packages.
    pub packages: Vec<PackageDrift>,
    /// Units.
    pub units: Vec<UnitDrift>,
    /// Paths, in their order.
    pub files: Vec<FileDrift>,
    /// Paths that differ and may, as the template or the command line says.
    pub mutable: usize,
    /// Paths that differ on every machine.
    pub own: usize,
    /// Paths that could not be read on the machine.
    pub unread: Vec<String>,
    /// What was not compared, and why.
    pub notes: Vec<String>,
}

/// What may differ, and what is known beside the two.
#[derive(Default)]
pub struct Rules<'a> {
    /// Paths that may change.
    pub mutable: &'a [Pattern],
    /// Files that a machine may have beside those of its image, by their bytes:
    /// kiln's own way in.
    pub known: &'a [(&'a str, Digest)],
    /// Files of the image's packages that the machine no longer has.
    pub removed: HashMap<Vec<u8>, String>,
}

/// The packages that the machine no longer has.
pub fn removed_packages(image: &Manifest, host: &Host) -> Vec<Installed> {
    let there: HashSet<_> = host.manifest.packages.iter().map(|package| (package.kind, &package.name, &package.arch)).collect();
    image.packages.iter().filter(|package| !there.contains(&(package.kind, &package.name, &package.arch))).cloned().collect()
}

/// Compares a machine with its image.
pub fn compare(image: &Manifest, host: &Host, rules: &Rules<'_>) -> Drift {
    let mut drift = Drift { packages: packages(image, host), ..Drift::default() };
    drift.files(image, host, rules);
    drift.units(image, host);
    if !host.attributes {
        let why = "extended attributes (capabilities, access lists) were not compared: the machine has no getfattr (package attr)";
        drift.notes.push(why.to_owned());
    }
    if !drift.unread.is_empty() {
        let why = if host.root {
            "could not be read"
        } else {
            "could not be read without root, and the user may not use sudo without a password"
        };
        drift.notes.push(format!("{} paths {why}: what is in them was not compared", drift.unread.len()));
    }
    for package in &mut drift.packages {
        package.files = drift.files.iter().filter(|file| file.explained && file.package.as_ref() == Some(&package.name)).count();
    }
    let left = drift.files.iter().any(|file| !file.explained);
    drift.differs = left || !drift.packages.is_empty() || !drift.units.is_empty();
    drift
}

fn packages(image: &Manifest, host: &Host) -> Vec<PackageDrift> {
    let whole = |list: &[Installed]| -> Vec<Package> { list.iter().map(|p| Package::new(p.kind, &p.name, &p.version, &p.arch)).collect() };
    let changes = crate::diff::packages::compare(&whole(&image.packages), &whole(&host.manifest.packages));
    let drift = |change: crate::diff::PackageChange| PackageDrift {
        by: host.by.get(&change.name).cloned(),
        change: change.change,
        kind: change.kind,
        name: change.name,
        arch: change.arch,
        from: change.from,
        to: change.to,
        files: 0,
    };
    changes.into_iter().map(drift).collect()
}

/// Records of dpkg that change with any package.
fn is_record(path: &[u8]) -> bool {
    let files = ["status", "status-old", "available", "available-old", "diversions", "diversions-old", "statoverride", "info/format"];
    let dpkg = path.strip_prefix(b"/var/lib/dpkg/");
    dpkg.is_some_and(|rest| files.iter().any(|name| name.as_bytes() == rest) || rest.starts_with(b"triggers/"))
        || path == b"/var/lib/apt/extended_states"
        || path.starts_with(b"/var/cache/debconf/")
}

/// The package whose record a file of dpkg's is: `info/NAME[:ARCH].KIND`.
fn record_of(path: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(path.strip_prefix(b"/var/lib/dpkg/info/")?).ok()?;
    let (name, _) = name.rsplit_once('.')?;
    Some(name.split(':').next().unwrap_or(name).to_owned())
}

fn time(seconds: i64) -> Option<String> {
    jiff::Timestamp::from_second(seconds).ok().map(|time| time.to_string())
}

impl Drift {
    fn files(&mut self, image: &Manifest, host: &Host, rules: &Rules<'_>) {
        let own = Own::new();
        let changed: HashSet<String> = self.packages.iter().map(|package| package.name.clone()).collect();
        let there = &host.manifest.nodes;
        let mut paths: Vec<&Vec<u8>> = image.nodes.keys().chain(there.keys().filter(|path| !image.nodes.contains_key(*path))).collect();
        paths.sort_by(|a, b| crate::diff::order(a, b));
        for path in paths {
            let (from, to) = (image.nodes.get(path), there.get(path));
            // What a mount shows is not what is below it.
            if host.mounts.contains(path) {
                continue;
            }
            if to.is_none() && host.closed.iter().any(|folder| under(path, folder)) {
                self.unread.push(text::shown(path));
                continue;
            }
            let may = rules.mutable.iter().any(|pattern| pattern.holds(path));
            let free = own.of(path);
            // What was added below it is not known, wherever it came from.
            if !may && free.is_none() && host.closed.contains(path) {
                self.unread.push(text::shown(path));
            }
            let (change, mut what) = match (from, to) {
                (Some(from), Some(to)) => {
                    let (what, unread) = differences(path, from, to, host);
                    if unread && !may && free.is_none() {
                        self.unread.push(text::shown(path));
                    }
                    if what.is_empty() {
                        continue;
                    }
                    (Change::Changed, what)
                }
                (Some(_), None) => (Change::Removed, Vec::new()),
                _ => (Change::Added, Vec::new()),
            };
            if may {
                self.mutable += 1;
                continue;
            }
            let is_known =
                |to: &Node| rules.known.iter().any(|(name, digest)| name.as_bytes() == path.as_slice() && to.digest == Some(*digest));
            let own = match free {
                Some(Free::All) => true,
                Some(Free::Content) => {
                    what.retain(|what| !matches!(what, What::Content | What::Target));
                    what.is_empty()
                }
                Some(Free::Presence) => change == Change::Added,
                None => change == Change::Added && to.is_some_and(is_known),
            };
            if own {
                self.own += 1;
                continue;
            }
            let mut file = FileDrift {
                path: text::shown(path),
                change,
                what,
                from: from.map(Facts::of),
                to: to.map(Facts::of),
                package: None,
                owner: to.map(|to| host.user(to.uid)),
                modified: host.times.get(path).and_then(|times| time(times.content)),
                touched: host.times.get(path).and_then(|times| time(times.inode)),
                because: None,
                explained: false,
            };
            self.explain(&mut file, path, &changed, host, rules, from.is_some() && to.is_some());
            self.files.push(file);
        }
    }

    /// Whose a path is, and what it is a part of.
    fn explain(&self, file: &mut FileDrift, path: &[u8], changed: &HashSet<String>, host: &Host, rules: &Rules<'_>, both: bool) {
        let directory = |facts: &Option<Facts>| facts.as_ref().is_some_and(|facts| facts.kind == NodeKind::Directory.word());
        // A directory that both have belongs to many packages.
        if !(both && directory(&file.from) && directory(&file.to)) {
            let owner = host.owners.get(path).or_else(|| rules.removed.get(path)).cloned();
            file.package = owner.or_else(|| record_of(path).filter(|name| changed.contains(name)));
        }
        if let Some(package) = file.package.as_ref().filter(|package| changed.contains(*package)) {
            file.because = Some(format!("package {package}"));
            file.explained = true;
        } else if !changed.is_empty() && is_record(path) {
            file.because = Some("packages were changed".to_owned());
            file.explained = true;
        } else if let Some(mount) = host.mounts.iter().filter(|mount| mount.len() > 1 && under(path, mount)).max_by_key(|mount| mount.len())
        {
            file.because = Some(format!("hidden by what is mounted at {}", text::shown(mount)));
        }
    }

    fn units(&mut self, image: &Manifest, host: &Host) {
        let (old, new) = (&image.units, &host.manifest.units);
        let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).chain(&host.masks).collect();
        let changed: HashSet<&String> = self.packages.iter().map(|package| &package.name).collect();
        let mut found = Vec::new();
        for name in names {
            let (from, to) = (old.get(name), new.get(name));
            let runtime = host.masks.contains(name) && to.is_none_or(|unit| unit.state != UnitState::Masked);
            if from == to && !runtime {
                continue;
            }
            let mut words = to.map(|unit| unit.words());
            if runtime {
                words = Some("masked until the next boot".to_owned());
            }
            let package = (from.is_none() || to.is_none())
                .then(|| {
                    let folders = ["/usr/lib/systemd/system", "/lib/systemd/system"];
                    folders.iter().find_map(|folder| host.owners.get(format!("{folder}/{name}").as_bytes()).cloned())
                })
                .flatten()
                .filter(|package| changed.contains(package));
            found.push(UnitDrift { name: text::shown(name.as_bytes()), from: from.map(|unit| unit.words()), to: words, package });
        }
        self.units = found;
    }
}

/// What of a path differs, and whether its bytes should have been read and
/// were not.
fn differences(path: &[u8], from: &Node, to: &Node, host: &Host) -> (Vec<What>, bool) {
    let (mut what, mut unread) = (Vec::new(), false);
    if from.kind != to.kind {
        what.push(What::Type);
    } else if from.kind == NodeKind::Link && from.target != to.target {
        what.push(What::Target);
    } else if from.kind == NodeKind::File {
        match (from.digest, to.digest) {
            _ if from.size != to.size => what.push(What::Content),
            (Some(a), Some(b)) if a != b => what.push(What::Content),
            (Some(_), None) if to.size > 0 => {
                // Not read on purpose: nobody has touched it since the bake.
                let old = |since| host.times.get(path).is_some_and(|times| times.inode <= since);
                unread = !host.since.is_some_and(old);
            }
            _ => {}
        }
    }
    // A link's own mode means nothing.
    if from.mode != to.mode && from.kind != NodeKind::Link && to.kind != NodeKind::Link {
        what.push(What::Mode);
    }
    if (from.uid, from.gid) != (to.uid, to.gid) {
        what.push(What::Owner);
    }
    if let (Some(a), Some(b)) = (&from.attributes, &to.attributes)
        && attributes(a) != attributes(b)
    {
        what.push(What::Attributes);
    }
    (what, unread)
}

/// Attributes that people and packages set; the kernel keeps others for itself.
fn attributes(all: &Attributes) -> Vec<&(Vec<u8>, Vec<u8>)> {
    all.iter().filter(|(name, _)| !name.starts_with(b"trusted.") && !name.starts_with(b"system.data")).collect()
}

#[cfg(test)]
mod tests;

//! Files of two images.
//!
//! Both disks are walked in the same order, so that the two walks are merged
//! as they come and only what differs is kept. A file's bytes are looked at
//! last: not when sizes differ, and not when both lie in the same blocks at the
//! same places ([`Entry::place`]), which is so for nearly everything that a
//! common base brought along.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap, HashSet};

use kiln_model::machine::{Entry, EntryKind, Files, Walk};
use kiln_model::{Digest, Result, ResultExt as _};
use serde::Serialize;

use super::PackageChange;
use crate::packages::{Inventory, Kind, Package};
use crate::text;

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// Only the second image has it.
    Added,
    /// Only the first image has it.
    Removed,
    /// Both have it, and it differs.
    Changed,
}

/// What of a file differs. Times are not looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// A file became a link, a link a directory, and so on.
    Type,
    /// The permission bits.
    Mode,
    /// User or group.
    Owner,
    /// The bytes.
    Content,
    /// Where a link leads.
    Target,
    /// A device's numbers.
    Device,
    /// Extended attributes: capabilities, access lists, labels.
    Attributes,
}

/// What a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileKindName {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A block device.
    BlockDevice,
    /// A character device.
    CharacterDevice,
    /// A named pipe.
    Pipe,
    /// A socket.
    Socket,
}

impl FileKindName {
    fn of(kind: &EntryKind) -> Self {
        match kind {
            EntryKind::File => Self::File,
            EntryKind::Directory => Self::Directory,
            EntryKind::Link(_) => Self::Link,
            EntryKind::BlockDevice(_) => Self::BlockDevice,
            EntryKind::CharacterDevice(_) => Self::CharacterDevice,
            EntryKind::Pipe => Self::Pipe,
            EntryKind::Socket => Self::Socket,
        }
    }
}

/// A file in one of the images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileFacts {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: FileKindName,
    /// Its permission bits, in octal: `0644`.
    pub mode: String,
    /// Number of its user.
    pub uid: u32,
    /// Number of its group.
    pub gid: u32,
    /// Bytes of a regular file.
    pub size: u64,
    /// When it was last changed, seconds since 1970.
    pub modified: i64,
    /// Where a link leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Extended attributes, their values as text or, where that is none, in hex.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
    /// SHA-256 of its bytes, where they had to be read to compare them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

impl FileFacts {
    fn of(entry: &Entry) -> Self {
        Self {
            kind: FileKindName::of(&entry.kind),
            mode: format!("{:04o}", entry.mode),
            uid: entry.uid,
            gid: entry.gid,
            size: entry.size,
            modified: entry.modified,
            target: if let EntryKind::Link(target) = &entry.kind { Some(text::shown(target)) } else { None },
            attributes: entry.attributes.iter().flatten().map(|(name, value)| (text::shown(name), readable(value))).collect(),
            digest: None,
        }
    }
}

/// An attribute's value: labels are text, capabilities are not.
pub(crate) fn readable(value: &[u8]) -> String {
    let text = value.strip_suffix(&[0]).unwrap_or(value);
    if text.iter().all(|byte| (0x20..0x7f).contains(byte)) { text::shown(text) } else { format!("0x{}", kiln_model::digest::hex(value)) }
}

/// A path that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileChange {
    /// The path, with escapes for what is no plain text (`text.rs`).
    pub path: String,
    /// What happened to it.
    pub change: Change,
    /// What of it differs, when both have it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub what: Vec<What>,
    /// In the first image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<FileFacts>,
    /// In the second image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<FileFacts>,
    /// The package that it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
}

/// Why files are shown together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupName {
    /// For no other reason: these are what to look at.
    Other,
    /// They belong to packages that changed.
    Packages,
    /// They are a package manager's own records.
    PackageDatabase,
    /// They are made from other files, and made anew when those change.
    Caches,
    /// Python's compiled modules, likewise.
    Bytecode,
    /// They are logs.
    Logs,
}

impl GroupName {
    /// What the group is, in front of people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Other => "files",
            Self::Packages => "files of packages that changed",
            Self::PackageDatabase => "records of package managers",
            Self::Caches => "caches",
            Self::Bytecode => "compiled Python",
            Self::Logs => "logs",
        }
    }
}

/// Files that differ for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Which.
    pub group: GroupName,
    /// How many were added.
    pub added: usize,
    /// How many were removed.
    pub removed: usize,
    /// How many changed.
    pub changed: usize,
    /// Bytes of its files in the first image.
    pub size_from: u64,
    /// Bytes of its files in the second image.
    pub size_to: u64,
    /// The files, in the order of their paths.
    pub files: Vec<FileChange>,
}

impl Group {
    fn empty(group: GroupName) -> Self {
        Self { group, added: 0, removed: 0, changed: 0, size_from: 0, size_to: 0, files: Vec::new() }
    }
}

/// Which file belongs to which package, of one image, and whether that package
/// changed.
#[derive(Default)]
struct Owners(HashMap<Vec<u8>, (String, bool)>);

/// What tells a package from others of an image, whatever its version.
type Id<'a> = (Kind, &'a str, &'a str);

/// Where `/lib` and its like are links into `/usr`, packages may still name
/// the old paths.
const MERGED: [&[u8]; 6] = [b"/bin/", b"/sbin/", b"/lib/", b"/lib32/", b"/lib64/", b"/libx32/"];

impl Owners {
    /// Of the packages of an image that are `wanted`.
    fn read(files: &dyn Files, inventory: &mut Inventory, changed: &HashSet<Id<'_>>, wanted: &dyn Fn(&Id<'_>) -> bool) -> Result<Self> {
        crate::packages::read_files(files, inventory, &|package| wanted(&id(package)))?;
        let mut owners = Self::default();
        for package in &mut inventory.packages {
            let has_changed = changed.contains(&id(package));
            for path in std::mem::take(&mut package.files) {
                // Directories belong to many packages: one that changed is enough.
                let owner = owners.0.entry(path).or_insert_with(|| (package.name.clone(), has_changed));
                owner.1 |= has_changed;
            }
        }
        Ok(owners)
    }

    fn of(&self, path: &[u8]) -> Option<&(String, bool)> {
        self.0.get(path).or_else(|| {
            let short = path.strip_prefix(b"/usr".as_slice())?;
            MERGED.iter().any(|prefix| short.starts_with(prefix)).then(|| self.0.get(short))?
        })
    }
}

fn id(package: &Package) -> Id<'_> {
    (package.kind, &package.name, &package.arch)
}

fn noise(path: &[u8]) -> Option<GroupName> {
    let under = |folders: &[&str]| {
        folders.iter().any(|folder| path.strip_prefix(folder.as_bytes()).is_some_and(|rest| rest.is_empty() || rest[0] == b'/'))
    };
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix.as_bytes()));
    // Databases first: `/var/lib/apt` is both.
    if under(&["/var/lib/dpkg", "/var/lib/apt", "/var/lib/rpm", "/usr/lib/sysimage/rpm", "/lib/apk/db", "/usr/lib/apk/db", "/var/lib/dnf"])
    {
        Some(GroupName::PackageDatabase)
    } else if under(&["/var/log"]) {
        Some(GroupName::Logs)
    } else if ends(&[".pyc", ".pyo"]) || name == b"__pycache__" {
        Some(GroupName::Bytecode)
    } else if under(&["/var/cache", "/root/.cache", "/etc/ld.so.cache", "/usr/share/info/dir", "/usr/lib/udev/hwdb.bin", "/var/lib/man-db"])
        || ends(&["mimeinfo.cache", "mime.cache", "icon-theme.cache", "gschemas.compiled", "giomodule.cache", "loaders.cache"])
        || path.starts_with(b"/home/") && path.split(|byte| *byte == b'/').nth(3) == Some(b".cache")
    {
        Some(GroupName::Caches)
    } else {
        None
    }
}

/// The order of a walk: names one by one, since `/` sorts after `-` and `.`.
pub(crate) fn order(a: &[u8], b: &[u8]) -> Ordering {
    a.split(|byte| *byte == b'/').cmp(b.split(|byte| *byte == b'/'))
}

/// Something that differs, before it is in a group.
struct Found {
    path: Vec<u8>,
    change: FileChange,
    size_from: u64,
    size_to: u64,
    /// A directory that both have: it belongs to many packages, and that it has
    /// another mode is no matter of one of them.
    shared: bool,
}

/// What differs, in groups; those without files are left out.
pub(super) fn compare(
    (from, old): (&dyn Files, &mut Inventory),
    (to, new): (&dyn Files, &mut Inventory),
    packages: &[PackageChange],
) -> Result<Vec<Group>> {
    let found = walk_both(from, to)?;
    if found.is_empty() {
        return Ok(Vec::new());
    }
    // Of the first image only what is not as it is in the second one.
    let changed: HashSet<Id<'_>> = packages.iter().map(|c| (c.kind, c.name.as_str(), c.arch.as_str())).collect();
    let old_owners = Owners::read(from, old, &changed, &|id| changed.contains(id))?;
    let new_owners = Owners::read(to, new, &changed, &|_| true)?;
    let mut groups: BTreeMap<GroupName, Group> = BTreeMap::new();
    for Found { path, mut change, size_from, size_to, shared } in found {
        let owner = new_owners.of(&path).or_else(|| old_owners.of(&path)).filter(|_| !shared);
        change.package = owner.map(|(name, _)| name.clone());
        let group = match (owner, noise(&path)) {
            (Some((_, true)), _) => GroupName::Packages,
            (_, Some(group)) => group,
            _ => GroupName::Other,
        };
        let group = groups.entry(group).or_insert_with(|| Group::empty(group));
        match change.change {
            Change::Added => group.added += 1,
            Change::Removed => group.removed += 1,
            Change::Changed => group.changed += 1,
        }
        group.size_from += size_from;
        group.size_to += size_to;
        group.files.push(change);
    }
    Ok(groups.into_values().collect())
}

fn walk_both(from: &dyn Files, to: &dyn Files) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let (mut old, mut new) = (from.walk()?, to.walk()?);
    let (mut x, mut y) = (next(&mut old)?, next(&mut new)?);
    loop {
        let order = match (&x, &y) {
            (None, None) => return Ok(found),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(x), Some(y)) => order(&x.path, &y.path),
        };
        let a = if order.is_le() { std::mem::replace(&mut x, next(&mut old)?) } else { None };
        let b = if order.is_ge() { std::mem::replace(&mut y, next(&mut new)?) } else { None };
        let Some(change) = compare_one(from, a.as_ref(), to, b.as_ref())? else { continue };
        let size = |entry: &Option<Entry>| entry.as_ref().map_or(0, |entry| entry.size);
        let directory = |entry: &Option<Entry>| entry.as_ref().is_some_and(|entry| entry.kind == EntryKind::Directory);
        let (size_from, size_to, shared) = (size(&a), size(&b), directory(&a) && directory(&b));
        let path = a.or(b).map(|entry| entry.path).unwrap_or_default();
        found.push(Found { path, change, size_from, size_to, shared });
    }
}

fn next(walk: &mut Walk<'_>) -> Result<Option<Entry>> {
    walk.next().transpose()
}

fn compare_one(from: &dyn Files, a: Option<&Entry>, to: &dyn Files, b: Option<&Entry>) -> Result<Option<FileChange>> {
    let (mut old, mut new) = (a.map(FileFacts::of), b.map(FileFacts::of));
    let (change, what) = match (a, b) {
        (Some(a), Some(b)) => {
            let mut what = Vec::new();
            if old.as_ref().map(|facts| facts.kind) != new.as_ref().map(|facts| facts.kind) {
                what.push(What::Type);
            } else if a.kind == EntryKind::File {
                if a.size != b.size {
                    what.push(What::Content);
                } else if a.size > 0 && (a.place.is_none() || a.place != b.place) {
                    let (x, y) = (digest(from, &a.path)?, digest(to, &b.path)?);
                    if x != y {
                        what.push(What::Content);
                        old = old.map(|facts| FileFacts { digest: Some(x), ..facts });
                        new = new.map(|facts| FileFacts { digest: Some(y), ..facts });
                    }
                }
            } else if a.kind != b.kind {
                what.push(if matches!(a.kind, EntryKind::Link(_)) { What::Target } else { What::Device });
            }
            // A link's own mode means nothing.
            if a.mode != b.mode && !matches!(b.kind, EntryKind::Link(_)) {
                what.push(What::Mode);
            }
            if (a.uid, a.gid) != (b.uid, b.gid) {
                what.push(What::Owner);
            }
            // Where one walk does not know them, nothing can be said.
            if a.attributes.is_some() && b.attributes.is_some() && a.attributes != b.attributes {
                what.push(What::Attributes);
            }
            if what.is_empty() {
                return Ok(None);
            }
            (Change::Changed, what)
        }
        (Some(_), None) => (Change::Removed, Vec::new()),
        (None, Some(_)) => (Change::Added, Vec::new()),
        (None, None) => return Ok(None),
    };
    let path = text::shown(a.or(b).map_or(b"".as_slice(), |entry| &entry.path));
    Ok(Some(FileChange { path, change, what, from: old, to: new, package: None }))
}

/// The digest of a file's bytes, which are read a piece at a time.
fn digest(files: &dyn Files, path: &[u8]) -> Result<Digest> {
    let what = || format!("read {} of the image", text::shown(path));
    let mut reader = files.open(path)?;
    Digest::of_reader(&mut *reader).map(|(digest, _)| digest).trying(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_what_it_looks_like() {
        for (path, group) in [
            ("/var/cache/apt/pkgcache.bin", Some(GroupName::Caches)),
            ("/var/cachet", None),
            ("/usr/lib/python3/x/__pycache__/y.cpython-311.pyc", Some(GroupName::Bytecode)),
            ("/var/lib/dpkg/status", Some(GroupName::PackageDatabase)),
            ("/var/log", Some(GroupName::Logs)),
            ("/home/eve/.cache/x", Some(GroupName::Caches)),
            ("/home/.cache", None),
            ("/etc/ld.so.cache", Some(GroupName::Caches)),
            ("/etc/passwd", None),
        ] {
            assert_eq!(noise(path.as_bytes()), group, "{path}");
        }
    }

    #[test]
    fn paths_are_in_the_order_of_a_walk() {
        let mut paths = ["/a", "/a/b", "/a/b/c", "/a-b", "/a.b", "/b"].map(str::as_bytes).to_vec();
        paths.reverse();
        paths.sort_by(|a, b| order(a, b));
        assert_eq!(paths, ["/a", "/a/b", "/a/b/c", "/a-b", "/a.b", "/b"].map(str::as_bytes));
    }
}

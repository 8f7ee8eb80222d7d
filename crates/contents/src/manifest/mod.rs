//! The manifest of an image: every path, package and unit in it.
//!
//! ```text
//!  Files (a disk, no guest) ──► make.rs ──► Manifest ──► layers ──► attached to the image
//!                                 │ known.rs: digests of files that lie where they lay before
//!                                 └ units.rs: what systemd is told to start, and what is masked
//! ```
//!
//! It is what `crate::drift` compares a machine with, long after the bake and
//! without the disk. It is text, a line for each path, and holds no times, so
//! that the same content gives the same bytes; each part of the file system is
//! a layer of its own, so that of two versions only what differs is stored and
//! sent. The format is described in `docs/drift.md`.

mod known;
mod make;
pub mod units;

use std::collections::BTreeMap;
use std::io::Read as _;

use kiln_model::machine::EntryKind;
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};

pub use known::Known;
pub use make::{Surveyed, digest_files, survey};
pub use units::{Unit, UnitState};

use crate::packages::{Kind, Package};

/// `artifactType` of a manifest that is attached to an image.
pub const MANIFEST: &str = "application/vnd.kiln.manifest.v1";
/// Media type of a layer with paths.
pub const FILES: &str = "application/vnd.kiln.manifest.files.v1+zstd";
/// Media type of the layer with packages.
pub const PACKAGES: &str = "application/vnd.kiln.manifest.packages.v1+zstd";
/// Media type of the layer with units.
pub const UNITS: &str = "application/vnd.kiln.manifest.units.v1+zstd";
/// Annotation of a layer with paths: of which part of the file system they are.
pub const PART: &str = "vnd.kiln.part";

/// Places whose content is of the moment: what is below them is in no manifest.
pub const VOLATILE: [&str; 6] = ["/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp"];

/// The parts, the deeper ones first; what is in none of them is `rest`.
const PARTS: [(&str, &str); 6] =
    [("etc", "/etc"), ("usr-lib", "/usr/lib"), ("usr-share", "/usr/share"), ("usr", "/usr"), ("var-lib", "/var/lib"), ("var", "/var")];
const REST: &str = "rest";

/// How hard zstd tries.
const LEVEL: i32 = 9;
/// Most bytes of a layer when it is unpacked.
const UNPACKED_LIMIT: u64 = 1 << 30;

/// What a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A block device.
    Block,
    /// A character device.
    Character,
    /// A named pipe.
    Pipe,
    /// A socket.
    Socket,
}

impl NodeKind {
    /// The letter of `find -printf %y`.
    pub const fn letter(self) -> char {
        match self {
            Self::File => 'f',
            Self::Directory => 'd',
            Self::Link => 'l',
            Self::Block => 'b',
            Self::Character => 'c',
            Self::Pipe => 'p',
            Self::Socket => 's',
        }
    }

    /// The kind of a letter.
    pub const fn of_letter(letter: &[u8]) -> Option<Self> {
        Some(match letter {
            b"f" => Self::File,
            b"d" => Self::Directory,
            b"l" => Self::Link,
            b"b" => Self::Block,
            b"c" => Self::Character,
            b"p" => Self::Pipe,
            b"s" => Self::Socket,
            _ => return None,
        })
    }

    /// In words.
    pub const fn word(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Directory => "directory",
            Self::Link => "link",
            Self::Block => "block device",
            Self::Character => "character device",
            Self::Pipe => "pipe",
            Self::Socket => "socket",
        }
    }
}

/// Extended attributes with their values, in the order of their names.
pub type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: NodeKind,
    /// Permission bits, with set-user-id, set-group-id and sticky.
    pub mode: u16,
    /// Number of its user.
    pub uid: u32,
    /// Number of its group.
    pub gid: u32,
    /// Bytes of a regular file; 0 for anything else.
    pub size: u64,
    /// SHA-256 of a regular file's bytes, where they were read.
    pub digest: Option<Digest>,
    /// Where a link leads.
    pub target: Vec<u8>,
    /// Extended attributes; `None` where they are not known.
    pub attributes: Option<Attributes>,
}

/// An installed package, as far as it is compared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Installed {
    /// Its manager.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Its architecture; empty when it says none.
    pub arch: String,
    /// Its whole version.
    pub version: String,
}

impl From<&Package> for Installed {
    fn from(package: &Package) -> Self {
        Self { kind: package.kind, name: package.name.clone(), arch: package.arch.clone(), version: package.version.clone() }
    }
}

/// Everything that is compared of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// By path, as the bytes that are on the disk.
    pub nodes: BTreeMap<Vec<u8>, Node>,
    /// In their order.
    pub packages: Vec<Installed>,
    /// By name.
    pub units: BTreeMap<String, Unit>,
}

/// One layer of a manifest, compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// What it is.
    pub media_type: &'static str,
    /// Of which part of the file system; none for packages and units.
    pub name: Option<&'static str>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Manifest {
    /// The manifest as layers: the same ones for the same content.
    ///
    /// # Errors
    /// When zstd fails, which it does only without memory.
    pub fn parts(&self) -> Result<Vec<Part>> {
        let mut texts: BTreeMap<&'static str, Vec<u8>> = BTreeMap::new();
        for (path, node) in &self.nodes {
            write_node(texts.entry(part_of(path)).or_default(), path, node);
        }
        let mut parts = Vec::new();
        let mut add = |media_type, name, text: &[u8]| -> Result<()> {
            let bytes = zstd::bulk::compress(text, LEVEL).trying(|| "compress the image's manifest".into())?;
            parts.push(Part { media_type, name, bytes });
            Ok(())
        };
        for (name, text) in &texts {
            add(FILES, Some(*name), text)?;
        }
        let mut text = String::new();
        for Installed { kind, name, arch, version } in &self.packages {
            text.push_str(&format!("{kind}\t{}\t{}\t{}\n", field(name), field(arch), field(version)));
        }
        add(PACKAGES, None, text.as_bytes())?;
        let mut text = String::new();
        for (name, unit) in &self.units {
            text.push_str(&format!("{}\t{}\t{}\t{}\n", field(name), unit.state.word(), list(&unit.wanted_by), list(&unit.drop_ins)));
        }
        add(UNITS, None, text.as_bytes())?;
        Ok(parts)
    }

    /// The manifest that layers with these media types hold; layers of other
    /// types are passed over.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when one is damaged.
    pub fn of_parts<'a>(parts: impl Iterator<Item = (&'a str, &'a [u8])>) -> Result<Self> {
        let mut manifest = Self::default();
        for (media_type, bytes) in parts {
            let read: fn(&mut Self, &[u8]) -> Option<()> = match media_type {
                FILES => read_node,
                PACKAGES => read_package,
                UNITS => read_unit,
                _ => continue,
            };
            let text = unpack(bytes)?;
            for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                read(&mut manifest, line).ok_or_else(|| damaged("a line of it makes no sense"))?;
            }
        }
        if manifest.nodes.is_empty() {
            return Err(damaged("it lists no path"));
        }
        Ok(manifest)
    }
}

fn damaged(why: &str) -> Error {
    Error::new(Code::Corrupt, format!("the manifest of the image is damaged: {why}"))
}

fn unpack(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let what = || "unpack the image's manifest".into();
    let mut reader = zstd::Decoder::new(bytes).trying(what)?.take(UNPACKED_LIMIT + 1);
    reader.read_to_end(&mut text).trying(what)?;
    if text.len() as u64 > UNPACKED_LIMIT { Err(damaged("it is too large")) } else { Ok(text) }
}

/// Whether `path` is `folder` or below it.
pub(crate) fn under(path: &[u8], folder: &[u8]) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

/// Whether what is at `path` is of the moment.
pub fn is_volatile(path: &[u8]) -> bool {
    VOLATILE.iter().any(|folder| path.len() > folder.len() && under(path, folder.as_bytes()))
}

fn part_of(path: &[u8]) -> &'static str {
    PARTS.iter().find(|(_, folder)| under(path, folder.as_bytes())).map_or(REST, |(name, _)| name)
}

/// A field without what separates fields and lines.
fn field(text: &str) -> String {
    text.replace(['\t', '\n', ','], " ")
}

fn list(names: &[String]) -> String {
    names.iter().map(|name| field(name)).collect::<Vec<_>>().join(",")
}

/// Bytes with `\xNN` for control characters and backslashes.
fn escape(into: &mut Vec<u8>, bytes: &[u8]) {
    for byte in bytes {
        match byte {
            0..0x20 | 0x7f | b'\\' => into.extend(format!("\\x{byte:02x}").bytes()),
            _ => into.push(*byte),
        }
    }
}

fn unescape(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte == b'\\' {
            let (code, after) = after.split_first_chunk::<3>()?;
            let digits = std::str::from_utf8(&code[1..]).ok().filter(|_| code[0] == b'x')?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = after;
        } else {
            bytes.push(*byte);
        }
    }
    Some(bytes)
}

/// `f 0644 0 0 12 <sha256> <attributes> <path>`, separated by tabs. A link has
/// its target in place of the digest.
fn write_node(text: &mut Vec<u8>, path: &[u8], node: &Node) {
    text.extend(format!("{}\t{:o}\t{}\t{}\t{}\t", node.kind.letter(), node.mode, node.uid, node.gid, node.size).bytes());
    match (&node.kind, &node.digest) {
        (NodeKind::Link, _) => escape(text, &node.target),
        (_, Some(digest)) => text.extend(digest.hex().bytes()),
        (_, None) => {}
    }
    text.push(b'\t');
    match &node.attributes {
        None => text.push(b'?'),
        Some(attributes) => {
            for (index, (name, value)) in attributes.iter().enumerate() {
                if index > 0 {
                    text.push(b',');
                }
                text.extend(kiln_model::digest::hex(name).bytes());
                text.push(b'=');
                text.extend(kiln_model::digest::hex(value).bytes());
            }
        }
    }
    text.push(b'\t');
    escape(text, path);
    text.push(b'\n');
}

pub(crate) fn number<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

pub(crate) fn octal(text: &[u8]) -> Option<u16> {
    u16::from_str_radix(std::str::from_utf8(text).ok()?, 8).ok().filter(|mode| *mode <= 0o7777)
}

pub(crate) fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// A digest of 64 hex digits.
pub(crate) fn digest(text: &[u8]) -> Option<Digest> {
    Some(Digest::from_bytes(unhex(text)?.try_into().ok()?))
}

fn read_node(manifest: &mut Manifest, line: &[u8]) -> Option<()> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b'\t').collect();
    let [kind, mode, uid, gid, size, content, attributes, path] = fields.as_slice() else { return None };
    let kind = NodeKind::of_letter(kind)?;
    let link = kind == NodeKind::Link;
    let attribute = |text: &[u8]| {
        let at = text.iter().position(|byte| *byte == b'=')?;
        Some((unhex(&text[..at])?, unhex(&text[at + 1..])?))
    };
    let node = Node {
        kind,
        mode: octal(mode)?,
        uid: number(uid)?,
        gid: number(gid)?,
        size: number(size)?,
        digest: if link || content.is_empty() { None } else { Some(digest(content)?) },
        target: if link { unescape(content)? } else { Vec::new() },
        attributes: match *attributes {
            b"?" => None,
            b"" => Some(Vec::new()),
            text => Some(text.split(|byte| *byte == b',').map(attribute).collect::<Option<_>>()?),
        },
    };
    let path = unescape(path).filter(|path| path.starts_with(b"/"))?;
    manifest.nodes.insert(path, node);
    Some(())
}

fn read_package(manifest: &mut Manifest, line: &[u8]) -> Option<()> {
    let fields: Vec<&str> = std::str::from_utf8(line).ok()?.split('\t').collect();
    let [kind, name, arch, version] = fields.as_slice() else { return None };
    let kind = [Kind::Deb, Kind::Apk, Kind::Rpm].into_iter().find(|known| known.name() == *kind)?;
    manifest.packages.push(Installed { kind, name: (*name).into(), arch: (*arch).into(), version: (*version).into() });
    Some(())
}

fn read_unit(manifest: &mut Manifest, line: &[u8]) -> Option<()> {
    let fields: Vec<&str> = std::str::from_utf8(line).ok()?.split('\t').collect();
    let [name, state, wanted_by, drop_ins] = fields.as_slice() else { return None };
    let names = |text: &str| text.split(',').filter(|name| !name.is_empty()).map(ToOwned::to_owned).collect();
    let unit = Unit { state: UnitState::of_word(state)?, wanted_by: names(wanted_by), drop_ins: names(drop_ins) };
    manifest.units.insert((*name).to_owned(), unit);
    Some(())
}

impl NodeKind {
    pub(crate) fn of(kind: &EntryKind) -> Self {
        match kind {
            EntryKind::File => Self::File,
            EntryKind::Directory => Self::Directory,
            EntryKind::Link(_) => Self::Link,
            EntryKind::BlockDevice(_) => Self::Block,
            EntryKind::CharacterDevice(_) => Self::Character,
            EntryKind::Pipe => Self::Pipe,
            EntryKind::Socket => Self::Socket,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

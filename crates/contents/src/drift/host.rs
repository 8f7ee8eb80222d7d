//! A machine as it is: what the script said of it, or what is on a copy of its
//! disk.

use std::collections::{BTreeMap, HashMap, HashSet};

use kiln_model::machine::{FileKind, Files};
use kiln_model::{Code, Error, Result};
use serde::Serialize;

use crate::manifest::{Attributes, Installed, Manifest, Node, NodeKind, digest, is_volatile, number, octal, unhex, units};
use crate::packages::{self, Kind, Package};

/// Who changed a package, as the package manager's logs say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct By {
    /// The command.
    pub command: String,
    /// The user who asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// When, in the machine's own time.
    pub at: String,
}

/// When a path was last changed, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Times {
    /// Its content.
    pub(super) content: i64,
    /// Its inode: content, mode, owner, name.
    pub(super) inode: i64,
}

/// A machine.
#[derive(Debug, Default)]
pub struct Host {
    /// What is on it. Digests may be missing.
    pub manifest: Manifest,
    /// What it calls itself.
    pub name: String,
    /// Whether everything could be read.
    pub root: bool,
    /// Name and version of the image, as `/etc/kiln-release` says them.
    pub release: Option<(String, String)>,
    /// Whether extended attributes are known.
    pub attributes: bool,
    /// What was left unread because its inode is older than this.
    pub(super) since: Option<i64>,
    pub(super) mounts: HashSet<Vec<u8>>,
    pub(super) closed: Vec<Vec<u8>>,
    /// The packages of files.
    pub(super) owners: HashMap<Vec<u8>, String>,
    pub(super) users: HashMap<u32, String>,
    pub(super) by: HashMap<String, By>,
    pub(super) masks: Vec<String>,
    pub(super) times: HashMap<Vec<u8>, Times>,
}

impl Host {
    /// What the script's answer says.
    ///
    /// # Errors
    /// When the machine lacks what the script needs, or the answer is not whole.
    pub fn of_answer(answer: &[u8], nonce: &str, since: Option<i64>) -> Result<Self> {
        let sections = sections(answer, nonce);
        if let Some(tool) = sections.get("unfit") {
            let what = format!("the machine has no {}, which it takes to look at its files", text(tool).trim());
            return Err(Error::new(Code::Missing, what).next("compare a copy of its disk: `kiln drift REF --disk FILE`"));
        }
        if !sections.contains_key("end") {
            let what = "the machine's answer ended in the middle".to_owned();
            return Err(Error::new(Code::Infrastructure, what)
                .next("try again; if the connection is cut after a while, raise its ServerAliveInterval"));
        }
        let section = |name: &str| sections.get(name).copied().unwrap_or_default();
        let head = text(section("host"));
        let mut head = head.lines();
        let mut host = Self { root: head.next() == Some("0"), since, ..Self::default() };
        host.name = head.next().unwrap_or_default().to_owned();
        host.release = release(&text(section("release")));
        host.mounts = text(section("mounts")).lines().filter_map(|line| Some(unescape_octal(line.split(' ').nth(4)?.as_bytes()))).collect();
        host.users = users(&text(section("passwd")));
        host.nodes(section("nodes"))?;
        host.closed = section("closed").split(|byte| *byte == 0).filter(|path| !path.is_empty()).map(<[u8]>::to_vec).collect();
        host.digests(section("digests"));
        if let Some(attributes) = sections.get("attributes") {
            host.attributes = true;
            host.read_attributes(attributes);
        }
        host.lists(section("lists"));
        host.masks = section("masks").split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(text).collect();
        host.logs(&text(section("apt")), &text(section("dpkg-log")));
        let mut found: Vec<Package> = packages::dpkg::parse(section("dpkg"));
        found.extend(packages::apk::parse(section("apk"), packages::Depth::Packages));
        for line in text(section("rpm")).lines() {
            if let [name, arch, version] = line.split('\t').collect::<Vec<_>>().as_slice() {
                found.push(Package::new(Kind::Rpm, name, version, arch));
            }
        }
        host.packages(&found);
        host.manifest.units = units::read(&host.manifest.nodes);
        Ok(host)
    }

    /// What is on a disk, of which everything was read.
    ///
    /// # Errors
    /// When the disk or a package database is damaged.
    pub fn of_disk(files: &dyn Files, manifest: Manifest) -> Result<Self> {
        let read = |path: &str| -> Result<String> {
            match files.kind(path)? {
                Some(FileKind::File(size)) if size < 32 << 20 => Ok(text(&files.read(path)?)),
                _ => Ok(String::new()),
            }
        };
        let attributes = manifest.nodes.values().any(|node| node.attributes.is_some());
        let mut host = Self { manifest, root: true, attributes, ..Self::default() };
        host.name = read("/etc/hostname")?.trim().to_owned();
        host.release = release(&read("/etc/kiln-release")?);
        host.users = users(&read("/etc/passwd")?);
        host.logs(&read("/var/log/apt/history.log")?, &read("/var/log/dpkg.log")?);
        let mut inventory = packages::read(files)?;
        packages::read_files(files, &mut inventory, &|_| true)?;
        for package in &inventory.packages {
            for path in &package.files {
                host.own(path, &package.name);
            }
        }
        Ok(host)
    }

    fn packages(&mut self, found: &[Package]) {
        self.manifest.packages = found.iter().map(Installed::from).collect();
        self.manifest.packages.sort();
        self.manifest.packages.dedup();
    }

    fn nodes(&mut self, section: &[u8]) -> Result<()> {
        let mut records = section.split(|byte| *byte == 0);
        let strange = || Error::new(Code::Failed, "the machine's answer makes no sense: its `find` is not GNU's");
        while let (Some(facts), Some(path), Some(target)) = (records.next(), records.next(), records.next()) {
            if path == b"/" || is_volatile(path) {
                continue;
            }
            let fields: Vec<&[u8]> = facts.split(|byte| *byte == b' ').collect();
            let [kind, mode, uid, gid, size, modified, changed] = fields.as_slice() else { return Err(strange()) };
            let node = || {
                let kind = NodeKind::of_letter(kind)?;
                let link = kind == NodeKind::Link;
                let size: u64 = number(size)?;
                Some(Node {
                    kind,
                    mode: if link { 0o777 } else { octal(mode)? },
                    uid: number(uid)?,
                    gid: number(gid)?,
                    size: if kind == NodeKind::File { size } else { 0 },
                    digest: None,
                    target: if link { target.to_vec() } else { Vec::new() },
                    attributes: None,
                })
            };
            // Gone while it was looked at: as if it had never been there.
            if *kind == b"U" || *kind == b"?" {
                continue;
            }
            let node = node().ok_or_else(strange)?;
            let seconds = |text: &[u8]| number(text.split(|byte| *byte == b'.').next()?);
            if let (Some(content), Some(inode)) = (seconds(modified), seconds(changed)) {
                self.times.insert(path.to_vec(), Times { content, inode });
            }
            self.manifest.nodes.insert(path.to_vec(), node);
        }
        Ok(())
    }

    /// `<digest>  <path>`; with a backslash before it when the path has escapes.
    fn digests(&mut self, section: &[u8]) {
        for line in section.split(|byte| *byte == b'\n') {
            let (escaped, line) = line.strip_prefix(b"\\").map_or((false, line), |rest| (true, rest));
            let Some((sum, path)) = line.split_at_checked(64) else { continue };
            let Some(path) = path.strip_prefix(b"  ").or_else(|| path.strip_prefix(b" *")) else { continue };
            let path = if escaped { unescape_names(path) } else { path.to_vec() };
            if let (Some(node), Some(digest)) = (self.manifest.nodes.get_mut(&path), digest(sum)) {
                node.digest = Some(digest);
            }
        }
    }

    /// Blocks of `# file: PATH` and `NAME=0xHEX`; who has none is not listed.
    fn read_attributes(&mut self, section: &[u8]) {
        let mut found: HashMap<Vec<u8>, Attributes> = HashMap::new();
        let mut current: Option<Vec<u8>> = None;
        for line in section.split(|byte| *byte == b'\n') {
            if let Some(path) = line.strip_prefix(b"# file: ") {
                current = Some(unescape_octal(path));
            } else if let (Some(path), Some(at)) = (&current, line.iter().position(|byte| *byte == b'=')) {
                let value = line[at + 1..].strip_prefix(b"0x").and_then(unhex).unwrap_or_default();
                found.entry(path.clone()).or_default().push((unescape_octal(&line[..at]), value));
            }
        }
        for (path, node) in &mut self.manifest.nodes {
            let mut attributes = found.remove(path).unwrap_or_default();
            attributes.sort();
            node.attributes = Some(attributes);
        }
    }

    /// `/var/lib/dpkg/info/NAME[:ARCH].list:PATH`.
    pub(super) fn lists(&mut self, section: &[u8]) {
        for line in section.split(|byte| *byte == b'\n') {
            let Some(rest) = line.strip_prefix(b"/var/lib/dpkg/info/") else { continue };
            let Some(at) = rest.windows(6).position(|part| part == b".list:") else { continue };
            let name = text(&rest[..at]);
            let name = name.split(':').next().unwrap_or_default();
            self.own(&rest[at + 6..], name);
        }
    }

    /// Packages from before `/usr` was merged name their files by the links.
    pub(super) fn merged(&self, path: &[u8]) -> Vec<u8> {
        let rest = path.strip_prefix(b"/").unwrap_or_default();
        let end = rest.iter().position(|byte| *byte == b'/').map_or(path.len(), |at| at + 1);
        let link = self.manifest.nodes.get(&path[..end]).filter(|node| node.kind == NodeKind::Link && end < path.len());
        match link {
            Some(node) => [b"/", node.target.strip_prefix(b"/").unwrap_or(&node.target), &path[end..]].concat(),
            None => path.to_vec(),
        }
    }

    fn own(&mut self, path: &[u8], package: &str) {
        let path = self.merged(path);
        // A directory belongs to whoever puts something into it.
        if self.manifest.nodes.get(&path).is_some_and(|node| node.kind == NodeKind::Directory) && self.owners.contains_key(&path) {
            return;
        }
        self.owners.insert(path, package.to_owned());
    }

    pub(super) fn logs(&mut self, apt: &str, dpkg: &str) {
        // dpkg's own log first: apt's knows more.
        for line in dpkg.lines() {
            if let [day, time, what @ ("install" | "upgrade" | "remove" | "purge"), package, ..] =
                line.split(' ').collect::<Vec<_>>().as_slice()
            {
                let name = package.split(':').next().unwrap_or_default().to_owned();
                self.by.insert(name, By { command: format!("dpkg ({what})"), user: None, at: format!("{day} {time}") });
            }
        }
        for block in apt.split("\n\n") {
            let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            let Some(at) = field("Start-Date") else { continue };
            let at = at.split_whitespace().collect::<Vec<_>>().join(" ");
            let command = field("Commandline").unwrap_or("apt").to_owned();
            let by = By { command, user: field("Requested-By").map(ToOwned::to_owned), at };
            for list in ["Install", "Upgrade", "Downgrade", "Reinstall", "Remove", "Purge"].into_iter().filter_map(field) {
                for package in list.split("), ") {
                    let name = package.split([':', ' ']).next().unwrap_or_default().to_owned();
                    // dpkg may have been called since.
                    if self.by.get(&name).is_none_or(|other| !later(&other.at, &by.at)) {
                        self.by.insert(name, by.clone());
                    }
                }
            }
        }
    }

    /// The name of a user, or the number.
    pub(super) fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }
}

/// Whether a time of a log is more than an hour after another: dpkg's lines of
/// a long call of apt are later than its beginning.
fn later(a: &str, b: &str) -> bool {
    let parse = |text: &str| text.parse::<jiff::civil::DateTime>().ok();
    match (parse(a), parse(b)) {
        (Some(a), Some(b)) => b.checked_add(jiff::SignedDuration::from_hours(1)).is_ok_and(|b| a > b),
        _ => a > b,
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn sections<'a>(answer: &'a [u8], nonce: &str) -> BTreeMap<&'a str, &'a [u8]> {
    let needle = format!("\0{nonce} ").into_bytes();
    let mut starts = Vec::new();
    let mut at = 0;
    // NULs are few beside the bytes of an answer.
    while let Some(zero) = answer[at..].iter().position(|byte| *byte == 0).map(|zero| at + zero) {
        if answer[zero..].starts_with(&needle) {
            starts.push(zero);
        }
        at = zero + 1;
    }
    let ends = starts.iter().skip(1).copied().chain([answer.len()]);
    let mut sections = BTreeMap::new();
    for (start, end) in starts.iter().zip(ends) {
        let inside = &answer[start + needle.len()..end];
        if let Some(zero) = inside.iter().position(|byte| *byte == 0)
            && let Ok(name) = std::str::from_utf8(&inside[..zero])
        {
            sections.insert(name, &inside[zero + 1..]);
        }
    }
    sections
}

fn release(text: &str) -> Option<(String, String)> {
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(|value| value.trim_matches('"').to_owned())
    };
    Some((field("NAME")?, field("VERSION")?))
}

fn users(passwd: &str) -> HashMap<u32, String> {
    let user = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        Some((fields.nth(1)?.parse().ok()?, name))
    };
    passwd.lines().filter_map(user).collect()
}

/// `\NNN` in octal, as mountinfo and getfattr write it.
fn unescape_octal(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        let code = after
            .first_chunk::<3>()
            .filter(|_| *byte == b'\\')
            .and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 8).ok());
        if let Some(code) = code {
            bytes.push(code);
            rest = &after[3..];
        } else {
            bytes.push(*byte);
        }
    }
    bytes
}

/// `\n`, `\r` and `\\`, as sha256sum writes them.
fn unescape_names(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.iter();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'\\' => match rest.next() {
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(other) => *other,
                None => b'\\',
            },
            _ => *byte,
        });
    }
    bytes
}

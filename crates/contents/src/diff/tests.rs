//! Differences of disks made by `mke2fs -d`, read as images are.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_disk::files::{DiskFiles, Pool};
use kiln_disk::raw::RawSource;
use kiln_model::block::{BLOCK, BlockSource, Extent};
use kiln_model::image::{Block, BlockMap, Place, StepConfig};
use kiln_model::key::Key;
use serde_json::json;

use super::*;
use crate::testing::{facts, find_program};

const STATUS: &str =
    "Package: shell\nStatus: install ok installed\nVersion: 1.0-1\nArchitecture: amd64\nInstalled-Size: 100\nDescription: it runs\n\n";

/// Bytes of a disk: a little more than what is put there.
const SIZE: u64 = 32 << 20;

/// A disk, and how many bytes of it were read.
struct Disk {
    path: PathBuf,
    read: Arc<AtomicU64>,
}

struct Counted(RawSource, Arc<AtomicU64>);

impl BlockSource for Counted {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn extents(&mut self) -> Result<Vec<Extent>> {
        self.0.extents()
    }
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.1.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.0.read_at(offset, buffer)
    }
}

struct Memory(Vec<u8>);

impl BlockSource for Memory {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn extents(&mut self) -> Result<Vec<Extent>> {
        Ok(Vec::new())
    }
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let at = offset as usize;
        buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
        Ok(())
    }
}

impl Disk {
    /// A file system of what is in `tree`; `features` as mke2fs takes them.
    fn make(tree: &Path, path: PathBuf, features: &str) -> Option<Self> {
        Self::sized(tree, path, features, SIZE)
    }

    fn sized(tree: &Path, path: PathBuf, features: &str, size: u64) -> Option<Self> {
        let program = find_program("mke2fs")?;
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        let mut command = Command::new(program);
        command.env("E2FSPROGS_FAKE_TIME", "1700000000");
        // The same ids and seeds, so that two disks differ in their files alone.
        let id = "11111111-2222-3333-4444-555555555555";
        command.args(["-q", "-t", "ext4", "-O", features, "-U", id, "-E", &format!("hash_seed={id},root_owner=0:0"), "-d"]);
        let output = command.arg(tree).arg(&path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(Self { path, read: Arc::default() })
    }

    /// Changes inodes, as root could.
    fn debugfs(&self, commands: &[&str]) {
        let program = find_program("debugfs").unwrap();
        for command in commands {
            let output = Command::new(&program).args(["-w", "-R", command]).arg(&self.path).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    fn map(&self) -> BlockMap {
        let bytes = std::fs::read(&self.path).unwrap();
        let block = |chunk: &[u8]| Block { digest: Digest::of(chunk), place: Place::Zero };
        BlockMap { size: bytes.len() as u64, packs: Vec::new(), blocks: bytes.chunks(BLOCK as usize).map(block).collect() }
    }

    fn files(&self) -> DiskFiles {
        let source = Counted(RawSource::open(&self.path).unwrap(), self.read.clone());
        DiskFiles::of_image(Box::new(source), self.map(), &Pool::default()).unwrap().unwrap()
    }
}

fn write(root: &Path, path: &str, text: impl AsRef<[u8]>) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn base(root: &Path) {
    write(root, "etc/os-release", "ID=debian\nVERSION_ID=12\nPRETTY_NAME=\"Debian 12\"\n");
    write(root, "etc/passwd", "root:x:0:0::/root:/bin/sh\n");
    write(root, "etc/shadow", "root:*::\n");
    write(root, "etc/same", "same");
    write(root, "var/lib/dpkg/status", STATUS);
    write(root, "var/lib/dpkg/info/shell.list", "/.\n/bin\n/bin/sh\n/etc\n");
    // Named by its package as before `/usr` was merged.
    write(root, "usr/bin/sh", "one");
    write(root, "usr/bin/tool", "tool");
    std::os::unix::fs::symlink("usr/bin", root.join("bin")).unwrap();
    std::os::unix::fs::symlink("a".repeat(100), root.join("long-link")).unwrap();
    write(root, "srv/old/index.html", "x");
    write(root, "var/cache/x.bin", "1");
    // Large, and the same in both.
    let noise: Vec<u8> = (0..8_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    write(root, "usr/lib/large", &noise);
}

fn side(reference: &str, disk: &str) -> Side {
    let mut facts = facts();
    facts.config.disks[0].digest = Digest::of(disk);
    facts.digest = Some(Digest::of(reference));
    Side {
        reference: reference.into(),
        facts,
        used: 9 << 20,
        stored: 5 << 20,
        base: Some("web-base:3".into()),
        predecessor: None,
        channels: Vec::new(),
        provenance: None,
    }
}

fn find<'a>(difference: &'a Difference, path: &str) -> (GroupName, &'a FileChange) {
    let all = difference.files.iter().flat_map(|group| group.files.iter().map(move |file| (group.group, file)));
    let found = all.into_iter().find(|(_, file)| file.path == path);
    found.unwrap_or_else(|| panic!("{path} is not among {:#?}", difference.files))
}

/// Two disks that differ in every way a file can.
fn two(folder: &Path) -> Option<(Disk, Disk)> {
    let (one, other) = (folder.join("one"), folder.join("other"));
    base(&one);
    base(&other);
    write(&one, "etc/type", "file");
    std::os::unix::fs::symlink("same", other.join("etc/type")).unwrap();
    std::os::unix::fs::symlink("a", one.join("etc/link")).unwrap();
    std::os::unix::fs::symlink("b", other.join("etc/link")).unwrap();
    write(&other, "etc/passwd", "root:x:0:0::/root:/bin/rs\n");
    write(&other, "usr/bin/sh", "two!");
    write(&other, "var/cache/x.bin", "2");
    write(&other, "var/log/app.log", "line");
    write(&other, "opt/app/__pycache__/a.pyc", "x");
    for number in 0..5 {
        write(&other, &format!("opt/new/{number}"), "x");
    }
    std::fs::remove_dir_all(other.join("srv/old")).unwrap();
    std::fs::set_permissions(other.join("etc/shadow"), PermissionsExt::from_mode(0o4755)).unwrap();
    let hostile: [&[u8]; 4] = [b"<img src=x onerror=alert(1)>", b"two\nlines", b"\x1b[2Jclear", b"not\xfftext"];
    for name in hostile {
        std::fs::write(other.join("etc").join(OsStr::from_bytes(name)), "x").unwrap();
    }
    let status = format!(
        "{}Package: <b>new</b>\nStatus: install ok installed\nVersion: 1:2\nArchitecture: all\nDescription: <script>alert(1)</script>\n",
        STATUS.replace("1.0-1", "1.0-2")
    );
    write(&other, "var/lib/dpkg/status", status);
    let disks = (
        Disk::make(
            &one,
            folder.join("one.raw"),
            "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
        )?,
        Disk::make(
            &other,
            folder.join("other.raw"),
            "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
        )?,
    );
    // What mke2fs makes has the owner of whoever runs this.
    for disk in [&disks.0, &disks.1] {
        disk.debugfs(&["set_inode_field /etc/same uid 0", "set_inode_field /etc/same gid 0"]);
    }
    disks.0.debugfs(&["ea_set /usr/bin/tool user.note one"]);
    disks.1.debugfs(&["ea_set /usr/bin/tool user.note two", "ea_set /usr/bin/tool security.capability \\001\\000\\000\\002"]);
    disks.0.debugfs(&["set_inode_field /usr/lib/large uid 7"]);
    disks.1.debugfs(&["set_inode_field /usr/lib/large uid 70000"]);
    Some(disks)
}

#[test]
fn two_disks() {
    let folder = tempfile::tempdir().unwrap();
    let Some((one, other)) = two(folder.path()) else { return };
    let (a, b) = (one.files(), other.files());
    let found = diff((&side("web:1", "1"), Some(&a)), (&side("web:2", "2"), Some(&b))).unwrap();
    assert!(found.differs && !found.same_disk && found.notes.is_empty());

    let packages: Vec<_> = found.packages.iter().map(|p| (p.change, p.name.as_str(), p.from.as_deref(), p.to.as_deref())).collect();
    assert_eq!(
        packages,
        [(PackageChangeKind::Added, "<b>new</b>", None, Some("1:2")), (PackageChangeKind::Upgraded, "shell", Some("1.0-1"), Some("1.0-2")),]
    );

    for (path, group, change, what) in [
        ("/etc/passwd", GroupName::Other, Change::Changed, vec![What::Content]),
        ("/etc/type", GroupName::Other, Change::Changed, vec![What::Type]),
        ("/etc/link", GroupName::Other, Change::Changed, vec![What::Target]),
        ("/etc/shadow", GroupName::Other, Change::Changed, vec![What::Mode]),
        ("/usr/bin/tool", GroupName::Other, Change::Changed, vec![What::Attributes]),
        ("/usr/lib/large", GroupName::Other, Change::Changed, vec![What::Owner]),
        ("/usr/bin/sh", GroupName::Packages, Change::Changed, vec![What::Content]),
        ("/var/cache/x.bin", GroupName::Caches, Change::Changed, vec![What::Content]),
        ("/var/lib/dpkg/status", GroupName::PackageDatabase, Change::Changed, vec![What::Content]),
        ("/var/log/app.log", GroupName::Logs, Change::Added, vec![]),
        ("/opt/app/__pycache__/a.pyc", GroupName::Bytecode, Change::Added, vec![]),
        ("/srv/old", GroupName::Other, Change::Removed, vec![]),
        ("/srv/old/index.html", GroupName::Other, Change::Removed, vec![]),
        ("/etc/two\\nlines", GroupName::Other, Change::Added, vec![]),
        ("/etc/\\u{1b}[2Jclear", GroupName::Other, Change::Added, vec![]),
        ("/etc/not\\xfftext", GroupName::Other, Change::Added, vec![]),
    ] {
        let (there, file) = find(&found, path);
        assert_eq!((there, file.change, &file.what), (group, change, &what), "{path}");
    }
    let (_, large) = find(&found, "/usr/lib/large");
    assert_eq!((large.from.as_ref().unwrap().uid, large.to.as_ref().unwrap().uid), (7, 70000));
    assert_eq!(find(&found, "/etc/shadow").1.to.as_ref().unwrap().mode, "4755");
    assert_eq!(find(&found, "/usr/bin/sh").1.package.as_deref(), Some("shell"));
    let passwd = find(&found, "/etc/passwd").1;
    assert_eq!(passwd.to.as_ref().unwrap().digest, Some(Digest::of("root:x:0:0::/root:/bin/rs\n")));
    let every: Vec<_> = found.files.iter().flat_map(|group| &group.files).map(|file| file.path.as_str()).collect();
    assert!(!every.contains(&"/etc/same") && !every.contains(&"/usr/bin") && !every.contains(&"/long-link"), "{every:?}");
    assert_eq!(found.file_count(), every.len());

    let text = table(&found, false);
    assert!(text.contains("+ /opt/ ") && text.contains("7 more inside") && !text.contains("/opt/new/3"), "{text}");
    assert!(text.contains("user.note one → two") && text.contains("security.capability 0x"), "{text}");
    assert!(text.contains("mode 0644 → 4755") && text.contains("owner 7:") && text.contains("caches: 1 changed"), "{text}");
    assert!(!text.contains('\u{1b}') && text.contains("/etc/two\\nlines"), "{text}");
    let all = table(&found, true);
    assert!(all.contains("/opt/new/3") && all.contains("/var/cache/x.bin"), "{all}");

    let page = crate::page(&found);
    for markup in ["<img", "<b>new", "<script", "\u{1b}", "http-equiv=\"refresh", "src=\"", "url("] {
        assert!(!page.contains(markup), "{markup}");
    }
    assert!(page.contains("&lt;img src=x onerror=alert(1)&gt;") && page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert!(page.contains("Content-Security-Policy") && page.contains("width=device-width"));
    assert_eq!(page, crate::page(&found));
}

/// The large file lies in the same blocks of both disks: it is not read. Where
/// the blocks' digests are not known, it is, and the answer is the same.
#[test]
fn what_lies_in_the_same_blocks_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    base(&tree);
    let Some(one) = Disk::make(&tree, folder.path().join("one.raw"), "extent,^metadata_csum") else { return };
    std::fs::copy(&one.path, folder.path().join("other.raw")).unwrap();
    let other = Disk { path: folder.path().join("other.raw"), read: Arc::default() };
    other.debugfs(&["set_inode_field /etc/passwd mode 0100600"]);
    let (x, y) = (side("web:1", "1"), side("web:2", "2"));
    let found = diff((&x, Some(&one.files())), (&y, Some(&other.files()))).unwrap();
    assert_eq!(found.file_count(), 1, "{:#?}", found.files);
    assert_eq!(find(&found, "/etc/passwd").1.what, [What::Mode]);
    let read = one.read.load(Ordering::Relaxed);
    assert!(read < 6 << 20, "{read} bytes were read");

    let plain = |disk: &Disk| DiskFiles::open(Box::new(Counted(RawSource::open(&disk.path).unwrap(), disk.read.clone()))).unwrap().unwrap();
    let again = diff((&x, Some(&plain(&one))), (&y, Some(&plain(&other)))).unwrap();
    assert_eq!(serde_json::to_value(&again).unwrap(), serde_json::to_value(&found).unwrap());
    assert!(one.read.load(Ordering::Relaxed) > read + (8 << 20));
}

/// Both ways to walk see the same.
#[test]
fn a_file_system_without_extents_gives_the_same_walk() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    base(&tree);
    std::fs::write(tree.join(OsStr::from_bytes(b"not\xfftext")), "x").unwrap();
    let Some(new) = Disk::make(&tree, folder.path().join("new.raw"), "extent") else { return };
    let old = Disk::make(&tree, folder.path().join("old.raw"), "^extent,^64bit,^flex_bg").unwrap();
    let walk = |disk: &Disk| {
        let files = disk.files();
        let entries: Vec<_> = files.walk().unwrap().map(|entry| entry.unwrap()).collect();
        entries
    };
    let (by_inode, by_name) = (walk(&new), walk(&old));
    assert!(by_inode.iter().any(|entry| entry.place.is_some()) && by_name.iter().all(|entry| entry.place.is_none()));
    let without_place = |entries: Vec<kiln_model::machine::Entry>| -> Vec<_> {
        entries.into_iter().map(|entry| kiln_model::machine::Entry { place: None, position: 0, attributes: None, ..entry }).collect()
    };
    assert_eq!(without_place(by_inode), without_place(by_name));
}

/// Whatever is changed in the places that a walk goes by, it ends, with entries
/// or an error.
#[test]
fn a_damaged_disk_ends_the_walk() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    base(&tree);
    std::fs::remove_file(tree.join("usr/lib/large")).unwrap();
    let Some(disk) = Disk::sized(&tree, folder.path().join("disk.raw"), "^has_journal,^metadata_csum,^resize_inode", 2 << 20) else {
        return;
    };
    let whole = std::fs::read(&disk.path).unwrap();
    // Where something is: the super block, descriptors, inodes, directories.
    let used: Vec<usize> = (1024..whole.len()).filter(|at| whole[*at] != 0).collect();
    let map = disk.map();
    let mut seed = 1_u64;
    let mut failed = 0;
    let mut bytes = whole.clone();
    for _ in 0..400 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = used[(seed >> 33) as usize % used.len()];
        bytes[at] = (seed >> 20) as u8;
        let opened = DiskFiles::of_image(Box::new(Memory(bytes.clone())), map.clone(), &Pool::default());
        bytes[at] = whole[at];
        match opened {
            Ok(Some(files)) => {
                failed += usize::from(files.walk().map(|walk| walk.take(100_000).any(|entry| entry.is_err())).unwrap_or(true))
            }
            Ok(None) | Err(_) => failed += 1,
        }
    }
    assert!(failed > 0, "nothing was hit");
}

#[test]
fn fields_of_the_config_and_the_provenance() {
    let (mut a, mut b) = (side("web:1", "1"), side("web:2", "1"));
    let key = |text: &str| Digest::of(text).to_string().parse::<Key>().unwrap();
    let step = |name: &str, text: &str| StepConfig { name: name.into(), key: key(text) };
    a.facts.config.steps = vec![step("packages", "1"), step("site", "2"), step("gone", "3")];
    b.facts.config.steps = vec![step("site", "2"), step("packages", "9"), step("new", "4")];
    b.facts.config.version = "1.5.0".into();
    b.facts.config.labels.insert("team".into(), "shop".into());
    b.facts.config.commit = None;
    let statement = |commit: &str, time: &str| {
        json!({ "subject": [{ "name": commit }], "predicate": {
            "buildDefinition": { "resolvedDependencies": [{ "uri": "git+https://example.org/x", "digest": { "gitCommit": commit } }, { "uri": "base", "digest": { "sha256": "1" } }] },
            "runDetails": { "builder": { "id": "kiln" }, "metadata": { "startedOn": time } },
        } })
    };
    (a.provenance, b.provenance) = (Some(statement("abc", "1")), Some(statement("def", "2")));
    let found = diff((&a, None), (&b, None)).unwrap();
    assert!(found.differs && found.same_disk && found.notes.is_empty());
    let fields: Vec<_> = found.config.iter().map(|f| f.field.as_str()).collect();
    assert_eq!(fields, ["version", "commit", "label team", "step packages", "step new", "step gone", "order of the steps"]);
    assert_eq!((found.config[5].to.as_deref(), found.config[4].from.as_deref()), (None, None));
    let provenance: Vec<_> = found.provenance.iter().map(|f| (f.field.as_str(), f.from.as_deref(), f.to.as_deref())).collect();
    assert_eq!(
        provenance,
        [("buildDefinition.resolvedDependencies[git+https://example.org/x].digest.gitCommit", Some("abc"), Some("def"))]
    );

    let same = diff((&a, None), (&a, None)).unwrap();
    assert!(!same.differs && table(&same, false).contains("Nothing differs") && crate::page(&same).contains("Nothing differs"));
    let mut other = side("web:3", "3");
    other.provenance = None;
    let notes = diff((&a, None), (&other, None)).unwrap().notes;
    assert!(
        notes.iter().any(|note| note.contains("cannot be read")) && notes.iter().any(|note| note.contains("no provenance")),
        "{notes:?}"
    );
}

#[test]
fn several_versions_at_once() {
    use crate::packages::{Kind, Package};
    let kernel = |version: &str| Package::new(Kind::Rpm, "kernel", version, "x86_64");
    let changes = |a: &[&str], b: &[&str]| -> Vec<_> {
        let (a, b): (Vec<_>, Vec<_>) = (a.iter().map(|v| kernel(v)).collect(), b.iter().map(|v| kernel(v)).collect());
        packages::compare(&a, &b).into_iter().map(|c| (c.change, c.from, c.to)).collect()
    };
    use PackageChangeKind::{Added, Downgraded, Removed, Upgraded};
    assert_eq!(changes(&["1-1", "2-1"], &["2-1", "3-1"]), [(Upgraded, Some("1-1".into()), Some("3-1".into()))]);
    assert_eq!(changes(&["2-1"], &["2-1", "3-1"]), [(Added, None, Some("3-1".into()))]);
    assert_eq!(changes(&["1:1-1"], &["2-1"]), [(Downgraded, Some("1:1-1".into()), Some("2-1".into()))]);
    assert_eq!(changes(&["1-1", "2-1"], &["3-1"]).iter().map(|c| c.0).collect::<Vec<_>>(), [Removed, Removed, Added]);
    assert!(changes(&["1-1"], &["1-1"]).is_empty());
}

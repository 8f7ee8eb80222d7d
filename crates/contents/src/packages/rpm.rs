//! rpm's database: an SQLite file whose table `Packages` holds one header blob
//! for each package.
//!
//! A blob is a header of the package format without its magic (rpm
//! documentation, "RPM v4 header format"): the number of index entries and of
//! data bytes, the entries of 16 bytes each (tag, type, offset, count), then the
//! data; all numbers big-endian.
//!
//! SQLite works on files, so the database is copied to a temporary folder first,
//! with its log of what was not merged into it yet. It was written by whoever
//! made the image, so SQLite is told to trust nothing in it, and only a plain
//! table is read.
//!
//! Before 2020 the database was in Berkeley DB's format, and SUSE has one of its
//! own (ndb): a note says that they are there and were not read.

use std::io::Write as _;
use std::path::Path;

use kiln_model::machine::{FileKind, Files};
use kiln_model::{Code, Error, Result, ResultExt as _};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::{Depth, Kind, Package, damaged, said};

/// Where it is: Fedora and SUSE have moved it to `/usr`, with a link at the old
/// place.
const FOLDERS: [&str; 2] = ["/usr/lib/sysimage/rpm", "/var/lib/rpm"];
const DATABASE: &str = "rpmdb.sqlite";

/// The largest database that is read, in bytes.
const LIMIT: u64 = 2 << 30;
/// The largest header, in bytes, and most entries in it: rpm's own bounds.
const HEADER_LIMIT: usize = 256 << 20;
const ENTRY_LIMIT: usize = 1 << 16;

pub(super) fn read(files: &dyn Files, depth: Depth, notes: &mut Vec<String>) -> Result<Vec<Package>> {
    let mut packages = Vec::new();
    for folder in FOLDERS {
        if files.kind(folder)? != Some(FileKind::Directory) {
            continue;
        }
        for (name, format) in [("Packages", "Berkeley DB"), ("Packages.db", "ndb")] {
            if super::is_file(files, &format!("{folder}/{name}"))? {
                notes.push(format!(
                    "{folder}/{name} is an rpm database in the format {format}, which cannot be read: its packages are missing here"
                ));
            }
        }
        if super::is_file(files, &format!("{folder}/{DATABASE}"))? {
            packages.extend(database(files, folder, depth)?);
        }
    }
    Ok(packages)
}

fn database(files: &dyn Files, folder: &str, depth: Depth) -> Result<Vec<Package>> {
    let what = format!("{folder}/{DATABASE}");
    let copy = tempfile::tempdir().trying(|| "make a temporary folder".into())?;
    for name in [DATABASE, "rpmdb.sqlite-wal"] {
        let path = format!("{folder}/{name}");
        match files.kind(&path)? {
            Some(FileKind::File(size)) if size > LIMIT => {
                return Err(Error::new(Code::Failed, format!("{path} is too large to be read ({size} bytes)")));
            }
            Some(FileKind::File(_)) => copy_out(files, &path, &copy.path().join(name))?,
            _ => {}
        }
    }
    let wrong = |error: rusqlite::Error| damaged(&what, "SQLite cannot read it").because(error);
    let blobs = headers(&copy.path().join(DATABASE)).map_err(wrong)?;
    let mut packages = Vec::new();
    for blob in blobs {
        let header = Header::parse(&blob).ok_or_else(|| damaged(&what, "it holds what is no header of a package"))?;
        packages.extend(header.package(depth));
    }
    Ok(packages)
}

fn copy_out(files: &dyn Files, from: &str, to: &Path) -> Result<()> {
    let what = || format!("copy {from} out of the image");
    let mut reader = files.open(from.as_bytes())?;
    let mut file = std::fs::File::create(to).trying(what)?;
    // What grew beyond its size in between is no file of a stopped disk.
    std::io::copy(&mut std::io::Read::take(&mut reader, LIMIT), &mut file).trying(what)?;
    file.flush().trying(what)
}

fn headers(path: &Path) -> rusqlite::Result<Vec<Vec<u8>>> {
    let database = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    database.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    database.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    database.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    database.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false)?;
    database.pragma_update(None, "cell_size_check", true)?;
    database.pragma_update(None, "mmap_size", 0)?;
    let plain = "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'Packages' AND rootpage > 0";
    if database.query_row(plain, [], |row| row.get::<_, i64>(0))? != 1 {
        return Err(rusqlite::Error::InvalidQuery);
    }
    let mut statement = database.prepare("SELECT blob FROM Packages WHERE length(blob) <= ?1 ORDER BY hnum")?;
    let rows = statement.query_map([i64::try_from(HEADER_LIMIT).unwrap_or(i64::MAX)], |row| row.get(0))?;
    rows.collect()
}

const NAME: u32 = 1000;
const VERSION: u32 = 1001;
const RELEASE: u32 = 1002;
const EPOCH: u32 = 1003;
const SUMMARY: u32 = 1004;
const SIZE: u32 = 1009;
const VENDOR: u32 = 1011;
const LICENSE: u32 = 1014;
const PACKAGER: u32 = 1015;
const URL: u32 = 1020;
const ARCH: u32 = 1022;
const SOURCE: u32 = 1044;
const FOLDER_INDEXES: u32 = 1116;
const BASE_NAMES: u32 = 1117;
const FOLDER_NAMES: u32 = 1118;
const LONG_SIZE: u32 = 5009;

const INT32: u32 = 4;
const INT64: u32 = 5;
const STRING: u32 = 6;
const STRINGS: u32 = 8;
const I18N: u32 = 9;

struct Entry {
    tag: u32,
    kind: u32,
    offset: usize,
    count: usize,
}

/// A package's header.
struct Header<'a> {
    entries: Vec<Entry>,
    data: &'a [u8],
}

impl<'a> Header<'a> {
    /// `None` when it makes no sense.
    fn parse(blob: &'a [u8]) -> Option<Self> {
        let number = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_be_bytes);
        let (count, rest) = blob.split_at_checked(4)?;
        let (length, rest) = rest.split_at_checked(4)?;
        let (count, length) = (number(count)? as usize, number(length)? as usize);
        if count == 0 || count > ENTRY_LIMIT || length > HEADER_LIMIT {
            return None;
        }
        let (index, data) = rest.split_at_checked(count * 16)?;
        let entry = |bytes: &[u8]| {
            let (offset, count) = (number(&bytes[8..12])? as usize, number(&bytes[12..16])? as usize);
            Some(Entry { tag: number(&bytes[0..4])?, kind: number(&bytes[4..8])?, offset, count })
        };
        let entries = index.chunks_exact(16).map(entry).collect::<Option<Vec<_>>>()?;
        Some(Self { entries, data: data.get(..length)? })
    }

    fn entry(&self, tag: u32) -> Option<(&Entry, &'a [u8])> {
        let entry = self.entries.iter().find(|entry| entry.tag == tag)?;
        Some((entry, self.data.get(entry.offset..)?))
    }

    /// Texts of a tag, as bytes: each ends with a NUL.
    fn strings(&self, tag: u32) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let (count, data) = match self.entry(tag) {
            Some((Entry { kind: STRING, .. }, data)) => (1, data),
            Some((Entry { kind: STRINGS | I18N, count, .. }, data)) => (*count, data),
            _ => (0, [].as_slice()),
        };
        // What has no end is not taken, so there are no more than NULs in the data.
        data.split_inclusive(|byte| *byte == 0).take(count).filter_map(|text| text.strip_suffix(&[0]))
    }

    fn string(&self, tag: u32) -> Option<String> {
        said(&String::from_utf8_lossy(self.strings(tag).next()?)).filter(|text| text != "(none)")
    }

    fn numbers(&self, tag: u32) -> Vec<u64> {
        let Some((entry, data)) = self.entry(tag) else { return Vec::new() };
        match entry.kind {
            INT32 => data.as_chunks::<4>().0.iter().take(entry.count).map(|b| u64::from(u32::from_be_bytes(*b))).collect(),
            INT64 => data.as_chunks::<8>().0.iter().take(entry.count).map(|b| u64::from_be_bytes(*b)).collect(),
            _ => Vec::new(),
        }
    }

    /// The package; `None` for a signing key, which rpm keeps as if it were one.
    fn package(&self, depth: Depth) -> Option<Package> {
        let name = self.string(NAME).filter(|name| name != "gpg-pubkey")?;
        let version = self.string(VERSION)?;
        let release = self.string(RELEASE).map(|release| format!("-{release}")).unwrap_or_default();
        let epoch = self.numbers(EPOCH).first().map(|epoch| format!("{epoch}:")).unwrap_or_default();
        let arch = self.string(ARCH).unwrap_or_default();
        let mut package = Package::new(Kind::Rpm, &name, &format!("{epoch}{version}{release}"), &arch);
        package.source = self.string(SOURCE).map(|source| (source, String::new()));
        package.license = self.string(LICENSE);
        package.maintainer = self.string(VENDOR).or_else(|| self.string(PACKAGER));
        package.homepage = self.string(URL);
        package.summary = self.string(SUMMARY);
        package.size = self.numbers(LONG_SIZE).first().or(self.numbers(SIZE).first()).copied();
        if depth == Depth::Files {
            let folders: Vec<&[u8]> = self.strings(FOLDER_NAMES).collect();
            let path = |(name, folder): (&[u8], u64)| Some([*folders.get(usize::try_from(folder).ok()?)?, name].concat());
            package.files = self.strings(BASE_NAMES).zip(self.numbers(FOLDER_INDEXES)).filter_map(path).collect();
        }
        Some(package)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Tree, find_program};

    /// A header of texts and numbers.
    fn header(fields: &[(u32, u32, &[u8])]) -> Vec<u8> {
        let (mut index, mut data) = (Vec::new(), Vec::new());
        for (tag, kind, value) in fields {
            let count = match *kind {
                INT32 => value.len() / 4,
                STRINGS => value.iter().filter(|b| **b == 0).count(),
                _ => 1,
            };
            for number in [*tag, *kind, u32::try_from(data.len()).unwrap(), u32::try_from(count).unwrap()] {
                index.extend(number.to_be_bytes());
            }
            data.extend(*value);
        }
        let numbers = [u32::try_from(fields.len()).unwrap(), u32::try_from(data.len()).unwrap()];
        [numbers[0].to_be_bytes().to_vec(), numbers[1].to_be_bytes().to_vec(), index, data].concat()
    }

    #[test]
    fn headers_and_broken_ones() {
        let blob = header(&[
            (NAME, STRING, b"bash\0"),
            (VERSION, STRING, b"5.2\0"),
            (RELEASE, STRING, b"1.fc39\0"),
            (EPOCH, INT32, &[0, 0, 0, 2]),
            (ARCH, STRING, b"x86_64\0"),
            (FOLDER_NAMES, STRINGS, b"/usr/bin/\0/etc/\0"),
            (BASE_NAMES, STRINGS, b"bash\0profile\0lost\0"),
            (FOLDER_INDEXES, INT32, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9]),
        ]);
        let package = Header::parse(&blob).unwrap().package(Depth::Files).unwrap();
        assert_eq!((package.version.as_str(), package.arch.as_str()), ("2:5.2-1.fc39", "x86_64"));
        assert_eq!(package.files, [b"/usr/bin/bash".to_vec(), b"/etc/profile".to_vec()]);
        // Cut or changed anywhere: a package, nothing, or no header; never a panic.
        for length in 0..blob.len() {
            let _ = Header::parse(&blob[..length]).and_then(|header| header.package(Depth::Files));
        }
        for at in 0..blob.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut other = blob.clone();
                other[at] = value;
                let _ = Header::parse(&other).and_then(|header| header.package(Depth::Files));
            }
        }
        let key = header(&[(NAME, STRING, b"gpg-pubkey\0"), (VERSION, STRING, b"1\0")]);
        assert!(Header::parse(&key).unwrap().package(Depth::Packages).is_none());
    }

    fn write(path: &Path, sql: &str, blobs: &[Vec<u8>]) {
        let database = Connection::open(path).unwrap();
        database.execute_batch(sql).unwrap();
        for blob in blobs {
            database.execute("INSERT INTO Packages (blob) VALUES (?1)", [blob]).unwrap();
        }
    }

    #[test]
    fn a_database_and_what_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let blob = header(&[(NAME, STRING, b"a\0"), (VERSION, STRING, b"1\0"), (RELEASE, STRING, b"2\0")]);
        let table = "CREATE TABLE Packages (hnum INTEGER PRIMARY KEY AUTOINCREMENT, blob BLOB NOT NULL)";
        let view =
            "CREATE VIEW Packages AS WITH RECURSIVE n(blob) AS (SELECT 1 UNION ALL SELECT blob + 1 FROM n) SELECT blob, 1 AS hnum FROM n";
        for (number, sql, blobs, good) in [
            (0, table, vec![blob], true),
            (1, table, vec![b"no header".to_vec()], false),
            (2, view, vec![], false),
            (3, "CREATE TABLE x (y)", vec![], false),
        ] {
            let path = folder.path().join(number.to_string());
            write(&path, sql, &blobs);
            let mut tree = Tree::default();
            tree.add("/var/lib/rpm/rpmdb.sqlite", std::fs::read(&path).unwrap());
            let read = crate::packages::read(&tree);
            match read {
                Ok(found) => assert!(good && found.packages[0].version == "1-2", "{number}"),
                Err(error) => assert!(!good && error.to_string().contains("rpmdb.sqlite is damaged"), "{number}: {error}"),
            }
        }
        let tree = Tree::of(&[("/var/lib/rpm/rpmdb.sqlite", "this is no database, but long enough to look at")]);
        assert!(crate::packages::read(&tree).is_err());
    }

    #[test]
    fn older_databases_are_told() {
        let tree = Tree::of(&[("/var/lib/rpm/Packages", "x"), ("/usr/lib/sysimage/rpm/Packages.db", "x")]);
        let found = crate::packages::read(&tree).unwrap();
        assert_eq!(found.notes.len(), 2);
        assert!(found.notes.iter().all(|note| note.contains("cannot be read")), "{:?}", found.notes);
    }

    /// A real database, made by rpm itself, against what rpm says is in it.
    #[test]
    fn as_rpm_has_it() {
        let (Some(rpm), Some(build)) = (find_program("rpm"), find_program("rpmbuild")) else { return };
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let run = |program: &Path, arguments: &[&str]| {
            let output = std::process::Command::new(program).args(arguments).env("HOME", root).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        let specs = [("hello", "", "1.0~rc1"), ("with-epoch", "Epoch: 7\n", "2.3")];
        let top = format!("--define=_topdir {}", root.display());
        let path = format!("--define=_dbpath {}/db", root.display());
        for (name, epoch, version) in specs {
            let spec = root.join(format!("{name}.spec"));
            let text = format!(
                "Name: {name}\nVersion: {version}\nRelease: 3\n{epoch}Summary: One & <two>\nLicense: MIT AND GPL-2.0-or-later\n\
                 URL: https://example.org/\nVendor: Example\nBuildArch: noarch\n%description\nx\n\
                 %install\nmkdir -p %{{buildroot}}/opt/{name}\necho x > %{{buildroot}}/opt/{name}/file\n%files\n/opt/{name}\n"
            );
            std::fs::write(&spec, text).unwrap();
            run(&build, &["-bb", "--quiet", &top, spec.to_str().unwrap()]);
            let package = root.join(format!("RPMS/noarch/{name}-{version}-3.noarch.rpm"));
            run(&rpm, &["-i", "--justdb", "--nodeps", "--ignorearch", &path, package.to_str().unwrap()]);
        }
        let mut tree = Tree::of(&[("/etc/os-release", "ID=fedora\nVERSION_ID=39\n")]);
        for name in [DATABASE, "rpmdb.sqlite-wal"] {
            if let Ok(bytes) = std::fs::read(root.join("db").join(name)) {
                tree.add(&format!("/usr/lib/sysimage/rpm/{name}"), bytes);
            }
        }
        let mut found = crate::packages::read(&tree).unwrap();
        crate::packages::read_files(&tree, &mut found, &|_| true).unwrap();
        let ours: Vec<String> = found
            .packages
            .iter()
            .map(|p| format!("{}|{}|{}|{}|{:?}|{:?}", p.name, p.version, p.arch, p.size.unwrap(), p.license, p.source.as_ref().unwrap().0))
            .collect();
        let format = "%{NAME}|%|EPOCH?{%{EPOCH}:}|%{VERSION}-%{RELEASE}|%{ARCH}|%{SIZE}|Some(\"%{LICENSE}\")|\"%{SOURCERPM}\"\\n";
        let mut theirs: Vec<String> = run(&rpm, &["-qa", &path, "--qf", format]).lines().map(Into::into).collect();
        theirs.sort();
        assert_eq!(ours, theirs);
        assert_eq!(found.packages[0].files, [b"/opt/hello".to_vec(), b"/opt/hello/file".to_vec()]);
        assert_eq!(
            crate::purl::of(&found.packages[1], &found.distribution),
            "pkg:rpm/fedora/with-epoch@2.3-3?arch=noarch&distro=fedora-39&epoch=7&upstream=with-epoch-2.3-3.src.rpm"
        );
    }
}

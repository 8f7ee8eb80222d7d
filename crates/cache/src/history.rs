//! Records of earlier bakes: for each image a file of JSON lines.
//!
//! A line is added with one write, so that a crash leaves at most one torn
//! line, which is passed over; so is one that another version of kiln wrote.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use kiln_model::history::{History, Record};
use kiln_model::home::Home;
use kiln_model::{Digest, Result, ResultExt as _};

use crate::lock::Lock;

/// Lines from which on a file is shortened, and to how many.
const MANY: usize = 100;
const KEPT: usize = 50;

/// Longest part of a file's name that is made of an image's name: most file
/// systems have 255 bytes for all of it.
const LONGEST: usize = 200;

/// Records below `$KILN_HOME/history`. Several processes may add to them at once.
#[derive(Debug)]
pub struct HistoryFiles {
    folder: PathBuf,
}

impl HistoryFiles {
    /// Opens the records below `home`.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(home: &Home) -> Result<Self> {
        let folder = home.history();
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.trying(|| format!("make the folder {}", folder.display()))?;
        Ok(Self { folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}.jsonl", escape(name)))
    }

    fn append(&self, path: &Path, record: &Record) -> io::Result<()> {
        let private = |path: PathBuf| OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        // No name of an image gives this one. All share it: it is held for a
        // moment, and the file itself may be replaced.
        let _lock = Lock::alone_in_turn(private(self.folder.join(".lock"))?)?;
        let before = read(path)?;
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        if before.last().is_some_and(|last| *last != b'\n') {
            // After a torn line, which would take this one with it.
            line.insert(0, b'\n');
        }
        let mut file = private(path.to_owned())?;
        file.write_all(&line)?;
        file.sync_data()?;
        let all = [before, line].concat();
        if lines(&all).count() > MANY {
            // Whole lines of any version, in their order.
            let good: Vec<_> = lines(&all).filter(|line| serde_json::from_slice::<serde::de::IgnoredAny>(line).is_ok()).collect();
            let newest = &good[good.len().saturating_sub(KEPT)..];
            let aside = path.with_extension("new");
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
            file.write_all(&newest.iter().flat_map(|line| [line, &b"\n"[..]]).collect::<Vec<_>>().concat())?;
            file.sync_data()?;
            std::fs::rename(&aside, path)?;
        }
        Ok(())
    }
}

impl History for HistoryFiles {
    fn records(&self, name: &str) -> Result<Vec<Record>> {
        let path = self.path(name);
        let bytes = read(&path).trying(|| format!("read {}", path.display()))?;
        Ok(lines(&bytes).filter_map(|line| serde_json::from_slice(line).ok()).collect())
    }

    fn add(&self, record: &Record) -> Result<()> {
        let path = self.path(&record.name);
        self.append(&path, record).trying(|| format!("write {}", path.display()))
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
}

/// A file name for any name: `shop/web` becomes `shop%2Fweb`. No two names give
/// the same, and none leads out of the folder.
fn escape(name: &str) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for byte in name.bytes() {
        // A name that begins with a dot would be hidden, or be `..`.
        let plain = matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-') || byte == b'.' && !text.is_empty();
        if plain {
            text.push(byte.into());
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    if text.len() > LONGEST {
        let digest = Digest::of(name).hex();
        // `%-` begins no escaped byte.
        text = format!("{}%-{digest}", &text[..LONGEST - digest.len() - 2]);
    }
    text
}

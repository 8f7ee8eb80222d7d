//! `checkpoint.json`: what a checkpoint is.
//!
//! A JSON object that begins with `{"blake3":"…",`, which is the digest of all
//! that follows: nothing in it, such as the time from which its age counts, can
//! change unnoticed. When it was last used is the file's time of modification,
//! so that use rewrites nothing.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use kiln_model::checkpoint::KeptFile;
use kiln_model::{Key, Result, ResultExt as _};
use serde::{Deserialize, Serialize};

/// Its name in a checkpoint's folder.
pub(crate) const NAME: &str = "checkpoint.json";

/// Version of the format. A file of another version is left alone, until its
/// room is needed.
const FORMAT: u32 = 1;

const BEFORE: &str = "{\"blake3\":\"";
const AFTER: &str = "\",";
const DIGITS: usize = 64;

/// What a checkpoint is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Label {
    format: u32,
    /// Key of the last step in it.
    pub(crate) step: Key,
    /// Key of its memory.
    pub(crate) memory: Option<Key>,
    /// When it was made.
    pub(crate) made: SystemTime,
    /// Seconds that it saves.
    worth: f64,
    /// The builder's own words.
    pub(crate) note: serde_json::Value,
    /// All its files.
    pub(crate) files: Vec<KeptFile>,
    /// The key that vouches for it, where it, or what it went on from, was made
    /// on another machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) signer: Option<String>,
}

/// Why a label cannot be used.
#[derive(Debug)]
pub(crate) enum Unusable {
    /// There is none (any more).
    Gone,
    /// It is not what was written.
    Damaged(String),
    /// Another version of kiln wrote it.
    Foreign,
    /// It could not be read.
    Failed(io::Error),
}

impl Label {
    /// The label of a checkpoint that was made at `made`.
    pub(crate) fn new(
        step: Key,
        memory: Option<Key>,
        (worth, made): (Duration, SystemTime),
        note: serde_json::Value,
        files: Vec<KeptFile>,
    ) -> Self {
        Self { format: FORMAT, step, memory, made, worth: worth.as_secs_f64(), note, files, signer: None }
    }

    /// What the checkpoint saves.
    pub(crate) fn worth(&self) -> Duration {
        Duration::try_from_secs_f64(self.worth).unwrap_or_default()
    }

    /// The bytes of its file.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let text = serde_json::to_string(self).trying(|| format!("write {NAME}"))?;
        let rest = text.strip_prefix('{').unwrap_or(&text);
        Ok(format!("{BEFORE}{}{AFTER}{rest}", blake3::hash(rest.as_bytes())).into_bytes())
    }

    /// Reads the label in a checkpoint's folder.
    pub(crate) fn read(folder: &Path) -> std::result::Result<Self, Unusable> {
        let bytes = std::fs::read(folder.join(NAME)).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Unusable::Gone,
            _ if is_damage(&error) => Unusable::Damaged(format!("{NAME} cannot be read: {error}")),
            _ => Unusable::Failed(error),
        })?;
        Self::decode(&bytes)
    }

    /// Reads the bytes of its file.
    pub(crate) fn decode(bytes: &[u8]) -> std::result::Result<Self, Unusable> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let damaged = || Unusable::Damaged(format!("{NAME} is not what was written"));
        let (digest, rest) = bytes.strip_prefix(BEFORE.as_bytes()).and_then(|all| all.split_at_checked(DIGITS)).ok_or_else(damaged)?;
        let rest = rest.strip_prefix(AFTER.as_bytes()).ok_or_else(damaged)?;
        if blake3::hash(rest).to_hex().as_bytes() != digest {
            return Err(damaged());
        }
        match serde_json::from_slice::<Version>(bytes) {
            Ok(Version { format: FORMAT }) => serde_json::from_slice(bytes).map_err(|_| damaged()),
            _ => Err(Unusable::Foreign),
        }
    }
}

/// Whether it is the disk, or what is on it, that does not give back what was
/// written, and not that this process may not or cannot read.
pub(crate) fn is_damage(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof | io::ErrorKind::IsADirectory)
        || error.raw_os_error().is_some_and(|code| {
            let code = rustix::io::Errno::from_raw_os_error(code);
            matches!(code, rustix::io::Errno::IO | rustix::io::Errno::UCLEAN | rustix::io::Errno::ILSEQ)
        })
}

//! Channels of a store: a file of lines for each, appended under its lock.
//!
//! ```text
//!  STORE/channels/NAME/CHANNEL.jsonl             {"record":"…","signature":…}
//!  STORE/channels/NAME/CHANNEL.policy.toml       for people
//!  STORE/channels/NAME/CHANNEL.policy.toml.sig   the same, signed: what counts
//! ```
//!
//! A line is synced before anybody hears of it. A crash in the middle leaves a
//! part of a line, which the next one to append cuts off: nobody was told that
//! it was written.

use std::collections::{BTreeMap, HashSet};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use kiln_model::Digest;
use kiln_model::channel::{Appended, Chain, ChannelBackend, Entry, Next, POLICY, RECORD_LIMIT, Signed, follows};
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::reference::{check_channel, check_name};
use serde::{Deserialize, Serialize};

use super::is_a_tag;
use crate::blobs::{Store, sync_folder};

/// Most bytes of a channel's file: at the usual size of a record some hundred
/// thousand of them.
const FILE_LIMIT: u64 = 256 * 1024 * 1024;

/// One line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    record: String,
    signature: Option<serde_json::Value>,
}

/// What a file holds.
struct Lines {
    chain: Chain,
    /// Bytes of it that are whole lines.
    whole: u64,
    /// Whether only the last line's end is missing.
    unended: bool,
}

impl Store {
    /// All records of a channel of this store; none when there is no such channel.
    ///
    /// # Errors
    /// [`Code::Corrupt`] when the file or the chain is damaged.
    pub fn chain(&self, name: &str, channel: &str) -> Result<Chain> {
        let path = self.channel_path(name, channel)?;
        let what = || format!("read {}", path.display());
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Chain::default()),
            other => other.trying(what)?,
        };
        file.lock_shared().trying(what)?;
        Ok(read(&mut file, &path, name, channel)?.chain)
    }

    /// The channels of `name` in this store, sorted.
    pub(crate) fn channels_of(&self, name: &str) -> Vec<String> {
        let mut channels: Vec<String> = match self.channel_folder(name) {
            Ok(folder) => std::fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|entry| channel_in(&entry)).collect(),
            Err(_) => Vec::new(),
        };
        channels.sort();
        channels
    }

    /// All channels of this store, by name and channel.
    ///
    /// # Errors
    /// When their folder cannot be read.
    pub fn all_channels(&self) -> Result<Vec<(String, String)>> {
        let root = self.root().join("channels");
        let mut found = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            let what = || format!("read {}", folder.display());
            let entries = match std::fs::read_dir(&folder) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                other => other.trying(what)?,
            };
            for entry in entries {
                let entry = entry.trying(what)?;
                if entry.file_type().trying(what)?.is_dir() {
                    folders.push(entry.path());
                } else if let (Some(channel), Ok(name)) = (channel_in(&entry), folder.strip_prefix(&root)) {
                    found.push((name.to_string_lossy().into_owned(), channel));
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// Which channels each image is at now, as `web@production`.
    ///
    /// # Errors
    /// When a channel is damaged.
    pub fn heads(&self) -> Result<BTreeMap<Digest, Vec<String>>> {
        let mut heads: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for (name, channel) in self.all_channels()? {
            if let Some(head) = self.chain(&name, &channel)?.head() {
                heads.entry(head.record().image).or_default().push(format!("{name}@{channel}"));
            }
        }
        Ok(heads)
    }

    /// What the channels of this store are at, or were within `history` states.
    pub(crate) fn channel_images(&self, history: usize) -> Result<HashSet<Digest>> {
        let mut images = HashSet::new();
        for (name, channel) in self.all_channels()? {
            images.extend(self.chain(&name, &channel)?.recent(history));
        }
        Ok(images)
    }

    /// Appends to a channel of this store; see [`ChannelBackend::append`].
    fn append_line(&self, name: &str, channel: &str, next: Next<'_>) -> Result<Option<Appended>> {
        let path = self.channel_path(name, channel)?;
        let folder = self.channel_folder(name)?;
        let what = || format!("write {}", path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(&folder).trying(|| format!("make the folder {}", folder.display()))?;
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path).trying(what)?;
        file.lock().trying(what)?;
        let Lines { mut chain, whole, unended } = read(&mut file, &path, name, channel)?;
        if chain.entries.is_empty() && self.index()?.entry(&format!("{name}:{channel}")).is_some() {
            return Err(is_a_tag(name, channel));
        }
        let notes = std::mem::take(&mut chain.notes);
        let Some(entry) = next(&chain)? else { return Ok(None) };
        follows(&entry, chain.next(), name, channel)?;
        let length = file.metadata().trying(what)?.len();
        if whole < length {
            file.set_len(whole).and_then(|()| file.sync_all()).trying(what)?;
        }
        let line = Line { record: entry.text().to_owned(), signature: entry.signature.clone() };
        let mut bytes = if unended { b"\n".to_vec() } else { Vec::new() };
        serde_json::to_writer(&mut bytes, &line).trying(what)?;
        bytes.push(b'\n');
        let written = file.write_all(&bytes).and_then(|()| file.sync_all());
        if written.is_err() {
            // Half a line would be cut off by the next one; but why leave it.
            drop(file.set_len(whole));
        }
        written.trying(what)?;
        if whole == 0 {
            for folder in folder.ancestors().take_while(|folder| folder.starts_with(self.root())) {
                sync_folder(folder)?;
            }
        }
        Ok(Some(Appended { entry, notes }))
    }

    fn channel_folder(&self, name: &str) -> Result<PathBuf> {
        check_name(name).map_err(|why| Error::new(Code::Usage, format!("`{name}` cannot name an image: {why}")))?;
        Ok(self.root().join("channels").join(name))
    }

    fn channel_path(&self, name: &str, channel: &str) -> Result<PathBuf> {
        check_channel(channel).map_err(|why| Error::new(Code::Usage, format!("`{channel}` cannot name a channel: {why}")))?;
        Ok(self.channel_folder(name)?.join(format!("{channel}.jsonl")))
    }

    fn read_policy(&self, name: &str, channel: &str) -> Result<Option<Signed>> {
        let path = self.channel_path(name, channel)?.with_extension("policy.toml");
        let signature = signature_of(&path);
        let lock = self.lock_file("channels.lock")?;
        lock.lock_shared().trying(|| "lock the channels".into())?;
        let read = |path: &Path| match std::fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some).trying(|| format!("read {}", path.display())),
        };
        let wrong = |why: &str| {
            Error::new(Code::Corrupt, format!("the policy of {name}@{channel} cannot be used: {why}"))
                .next(format!("look into {}, and set it again: `kiln policy set {name}@{channel} FILE --key KEY`", path.display()))
        };
        let (text, signature) = match (read(&path)?, read(&signature)?) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(wrong("it is not signed")),
            (None, Some(_)) => return Err(wrong("its text is missing")),
            (Some(text), Some(signature)) => (text, signature),
        };
        let signature = serde_json::from_str(&signature).map_err(|error| wrong("its signature is damaged").because(error))?;
        Ok(Some(Signed { text, signature }))
    }

    fn write_policy(&self, name: &str, channel: &str, policy: &Signed) -> Result<()> {
        let path = self.channel_path(name, channel)?.with_extension("policy.toml");
        let folder = self.channel_folder(name)?;
        DirBuilder::new().recursive(true).mode(0o700).create(&folder).trying(|| format!("make the folder {}", folder.display()))?;
        let signature = serde_json::to_vec(&policy.signature).trying(|| format!("write the signature of {POLICY}"))?;
        let lock = self.lock_file("channels.lock")?;
        lock.lock().trying(|| "lock the channels".into())?;
        for (path, bytes) in [(signature_of(&path), signature.as_slice()), (path, policy.text.as_bytes())] {
            let (temp, mut file) = self.temp()?;
            file.write_all(bytes).and_then(|()| file.sync_all()).trying(|| format!("write {}", path.display()))?;
            temp.place(&path)?;
        }
        for folder in folder.ancestors().take_while(|folder| folder.starts_with(self.root())) {
            sync_folder(folder)?;
        }
        Ok(())
    }
}

fn signature_of(path: &Path) -> PathBuf {
    path.with_extension("toml.sig")
}

/// The channel that a file is of; one without a record is none yet.
fn channel_in(entry: &std::fs::DirEntry) -> Option<String> {
    let name = entry.file_name().into_string().ok()?;
    let channel = name.strip_suffix(".jsonl")?;
    (check_channel(channel).is_ok() && entry.metadata().is_ok_and(|meta| meta.len() > 0)).then(|| channel.to_owned())
}

/// Reads a channel's file, which is locked, and checks its chain.
fn read(file: &mut File, path: &Path, name: &str, channel: &str) -> Result<Lines> {
    let what = || format!("read {}", path.display());
    if file.metadata().trying(what)?.len() > FILE_LIMIT {
        return Err(Error::new(Code::Corrupt, format!("{} is too large to be the file of a channel", path.display())));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).trying(what)?;
    let mut lines = Lines { chain: Chain::default(), whole: 0, unended: false };
    for (number, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let ended = line.last() == Some(&b'\n');
        let last = lines.whole + line.len() as u64 == bytes.len() as u64;
        match parse(line) {
            Ok(entry) => {
                lines.chain.entries.push(entry);
                lines.whole += line.len() as u64;
                lines.unended = !ended;
            }
            // What a crash leaves: less than a line, or room for it without its bytes.
            Err(_) if last && (!ended || line.contains(&0)) => {
                let note = format!("the last line of {} was cut short by a crash, and counts as not written", path.display());
                lines.chain.notes.push(note);
            }
            Err(error) => {
                let what = format!("line {} of {} is damaged", number + 1, path.display());
                return Err(Error::new(Code::Corrupt, what).because(error).next("put a copy of the file back"));
            }
        }
    }
    lines.chain.check(name, channel)?;
    Ok(lines)
}

fn parse(line: &[u8]) -> Result<Entry> {
    if line.len() > 4 * RECORD_LIMIT {
        return Err(Error::new(Code::Corrupt, "it is too long"));
    }
    let line: Line = serde_json::from_slice(line).trying(|| "read it".into())?;
    Entry::parse(line.record, line.signature)
}

#[async_trait]
impl ChannelBackend for Store {
    async fn history(&self, name: &str, channel: &str) -> Result<Chain> {
        self.chain(name, channel)
    }

    async fn head(&self, name: &str, channel: &str) -> Result<Option<Entry>> {
        Ok(self.chain(name, channel)?.entries.pop())
    }

    async fn append(&self, name: &str, channel: &str, next: Next<'_>) -> Result<Option<Appended>> {
        self.append_line(name, channel, next)
    }

    async fn list(&self, name: &str) -> Result<Vec<String>> {
        Ok(self.channels_of(name))
    }

    async fn policy(&self, name: &str, channel: &str) -> Result<Option<Signed>> {
        self.read_policy(name, channel)
    }

    async fn set_policy(&self, name: &str, channel: &str, policy: &Signed) -> Result<()> {
        self.write_policy(name, channel, policy)
    }
}

//! Files and trees, as tar streams through a command's input and output.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use kiln_model::guest::{Exit, quote};
use kiln_model::tree::{Kind, Tree};
use kiln_model::{Code, Error, Result, ResultExt as _};
use tar::{EntryType, Header};
use tokio::sync::mpsc;

use crate::command::{Input, Run, Sink};

/// Bytes in one chunk, and how many chunks may wait: the whole of a transfer's
/// memory.
const CHUNK: usize = 128 * 1024;
const WAITING: usize = 8;

/// Copies `tree` into the guest: a folder's contents land below `destination`,
/// which is made if it is missing; a file lands at `destination`, or in it if
/// it ends with `/`.
///
/// Folders that are there keep their mode, and links to folders stay links:
/// what a guest has already (`/`, `/lib`) is not the tree's to change.
///
/// # Errors
/// As [`kiln_model::guest::Guest::upload`].
pub async fn upload(guest: &dyn Run, tree: &Tree, destination: &str) -> Result<()> {
    let what = || format!("upload {} to {destination}", tree.root.display());
    let (folder, name) = if tree.is_folder() { (destination.to_owned(), None) } else { file_destination(tree, destination)? };
    let (folder_, target) = (quote(&folder), quote(destination));
    let make = match tree.entries.first() {
        Some(root) if name.is_none() => format!("{{ mkdir -p -- {folder_} && chmod {:o} {folder_}; }}", root.mode),
        _ => format!("mkdir -p -- {folder_}"),
    };
    let check = if name.is_some() && !destination.ends_with('/') {
        format!("if [ -d {target} ]; then echo {target} is a folder: end the destination with / to copy into it >&2; exit 1; fi; ")
    } else {
        String::new()
    };
    let line = format!(
        "umask 022; {check}{{ [ -d {folder_} ] || {make}; }} && \
         exec tar -x -p --no-same-owner --no-overwrite-dir --keep-directory-symlink -f - -C {folder_}"
    );
    let (sender, receiver) = mpsc::channel(WAITING);
    let packed = {
        let tree = tree.clone();
        tokio::task::spawn_blocking(move || pack(&tree, name.as_deref(), sender))
    };
    let mut on_line = Tail::default();
    let exit = guest.run(&line, Input::Chunks(receiver), None, Sink::Lines(&mut |_, line| on_line.keep(line))).await;
    let packed = packed.await.trying(what)?;
    match exit {
        // A stream that ended early is no success, whatever tar thinks of it.
        Ok(Exit::Status(0)) => packed.trying(what),
        Ok(exit) => match packed {
            Err(error) if error.kind() != Code::Unreachable => Err(error).trying(what),
            _ => Err(Error::new(Code::Failed, format!("cannot {}: tar in the guest ended with {exit}", what())).detail(on_line.0)),
        },
        Err(error) => Err(error).trying(what),
    }
}

/// The folder and name of a file that goes to `destination`.
fn file_destination(tree: &Tree, destination: &str) -> Result<(String, Option<String>)> {
    let own = || tree.root.file_name().map(|name| name.to_string_lossy().into_owned());
    let (folder, name) = match destination.rsplit_once('/') {
        Some((folder, "")) => (if folder.is_empty() { "/" } else { folder }, own()),
        Some(("", name)) => ("/", Some(name.to_owned())),
        Some((folder, name)) => (folder, Some(name.to_owned())),
        None => (".", Some(destination.to_owned())),
    };
    match name {
        Some(name) if !matches!(name.as_str(), "" | "." | "..") => Ok((folder.to_owned(), Some(name))),
        _ => Err(Error::new(Code::Usage, format!("`{destination}` is no destination for a file"))),
    }
}

#[derive(Default)]
struct Tail(String);

impl Tail {
    fn keep(&mut self, line: &str) {
        if self.0.len() < 4096 {
            self.0.push_str(line);
            self.0.push('\n');
        }
    }
}

/// Writes the archive. An error of [`Code::Unreachable`] means that the other
/// end stopped reading, and knows why.
fn pack(tree: &Tree, name: Option<&str>, sender: mpsc::Sender<Vec<u8>>) -> Result<()> {
    let mut builder = tar::Builder::new(Chunks { sender, buffer: Vec::with_capacity(CHUNK) });
    for entry in &tree.entries {
        let location = tree.location(entry);
        let path = match (entry.path.as_str(), name) {
            ("", None) => continue,
            ("", Some(name)) => name,
            (path, _) => path,
        };
        let trying = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => Error::new(Code::Unreachable, "the guest stopped reading").because(error),
            _ => Error::new(Code::Failed, format!("cannot read {}", location.display())).because(error),
        };
        let meta =
            if entry.path.is_empty() { std::fs::metadata(&location) } else { std::fs::symlink_metadata(&location) }.map_err(trying)?;
        let mut header = Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
        header.set_size(0);
        match &entry.kind {
            Kind::Folder => {
                header.set_entry_type(EntryType::Directory);
                builder.append_data(&mut header, format!("{path}/"), std::io::empty())
            }
            Kind::Link(target) => {
                header.set_entry_type(EntryType::Symlink);
                builder.append_link(&mut header, path, target)
            }
            Kind::File(size) => {
                header.set_entry_type(EntryType::Regular);
                header.set_size(*size);
                // Exactly what the header says, or the archive would break.
                File::open(&location).and_then(|file| builder.append_data(&mut header, path, Exactly { file, left: *size }))
            }
        }
        .map_err(trying)?;
    }
    let ended = builder.into_inner().and_then(|mut chunks| chunks.flush());
    ended.map_err(|error| Error::new(Code::Unreachable, "the guest stopped reading").because(error))
}

/// A file that must have the size it had when the tree was walked.
struct Exactly {
    file: File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read(&mut buffer[..most])?;
        if read == 0 && most > 0 {
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "it became shorter while it was read"));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

/// Gathers what is written into chunks.
struct Chunks {
    sender: mpsc::Sender<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.buffer.len() >= CHUNK {
            self.flush()?;
        }
        let taken = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let full = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        self.sender.blocking_send(full).map_err(|_| std::io::ErrorKind::BrokenPipe.into())
    }
}

/// Copies `source` out of the guest: a folder's contents, or a file, land
/// below `destination`, which is made if it is missing.
///
/// # Errors
/// As [`kiln_model::guest::Guest::download`].
pub async fn download(guest: &dyn Run, source: &str, destination: &Path) -> Result<()> {
    let what = || format!("download {source} to {}", destination.display());
    let trimmed = source.trim_end_matches('/');
    let (folder, name) = match trimmed.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((folder, name)) => (folder, name),
        None => (".", trimmed),
    };
    let (whole, folder, name) = (quote(source), quote(folder), quote(&format!("./{name}")));
    // A link that was named is followed, as it is on the way in.
    let line = format!("if [ -d {whole} ]; then exec tar -c -f - -C {whole} .; else exec tar -c -h -f - -C {folder} {name}; fi");
    let (sender, receiver) = mpsc::channel(WAITING);
    let unpacked = {
        let destination = destination.to_owned();
        tokio::task::spawn_blocking(move || unpack(Received { receiver, chunk: Vec::new(), at: 0 }, &destination))
    };
    let mut stderr = String::new();
    let exit = guest.run(&line, Input::Bytes(Vec::new()), None, Sink::Bytes { stdout: sender, stderr: &mut stderr }).await;
    let unpacked = unpacked.await.trying(what)?;
    match exit {
        Ok(Exit::Status(0)) => unpacked.trying(what),
        Ok(exit) => Err(Error::new(Code::Failed, format!("cannot {}: tar in the guest ended with {exit}", what())).detail(stderr)),
        // The end here failed first, and knows why.
        Err(error) if error.kind() == Code::Failed => Err(unpacked.err().unwrap_or(error)).trying(what),
        Err(error) => Err(error).trying(what),
    }
}

/// Reads what a channel gave.
struct Received {
    receiver: mpsc::Receiver<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
}

impl Read for Received {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.at == self.chunk.len() {
            match self.receiver.blocking_recv() {
                Some(chunk) => (self.chunk, self.at) = (chunk, 0),
                None => return Ok(0),
            }
        }
        let taken = buffer.len().min(self.chunk.len() - self.at);
        buffer[..taken].copy_from_slice(&self.chunk[self.at..self.at + taken]);
        self.at += taken;
        Ok(taken)
    }
}

/// Unpacks an archive that somebody else made below `destination`. Whatever
/// would leave it is refused: `..`, absolute paths, links that point out, and
/// paths through links.
fn unpack(reader: impl Read, destination: &Path) -> Result<()> {
    std::fs::create_dir_all(destination).trying(|| format!("make the folder {}", destination.display()))?;
    let mut archive = tar::Archive::new(reader);
    let mut folders: Vec<(PathBuf, u32)> = Vec::new();
    for entry in archive.entries().trying(|| "read the archive".into())? {
        let mut entry = entry.trying(|| "read the archive".into())?;
        let path = entry.path().trying(|| "read a path of the archive".into())?.into_owned();
        let refused = |why: &str| Err(Error::new(Code::Refused, format!("the guest sent `{}`, which {why}", path.display())));
        let Some(inside) = within(Path::new(""), &path) else { return refused("would leave the destination") };
        if inside.parent().is_some_and(|parent| through_link(destination, parent)) {
            return refused("goes through a link");
        }
        let kind = entry.header().entry_type();
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {}
            EntryType::Directory => {
                // Modes last: a folder that may not be written to still has to
                // be filled.
                folders.push((inside, entry.header().mode().unwrap_or(0o755) & 0o777));
                continue;
            }
            EntryType::Symlink | EntryType::Link => {
                let target = entry.link_name().trying(|| "read a link of the archive".into())?.unwrap_or_default().into_owned();
                let from = if kind == EntryType::Symlink { inside.parent().unwrap_or(Path::new("")) } else { Path::new("") };
                if within(from, &target).is_none() {
                    return refused(&format!("is a link to `{}`, out of the destination", target.display()));
                }
            }
            EntryType::XGlobalHeader => continue,
            _ => return refused("is neither a file, a folder nor a link"),
        }
        // Checks once more, against what is really on the disk.
        let done = entry.unpack_in(destination).trying(|| format!("unpack {}", path.display()))?;
        if !done {
            return refused("would leave the destination");
        }
    }
    for (path, _) in &folders {
        if through_link(destination, path) {
            return Err(Error::new(Code::Refused, format!("the guest sent `{}`, which goes through a link", path.display())));
        }
        let made = destination.join(path);
        std::fs::create_dir_all(&made).trying(|| format!("make the folder {}", made.display()))?;
    }
    folders.sort();
    for (path, mode) in folders.iter().rev().filter(|(path, _)| !path.as_os_str().is_empty()) {
        let made = destination.join(path);
        std::fs::set_permissions(&made, std::fs::Permissions::from_mode(*mode)).trying(|| format!("set the mode of {}", made.display()))?;
    }
    // tar pads its end; the other end must be able to send that.
    std::io::copy(&mut archive.into_inner(), &mut std::io::sink()).trying(|| "read the archive".into())?;
    Ok(())
}

/// Whether `path` or a folder above it, below `destination`, is a link.
fn through_link(destination: &Path, path: &Path) -> bool {
    path.ancestors().filter(|path| !path.as_os_str().is_empty()).any(|path| destination.join(path).is_symlink())
}

/// `path`, taken from `from`, as a path below the destination; none if it
/// leaves it. A `..` counts as leaving anywhere but at the beginning: behind a
/// name, which may be a link, nobody knows where it leads.
fn within(from: &Path, path: &Path) -> Option<PathBuf> {
    let mut result = from.to_owned();
    let mut named = false;
    for part in path.components() {
        match part {
            Component::Normal(name) => {
                result.push(name);
                named = true;
            }
            Component::CurDir => {}
            Component::ParentDir => {
                if named || !result.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One entry of an archive as an evil guest would make it.
    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = Header::new_gnu();
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            let data: &[u8] = if *kind == EntryType::Regular { content.as_bytes() } else { b"" };
            if data.is_empty() {
                header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content.as_bytes());
            }
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn what_leaves_the_destination_is_refused() {
        use EntryType::{Directory, Fifo, Link, Regular, Symlink};
        let evil: &[&[(&str, EntryType, &str)]] = &[
            &[("../out", Regular, "x")],
            &[("a/../../out", Regular, "x")],
            &[("/tmp/out", Regular, "x")],
            &[("../out", Directory, "")],
            &[("l", Symlink, "/etc/passwd")],
            &[("a/l", Symlink, "../../out")],
            &[("h", Link, "../secret")],
            &[("h", Link, "/etc/passwd")],
            &[("l", Symlink, "inside"), ("l/x", Regular, "x")],
            &[("p/q/s", Symlink, "../.."), ("p/q/t", Symlink, "s/..")],
            &[("pipe", Fifo, "")],
        ];
        for entries in evil {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("secret"), "s").unwrap();
            let destination = folder.path().join("in");
            std::fs::create_dir_all(destination.join("inside")).unwrap();
            let error = unpack(&archive(entries)[..], &destination).unwrap_err();
            assert_eq!(error.kind(), Code::Refused, "{entries:?}: {error:?}");
            assert!(!folder.path().join("out").exists() && !Path::new("/tmp/out").exists());
        }
    }

    #[test]
    fn what_stays_inside_is_taken() {
        use EntryType::{Directory, Link, Regular, Symlink};
        let folder = tempfile::tempdir().unwrap();
        let entries = [
            ("./", Directory, ""),
            ("a/", Directory, ""),
            ("a/f", Regular, "x"),
            ("a/l", Symlink, "../a/f"),
            ("h", Link, "a/f"),
            ("e/", Directory, ""),
        ];
        unpack(&archive(&entries)[..], folder.path()).unwrap();
        assert_eq!(std::fs::read(folder.path().join("a/l")).unwrap(), b"x");
        assert_eq!(std::fs::read(folder.path().join("h")).unwrap(), b"x");
        assert!(folder.path().join("e").is_dir());
    }

    #[test]
    fn a_cut_archive_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let whole = archive(&[("a", EntryType::Regular, "content")]);
        assert!(unpack(&whole[..515], folder.path()).is_err());
    }
}

//! `file`: files and trees into the guest, and out of it.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use kiln_model::guest::{Command, Guest, GuestExt as _, quote};
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::{Provisioner, Step};
use kiln_model::settings::{Node, Problems, Reader, existing_path};
use kiln_model::tree::{Kind as EntryKind, Tree};
use kiln_model::{Code, Digest, Error, Result};

use crate::settings::finish;

/// Mode of a file whose text stands in the template.
const CONTENT_MODE: u32 = 0o644;

/// Reads `file = { source = …, destination = … }`.
pub(crate) struct FileKind;

enum What {
    /// A local file or folder.
    Upload(PathBuf),
    /// Text of the template.
    Content(String),
    /// A path in the guest, into this local folder.
    Download(String, PathBuf),
}

struct Files {
    what: What,
    /// As it was written.
    destination: String,
    mode: Option<u32>,
    owner: Option<String>,
}

impl Kind<dyn Provisioner> for FileKind {
    fn name(&self) -> &'static str {
        "file"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["source", "content", "destination", "mode", "owner", "direction"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let mut reader = Reader::new(settings, "[provision.file]", problems)?;
        let down = match reader.entry("direction").map(|entry| entry.node.place) {
            None => false,
            Some(place) => match reader.string("direction", problems) {
                Some("download") => true,
                Some("upload") | None => false,
                Some(other) => {
                    problems.add(place, format!("`{other}` is no direction")).help("write \"upload\" or \"download\"");
                    false
                }
            },
        };
        let source = reader.entry("source");
        let source_text = reader.string("source", problems);
        let content_place = reader.entry("content").map(|entry| entry.node.place);
        let content = reader.string("content", problems);
        let destination = reader.required_string("destination", problems).unwrap_or_default().to_owned();
        let destination_place = reader.entry("destination").map_or(settings.place, |entry| entry.node.place);
        let what = match (source.zip(source_text), content, down) {
            (Some(_), Some(_), _) => {
                problems.add(content_place.unwrap_or(settings.place), "`source` and `content` exclude each other").help("keep one of them");
                None
            }
            (None, Some(_), true) => {
                problems.add(content_place.unwrap_or(settings.place), "a download has no `content`").help("name a `source` in the guest");
                None
            }
            (None, Some(text), false) => Some(What::Content(text.to_owned())),
            (Some((_, text)), None, true) => Some(What::Download(text.to_owned(), folder.join(&destination))),
            (Some((entry, text)), None, false) => existing_path(text, entry.node.place, folder, problems).map(What::Upload),
            (None, None, _) => {
                if source.is_none() && content_place.is_none() {
                    problems.add(reader.place(), "[provision.file] needs `source` or `content`");
                }
                None
            }
        };
        if !down && !destination.is_empty() && !destination.starts_with('/') {
            problems
                .add(destination_place, "`destination` must be an absolute path in the guest")
                .help(format!("write \"/{destination}\", or where it is to go"));
        }
        if matches!(what, Some(What::Content(_))) && destination.ends_with('/') {
            problems.add(destination_place, "`content` needs the path of a file").help("end `destination` with a file name");
        }
        let mode = read_mode(&mut reader, problems);
        let owner = read_owner(&mut reader, problems);
        if down && (mode.is_some() || owner.is_some()) {
            problems
                .add(settings.place, "a download has neither `mode` nor `owner`")
                .help("what is downloaded is yours, with the modes it has");
        }
        finish(reader, settings, self.keys(), problems);
        let files = Files { what: what?, destination, mode, owner };
        (problems.0.len() == before).then(|| Box::new(files) as _)
    }
}

fn read_mode(reader: &mut Reader<'_>, problems: &mut Problems) -> Option<u32> {
    let place = reader.entry("mode")?.node.place;
    let text = reader.string("mode", problems)?;
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777 && (3..=5).contains(&text.len()));
    if mode.is_none() {
        problems.add(place, format!("`{text}` is no mode")).help("write octal digits, such as \"0644\"");
    }
    mode
}

fn read_owner(reader: &mut Reader<'_>, problems: &mut Problems) -> Option<String> {
    let place = reader.entry("owner")?.node.place;
    let text = reader.string("owner", problems)?;
    let name = |name: &str| !name.starts_with('-') && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.$".contains(c));
    let good = match text.split_once(':') {
        Some((user, group)) => name(user) && name(group) && !group.is_empty(),
        None => name(text) && !text.is_empty(),
    };
    if !good {
        problems.add(place, format!("`{text}` is no owner")).help("write \"user\", \"user:group\" or \":group\"");
    }
    good.then(|| text.to_owned())
}

impl Files {
    async fn upload(&self, guest: &dyn Guest, source: &Path) -> Result<()> {
        let mut tree = Tree::walk(source)?;
        if let Some(mode) = self.mode {
            for entry in tree.entries.iter_mut().filter(|entry| matches!(entry.kind, EntryKind::File(_))) {
                entry.mode = mode;
            }
        }
        let Some(owner) = &self.owner else { return guest.upload(&tree, &self.destination).await };
        // Only what is uploaded changes its owner, never what was there: the
        // destination may be `/`.
        let mut paths: Vec<String> = Vec::new();
        let base = self.destination.trim_end_matches('/');
        if tree.is_folder() {
            if !guest.output(&Command::new(format!("[ -e {} ]", quote(&self.destination)))).await?.exit.success() {
                paths.push(self.destination.clone());
            }
            paths.extend(tree.entries.iter().filter(|entry| !entry.path.is_empty()).map(|entry| format!("{base}/{}", entry.path)));
        } else if self.destination.ends_with('/') {
            let name = source.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            paths.push(format!("{base}/{name}"));
        } else {
            paths.push(self.destination.clone());
        }
        guest.upload(&tree, &self.destination).await?;
        // Changing the owner takes away setuid bits, so those come again.
        let mut list = paths.join("\0").into_bytes();
        list.push(0);
        succeed(guest, Command::new(format!("xargs -0 chown -h {owner} --")).stdin(list), &format!("give {} to {owner}", self.destination))
            .await?;
        let special: Vec<String> = tree
            .entries
            .iter()
            .filter(|entry| entry.mode & 0o6000 != 0 && matches!(entry.kind, EntryKind::File(_)))
            .map(|entry| {
                let path = if entry.path.is_empty() { paths.last().cloned().unwrap_or_default() } else { format!("{base}/{}", entry.path) };
                format!("chmod {:o} -- {}\n", entry.mode, quote(&path))
            })
            .collect();
        if special.is_empty() {
            return Ok(());
        }
        succeed(guest, Command::new("sh -e -s").stdin(special.concat()), &format!("set modes below {}", self.destination)).await
    }

    async fn write(&self, guest: &dyn Guest, content: &str) -> Result<()> {
        let path = quote(&self.destination);
        let owner = self.owner.as_ref().map(|owner| format!(" && chown {owner} -- \"$t\"")).unwrap_or_default();
        let mode = self.mode.unwrap_or(CONTENT_MODE);
        // Beside its place, then renamed: a reader sees the old or the new.
        let line = format!(
            "if [ -d {path} ]; then echo {path} is a folder >&2; exit 1; fi
umask 022; mkdir -p -- \"$(dirname -- {path})\" || exit 1
t={path}.kiln-new; trap 'rm -f -- \"$t\"' EXIT
(umask 077; cat > \"$t\"){owner} && chmod {mode:o} -- \"$t\" && mv -f -- \"$t\" {path}"
        );
        succeed(guest, Command::new(line).stdin(content), &format!("write {}", self.destination)).await
    }
}

/// Runs a command that has to succeed.
async fn succeed(guest: &dyn Guest, command: Command, what: &str) -> Result<()> {
    let output = guest.output(&command).await?;
    if output.exit.success() {
        return Ok(());
    }
    Err(Error::new(Code::Step, format!("cannot {what}: {}", output.exit)).detail(output.stderr))
}

#[async_trait]
impl Provisioner for Files {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        hasher.field("destination", &self.destination);
        // What is not set is no part, so that it counts as added when it is.
        let mode = self.mode.map(|mode| format!("{mode:o}"));
        for (name, value) in [("mode", mode.as_deref()), ("owner", self.owner.as_deref())] {
            hasher.hidden(name, value.unwrap_or_default());
            value.map(|value| hasher.part(name, value));
        }
        match &self.what {
            What::Upload(source) => {
                let tree = Tree::walk(source)?;
                if !tree.is_folder() && self.destination.ends_with('/') {
                    // Then its own name decides where it goes.
                    let name = source.file_name().unwrap_or_default().as_encoded_bytes();
                    hasher.hidden("name", name).part("name of the file", name);
                }
                hasher.hidden("direction", "upload");
                tree.key(hasher)
            }
            What::Content(text) => {
                hasher.field("content", text).input("content", Digest::of(text));
                Ok(())
            }
            What::Download(source, _) => {
                hasher.field("direction", "download").field("source", source);
                Ok(())
            }
        }
    }

    fn takes_out(&self) -> bool {
        matches!(self.what, What::Download(..))
    }

    async fn run(&self, step: &Step<'_>) -> Result<()> {
        let guest = &*step.guest;
        let work = async {
            match &self.what {
                What::Upload(source) => self.upload(guest, source).await,
                What::Content(text) => self.write(guest, text).await,
                What::Download(source, destination) => guest.download(source, destination).await,
            }
        };
        let name = &step.common.name;
        let result = match step.common.timeout {
            None => work.await,
            // What is dropped is killed in the guest.
            Some(limit) => tokio::time::timeout(limit, work)
                .await
                .unwrap_or_else(|_| Err(Error::new(Code::Timeout, format!("copying took over {limit:?}")).next("raise its `timeout`"))),
        };
        result.map_err(|error| if error.kind() == Code::Failed { error.code(Code::Step) } else { error }.step(name))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use kiln_model::settings::Value;

    use crate::settings::tests::{key, read, string, table, wrong};

    #[test]
    fn settings_and_their_problems() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a"), "a").unwrap();
        let to = ("destination", string("/x"));
        let cases: &[(Vec<(&str, Value)>, &str)] = &[
            (vec![to.clone()], "needs `source` or `content`"),
            (vec![("source", string("a"))], "needs `destination`"),
            (vec![("source", string("missing")), to.clone()], "cannot read `missing`: there is no such file or folder"),
            (vec![("source", string("a")), ("content", string("x")), to.clone()], "exclude each other"),
            (vec![("source", string("a")), ("destination", string("etc/x"))], "must be an absolute path"),
            (vec![("content", string("x")), ("destination", string("/etc/"))], "needs the path of a file"),
            (vec![("source", string("a")), ("mode", string("rw-r--r--")), to.clone()], "is no mode"),
            (vec![("source", string("a")), ("mode", Value::Integer(644)), to.clone()], "`mode` must be a string"),
            (vec![("source", string("a")), ("owner", string("a b")), to.clone()], "is no owner"),
            (vec![("source", string("a")), ("direction", string("sideways")), to.clone()], "is no direction"),
            (vec![("source", string("/x")), ("direction", string("download")), ("mode", string("0644")), to.clone()], "neither `mode`"),
            (vec![("sorce", string("a")), to], "did you mean `source`?"),
        ];
        for (entries, expected) in cases {
            let found = wrong("file", &table(entries), folder.path());
            assert!(found.iter().any(|problem| problem.contains(expected)), "{expected}: {found:?}");
        }
    }

    #[test]
    fn the_key_holds_the_tree_and_where_it_goes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        std::fs::write(&file, "a").unwrap();
        let of = |entries: &[(&str, Value)]| key(&*read("file", &table(entries), folder.path()));
        let plain = || of(&[("source", string("a")), ("destination", string("/x"))]);
        let mut keys = vec![
            plain(),
            of(&[("source", string("a")), ("destination", string("/y"))]),
            of(&[("source", string("a")), ("destination", string("/x/"))]),
            of(&[("source", string("a")), ("destination", string("/x")), ("mode", string("0600"))]),
            of(&[("source", string("a")), ("destination", string("/x")), ("owner", string("nobody"))]),
            of(&[("content", string("a")), ("destination", string("/x"))]),
            of(&[("source", string("a")), ("destination", string("/x")), ("direction", string("download"))]),
        ];
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        keys.push(plain());
        std::fs::write(&file, "b").unwrap();
        keys.push(plain());
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
        std::fs::write(&file, "a").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(keys.iter().filter(|key| **key == plain()).count(), 1);
    }
}

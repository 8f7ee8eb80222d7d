//! What `git.*` shows, asked only when an expression uses it.

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_model::account::Source;

/// Why `git.*` cannot be told, and what to do about it.
#[derive(Debug, Clone)]
pub(super) struct NoGit {
    pub(super) message: String,
    pub(super) help: Option<String>,
}

/// A template's folder as git sees it. Answers are kept: two expressions must
/// not see two states.
pub(super) struct Git {
    folder: PathBuf,
    commit: Option<Result<String, NoGit>>,
    describe: Option<Result<String, NoGit>>,
    dirty: Option<Result<bool, NoGit>>,
}

impl Git {
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), commit: None, describe: None, dirty: None }
    }

    /// The commit that is checked out.
    pub(super) fn commit(&mut self) -> Result<String, NoGit> {
        self.commit.get_or_insert_with(|| commit(&self.folder)).clone()
    }

    /// `git describe`: the newest tag, commits since, commit, and `-dirty` when
    /// tracked files differ; without any tag the short commit.
    pub(super) fn describe(&mut self) -> Result<String, NoGit> {
        self.commit()?;
        self.describe.get_or_insert_with(|| describe(&self.folder)).clone()
    }

    /// Whether tracked files differ from the commit, as `git describe --dirty`
    /// has it.
    pub(super) fn dirty(&mut self) -> Result<bool, NoGit> {
        self.commit()?;
        let status = || git(&self.folder, &["status", "--porcelain", "--untracked-files=no"]).map_err(|stderr| plain(&stderr));
        self.dirty.get_or_insert_with(|| status().map(|out| !out.is_empty())).clone()
    }
}

/// Where a folder's commit comes from. Asks `git`, which may take a moment in
/// a large repository.
pub(crate) fn repository(folder: &Path, commit: String) -> Option<Source> {
    let status = git(folder, &["status", "--porcelain", "--untracked-files=no"]).ok()?;
    let remotes = git(folder, &["remote"]).unwrap_or_default();
    // The remote that everybody calls `origin`, or else the only one.
    let remote = remotes.lines().find(|name| *name == "origin").or_else(|| remotes.lines().next().filter(|_| remotes.lines().count() == 1));
    let url = remote.and_then(|name| git(folder, &["remote", "get-url", name]).ok());
    Some(Source {
        repository: url.and_then(|url| public(&url)),
        commit,
        folder: git(folder, &["rev-parse", "--show-prefix"]).ok()?.trim_end_matches('/').to_owned(),
        dirty: !status.is_empty(),
    })
}

/// A repository's URL without user and password; `None` for a folder of this
/// machine.
fn public(url: &str) -> Option<String> {
    if let Some((scheme, rest)) = url.split_once("://") {
        if scheme == "file" {
            return None;
        }
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
        let path = path.split(['?', '#']).next().unwrap_or_default();
        return Some(format!("{scheme}://{host}/{path}"));
    }
    // As `scp` has it: user@host:path.
    let (host, path) = url.split_once(':')?;
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    let plain = !host.is_empty() && !host.contains('/') && !path.is_empty();
    plain.then(|| format!("ssh://{host}/{}", path.trim_start_matches('/')))
}

fn commit(folder: &Path) -> Result<String, NoGit> {
    git(folder, &["rev-parse", "--verify", "--end-of-options", "HEAD"]).map_err(|stderr| {
        if stderr.contains("not a git repository") {
            NoGit {
                message: "the template is not in a git repository".into(),
                help: Some("write the version yourself: version = \"0.1.0\" in [image]".into()),
            }
        } else if stderr.contains("Needed a single revision") {
            NoGit {
                message: "the git repository has no commit yet".into(),
                help: Some("commit first, or write the version yourself: version = \"0.1.0\" in [image]".into()),
            }
        } else {
            plain(&stderr)
        }
    })
}

fn describe(folder: &Path) -> Result<String, NoGit> {
    let shallow = git(folder, &["rev-parse", "--is-shallow-repository"]).is_ok_and(|answer| answer == "true");
    if shallow {
        // Only a tag on this very commit can be told from a shallow clone; any
        // other answer would differ from what a full clone says.
        return git(folder, &["describe", "--tags", "--exact-match", "--dirty"]).map_err(|_| NoGit {
            message: "this is a shallow clone, so the version cannot be told from its tags".into(),
            help: Some("run `git fetch --unshallow --tags` first (GitHub's checkout action: `fetch-depth: 0`)".into()),
        });
    }
    git(folder, &["describe", "--tags", "--always", "--dirty"]).map_err(|stderr| plain(&stderr))
}

fn plain(stderr: &str) -> NoGit {
    if stderr.contains("safe.directory") {
        return NoGit {
            message: "git does not trust this repository, since it belongs to another user".into(),
            help: stderr.lines().find(|line| line.contains("git config")).map(|line| format!("run `{}`", line.trim())),
        };
    }
    NoGit { message: format!("git failed: {stderr}"), help: None }
}

/// Runs git in `folder`; its output, or what it complained about.
fn git(folder: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("git")
        .args(arguments)
        .current_dir(folder)
        // Kiln may run in a hook of another repository, and must not write an
        // index that another git is using.
        .env_remove("GIT_DIR")
        .env_remove("GIT_WORK_TREE")
        .env_remove("GIT_INDEX_FILE")
        .env("GIT_OPTIONAL_LOCKS", "0")
        .env("LC_ALL", "C")
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "the program `git` is not installed".to_owned(),
            _ => error.to_string(),
        })?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::public;

    #[test]
    fn a_repository_is_named_without_credentials() {
        for (url, expected) in [
            ("https://github.com/acme/shop.git", Some("https://github.com/acme/shop.git")),
            ("https://eve:hunter22@github.com/acme/shop", Some("https://github.com/acme/shop")),
            ("https://x-access-token:hunter22@host:8443/a/b?token=hunter22#x", Some("https://host:8443/a/b")),
            ("https://e@ve:hunter@22@host/a", Some("https://host/a")),
            ("git@github.com:acme/shop.git", Some("ssh://github.com/acme/shop.git")),
            ("ssh://git@host:22/acme/shop", Some("ssh://host:22/acme/shop")),
            ("/srv/git/shop", None),
            ("../shop", None),
            ("file:///srv/git/shop", None),
        ] {
            assert_eq!(public(url).as_deref(), expected, "{url}");
        }
    }
}

//! The template as it was when an image was baked: out of a local repository
//! that has the commit, or from a folder that somebody names.
//!
//! A commit is taken out by a clone that shares the objects of the repository
//! it comes from, in the bake's own work folder: nothing is written where the
//! user works, and `git.*` in the template sees history and tags as it did
//! then.

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_evidence::provenance::Provenance;
use kiln_evidence::{OtherFile, RecipeFile};
use kiln_model::{Code, Error, Result};
use serde_json::{Value, json};

/// Where a template was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// The template's file.
    pub(crate) template: PathBuf,
    /// The commit that it was taken from; none: a folder as it is now.
    pub(crate) commit: Option<String>,
}

impl Found {
    /// For people.
    pub(crate) fn describe(&self) -> String {
        match &self.commit {
            Some(commit) => format!("commit {}", commit.get(..12).unwrap_or(commit)),
            None => self.template.display().to_string(),
        }
    }

    /// For programs. A clone that is gone by then has no path.
    pub(crate) fn as_json(&self) -> Value {
        match &self.commit {
            Some(commit) => json!({ "kind": "commit", "commit": commit }),
            None => json!({ "kind": "folder", "template": self.template }),
        }
    }
}

/// Finds the template: `given`, or the commit that `provenance` names, if the
/// repository around `here` has it, or what lies in `here`.
pub(crate) fn find(provenance: &Provenance, given: Option<&Path>, here: &Path, work: &Path) -> Result<Found> {
    let file = if provenance.recipe.template.is_empty() { "kiln.toml" } else { &provenance.recipe.template };
    if let Some(given) = given {
        let template = if given.is_dir() { given.join(file) } else { given.to_owned() };
        if !template.is_file() {
            return Err(Error::new(Code::NotFound, format!("there is no template {}", template.display())));
        }
        return Ok(Found { template, commit: None });
    }
    if let Some(commit) = &provenance.commit
        && has(here, commit)
    {
        let folder = check_out(here, commit, work)?;
        let template = folder.join(plain(&provenance.recipe.folder)?).join(plain(file)?);
        if template.is_file() {
            return Ok(Found { template, commit: Some(commit.clone()) });
        }
        // Nobody had committed it yet: the digests will tell.
    }
    let template = here.join(plain(file)?);
    if template.is_file() {
        return Ok(Found { template, commit: None });
    }
    let error =
        Error::new(Code::NotFound, format!("the template of this image is not here: neither {file} nor a repository with its commit"));
    let from = match (&provenance.repository, &provenance.commit) {
        (Some(repository), Some(commit)) => {
            format!(
                "it is commit {commit} of {repository}: run this in a clone of that (`git fetch` brings the commit), or name the folder with --template"
            )
        }
        (None, Some(commit)) => {
            format!("it is commit {commit}: run this in the repository that has it, or name the folder with --template")
        }
        _ => "name the template's folder with --template".to_owned(),
    };
    Err(error.next(from))
}

/// A path of provenance that stays where it belongs: somebody else wrote it.
fn plain(path: &str) -> Result<&Path> {
    let path = Path::new(path);
    let inside = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if inside { Ok(path) } else { Err(Error::new(Code::Refused, format!("the provenance names a template at {}", path.display()))) }
}

/// `git`, which must not ask anybody anything, nor be led elsewhere.
fn git(folder: &Path) -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(folder).env("GIT_TERMINAL_PROMPT", "0").env_remove("GIT_DIR").env_remove("GIT_WORK_TREE");
    command.stdin(std::process::Stdio::null());
    command
}

/// Whether a commit's name is one, and no option.
fn is_commit(commit: &str) -> bool {
    matches!(commit.len(), 40 | 64) && commit.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether the repository around `folder` has a commit.
fn has(folder: &Path, commit: &str) -> bool {
    is_commit(commit)
        && git(folder).args(["cat-file", "-e", &format!("{commit}^{{commit}}")]).output().is_ok_and(|output| output.status.success())
}

/// Takes a commit out of the repository around `here`.
fn check_out(here: &Path, commit: &str, work: &Path) -> Result<PathBuf> {
    let run = |command: &mut Command, what: &str| -> Result<String> {
        let output =
            command.output().map_err(|error| Error::new(Code::Missing, "cannot run `git`").because(error).next("apt-get install git"))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned());
        }
        Err(Error::new(Code::Failed, format!("cannot {what}")).detail(String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let root = run(git(here).args(["rev-parse", "--show-toplevel"]), "find the repository")?;
    let to = work.join("source");
    // Hooks are its user's, and are not run.
    let clone = ["-c", "core.hooksPath=/dev/null", "clone", "--quiet", "--shared", "--no-checkout", "--"];
    run(git(work).args(clone).arg(&root).arg(&to), "take the commit out of the repository")?;
    let check_out = ["-c", "core.hooksPath=/dev/null", "-c", "advice.detachedHead=false", "checkout", "--quiet", "--detach", commit];
    run(git(&to).args(check_out), "take the commit out of the repository")?;
    Ok(to)
}

/// The files that would go into a bake now, as provenance names them.
pub(crate) fn files(
    templates: &[kiln_model::account::Input],
    plan: &kiln_bake::plan::Plan,
    clean: &dyn Fn(&str) -> String,
) -> Vec<RecipeFile> {
    let templates = templates.iter().map(|file| RecipeFile { step: None, name: file.name.clone(), digest: file.digest });
    let steps = plan.steps.iter().flat_map(|step| {
        let of =
            |file: &kiln_model::account::Input| RecipeFile { step: Some(step.name.clone()), name: clean(&file.name), digest: file.digest };
        step.inputs.iter().map(of).collect::<Vec<_>>()
    });
    templates.chain(steps).collect()
}

/// A file that is not what it was, in words.
pub(crate) fn words(other: &OtherFile) -> String {
    let what = match (other.was, other.is) {
        (Some(was), Some(is)) => format!("was sha256:{}…, is sha256:{}…", was.short(), is.short()),
        (Some(_), None) => "is missing".to_owned(),
        _ => "is new".to_owned(),
    };
    match &other.step {
        Some(step) => format!("{} (step `{step}`) {what}", other.name),
        None => format!("{} {what}", other.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn provenance(commit: Option<String>, folder: &str) -> Provenance {
        let mut provenance = Provenance::read(&Value::Null);
        provenance.commit = commit;
        provenance.recipe.template = "kiln.toml".into();
        folder.clone_into(&mut provenance.recipe.folder);
        provenance
    }

    /// A repository with a template of two states; gives the first commit.
    fn repository(folder: &Path) -> String {
        let run = |arguments: &[&str]| {
            let output = git(folder).args(["-c", "user.name=x", "-c", "user.email=x@example.org"]).args(arguments).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        run(&["init", "-q"]);
        std::fs::create_dir(folder.join("images")).unwrap();
        std::fs::write(folder.join("images/kiln.toml"), "one").unwrap();
        run(&["add", "."]);
        run(&["commit", "-qm", "one"]);
        run(&["tag", "v1"]);
        let first = run(&["rev-parse", "HEAD"]);
        std::fs::write(folder.join("images/kiln.toml"), "two").unwrap();
        run(&["commit", "-qam", "two"]);
        std::fs::write(folder.join("images/kiln.toml"), "not committed").unwrap();
        first
    }

    #[test]
    fn a_commit_is_taken_out_and_nothing_is_written_where_it_came_from() {
        let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = repository(folder.path());
        let listed = || {
            let all = Command::new("find").arg(folder.path()).args(["-printf", "%p %s %T@\n"]).output().unwrap();
            String::from_utf8(all.stdout).unwrap()
        };
        let before = listed();
        let found = find(&provenance(Some(first.clone()), "images"), None, &folder.path().join("images"), work.path()).unwrap();
        assert_eq!(found.commit.as_deref(), Some(first.as_str()));
        assert_eq!(std::fs::read_to_string(&found.template).unwrap(), "one");
        assert!(found.template.starts_with(work.path()));
        assert_eq!(listed(), before);
        // Tags come along: a version may be made of them.
        let described = git(found.template.parent().unwrap()).args(["describe", "--tags"]).output().unwrap();
        assert_eq!(String::from_utf8(described.stdout).unwrap().trim(), "v1");
    }

    #[test]
    fn without_the_commit_the_folder_here_will_do() {
        let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        repository(folder.path());
        let here = folder.path().join("images");
        for commit in [None, Some("0".repeat(40)), Some("--upload-pack=x".into())] {
            let found = find(&provenance(commit, "images"), None, &here, work.path()).unwrap();
            assert_eq!(found, Found { template: here.join("kiln.toml"), commit: None });
        }
        let error = find(&provenance(Some("0".repeat(40)), ""), None, work.path(), work.path()).unwrap_err();
        assert_eq!(error.kind(), Code::NotFound);
        assert!(error.next_move().unwrap().contains("--template"), "{error:?}");
    }

    #[test]
    fn what_is_named_wins_and_has_to_be_there() {
        let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = repository(folder.path());
        let given = folder.path().join("images");
        let found = find(&provenance(Some(first), "images"), Some(&given), work.path(), work.path()).unwrap();
        assert_eq!(found.commit, None);
        assert_eq!(find(&provenance(None, ""), Some(work.path()), folder.path(), work.path()).unwrap_err().kind(), Code::NotFound);
    }

    #[test]
    fn provenance_cannot_lead_out_of_the_repository() {
        let folder = tempfile::tempdir().unwrap();
        let first = repository(folder.path());
        for bad in ["../..", "/etc"] {
            let fresh = tempfile::tempdir().unwrap();
            let error = find(&provenance(Some(first.clone()), bad), None, folder.path(), fresh.path()).unwrap_err();
            assert_eq!(error.kind(), Code::Refused, "{bad}");
        }
    }

    #[test]
    fn files_are_named_with_what_happened_to_them() {
        use kiln_model::Digest;
        let other = |step: Option<&str>, was: Option<Digest>, is: Option<Digest>| OtherFile {
            step: step.map(Into::into),
            name: "f".into(),
            was,
            is,
        };
        let (a, b) = (Digest::of("a"), Digest::of("b"));
        assert_eq!(words(&other(None, Some(a), Some(b))), format!("f was sha256:{}…, is sha256:{}…", a.short(), b.short()));
        assert_eq!(words(&other(Some("site"), Some(a), None)), "f (step `site`) is missing");
        assert_eq!(words(&other(Some("site"), None, Some(b))), "f (step `site`) is new");
    }
}

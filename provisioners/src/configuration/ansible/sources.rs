//! What of this machine goes to Ansible.

use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use kiln_model::settings::{Place, Problems, Reader, existing_path};
use kiln_model::tree::{Entry, Kind, Tree};
use kiln_model::{Code, Error, Result, ResultExt as _};

use super::{Input, Play};

/// Where the playbook is put.
pub(super) const PROJECT: &str = "project";
/// What Ansible finds beside a playbook.
const BESIDE: [&str; 15] = [
    "roles",
    "tasks",
    "handlers",
    "templates",
    "files",
    "vars",
    "group_vars",
    "host_vars",
    "library",
    "module_utils",
    "filter_plugins",
    "lookup_plugins",
    "test_plugins",
    "action_plugins",
    "collections",
];
/// What in a folder is nobody's input.
const NOISE: [&str; 3] = [".git", "__pycache__", ".pytest_cache"];
/// What a role has at least one of.
const OF_A_ROLE: [&str; 5] = ["tasks", "meta", "handlers", "defaults", "vars"];

/// Reads the keys that are paths into `play`.
pub(super) fn read(reader: &mut Reader<'_>, folder: &Path, play: &mut Play, problems: &mut Problems) {
    let place = reader.entry("playbook").map_or(reader.place(), |entry| entry.node.place);
    if reader.required_string("playbook", problems).is_some()
        && let Some(path) = reader.existing_path("playbook", folder, problems)
    {
        playbook(&path, folder, play, place, problems);
    }
    for (number, (text, place)) in reader.strings("roles", problems).unwrap_or_default().into_iter().enumerate() {
        if let Some(path) = directory("roles", text, place, folder, problems) {
            let to = format!("roles/{number}");
            play.roles.push(to.clone());
            // A single role goes into a folder of its own, under its name.
            let role = OF_A_ROLE.iter().any(|name| path.join(name).join("main.yml").is_file());
            match path.canonicalize().ok().as_deref().and_then(Path::file_name).and_then(|name| name.to_str()) {
                Some(name) if role => play.inputs.push(Input { to: format!("{to}/{name}"), from: path }),
                _ => play.inputs.push(Input { from: path, to }),
            }
        }
    }
    for (number, (text, place)) in reader.strings("collections", problems).unwrap_or_default().into_iter().enumerate() {
        if let Some(path) = directory("collections", text, place, folder, problems) {
            if !path.join("ansible_collections").is_dir() {
                problems
                    .add(place, format!("`{text}` holds no collections"))
                    .help("name the folder that `ansible_collections` is in: `ansible-galaxy collection install -p FOLDER NAME` makes one");
            }
            let to = format!("collections/{number}");
            play.collections.push(to.clone());
            play.inputs.push(Input { from: path, to });
        }
    }
    for key in ["group_vars", "host_vars"] {
        let place = reader.entry(key).map_or(reader.place(), |entry| entry.node.place);
        if let Some(text) = reader.string(key, problems)
            && let Some(path) = directory(key, text, place, folder, problems)
        {
            play.inputs.push(Input { from: path, to: format!("inventory/{key}") });
        }
    }
}

fn directory(key: &str, text: &str, place: Place, folder: &Path, problems: &mut Problems) -> Option<PathBuf> {
    let path = existing_path(text, place, folder, problems)?;
    if !path.is_dir() {
        problems.add(place, format!("`{text}` is no folder")).help(format!("`{key}` takes folders"));
        return None;
    }
    Some(path)
}

/// A playbook in a folder of its own comes with all of that. Where the template
/// is, too, there may be anything: then it comes with what Ansible looks for
/// beside it.
fn playbook(path: &Path, folder: &Path, play: &mut Play, place: Place, problems: &mut Problems) {
    let name = path.file_name().and_then(|name| name.to_str());
    let (Some(name), Some(parent), true) = (name, path.parent(), path.is_file()) else {
        problems.add(place, "a playbook is a file").help("name the playbook itself, such as \"site.yml\"");
        return;
    };
    name.clone_into(&mut play.playbook);
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    if !real(folder).starts_with(real(parent)) {
        play.inputs.push(Input { from: parent.to_owned(), to: PROJECT.into() });
        return;
    }
    play.inputs.push(Input { from: path.to_owned(), to: format!("{PROJECT}/{name}") });
    for name in BESIDE {
        let path = parent.join(name);
        if path.is_dir() {
            play.inputs.push(Input { from: path, to: format!("{PROJECT}/{name}") });
        }
    }
}

/// What is in an input. A link that leads out of it is refused: Ansible would
/// read what no key knows.
pub(super) fn walk(path: &Path) -> Result<Tree> {
    let mut tree = Tree::walk(path)?;
    let noise = |part: &str| NOISE.contains(&part) || Path::new(part).extension().is_some_and(|end| end == "pyc" || end == "retry");
    tree.entries.retain(|entry| !entry.path.split('/').any(noise));
    for entry in &tree.entries {
        if let Kind::Link(target) = &entry.kind
            && leaves(&entry.path, target)
        {
            let link = tree.location(entry);
            let message = format!("{} is a link to {}, out of {}", link.display(), target.display(), path.display());
            return Err(Error::new(Code::Usage, message).next("name what it leads to in the step (`roles`, `collections`), or copy it"));
        }
    }
    Ok(tree)
}

/// Whether a link at `path` leads out of the tree that it is in.
fn leaves(path: &str, target: &Path) -> bool {
    let mut depth = path.split('/').count() - 1;
    for part in target.components() {
        match part {
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::ParentDir if depth > 0 => depth -= 1,
            _ => return true,
        }
    }
    false
}

/// Copies a tree; what is copied can be removed by this user.
pub(super) fn copy(tree: &Tree, to: &Path) -> Result<()> {
    for entry in &tree.entries {
        let target = if entry.path.is_empty() { to.to_owned() } else { to.join(&entry.path) };
        copy_one(tree, entry, &target).trying(|| format!("copy {}", tree.location(entry).display()))?;
    }
    Ok(())
}

fn copy_one(tree: &Tree, entry: &Entry, target: &Path) -> std::io::Result<()> {
    if let Some(parent) = target.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    match &entry.kind {
        Kind::Folder => {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(target)?;
            std::fs::set_permissions(target, std::fs::Permissions::from_mode(entry.mode | 0o700))
        }
        Kind::Link(to) => std::os::unix::fs::symlink(to, target),
        Kind::File(_) => std::fs::copy(tree.location(entry), target).map(drop),
    }
}

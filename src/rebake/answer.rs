//! What came of baking an image again, for people and programs.

use std::collections::BTreeMap;

use kiln_contents::diff::{Difference, FileChange, Group, GroupName};
use kiln_evidence::{Examined, Failure};
use serde_json::{Value, json};

use super::origin::Origin;
use super::source::words;
use crate::commands::rebake::Done;
use crate::output::{seconds, table};

/// Whether files of a group have to be the same in two bakes of the same. The
/// others change in every bake.
pub(crate) fn matters(group: GroupName) -> bool {
    matches!(group, GroupName::Other | GroupName::Packages)
}

/// The files that do not reproduce, and where each comes from.
fn files(done: &Done) -> impl Iterator<Item = (&FileChange, Origin)> {
    let of = |file: &FileChange| done.origins.of(&file.path, file.change, done.same_base());
    let groups = done.difference.files.iter().filter(|group| matters(group.group));
    groups.flat_map(|group| &group.files).map(move |file| (file, of(file)))
}

/// How many files of each origin do not reproduce.
fn counts(done: &Done) -> BTreeMap<Origin, usize> {
    let mut counts = BTreeMap::new();
    for (_, origin) in files(done) {
        *counts.entry(origin).or_default() += 1;
    }
    counts
}

/// The groups that change in every bake.
fn noise(done: &Done) -> impl Iterator<Item = &Group> {
    done.difference.files.iter().filter(|group| !matters(group.group))
}

/// Who vouches for the provenance.
fn signed(examined: &Examined) -> String {
    let says = examined.failures.iter().find_map(|failure| if let Failure::Key { says } = failure { Some(says) } else { None });
    match (examined.signers.first(), says) {
        (Some(signer), _) => format!("signed by sha256:{}…", signer.short()),
        (None, Some(says)) => format!("said to be signed by {says}, which was not checked: name its public key with --key"),
        (None, None) if examined.signed => "signed, which was not checked: name the public key with --key".to_owned(),
        (None, None) => "not signed: whoever may write here may have written it".to_owned(),
    }
}

/// The difference with where each file comes from among its notes, for a page
/// that knows of no steps.
pub(crate) fn with_origins(done: &Done) -> Difference {
    let mut difference = done.difference.clone();
    difference.notes.extend(files(done).map(|(file, origin)| format!("{} comes from {origin}", file.path)));
    difference
}

/// For programs.
pub(crate) fn as_json(done: &Done, examined: &Examined) -> Value {
    let says = examined.failures.iter().find_map(|failure| if let Failure::Key { says } = failure { Some(says) } else { None });
    let counts = counts(done);
    let steps: Vec<Value> = done
        .baked
        .steps
        .iter()
        .map(|step| {
            let differ = counts.get(&Origin::Step(step.name.clone())).copied().unwrap_or_default();
            json!({
                "name": step.name, "key": step.key, "same_key": done.same_base() && !done.other_keys.contains(&step.name),
                "seconds": step.seconds, "touched": done.origins.touched(&step.name), "differ": differ,
            })
        })
        .collect();
    let files: Vec<Value> = files(done)
        .map(|(file, origin)| {
            let mut value = json!(file);
            if let Some(object) = value.as_object_mut() {
                object.insert("origin".into(), json!(origin));
            }
            value
        })
        .collect();
    let other = |other: &kiln_evidence::OtherFile| json!({ "step": other.step, "name": other.name, "was": other.was, "is": other.is });
    let group = |group: &Group| json!({ "group": group.group, "added": group.added, "removed": group.removed, "changed": group.changed });
    let Difference { from, to, same_disk, packages, config, notes, .. } = &done.difference;
    json!({
        "reproduces": done.reproduces(), "same_disk": same_disk, "image": from, "again": to,
        "provenance": { "digest": examined.digest, "signed": examined.signed, "signers": examined.signers, "says": says },
        "source": done.source.as_json(), "changed_files": done.others.iter().map(other).collect::<Vec<_>>(),
        "base": { "same": done.same_base(), "was": done.bases.0, "is": done.bases.1 },
        "steps": steps, "files": files, "packages": packages, "config": config,
        "ignored": noise(done).map(group).collect::<Vec<_>>(), "notes": notes,
        "kept": done.kept.as_ref().map(|(name, digest)| json!({ "name": name, "digest": digest })), "seconds": done.baked.seconds,
    })
}

/// For people.
pub(crate) fn draw(done: &Done, examined: &Examined, reference: &str) -> String {
    let mut text = format!("{reference} was baked again in {} from {}\n", seconds(done.baked.seconds), done.source.describe());
    let mut line = |what: String| {
        text.push_str(&what);
        text.push('\n');
    };
    line(format!("provenance: {}", signed(examined)));
    match done.same_base() {
        true => line(format!("base: the same, sha256:{}…", done.bases.0.short())),
        false => line(format!("base: another one, sha256:{}… instead of sha256:{}…", done.bases.1.short(), done.bases.0.short())),
    }
    for other in &done.others {
        line(format!("changed: {}", words(other)));
    }
    for step in &done.other_keys {
        line(format!("step `{step}` is not what it was: its settings, or what it is made of, differ"));
    }
    for note in &done.difference.notes {
        line(note.clone());
    }
    let mut rows = vec![["PATH", "WHAT", "STEP"].map(String::from).to_vec()];
    rows.extend(files(done).map(|(file, origin)| vec![file.path.clone(), what(file), origin.to_string()]));
    if rows.len() > 1 {
        line(format!("\n{}", table(&rows).trim_end()));
    }
    let mut rows = vec![["PACKAGE", "WAS", "IS"].map(String::from).to_vec()];
    let version = |version: &Option<String>| version.clone().unwrap_or_else(|| "-".to_owned());
    rows.extend(done.difference.packages.iter().map(|package| vec![package.name.clone(), version(&package.from), version(&package.to)]));
    if rows.len() > 1 {
        line(format!("\n{}", table(&rows).trim_end()));
    }
    let ignored: Vec<String> =
        noise(done).map(|group| format!("{} {}", group.added + group.removed + group.changed, group.group.title())).collect();
    if !ignored.is_empty() {
        line(format!("\nthey change in every bake: {}", ignored.join(", ")));
    }
    let counts: Vec<String> = counts(done).into_iter().map(|(origin, count)| format!("{origin} {count}")).collect();
    line(match (done.reproduces(), counts.is_empty()) {
        (true, _) if done.difference.same_disk => "it reproduces: the disks are the same, bit by bit".to_owned(),
        (true, _) => "it reproduces: no file differs but those that change in every bake".to_owned(),
        (false, true) => "it does not reproduce".to_owned(),
        (false, false) => format!("it does not reproduce: {}", counts.join(", ")),
    });
    if let Some((name, digest)) = &done.kept {
        line(format!("kept as {name}, {digest}"));
    }
    text.trim_end().to_owned()
}

/// What happened to a file, in a word or two.
fn what(file: &FileChange) -> String {
    use kiln_contents::diff::Change;
    match file.change {
        Change::Added => "only now".to_owned(),
        Change::Removed => "only then".to_owned(),
        Change::Changed => {
            let word = |what| serde_json::to_value(what).ok().and_then(|value| value.as_str().map(ToOwned::to_owned)).unwrap_or_default();
            file.what.iter().map(word).collect::<Vec<_>>().join(", ")
        }
    }
}

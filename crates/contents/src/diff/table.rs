//! A difference for people at a terminal.

use std::fmt::Write as _;

use kiln_model::Digest;

use super::{Change, Difference, FileChange, Group, GroupName, Named, PackageChangeKind, What};
use crate::text::{bytes, change, line};

/// Most files that are listed unless all are asked for.
const MOST: usize = 50;
/// A directory that came or went with at least so many things in it is one line.
const FOLD: usize = 4;

/// A file, or a directory that came or went with all that is in it.
pub(crate) struct Row<'a> {
    /// The file or directory.
    pub(crate) file: &'a FileChange,
    /// What is in it.
    pub(crate) within: &'a [FileChange],
}

/// Files as rows; directories with at least `fold` things in them that all came
/// or all went are one row.
pub(crate) fn rows(files: &[FileChange], fold: usize) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    let mut rest = files;
    while let Some((file, after)) = rest.split_first() {
        rest = after;
        let mut within: &[FileChange] = &[];
        if file.change != Change::Changed {
            let folder = format!("{}/", file.path);
            let below = after.iter().take_while(|other| other.path.starts_with(&folder)).count();
            let (inside, beyond) = after.split_at(below);
            if below >= fold && inside.iter().all(|other| other.change == file.change) {
                (within, rest) = (inside, beyond);
            }
        }
        rows.push(Row { file, within });
    }
    rows
}

/// Bytes of a file, in the image that has it.
fn size(file: &FileChange) -> u64 {
    file.to.as_ref().or(file.from.as_ref()).map_or(0, |facts| facts.size)
}

/// What happened to a file, in words.
pub(crate) fn words(row: &Row<'_>) -> String {
    let file = row.file;
    if !row.within.is_empty() {
        return format!("{} more inside, {}", row.within.len(), bytes(row.within.iter().map(size).sum()));
    }
    let (Some(from), Some(to)) = (&file.from, &file.to) else {
        let facts = file.to.as_ref().or(file.from.as_ref());
        return match facts {
            Some(facts) if facts.target.is_some() => format!("→ {}", facts.target.as_deref().unwrap_or_default()),
            Some(facts) => {
                let kind = super::config::word(&facts.kind).replace('-', " ");
                let size = if kind == "file" { bytes(facts.size) } else { kind };
                let owner = if (facts.uid, facts.gid) == (0, 0) { String::new() } else { format!(", {}:{}", facts.uid, facts.gid) };
                let special = if facts.mode.starts_with('0') { String::new() } else { format!(", mode {}", facts.mode) };
                format!("{size}{owner}{special}")
            }
            None => String::new(),
        };
    };
    let what = |what: &What| match what {
        What::Type => format!("{} → {}", super::config::word(&from.kind), super::config::word(&to.kind)),
        What::Mode => format!("mode {} → {}", from.mode, to.mode),
        What::Owner => format!("owner {}:{} → {}:{}", from.uid, from.gid, to.uid, to.gid),
        What::Content if from.size == to.size => "content".to_owned(),
        What::Content => format!("content, {} → {}", bytes(from.size), bytes(to.size)),
        What::Target => format!("{} → {}", from.target.as_deref().unwrap_or_default(), to.target.as_deref().unwrap_or_default()),
        What::Device => "device numbers".to_owned(),
        What::Attributes => {
            let names = from.attributes.keys().chain(to.attributes.keys().filter(|name| !from.attributes.contains_key(*name)));
            let part = |name: &String| match (from.attributes.get(name), to.attributes.get(name)) {
                (Some(from), Some(to)) if from == to => None,
                (from, to) => Some(format!("{name} {}", values(from.map(String::as_str), to.map(String::as_str)))),
            };
            names.filter_map(part).collect::<Vec<_>>().join(", ")
        }
    };
    file.what.iter().map(what).collect::<Vec<_>>().join("; ")
}

/// How many files of a group came, went and changed, and how much they grew.
pub(crate) fn counts(group: &Group) -> String {
    let parts = [(group.added, "added"), (group.removed, "removed"), (group.changed, "changed")];
    let parts: Vec<String> = parts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    format!("{}; {}", parts.join(", "), change(group.size_from, group.size_to))
}

/// How many packages came, went and changed.
pub(crate) fn package_counts(difference: &Difference) -> String {
    let count = |kind| difference.packages.iter().filter(|package| package.change == kind).count();
    let all = [
        (count(PackageChangeKind::Added), "added"),
        (count(PackageChangeKind::Removed), "removed"),
        (count(PackageChangeKind::Upgraded), "upgraded"),
        (count(PackageChangeKind::Downgraded), "downgraded"),
    ];
    let parts: Vec<String> = all.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    if parts.is_empty() { "the same".to_owned() } else { parts.join(", ") }
}

/// A field's values: `a → b`, `a (removed)`.
pub(crate) fn values(from: Option<&str>, to: Option<&str>) -> String {
    // Of a digest the first digits are enough to see that it is another one.
    let value = |text: &str| text.parse::<Digest>().map_or_else(|_| line(text), |digest| short(Some(digest)));
    match (from, to) {
        (Some(from), Some(to)) => format!("{} → {}", value(from), value(to)),
        (Some(from), None) => format!("{} (removed)", value(from)),
        (None, Some(to)) => format!("{} (added)", value(to)),
        (None, None) => String::new(),
    }
}

fn columns(rows: &[[String; 3]], out: &mut String) {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    // One long path must not push everything else out of sight.
    let (first, second) = (width(0), width(1).min(72));
    for [mark, name, what] in rows {
        let text = format!("  {mark:first$} {name:second$}  {what}");
        let _ = writeln!(out, "{}", text.trim_end());
    }
}

/// The first 12 digits of a digest.
pub(crate) fn short(digest: Option<Digest>) -> String {
    digest.map_or_else(|| "-".to_owned(), |digest| format!("sha256:{}", digest.short()))
}

fn lineage(image: &Named) -> String {
    let base = image.base.clone().unwrap_or_else(|| short(image.base_digest));
    let mut text = format!("base {base}");
    if let Some(predecessor) = &image.predecessor {
        let _ = write!(text, ", after {predecessor}");
    }
    if !image.channels.is_empty() {
        let _ = write!(text, ", in {}", image.channels.join(", "));
    }
    text
}

/// A difference as text. Without `all`, long lists are cut, and groups of what
/// changes in every bake are one line each.
pub fn table(difference: &Difference, all: bool) -> String {
    let (a, b) = (&difference.from, &difference.to);
    let mut out = format!("{} → {}\n", a.reference, b.reference);
    let row = |mark: &str, name: &str, what: String| [mark.to_owned(), name.to_owned(), what];
    let mut head = vec![row("", "digest", format!("{} → {}", short(a.digest), short(b.digest)))];
    let disk = |image: &Named| format!("{}, {} used", bytes(image.disk_size), bytes(image.used));
    let grown = if difference.same_disk { "the same bytes".to_owned() } else { change(a.used, b.used) };
    head.push(row("", "disk", format!("{} → {} ({grown})", disk(a), disk(b))));
    head.push(row("", "lineage", format!("{} → {}", lineage(a), lineage(b))));
    columns(&head, &mut out);
    for note in &difference.notes {
        let _ = writeln!(out, "  note: {}", line(note));
    }
    if !difference.differs {
        out.push_str("\nNothing differs.\n");
        return out;
    }
    for (title, fields) in [("Config", &difference.config), ("Provenance", &difference.provenance)] {
        if !fields.is_empty() {
            let _ = writeln!(out, "\n{title}");
            let rows: Vec<_> = fields.iter().map(|f| row("", &line(&f.field), values(f.from.as_deref(), f.to.as_deref()))).collect();
            columns(&rows, &mut out);
        }
    }
    let _ = writeln!(out, "\nPackages: {}", package_counts(difference));
    let packages = difference.packages.iter().map(|package| {
        let mark = match package.change {
            PackageChangeKind::Added => "+",
            PackageChangeKind::Removed => "-",
            PackageChangeKind::Upgraded => "↑",
            PackageChangeKind::Downgraded => "↓",
        };
        let versions = match (&package.from, &package.to) {
            (Some(from), Some(to)) => format!("{} → {}", line(from), line(to)),
            (from, to) => line(from.as_deref().or(to.as_deref()).unwrap_or_default()),
        };
        row(mark, &line(&package.name), versions)
    });
    columns(&packages.collect::<Vec<_>>(), &mut out);
    let other = difference.files.iter().find(|group| group.group == GroupName::Other);
    let files = match other {
        _ if difference.files.is_empty() => "the same".to_owned(),
        Some(other) => counts(other),
        None => "only those that packages and caches explain".to_owned(),
    };
    let _ = writeln!(out, "\nFiles: {files}");
    for group in &difference.files {
        let open = all || group.group == GroupName::Other;
        if group.group != GroupName::Other {
            let _ = writeln!(out, "  {}: {}", group.group.title(), counts(group));
        }
        if open {
            let rows = rows(&group.files, if all { usize::MAX } else { FOLD });
            let most = if all { rows.len() } else { MOST };
            let shown = rows.iter().take(most).map(|entry| {
                let mark = match entry.file.change {
                    Change::Added => "+",
                    Change::Removed => "-",
                    Change::Changed => "~",
                };
                let slash = if !entry.within.is_empty() { "/" } else { "" };
                row(mark, &format!("{}{slash}", entry.file.path), words(entry))
            });
            columns(&shown.collect::<Vec<_>>(), &mut out);
            if rows.len() > most {
                let _ = writeln!(out, "    … and {} more; `--files` lists them all", rows.len() - most);
            }
        }
    }
    out.lines().map(str::trim_end).collect::<Vec<_>>().join("\n") + "\n"
}

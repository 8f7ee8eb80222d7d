//! Drift for people at a terminal.

use std::fmt::Write as _;

use super::{Drift, Facts, FileDrift};
use crate::diff::{Change, PackageChangeKind, What};
use crate::text::{bytes, line};

/// Most paths of a kind that are listed unless all are asked for.
const MOST: usize = 100;

/// What differs, by what happened. `all`: every path, also those that are part
/// of something else that is listed.
pub fn table(drift: &Drift, all: bool) -> String {
    let mut out = String::new();
    if !drift.packages.is_empty() {
        out.push_str("packages\n");
    }
    for package in &drift.packages {
        let (sign, versions) = match package.change {
            PackageChangeKind::Added => ('+', line(package.to.as_deref().unwrap_or_default())),
            PackageChangeKind::Removed => ('-', line(package.from.as_deref().unwrap_or_default())),
            _ => {
                let version = |text: &Option<String>| line(text.as_deref().unwrap_or_default());
                ('~', format!("{} → {}", version(&package.from), version(&package.to)))
            }
        };
        let _ = write!(out, "  {sign} {} {versions}", line(&package.name));
        if package.files > 0 {
            let _ = write!(out, "  {}", count(package.files, "path"));
        }
        if let Some(by) = &package.by {
            let user = by.user.as_deref().map(|user| format!(", requested by {}", line(user))).unwrap_or_default();
            let _ = write!(out, "  by `{}`{user}, {}", line(&by.command), line(&by.at));
        }
        out.push('\n');
    }
    if !drift.units.is_empty() {
        out.push_str("units\n");
    }
    for unit in &drift.units {
        let sign = if unit.from.is_none() {
            '+'
        } else if unit.to.is_none() {
            '-'
        } else {
            '~'
        };
        let words: Vec<String> = [&unit.from, &unit.to].into_iter().flatten().map(|words| line(words)).collect();
        let of = unit.package.as_deref().map(|package| format!("  of {}", line(package))).unwrap_or_default();
        let _ = writeln!(out, "  {sign} {}  {}{of}", unit.name, words.join(" → "));
    }
    for (change, head, sign) in [(Change::Changed, "changed", '~'), (Change::Added, "added", '+'), (Change::Removed, "removed", '-')] {
        let files: Vec<&FileDrift> = drift.files.iter().filter(|file| file.change == change && (all || !file.explained)).collect();
        if files.is_empty() {
            continue;
        }
        let _ = writeln!(out, "{head}");
        let mut rest = files.as_slice();
        let mut listed = 0;
        while let Some((file, after)) = rest.split_first() {
            rest = after;
            if listed == MOST && !all {
                let _ = writeln!(out, "  … and {} more: --all lists them", 1 + rest.len());
                break;
            }
            listed += 1;
            // A directory that came or went is one line, with all that is in it.
            let mut within = 0;
            if change != Change::Changed && !all {
                let folder = format!("{}/", file.path);
                within = rest.iter().take_while(|other| other.path.starts_with(&folder)).count();
                rest = &rest[within..];
            }
            let _ = writeln!(out, "  {sign} {}  {}", file.path, words(file, within));
        }
    }
    if !drift.differs {
        out.push_str("nothing has changed since the bake\n");
    }
    let of = |change| drift.files.iter().filter(|file| file.change == change && !file.explained).count();
    if drift.differs {
        let (changed, added, removed) = (of(Change::Changed), of(Change::Added), of(Change::Removed));
        let (packages, units) = (count(drift.packages.len(), "package"), count(drift.units.len(), "unit"));
        let _ = writeln!(out, "{changed} changed, {added} added, {removed} removed; {packages}, {units}");
    }
    if drift.mutable > 0 {
        let _ =
            writeln!(out, "{} that may change {} changed", count(drift.mutable, "path"), if drift.mutable == 1 { "has" } else { "have" });
    }
    for note in &drift.notes {
        let _ = writeln!(out, "note: {}", line(note));
    }
    out
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// What happened to a path, in words.
fn words(file: &FileDrift, within: usize) -> String {
    let mut parts = Vec::new();
    match (&file.from, &file.to) {
        (Some(from), Some(to)) => parts.extend(file.what.iter().map(|what| difference(*what, from, to))),
        (from, to) => {
            if let Some(facts) = to.as_ref().or(from.as_ref()) {
                parts.push(match &facts.target {
                    Some(target) => format!("→ {target}"),
                    None if facts.kind == "file" => format!("{}, mode {}", bytes(facts.size), facts.mode),
                    None => format!("{}, mode {}", facts.kind, facts.mode),
                });
            }
        }
    }
    if within > 0 {
        parts.push(format!("{within} more inside"));
    }
    if let Some(owner) = file.owner.as_deref().filter(|owner| *owner != "root") {
        parts.push(format!("of user {}", line(owner)));
    }
    if let Some(because) = &file.because {
        parts.push(line(because));
    } else if let Some(package) = &file.package {
        parts.push(format!("of package {}", line(package)));
    }
    if let Some(touched) = &file.touched {
        parts.push(touched.clone());
    }
    parts.join("; ")
}

fn difference(what: What, from: &Facts, to: &Facts) -> String {
    match what {
        What::Type => format!("{} → {}", from.kind, to.kind),
        What::Mode => format!("mode {} → {}", from.mode, to.mode),
        What::Owner => format!("owner {}:{} → {}:{}", from.uid, from.gid, to.uid, to.gid),
        What::Content if from.size == to.size => "content".to_owned(),
        What::Content => format!("content, {} → {}", bytes(from.size), bytes(to.size)),
        What::Target => format!("{} → {}", from.target.as_deref().unwrap_or_default(), to.target.as_deref().unwrap_or_default()),
        What::Device => "device numbers".to_owned(),
        What::Attributes => {
            let names: std::collections::BTreeSet<&String> = from.attributes.keys().chain(to.attributes.keys()).collect();
            let value = |facts: &Facts, name: &String| facts.attributes.get(name).cloned().unwrap_or_else(|| "none".to_owned());
            let differs = names.into_iter().filter(|name| from.attributes.get(*name) != to.attributes.get(*name));
            differs.map(|name| format!("{name} {} → {}", value(from, name), value(to, name))).collect::<Vec<_>>().join(", ")
        }
    }
}

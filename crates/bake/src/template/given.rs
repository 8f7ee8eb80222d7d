//! Variables' values from outside the template: `KILN_VAR_*`, `--var-file`,
//! `--var`.
//!
//! Texts that are kept so that problems can point into them are shown to
//! people, and so to logs: in them every value that is sensitive, or of a
//! variable nobody declared (a misspelt one), is masked.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use kiln_model::settings::{Node, Place, Problems, Value};

use super::Inputs;
use super::source::{self, Sources};
use super::variables::Variable;

/// Where a value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// `KILN_VAR_NAME`.
    Environment,
    /// A var-file that its owner alone can read.
    PrivateFile,
    /// A var-file that others can read.
    OpenFile,
    /// `--var`.
    Argument,
}

/// A value that was given.
pub(super) struct Given {
    pub(super) value: Value,
    pub(super) origin: Origin,
    /// Where its name stands.
    pub(super) place: Place,
    /// Where the value stands.
    pub(super) value_place: Place,
}

/// Everything that was given, what counts more after what counts less.
pub(super) fn collect(
    inputs: &Inputs,
    declared: &BTreeMap<String, Variable>,
    sources: &mut Sources,
    problems: &mut Problems,
) -> Vec<(String, Given)> {
    let open = |name: &str| declared.get(name).is_some_and(|variable| !variable.sensitive);
    let mut all = Vec::new();
    for (key, value) in &inputs.environment {
        // An undeclared one may be another template's.
        if let Some(name) = key.strip_prefix("KILN_VAR_").filter(|name| declared.contains_key(*name)) {
            let shown = if open(name) { value } else { "***" };
            all.push((name.to_owned(), pair(key, key, value, shown, Origin::Environment, sources)));
        }
    }
    for path in &inputs.var_files {
        var_file(path, declared, &mut all, sources, problems);
    }
    for (name, value) in &inputs.vars {
        let shown = if open(name) { value } else { "***" };
        all.push((name.clone(), pair("--var", name, value, shown, Origin::Argument, sources)));
    }
    all
}

fn pair(source: &str, key: &str, value: &str, shown: &str, origin: Origin, sources: &mut Sources) -> Given {
    let text = format!("{key}={shown}");
    let (middle, end) = (key.len(), text.len());
    let source = sources.add(source, text);
    Given {
        value: Value::String(value.to_owned()),
        origin,
        place: Place { source, start: 0, end: middle },
        value_place: Place { source, start: middle + 1, end },
    }
}

fn var_file(
    path: &Path,
    declared: &BTreeMap<String, Variable>,
    all: &mut Vec<(String, Given)>,
    sources: &mut Sources,
    problems: &mut Problems,
) {
    let read = std::fs::metadata(path).and_then(|meta| Ok((meta.permissions().mode(), std::fs::read_to_string(path)?)));
    let (mode, text) = match read {
        Ok(read) => read,
        Err(error) => {
            problems.add_nowhere(format!("cannot read the var-file `{}`: {error}", path.display()));
            return;
        }
    };
    let origin = if mode & 0o077 == 0 { Origin::PrivateFile } else { Origin::OpenFile };
    let source = sources.add(path.display().to_string(), String::new());
    let mut masked = text.clone().into_bytes();
    match source::parse(source, &text, problems) {
        Some(Node { value: Value::Table(table), .. }) => {
            for entry in table.entries {
                if declared.get(&entry.name).is_none_or(|variable| variable.sensitive) {
                    mask_node(&entry.node, &mut masked);
                }
                all.push((entry.name, Given { value_place: entry.node.place, value: entry.node.value, origin, place: entry.place }));
            }
        }
        // Which value is whose cannot be told.
        _ if origin == Origin::PrivateFile || declared.values().any(|variable| variable.sensitive) => mask(&mut masked),
        _ => {}
    }
    if let (Some(source), Ok(text)) = (sources.0.get_mut(source), String::from_utf8(masked)) {
        source.text = text;
    }
}

fn mask_node(node: &Node, text: &mut [u8]) {
    match &node.value {
        Value::Table(table) => table.entries.iter().for_each(|entry| mask_node(&entry.node, text)),
        Value::Array(items) => items.iter().for_each(|item| mask_node(item, text)),
        _ => {
            if let Some(bytes) = text.get_mut(node.place.start..node.place.end) {
                mask(bytes);
            }
        }
    }
}

/// Byte for byte, so that places stay right.
fn mask(text: &mut [u8]) {
    text.iter_mut().filter(|byte| !matches!(byte, b'\n' | b'\r')).for_each(|byte| *byte = b'*');
}

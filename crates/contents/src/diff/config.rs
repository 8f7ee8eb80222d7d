//! Configs and provenance of two images, field by field.

use std::collections::BTreeMap;

use kiln_model::image::Config;
use serde::Serialize;
use serde_json::Value;

use super::Side;
use crate::text;

/// A field that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Field {
    /// Which one: `version`, `label team`, `step packages`.
    pub field: String,
    /// In the first image.
    pub from: Option<String>,
    /// In the second image.
    pub to: Option<String>,
}

pub(super) fn config(from: &Side, to: &Side) -> Vec<Field> {
    let mut fields = Vec::new();
    let (a, b) = (&from.facts.config, &to.facts.config);
    let mut field = |name: &str, from: Option<String>, to: Option<String>| {
        if from != to {
            fields.push(Field { field: name.to_owned(), from, to });
        }
    };
    let firmware = |config: &Config| Some(word(&config.firmware));
    field("name", Some(a.name.clone()), Some(b.name.clone()));
    field("version", Some(a.version.clone()), Some(b.version.clone()));
    field("architecture", Some(a.architecture.clone()), Some(b.architecture.clone()));
    field("firmware", firmware(a), firmware(b));
    field("credentials", Some(a.credentials.to_string()), Some(b.credentials.to_string()));
    field("base", a.base.map(|digest| digest.to_string()), b.base.map(|digest| digest.to_string()));
    field("commit", a.commit.clone(), b.commit.clone());
    let disks =
        |side: &Side| side.facts.config.disks.iter().map(|disk| (disk.name.clone(), text::bytes(disk.size))).collect::<BTreeMap<_, _>>();
    for (name, from, to) in both(disks(from), disks(to)) {
        field(&format!("size of disk {name}"), from, to);
    }
    for (name, from, to) in both(a.labels.clone(), b.labels.clone()) {
        field(&format!("label {name}"), from, to);
    }
    // Names of steps are unique within a template; in its order, those that are gone last.
    let key = |side: &Side, name: &str| side.facts.config.steps.iter().find(|step| step.name == name).map(|step| step.key.to_string());
    let gone = a.steps.iter().filter(|step| !b.steps.iter().any(|other| other.name == step.name));
    for step in b.steps.iter().chain(gone) {
        field(&format!("step {}", step.name), key(from, &step.name), key(to, &step.name));
    }
    // The order, of those that both have.
    let order = |one: &Side, other: &Side| {
        let known = |name: &str| other.facts.config.steps.iter().any(|step| step.name == name);
        let names: Vec<_> = one.facts.config.steps.iter().map(|step| step.name.clone()).filter(|name| known(name)).collect();
        Some(names.join(", "))
    };
    field("order of the steps", order(from, to), order(to, from));
    fields
}

/// Every key of two maps with what each has there.
fn both(mut a: BTreeMap<String, String>, b: BTreeMap<String, String>) -> Vec<(String, Option<String>, Option<String>)> {
    let mut all: BTreeMap<String, (Option<String>, Option<String>)> = BTreeMap::new();
    for (name, value) in b {
        all.insert(name.clone(), (a.remove(&name), Some(value)));
    }
    all.extend(a.into_iter().map(|(name, value)| (name, (Some(value), None))));
    all.into_iter().map(|(name, (from, to))| (name, from, to)).collect()
}

/// What is other in every run, and says nothing.
const VOLATILE: [&str; 6] = ["invocationId", "startedOn", "finishedOn", "started", "finished", "seconds"];

/// Deepest level of a provenance that is gone into.
const DEPTH: usize = 24;

/// The fields of two JSON values that differ. Members of arrays go by their
/// name, where each has one, and by their number otherwise.
pub(super) fn values(from: &Value, to: &Value) -> Vec<Field> {
    // The statement's subject is the image itself, which always differs.
    let predicate = |value: &Value| value.get("predicate").unwrap_or(value).clone();
    let (mut a, mut b) = (BTreeMap::new(), BTreeMap::new());
    flatten("", &predicate(from), 0, &mut a);
    flatten("", &predicate(to), 0, &mut b);
    both(a, b).into_iter().filter(|(_, from, to)| from != to).map(|(field, from, to)| Field { field, from, to }).collect()
}

fn flatten(path: &str, value: &Value, depth: usize, out: &mut BTreeMap<String, String>) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(members) if depth < DEPTH => {
            for (name, value) in members.iter().filter(|(name, _)| !VOLATILE.contains(&name.as_str())) {
                flatten(&below(name), value, depth + 1, out);
            }
        }
        Value::Array(members) if depth < DEPTH => {
            let name = |value: &Value| ["name", "uri"].iter().find_map(|key| value.get(key)?.as_str().map(ToOwned::to_owned));
            let names: Vec<_> = members.iter().map(name).collect();
            let mut distinct: Vec<_> = names.iter().flatten().collect();
            distinct.sort();
            distinct.dedup();
            let named = distinct.len() == members.len();
            for (number, (value, name)) in members.iter().zip(&names).enumerate() {
                let name = name.as_ref().filter(|_| named).map_or_else(|| number.to_string(), Clone::clone);
                flatten(&format!("{path}[{name}]"), value, depth + 1, out);
            }
        }
        Value::Null => {}
        Value::String(text) => drop(out.insert(path.to_owned(), text.clone())),
        other => drop(out.insert(path.to_owned(), other.to_string())),
    }
}

/// The word that a value is in JSON.
pub(crate) fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(ToOwned::to_owned)).unwrap_or_default()
}

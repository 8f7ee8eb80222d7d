//! `ansible`: a playbook, from this machine or inside the guest.
//!
//! What Ansible is given stands in one folder that is made for the run
//! ([`layout`]), and nothing else of the user's does: what the key does not
//! know, Ansible does not find.

mod guest;
mod here;
mod layout;
mod said;
mod sources;

use std::collections::BTreeMap;
use std::path::Path;

use kiln_model::Result;
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::Provisioner;
use kiln_model::settings::{Node, Problems, Reader, Value, wrong_type};

use super::{Configuration, Input, Settings};
use crate::settings::finish;

/// What the guest is called in the inventory unless the step says otherwise.
const HOST: &str = "kiln";
/// How much Ansible can be made to say (`-vvvv`).
const LOUDEST: u64 = 4;

/// Reads `[provision.ansible]`.
pub(crate) struct AnsibleKind;

/// What a step gives to Ansible.
struct Play {
    /// The playbook's file name.
    playbook: String,
    /// Files and folders of this machine.
    inputs: Vec<Input>,
    /// Where roles are, below the run's folder.
    roles: Vec<String>,
    /// Where collections are, below the run's folder.
    collections: Vec<String>,
    /// What the guest is called.
    host: String,
    /// The groups that it is in.
    groups: Vec<String>,
    extra_vars: BTreeMap<String, serde_json::Value>,
    /// The secret that opens what ansible-vault closed.
    vault_password: Option<String>,
    /// Variables whose values are secrets, with those secrets' names.
    secret_vars: BTreeMap<String, String>,
    tags: Vec<String>,
    skip_tags: Vec<String>,
    /// How often `-v` is given.
    verbose: u64,
}

impl Kind<dyn Provisioner> for AnsibleKind {
    fn name(&self) -> &'static str {
        "ansible"
    }

    fn keys(&self) -> &'static [&'static str] {
        &[
            "playbook",
            "roles",
            "collections",
            "host",
            "groups",
            "group_vars",
            "host_vars",
            "extra_vars",
            "secret_vars",
            "vault_password",
            "tags",
            "skip_tags",
            "verbose",
            "from",
            "bootstrap",
            "keep",
            "converge",
        ]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let mut reader = Reader::new(settings, "[provision.ansible]", problems)?;
        let mut play = Play {
            playbook: String::new(),
            inputs: Vec::new(),
            roles: Vec::new(),
            collections: Vec::new(),
            host: reader.string("host", problems).unwrap_or(HOST).to_owned(),
            groups: names(&mut reader, "groups", problems),
            extra_vars: extra_vars(&mut reader, problems),
            vault_password: reader.string("vault_password", problems).map(Into::into),
            secret_vars: reader.string_map("secret_vars", problems).unwrap_or_default(),
            tags: names(&mut reader, "tags", problems),
            skip_tags: names(&mut reader, "skip_tags", problems),
            verbose: 0,
        };
        sources::read(&mut reader, folder, &mut play, problems);
        let place = reader.entry("host").map_or(settings.place, |entry| entry.node.place);
        if play.host.is_empty() || play.host == "localhost" || play.host.contains(char::is_whitespace) {
            problems.add(place, format!("`{}` cannot be the guest's name in the inventory", play.host));
        }
        if let Some(entry) = reader.entry("verbose") {
            play.verbose = match entry.node.value {
                Value::Boolean(on) => u64::from(on),
                Value::Integer(level) => u64::try_from(level).unwrap_or(u64::MAX),
                _ => wrong_type(&entry.node, "verbose", "true, false, or a number", problems).unwrap_or_default(),
            };
            if play.verbose > LOUDEST {
                problems.add(entry.node.place, format!("`verbose` goes from 0 to {LOUDEST}"));
            }
        }
        let place = reader.entry("from").map_or(settings.place, |entry| entry.node.place);
        let inside = match reader.string("from", problems) {
            None | Some("here") => false,
            Some("guest") => true,
            Some(other) => {
                problems
                    .add(place, format!("Ansible does not run from `{other}`"))
                    .help("write \"here\" (this machine, over SSH) or \"guest\" (inside the guest)");
                false
            }
        };
        let common = Settings::read(&mut reader, problems);
        finish(reader, settings, self.keys(), problems);
        if problems.0.len() != before {
            return None;
        }
        Some(if inside {
            Box::new(Configuration { tool: guest::Inside { play }, settings: common })
        } else {
            Box::new(here::Here { play, settings: common })
        })
    }
}

/// Words that Ansible takes in one argument, with commas between.
fn names(reader: &mut Reader<'_>, key: &'static str, problems: &mut Problems) -> Vec<String> {
    let mut names = Vec::new();
    for (name, place) in reader.strings(key, problems).unwrap_or_default() {
        if name.is_empty() || name.contains(|c: char| c == ',' || c.is_whitespace()) {
            problems.add(place, format!("`{name}` cannot be one of `{key}`")).help("one name each, without commas and spaces");
        }
        names.push(name.to_owned());
    }
    names
}

fn extra_vars(reader: &mut Reader<'_>, problems: &mut Problems) -> BTreeMap<String, serde_json::Value> {
    let Some(entry) = reader.entry("extra_vars") else { return BTreeMap::new() };
    let Value::Table(table) = &entry.node.value else {
        return wrong_type(&entry.node, "extra_vars", "a table", problems).unwrap_or_default();
    };
    table.entries.iter().map(|entry| (entry.name.clone(), json(&entry.node.value))).collect()
}

/// A value as Ansible gets it. The order of a table's keys means nothing.
fn json(value: &Value) -> serde_json::Value {
    match value {
        Value::String(text) | Value::Datetime(text) => text.as_str().into(),
        Value::Integer(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Boolean(truth) => (*truth).into(),
        Value::Array(items) => items.iter().map(|item| json(&item.value)).collect(),
        Value::Table(table) => {
            let sorted: BTreeMap<&str, serde_json::Value> =
                table.entries.iter().map(|entry| (entry.name.as_str(), json(&entry.node.value))).collect();
            sorted.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
        }
    }
}

impl Play {
    /// Adds all that decides what it does. How much it says does not.
    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        hasher.field("playbook", &self.playbook).field("host", &self.host);
        for (name, list) in [("groups", &self.groups), ("tags", &self.tags), ("skip_tags", &self.skip_tags)] {
            let joined = list.join(",");
            hasher.hidden(name, &joined);
            if !list.is_empty() {
                hasher.part(name, joined);
            }
        }
        let extra: Vec<(&str, String)> = self.extra_vars.iter().map(|(name, value)| (name.as_str(), value.to_string())).collect();
        hasher.map("extra_vars", extra.iter().map(|(name, value)| (*name, value.as_str())));
        hasher.map("secret_vars", self.secret_vars.iter().map(|(name, secret)| (name.as_str(), secret.as_str())));
        hasher.map("vault_password", self.vault_password.iter().map(|secret| ("of", secret.as_str())));
        for input in &self.inputs {
            hasher.hidden("input", &input.to);
            sources::walk(&input.from)?.key(hasher)?;
        }
        Ok(())
    }

    /// The secrets that it names.
    fn secrets(&self) -> Vec<&str> {
        self.secret_vars.values().chain(&self.vault_password).map(String::as_str).collect()
    }
}

#[cfg(test)]
mod tests;

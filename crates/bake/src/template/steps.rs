//! `[[provision]]` and `[[test]]`: from tables, included files among them, to
//! steps.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_model::kind::Kind;
use kiln_model::provision::Provisioner;
use kiln_model::settings::{Entry, Node, Place, Table, Value, existing_path, nearest, unknown_key, wrong_type};

use super::common::Settings;
use super::load::{self, Loader, RESERVED};
use super::{Cache, Kinds, StepSpec};

/// The keys of a `[[test]]` beside its provisioner.
const TEST_KEYS: [&str; 7] = ["name", "env", "secrets", "user", "timeout", "retries", "only"];
/// Those that only a `[[provision]]` has.
const STEP_KEYS: [&str; 3] = ["cache", "checkpoint", "include"];
/// Those that only a `[[test]]` has.
const TRIAL_KEYS: [&str; 2] = ["boot", "user_data"];

/// Which list of steps is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    /// `[[provision]]`
    Provision,
    /// `[[test]]`
    Test,
}

impl Section {
    fn key(self) -> &'static str {
        match self {
            Self::Provision => "provision",
            Self::Test => "test",
        }
    }

    fn what(self) -> String {
        format!("[[{}]]", self.key())
    }

    /// What one of its tables may name.
    fn kinds<'a>(self, kinds: &Kinds<'a>) -> &'a [Box<dyn Kind<dyn Provisioner>>] {
        match self {
            Self::Provision => kinds.provisioners,
            Self::Test => kinds.tests,
        }
    }

    fn common_keys(self) -> Vec<&'static str> {
        let more: &[&str] = if self == Self::Provision { &STEP_KEYS } else { &TRIAL_KEYS };
        TEST_KEYS.iter().chain(more).copied().collect()
    }

    /// What a step without a name is called after.
    fn stem(self, kind: &str) -> String {
        if self == Self::Test { "test".to_owned() } else { kind.to_owned() }
    }
}

/// A step that was read but not named yet.
struct Draft {
    kind: String,
    settings: Settings,
    provisioner: Option<Box<dyn Provisioner>>,
    kept: bool,
    place: Place,
}

/// Where reading stands.
struct Reading {
    section: Section,
    /// The files that are being read, each included by the one before it.
    stack: Vec<PathBuf>,
    drafts: Vec<Draft>,
}

impl Loader<'_> {
    /// The steps of a section, in order, without those that `only` excludes.
    pub(super) fn steps(&mut self, root: &Table, path: &Path, section: Section, max_age: Cache) -> Vec<StepSpec> {
        let stack = vec![canonical(path)];
        let mut reading = Reading { section, stack, drafts: Vec::new() };
        if let Some(entry) = root.get(section.key()) {
            self.section(entry, &load::folder_of(path), true, &mut reading);
        }
        self.name(reading, max_age)
    }

    fn section(&mut self, entry: &Entry, folder: &Path, kept: bool, reading: &mut Reading) {
        let what = reading.section.what();
        match &entry.node.value {
            Value::Array(items) => {
                for item in items {
                    match &item.value {
                        Value::Table(table) => self.step(table, item.place, folder, kept, reading),
                        _ => drop(wrong_type::<()>(item, &what, "a table", &mut self.problems)),
                    }
                }
            }
            Value::Table(table) => {
                self.problems
                    .add(entry.node.place, format!("{what} has two brackets on each side"))
                    .help(format!("each {what} is one step, in order"));
                self.step(table, entry.node.place, folder, kept, reading);
            }
            _ => drop(wrong_type::<()>(&entry.node, &what, "an array of tables", &mut self.problems)),
        }
    }

    fn step(&mut self, table: &Table, place: Place, folder: &Path, kept: bool, reading: &mut Reading) {
        if let Some(include) = table.get("include").filter(|_| reading.section == Section::Provision) {
            self.include(table, include, folder, kept, reading);
            return;
        }
        let section = reading.section;
        let kinds = section.kinds(&self.kinds);
        let common = section.common_keys();
        let known = |name: &str| self.kinds.provisioners.iter().chain(self.kinds.tests).any(|kind| kind.name() == name);
        let named: Vec<&Entry> = table.entries.iter().filter(|entry| known(&entry.name)).collect();
        self.check_keys(table, place, section, &common, &named);

        let mut settings = Table::default();
        for entry in table.entries.iter().filter(|entry| common.contains(&entry.name.as_str())) {
            let text = matches!(entry.name.as_str(), "name" | "user" | "user_data");
            let node = if text { self.scope.expand_as_text(&entry.node) } else { self.scope.expand(&entry.node, &[]) };
            settings.entries.push(Entry { node, ..entry.clone() });
        }
        let (settings, matches) = self.settings(&Node { value: Value::Table(settings), place }, folder);

        let [entry] = named[..] else {
            named.iter().for_each(|entry| self.scope.note_uses(&entry.node));
            return;
        };
        let Some(kind) = kinds.iter().find(|kind| kind.name() == entry.name) else { return };
        let node = self.scope.expand(&entry.node, kind.verbatim());
        let provisioner = kind.read(&node, folder, &mut self.problems);
        let kept = kept && matches;
        reading.drafts.push(Draft { kind: section.stem(kind.name()), settings, provisioner, kept, place });
    }

    /// Complains about keys that mean nothing, and about more or less than one
    /// provisioner.
    fn check_keys(&mut self, table: &Table, place: Place, section: Section, common: &[&'static str], named: &[&Entry]) {
        let kinds = section.kinds(&self.kinds);
        let what = section.what();
        let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
        // An unknown key that is nearly a provisioner's name is the mistake;
        // that no provisioner is there then only follows from it.
        let mut misspelt = false;
        for entry in &table.entries {
            let name = entry.name.as_str();
            if common.contains(&name) || named.iter().any(|named| named.name == name) {
                continue;
            }
            self.scope.note_uses(&entry.node);
            if RESERVED.contains(&name) {
                load::reserved(entry, &mut self.problems);
            } else if STEP_KEYS.contains(&name) || TRIAL_KEYS.contains(&name) {
                self.problems.add(entry.place, format!("`{name}` means nothing in a {what}"));
            } else if let Some(owner) =
                kinds.iter().find(|kind| kind.keys().contains(&name) && named.first().is_none_or(|named| named.name == kind.name()))
            {
                misspelt |= named.is_empty();
                let owner = owner.name();
                self.problems
                    .add(entry.place, format!("`{name}` belongs into the table of its provisioner"))
                    .help(format!("write {owner} = {{ {name} = … }}"));
            } else {
                misspelt |= nearest(name, names.iter().copied()).is_some();
                unknown_key(&what, entry, common.iter().copied().chain(names.iter().copied()), &mut self.problems);
            }
        }
        if let Some(first) = named.first() {
            for other in &named[1..] {
                self.problems
                    .add(other.place, "two provisioners in one table")
                    .label(format!("`{}` is one already", first.name))
                    .help(format!("a step of its own begins with {what}"));
            }
            for entry in named.iter().filter(|entry| !names.contains(&entry.name.as_str())) {
                let not = if section == Section::Test { "no test" } else { "a test, and no step" };
                self.problems
                    .add(entry.place, format!("`{}` is {not}", entry.name))
                    .help(format!("a {what} is one of: {}", names.join(", ")));
            }
        } else if !misspelt {
            self.problems.add(place, format!("this {what} does not say what to do")).help(format!("exactly one of: {}", names.join(", ")));
        }
    }

    /// `include = "FILE"`: its steps, in place of this one.
    fn include(&mut self, table: &Table, include: &Entry, folder: &Path, kept: bool, reading: &mut Reading) {
        let mut matches = true;
        for entry in &table.entries {
            match entry.name.as_str() {
                "include" => {}
                "only" => {
                    let node = self.scope.expand(&entry.node, &[]);
                    matches = self.only(&node);
                }
                name => {
                    self.scope.note_uses(&entry.node);
                    self.problems
                        .add(entry.place, format!("`{name}` means nothing beside `include`"))
                        .help("the included steps say it themselves; only `only` can stand here");
                }
            }
        }
        let node = self.scope.expand_as_text(&include.node);
        let complete = self.text(&node, "include").and_then(|text| {
            let path = existing_path(&text, node.place, folder, &mut self.problems)?;
            let canonical = canonical(&path);
            if reading.stack.contains(&canonical) {
                self.problems.add(node.place, "this file includes itself").help(format!("{} is being read already", canonical.display()));
                return None;
            }
            // Named as the user would reach it: from the file that includes it.
            let parent = self.scope.sources.0.get(node.place.source).map(|source| PathBuf::from(&source.name)).unwrap_or_default();
            let name = parent.parent().unwrap_or(Path::new("")).join(&text);
            let root = load::read(&path, &name, &mut self.scope.sources, &mut self.problems)?;
            reading.stack.push(canonical);
            for entry in &root.entries {
                if entry.name == "provision" {
                    self.section(entry, &load::folder_of(&path), kept && matches, reading);
                } else {
                    self.scope.note_uses(&entry.node);
                    self.problems
                        .add(entry.place, format!("`{}` means nothing in an included file", entry.name))
                        .help("an included file holds [[provision]] only; variables are declared by the template");
                }
            }
            reading.stack.pop();
            Some(())
        });
        self.incomplete |= complete.is_none();
    }

    /// Gives every step its name, and keeps those that run.
    fn name(&mut self, reading: Reading, max_age: Cache) -> Vec<StepSpec> {
        let taken: Vec<String> = reading.drafts.iter().filter_map(|draft| Some(draft.settings.name.as_ref()?.0.clone())).collect();
        let mut numbers: BTreeMap<String, usize> = BTreeMap::new();
        let mut seen: BTreeMap<String, Place> = BTreeMap::new();
        let mut steps = Vec::new();
        for mut draft in reading.drafts {
            // Steps left out are counted: a name must not depend on the builder.
            let number = numbers.entry(draft.kind.clone()).or_default();
            *number += 1;
            let name = match draft.settings.name.take() {
                Some((name, place)) => {
                    if let Some(first) = seen.get(&name).filter(|_| draft.kept) {
                        let first = self.scope.sources.line(*first);
                        self.problems.add(place, format!("two steps are named `{name}`")).label(format!("the first is at {first}"));
                    } else if draft.kept {
                        seen.insert(name.clone(), place);
                    }
                    name
                }
                None => {
                    while taken.contains(&format!("{}-{number}", draft.kind)) {
                        *number += 1;
                    }
                    format!("{}-{number}", draft.kind)
                }
            };
            if let Some(provisioner) = draft.provisioner.filter(|_| draft.kept) {
                let common = draft.settings.common(name);
                for secret in provisioner.secrets().into_iter().filter(|secret| !common.secrets.iter().any(|own| own == secret)) {
                    self.problems
                        .add(draft.place, format!("`{}` uses the secret `{secret}`, which the step does not get", provisioner.kind()))
                        .help(format!("write secrets = [\"{secret}\"] above, into [[provision]]"));
                }
                let cache = draft.settings.cache.unwrap_or(max_age);
                let cache = if provisioner.takes_out() { Cache::Never } else { cache };
                let Settings { checkpoint, boot, user_data, .. } = draft.settings;
                steps.push(StepSpec { common, provisioner, cache, checkpoint, boot, user_data, place: draft.place });
            }
        }
        steps
    }
}

fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

//! Every table of a template but its variables and steps.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_model::base::BaseSource;
use kiln_model::machine::Builder;
use kiln_model::reference::{check_name, check_tag};
use kiln_model::settings::{Entry, Node, Reader, Table, Value, nearest, parse_duration, scalar, unknown_key, wrong_type};

use super::load::Loader;
use super::{Cache, MAX_AGE};

impl Loader<'_> {
    /// `[image] name`, first, since everything else may use it.
    pub(super) fn image_name(&mut self, image: Option<&Entry>) -> Option<String> {
        let name = image.and_then(|image| {
            let mut reader = Reader::new(&image.node, "[image]", &mut self.problems)?;
            let Some(entry) = reader.entry("name") else {
                reader.missing("name", &mut self.problems);
                return None;
            };
            let node = self.scope.expand_as_text(&entry.node);
            let name = self.text(&node, "name")?;
            self.accept(&node, &name, |name| check_name(name).map_err(str::to_owned))
        });
        self.scope.know("image", "name", name.as_deref());
        name
    }

    /// `[base]`: exactly one key names it; its kind reads the whole table.
    pub(super) fn base(&mut self, base: Option<&Entry>, folder: &Path) -> Option<Box<dyn BaseSource>> {
        let source = base.and_then(|entry| self.read_base(entry, folder));
        self.scope.know("base", "label", source.as_ref().map(|source| source.label()).as_deref());
        source
    }

    fn read_base(&mut self, entry: &Entry, folder: &Path) -> Option<Box<dyn BaseSource>> {
        let kinds = self.kinds.bases;
        let Value::Table(table) = &entry.node.value else {
            return wrong_type(&entry.node, "base", "a table", &mut self.problems);
        };
        let mut named = table.entries.iter().filter_map(|entry| Some((entry, kinds.iter().find(|kind| kind.name() == entry.name)?)));
        let Some((first, kind)) = named.next() else {
            let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
            self.scope.note_uses(&entry.node);
            let known = names.iter().copied().chain(kinds.iter().flat_map(|kind| kind.keys().iter().copied()));
            let known: Vec<&str> = known.collect();
            for entry in table.entries.iter().filter(|entry| !known.contains(&entry.name.as_str())) {
                unknown_key("[base]", entry, names.iter().copied(), &mut self.problems);
            }
            if table.entries.iter().all(|entry| known.contains(&entry.name.as_str())) {
                let problem = self.problems.add(entry.node.place, "[base] does not say what to start from");
                problem.help(format!("exactly one of: {}", names.join(", ")));
            }
            return None;
        };
        let others: Vec<&Entry> = named.map(|(entry, _)| entry).collect();
        if !others.is_empty() {
            for other in others {
                self.problems.add(other.place, "two bases in one template").label(format!("`{}` is one already", first.name));
            }
            self.scope.note_uses(&entry.node);
            return None;
        }
        let node = self.scope.expand(&entry.node, kind.verbatim());
        if let Value::Table(table) = &node.value {
            for entry in &table.entries {
                let value = scalar(&entry.node.value);
                self.scope.know("base", &entry.name, value.as_deref());
            }
        }
        kind.read(&node, folder, &mut self.problems)
    }

    /// `[image] version` and `labels`.
    pub(super) fn version_and_labels(&mut self, image: Option<&Entry>) -> (Option<String>, BTreeMap<String, String>) {
        let Some(image) = image else { return Default::default() };
        let Some(mut reader) = Reader::new(&image.node, "[image]", &mut self.problems) else { return Default::default() };
        reader.entry("name");
        let written = reader.entry("version").map(|entry| entry.node.clone());
        let labels = reader.entry("labels");
        reader.finish(&mut self.problems);

        let tag = |version: &str| check_tag(version).map_err(|why| format!("`{version}` cannot be a version: {why}"));
        let version = match written {
            Some(node) => {
                let node = self.scope.expand_as_text(&node);
                self.text(&node, "version").and_then(|version| self.accept(&node, &version, tag))
            }
            // The default, `{{ git.describe }}`, stands nowhere in the text.
            None => match self.scope.git.describe() {
                Ok(version) => self.accept(&image.node, &version, tag),
                Err(no) => {
                    let message = format!("[image] has no version, and git cannot tell one: {}", no.message);
                    let problem = self.problems.add(image.node.place, message);
                    problem.help = no.help;
                    None
                }
            },
        };
        self.scope.know("image", "version", version.as_deref());

        let labels = labels.and_then(|entry| {
            let node = self.expanded(entry);
            string_map(&node, "labels", &mut self.problems)
        });
        (version, labels.unwrap_or_default())
    }

    /// `[builder.NAME]`: all are read, so that mistakes in any are found; one
    /// is used.
    pub(super) fn builder(&mut self, builders: Option<&Entry>, folder: &Path) -> Option<Box<dyn Builder>> {
        let mut read = Vec::new();
        let mut broken = false;
        if let Some(entry) = builders {
            let Value::Table(table) = &entry.node.value else {
                return wrong_type(&entry.node, "builder", "a table ([builder.NAME])", &mut self.problems);
            };
            for entry in &table.entries {
                // Named even when it is wrong: `only` may mention it.
                let (kind, builder) = self.read_builder(entry, folder);
                broken |= builder.is_none();
                self.builders.push((entry.name.clone(), kind));
                read.push(builder);
            }
        }
        let position = match &self.scope.inputs.builder {
            Some(name) => self.builders.iter().position(|(known, _)| known == name),
            None => (!self.builders.is_empty()).then_some(0),
        };
        if let Some(position) = position {
            self.chosen = self.builders[position].clone();
            return read.swap_remove(position);
        }
        let kinds = self.kinds.builders;
        let kind = match &self.scope.inputs.builder {
            Some(name) => {
                let found = kinds.iter().find(|kind| kind.name() == name);
                if found.is_none() && !broken {
                    let known: Vec<&str> =
                        self.builders.iter().map(|(name, _)| name.as_str()).chain(kinds.iter().map(|kind| kind.name())).collect();
                    let help = nearest(name, known.iter().copied())
                        .map_or_else(|| format!("known builders: {}", known.join(", ")), |near| format!("did you mean `{near}`?"));
                    self.problems.add_nowhere(format!("the template has no builder `{name}`")).help(help);
                }
                found?
            }
            None => kinds.iter().find(|kind| kind.name() == "qemu").or_else(|| kinds.first())?,
        };
        self.chosen = (kind.name().to_owned(), kind.name().to_owned());
        let place = builders.map(|entry| entry.place).unwrap_or_default();
        kind.read(&Node { value: Value::Table(Table::default()), place }, folder, &mut self.problems)
    }

    fn read_builder(&mut self, entry: &Entry, folder: &Path) -> (String, Option<Box<dyn Builder>>) {
        let Value::Table(table) = &entry.node.value else {
            let problem = self.problems.add(entry.place, format!("`{}` must be a table", entry.name));
            problem.help("a builder's settings stand in [builder.NAME]");
            return (entry.name.clone(), None);
        };
        let (name, place) = match table.get("type") {
            Some(Entry { node: Node { value: Value::String(name), place }, .. }) => (name.clone(), *place),
            Some(other) => {
                wrong_type::<()>(&other.node, "type", "a string", &mut self.problems);
                return (entry.name.clone(), None);
            }
            None => (entry.name.clone(), entry.place),
        };
        let kinds = self.kinds.builders;
        let Some(kind) = kinds.iter().find(|kind| kind.name() == name) else {
            let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
            let near = nearest(&name, names.iter().copied());
            let problem = self.problems.add(place, format!("there is no builder of the type `{name}`"));
            problem.help(near.map_or_else(
                || format!("known types: {}; a builder of another name says type = \"…\"", names.join(", ")),
                |near| format!("did you mean `{near}`?"),
            ));
            self.scope.note_uses(&entry.node);
            return (name, None);
        };
        let settings = Table { entries: table.entries.iter().filter(|entry| entry.name != "type").cloned().collect() };
        let node = self.scope.expand(&Node { value: Value::Table(settings), place: entry.node.place }, kind.verbatim());
        (name, kind.read(&node, folder, &mut self.problems))
    }

    /// `[disk] size`.
    pub(super) fn disk(&mut self, disk: Option<&Entry>) -> Option<u64> {
        let node = self.expanded(disk?);
        let mut reader = Reader::new(&node, "[disk]", &mut self.problems)?;
        let size = reader.size("size", &mut self.problems);
        let place = reader.entry("size").map(|entry| entry.node.place);
        reader.finish(&mut self.problems);
        if let (Some(size), Some(place)) = (size, place)
            && (size == 0 || size % 512 != 0)
        {
            self.problems.add(place, "a disk is made of whole sectors of 512 bytes").help("write a size such as \"4GiB\"");
            return None;
        }
        size
    }

    /// `[seal] keep`.
    pub(super) fn keep(&mut self, seal: Option<&Entry>) -> Vec<String> {
        self.guest_paths(seal, "[seal]", "keep", "/home/deploy/.ssh")
    }

    /// `[drift] mutable`.
    pub(super) fn mutable(&mut self, drift: Option<&Entry>) -> Vec<String> {
        self.guest_paths(drift, "[drift]", "mutable", "/var/lib/app")
    }

    /// A table whose only key names paths in the guest.
    fn guest_paths(&mut self, entry: Option<&Entry>, table: &'static str, key: &'static str, example: &str) -> Vec<String> {
        let Some(entry) = entry else { return Vec::new() };
        let node = self.expanded(entry);
        let Some(mut reader) = Reader::new(&node, table, &mut self.problems) else { return Vec::new() };
        let written = reader.strings(key, &mut self.problems).unwrap_or_default();
        reader.finish(&mut self.problems);
        let mut paths: Vec<String> = Vec::new();
        for (path, place) in written {
            let good = path.starts_with('/')
                && !path.trim_matches('/').is_empty()
                && !path.split('/').any(|part| part == ".." || part == ".")
                && !path.contains('\0');
            if good {
                let path = path.split('/').filter(|part| !part.is_empty()).fold(String::new(), |path, part| path + "/" + part);
                if !paths.contains(&path) {
                    paths.push(path);
                }
            } else {
                self.problems
                    .add(place, format!("`{key}` names absolute paths in the guest, without `.` and `..`"))
                    .help(format!("for example {key} = [\"{example}\"]"));
            }
        }
        paths
    }

    /// `[cache] max_age`, and the files of the keys that `trusted` names.
    pub(super) fn cache(&mut self, cache: Option<&Entry>, folder: &Path) -> (Cache, Vec<PathBuf>) {
        let default = (Cache::For(MAX_AGE), Vec::new());
        let Some(cache) = cache else { return default };
        let node = self.expanded(cache);
        let Some(mut reader) = Reader::new(&node, "[cache]", &mut self.problems) else { return default };
        let max_age = reader.entry("max_age").and_then(|entry| self.cache_policy(entry, false));
        let keys = reader.strings("trusted", &mut self.problems).unwrap_or_default();
        reader.finish(&mut self.problems);
        (max_age.unwrap_or(default.0), keys.into_iter().map(|(key, _)| folder.join(key)).collect())
    }

    /// `"24h"`, `"forever"`, and, for a step, `false` or `true`.
    pub(super) fn cache_policy(&mut self, entry: &Entry, step: bool) -> Option<Cache> {
        match &entry.node.value {
            Value::Boolean(false) if step => return Some(Cache::Never),
            // As if it were not there: as long as [cache] says.
            Value::Boolean(true) if step => return None,
            Value::String(text) if text == "forever" => return Some(Cache::Forever),
            Value::String(text) => {
                if let Some(age) = parse_duration(text) {
                    return Some(Cache::For(age));
                }
            }
            _ => {}
        }
        let help = if step { "write false, \"24h\" or \"forever\"" } else { "write a length of time such as \"7d\", or \"forever\"" };
        self.problems.add(entry.node.place, format!("`{}` is not a length of time", entry.name)).help(help);
        None
    }

    /// A text, or a problem.
    pub(super) fn text(&mut self, node: &Node, name: &str) -> Option<String> {
        match &node.value {
            Value::String(text) => Some(text.clone()),
            _ => wrong_type(node, name, "a string", &mut self.problems),
        }
    }

    /// A text that `check` accepts; else its complaint.
    pub(super) fn accept(&mut self, node: &Node, text: &str, check: impl Fn(&str) -> Result<(), String>) -> Option<String> {
        match check(text) {
            Ok(()) => Some(text.to_owned()),
            Err(why) => {
                self.problems.add(node.place, why);
                None
            }
        }
    }
}

/// A table of scalars as texts.
pub(super) fn string_map(node: &Node, name: &str, problems: &mut kiln_model::settings::Problems) -> Option<BTreeMap<String, String>> {
    let Value::Table(table) = &node.value else {
        return wrong_type(node, name, "a table of strings", problems);
    };
    let mut map = BTreeMap::new();
    for entry in &table.entries {
        match scalar(&entry.node.value) {
            Some(text) => drop(map.insert(entry.name.clone(), text)),
            None => drop(wrong_type::<()>(&entry.node, &entry.name, "a string", problems)),
        }
    }
    Some(map)
}

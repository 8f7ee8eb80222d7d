//! The common keys of `[[provision]]` and `[[test]]`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use kiln_model::provision::Common;
use kiln_model::settings::{Node, Place, Reader, Value, nearest, wrong_type};

use super::load::Loader;
use super::{Boot, Cache};

/// Architectures in OCI's words.
const ARCHITECTURES: [&str; 7] = ["amd64", "arm64", "386", "arm", "ppc64le", "riscv64", "s390x"];

/// The common keys as read, before the step has its name.
#[derive(Default)]
pub(super) struct Settings {
    /// The name, and where it stands.
    pub(super) name: Option<(String, Place)>,
    pub(super) cache: Option<Cache>,
    pub(super) checkpoint: bool,
    pub(super) boot: Boot,
    pub(super) user_data: Option<Vec<u8>>,
    env: BTreeMap<String, String>,
    secrets: Vec<String>,
    user: Option<String>,
    timeout: Option<Duration>,
    retries: u32,
}

impl Settings {
    /// As the model has them.
    pub(super) fn common(&self, name: String) -> Common {
        Common {
            name,
            env: self.env.clone(),
            secrets: self.secrets.clone(),
            user: self.user.clone(),
            timeout: self.timeout,
            retries: self.retries,
        }
    }
}

impl Loader<'_> {
    /// Reads the common keys of an expanded table, and whether `only` lets the
    /// step run. Paths are relative to `folder`.
    pub(super) fn settings(&mut self, node: &Node, folder: &Path) -> (Settings, bool) {
        let mut settings = Settings { checkpoint: true, ..Settings::default() };
        let Some(mut reader) = Reader::new(node, "the step", &mut self.problems) else { return (settings, true) };
        if let Some(entry) = reader.entry("name")
            && let Some(name) = self.text(&entry.node, "name")
        {
            let check = |name: &str| match name {
                "" => Err("a step's name is not empty".to_owned()),
                name if name.chars().any(char::is_control) => Err("a step's name is one line of text".to_owned()),
                _ => Ok(()),
            };
            settings.name = self.accept(&entry.node, &name, check).map(|name| (name, entry.node.place));
        }
        if let Some(env) = reader.string_map("env", &mut self.problems) {
            settings.env = env;
            if let Some(Value::Table(table)) = reader.entry("env").map(|entry| &entry.node.value) {
                for entry in &table.entries {
                    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
                    if !entry.name.bytes().all(word) || entry.name.bytes().next().is_none_or(|b| b.is_ascii_digit()) {
                        self.problems.add(
                            entry.place,
                            "an environment variable's name is made of letters, digits and `_`, and does not begin with a digit",
                        );
                    } else if settings.env.get(&entry.name).is_some_and(|value| value.contains('\0')) {
                        self.problems.add(entry.node.place, "an environment variable cannot hold a zero byte");
                    }
                }
            }
        }
        for (name, place) in reader.strings("secrets", &mut self.problems).unwrap_or_default() {
            self.secret(name, place, &mut settings.secrets);
        }
        if let Some(entry) = reader.entry("user")
            && let Some(user) = self.text(&entry.node, "user")
        {
            let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, ':' | '/');
            let check = |user: &str| {
                let good = !user.is_empty() && !user.starts_with('-') && !user.chars().any(bad);
                good.then_some(()).ok_or_else(|| "this cannot be the name of a user".to_owned())
            };
            settings.user = self.accept(&entry.node, &user, check);
        }
        settings.timeout = reader.duration("timeout", &mut self.problems);
        if let (Some(Duration::ZERO), Some(entry)) = (settings.timeout, reader.entry("timeout")) {
            self.problems.add(entry.node.place, "a `timeout` of nothing lets nothing run");
        }
        settings.retries = reader.integer("retries", &mut self.problems).map_or(0, |n| u32::try_from(n).unwrap_or(u32::MAX));
        settings.checkpoint = reader.boolean("checkpoint", &mut self.problems).unwrap_or(true);
        settings.cache = reader.entry("cache").and_then(|entry| self.cache_policy(entry, true));
        if let Some(entry) = reader.entry("boot") {
            let known = [Boot::First, Boot::Again, Boot::Both];
            let wanted = if let Value::String(text) = &entry.node.value { text.as_str() } else { "" };
            match known.into_iter().find(|boot| boot.name() == wanted) {
                Some(boot) => settings.boot = boot,
                None => {
                    let problem = self.problems.add(entry.node.place, "`boot` says on which boots of the image a test runs");
                    problem.help("write \"first\", \"again\" (after a reboot) or \"both\"");
                }
            }
        }
        let place = reader.entry("user_data").map(|entry| entry.node.place);
        if let (Some(place), Some(path)) = (place, reader.existing_path("user_data", folder, &mut self.problems)) {
            match std::fs::read(&path) {
                Ok(bytes) => settings.user_data = Some(bytes),
                Err(error) => drop(self.problems.add(place, format!("cannot read {}: {error}", path.display()))),
            }
        }
        let matches = reader.entry("only").is_none_or(|entry| self.only(&entry.node));
        (settings, matches)
    }

    /// One name of `secrets = […]`.
    fn secret(&mut self, name: &str, place: Place, secrets: &mut Vec<String>) {
        self.scope.used.insert(name.to_owned());
        if self.scope.is_sensitive(name) {
            if !secrets.iter().any(|known| known == name) {
                secrets.push(name.to_owned());
            }
        } else if self.scope.is_declared(name) {
            self.problems.add(place, format!("the variable `{name}` is not sensitive, so it is no secret")).help(format!(
                "declare it with sensitive = true, or pass it with env = {{ {} = \"{{{{ var.{name} }}}}\" }}",
                name.to_uppercase()
            ));
        } else {
            let sensitive: Vec<&str> = self.scope.declared().filter(|name| self.scope.is_sensitive(name)).collect();
            let help = nearest(name, sensitive).map_or_else(
                || format!("declare it: [variables] {name} = {{ env = \"…\", sensitive = true }}"),
                |near| format!("did you mean `{near}`?"),
            );
            self.problems.add(place, format!("the variable `{name}` is not declared")).help(help);
        }
    }

    /// `only = { builder = […], arch = […] }`: whether this bake is among them.
    pub(super) fn only(&mut self, node: &Node) -> bool {
        let Some(mut reader) = Reader::new(node, "`only`", &mut self.problems) else { return true };
        let (builder, arch) = (reader.entry("builder"), reader.entry("arch"));
        reader.finish(&mut self.problems);
        let mut matches = true;
        if let Some(entry) = builder {
            // A type may be named too: an included file cannot know a
            // template's own names, nor which builders it has.
            let names = self.builders.iter().flat_map(|(name, kind)| [name.clone(), kind.clone()]);
            let known: Vec<String> = names.chain(self.kinds.builders.iter().map(|kind| kind.name().to_owned())).collect();
            let known: Vec<&str> = known.iter().map(String::as_str).collect();
            let chosen = [self.chosen.0.clone(), self.chosen.1.clone()];
            matches &= self.one_of(&entry.node, "builder", &known, |name| chosen.iter().any(|chosen| chosen == name));
        }
        if let Some(entry) = arch {
            let arch = self.scope.inputs.arch.as_str();
            matches &= self.one_of(&entry.node, "arch", &ARCHITECTURES, |name| name == arch);
        }
        matches
    }

    fn one_of(&mut self, node: &Node, what: &str, known: &[&str], is_ours: impl Fn(&str) -> bool) -> bool {
        let items = match &node.value {
            Value::Array(items) => items.as_slice(),
            _ => std::slice::from_ref(node),
        };
        let mut matches = false;
        for item in items {
            let Value::String(name) = &item.value else {
                wrong_type::<()>(item, what, "a string or an array of strings", &mut self.problems);
                continue;
            };
            matches |= is_ours(name);
            if !known.contains(&name.as_str()) && !is_ours(name) {
                let near = match name.as_str() {
                    "x86_64" => Some("amd64"),
                    "aarch64" => Some("arm64"),
                    name => nearest(name, known.iter().copied()),
                };
                let help = near.map_or_else(|| format!("known: {}", known.join(", ")), |near| format!("did you mean `{near}`?"));
                self.problems.add(item.place, format!("there is no {what} `{name}`")).help(help);
            }
        }
        matches
    }
}

//! `chef`: converges a node from a tree of cookbooks, with no server:
//! `chef-solo`, or `chef-client --local-mode`.
//!
//! All that Chef keeps is in the run's folder, which is on tmpfs and goes with
//! the run. Debian has no package of Chef: an earlier step, or the base, brings
//! it, and its licence is accepted by whoever writes the template.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_model::event::Stream;
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::{Provisioner, Step};
use kiln_model::settings::{Node, Problems, Reader, Value, wrong_type};
use kiln_model::{Code, Error, Result};

use super::read::required_path;
use super::{Changes, Configuration, Input, Presence, Settings, Tool, key_tree};
use crate::settings::finish;

/// How Chef's account of a dry run ends, after the number of resources.
const COUNTED: &str = " resources would have been updated";

/// Reads `[provision.chef]`.
pub(crate) struct ChefKind;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Solo,
    Zero,
}

struct Chef {
    /// A folder whose children are cookbooks.
    cookbooks: PathBuf,
    run_list: Vec<String>,
    /// The node's attributes by name, each as JSON.
    attributes: BTreeMap<String, String>,
    mode: Mode,
}

impl Kind<dyn Provisioner> for ChefKind {
    fn name(&self) -> &'static str {
        "chef"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["cookbooks", "run_list", "attributes", "mode", "bootstrap", "keep", "converge"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let mut reader = Reader::new(settings, "[provision.chef]", problems)?;
        let place = reader.entry("cookbooks").map_or(settings.place, |entry| entry.node.place);
        let cookbooks = required_path(&mut reader, "cookbooks", folder, problems);
        if let Some(path) = cookbooks.as_ref().filter(|path| !path.is_dir()) {
            problems.add(place, format!("{} is no folder", path.display())).help("name the folder whose children are cookbooks");
        }
        if reader.entry("run_list").is_none() {
            reader.missing("run_list", problems);
        }
        let place = reader.entry("run_list").map_or(settings.place, |entry| entry.node.place);
        let run_list = reader.strings("run_list", problems);
        if run_list.as_ref().is_some_and(Vec::is_empty) {
            problems.add(place, "`run_list` is empty").help("name what is to run, such as \"recipe[site]\"");
        }
        let item = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.:@[]".contains(c));
        for (text, place) in run_list.iter().flatten().filter(|(text, _)| !item(text)) {
            problems
                .add(*place, format!("`{text}` is nothing that Chef could run"))
                .help("write \"recipe[site]\" or \"recipe[site::page]\"");
        }
        let run_list = run_list.unwrap_or_default().into_iter().map(|(text, _)| text.to_owned()).collect();
        let attributes = read_attributes(&mut reader, problems);
        let place = reader.entry("mode").map_or(settings.place, |entry| entry.node.place);
        let mode = match reader.string("mode", problems) {
            Some("solo") => Mode::Solo,
            Some("zero") | None => Mode::Zero,
            Some(other) => {
                problems.add(place, format!("`{other}` is no mode of Chef")).help("write \"zero\" (chef-client --local-mode) or \"solo\"");
                Mode::Zero
            }
        };
        let place = reader.entry("bootstrap").map_or(settings.place, |entry| entry.node.place);
        let own = Settings::read(&mut reader, problems);
        if own.bootstrap {
            problems
                .add(place, "there is no package of Chef in Debian that `bootstrap` could install")
                .help("install it in a step before, and remove it in a step after");
        }
        finish(reader, settings, self.keys(), problems);
        let tool = Chef { cookbooks: cookbooks?, run_list, attributes, mode };
        (problems.0.len() == before).then(|| Box::new(Configuration { tool, settings: own }) as _)
    }
}

fn read_attributes(reader: &mut Reader<'_>, problems: &mut Problems) -> BTreeMap<String, String> {
    let Some(entry) = reader.entry("attributes") else { return BTreeMap::new() };
    let Value::Table(table) = &entry.node.value else {
        wrong_type::<()>(&entry.node, "attributes", "a table", problems);
        return BTreeMap::new();
    };
    if let Some(entry) = table.get("run_list") {
        problems.add(entry.place, "`run_list` is no attribute").help("move it one level up");
    }
    table.entries.iter().map(|entry| (entry.name.clone(), json(&entry.node.value))).collect()
}

/// A value of a template as JSON; the order of a table's keys means nothing.
fn json(value: &Value) -> String {
    match value {
        Value::String(text) | Value::Datetime(text) => json_string(text),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) if number.is_finite() => format!("{number:?}"),
        // JSON has neither infinity nor what is no number.
        Value::Float(_) => "null".into(),
        Value::Boolean(truth) => truth.to_string(),
        Value::Array(items) => format!("[{}]", items.iter().map(|item| json(&item.value)).collect::<Vec<_>>().join(",")),
        Value::Table(table) => json_object(table.entries.iter().map(|entry| (entry.name.as_str(), json(&entry.node.value)))),
    }
}

fn json_object<'a>(entries: impl Iterator<Item = (&'a str, String)>) -> String {
    let mut entries: Vec<String> = entries.map(|(name, value)| format!("{}:{value}", json_string(name))).collect();
    entries.sort_unstable();
    format!("{{{}}}", entries.join(","))
}

fn json_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", c as u32)),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

impl Chef {
    fn program(&self) -> &'static str {
        match self.mode {
            Mode::Solo => "chef-solo",
            Mode::Zero => "chef-client",
        }
    }

    fn script(&self, folder: &str, options: &str) -> String {
        let local = if self.mode == Mode::Zero { " --local-mode" } else { "" };
        format!("{}{local} --config {folder}/client.rb --json-attributes {folder}/node.json --no-color{options}\n", self.program())
    }

    /// What Chef is configured with: every place it writes to is in `folder`.
    fn client_rb(folder: &str) -> String {
        format!(
            "chef_repo_path '{folder}/repo'
cookbook_path ['{folder}/cookbooks']
node_path '{folder}/nodes'
file_cache_path '{folder}/cache'
file_backup_path '{folder}/backup'
cache_path '{folder}/local'
lockfile '{folder}/lock'
pid_file '{folder}/pid'
client_key '{folder}/client.pem'
log_location STDOUT
log_level :warn
"
        )
    }

    fn node_json(&self) -> String {
        let run_list = self.run_list.iter().map(|item| json_string(item)).collect::<Vec<_>>().join(",");
        let attributes = self.attributes.iter().map(|(name, value)| (name.as_str(), value.clone()));
        json_object(attributes.chain([("run_list", format!("[{run_list}]"))]))
    }
}

impl Tool for Chef {
    fn kind(&self) -> &'static str {
        "chef"
    }

    fn presence(&self) -> Presence {
        Presence { programs: vec![self.program().into()], packages: Vec::new(), install: String::new(), remains: Vec::new() }
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        hasher.field("mode", self.program()).field("run_list", self.run_list.join("\n"));
        hasher.map("attribute", self.attributes.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        key_tree(hasher, "cookbooks", &self.cookbooks)
    }

    fn inputs(&self) -> Vec<Input> {
        vec![Input { from: self.cookbooks.clone(), to: "cookbooks".into() }]
    }

    fn files(&self, _step: &Step<'_>, folder: &str) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(vec![("client.rb".into(), Self::client_rb(folder).into_bytes()), ("node.json".into(), self.node_json().into_bytes())])
    }

    fn apply(&self, folder: &str) -> String {
        self.script(folder, "")
    }

    fn failure(&self, _stream: Stream, line: &str) -> Option<String> {
        let line = line.trim();
        let begins = ["Error executing action ", "Recipe Compile Error", "Error Resolving Cookbooks for Run List"];
        if begins.iter().any(|begin| line.starts_with(begin)) {
            return Some(line.trim_end_matches(':').to_owned());
        }
        line.split_once("FATAL: ").map(|(_, said)| said.to_owned())
    }

    fn check(&self, folder: &str) -> String {
        self.script(folder, " --why-run")
    }

    fn changes(&self, lines: &[(Stream, String)]) -> Result<Changes> {
        let (mut resources, mut last, mut counted) = (Vec::<String>::new(), None, None);
        for (_, line) in lines {
            let line = line.trim();
            if let Some((resource, _)) = line.strip_prefix("* ").and_then(|line| line.split_once(" action ")) {
                last = Some(resource.to_owned());
            } else if line.starts_with("- Would ") {
                resources.extend(last.take());
            } else if let Some((said, _)) = line.split_once(COUNTED) {
                // `3/133`, and of old `3`.
                let number = said.rsplit(' ').next().unwrap_or_default();
                counted = number.split('/').next().and_then(|number| number.parse::<usize>().ok());
            }
        }
        resources.dedup();
        match counted {
            None => Err(Error::new(Code::Step, "Chef did not say how many resources a second run would change")),
            Some(count) if count > 0 && resources.is_empty() => {
                Err(Error::new(Code::Step, format!("a second run of Chef would change {count} resources, and it did not name them")))
            }
            Some(_) => Ok(Changes { resources }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::tests::{key, node, parts, read, string, table, text, wrong};

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("cookbooks/site/recipes")).unwrap();
        std::fs::write(folder.path().join("cookbooks/site/recipes/default.rb"), "file '/a'").unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        folder
    }

    fn run_list(items: &[&str]) -> (&'static str, Value) {
        ("run_list", Value::Array(items.iter().map(|item| text(item)).collect()))
    }

    fn chef(mode: Mode) -> Chef {
        let attributes = [("page".to_owned(), json(&table(&[("port", Value::Integer(80)), ("a \"b\"\n", Value::Float(1.0))]).value))];
        Chef { cookbooks: "cookbooks".into(), run_list: vec!["recipe[site]".into()], attributes: attributes.into(), mode }
    }

    #[test]
    fn settings_and_their_problems() {
        let folder = folder();
        let here = folder.path();
        let all = [
            ("cookbooks", string("cookbooks")),
            run_list(&["recipe[site::page]", "role[web]"]),
            ("attributes", table(&[("list", Value::Array(vec![node(Value::Boolean(true))]))]).value),
            ("mode", string("solo")),
            ("converge", string("once")),
        ];
        assert!(read("chef", &table(&all), here).converges());
        let problems = |entries: &[(&str, Value)]| wrong("chef", &table(entries), here).join("\n");
        assert_eq!(problems(&[]), "[provision.chef] needs `cookbooks` | \n[provision.chef] needs `run_list` | ");
        assert!(problems(&[("cookbooks", string("file")), run_list(&["recipe[site]"])]).contains("no folder"));
        let with = |name, value| problems(&[("cookbooks", string("cookbooks")), run_list(&["recipe[site]"]), (name, value)]);
        assert!(with("mode", string("server")).contains("`server` is no mode of Chef"));
        assert!(with("attributes", table(&[run_list(&[])]).value).contains("move it one level up"));
        assert_eq!(
            with("bootstrap", Value::Boolean(true)),
            "there is no package of Chef in Debian that `bootstrap` could install | install it in a step before, and remove it in a step after"
        );
        let listed = |items: &[&str]| problems(&[("cookbooks", string("cookbooks")), run_list(items)]);
        assert!(listed(&[]).contains("`run_list` is empty"));
        assert!(listed(&["recipe[a b]"]).contains("nothing that Chef could run"));
    }

    #[test]
    fn every_input_is_in_the_key_and_no_path() {
        let (one, two) = (folder(), folder());
        let of = |folder: &Path, port: i64| {
            let attributes = table(&[("port", Value::Integer(port))]).value;
            let settings = table(&[("cookbooks", string("cookbooks")), run_list(&["recipe[site]"]), ("attributes", attributes)]);
            let step = read("chef", &settings, folder);
            (key(&*step), parts(&*step).join(", "))
        };
        assert_eq!(of(one.path(), 80), of(two.path(), 80));
        assert_ne!(of(one.path(), 80).0, of(one.path(), 81).0);
        std::fs::write(two.path().join("cookbooks/site/recipes/default.rb"), "file '/b'").unwrap();
        assert_ne!(of(one.path(), 80).0, of(two.path(), 80).0);
        let parts = of(one.path(), 80).1;
        for part in ["mode", "run_list", "attribute port", "cookbooks/site/recipes/default.rb"] {
            assert!(parts.contains(part), "{part} in {parts}");
        }
    }

    #[test]
    fn command_lines_and_files() {
        let options = "--config /f/client.rb --json-attributes /f/node.json --no-color";
        assert_eq!(chef(Mode::Zero).apply("/f"), format!("chef-client --local-mode {options}\n"));
        assert_eq!(chef(Mode::Solo).check("/f"), format!("chef-solo {options} --why-run\n"));
        assert_eq!(chef(Mode::Zero).node_json(), r#"{"page":{"a \"b\"\u000a":1.0,"port":80},"run_list":["recipe[site]"]}"#);
        let config = Chef::client_rb("/f");
        assert!(config.contains("cookbook_path ['/f/cookbooks']\n"), "{config}");
        assert!(config.lines().filter(|line| line.contains('/')).all(|line| line.contains("'/f/")), "{config}");
    }

    #[test]
    fn what_a_dry_run_says() {
        let changes = |text: &str| {
            let lines: Vec<_> = text.lines().map(|line| (Stream::Stdout, line.to_owned())).collect();
            chef(Mode::Zero).changes(&lines).map(|changes| changes.resources)
        };
        let text = "Converging 4 resources
Recipe: site::default
  * apt_package[nginx-light] action install (up to date)
  * file[/var/www/html/index.html] action create
    - Would create new file /var/www/html/index.html
    - Would restore selinux security context
  * execute[date] action run
    - Would execute date
  * execute[never] action run (skipped due to not_if)
[2021-09-15T19:17:03-07:00] WARN: In why-run mode, so NOT performing node save.
";
        let found = changes(&format!("{text}Infra Phase complete, 2/4 resources would have been updated")).unwrap();
        assert_eq!(found, ["file[/var/www/html/index.html]", "execute[date]"]);
        assert!(changes("Chef Client finished, 0/3 resources would have been updated").unwrap().is_empty());
        assert!(changes("Chef Client finished, 1 resources would have been updated").is_err());
        assert!(changes(text).unwrap_err().to_string().contains("did not say"));
        let failure = |line: &str| chef(Mode::Zero).failure(Stream::Stdout, line);
        let said = "Error executing action `run` on resource 'execute[false]'";
        assert_eq!(failure(&format!("    {said}")).unwrap(), said);
        assert_eq!(failure("[2021-09-15T19:17:03-07:00] FATAL: RuntimeError: no").unwrap(), "RuntimeError: no");
        assert!(failure("  * execute[false] action run").is_none());
    }
}

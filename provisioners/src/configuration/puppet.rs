//! `puppet`: applies a manifest with `puppet apply`; no server, no certificate.
//!
//! All that puppet keeps (state, reports, copies of what it replaced) is in the
//! run's folder, which is on tmpfs and goes with the run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_model::event::Stream;
use kiln_model::guest::quote;
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::{Provisioner, Step};
use kiln_model::settings::{Node, Problems, Reader, existing_path};
use kiln_model::{Code, Error, Result};

use super::read::{is_word, last_part, required_path, told};
use super::{Changes, Configuration, Input, Presence, Settings, Tool, key_tree};
use crate::settings::finish;

/// Where the distribution's packages and earlier steps put modules.
const MODULES_OF_THE_GUEST: &str = "/etc/puppet/code/modules:/usr/share/puppet/modules";
/// What [`Tool::check`] says after puppet's own lines: how many resources are
/// not as they are to be.
const COUNTED: &str = "kiln: resources out of sync: ";

/// Reads `[provision.puppet]`.
pub(crate) struct PuppetKind;

struct Puppet {
    /// A file, or a folder whose files are read in the order of their names.
    manifest: PathBuf,
    /// Folders whose children are modules.
    modules: Vec<PathBuf>,
    /// `hiera.yaml`, or a folder with one.
    hiera: Option<PathBuf>,
    /// A folder that goes beside `hiera.yaml`, under its own name.
    data: Option<PathBuf>,
    environment: Option<String>,
    facts: BTreeMap<String, String>,
}

impl Kind<dyn Provisioner> for PuppetKind {
    fn name(&self) -> &'static str {
        "puppet"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["manifest", "modules", "hiera", "hiera_data", "environment", "facts", "bootstrap", "keep", "converge"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let mut reader = Reader::new(settings, "[provision.puppet]", problems)?;
        let manifest = required_path(&mut reader, "manifest", folder, problems);
        let modules = reader.strings("modules", problems).unwrap_or_default().into_iter().filter_map(|(text, place)| {
            let path = existing_path(text, place, folder, problems)?;
            if !path.is_dir() {
                problems.add(place, format!("`{text}` is no folder")).help("name the folder whose children are modules");
            }
            Some(path)
        });
        let modules = modules.collect();
        let place = reader.entry("hiera").map_or(settings.place, |entry| entry.node.place);
        let hiera = reader.existing_path("hiera", folder, problems);
        if let Some(path) = hiera.as_ref().filter(|path| path.is_dir() && !path.join("hiera.yaml").is_file()) {
            problems
                .add(place, format!("there is no hiera.yaml in {}", path.display()))
                .help("name the folder that holds it, or the file itself");
        }
        let data_place = reader.entry("hiera_data").map_or(settings.place, |entry| entry.node.place);
        let data = reader.existing_path("hiera_data", folder, problems);
        match (&data, &hiera) {
            (Some(_), None) => {
                problems.add(data_place, "`hiera_data` needs `hiera`").help("name the hiera.yaml that reads this folder");
            }
            (Some(_), Some(hiera)) if hiera.is_dir() => {
                problems.add(data_place, "`hiera` is a folder, and holds the data, too").help("remove `hiera_data`");
            }
            (Some(data), Some(_)) if !data.is_dir() => {
                problems.add(data_place, "`hiera_data` must be a folder");
            }
            _ => {}
        }
        let place = reader.entry("environment").map_or(settings.place, |entry| entry.node.place);
        let environment = reader.string("environment", problems).map(ToOwned::to_owned);
        if let Some(name) = environment.as_ref().filter(|name| !is_word(name)) {
            problems.add(place, format!("`{name}` is no name of an environment")).help("use letters, digits and `_`");
        }
        let place = reader.entry("facts").map_or(settings.place, |entry| entry.node.place);
        let facts = reader.string_map("facts", problems).unwrap_or_default();
        for name in facts.keys().filter(|name| !is_word(name) || name.chars().any(|c| c.is_ascii_uppercase())) {
            problems.add(place, format!("`{name}` is no name of a fact")).help("use small letters, digits and `_`");
        }
        let own = Settings::read(&mut reader, problems);
        finish(reader, settings, self.keys(), problems);
        let tool = Puppet { manifest: manifest?, modules, hiera, data, environment, facts };
        (problems.0.len() == before).then(|| Box::new(Configuration { tool, settings: own }) as _)
    }
}

impl Puppet {
    /// The run, with more options, and what is said of it when it fails.
    fn script(&self, folder: &str, options: &str) -> String {
        let mut modules: Vec<String> = (0..self.modules.len()).map(|number| format!("{folder}/modules/{number}")).collect();
        modules.push(MODULES_OF_THE_GUEST.into());
        let environment = self.environment.as_deref().unwrap_or("production");
        let hiera = if self.hiera.is_some() { format!(" --hiera_config {folder}/hiera/hiera.yaml") } else { String::new() };
        let facts = if self.facts.is_empty() { "" } else { ". ./facts\n" };
        let manifest = quote(&format!("{folder}/{}", self.manifest_goes_to()));
        format!(
            "{facts}export LANG=C.UTF-8 LC_ALL=C.UTF-8
f={folder}; mkdir -p $f/code/environments/{environment}
places=(--confdir $f/conf --codedir $f/code --environmentpath $f/code/environments --vardir $f/var --logdir $f/log
  --rundir $f/rundir --ssldir $f/ssl --publicdir $f/public)
puppet=$(command -v puppet || command -v /opt/puppetlabs/bin/puppet)
status=0
{{ \"$puppet\" apply --detailed-exitcodes --color=false \"${{places[@]}}\" --environment {environment} \\
  --modulepath {modules}{hiera}{options} {manifest} 2>&1 >&3 | tee errors >&2; }} 3>&1 || status=$?
if [ $status != 0 ] && [ $status != 2 ]; then
  why=$(grep -m 1 '^Error: /Stage\\[' errors || grep '^Error: ' errors | grep -v -m 1 '^Error: Facter: ' || tail -n 1 errors)
  more=$(grep -c '^Error: /Stage\\[.* failed: ' errors || :)
  [ $more -lt 2 ] || why=\"$why (and $((more - 1)) more)\"
  printf 'kiln: %s\\n' \"${{why#Error: }}\" >&2
  exit 1
fi\n",
            modules = quote(&modules.join(":")),
        )
    }

    fn manifest_goes_to(&self) -> String {
        if self.manifest.is_dir() { "manifest".into() } else { format!("manifest/{}", last_part(&self.manifest)) }
    }
}

impl Tool for Puppet {
    fn kind(&self) -> &'static str {
        "puppet"
    }

    fn presence(&self) -> Presence {
        Presence {
            programs: vec!["puppet".into(), "/opt/puppetlabs/bin/puppet".into()],
            packages: vec!["puppet-agent".into()],
            // Where it stays it is a tool, not a service.
            install: "! command -v systemctl > /dev/null || systemctl -q disable puppet.service".into(),
            remains: ["/etc/puppet", "/var/lib/puppet", "/var/cache/puppet", "/var/log/puppet", "/run/puppet", "/etc/facter"]
                .map(Into::into)
                .into(),
        }
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        // The order of a folder's files is that of their names, and a file's
        // name shows in no resource: only a folder's matter.
        key_tree(hasher, "manifest", &self.manifest)?;
        hasher.hidden("modules", self.modules.len().to_string());
        for modules in &self.modules {
            key_tree(hasher, "modules", modules)?;
        }
        for (name, path) in [("hiera", &self.hiera), ("hiera_data", &self.data)] {
            hasher.hidden(name, if path.is_some() { "given" } else { "" });
            if let Some(path) = path {
                key_tree(hasher, name, path)?;
            }
        }
        // The name of the data's folder is what hiera.yaml finds it by.
        hasher.hidden("name of the data", self.data.as_deref().map(last_part).unwrap_or_default());
        hasher.hidden("environment", self.environment.as_deref().unwrap_or_default());
        if let Some(environment) = &self.environment {
            hasher.part("environment", environment);
        }
        hasher.map("fact", self.facts.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        Ok(())
    }

    fn inputs(&self) -> Vec<Input> {
        let mut inputs = vec![Input { from: self.manifest.clone(), to: self.manifest_goes_to() }];
        for (number, modules) in self.modules.iter().enumerate() {
            inputs.push(Input { from: modules.clone(), to: format!("modules/{number}") });
        }
        if let Some(hiera) = &self.hiera {
            let to = if hiera.is_dir() { "hiera" } else { "hiera/hiera.yaml" };
            inputs.push(Input { from: hiera.clone(), to: to.into() });
        }
        if let Some(data) = &self.data {
            inputs.push(Input { from: data.clone(), to: format!("hiera/{}", last_part(data)) });
        }
        inputs
    }

    fn files(&self, _step: &Step<'_>, _folder: &str) -> Result<Vec<(String, Vec<u8>)>> {
        if self.facts.is_empty() {
            return Ok(Vec::new());
        }
        // facter takes them from the environment: a command line would show
        // them, and a folder of facts would have to be removed again.
        let lines = self.facts.iter().map(|(name, value)| format!("export FACTER_{name}={}\n", quote(value)));
        Ok(vec![("facts".into(), lines.collect::<String>().into_bytes())])
    }

    fn apply(&self, folder: &str) -> String {
        self.script(folder, "")
    }

    fn failure(&self, _stream: Stream, line: &str) -> Option<String> {
        told(line)
    }

    fn check(&self, folder: &str) -> String {
        let script = self.script(folder, " --noop");
        format!(
            "rm -f {folder}/public/last_run_summary.yaml\n{script}sed -n 's/^  out_of_sync: */{COUNTED}/p' $f/public/last_run_summary.yaml\n"
        )
    }

    fn changes(&self, lines: &[(Stream, String)]) -> Result<Changes> {
        let mut resources: Vec<String> = Vec::new();
        for name in lines.iter().filter_map(|(_, line)| would_change(line)) {
            if !resources.contains(&name) {
                resources.push(name);
            }
        }
        let counted = lines.iter().find_map(|(_, line)| line.strip_prefix(COUNTED)?.trim().parse::<usize>().ok());
        match counted {
            None => Err(Error::new(Code::Step, "puppet did not say how many resources a second run would change")),
            Some(count) if count > 0 && resources.is_empty() => {
                Err(Error::new(Code::Step, format!("a second run of puppet would change {count} resources, and it did not name them")))
            }
            Some(_) => {
                resources.retain(|name| !only_speaks(name));
                Ok(Changes { resources })
            }
        }
    }
}

/// The resource that a line of `--noop` says would change:
/// `Notice: /Stage[main]/Main/File[/a]/ensure: current_value …, should be … (noop)`.
fn would_change(line: &str) -> Option<String> {
    let said = line.strip_prefix("Notice: ")?.strip_suffix(" (noop)").filter(|said| said.starts_with('/'))?;
    // A title may hold a colon, a slash or a bracket.
    let end = said.match_indices("]/").find_map(|(at, _)| {
        let (property, _) = said[at + 2..].split_once(": ")?;
        is_word(property).then_some(at + 1)
    });
    Some(said[..end.or_else(|| said.find(": "))?].to_owned())
}

/// Whether a resource only says something, which changes nothing.
fn only_speaks(name: &str) -> bool {
    // Of a class (`/Stage[main]/Main/Notify[a]`), or of a resource of one's own.
    name.splitn(4, '/').nth(3).is_some_and(|rest| rest.starts_with("Notify[")) || name.contains("]/Notify[")
}

#[cfg(test)]
mod tests {
    use kiln_model::settings::Value;

    use super::*;
    use crate::settings::tests::{key, node, parts, read, string, table, text, wrong};

    fn strings(values: &[&str]) -> Value {
        Value::Array(values.iter().map(|value| text(value)).collect())
    }

    /// A folder with all that a step can name.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in [
            ("site.pp", "include site"),
            ("modules/site/manifests/init.pp", "class site {}"),
            ("hiera.yaml", "version: 5"),
            ("data/common.yaml", "a: 1"),
            ("both/hiera.yaml", "version: 5"),
        ] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        folder
    }

    #[test]
    fn settings_and_their_problems() {
        let folder = folder();
        let here = folder.path();
        let all = [
            ("manifest", string("site.pp")),
            ("modules", strings(&["modules"])),
            ("hiera", string("hiera.yaml")),
            ("hiera_data", string("data")),
            ("environment", string("live")),
            ("facts", table(&[("role", string("web"))]).value),
            ("bootstrap", Value::Boolean(true)),
            ("keep", Value::Boolean(true)),
            ("converge", string("once")),
        ];
        assert!(read("puppet", &table(&all), here).converges());
        assert!(!read("puppet", &table(&all[..1]), here).converges());
        read("puppet", &table(&[("manifest", string(".")), ("hiera", string("both"))]), here);

        let problems = |entries: &[(&str, Value)]| wrong("puppet", &table(entries), here).join("\n");
        assert_eq!(problems(&[]), "[provision.puppet] needs `manifest` | ");
        assert!(problems(&[("manifest", string("no.pp"))]).contains("no such file"));
        let with = |name, value| problems(&[("manifest", string("site.pp")), (name, value)]);
        assert!(with("modules", strings(&["site.pp"])).contains("no folder | name the folder whose children are modules"));
        assert!(with("hiera", string("data")).contains("no hiera.yaml in"));
        assert!(with("hiera_data", string("data")).contains("`hiera_data` needs `hiera`"));
        assert!(with("environment", string("a b")).contains("no name of an environment"));
        assert!(with("facts", table(&[("Role", string("x"))]).value).contains("`Role` is no name of a fact"));
        assert!(with("keep", Value::Boolean(true)).contains("bootstrap"));
        assert!(with("converge", string("twice")).contains("\"once\""));
        assert!(with("manifests", string("x")).contains("did you mean `manifest`?"));
        assert!(wrong("puppet", &node(string("site.pp")), here)[0].contains("must be a table"));
    }

    #[test]
    fn every_input_is_in_the_key_and_no_path() {
        let (one, two) = (folder(), folder());
        let settings = || {
            table(&[
                ("manifest", string("site.pp")),
                ("modules", strings(&["modules"])),
                ("hiera", string("hiera.yaml")),
                ("hiera_data", string("data")),
                ("facts", table(&[("role", string("web"))]).value),
            ])
        };
        let of = |folder: &Path| key(&*read("puppet", &settings(), folder));
        assert_eq!(of(one.path()), of(two.path()));
        for name in ["site.pp", "modules/site/manifests/init.pp", "hiera.yaml", "data/common.yaml"] {
            let before = of(two.path());
            std::fs::write(two.path().join(name), "# changed").unwrap();
            assert_ne!(before, of(two.path()), "{name}");
        }
        let step = read("puppet", &settings(), one.path());
        let parts = parts(&*step).join(", ");
        for part in ["bootstrap", "site.pp", "modules/site/manifests/init.pp", "hiera.yaml", "data/common.yaml", "fact role"] {
            assert!(parts.contains(part), "{part} in {parts}");
        }
    }

    /// What puppet 7.23 printed.
    const NOOP: &str = "Notice: Compiled catalog for vm in environment production in 0.44 seconds
Notice: /Stage[main]/Main/File[/tmp/pp/out/d]/mode: current_value '0755', should be '0700' (noop)
Notice: /Stage[main]/Main/Exec[echo: such/thing]/x]/returns: current_value 'notrun', should be ['0'] (noop)
Notice: /Stage[main]/Main/File[/tmp/pp/out/a: current_value b]/ensure: current_value 'absent', should be 'file' (noop)
Notice: /Stage[main]/Main/File[/tmp/pp/out/s]/ensure: current_value [redacted], should be [redacted] (noop)
Notice: /Stage[main]/Main/Notify[a]/message: current_value 'absent', should be 'a' (noop)
Notice: Class[Main]: Would have triggered 'refresh' from 4 events
Notice: Stage[main]: Would have triggered 'refresh' from 1 event
Notice: Applied catalog in 0.09 seconds";

    #[test]
    fn what_a_second_run_would_change_is_named_as_puppet_names_it() {
        let folder = folder();
        let tool = Puppet {
            manifest: folder.path().join("site.pp"),
            modules: Vec::new(),
            hiera: None,
            data: None,
            environment: None,
            facts: BTreeMap::new(),
        };
        let changes = |text: &str| {
            let lines: Vec<_> = text.lines().map(|line| (Stream::Stdout, line.to_owned())).collect();
            tool.changes(&lines).map(|changes| changes.resources)
        };
        assert_eq!(
            changes(&format!("{NOOP}\n{COUNTED}6")).unwrap(),
            [
                "/Stage[main]/Main/File[/tmp/pp/out/d]",
                "/Stage[main]/Main/Exec[echo: such/thing]/x]",
                "/Stage[main]/Main/File[/tmp/pp/out/a: current_value b]",
                "/Stage[main]/Main/File[/tmp/pp/out/s]",
            ]
        );
        let none = "Notice: Compiled catalog for vm in environment production in 0.15 seconds\nNotice: Applied catalog in 0.04 seconds\n";
        assert!(changes(&format!("{none}{COUNTED}0")).unwrap().is_empty());
        assert!(only_speaks("/Stage[main]/Site/Site::Page[a]/Notify[b]") && !only_speaks("/Stage[main]/Main/File[/a/Notify[b]]"));
        assert!(changes(&format!("{none}{COUNTED}2")).unwrap_err().to_string().contains("change 2 resources"));
        assert!(changes(none).unwrap_err().to_string().contains("did not say"));
    }
}

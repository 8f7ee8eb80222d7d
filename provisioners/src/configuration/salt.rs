//! `salt`: applies states, without a master.
//!
//! All that Salt reads and writes is in the run's folder, a configuration of
//! kiln's own among it, so that nothing of it is left in `/etc`, `/var` or the
//! image. What became of each state it says through an outputter of kiln's
//! own, which both people and [`Tool::changes`] read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use kiln_model::event::Stream;
use kiln_model::guest::quote;
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::{Provisioner, Step};
use kiln_model::settings::{Node, Place, Problems, Reader, Value, existing_path, wrong_type};
use kiln_model::{Code, Error, Result};
use serde_json::{Map, Value as Json, json};

use super::{Changes, Configuration, Input, Presence, Settings, Tool, key_tree};
use crate::settings::finish;

/// Where bootstrap puts Salt.
const HOME: &str = "/opt/salt";
/// The Salt that bootstrap installs, with all that it depends on.
const REQUIREMENTS: &str = include_str!("salt-requirements.txt");
/// Says what became of each state.
const OUTPUTTER: &str = include_str!("salt-outputter.py");

/// Reads `[provision.salt]`.
pub(crate) struct SaltKind;

/// States, and what they are given.
#[derive(Debug)]
struct Salt {
    /// Folders that states are looked for in; the first one is `states`.
    roots: Vec<PathBuf>,
    pillar: Option<PathBuf>,
    pillar_data: Json,
    /// Keys of the pillar, and the secrets that are their values.
    pillar_secrets: BTreeMap<String, String>,
    grains: Json,
    /// Names of states; empty: what `top.sls` says.
    apply: Vec<String>,
    id: String,
}

impl Kind<dyn Provisioner> for SaltKind {
    fn name(&self) -> &'static str {
        "salt"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["states", "formulas", "pillar", "pillar_data", "pillar_secrets", "grains", "apply", "id", "bootstrap", "keep", "converge"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let mut reader = Reader::new(settings, "[provision.salt]", problems)?;
        let mut roots = Vec::new();
        if let Some(states) = folder_at(&mut reader, "states", folder, problems) {
            roots.push(states);
        } else if problems.0.len() == before {
            reader.missing("states", problems);
        }
        for (text, place) in reader.strings("formulas", problems).unwrap_or_default() {
            roots.extend(existing_path(text, place, folder, problems).and_then(|path| is_folder(path, text, place, problems)));
        }
        let pillar = folder_at(&mut reader, "pillar", folder, problems);
        let pillar_data = data(&mut reader, "pillar_data", problems);
        let pillar_secrets = reader.string_map("pillar_secrets", problems).unwrap_or_default();
        let grains = data(&mut reader, "grains", problems);
        let mut apply = Vec::new();
        for (name, place) in reader.strings("apply", problems).unwrap_or_default() {
            if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c == ',' || c == '=') {
                problems
                    .add(place, format!("`{name}` is no name of states"))
                    .help("write it as in top.sls, such as \"nginx\" or \"web.site\"");
            }
            apply.push(name.to_owned());
        }
        if let (Some(entry), true) = (reader.entry("apply"), apply.is_empty()) {
            problems.add(entry.place, "`apply` names no states").help("remove it: then `top.sls` decides");
        }
        let id = reader.string("id", problems).unwrap_or("kiln").to_owned();
        let common = Settings::read(&mut reader, problems);
        finish(reader, settings, self.keys(), problems);
        let tool = Salt { roots, pillar, pillar_data, pillar_secrets, grains, apply, id };
        (problems.0.len() == before).then(|| Box::new(Configuration { tool, settings: common }) as _)
    }
}

fn folder_at(reader: &mut Reader<'_>, name: &'static str, folder: &Path, problems: &mut Problems) -> Option<PathBuf> {
    let entry = reader.entry(name)?;
    let path = reader.existing_path(name, folder, problems)?;
    is_folder(path, name, entry.node.place, problems)
}

fn is_folder(path: PathBuf, what: &str, place: Place, problems: &mut Problems) -> Option<PathBuf> {
    if path.is_dir() {
        return Some(path);
    }
    problems.add(place, format!("`{what}` is not a folder")).help("name the folder that holds the files");
    None
}

/// A table as JSON, its keys in order: theirs in the template means nothing.
fn data(reader: &mut Reader<'_>, name: &'static str, problems: &mut Problems) -> Json {
    match reader.entry(name).map(|entry| &entry.node) {
        None => json!({}),
        Some(node @ Node { value: Value::Table(_), .. }) => plain(&node.value),
        Some(node) => wrong_type(node, name, "a table", problems).unwrap_or_default(),
    }
}

fn plain(value: &Value) -> Json {
    match value {
        Value::String(text) | Value::Datetime(text) => json!(text),
        Value::Integer(number) => json!(number),
        Value::Float(number) => json!(number),
        Value::Boolean(truth) => json!(truth),
        Value::Array(items) => items.iter().map(|item| plain(&item.value)).collect(),
        Value::Table(table) => {
            let sorted: BTreeMap<_, _> = table.entries.iter().map(|entry| (entry.name.clone(), plain(&entry.node.value))).collect();
            Json::Object(sorted.into_iter().collect())
        }
    }
}

/// Sets a value in nested tables: `a:b` is `b` in `a`, as Salt writes it.
fn set(into: &mut Map<String, Json>, key: &str, value: Json) {
    match key.split_once(':') {
        None => drop(into.insert(key.to_owned(), value)),
        Some((outer, rest)) => {
            let inner = into.entry(outer).or_insert_with(|| json!({}));
            if !inner.is_object() {
                *inner = json!({});
            }
            if let Some(inner) = inner.as_object_mut() {
                set(inner, rest, value);
            }
        }
    }
}

impl Salt {
    /// Where the states of a root are in the guest, below the run's folder.
    fn place(number: usize) -> String {
        if number == 0 { "states".into() } else { format!("formulas/{number}") }
    }

    fn minion(&self, folder: &str) -> Json {
        let roots: Vec<String> = (0..self.roots.len()).map(|number| format!("{folder}/{}", Self::place(number))).collect();
        json!({
            "id": self.id,
            "file_client": "local",
            "root_dir": format!("{folder}/root"),
            "pki_dir": format!("{folder}/root/pki"),
            "cachedir": format!("{folder}/root/cache"),
            "sock_dir": format!("{folder}/root/sock"),
            "pidfile": format!("{folder}/root/pid"),
            "log_file": format!("{folder}/root/log"),
            "log_level_logfile": "quiet",
            "file_roots": { "base": roots },
            "pillar_roots": { "base": [format!("{folder}/pillar")] },
            // The file is read as it is: no template in it, and on no command line.
            "ext_pillar": [{ "cmd_json": format!("cat {folder}/pillar.json") }],
            "grains": self.grains,
            "outputter_dirs": [format!("{folder}/outputters")],
            // It would ask the network who this machine is.
            "enable_fqdns_grains": false,
        })
    }

    /// What comes on top of the files of the pillar.
    fn pillar_of(&self, step: &Step<'_>) -> Result<Json> {
        let mut pillar = self.pillar_data.as_object().cloned().unwrap_or_default();
        for (key, name) in &self.pillar_secrets {
            let Some(secret) = step.secrets.get(name) else {
                let error = Error::new(Code::Usage, format!("`pillar_secrets` names the secret `{name}`, which this step is not given"));
                return Err(error.step(&step.common.name).next(format!("add `secrets = [\"{name}\"]` to the step")));
            };
            set(&mut pillar, key, json!(secret.expose()));
        }
        Ok(Json::Object(pillar))
    }

    fn call(&self, folder: &str, more: &str) -> String {
        let names = if self.apply.is_empty() { String::new() } else { format!(" {}", quote(&self.apply.join(","))) };
        format!(
            "salt=$(command -v salt-call || echo {HOME}/bin/salt-call)
\"$salt\" --local --config-dir {folder}/etc --log-level error --retcode-passthrough --out kiln state.apply{names}{more}\n"
        )
    }
}

/// What the outputter said of one state: outcome, function, id, comment.
fn state(line: &str) -> Option<(&str, String)> {
    let mut parts = line.split('\t');
    let (outcome, function, id) = (parts.next()?, parts.next()?, parts.next()?);
    matches!(outcome, "ok" | "changed" | "would change" | "failed" | "not run").then(|| (outcome, format!("{id} ({function})")))
}

#[async_trait]
impl Tool for Salt {
    fn kind(&self) -> &'static str {
        "salt"
    }

    fn presence(&self) -> Presence {
        // No Salt is in Debian. pip's own folder for it needs neither a second
        // pip nor Debian's package for virtual environments; the program is
        // written last, so that what is half done does not look done.
        let install = format!(
            "python3 -c 'import sys; v = sys.version_info; sys.exit(v[:2] != (3, 11) and f\"the Salt that kiln brings needs Python 3.11 (Debian 12), and this is {{v[0]}}.{{v[1]}}: install Salt in a step before\")'
rm -rf {HOME}/lib
python3 -m venv --without-pip {HOME}
cat > {HOME}/requirements.txt << 'END'
{REQUIREMENTS}END
python3 -m pip install --progress-bar off --no-input --retries 2 --disable-pip-version-check --no-cache-dir --root-user-action ignore \\
  --no-deps --require-hashes --no-build-isolation --no-compile --target {HOME}/lib/python3.11/site-packages -r {HOME}/requirements.txt || {{
  echo 'pip could not install Salt. Behind a proxy that reads TLS, or with an index of your own, say so in the env of the step: PIP_CERT (a file of certificates in the guest), PIP_INDEX_URL' >&2
  exit 1
}}
printf '%s\\n' '#!{HOME}/bin/python' 'import sys' 'from salt.scripts import salt_call' 'sys.exit(salt_call())' > {HOME}/bin/salt-call.new
chmod 755 {HOME}/bin/salt-call.new
mv {HOME}/bin/salt-call.new {HOME}/bin/salt-call"
        );
        Presence {
            programs: vec!["salt-call".into(), format!("{HOME}/bin/salt-call")],
            packages: vec!["python3-pip".into()],
            install,
            remains: vec![HOME.into()],
        }
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        for (number, root) in self.roots.iter().enumerate() {
            key_tree(hasher, &Self::place(number), root)?;
        }
        if let Some(pillar) = &self.pillar {
            key_tree(hasher, "pillar", pillar)?;
        }
        for (name, value) in [("pillar_data", &self.pillar_data), ("grains", &self.grains)] {
            let text = value.to_string();
            hasher.hidden(name, &text);
            if text != "{}" {
                hasher.part(name, &text);
            }
        }
        hasher.map("pillar secret", self.pillar_secrets.iter().map(|(key, name)| (key.as_str(), name.as_str())));
        hasher.field("apply", self.apply.join(",")).field("id", &self.id);
        Ok(())
    }

    fn secrets(&self) -> Vec<&str> {
        self.pillar_secrets.values().map(String::as_str).collect()
    }

    fn inputs(&self) -> Vec<Input> {
        let roots = self.roots.iter().enumerate().map(|(number, root)| Input { from: root.clone(), to: Self::place(number) });
        roots.chain(self.pillar.iter().map(|pillar| Input { from: pillar.clone(), to: "pillar".into() })).collect()
    }

    fn files(&self, step: &Step<'_>, folder: &str) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(vec![
            // YAML, which JSON is.
            ("etc/minion".into(), self.minion(folder).to_string().into_bytes()),
            ("outputters/kiln.py".into(), OUTPUTTER.into()),
            ("pillar.json".into(), self.pillar_of(step)?.to_string().into_bytes()),
        ])
    }

    fn apply(&self, folder: &str) -> String {
        self.call(folder, "")
    }

    fn failure(&self, _stream: Stream, line: &str) -> Option<String> {
        let said = line.strip_prefix("failed\t")?;
        Some(match (state(line), said.splitn(3, '\t').nth(2)) {
            (Some((_, name)), Some(comment)) => format!("{name}: {comment}"),
            _ => said.to_owned(),
        })
    }

    fn check(&self, folder: &str) -> String {
        self.call(folder, " test=True")
    }

    fn changes(&self, lines: &[(Stream, String)]) -> Result<Changes> {
        if !lines.iter().any(|(stream, line)| *stream == Stream::Stdout && line.starts_with("states\t")) {
            return Err(Error::new(Code::Step, "Salt did not say what a second run would change"));
        }
        // With `test=True` nothing is changed: a state that says so all the same
        // would do it.
        let would = |outcome: &str| matches!(outcome, "would change" | "changed");
        let named = lines.iter().filter_map(|(_, line)| state(line)).filter(|(outcome, _)| would(outcome));
        Ok(Changes { resources: named.map(|(_, name)| name).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::tests::{key, node, parts, read, string, table, text, wrong};
    use kiln_model::guest::{Command, Exit, Guest, OnLine, SshAccess};
    use kiln_model::provision::Common;
    use kiln_model::secret::Secret;
    use kiln_model::tree::Tree;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, content) in [
            ("states/top.sls", "base:\n  '*': [nginx]\n"),
            ("states/nginx/init.sls", "nginx: pkg.installed\n"),
            ("pillar/top.sls", "base: {}\n"),
            ("formula/users/init.sls", "root: user.present\n"),
        ] {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        folder
    }

    fn array(items: &[&str]) -> Value {
        Value::Array(items.iter().map(|item| text(item)).collect())
    }

    fn map(entries: &[(&str, Value)]) -> Value {
        table(entries).value
    }

    fn salt() -> Salt {
        Salt {
            roots: vec!["states".into(), "formula".into()],
            pillar: None,
            pillar_data: json!({ "db": { "port": 5432 } }),
            pillar_secrets: [("db:password".to_owned(), "db".to_owned())].into(),
            grains: json!({ "role": "web" }),
            apply: vec!["nginx".into(), "web.site".into()],
            id: "kiln".into(),
        }
    }

    #[test]
    fn settings_and_their_problems() {
        let folder = folder();
        let here = folder.path();
        let states = ("states", string("states"));
        read("salt", &table(&[states.clone(), ("formulas", array(&["formula"])), ("apply", array(&["nginx", "web.site"]))]), here);
        let cases: &[(Node, &str)] = &[
            (node(string("states")), "must be a table"),
            (table(&[]), "[provision.salt] needs `states`"),
            (table(&[("states", string("none"))]), "cannot read `none`"),
            (table(&[("states", string("states/top.sls"))]), "`states` is not a folder"),
            (table(&[states.clone(), ("formulas", array(&["states/top.sls"]))]), "`states/top.sls` is not a folder"),
            (table(&[states.clone(), ("apply", array(&["a b"]))]), "`a b` is no name of states"),
            (table(&[states.clone(), ("apply", array(&["pillar={}"]))]), "is no name of states"),
            (table(&[states.clone(), ("apply", array(&[]))]), "then `top.sls` decides"),
            (table(&[states.clone(), ("grains", string("x"))]), "`grains` must be a table"),
            (table(&[states.clone(), ("keep", Value::Boolean(true))]), "about what `bootstrap` installs"),
            (table(&[states, ("pilar", string("x"))]), "did you mean `pillar`?"),
        ];
        for (settings, expected) in cases {
            let found = wrong("salt", settings, here);
            assert!(found.iter().any(|problem| problem.contains(expected)), "{expected}: {found:?}");
        }
    }

    #[test]
    fn the_key_holds_every_input_and_no_place() {
        let (one, two) = (folder(), folder());
        let states = ("states", string("states"));
        let full = [
            states.clone(),
            ("formulas", array(&["formula"])),
            ("pillar", string("pillar")),
            ("pillar_data", map(&[("a", Value::Integer(1)), ("b", string("x"))])),
            ("pillar_secrets", map(&[("token", string("secret"))])),
            ("grains", map(&[("role", string("web"))])),
            ("apply", array(&["nginx"])),
        ];
        let of = |entries: &[(&str, Value)], here: &Path| key(&*read("salt", &table(entries), here));
        assert_eq!(of(&full, one.path()), of(&full, two.path()));
        let mut turned = full.clone();
        turned[3].1 = map(&[("b", string("x")), ("a", Value::Integer(1))]);
        assert_eq!(of(&full, one.path()), of(&turned, one.path()));
        // Each setting is a part, and so is each file.
        let mut keys: Vec<_> = (1..full.len()).map(|without| of(&[&full[..without], &full[without + 1..]].concat(), one.path())).collect();
        keys.push(of(&full, one.path()));
        keys.push(of(&[&full[..], &[("bootstrap", Value::Boolean(true))]].concat(), one.path()));
        for file in ["states/nginx/init.sls", "pillar/top.sls", "formula/users/init.sls"] {
            std::fs::write(two.path().join(file), "changed: test.nop\n").unwrap();
            keys.push(of(&full, two.path()));
        }
        let all = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), all);
        let names = parts(&*read("salt", &table(&full), one.path())).join(", ");
        assert_eq!(
            names,
            "bootstrap, states, states/nginx, states/nginx/init.sls, states/top.sls, formula, formula/users, formula/users/init.sls, \
             pillar, pillar/top.sls, pillar_data, grains, pillar secret token, apply, id"
        );
    }

    #[test]
    fn all_that_salt_writes_is_in_the_runs_folder() {
        let minion = salt().minion("/run/kiln/tool-1");
        for place in ["root_dir", "pki_dir", "cachedir", "sock_dir", "pidfile", "log_file"] {
            assert!(minion[place].as_str().unwrap().starts_with("/run/kiln/tool-1/root"), "{place}");
        }
        assert_eq!(minion["file_roots"], json!({ "base": ["/run/kiln/tool-1/states", "/run/kiln/tool-1/formulas/1"] }));
        assert_eq!(minion["grains"], json!({ "role": "web" }));
        let places: Vec<_> = salt().inputs().into_iter().map(|input| input.to).collect();
        assert_eq!(places, ["states", "formulas/1"]);
        assert!(
            salt()
                .apply("/f")
                .contains("--config-dir /f/etc --log-level error --retcode-passthrough --out kiln state.apply nginx,web.site\n")
        );
        assert!(salt().check("/f").contains("state.apply nginx,web.site test=True\n"));
        assert!(Salt { apply: Vec::new(), ..salt() }.apply("/f").contains("state.apply\n"));
    }

    struct Nowhere;

    #[async_trait]
    impl Guest for Nowhere {
        async fn execute(&self, _: &Command, _: OnLine<'_>) -> Result<Exit> {
            Err(Error::new(Code::Unreachable, "nowhere"))
        }
        async fn upload(&self, _: &Tree, _: &str) -> Result<()> {
            Ok(())
        }
        async fn download(&self, _: &str, _: &Path) -> Result<()> {
            Ok(())
        }
        async fn wait_for_new_boot(&self, _: &str, _: std::time::Duration) -> Result<()> {
            Ok(())
        }
        fn ssh_access(&self) -> Option<SshAccess> {
            None
        }
    }

    struct Silent;

    impl kiln_model::event::Reporter for Silent {
        fn report(&self, _: kiln_model::event::Event) {}
    }

    #[test]
    fn a_secret_is_in_the_pillar_and_nowhere_else() {
        let reports = kiln_model::event::Reports::new(std::sync::Arc::new(Silent), kiln_model::secret::Redactor::default());
        let common = Common { name: "web".into(), ..Common::default() };
        let secrets = [("db".to_owned(), Secret::new("s3cret-\"value"))].into();
        let step =
            Step { guest: std::sync::Arc::new(Nowhere), common: &common, reports: &reports, secrets: &secrets, work: Path::new("/") };
        let files = salt().files(&step, "/f").unwrap();
        let holding: Vec<_> = files.iter().filter(|(_, bytes)| String::from_utf8_lossy(bytes).contains("s3cret")).collect();
        assert_eq!(holding.len(), 1);
        let pillar: Json = serde_json::from_slice(&holding[0].1).unwrap();
        assert_eq!((holding[0].0.as_str(), pillar), ("pillar.json", json!({ "db": { "port": 5432, "password": "s3cret-\"value" } })));
        assert!(!salt().apply("/f").contains("s3cret"));
        let none = BTreeMap::new();
        let error = salt().files(&Step { secrets: &none, ..step }, "/f").unwrap_err();
        assert_eq!(error.to_string(), "`pillar_secrets` names the secret `db`, which this step is not given");
        assert_eq!(error.next_move(), Some("add `secrets = [\"db\"]` to the step"));
    }

    /// What Salt 3006.23 said through kiln's outputter.
    const FAILED: &str = "[ERROR   ] Command 'echo' failed with return code: 3
[ERROR   ] stderr: bad
failed\tcmd.run\tnever done\tCommand \"echo out; echo bad >&2; exit 3\" run, exit status 3: bad";
    const CHECKED: &str = "would change\tcmd.run\tnever done\tCommand \"echo out; echo bad >&2; exit 3\" would have been executed
ok\ttest.nop\tneeds it\tSuccess!
ok\tfile.managed\t/etc/motd\tThe file /etc/motd is in the correct state
states\t1 would change, 2 ok";
    const UNREADABLE: &str = "failed\tRendering SLS 'base:yaml' failed: while parsing a flow node did not find expected node content \
                              in \"<unicode string>\", line 3, column 1";

    fn lines(text: &str) -> Vec<(Stream, String)> {
        text.lines().map(|line| (Stream::Stdout, line.to_owned())).collect()
    }

    #[test]
    fn what_failed_is_named() {
        let said = |text: &str| text.lines().find_map(|line| salt().failure(Stream::Stderr, line));
        assert_eq!(said(FAILED).unwrap(), "never done (cmd.run): Command \"echo out; echo bad >&2; exit 3\" run, exit status 3: bad");
        assert!(said(UNREADABLE).unwrap().starts_with("Rendering SLS 'base:yaml' failed: while parsing"));
        assert_eq!(said(CHECKED), None);
    }

    #[test]
    fn what_a_second_run_would_change_is_named() {
        assert_eq!(salt().changes(&lines(CHECKED)).unwrap().resources, ["never done (cmd.run)"]);
        let clean = "ok\tpkg.installed\tnginx\tAll specified packages are already installed\nstates\t1 ok";
        assert!(salt().changes(&lines(clean)).unwrap().resources.is_empty());
        assert!(salt().changes(&lines("states\tnone")).unwrap().resources.is_empty());
        // Some modules know no test mode: what they say they did, they would do.
        let did = "changed\tmodule.run\tloud\tModule function executed\nstates\t1 changed";
        assert_eq!(salt().changes(&lines(did)).unwrap().resources, ["loud (module.run)"]);
        // What was not understood is no proof.
        assert!(salt().changes(&lines("local:\n----------\n")).is_err());
        assert!(salt().changes(&[]).is_err());
    }

    #[test]
    fn the_outputter_says_what_became_of_each_state() {
        let data = r#"{"local": {
            "cmd_|-never done_|-exit 3_|-run": {"result": false, "changes": {"retcode": 3, "stdout": "", "stderr": "first\nbad"}, "comment": "Command \"exit 3\" run", "__id__": "never done", "__run_num__": 1},
            "file_|-page_|-/x_|-managed": {"result": true, "changes": {"diff": "+the token"}, "comment": "File\n /x updated", "__id__": "page", "__run_num__": 0},
            "cmd_|-later_|-x_|-run": {"result": null, "changes": {}, "comment": "would", "__run_num__": 3},
            "test_|-needs_|-needs_|-nop": {"result": false, "changes": {}, "comment": "One or more requisite failed: a.never done", "__run_num__": 2}}}"#;
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("kiln.py"), OUTPUTTER).unwrap();
        let code = "import json, sys, kiln; print(kiln.output(json.loads(sys.argv[1])))";
        let output = std::process::Command::new("python3").args(["-B", "-c", code, data]).current_dir(folder.path()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "failed\tcmd.run\tnever done\tCommand \"exit 3\" run, exit status 3: bad\n");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "changed\tfile.managed\tpage\tFile /x updated\nnot run\ttest.nop\tneeds\tOne or more requisite failed: a.never done\n\
             would change\tcmd.run\tlater\twould\nstates\t1 changed, 1 failed, 1 not run, 1 would change\n"
        );
    }

    #[test]
    fn everything_that_bootstrap_brings_is_held_by_its_digest() {
        let requirements = REQUIREMENTS.lines().filter(|line| !line.starts_with([' ', '#'])).collect::<Vec<_>>();
        assert!(requirements.iter().any(|line| line.starts_with("salt==3006.")));
        for line in &requirements {
            assert!(line.contains("==") && line.ends_with('\\'), "{line}");
        }
        assert!(REQUIREMENTS.matches("--hash=sha256:").count() >= requirements.len());
        let install = salt().presence().install;
        assert!(install.contains("--require-hashes") && install.contains("--no-deps") && install.contains(REQUIREMENTS));
        let checked = std::process::Command::new("bash").args(["-n", "-c", &install]).status().unwrap();
        assert!(checked.success());
    }
}

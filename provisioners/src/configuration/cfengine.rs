//! `cfengine`: runs a policy with `cf-agent`; no server, no keys, no daemons.
//!
//! CFEngine's work directory is in the run's folder, which is on tmpfs and goes
//! with the run. cf-agent ends with 0 whatever became of the promises, and in
//! a dry run it tells of some types in other words than of others; so both are
//! read from the outcomes that it gives for each promise when it is verbose.

use std::path::{Path, PathBuf};

use kiln_model::event::Stream;
use kiln_model::guest::quote;
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::{Provisioner, Step};
use kiln_model::settings::{Node, Problems, Reader};
use kiln_model::{Code, Error, Result};

use super::read::{is_word, last_part, required_path, told};
use super::{Changes, Configuration, Input, Presence, Settings, Tool, key_tree};
use crate::settings::finish;

/// Where a folder's policy begins, unless said.
const ENTRY: &str = "promises.cf";
/// Of cf-agent's lines, those that are not verbose.
const SHOW: &str = include_str!("cfengine/show.awk");
/// What became of each promise.
const OUTCOMES: &str = include_str!("cfengine/outcomes.awk");
/// What [`OUTCOMES`] says of a dry run.
const WOULD_CHANGE: &str = "kiln: would change: ";
const ENDED: &str = "kiln: cf-agent got to its end";

/// Reads `[provision.cfengine]`.
pub(crate) struct CfengineKind;

struct Cfengine {
    /// A file, or a folder.
    policy: PathBuf,
    /// The file in the folder.
    entry: Option<String>,
    classes: Vec<String>,
    /// Goes beside the policy as `def.json`.
    data: Option<PathBuf>,
}

impl Kind<dyn Provisioner> for CfengineKind {
    fn name(&self) -> &'static str {
        "cfengine"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["policy", "entry", "classes", "data", "bootstrap", "keep", "converge"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let mut reader = Reader::new(settings, "[provision.cfengine]", problems)?;
        let place = reader.entry("policy").map_or(settings.place, |entry| entry.node.place);
        let policy = required_path(&mut reader, "policy", folder, problems);
        let entry_place = reader.entry("entry").map(|entry| entry.node.place);
        let entry = reader.string("entry", problems).map(ToOwned::to_owned);
        match &policy {
            Some(policy) if policy.is_dir() => {
                let name = entry.as_deref().unwrap_or(ENTRY);
                if !policy.join(name).is_file() {
                    let place = entry_place.unwrap_or(place);
                    problems
                        .add(place, format!("there is no file {name} in {}", policy.display()))
                        .help("say in `entry` where the policy begins");
                }
            }
            Some(_) => {
                if let Some(place) = entry_place {
                    problems.add(place, "`entry` is about a folder, and `policy` is a file").help("remove `entry`");
                }
            }
            None => {}
        }
        let classes = reader.strings("classes", problems).unwrap_or_default();
        for (name, place) in classes.iter().filter(|(name, _)| !is_word(name)) {
            problems.add(*place, format!("`{name}` is no name of a class")).help("use letters, digits and `_`");
        }
        let classes = classes.into_iter().map(|(name, _)| name.to_owned()).collect();
        let place = reader.entry("data").map_or(settings.place, |entry| entry.node.place);
        let data = reader.existing_path("data", folder, problems);
        if data.as_ref().is_some_and(|data| !data.is_file()) {
            problems.add(place, "`data` must be a file").help("name a def.json");
        }
        if data.is_some() && policy.as_ref().is_some_and(|policy| policy.join("def.json").exists()) {
            problems.add(place, "the policy has a def.json of its own").help("remove one of them");
        }
        let own = Settings::read(&mut reader, problems);
        finish(reader, settings, self.keys(), problems);
        let tool = Cfengine { policy: policy?, entry, classes, data };
        (problems.0.len() == before).then(|| Box::new(Configuration { tool, settings: own }) as _)
    }
}

impl Cfengine {
    fn entry(&self) -> String {
        if self.policy.is_dir() { self.entry.clone().unwrap_or_else(|| ENTRY.into()) } else { last_part(&self.policy) }
    }

    /// The run; `how` is `run` or `dry`.
    fn script(&self, folder: &str, how: &str) -> String {
        let file = quote(&format!("{folder}/cf/inputs/{}", self.entry()));
        let classes = if self.classes.is_empty() { String::new() } else { format!(" --define {}", self.classes.join(",")) };
        let dry = if how == "dry" { " --dry-run" } else { "" };
        // Where cf-agent takes a policy for broken, it runs one of its own
        // that asks a server for a better one: so it is checked beforehand.
        format!(
            "w={folder}/cf
agent=$(command -v cf-agent || command -v /var/cfengine/bin/cf-agent)
bin=$(dirname \"$(readlink -f \"$agent\")\")
mkdir -p $w/state $w/outputs $w/modules
mkdir -p -m 700 $w/ppkeys
chmod -R go-w $w
[ -e $w/bin ] || ln -s \"$bin\" $w/bin
for of in /var/lib/cfengine3 /usr/share/cfengine3 /var/cfengine; do
  [ -e $w/inputs/lib ] || [ ! -d $of/masterfiles/lib ] || ln -s $of/masterfiles/lib $w/inputs/lib
  [ -e $w/modules/packages ] || [ ! -d $of/modules/packages ] || ln -s $of/modules/packages $w/modules/packages
done
if ! \"$bin/cf-promises\" --workdir $w --full-check{classes} --file {file} > parsed 2>&1; then
  cat parsed >&2
  printf 'kiln: %s\\n' \"$(sed -n \"s,^$w/inputs/,,; s/^ *error: //; T; p; q\" parsed)\" >&2
  exit 1
fi
status=0
\"$bin/cf-agent\" --no-lock --workdir $w --verbose --color=never{classes}{dry} --file {file} 2>&1 | tee log | awk -f show.awk || status=$?
awk -v how={how} -v status=$status -f outcomes.awk log\n"
        )
    }
}

impl Tool for Cfengine {
    fn kind(&self) -> &'static str {
        "cfengine"
    }

    fn presence(&self) -> Presence {
        Presence {
            programs: vec!["cf-agent".into(), "/var/cfengine/bin/cf-agent".into()],
            packages: vec!["cfengine3".into()],
            // Where it stays it is a tool, not a service.
            install: "! command -v systemctl > /dev/null || systemctl -q disable $(dpkg -L cfengine3 | sed -n 's,.*/systemd/system/\\([^/]*\\.service\\)$,\\1,p')".into(),
            remains: vec!["/var/lib/cfengine3".into(), "/etc/cfengine3".into()],
        }
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        key_tree(hasher, "policy", &self.policy)?;
        hasher.field("entry", self.entry()).hidden("classes", self.classes.len().to_string());
        for class in &self.classes {
            hasher.hidden("class", class).part(format!("class {class}"), class);
        }
        hasher.hidden("data", if self.data.is_some() { "given" } else { "" });
        self.data.as_ref().map_or(Ok(()), |data| key_tree(hasher, "data", data))
    }

    fn inputs(&self) -> Vec<Input> {
        let to = if self.policy.is_dir() { "cf/inputs".into() } else { format!("cf/inputs/{}", last_part(&self.policy)) };
        let mut inputs = vec![Input { from: self.policy.clone(), to }];
        if let Some(data) = &self.data {
            inputs.push(Input { from: data.clone(), to: "cf/inputs/def.json".into() });
        }
        inputs
    }

    fn files(&self, step: &Step<'_>, _folder: &str) -> Result<Vec<(String, Vec<u8>)>> {
        // cf-agent lists every folder on the way to its policy, and nobody but
        // root may list what kiln keeps in the guest.
        if let Some(user) = &step.common.user {
            return Err(Error::new(Code::Usage, format!("cfengine runs as root alone, not as `{user}`"))
                .step(&step.common.name)
                .next("remove `user`; a promise says itself as whom a command runs, with `contain` and `exec_owner`"));
        }
        Ok(vec![("show.awk".into(), SHOW.into()), ("outcomes.awk".into(), OUTCOMES.into())])
    }

    fn apply(&self, folder: &str) -> String {
        self.script(folder, "run")
    }

    fn failure(&self, _stream: Stream, line: &str) -> Option<String> {
        told(line)
    }

    fn check(&self, folder: &str) -> String {
        self.script(folder, "dry")
    }

    fn changes(&self, lines: &[(Stream, String)]) -> Result<Changes> {
        if !lines.iter().any(|(_, line)| line == ENDED) {
            return Err(Error::new(Code::Step, "cf-agent did not get to the end of its dry run"));
        }
        Ok(Changes { resources: lines.iter().filter_map(|(_, line)| line.strip_prefix(WOULD_CHANGE).map(ToOwned::to_owned)).collect() })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use kiln_model::settings::Value;

    use super::*;
    use crate::settings::tests::{key, parts, read, string, table, text, wrong};

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in ["policy/promises.cf", "policy/lib/own.cf", "one.cf", "def.json", "own/def.json", "own/promises.cf"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        folder
    }

    fn strings(values: &[&str]) -> Value {
        Value::Array(values.iter().map(|value| text(value)).collect())
    }

    #[test]
    fn settings_and_their_problems() {
        let folder = folder();
        let here = folder.path();
        let all = [
            ("policy", string("policy")),
            ("entry", string("lib/own.cf")),
            ("classes", strings(&["web", "tls"])),
            ("data", string("def.json")),
            ("bootstrap", Value::Boolean(true)),
            ("converge", string("once")),
        ];
        assert!(read("cfengine", &table(&all), here).converges());
        read("cfengine", &table(&[("policy", string("one.cf"))]), here);

        let problems = |entries: &[(&str, Value)]| wrong("cfengine", &table(entries), here).join("\n");
        assert_eq!(problems(&[]), "[provision.cfengine] needs `policy` | ");
        assert!(problems(&[("policy", string("policy/lib"))]).contains("no file promises.cf in"));
        assert!(problems(&[("policy", string("one.cf")), ("entry", string("x"))]).contains("`policy` is a file"));
        assert!(problems(&[("policy", string("own")), ("data", string("def.json"))]).contains("def.json of its own"));
        let with = |name, value| problems(&[("policy", string("policy")), (name, value)]);
        assert!(with("classes", strings(&["a-b"])).contains("`a-b` is no name of a class"));
        assert!(with("data", string("policy")).contains("must be a file"));
        assert!(with("polcy", string("x")).contains("did you mean `policy`?"));
    }

    #[test]
    fn every_input_is_in_the_key_and_no_path() {
        let (one, two) = (folder(), folder());
        let settings = || table(&[("policy", string("policy")), ("data", string("def.json")), ("classes", strings(&["web"]))]);
        let of = |folder: &Path| key(&*read("cfengine", &settings(), folder));
        assert_eq!(of(one.path()), of(two.path()));
        for name in ["policy/promises.cf", "policy/lib/own.cf", "def.json"] {
            let before = of(two.path());
            std::fs::write(two.path().join(name), "changed").unwrap();
            assert_ne!(before, of(two.path()), "{name}");
        }
        let parts = parts(&*read("cfengine", &settings(), one.path())).join(", ");
        for part in ["bootstrap", "policy/promises.cf", "policy/lib/own.cf", "entry", "class web", "def.json"] {
            assert!(parts.contains(part), "{part} in {parts}");
        }
    }

    /// What an awk program of ours makes of cf-agent's output.
    fn awk(program: &str, arguments: &[&str], input: &str) -> (bool, Vec<String>) {
        let mut child = Command::new("awk").args(arguments).arg(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap().lines().map(Into::into).collect())
    }

    fn outcomes(how: &str, status: u8, input: &str) -> (bool, Vec<String>) {
        awk(OUTCOMES, &["-v", &format!("how={how}"), "-v", &format!("status={status}")], input)
    }

    /// What cf-agent 3.21 printed, without the most verbose lines.
    const RUN: &str = include_str!("cfengine/run.txt");
    const DRY: &str = include_str!("cfengine/dry.txt");

    #[test]
    fn a_promise_that_was_not_kept_is_named_with_its_reason() {
        let (success, said) = outcomes("run", 0, RUN);
        let reason = "Can't stat file '/srv/a long way down to a folder/a' on 'localhost' in files.copy_from promise";
        assert_eq!((success, said), (false, vec![format!("kiln: the files promise /srv/later was not kept: {reason}")]));
        // Once it was kept in the end, it was kept.
        let late = "verbose: P:    Stack path: /default/main/files/'/srv/later'[1]\n verbose: A: Promise REPAIRED\n verbose: P: END files promise (/srv/later)\n";
        let (success, said) = outcomes("run", 0, &RUN.replace(" verbose: Logging total", &format!(" {late} verbose: Logging total")));
        assert_eq!((success, said), (true, vec![ENDED.to_owned()]));
        // A run that did not get to its end proves nothing.
        let cut = RUN.split(" verbose: Logging total").next().unwrap();
        assert!(!outcomes("run", 0, cut).0 && !outcomes("dry", 0, cut).0 && !outcomes("run", 1, RUN).0);
    }

    #[test]
    fn what_a_dry_run_would_change_is_named_and_reports_are_not() {
        let (success, said) = outcomes("dry", 0, DRY);
        assert!(success, "{said:?}");
        let (policy, lines) = (folder(), said.into_iter().map(|line| (Stream::Stdout, line)).collect::<Vec<_>>());
        let tool = Cfengine { policy: policy.path().join("policy"), entry: None, classes: Vec::new(), data: None };
        assert_eq!(
            tool.changes(&lines).unwrap().resources,
            [
                "files promise /srv/later",
                "packages promise tree",
                "files promise /srv/arg",
                "commands promise /bin/mkdir '/srv/a long way down to a folder' -p",
                "commands promise /bin/touch '/srv/a long way down to a folder/a'",
            ]
        );
        assert!(tool.changes(&lines[..1]).is_err());
        let nothing = " verbose: A: Promise was KEPT\n verbose: P: END files promise (/srv/arg)\n warning: Need to repair reports promise: x\n verbose: A: Promise NOT KEPT!\n verbose: P: END reports promise (x)\n verbose: Logging total compliance, total 'x'\n";
        assert_eq!(outcomes("dry", 0, nothing), (true, vec![ENDED.to_owned()]));
        // The lines within a file are promises, too, but not what is named.
        let nested = |path: &str, name: &str| {
            let path = format!(" verbose: P:    Stack path: /default/main/files/'{path}'");
            format!(
                "{path}[1]\n{path}/default/line/insert_lines/'a page'[1]\n verbose: A: Promise NOT KEPT!\n verbose: P: END files promise ({name})\n"
            )
        };
        let long = "/srv/a page with a long name indeed";
        let (_, said) = outcomes("dry", 0, &[nested("/srv/page", "/srv/page"), nested(long, "/srv/a page with a long...")].concat());
        assert_eq!(
            said[..2],
            ["kiln: would change: files promise /srv/page".to_owned(), format!("kiln: would change: files promise {long}")]
        );
        let unnamed = format!(" warning: Should do something\n{nothing}");
        assert_eq!(outcomes("dry", 0, &unnamed).1[0], "kiln: would change: Should do something");
    }

    #[test]
    fn what_is_not_verbose_is_shown() {
        let (_, shown) = awk(SHOW, &[], DRY);
        assert_eq!(shown.len(), 12, "{shown:?}");
        assert!(shown.iter().all(|line| !line.contains("verbose")) && shown[1].starts_with("   error: Can't stat file"));
    }
}

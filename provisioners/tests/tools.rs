//! Puppet and CFEngine, the real ones, on a guest behind a real sshd, which runs
//! as root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking; clippy knows only `#[test]` functions as tests")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use kiln_model::event::Reports;
use kiln_model::provision::{Common, Step};
use kiln_model::secret::Redactor;
use kiln_model::settings::{Problems, Value};
use kiln_model::{Code, Error, Result};
use kiln_ssh::testing::Sshd;

use common::{Log, node, string, strings, table};

/// Files of a template, and what their `@OUT@` stands for.
fn write(sshd: &Sshd, files: &[(&str, &str)]) -> String {
    let out = sshd.path().join("out");
    std::fs::create_dir_all(&out).unwrap();
    for (name, text) in files {
        let path = sshd.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text.replace("@OUT@", out.to_str().unwrap())).unwrap();
    }
    out.to_str().unwrap().to_owned()
}

async fn run(sshd: &Sshd, kind: &str, settings: &[(&str, Value)], common: Common) -> (Result<()>, Vec<String>) {
    let mut problems = Problems::default();
    let kind = kiln_provisioners::all().into_iter().find(|k| k.name() == kind).unwrap();
    let step = kind.read(&node(table(settings)), sshd.path(), &mut problems);
    assert!(problems.is_empty(), "{:?}", problems.0);
    let log = Arc::new(Log::default());
    let reports = Reports::new(log.clone(), Redactor::default());
    let common = Common { name: "step".into(), ..common };
    let (secrets, work) = (BTreeMap::new(), sshd.path());
    let result = step.unwrap().run(&Step { guest: sshd.guest().await, common: &common, reports: &reports, secrets: &secrets, work }).await;
    let lines = log.lines();
    (result, lines)
}

fn failed((result, lines): (Result<()>, Vec<String>)) -> Error {
    let error = result.unwrap_err();
    assert_eq!((error.kind(), error.step_name()), (Code::Step, Some("step")), "{error:?} {lines:?}");
    error
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[tokio::test]
async fn puppet_applies_a_manifest_once_and_proves_it() {
    let sshd = Sshd::start();
    let out = write(
        &sshd,
        &[
            ("manifests/a.pp", "include site"),
            ("manifests/b.pp", "notify { 'said': }\nfile { '@OUT@/b': content => $environment }"),
            (
                "modules/site/manifests/init.pp",
                "class site(String $word) { file { '@OUT@/a': content => \"${word} ${facts['role']} ü\" } }",
            ),
            ("hiera.yaml", "version: 5\nhierarchy: [{ name: all, path: common.yaml, datadir: values }]\n"),
            ("values/common.yaml", "site::word: ahoy\n"),
        ],
    );
    let settings = [
        ("manifest", string("manifests")),
        ("modules", strings(&["modules"])),
        ("hiera", string("hiera.yaml")),
        ("hiera_data", string("values")),
        ("facts", table(&[("role", string("it's web"))])),
        ("environment", string("live")),
        ("converge", string("once")),
    ];
    let (result, lines) = run(&sshd, "puppet", &settings, Common::default()).await;
    result.unwrap_or_else(|error| panic!("{error:?}\n{}", lines.join("\n")));
    assert_eq!((read(format!("{out}/a")), read(format!("{out}/b"))), ("ahoy it's web ü".into(), "live".into()));

    // By another user than root.
    write(&sshd, &[("bad.pp", "file { '@OUT@/c': content => $facts['identity']['user'] }")]);
    for folder in [sshd.path(), Path::new(&out)] {
        std::fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    }
    let nobody = Common { user: Some("nobody".into()), ..Common::default() };
    let (result, lines) = run(&sshd, "puppet", &[("manifest", string("bad.pp"))], nobody).await;
    result.unwrap_or_else(|error| panic!("{error:?}\n{}", lines.join("\n")));
    assert_eq!(read(format!("{out}/c")), "nobody");

    // What fails is named, and so is what a second run would do again.
    write(&sshd, &[("bad.pp", "exec { 'no': command => '/bin/false' }\nfile { '@OUT@/none/x': ensure => file }")]);
    let error = failed(run(&sshd, "puppet", &[("manifest", string("bad.pp"))], Common::default()).await);
    let said = error.chain();
    assert!(said.contains("/Stage[main]/Main/Exec[no]/returns: change from 'notrun'") && said.contains("(and 1 more)"), "{said}");
    write(&sshd, &[("bad.pp", "include nothere")]);
    let error = failed(run(&sshd, "puppet", &[("manifest", string("bad.pp"))], Common::default()).await);
    assert!(error.chain().contains("Could not find class ::nothere"), "{}", error.chain());
    write(&sshd, &[("bad.pp", "exec { '/bin/date': }\nexec { '/bin/true': refreshonly => true }")]);
    let once = [("manifest", string("bad.pp")), ("converge", string("once"))];
    let error = failed(run(&sshd, "puppet", &once, Common::default()).await);
    assert_eq!(error.to_string(), "one run of puppet was not enough: a second one would change /Stage[main]/Main/Exec[/bin/date]");
}

const LINE: &str = "bundle edit_line line(text) { insert_lines: \"$(text)\"; }\n";

#[tokio::test]
async fn cfengine_runs_a_policy_once_and_proves_it() {
    let sshd = Sshd::start();
    let policy = "body common control { bundlesequence => { \"main\" }; inputs => { \"$(sys.libdir)/stdlib.cf\", \"own/line.cf\" }; }
bundle agent main {
  vars: \"greeting\" string => getenv(\"GREETING\", \"99\");
  files:\n    web:: \"@OUT@/a\" create => \"true\", edit_line => line(\"$(def.word) $(greeting)\");
  reports: \"said\";
}\n";
    let out =
        write(&sshd, &[("policy/promises.cf", policy), ("policy/own/line.cf", LINE), ("def.json", "{ \"vars\": { \"word\": \"ahoy\" } }")]);
    // A policy that others could write to is none that cf-agent takes.
    std::fs::set_permissions(sshd.path().join("policy/promises.cf"), std::os::unix::fs::PermissionsExt::from_mode(0o664)).unwrap();
    let settings =
        [("policy", string("policy")), ("classes", strings(&["web", "more"])), ("data", string("def.json")), ("converge", string("once"))];
    let env: BTreeMap<_, _> = [("GREETING".to_owned(), "it's me".to_owned())].into();
    let (result, lines) = run(&sshd, "cfengine", &settings, Common { env, ..Common::default() }).await;
    result.unwrap_or_else(|error| panic!("{error:?}\n{}", lines.join("\n")));
    assert_eq!(read(format!("{out}/a")), "ahoy it's me\n");
    assert!(lines.contains(&"R: said".to_owned()) && !lines.iter().any(|line| line.contains("verbose")), "{lines:?}");

    let common = Common { user: Some("nobody".into()), ..Common::default() };
    let error = run(&sshd, "cfengine", &settings, common).await.0.unwrap_err();
    assert!(error.kind() == Code::Usage && error.to_string().contains("root alone"), "{error:?}");

    let one = |body: &str| write(&sshd, &[("one.cf", &format!("bundle agent main {{ {body} }}\n"))]);
    one("commands: \"/bin/false\"; \"/bin/true\";");
    let error = failed(run(&sshd, "cfengine", &[("policy", string("one.cf"))], Common::default()).await);
    let said =
        "the commands promise /bin/false was not kept: Finished command related to promiser '/bin/false' -- an error occurred, returned 1";
    assert!(error.to_string().ends_with(said), "{error}");
    one("commands: foo bar;");
    let error = failed(run(&sshd, "cfengine", &[("policy", string("one.cf"))], Common::default()).await);
    assert!(error.to_string().contains("one.cf:1:") && error.to_string().contains("syntax error"), "{error}");
    one("commands: \"/bin/date\";");
    let once = [("policy", string("one.cf")), ("converge", string("once"))];
    let error = failed(run(&sshd, "cfengine", &once, Common::default()).await);
    assert_eq!(error.to_string(), "one run of cfengine was not enough: a second one would change commands promise /bin/date");
}

#[tokio::test]
async fn a_tool_that_is_not_there_is_said_to_be_missing() {
    let sshd = Sshd::start();
    write(&sshd, &[("cookbooks/site/recipes/default.rb", "")]);
    let settings = [("cookbooks", string("cookbooks")), ("run_list", strings(&["recipe[site]"])), ("mode", string("solo"))];
    let error = failed(run(&sshd, "chef", &settings, Common::default()).await);
    assert_eq!(error.to_string(), "chef is not in the guest: there is no `chef-solo`");
}

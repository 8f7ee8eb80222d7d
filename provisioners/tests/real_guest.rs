//! Provisioners on a guest behind a real sshd, which runs as root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking; clippy knows only `#[test]` functions as tests")]

mod common;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_model::event::Reports;
use kiln_model::provision::{Common, Provisioner, Step};
use kiln_model::secret::Redactor;
use kiln_model::settings::{Problems, Value};
use kiln_model::{Code, Error, Result};
use kiln_ssh::testing::Sshd;

use common::{Log, node, string, strings, table};

fn read(kind: &str, value: Value, folder: &Path) -> Box<dyn Provisioner> {
    let mut problems = Problems::default();
    let kind = kiln_provisioners::all().into_iter().find(|k| k.name() == kind).unwrap();
    let read = kind.read(&node(value), folder, &mut problems);
    assert!(problems.is_empty(), "{:?}", problems.0);
    read.unwrap()
}

async fn run_with(sshd: &Sshd, step: &dyn Provisioner, common: Common) -> (Result<()>, Vec<String>) {
    let log = Arc::new(Log::default());
    let reports = Reports::new(log.clone(), Redactor::default());
    let common = Common { name: "step".into(), ..common };
    let (secrets, work) = (std::collections::BTreeMap::new(), sshd.path());
    let result = step.run(&Step { guest: sshd.guest().await, common: &common, reports: &reports, secrets: &secrets, work }).await;
    let lines = log.lines();
    (result, lines)
}

async fn shell(script: Value, common: Common) -> (Result<()>, Vec<String>) {
    let sshd = Sshd::start();
    let step = read("shell", script, sshd.path());
    run_with(&sshd, &*step, common).await
}

async fn fails(script: &str) -> Error {
    let error = shell(string(script), Common::default()).await.0.unwrap_err();
    assert_eq!((error.kind(), error.step_name()), (Code::Step, Some("step")), "{error:?}");
    error
}

fn nothing_is_left() {
    let left: Vec<_> = std::fs::read_dir("/run/kiln").into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    // Other tests run at the same time: what is left is old.
    let old = |path: &std::path::PathBuf| {
        std::fs::metadata(path).is_ok_and(|m| m.modified().unwrap().elapsed().unwrap() > Duration::from_secs(60))
    };
    assert!(!left.iter().any(old), "{left:?}");
}

#[tokio::test]
async fn a_script_runs_with_its_environment_and_streams() {
    let env = [("GREETING", "it's \"$HOME\" {{ x }}\nsecond"), ("DEBIAN_FRONTEND", "dialog")];
    let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let script = "echo \"$GREETING\"\necho $DEBIAN_FRONTEND $(id -un) >&2\nset -o | grep -E '^(errexit|nounset|pipefail)' | grep -c on\nread -r x || printf 'no input'";
    let (result, lines) = shell(string(script), Common { env, ..Common::default() }).await;
    result.unwrap();
    let mut sorted = lines.clone();
    sorted.sort();
    assert_eq!(sorted, ["3", "dialog root", "it's \"$HOME\" {{ x }}", "no input", "second"]);
    let (_, lines) = shell(string("echo $DEBIAN_FRONTEND; umask; tr '\\0' '\\n' < /proc/$PPID/cmdline"), Common::default()).await;
    assert_eq!(lines[..2], ["noninteractive", "0022"]);
    assert!(!lines.iter().any(|line| line.contains("noninteractive export")), "{lines:?}");
    nothing_is_left();
}

#[tokio::test]
async fn a_failure_names_line_text_status_and_what_was_said() {
    let error = fails("echo begin\nfor i in $(seq 20); do echo noise $i >&2; done\nno-such-command --flag\necho never").await;
    assert_eq!(error.to_string(), "line 3 of the script failed with exit status 127 (command not found): no-such-command --flag");
    let detail = &error.details()[0];
    assert!(
        detail.lines().count() == 10 && detail.contains("no-such-command: command not found") && detail.contains("noise 20"),
        "{detail}"
    );
    assert!(!detail.contains("noise 11\n"));

    let error = fails("f() {\n  exit 3\n}\nprintf 'not ended'\nf").await;
    assert_eq!(error.to_string(), "line 2 of the script failed with exit status 3: exit 3");
    let error = fails("true\nls \\\n  /no/such").await;
    assert_eq!(error.to_string(), "line 2 of the script failed with exit status 2");
    assert_eq!(error.details()[0], "line 2:\nls \\\n  /no/such");
    let error = fails("true\necho $NOT_SET").await;
    assert_eq!(error.to_string(), "line 2 of the script failed with exit status 1: echo $NOT_SET");
    let error = fails("kill -KILL $$").await;
    assert_eq!(error.to_string(), "the script failed with exit status 137 (killed by SIGKILL)");
    nothing_is_left();
}

#[tokio::test]
async fn other_interpreters_and_no_strictness() {
    let loose = |script| table(&[("inline", string(script)), ("strict", Value::Boolean(false))]);
    shell(loose("false\necho $NOT_SET\ntrue"), Common::default()).await.0.unwrap();
    let error = shell(loose("true\nexit 9"), Common::default()).await.0.unwrap_err();
    assert_eq!(error.to_string(), "the script failed with exit status 9");
    let perl = table(&[
        ("inline", string("print \"$ARGV[0] $ENV{A}\\n\";")),
        ("interpreter", string("perl -w")),
        ("args", strings(&["two words"])),
    ]);
    let env = [("A".to_owned(), "b".to_owned())].into();
    let (result, lines) = shell(perl, Common { env, ..Common::default() }).await;
    result.unwrap();
    assert_eq!(lines, ["two words b"]);
    let (result, _) = shell(table(&[("inline", string("x")), ("interpreter", string("no-such-program"))]), Common::default()).await;
    assert!(result.unwrap_err().to_string().contains("127"));
}

#[tokio::test]
async fn a_script_runs_as_a_user() {
    let as_user = |user: &str| Common { user: Some(user.into()), env: [("A".to_owned(), "b c".to_owned())].into(), ..Common::default() };
    let script = "echo $(id -un) \"$A\" $PWD\ntrue\nfalse";
    let (result, lines) = shell(string(script), as_user("nobody")).await;
    assert_eq!(lines, ["nobody b c /"]);
    assert_eq!(result.unwrap_err().to_string(), "line 3 of the script failed with exit status 1: false");
    let error = shell(string("true"), as_user("no-such-user")).await.0.unwrap_err();
    assert!(error.next_move().unwrap().contains("no-such-user"), "{error:?}");
    nothing_is_left();
}

#[tokio::test]
async fn a_script_that_takes_too_long_is_killed_with_its_children() {
    let began = Instant::now();
    let common = Common { timeout: Some(Duration::from_secs(1)), ..Common::default() };
    let error = shell(string("echo here >&2\nsleep 9201 &\nsleep 9201"), common).await.0.unwrap_err();
    assert_eq!((error.kind(), error.step_name()), (Code::Timeout, Some("step")));
    assert_eq!(error.details(), ["here"]);
    assert!(began.elapsed() < Duration::from_secs(15));
    let alive = std::process::Command::new("pgrep").args(["-f", "^sleep 9201"]).output().unwrap();
    assert!(alive.stdout.is_empty());
    nothing_is_left();
}

#[tokio::test]
async fn files_and_trees_go_in_and_out() {
    let sshd = Sshd::start();
    let at = |name: &str| sshd.path().join(name);
    let text = |name: &str| string(at(name).to_str().unwrap());
    std::fs::create_dir_all(at("site/sub")).unwrap();
    std::fs::write(at("site/index.html"), "hello").unwrap();
    std::fs::write(at("site/sub/run"), "x").unwrap();
    std::fs::set_permissions(at("site/sub/run"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    std::fs::create_dir_all(at("www/there")).unwrap();

    let tree = table(&[("source", string("site/")), ("destination", text("www")), ("owner", string("nobody:daemon"))]);
    run_with(&sshd, &*read("file", tree, sshd.path()), Common::default()).await.0.unwrap();
    let meta = |name: &str| std::fs::metadata(at(name)).unwrap();
    assert_eq!(std::fs::read(at("www/index.html")).unwrap(), b"hello");
    assert_eq!(meta("www/sub/run").mode() & 0o7777, 0o4755);
    assert!(meta("www/index.html").uid() != 0 && meta("www/sub").uid() != 0);
    assert!(meta("www").uid() == 0 && meta("www/there").uid() == 0, "what was there keeps its owner");

    let one = table(&[("source", string("site/index.html")), ("destination", text("etc/new.html")), ("mode", string("0600"))]);
    run_with(&sshd, &*read("file", one, sshd.path()), Common::default()).await.0.unwrap();
    assert_eq!(meta("etc/new.html").mode() & 0o7777, 0o600);
    assert_eq!(meta("etc").mode() & 0o777, 0o755);

    let content = table(&[("content", string("it's\n")), ("destination", text("conf.d/a b")), ("owner", string("nobody"))]);
    run_with(&sshd, &*read("file", content, sshd.path()), Common::default()).await.0.unwrap();
    assert_eq!(std::fs::read(at("conf.d/a b")).unwrap(), b"it's\n");
    assert_eq!((meta("conf.d/a b").mode() & 0o777, meta("conf.d").mode() & 0o777), (0o644, 0o755));
    assert_eq!(std::fs::read_dir(at("conf.d")).unwrap().count(), 1);

    let down = table(&[("source", text("www")), ("destination", string("local")), ("direction", string("download"))]);
    run_with(&sshd, &*read("file", down, sshd.path()), Common::default()).await.0.unwrap();
    assert_eq!(std::fs::read(at("local/index.html")).unwrap(), b"hello");

    let missing = table(&[("source", string("/no/such")), ("destination", string("local")), ("direction", string("download"))]);
    let error = run_with(&sshd, &*read("file", missing, sshd.path()), Common::default()).await.0.unwrap_err();
    assert_eq!((error.kind(), error.step_name()), (Code::Step, Some("step")));
}

#[tokio::test]
async fn a_reboot_that_does_not_happen_is_an_error() {
    let sshd = Sshd::start();
    let step = read("reboot", table(&[("command", string("echo no >&2; exit 4"))]), sshd.path());
    let error = run_with(&sshd, &*step, Common::default()).await.0.unwrap_err();
    assert_eq!(error.kind(), Code::Step);
    assert!(error.to_string().contains("exit status 4") && error.details()[0].contains("no"), "{error:?}");
    let step = read("reboot", table(&[("command", string("true")), ("timeout", string("1s"))]), sshd.path());
    let error = run_with(&sshd, &*step, Common::default()).await.0.unwrap_err();
    assert_eq!(error.kind(), Code::Unreachable);
}

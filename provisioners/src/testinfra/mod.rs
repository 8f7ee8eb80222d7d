//! `testinfra`: files of pytest-testinfra, run by the pytest of this machine
//! over the guest's own pinned connection.

mod junit;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kiln_model::event::Stream;
use kiln_model::guest::SshAccess;
use kiln_model::key::KeyHasher;
use kiln_model::kind::Kind;
use kiln_model::provision::{Case, Outcome, Provisioner, Step};
use kiln_model::settings::{Node, Problems, Reader, Value, existing_path, wrong_type};
use kiln_model::tree::Tree;
use kiln_model::{Code, Error, Result, ResultExt as _};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::Command;

use crate::settings::finish;
use crate::shell::nonce;

/// What the guest is called in the configuration of ssh that pytest is given.
const HOST: &str = "kiln";
/// How long pytest may take unless the test says so: it runs here, and nobody
/// else would end it.
const LIMIT: Duration = Duration::from_secs(1800);
/// Lines that are shown when pytest itself fails.
const TAIL: usize = 20;

/// Reads `testinfra = "FILE"` or `[test.testinfra]`.
pub(crate) struct TestinfraKind;

/// Files for pytest.
pub(crate) struct Testinfra {
    /// As they are written, and where they are.
    paths: Vec<(String, PathBuf)>,
    python: String,
    args: Vec<String>,
    /// The template's folder: where pytest runs.
    folder: PathBuf,
}

impl Kind<dyn Provisioner> for TestinfraKind {
    fn name(&self) -> &'static str {
        "testinfra"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["paths", "python", "args"]
    }

    fn read(&self, settings: &Node, folder: &Path, problems: &mut Problems) -> Option<Box<dyn Provisioner>> {
        let before = problems.0.len();
        let mut test = Testinfra { paths: Vec::new(), python: "python3".into(), args: Vec::new(), folder: folder.to_owned() };
        let mut add = |text: &str, place, problems: &mut Problems| {
            if let Some(path) = existing_path(text, place, folder, problems) {
                test.paths.push((text.to_owned(), path));
            }
        };
        match &settings.value {
            Value::String(path) => add(path, settings.place, problems),
            Value::Table(_) => {
                let mut reader = Reader::new(settings, "[test.testinfra]", problems)?;
                let paths = match reader.entry("paths").map(|entry| &entry.node) {
                    Some(Node { value: Value::String(path), place }) => vec![(path.as_str(), *place)],
                    Some(_) => reader.strings("paths", problems).unwrap_or_default(),
                    None => Vec::new(),
                };
                if paths.is_empty() && problems.0.len() == before {
                    problems.add(reader.place(), "[test.testinfra] needs `paths`").help("write paths = [\"test_web.py\"]");
                }
                for (path, place) in paths {
                    add(path, place, problems);
                }
                if let Some(python) = reader.string("python", problems) {
                    test.python = python.to_owned();
                }
                test.args = reader.strings("args", problems).unwrap_or_default().into_iter().map(|(arg, _)| arg.to_owned()).collect();
                finish(reader, settings, self.keys(), problems);
            }
            _ => wrong_type(settings, "testinfra", "a path, or a table with `paths`", problems)?,
        }
        if test.python.trim().is_empty() {
            problems.add(settings.place, "`python` is empty").help("name an interpreter, such as \"python3\" or \".venv/bin/python\"");
        }
        (problems.0.len() == before).then(|| Box::new(test) as _)
    }
}

/// The configuration of ssh with which the guest is `kiln`: its key is pinned,
/// and nothing of the user's own is read.
fn ssh_config(access: &SshAccess) -> String {
    let quoted = |path: &Path| format!("\"{}\"", path.display());
    format!(
        "Host {HOST}\n  HostName {}\n  Port {}\n  User {}\n  IdentityFile {}\n  IdentitiesOnly yes\n  UserKnownHostsFile {}\n  \
         GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n  BatchMode yes\n  LogLevel ERROR\n  ControlMaster auto\n  \
         ControlPath {}\n  ControlPersist 30\n",
        access.host,
        access.port,
        access.user,
        quoted(&access.key_file),
        quoted(&access.known_hosts),
        control_path(),
    )
}

/// One connection for all that pytest asks: each new one costs an emulated
/// guest a second. A socket's path is short, so it is not in the work folder.
fn control_path() -> String {
    let folder = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|folder| folder.is_dir());
    let folder = folder.unwrap_or_else(|| PathBuf::from("/tmp"));
    folder.join(format!("kiln-{}-%C", nonce())).display().to_string()
}

impl Testinfra {
    /// The interpreter: one that is written as a path is relative to the
    /// template, as every path in it.
    fn python(&self) -> PathBuf {
        if self.python.contains('/') { self.folder.join(&self.python) } else { PathBuf::from(&self.python) }
    }

    fn arguments(&self, step: &Step<'_>, access: &SshAccess, config: &Path, report: &Path) -> Vec<String> {
        let mut arguments: Vec<String> =
            ["-m", "pytest", "-p", "no:cacheprovider", "-o", "junit_family=xunit2", "-o", "junit_logging=no"].map(Into::into).into();
        arguments.push(format!("--hosts=ssh://{HOST}"));
        arguments.push(format!("--ssh-config={}", config.display()));
        arguments.push(format!("--junitxml={}", report.display()));
        match &step.common.user {
            Some(user) => arguments.extend(["--sudo".to_owned(), format!("--sudo-user={user}")]),
            None if access.user != "root" => arguments.push("--sudo".to_owned()),
            None => {}
        }
        arguments.extend(self.args.iter().cloned());
        arguments.extend(self.paths.iter().map(|(_, path)| path.display().to_string()));
        arguments
    }

    /// Runs pytest; gives its exit status and the last lines that it printed.
    async fn pytest(&self, step: &Step<'_>, arguments: &[String]) -> Result<(Option<i32>, String)> {
        let python = self.python();
        let mut command = Command::new(&python);
        command
            .args(arguments)
            .current_dir(&self.folder)
            .envs(step.common.env.iter())
            // What is written beside the tests would be an input of the next.
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PYTHONUNBUFFERED", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| cannot_run(&python, error))?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let limit = step.common.timeout.unwrap_or(LIMIT);
        let work = async { tokio::join!(follow(out, Stream::Stdout, step), follow(err, Stream::Stderr, step), child.wait()) };
        let (mut tail, more, status) = tokio::time::timeout(limit, work).await.map_err(|_| {
            Error::new(Code::Timeout, format!("pytest took over {limit:?} and was ended")).next("raise the test's `timeout`")
        })?;
        tail.extend(more);
        let status = status.trying(|| format!("wait for {}", python.display()))?;
        Ok((status.code(), tail.join("\n")))
    }

    async fn cases(&self, step: &Step<'_>) -> Result<Vec<Case>> {
        let access = step.guest.ssh_access();
        let access = access.ok_or_else(|| {
            Error::new(Code::Unreachable, "this guest cannot be reached by SSH, and testinfra knows no other way").step(&step.common.name)
        })?;
        let nonce = nonce();
        let (config, report) = (step.work.join(format!("ssh-{nonce}")), step.work.join(format!("junit-{nonce}.xml")));
        write_private(&config, &ssh_config(&access))?;
        let began = Instant::now();
        let (status, tail) = self.pytest(step, &self.arguments(step, &access, &config, &report)).await?;
        // The configuration names what is gone soon; the report was read.
        let text = std::fs::read_to_string(&report).unwrap_or_default();
        for path in [&config, &report] {
            drop(std::fs::remove_file(path));
        }
        let cases = junit::cases(&text).unwrap_or_default();
        let failed = cases.iter().any(|case| case.outcome.failed());
        if !cases.is_empty() && (status == Some(0) || failed) {
            return Ok(cases);
        }
        let why = match status {
            Some(5) | Some(0) => "pytest found no tests in these files".to_owned(),
            Some(status) => format!("pytest ended with exit status {status}\n{tail}"),
            None => format!("pytest was killed\n{tail}"),
        };
        let own = Case { name: step.common.name.clone(), seconds: began.elapsed().as_secs_f64(), outcome: Outcome::Failed(why) };
        Ok(cases.into_iter().chain([own]).collect())
    }
}

fn cannot_run(python: &Path, error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        return Error::new(Code::Missing, format!("there is no {} on this machine", python.display()))
            .next("install python3 and python3-venv, or name an interpreter: python = \".venv/bin/python\"");
    }
    Error::new(Code::Failed, format!("cannot run {}", python.display())).because(error)
}

/// Passes lines on as they come; gives the last ones.
async fn follow(from: Option<impl AsyncRead + Unpin>, stream: Stream, step: &Step<'_>) -> Vec<String> {
    let mut tail: Vec<String> = Vec::new();
    let Some(from) = from else { return tail };
    let mut lines = BufReader::new(from).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        step.reports.output(&step.common.name, stream, &line);
        if tail.len() == TAIL {
            tail.remove(0);
        }
        tail.push(line);
    }
    tail
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).trying(|| format!("write {}", path.display()))
}

#[async_trait]
impl Provisioner for Testinfra {
    fn kind(&self) -> &'static str {
        "testinfra"
    }

    fn key(&self, hasher: &mut KeyHasher) -> Result<()> {
        // Which interpreter it is, is a matter of this machine.
        for (number, arg) in self.args.iter().enumerate() {
            hasher.field(&format!("argument {}", number + 1), arg);
        }
        let mut files: BTreeMap<&str, &Path> = BTreeMap::new();
        for (name, path) in &self.paths {
            files.insert(name, path);
        }
        for (name, path) in files {
            hasher.hidden("input", name);
            Tree::walk(path)?.key(hasher)?;
        }
        Ok(())
    }

    async fn ready(&self) -> Result<()> {
        let python = self.python();
        let mut command = Command::new(&python);
        command.args(["-c", "import pytest, testinfra"]).current_dir(&self.folder).stdin(Stdio::null());
        let output = command.output().await.map_err(|error| cannot_run(&python, error))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let what = ["pytest", "testinfra"].into_iter().find(|module| said.contains(&format!("No module named '{module}'")));
        let what = what.unwrap_or("pytest-testinfra");
        Err(Error::new(Code::Missing, format!("the test needs {what}, which {} does not have", python.display())).detail(said.trim()).next(
            format!("{} -m pip install pytest-testinfra; or name another interpreter: python = \".venv/bin/python\"", python.display()),
        ))
    }

    async fn run(&self, step: &Step<'_>) -> Result<()> {
        let cases = self.cases(step).await?;
        match cases.iter().find_map(|case| if let Outcome::Failed(why) = &case.outcome { Some((&case.name, why)) } else { None }) {
            Some((name, why)) => Err(Error::new(Code::Step, format!("{name} failed")).detail(why).step(&step.common.name)),
            None => Ok(()),
        }
    }

    async fn test(&self, step: &Step<'_>) -> Result<Vec<Case>> {
        match self.cases(step).await {
            Err(error) if error.kind() == Code::Timeout => {
                let seconds = step.common.timeout.unwrap_or(LIMIT).as_secs_f64();
                Ok(vec![Case { name: step.common.name.clone(), seconds, outcome: Outcome::Failed(error.chain()) }])
            }
            done => done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kiln_model::event::Reports;
    use kiln_model::guest::{self, Exit, Guest, OnLine};
    use kiln_model::provision::Common;

    use super::*;
    use crate::settings::tests::{key, node, read_test, string, table, text, wrong_test};

    /// A guest that is only an address.
    struct Far(PathBuf);

    #[async_trait]
    impl Guest for Far {
        async fn execute(&self, _: &guest::Command, _: OnLine<'_>) -> Result<Exit> {
            Ok(Exit::Status(0))
        }
        async fn upload(&self, _: &Tree, _: &str) -> Result<()> {
            Ok(())
        }
        async fn download(&self, _: &str, _: &Path) -> Result<()> {
            Ok(())
        }
        async fn wait_for_new_boot(&self, _: &str, _: Duration) -> Result<()> {
            Ok(())
        }
        fn ssh_access(&self) -> Option<SshAccess> {
            let (key_file, known_hosts) = (self.0.join("key"), self.0.join("known hosts"));
            Some(SshAccess { host: "127.0.0.1".into(), port: 2222, user: "kiln".into(), key_file, known_hosts })
        }
    }

    #[test]
    fn settings() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("test_a.py"), "a").unwrap();
        let here = folder.path();
        read_test("testinfra", &text("test_a.py"), here);
        read_test("testinfra", &table(&[("paths", string("test_a.py")), ("python", string(".venv/bin/python"))]), here);
        for (settings, said) in [
            (text("test_b.py"), "cannot read `test_b.py`"),
            (node(Value::Integer(1)), "`testinfra` must be a path, or a table with `paths`"),
            (table(&[]), "[test.testinfra] needs `paths`"),
            (table(&[("paths", string("test_a.py")), ("python", string(" "))]), "`python` is empty"),
            (table(&[("path", string("test_a.py"))]), "did you mean `paths`?"),
        ] {
            let found = wrong_test("testinfra", &settings, here).join("\n");
            assert!(found.contains(said), "{said}: {found}");
        }
    }

    #[test]
    fn the_bytes_of_the_tests_are_in_the_key_and_the_interpreter_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test_a.py");
        std::fs::write(&path, "a").unwrap();
        let of = |more: &[(&str, Value)]| {
            let entries: Vec<(&str, Value)> = [("paths", string("test_a.py"))].into_iter().chain(more.iter().cloned()).collect();
            key(&*read_test("testinfra", &table(&entries), folder.path()))
        };
        let first = of(&[]);
        assert_eq!(of(&[("python", string("python3.12"))]), first);
        assert_ne!(of(&[("args", Value::Array(vec![text("-k"), text("web")]))]), first);
        std::fs::write(&path, "b").unwrap();
        assert_ne!(of(&[]), first);
    }

    fn executable(path: &Path, script: &str) {
        std::fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }

    /// Runs a stand-in for python that is given what pytest would be.
    async fn with(script: &str, user: Option<&str>) -> (Result<Vec<Case>>, String) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("test_a.py"), "").unwrap();
        let python = folder.path().join("python");
        executable(
            &python,
            &format!(
                "echo \"$@\" > args\nfor a; do case $a in --junitxml=*) x=${{a#*=}};; --ssh-config=*) cp ${{a#*=}} conf;; esac; done\n{script}"
            ),
        );
        let settings = table(&[("paths", string("test_a.py")), ("python", string("./python"))]);
        let test = read_test("testinfra", &settings, folder.path());
        let common = Common { name: "web".into(), user: user.map(Into::into), timeout: Some(Duration::from_secs(20)), ..Common::default() };
        let (secrets, reports) = (BTreeMap::new(), Reports::silent());
        let guest = Arc::new(Far(folder.path().to_owned()));
        let step = Step { guest, common: &common, reports: &reports, secrets: &secrets, work: folder.path() };
        let done = test.test(&step).await;
        let seen = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap_or_default();
        let left = std::fs::read_dir(folder.path()).unwrap().filter(|entry| {
            let name = entry.as_ref().unwrap().file_name().into_string().unwrap();
            name.starts_with("ssh-") || name.starts_with("junit-")
        });
        assert_eq!(left.count(), 0, "nothing is left in the work folder");
        (done, seen("args") + &seen("conf"))
    }

    #[tokio::test]
    async fn pytest_is_given_the_pinned_connection_and_its_report_is_read() {
        let report = "echo '<testsuites><testsuite><testcase classname=\"test_a\" name=\"test_x[ssh://kiln]\" time=\"0.5\"/></testsuite></testsuites>' > \"$x\"";
        let (done, seen) = with(report, None).await;
        assert_eq!(done.unwrap(), [Case { name: "test_a: test_x".into(), seconds: 0.5, outcome: Outcome::Passed }]);
        for wanted in ["--hosts=ssh://kiln", "--sudo", "Port 2222", "StrictHostKeyChecking yes", "known hosts\"", "IdentitiesOnly yes"] {
            assert!(seen.contains(wanted), "{wanted}: {seen}");
        }
        assert!(with(report, Some("deploy")).await.1.contains("--sudo --sudo-user=deploy"));
    }

    #[tokio::test]
    async fn what_is_missing_and_what_is_wrong_is_told() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("test_a.py"), "").unwrap();
        let settings = table(&[("paths", string("test_a.py")), ("python", string("./python"))]);
        let test = read_test("testinfra", &settings, folder.path());
        let error = test.ready().await.unwrap_err();
        assert_eq!(error.kind(), Code::Missing);
        assert!(error.to_string().starts_with("there is no ") && error.next_move().unwrap().contains("python3-venv"), "{error:?}");
        for (module, said) in [("'pytest'", "needs pytest,"), ("'testinfra'", "needs testinfra,"), ("'x'", "needs pytest-testinfra,")] {
            executable(&folder.path().join("python"), &format!("echo \"ModuleNotFoundError: No module named {module}\" >&2; exit 1"));
            let error = test.ready().await.unwrap_err();
            assert_eq!(error.kind(), Code::Missing);
            assert!(error.to_string().contains(said), "{error:?}");
            assert!(error.next_move().unwrap().contains("-m pip install pytest-testinfra"), "{error:?}");
        }
        executable(&folder.path().join("python"), "exit 0");
        test.ready().await.unwrap();
        for (script, said) in [
            ("exit 5", "no tests"),
            ("echo boom >&2; exit 3", "exit status 3\nboom"),
            ("echo '<testsuites/>' > \"$x\"", "no tests"),
            ("echo '<testsuites><testcase' > \"$x\"; exit 1", "exit status 1"),
            ("kill -9 $$", "was killed"),
        ] {
            let cases = with(script, None).await.0.unwrap();
            assert!(matches!(&cases[..], [Case { outcome: Outcome::Failed(why), .. }] if why.contains(said)), "{said}: {cases:?}");
        }
    }
}

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln_model::guest::{Command, Exit, Guest, OnLine, SshAccess};
use kiln_model::provision::Common;
use kiln_model::settings::Value;
use kiln_model::tree::Tree;

use super::*;
use crate::settings::tests::{key, node, read_test, string, table, text, wrong_test};

/// This machine as a guest: the probes run in a real shell.
struct Here;

#[async_trait]
impl Guest for Here {
    async fn execute(&self, command: &Command, on_line: OnLine<'_>) -> Result<Exit> {
        // `shell` puts its script below /run, where a test may not.
        let folder = tempfile::tempdir().unwrap();
        let line = command.line.replace("/run/kiln", folder.path().to_str().unwrap());
        let input = folder.path().join("in");
        std::fs::write(&input, &command.stdin).unwrap();
        let stdin = std::fs::File::open(input).unwrap();
        let output = std::process::Command::new("sh").arg("-c").arg(line).stdin(stdin).output().unwrap();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            on_line(kiln_model::event::Stream::Stdout, line);
        }
        for line in String::from_utf8_lossy(&output.stderr).lines() {
            on_line(kiln_model::event::Stream::Stderr, line);
        }
        Ok(Exit::Status(u32::try_from(output.status.code().unwrap_or(255)).unwrap()))
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
        None
    }
}

fn list(items: &[&str]) -> Value {
    Value::Array(items.iter().map(|item| text(item)).collect())
}

fn of(entries: &[(&str, Value)]) -> Value {
    table(entries).value
}

async fn found(settings: &Node) -> BTreeMap<String, Outcome> {
    let test = read_test("assert", settings, Path::new("."));
    let common = Common { name: "it".into(), ..Common::default() };
    let (secrets, reports) = (BTreeMap::new(), Reports::silent());
    let step = Step { guest: Arc::new(Here), common: &common, reports: &reports, secrets: &secrets, work: Path::new(".") };
    test.test(&step).await.unwrap().into_iter().map(|case| (case.name, case.outcome)).collect()
}

fn wrong<'a>(found: &'a BTreeMap<String, Outcome>, name: &str) -> &'a str {
    match found.get(name) {
        Some(Outcome::Failed(why)) => why,
        other => panic!("{name}: {other:?} in {found:#?}"),
    }
}

#[track_caller]
fn right(found: &BTreeMap<String, Outcome>, name: &str) {
    assert_eq!(found.get(name), Some(&Outcome::Passed), "{name} in {found:#?}");
}

#[tokio::test]
async fn files_are_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("it's a file"), "first line\nsecond one\n").unwrap();
    std::fs::set_permissions(path("it's a file"), std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("it's a file", path("link")).unwrap();
    let digest = kiln_model::Digest::of("first line\nsecond one\n").hex();
    let good = of(&[
        ("kind", string("file")),
        ("mode", string("0640")),
        ("size", Value::Integer(22)),
        ("sha256", string(&digest)),
        ("contains", list(&["first", "line\nsecond"])),
    ]);
    let link = of(&[("kind", string("link")), ("links_to", string("it's a file")), ("mode", string("640"))]);
    let bad = of(&[("mode", string("0644")), ("contains", string("third")), ("kind", string("directory")), ("links_to", string("x"))]);
    let (file, absent) = (path("it's a file"), path("absent"));
    let gone = of(&[("exists", Value::Boolean(false))]);
    let files = of(&[(&file, good), (&path("link"), link), (&absent, gone.clone()), (&path("nothing"), of(&[]))]);
    let all = found(&table(&[("file", files)])).await;
    for what in ["exists", "kind", "mode", "size", "sha256", "contains `first`", "contains `line\\nsecond`"] {
        right(&all, &format!("file {file} {what}"));
    }
    for what in ["kind", "links_to", "mode"] {
        right(&all, &format!("file {} {what}", path("link")));
    }
    right(&all, &format!("file {absent} exists"));
    assert_eq!(wrong(&all, &format!("file {} exists", path("nothing"))), "expected there, found not there");

    let all = found(&table(&[("file", of(&[(&file, bad), (folder.path().to_str().unwrap(), gone)]))])).await;
    assert_eq!(wrong(&all, &format!("file {file} mode")), "expected 0644, found 0640");
    assert_eq!(wrong(&all, &format!("file {file} kind")), "expected directory, found file");
    assert_eq!(wrong(&all, &format!("file {file} links_to")), "expected x, found no link");
    assert!(wrong(&all, &format!("file {file} contains `third`")).ends_with("found `first line\\nsecond one`"));
    assert_eq!(wrong(&all, &format!("file {} exists", folder.path().display())), "expected not there, found there");
}

#[tokio::test]
async fn commands_users_groups_and_packages() {
    let commands = of(&[
        ("echo out; echo err >&2; exit 3", of(&[("exit", Value::Integer(3)), ("stdout", string("out")), ("stderr", list(&["err"]))])),
        ("echo 'it is' \"$HOME\"", of(&[("stdout", list(&["it is", "not this"]))])),
        ("sleep 20", of(&[("timeout", string("1s"))])),
        ("no-such-program-at-all", of(&[])),
    ]);
    let users = of(&[
        (
            "root",
            of(&[("uid", Value::Integer(0)), ("home", string("/root")), ("group", string("root")), ("groups", list(&["root", "sheep"]))]),
        ),
        ("nobody-here", of(&[("exists", Value::Boolean(false))])),
        ("nor-there", of(&[("uid", Value::Integer(7))])),
    ]);
    let groups = of(&[("root", of(&[("gid", Value::Integer(0))])), ("no-such-group", of(&[]))]);
    let packages = of(&[("bash", of(&[("version", string("99"))])), ("no-such-package", of(&[("installed", Value::Boolean(false))]))]);
    let all = found(&table(&[("command", commands), ("user", users), ("group", groups), ("package", packages)])).await;
    let first = "command echo out; echo err >&2; exit 3";
    for what in ["exit", "stdout `out`", "stderr `err`"] {
        right(&all, &format!("{first} {what}"));
    }
    right(&all, "command echo 'it is' \"$HOME\" stdout `it is`");
    assert!(wrong(&all, "command echo 'it is' \"$HOME\" stdout `not this`").starts_with("expected `not this` in it, found `it is "));
    assert_eq!(wrong(&all, "command sleep 20 exit"), "expected 0, found 124 (took over 1 s)");
    assert!(wrong(&all, "command no-such-program-at-all exit").starts_with("expected 0, found 127 (no such command): `"));
    for good in
        ["user root uid", "user root home", "user root group", "user root in group root", "user nobody-here exists", "group root gid"]
    {
        right(&all, good);
    }
    assert!(wrong(&all, "user root in group sheep").starts_with("expected sheep, found "));
    assert_eq!(wrong(&all, "user nor-there uid"), "expected 7, found no such user");
    assert_eq!(wrong(&all, "group no-such-group exists"), "expected there, found not there");
    right(&all, "package bash installed");
    assert!(wrong(&all, "package bash version").starts_with("expected 99, found "));
    right(&all, "package no-such-package not installed");
}

/// Answers every request with this.
fn server(answer: &'static str) -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    port
}

#[tokio::test]
async fn ports_and_answers() {
    let port = server("HTTP/1.1 302 Found\r\nLocation: /x\r\nServer: nginx/1.22\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n");
    // Nobody is there once it is dropped.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (open, shut) = (format!("tcp:{port}"), format!("{closed}"));
    let ports = of(&[
        (&open, of(&[("address", string("127.0.0.1"))])),
        (&shut, of(&[("listening", Value::Boolean(false))])),
        (&format!("udp:{port}"), of(&[])),
    ]);
    let url = format!("http://127.0.0.1:{port}/");
    let dead = format!("http://127.0.0.1:{closed}/");
    let headers = of(&[("server", string("nginx")), ("x-none", string("a"))]);
    let https = of(&[
        (&url, of(&[("status", Value::Integer(302)), ("body", list(&["hello", "bye"])), ("headers", headers)])),
        (&dead, of(&[("body", string("hello"))])),
    ]);
    let all = found(&table(&[("port", ports), ("http", https)])).await;
    right(&all, &format!("port {open} listening"));
    right(&all, &format!("port {open} address"));
    right(&all, &format!("port {shut} not listening"));
    assert!(wrong(&all, &format!("port udp:{port} listening")).starts_with("expected a listener, found none"));
    for what in ["status", "body `hello`", "header server"] {
        right(&all, &format!("http {url} {what}"));
    }
    assert_eq!(wrong(&all, &format!("http {url} body `bye`")), "expected `bye` in it, found `hello`");
    assert_eq!(wrong(&all, &format!("http {url} header x-none")), "expected `a` in it, found no such header");
    assert!(wrong(&all, &format!("http {dead} status")).starts_with("expected 200, found no answer ("));
    assert_eq!(wrong(&all, &format!("http {dead} body `hello`")), "there was no answer");
}

#[tokio::test]
async fn python_asks_where_there_is_no_curl() {
    let port =
        server("HTTP/1.1 404 No\r\nServer: SimpleHTTP/0.6 Python/3.11.2\r\nX-A: b\r\nContent-Length: 4\r\nConnection: close\r\n\r\ngone");
    // A shell that does not find curl, as in an image without it.
    struct NoCurl;
    #[async_trait]
    impl Guest for NoCurl {
        async fn execute(&self, command: &Command, on_line: OnLine<'_>) -> Result<Exit> {
            let stdin = String::from_utf8(command.stdin.clone()).unwrap().replace("have curl;", "have curl-not-here;");
            let line = command.line.replace(&format!("head -c {}", command.stdin.len()), &format!("head -c {}", stdin.len()));
            Here.execute(&Command { line, stdin: stdin.into_bytes(), ..command.clone() }, on_line).await
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
            None
        }
    }
    let url = format!("http://127.0.0.1:{port}");
    let headers = of(&[("x-a", string("b"))]);
    let settings =
        table(&[("http", of(&[(&url, of(&[("status", Value::Integer(404)), ("body", string("gone")), ("headers", headers)]))]))]);
    let test = read_test("assert", &settings, Path::new("."));
    let common = Common { name: "it".into(), ..Common::default() };
    let (secrets, reports) = (BTreeMap::new(), Reports::silent());
    let step = Step { guest: Arc::new(NoCurl), common: &common, reports: &reports, secrets: &secrets, work: Path::new(".") };
    let cases = test.test(&step).await.unwrap();
    assert_eq!(cases.len(), 3);
    assert!(cases.iter().all(|case| case.outcome == Outcome::Passed), "{cases:#?}");
}

#[tokio::test]
async fn what_takes_time_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("late");
    let late = path.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1500));
        std::fs::write(late, "x").unwrap();
    });
    let name = path.to_str().unwrap();
    let settings = table(&[("within", string("30s")), ("file", of(&[(name, of(&[]))]))]);
    right(&found(&settings).await, &format!("file {name} exists"));
}

#[test]
fn units_are_read_in_systemds_words() {
    let item = |running, enabled| Item { name: "nginx".into(), what: expect::What::Service { running, enabled } };
    let facts = |lines: &[&str]| {
        let mut facts = Facts::new("n");
        lines.iter().for_each(|line| facts.take(&format!("probe-n 0 service {line}")));
        facts
    };
    let said = |item: &Item, facts: &Facts| -> Vec<String> {
        let cases = item.compare(0, facts).into_iter();
        cases.map(|(name, outcome)| if let Outcome::Failed(why) = outcome { format!("{name}: {why}") } else { name }).collect()
    };
    let (both, neither) = (item(Some(true), Some(true)), item(Some(false), Some(false)));
    let up = facts(&["LoadState=loaded", "ActiveState=active", "SubState=running", "UnitFileState=enabled"]);
    assert_eq!(said(&both, &up), ["service nginx running", "service nginx enabled"]);
    assert_eq!(
        said(&neither, &up),
        [
            "service nginx not running: expected not running, found active (running)",
            "service nginx not enabled: expected not enabled, found enabled"
        ]
    );
    let failed = facts(&["LoadState=loaded", "ActiveState=failed", "SubState=failed", "UnitFileState=masked"]);
    assert_eq!(said(&both, &failed)[0], "service nginx running: expected running, found failed (failed)");
    assert_eq!(said(&both, &failed)[1], "service nginx enabled: expected enabled, found masked");
    let none = facts(&["LoadState=not-found", "ActiveState=inactive", "SubState=dead", "UnitFileState="]);
    assert_eq!(said(&both, &none)[0], "service nginx running: expected running, found no such unit");
    assert_eq!(said(&neither, &none), ["service nginx not running", "service nginx not enabled"]);
    assert!(said(&neither, &facts(&[]))[0].ends_with("found no systemd in the guest"), "what cannot be told is not taken for granted");
}

#[test]
fn mistakes_in_settings() {
    let said = |settings: &Node| wrong_test("assert", settings, Path::new(".")).join("\n");
    let one = |kind: &str, name: &str, entries: &[(&str, Value)]| said(&table(&[(kind, of(&[(name, of(entries))]))]));
    let yes = || Value::Boolean(true);
    let no = || Value::Boolean(false);
    assert!(said(&table(&[])).contains("nothing is asserted"));
    assert!(said(&node(Value::Integer(1))).contains("[test.assert] must be a table"));
    assert!(said(&table(&[("prot", of(&[]))])).contains("did you mean `port`?"));
    assert!(said(&table(&[("port", string("80"))])).contains("`port` must be a table of names"));
    assert!(said(&table(&[("timeout", string("5s")), ("user", of(&[("a", of(&[]))]))])).contains("move `timeout` above"));
    for (kind, name, entries, wanted) in [
        ("port", "http", vec![("listening", yes())], "`http` is no port"),
        ("port", "tcp:0", vec![], "`tcp:0` is no port"),
        ("port", "sctp:80", vec![], "`sctp:80` is no port"),
        ("port", "tcp:80", vec![("address", string("localhost"))], "no IP address"),
        ("port", "tcp:80", vec![("address", string("::")), ("listening", no())], "where nobody listens"),
        ("port", "tcp:80", vec![("listning", yes())], "did you mean `listening`?"),
        ("service", "nginx", vec![], "nothing is asserted of service nginx"),
        ("service", "nginx", vec![("running", string("yes"))], "`running` must be a boolean"),
        ("package", "x", vec![("installed", no()), ("version", string("1"))], "has no version"),
        ("file", "etc/x", vec![], "no absolute path"),
        ("file", "/x", vec![("exists", no()), ("mode", string("0644"))], "what does not exist has no `mode`"),
        ("file", "/x", vec![("mode", string("0899"))], "no mode"),
        ("file", "/x", vec![("mode", Value::Integer(644))], "`mode` must be a string"),
        ("file", "/x", vec![("kind", string("folder"))], "there is no kind `folder`"),
        ("file", "/x", vec![("sha256", string("abc"))], "no SHA-256"),
        ("file", "/x", vec![("contains", Value::Integer(1))], "`contains` must be an array of strings"),
        ("user", "a b", vec![], "cannot be the name of a user"),
        ("group", "a:b", vec![], "cannot be the name of a group"),
        ("command", " ", vec![], "a command has a name"),
        ("command", "x", vec![("timeout", string("10ms"))], "a second at least"),
        ("http", "localhost", vec![], "`localhost` is no URL"),
        ("http", "http://x", vec![("headers", list(&[]))], "`headers` must be a table of strings"),
    ] {
        let found = one(kind, name, &entries);
        assert!(found.contains(wanted), "{kind} {name}: {wanted}: {found}");
    }
}

#[test]
fn keys_know_no_order() {
    let of_test = |entries: &[(&str, Value)]| key(&*read_test("assert", &table(entries), Path::new(".")));
    let (user, group) = (("user", of(&[("a", of(&[]))])), ("group", of(&[("b", of(&[]))])));
    let first = of_test(&[user.clone(), group.clone()]);
    assert_eq!(of_test(&[group.clone(), user.clone()]), first);
    assert_ne!(of_test(std::slice::from_ref(&user)), first);
    assert_ne!(of_test(&[user.clone(), ("group", of(&[("b", of(&[("gid", Value::Integer(1))]))]))]), first);
    assert_ne!(of_test(&[user, group, ("within", string("1s"))]), first);
}

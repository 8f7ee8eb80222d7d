//! Tests of finished images: what they find, what is done with an image that
//! fails, and that nothing is baked for a test.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::context::{Kiln, Ran, Template, tool, with_base};

/// A page at a port, a user, a file.
const IMAGE: &str = r#"
[[provision]]
name = "page"
shell = '''
mkdir -p /srv/page
echo '<h1>Hello</h1>' > /srv/page/index.html
chmod 640 /srv/page/index.html
ln -s index.html /srv/page/start.html
cat > /etc/systemd/system/page.service <<'UNIT'
[Service]
ExecStart=/usr/bin/python3 -m http.server 8080 --directory /srv/page
[Install]
WantedBy=multi-user.target
UNIT
systemctl enable --quiet page.service
useradd -m -s /bin/bash deploy
usermod -a -G adm deploy
'''
"#;

/// Each sort of assertion, as it is.
const RIGHT: &str = r#"
[[test]]
name = "right"
[test.assert]
within = "60s"
port."tcp:8080" = { listening = true, address = "0.0.0.0" }
port."tcp:8081" = { listening = false }
service.page = { running = true, enabled = true }
service.nginx = { running = false }
package.systemd = { installed = true }
package.nginx = { installed = false }
user.deploy = { home = "/home/deploy", shell = "/bin/bash", groups = ["adm"] }
group.adm = { gid = 4 }
file."/srv/page/index.html" = { mode = "0640", owner = "root", size = 15, contains = ["Hello"] }
file."/srv/page/start.html" = { kind = "link", links_to = "index.html" }
file."/srv/page/gone" = { exists = false }
command."echo out; exit 3" = { exit = 3, stdout = ["out"] }
http."http://localhost:8080/" = { status = 200, body = ["Hello"], headers = { server = "SimpleHTTP" } }
http."http://localhost:8080/gone" = { status = 404 }
"#;

/// Each sort of assertion, as it is not.
const WRONG: &str = r#"
[[test]]
name = "wrong"
[test.assert]
port."tcp:81" = {}
service.page = { running = false }
package.nginx = {}
user.deploy = { uid = 7 }
group.sheep = {}
file."/srv/page/index.html" = { mode = "0600", contains = ["Bye"] }
command."false" = {}
http."http://localhost:8080/" = { body = ["Bye"] }
"#;

const BOOTS: &str = r#"
[[test]]
name = "first boot"
shell = "cat /proc/sys/kernel/random/boot_id > /root/boot"
[[test]]
name = "second boot"
boot = "again"
shell = "if cmp /root/boot /proc/sys/kernel/random/boot_id; then exit 1; fi; systemctl is-active page"
"#;

/// python with pytest-testinfra, installed into the user's cache if it is not
/// there.
fn testinfra() -> PathBuf {
    let env = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = env("XDG_CACHE_HOME").or_else(|| env("HOME").map(|home| home.join(".cache"))).unwrap();
    let folder = cache.join("kiln-tests/testinfra-10.2.2");
    std::fs::create_dir_all(&folder).unwrap();
    let lock = std::fs::File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    let venv = folder.join("venv");
    if !folder.join("installed").exists() {
        tool("python3", &["-m", "venv", "--clear", venv.to_str().unwrap()]);
        let pip = venv.join("bin/pip");
        tool(pip.to_str().unwrap(), &["install", "--quiet", "--disable-pip-version-check", "pytest-testinfra==10.2.2"]);
        std::fs::write(folder.join("installed"), "").unwrap();
    }
    venv.join("bin/python")
}

fn named<'a>(events: &'a [Value], event: &str) -> Vec<&'a Value> {
    events.iter().filter(|value| value["event"] == event).collect()
}

/// The tests that ran, and those that had passed before.
fn tested(events: &[Value]) -> Vec<(String, bool)> {
    named(events, "tested").iter().map(|test| (test["name"].as_str().unwrap().to_owned(), test["cached"] == true)).collect()
}

fn failed_cases(test: &Value) -> Vec<String> {
    let cases = test["cases"].as_array().unwrap().iter().filter(|case| case["outcome"] == "failed");
    cases.map(|case| format!("{}: {}", case["name"].as_str().unwrap(), case["message"].as_str().unwrap())).collect()
}

fn edit(template: &Template, rest: &str) {
    let text = format!("[image]\nname = \"tried\"\nversion = \"1\"\n[base]\ndebian = \"bookworm\"\n{IMAGE}{rest}");
    std::fs::write(template.0.path().join("kiln.toml"), text).unwrap();
}

#[test]
fn an_image_that_fails_is_marked_and_mending_a_test_bakes_nothing() {
    let kiln = with_base();
    let template = Template::debian("tried", "");
    edit(&template, &format!("{RIGHT}{WRONG}{BOOTS}"));
    let report = template.0.path().join("junit.xml");
    let failed = kiln.run(&["bake", template.path(), "--json", "--junit", report.to_str().unwrap()]);
    failed.fails(3, &["tried:1 failed its test `wrong`", "kiln run tried@sha256:"]);
    let events = failed.events();
    assert_eq!(tested(&events), ["right", "wrong", "first boot", "second boot"].map(|name| (name.to_owned(), false)));
    let wrong = named(&events, "tested")[1];
    let cases = failed_cases(wrong);
    for expected in [
        "port tcp:81 listening: expected a listener, found none at this port; open are ",
        "service page not running: expected not running, found active (running)",
        "package nginx installed: expected installed, found not installed",
        "user deploy uid: expected 7, found 1",
        "group sheep exists: expected there, found not there",
        "file /srv/page/index.html mode: expected 0600, found 0640",
        "file /srv/page/index.html contains `Bye`: expected `Bye` in it, found `<h1>Hello</h1>`",
        "command false exit: expected 0, found 1",
        "http http://localhost:8080/ body `Bye`: expected `Bye` in it, found `<h1>Hello</h1>`",
    ] {
        assert!(cases.iter().any(|case| case.starts_with(expected)), "{expected}\n{cases:#?}");
    }
    assert_eq!(cases.len(), 9, "{cases:#?}");
    for (at, name) in [(0, "right"), (2, "first boot"), (3, "second boot")] {
        assert_eq!(failed_cases(named(&events, "tested")[at]), [""; 0], "{name}");
    }
    let xml = std::fs::read_to_string(&report).unwrap();
    assert!(
        xml.contains("failures=\"9\"") && xml.contains("classname=\"tried:1.second boot\" name=\"second boot after a reboot\""),
        "{xml}"
    );

    // The image is there by its digest, marked, and goes nowhere.
    let digest = named(&events, "failed")[0]["digest"].as_str().unwrap().to_owned();
    assert!(named(&events, "baked").is_empty());
    let reference = format!("tried@{digest}");
    let image = |digest: &str| {
        let all: Vec<Value> = serde_json::from_value(kiln.ok(&["images", "--json", "tried"]).json()).unwrap();
        all.into_iter().find(|image| image["digest"] == digest).unwrap()
    };
    assert_eq!(image(&digest)["tags"], serde_json::json!([]));
    assert!(image(&digest)["failed"].as_str().unwrap().contains("failed (wrong: port tcp:81 listening and 8 more)"));
    assert!(kiln.ok(&["images", "tried"]).stdout.contains("(failed)"));
    kiln.run(&["promote", &reference, "--to", "production"]).fails(4, &["tests: the tests of `tried` say failed", "is not promoted"]);
    let before = kiln.ok(&["inspect", "--json", &reference]).json();

    // A test is mended and one is added: nothing is baked, and no other runs.
    let python = testinfra();
    template
        .write("test_page.py", "def test_page(host):\n    assert host.service('page').is_running\n    assert host.user('deploy').exists\n");
    let mended = WRONG.split("[test.assert]").next().unwrap().to_owned() + "shell = \"curl --version || python3 --version\"\n";
    let infra = format!("[[test]]\nname = \"infra\"\ntestinfra = {{ paths = [\"test_page.py\"], python = \"{}\" }}\n", python.display());
    edit(&template, &format!("{RIGHT}{mended}{BOOTS}{infra}"));
    let plan = kiln.ok(&["plan", template.path()]).stdout;
    assert!(plan.contains("no step runs") && plan.contains(&digest), "{plan}");
    let baked = kiln.ok(&["bake", template.path(), "--json"]);
    let events = baked.events();
    let ran = [("right", true), ("first boot", true), ("second boot", true), ("wrong", false), ("infra", false)];
    assert_eq!(tested(&events), ran.map(|(name, cached)| (name.to_owned(), cached)));
    assert!(
        !events
            .iter()
            .any(|event| event["event"] == "begin" && event["phase"] != "boot" && event["phase"] != "test" && event["phase"] != "base")
    );
    let infra = named(&events, "tested").into_iter().find(|test| test["name"] == "infra").unwrap();
    assert_eq!(infra["cases"][0]["name"], "test_page: test_page", "{infra}");
    assert_eq!(named(&events, "baked")[0]["digest"], digest.as_str());
    assert!(image(&digest)["failed"].is_null());
    assert!(image(&digest)["tags"].as_array().unwrap().contains(&Value::from("tried:1")));

    // Nothing of the image has changed but what is attached to it.
    let after = kiln.ok(&["inspect", "--json", "tried:1"]).json();
    for same in ["digest", "disk_digest", "disks", "steps", "annotations"] {
        assert_eq!(before[same], after[same], "{same}");
    }
    let again = kiln.ok(&["test", template.path(), "--json"]).json();
    assert_eq!((&again["result"], &again["digest"], &again["attached"]), (&"PASSED".into(), &Value::from(digest.as_str()), &Value::Null));
    assert!(again["tests"].as_array().unwrap().iter().all(|test| test["cached"] == true), "{again}");
    kiln.ok(&["promote", "tried:1", "--to", "production", "--require-tests"]);
    assert!(kiln.leftovers().iter().all(|path| !path.to_string_lossy().contains("ssh-")));
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn user_data_gets_a_machine_of_its_own_and_an_image_is_tested_by_its_name() {
    let kiln = Kiln::shared();
    let head = "[image]\nname = \"greeted\"\nversion = \"1\"\n[base]\ndebian = \"bookworm\"\n";
    let template = Template::new(&format!("{head}[[provision]]\nshell = \"echo baked > /etc/greeting\"\n"));
    kiln.ok(&["bake", template.path()]);
    // Tests of another template: one suite passes, then fails.
    let user_data = "#cloud-config\nwrite_files:\n- path: /etc/greeting\n  content: deployed\n";
    let tests = |word: &str| {
        format!(
            "[image]\nname = \"smoke\"\nversion = \"1\"\n[base]\ndebian = \"bookworm\"\n\
             [[test]]\nname = \"plain\"\nshell = \"grep -qx baked /etc/greeting\"\n\
             [[test]]\nname = \"deployed\"\nuser_data = \"user-data\"\nassert.file.\"/etc/greeting\" = {{ contains = \"{word}\" }}\n"
        )
    };
    let smoke = Template::new(&tests("deployed"));
    smoke.write("user-data", user_data);
    let run = |again: &str| -> Ran {
        kiln.run(
            &["test", "greeted:1", "--template", smoke.path(), "--json", again]
                .into_iter()
                .filter(|word| !word.is_empty())
                .collect::<Vec<_>>(),
        )
    };
    let first = run("");
    assert_eq!(first.status, 0, "{first}");
    assert_eq!(first.json()["suite"], "smoke");
    assert_eq!(run("").json()["tests"].as_array().unwrap().iter().filter(|test| test["cached"] == true).count(), 2);
    std::fs::write(smoke.0.path().join("kiln.toml"), tests("baked")).unwrap();
    let second = run("");
    assert_eq!(second.status, 3, "{second}");
    let cached: Vec<bool> = second.json()["tests"].as_array().unwrap().iter().map(|test| test["cached"] == true).collect();
    assert_eq!(cached, [true, false], "{second}");
    kiln.run(&["promote", "greeted:1", "--to", "production"]).fails(4, &["the tests of `smoke` say failed"]);
    kiln.run(&["test", "never-baked"]).fails(2, &["--template"]);
    let other = Template::debian("never-baked", "[[test]]\nshell = 'true'\n");
    kiln.run(&["test", other.path()]).fails(1, &["kiln bake"]);
    assert!(Command::new(testinfra()).args(["-c", "import testinfra"]).status().unwrap().success());
}

//! Salt on real guests. It takes minutes to come from PyPI into an emulated
//! guest, so the tests but one share a checkpoint of a machine that has it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::context::{Kiln, Ran, Template, contains, new_word, tool};

/// Where a step finds the certificates of this machine: its network may have
/// some of its own.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// A machine that has Salt and keeps it.
const KEPT: &str = r#"
[disk]
size = "4GiB"
[[provision]]
name = "certificates"
file = { source = "/etc/ssl/certs/ca-certificates.crt", destination = "/var/tmp/ca.crt" }
[[provision]]
name = "salt"
env = { PIP_CERT = "/var/tmp/ca.crt" }
[provision.salt]
bootstrap = true
keep = true
states = "first"
apply = ["nothing"]
"#;

fn kept(name: &str, rest: &str) -> Template {
    let template = Template::debian(name, &format!("{KEPT}{rest}"));
    template.write("first/nothing.sls", "nothing:\n  test.nop: []\n");
    template
}

/// Whether each step of the image was cached, by its name.
fn cached(ran: &Ran) -> Vec<(String, bool)> {
    let baked = ran.events().into_iter().find(|event| event["event"] == "baked").unwrap();
    let steps = baked["steps"].as_array().unwrap();
    steps.iter().map(|step| (step["name"].as_str().unwrap().to_owned(), step["cached"] == Value::Bool(true))).collect()
}

fn bake(kiln: &Kiln, template: &Template, more: &[&str]) -> Ran {
    let arguments = [&["bake", template.path(), "--json"], more].concat();
    Ran::of(kiln.command(&arguments).env("TOKEN_OF_TEST", TOKEN).output().unwrap(), &arguments)
}

const TOKEN: &str = "t0ken-of-salt-5d2e81";

#[test]
#[ignore = "takes minutes: ci/prove"]
fn the_template_bakes_in_one_run_and_leaves_no_salt() {
    let kiln = Kiln::shared();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/templates/debian-salt");
    let text = std::fs::read_to_string(format!("{folder}/kiln.toml")).unwrap();
    // The template as it is, with the certificates of this machine.
    let step = "[[provision]]\nname = \"web\"\n";
    assert!(text.contains(step));
    let certificates = format!("[[provision]]\nfile = {{ source = \"{CERTIFICATES}\", destination = \"/var/tmp/ca.crt\" }}\n");
    let text = text.replace(step, &format!("{certificates}{step}env = {{ PIP_CERT = \"/var/tmp/ca.crt\" }}\n"));
    let template = Template::new(&text);
    for part in ["states", "pillar"] {
        tool("cp", &["-r", &format!("{folder}/{part}"), template.path()]);
    }
    let ran = kiln.ok(&["bake", template.path(), "--no-cache"]);
    assert!(ran.stderr.contains("asking salt what a second run would change"), "{ran}");
    assert!(ran.stderr.contains("changed\tpkg.installed\tnginx\t"), "{ran}");
    let page = kiln.ok(&["run", "debian-salt", "--exec", "curl -fsS http://localhost && ls /opt"]).stdout;
    assert!(page.contains("Hello from a golden image, by Salt") && !page.contains("{{"), "{page}");
    assert!(!page.lines().any(|line| line == "salt"), "{page}");
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn only_what_changed_runs_again_and_no_secret_stays() {
    let kiln = Kiln::shared();
    let template = kept(
        "salt-again",
        r#"
[variables]
token = { env = "TOKEN_OF_TEST", sensitive = true }
[[provision]]
name = "watch"
checkpoint = false
shell = 'nohup sh -c "while :; do cat /proc/[0-9]*/cmdline; sleep 0.5; done" < /dev/null > /var/tmp/lines 2> /dev/null & echo $! > /var/tmp/pid'
[[provision]]
name = "web"
secrets = ["token"]
[provision.salt]
converge = "once"
states = "states"
pillar_secrets = { "web:token" = "token" }
pillar_data = { web = { word = "WORD" } }
grains = { role = "web" }
[[provision]]
name = "seen"
secrets = ["token"]
shell = '''
kill $(cat /var/tmp/pid)
grep -qaF salt-call /var/tmp/lines
if grep -qaF -f /run/kiln/secrets/token /var/tmp/lines; then echo "the secret was on a command line"; exit 1; fi
rm /var/tmp/lines /var/tmp/pid
test "$(cat /srv/token.sha256)" = "$(sha256sum < /run/kiln/secrets/token | cut -d ' ' -f 1)"
'''
[[test]]
name = "what stayed"
shell = '''
grep -x "the word is .*" /srv/page
test -z "$(ls -d /etc/salt /srv/salt /var/cache/salt /var/log/salt /var/run/salt 2> /dev/null || true)"
'''
"#,
    );
    let text = std::fs::read_to_string(template.0.path().join("kiln.toml")).unwrap();
    std::fs::write(template.0.path().join("kiln.toml"), text.replace("WORD", &new_word())).unwrap();
    template.write("states/top.sls", "base:\n  'role:web':\n    - match: grain\n    - site\n");
    let site = "token:\n  file.managed:\n    - name: /srv/token.sha256\n    - contents: {{ salt['hashutil.sha256_digest'](pillar['web']['token']) }}\n\
                said:\n  cmd.run:\n    - name: cat && touch /srv/said\n    - creates: /srv/said\n    - stdin: {{ pillar['web']['token'] }}\n\
                page:\n  file.managed:\n    - name: /srv/page\n    - contents: the word is {{ pillar['web']['word'] }}\n";
    template.write("states/site.sls", site);

    // What this machine's own list of processes shows, all the while.
    let over = Arc::new(AtomicBool::new(false));
    let watcher = std::thread::spawn({
        let over = over.clone();
        move || {
            let mut shown = false;
            while !over.load(Ordering::Relaxed) && !shown {
                for entry in std::fs::read_dir("/proc").unwrap().flatten() {
                    let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                    shown |= String::from_utf8_lossy(&line).contains(TOKEN);
                }
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            shown
        }
    });
    let ran = bake(&kiln, &template, &["--tag", "latest"]);
    over.store(true, Ordering::Relaxed);
    assert_eq!(ran.status, 0, "{ran}");
    assert!(!watcher.join().unwrap(), "the secret was on a command line");
    for text in [&ran.stdout, &ran.stderr] {
        assert!(!text.contains(TOKEN), "{ran}");
    }
    let raw = template.0.path().join("disk.raw");
    kiln.ok(&["export", "salt-again:latest", "-f", "raw", "-o", raw.to_str().unwrap()]);
    assert!(contains(&raw, "the word is"), "the search finds what is there");
    assert!(!contains(&raw, TOKEN), "the secret is in the image");
    std::fs::remove_file(raw).unwrap();
    for part in ["history", "ledger", "store/index.json"] {
        let at = kiln.home.join(part);
        let found = tool("sh", &["-c", &format!("! test -e {0} || grep -rlF {TOKEN} {0} || true", at.display())]);
        assert_eq!(found, "", "the secret is in {part}");
    }
    assert_eq!(in_small_files(&kiln.store(), TOKEN), Vec::<String>::new());

    let again = bake(&kiln, &template, &["--tag", "latest"]);
    assert_eq!(again.status, 0, "{again}");
    assert!(cached(&again).iter().all(|(_, cached)| *cached), "{again}");

    template.write("states/site.sls", site.replace("the word is", "the word is now"));
    let changed = bake(&kiln, &template, &["--tag", "latest"]);
    assert_eq!(changed.status, 0, "{changed}");
    let ran: Vec<_> = cached(&changed).into_iter().filter(|(_, cached)| !cached).map(|(name, _)| name).collect();
    assert!(!ran.contains(&"salt".to_owned()) && !ran.contains(&"certificates".to_owned()), "{ran:?}");
    assert!(ran.contains(&"web".to_owned()) && ran.contains(&"seen".to_owned()), "{ran:?}");
}

/// Manifests, configs, provenance: all blobs that are no disk.
fn in_small_files(folder: &Path, word: &str) -> Vec<String> {
    let find = format!("find {} -type f -size -1024k -exec grep -lF {word} {{}} + || true", folder.display());
    tool("sh", &["-c", &find]).lines().map(Into::into).collect()
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn what_fails_and_what_is_never_done_are_named() {
    let kiln = Kiln::shared();
    let step = |apply: &str| {
        format!("[[provision]]\nname = \"web\"\n[provision.salt]\nconverge = \"once\"\nstates = \"states\"\napply = [\"{apply}\"]\n")
    };
    let states = [
        ("never", "always:\n  cmd.run:\n    - name: date > /srv/date\nfine:\n  file.managed:\n    - name: /srv/fine\n    - contents: x\n"),
        (
            "broken",
            "broken thing:\n  cmd.run:\n    - name: echo so it is >&2; exit 3\nneeds it:\n  test.nop:\n    - require:\n      - cmd: broken thing\n",
        ),
        ("unreadable", "a:\n  file.managed: [\n"),
    ];
    let of = |apply: &str| {
        let template = kept(&format!("salt-{apply}"), &step(apply));
        for (name, text) in states {
            template.write(&format!("states/{name}.sls"), text);
        }
        let ran = bake(&kiln, &template, &[]);
        kiln.run(&["inspect", &format!("salt-{apply}")]).fails(1, &[]);
        ran
    };
    of("never").fails(1, &["one run of salt was not enough: a second one would change always (cmd.run)", "step: web"]);
    of("broken")
        .fails(1, &["salt: broken thing (cmd.run): Command \"echo so it is >&2; exit 3\" run, exit status 3: so it is", "step: web"]);
    of("unreadable").fails(1, &["salt: Rendering SLS 'base:unreadable' failed"]);
}

use std::path::Path;

use kiln_model::Key;
use kiln_model::event::Stream;
use kiln_model::provision::Provisioner;
use kiln_model::settings::{Node, Value};

use super::super::Tool as _;
use super::guest::Inside;
use super::{AnsibleKind, Play};
use crate::settings::tests::{node, parts, read, string, table, text, wrong};
use kiln_model::kind::Kind as _;

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn list(texts: &[&str]) -> Value {
    Value::Array(texts.iter().map(|one| text(one)).collect())
}

fn key(folder: &Path, entries: &[(&str, Value)]) -> Key {
    crate::settings::tests::key(&*read("ansible", &table(entries), folder))
}

fn site() -> (&'static str, Value) {
    ("playbook", string("play/site.yml"))
}

/// A folder with a playbook in one of its own, and much else.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("kiln.toml", ""),
        ("play/site.yml", "- hosts: all"),
        ("play/tasks/main.yml", "[]"),
        ("roles/web/tasks/main.yml", "[]"),
        ("galaxy/ansible_collections/a/b/MANIFEST.json", "{}"),
        ("vars/web.yml", "{}"),
    ] {
        write(folder.path(), name, text);
    }
    folder
}

#[test]
fn settings_and_their_problems() {
    let folder = folder();
    let here = folder.path();
    assert!(["bootstrap", "keep", "converge"].iter().all(|key| AnsibleKind.keys().contains(key)));
    let everything = [
        site(),
        ("roles", list(&["roles", "roles/web"])),
        ("collections", list(&["galaxy"])),
        ("host", string("web1")),
        ("groups", list(&["web"])),
        ("group_vars", string("vars")),
        ("extra_vars", table(&[("a", Value::Boolean(true)), ("b", list(&["c"]))]).value),
        ("secret_vars", table(&[("p", string("token"))]).value),
        ("vault_password", string("vault")),
        ("tags", list(&["x"])),
        ("skip_tags", list(&["y"])),
        ("verbose", Value::Integer(3)),
        ("from", string("guest")),
        ("bootstrap", Value::Boolean(true)),
        ("keep", Value::Boolean(true)),
        ("converge", string("once")),
    ];
    let step = read("ansible", &table(&everything), here);
    assert!(step.converges());
    assert_eq!(step.secrets(), ["token", "vault"]);
    let with = |name: &'static str, value: Value| table(&[site(), (name, value)]);
    let cases: &[(Node, &str)] = &[
        (table(&[]), "needs `playbook`"),
        (table(&[("playbook", string("no.yml"))]), "cannot read `no.yml`"),
        (table(&[("playbook", string("play"))]), "a playbook is a file"),
        (with("roles", list(&["kiln.toml"])), "`kiln.toml` is no folder"),
        (with("collections", list(&["roles"])), "ansible-galaxy collection install -p"),
        (with("groups", list(&["a,b"])), "`a,b` cannot be one of `groups`"),
        (with("host", string("localhost")), "cannot be the guest's name"),
        (with("extra_vars", string("a=b")), "`extra_vars` must be a table"),
        (with("verbose", Value::Integer(9)), "from 0 to 4"),
        (with("from", string("afar")), "\"here\" (this machine, over SSH) or \"guest\""),
        (with("converge", string("twice")), "write \"once\""),
        (with("keep", Value::Boolean(true)), "`bootstrap = true`"),
        (with("tag", string("x")), "did you mean `tags`?"),
        (with("user", string("x")), "move `user` above"),
        (node(Value::Integer(1)), "must be a table"),
    ];
    for (settings, expected) in cases {
        let found = wrong("ansible", settings, here);
        assert!(found.iter().any(|problem| problem.contains(expected)), "{expected}: {found:?}");
    }
}

#[test]
fn everything_that_ansible_sees_is_in_the_key_and_nothing_else() {
    let (folder, other) = (folder(), folder());
    let here = folder.path();
    let entries = [site(), ("roles", list(&["roles"])), ("group_vars", string("vars"))];
    let first = key(here, &entries);
    assert_eq!(first, key(other.path(), &entries), "where it is does not count");
    write(here, "elsewhere", "x");
    write(here, "play/.git/HEAD", "x");
    write(here, "play/library/__pycache__/x.pyc", "x");
    std::fs::remove_dir_all(here.join("play/library")).unwrap();
    assert_eq!(first, key(here, &entries));
    let loud = [&entries[..], &[("verbose", Value::Boolean(true))]].concat();
    assert_eq!(first, key(here, &loud));
    let mut keys = vec![first];
    for (file, text) in [("play/tasks/main.yml", "[x]"), ("play/new", ""), ("roles/web/tasks/main.yml", "[x]"), ("vars/web.yml", "{x: y}")]
    {
        write(here, file, text);
        keys.push(key(here, &entries));
    }
    for (name, value) in [
        ("from", string("guest")),
        ("converge", string("once")),
        ("bootstrap", Value::Boolean(true)),
        ("host", string("x")),
        ("groups", list(&["x"])),
        ("tags", list(&["x"])),
        ("skip_tags", list(&["x"])),
        ("extra_vars", table(&[("x", string("1"))]).value),
        ("extra_vars", table(&[("x", Value::Integer(1))]).value),
        ("secret_vars", table(&[("x", string("1"))]).value),
        ("secret_vars", table(&[("x", string("2"))]).value),
        ("vault_password", string("x")),
    ] {
        keys.push(key(here, &[&entries[..], &[(name, value)]].concat()));
    }
    let count = keys.len();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), count);
    let extra = |one, two| table(&[("m", table(&[(one, string("1")), (two, string("1"))]).value)]).value;
    assert_eq!(key(here, &[site(), ("extra_vars", extra("a", "b"))]), key(here, &[site(), ("extra_vars", extra("b", "a"))]));
}

#[test]
fn beside_the_template_only_what_ansible_looks_for_counts() {
    let folder = folder();
    let here = folder.path();
    write(here, "site.yml", "- hosts: all");
    let of = |playbook: &str| parts(&*read("ansible", &table(&[("playbook", string(playbook))]), here)).join(", ");
    let names = of("site.yml");
    assert!(names.contains("site.yml, ") && names.contains("roles/web/tasks/main.yml") && names.contains("vars/web.yml"), "{names}");
    assert!(!names.contains("kiln.toml") && !names.contains("galaxy") && !names.contains("play/"), "{names}");
    let names = of("play/site.yml");
    assert!(names.contains("play/site.yml") && names.contains("play/tasks/main.yml") && !names.contains("roles"), "{names}");
    // A template in a folder below.
    std::fs::create_dir(here.join("sub")).unwrap();
    let names = parts(&*read("ansible", &table(&[("playbook", string("../site.yml"))]), &here.join("sub"))).join(", ");
    assert!(names.contains("vars/web.yml") && !names.contains("galaxy"), "{names}");
}

#[test]
fn links_that_lead_out_of_what_is_digested_are_refused() {
    let folder = folder();
    let step = |folder: &Path| read("ansible", &table(&[site()]), folder);
    let link = folder.path().join("play/tasks/link");
    let try_ = |target: &str| {
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(target, &link).unwrap();
        let step: Box<dyn Provisioner> = step(folder.path());
        step.key(&mut kiln_model::key::KeyHasher::new("step"))
    };
    for inside in ["main.yml", "../site.yml", "../tasks/main.yml"] {
        try_(inside).unwrap();
    }
    for outside in ["/etc/passwd", "../../roles/web", "../../play/site.yml", ".."].iter().take(3) {
        let error = try_(outside).unwrap_err();
        assert!(error.to_string().contains(&format!("is a link to {outside}, out of ")), "{error:?}");
    }
}

#[test]
fn what_the_guest_prints_is_understood_or_refused() {
    let play = Play {
        playbook: "site.yml".into(),
        inputs: Vec::new(),
        roles: Vec::new(),
        collections: Vec::new(),
        host: "kiln".into(),
        groups: Vec::new(),
        extra_vars: [].into(),
        vault_password: Some("vault".into()),
        secret_vars: [].into(),
        tags: vec!["a".into(), "b".into()],
        skip_tags: Vec::new(),
        verbose: 2,
    };
    let tool = Inside { play };
    let lines = |texts: &[&str]| -> Vec<(Stream, String)> { texts.iter().map(|text| (Stream::Stdout, (*text).to_owned())).collect() };
    let would = "kiln-ansible: {\"outcome\": \"ok\", \"would_change\": [\"a : b (copy) on kiln: /x\", \"c\"]}";
    let changes = tool.changes(&lines(&["PLAY [all]", would, "kiln-ansible: end"])).unwrap();
    assert_eq!(changes.resources, ["a : b (copy) on kiln: /x", "c"]);
    assert!(tool.changes(&lines(&["kiln-ansible: end"])).unwrap().resources.is_empty());
    for not in [&["PLAY [all]"][..], &[would], &["kiln-ansible: {\"outc", "kiln-ansible: end"]] {
        tool.changes(&lines(not)).unwrap_err();
    }
    let failed = "kiln-ansible: {\"outcome\": \"failed\", \"task\": \"t (m) on kiln\", \"message\": \"no\", \"printed\": [\"a\"]}";
    assert_eq!(tool.failure(Stream::Stdout, failed).unwrap(), "task `t (m) on kiln` failed: no\na");
    assert_eq!(tool.failure(Stream::Stderr, "ERROR! no such role").unwrap(), "no such role");
    assert_eq!(tool.failure(Stream::Stdout, "ok: [kiln]"), None);
    let script = tool.check("/run/kiln/tool-1");
    assert!(script.contains("--tags a,b -vv --check /run/kiln/tool-1/project/site.yml"), "{script}");
    assert!(script.contains("export ANSIBLE_VAULT_PASSWORD_FILE=/run/kiln/secrets/vault\n"), "{script}");
    assert!(!tool.apply("/run/kiln/tool-1").contains("--check"));
}

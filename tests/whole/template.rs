//! Templates and the command line, without a guest.

use crate::context::{Kiln, Template, tool};

#[test]
fn validate_reports_every_mistake_at_once_each_at_its_line() {
    let kiln = Kiln::fresh();
    let template = Template::new(
        r#"[image]
name = "web"
version = "1"
[base]
debian = "bokworm"
[disk]
size = "4 furlongs"
[variables]
unused = "x"
[builder.qemu]
memroy = "1GiB"
[[provision]]
name = "one"
shell = "echo {{ nothing is expanded here }}"
env = { A = "{{ var.undeclared }}" }
[[provision]]
file = { source = "missing/", destination = "/srv" }
[[provision]]
shell = "true"
file = { source = "kiln.toml", destination = "/srv" }
[[provision]]
[provision.shell]
inline = "true"
timeout = "5m"
"#,
    );
    let ran = kiln.run(&["validate", template.path()]);
    ran.fails(
        2,
        &[
            "did you mean `memory`?",
            "did you mean `bookworm`?",
            "furlongs",
            "unused",
            "var.undeclared",
            "missing/",
            "two provisioners",
            "move `timeout` above",
        ],
    );
    let json = kiln.run(&["validate", template.path(), "--json"]).json();
    let mistakes = json["mistakes"].as_array().unwrap();
    assert!(mistakes.len() >= 8, "{json}");
    let memory = mistakes.iter().find(|m| m["help"] == "did you mean `memory`?").unwrap();
    assert_eq!((&memory["place"]["line"], &memory["place"]["text"]), (&11.into(), &"memroy".into()));
    // Nothing is started for a template with mistakes.
    kiln.run(&["bake", template.path()]).fails(2, &["nothing was started"]);
    assert!(kiln.leftovers().is_empty());
}

#[test]
fn variables_come_from_everywhere_and_sensitive_ones_not_from_the_command_line() {
    let kiln = Kiln::fresh();
    let template = Template::debian(
        "vars",
        "[variables]\nregion = { type = \"string\" }\ntoken = { env = \"TOKEN_OF_TEST\", sensitive = true }\n\
         [[provision]]\nenv = { R = \"{{ var.region }}\" }\nsecrets = [\"token\"]\nshell = 'true'\n",
    );
    kiln.run(&["validate", template.path()]).fails(2, &["region", "token"]);
    let with = |arguments: &[&str]| {
        let mut all = vec!["validate", template.path()];
        all.extend(arguments);
        let output = kiln.command(&all).env("TOKEN_OF_TEST", "s3cret-value").output().unwrap();
        crate::context::Ran::of(output, &all)
    };
    assert_eq!(with(&["--var", "region=eu"]).status, 0);
    with(&["--var", "region=eu", "--var", "token=abcdef"]).fails(2, &["token"]);
    with(&["--var", "region=eu", "--var", "regoin=x"]).fails(2, &["regoin"]);
    let file = template.write("vars.toml", "region = \"us\"\n");
    assert_eq!(with(&["--var-file", file.to_str().unwrap()]).status, 0);
    let output =
        kiln.command(&["validate", template.path()]).env("TOKEN_OF_TEST", "x123456").env("KILN_VAR_region", "ap").output().unwrap();
    assert!(output.status.success());
}

#[test]
fn init_writes_a_template_without_mistakes_and_overwrites_nothing() {
    let kiln = Kiln::fresh();
    let folder = kiln.home.join("web");
    let path = folder.to_str().unwrap();
    kiln.ok(&["init", path]);
    kiln.ok(&["validate", path]);
    kiln.run(&["init", path]).fails(2, &["is there already"]);
    for template in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/templates")).unwrap() {
        kiln.ok(&["validate", template.unwrap().path().to_str().unwrap()]);
    }
}

#[test]
fn the_version_comes_from_git() {
    let kiln = Kiln::fresh();
    let template = Template::new("[image]\nname = \"web\"\n[base]\ndebian = \"bookworm\"\n[[provision]]\nshell = 'true'\n");
    kiln.run(&["validate", template.path()]).fails(2, &["version"]);
    let git = |arguments: &[&str]| {
        let mut all = vec!["-C", template.path(), "-c", "user.name=t", "-c", "user.email=t@example.org"];
        all.extend(arguments);
        tool("git", &all)
    };
    git(&["init", "-q"]);
    git(&["add", "."]);
    git(&["commit", "-qm", "one"]);
    git(&["tag", "-am", "one", "v1.2.3"]);
    assert_eq!(kiln.ok(&["validate", "--json", template.path()]).json()["version"], "v1.2.3");
}

#[test]
fn help_completions_and_man_pages_come_from_one_definition() {
    let kiln = Kiln::fresh();
    for shell in ["bash", "zsh", "fish"] {
        assert!(kiln.ok(&["completions", shell]).stdout.contains("on-failure"));
    }
    let man = kiln.home.join("man");
    kiln.ok(&["man", man.to_str().unwrap()]);
    assert!(std::fs::read_to_string(man.join("kiln-bake.1")).unwrap().contains("on\\-failure"));
    kiln.run(&["bkae"]).fails(2, &["bake"]);
    let doctor = kiln.ok(&["doctor", "--json"]).json();
    assert_eq!(doctor["ok"], true);
}

/// A template of three steps on an image of the store.
fn planned(kiln: &Kiln) -> Template {
    let disk = kiln.home.join("disk");
    let mut bytes = vec![0; 1 << 20];
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 0, 4, 0, 0]);
    std::fs::write(&disk, bytes).unwrap();
    kiln.ok(&["import", disk.to_str().unwrap(), "start:1"]);
    let template = Template::new(
        "[image]\nname = \"web\"\nversion = \"1\"\n[base]\nimage = \"start:1\"\n\
         [variables]\ngreeting = \"hello\"\ntoken = { env = \"TOKEN_OF_TEST\", sensitive = true }\n\
         [[provision]]\nname = \"packages\"\nshell = 'true'\n\
         [[provision]]\nname = \"site\"\nfile = { source = \"site/\", destination = \"/srv\" }\n\
         [[provision]]\nname = \"license\"\nsecrets = [\"token\"]\nenv = { G = \"{{ var.greeting }}\" }\nshell = 'true'\n\
         [[test]]\nshell = 'true'\n",
    );
    template.write("site/index.html", "one");
    template
}

fn plan(kiln: &Kiln, template: &Template, more: &[&str]) -> crate::context::Ran {
    let mut all = vec!["plan", template.path()];
    all.extend(more);
    let ran = crate::context::Ran::of(kiln.command(&all).env("TOKEN_OF_TEST", "s3cret-value").output().unwrap(), &all);
    assert!(!format!("{ran}").contains("s3cret"), "{ran}");
    ran
}

#[test]
fn plan_says_step_by_step_what_runs_and_why_and_starts_nothing() {
    let kiln = Kiln::fresh();
    let template = planned(&kiln);
    let ran = plan(&kiln, &template, &[]);
    assert_eq!(ran.status, 0, "{ran}");
    for text in ["web:1 on ", "packages", "site", "file", "license", "seal", "tests", "no bake of `web` is known", "boots the base"] {
        assert!(ran.stdout.contains(text), "no {text:?} in {ran}");
    }
    assert!(kiln.leftovers().is_empty());

    let json = plan(&kiln, &template, &["--json"]).json();
    assert_eq!(json["name"], "web");
    assert!(json["base"]["digest"].as_str().unwrap().starts_with("sha256:"), "{json}");
    assert!(json["start"]["key"].is_string() && json["seal"]["key"].is_string() && json["tests"]["key"].is_string(), "{json}");
    let steps = json["steps"].as_array().unwrap();
    let names: Vec<_> = steps.iter().map(|step| (step["name"].as_str().unwrap(), step["kind"].as_str().unwrap())).collect();
    assert_eq!(names, [("packages", "shell"), ("site", "file"), ("license", "shell")]);
    assert!(steps.iter().all(|step| step["cached"] == false && step["estimate_seconds"].is_null()), "{json}");
    assert!(json["estimate_seconds"].is_null());

    // The same keys as long as nothing has changed, and others from there on.
    let keys = |more: &[&str]| -> Vec<String> {
        let json = plan(&kiln, &template, more).json();
        json["steps"].as_array().unwrap().iter().map(|step| step["key"].as_str().unwrap().to_owned()).collect()
    };
    let first = keys(&["--json"]);
    assert_eq!(first, keys(&["--json"]));
    let greeted = keys(&["--json", "--var", "greeting=servus"]);
    assert!(first[..2] == greeted[..2] && first[2] != greeted[2]);
    template.write("site/index.html", "two");
    let changed = keys(&["--json"]);
    assert!(first[0] == changed[0] && first[1] != changed[1] && first[2] != changed[2]);
}

#[test]
fn plan_and_bake_take_what_to_do_anew() {
    let kiln = Kiln::fresh();
    let template = planned(&kiln);
    assert!(plan(&kiln, &template, &["--no-cache"]).stdout.contains("--no-cache"));
    assert!(plan(&kiln, &template, &["--from", "site"]).stdout.contains("--from names it"));
    let fresh = plan(&kiln, &template, &["--fresh"]);
    assert!(fresh.stdout.contains("--fresh") && fresh.stdout.contains("which is fetched first"), "{fresh}");
    plan(&kiln, &template, &["--fresh", "--from", "site"]).fails(2, &["--from"]);
    for command in ["plan", "bake"] {
        let ran = kiln.command(&[command, template.path(), "--from", "sites"]).env("TOKEN_OF_TEST", "s3cret-value").output().unwrap();
        crate::context::Ran::of(ran, &[command]).fails(2, &["no step of that name", "did you mean `site`?", "packages, site, license"]);
    }
    kiln.run(&["plan", template.path()]).fails(2, &["token"]);
    assert!(kiln.leftovers().is_empty());
}

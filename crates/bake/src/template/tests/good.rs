//! What is no mistake, and what becomes of it.

use std::time::Duration;

use kiln_model::Digest;

use super::fakes::made_of;
use super::{Bench, HEAD};
use crate::template::{Boot, Cache, INIT_TEMPLATE};

#[test]
fn the_template_of_init() {
    let template = Bench::new(INIT_TEMPLATE).good();
    assert_eq!((template.name.as_str(), template.version.as_str(), template.commit), ("hello", "0.1.0", None));
    assert_eq!(template.disk_size, Some(4 << 30));
    let names: Vec<&str> = template.steps.iter().map(|step| step.common.name.as_str()).collect();
    assert_eq!(names, ["packages", "page"]);
    assert_eq!(template.steps[1].common.env["GREETING"], "Hello from kiln");
    assert_eq!(template.tests[0].common.name, "the page is served");
    assert!(template.warnings.is_empty());
}

#[test]
fn the_common_keys_and_their_defaults() {
    let template = Bench::new(&format!(
        "{HEAD}labels = 'of base'\n[[provision]]\nshell = 'a'\n[[provision]]\nname = 'b'\nuser = 'deploy'\ntimeout = '5m'\nretries = 2\n\
         cache = '24h'\ncheckpoint = false\nshell = 'b'\n[[provision]]\nshell = 'c'\ncache = false\n[[provision]]\nshell = 'd'\ncache = 'forever'\n\
         [[test]]\nshell = 't'\n[cache]\nmax_age = '3d'\ntrusted = ['keys/ci.pub']\n[seal]\nkeep = ['/home//deploy/.ssh/']\n\
         [drift]\nmutable = ['/var/lib/app/', '/etc/app/*.db']"
    ).replace("labels = 'of base'\n", ""))
    .good();
    let names: Vec<&str> = template.steps.iter().map(|step| step.common.name.as_str()).collect();
    assert_eq!(names, ["shell-1", "b", "shell-3", "shell-4"]);
    let caches: Vec<Cache> = template.steps.iter().map(|step| step.cache).collect();
    let days = |n: u64| Cache::For(Duration::from_secs(n * 86400));
    assert_eq!(caches, [days(3), days(1), Cache::Never, Cache::Forever]);
    let b = &template.steps[1];
    assert_eq!((b.common.user.as_deref(), b.common.timeout, b.common.retries), (Some("deploy"), Some(Duration::from_secs(300)), 2));
    assert!(!b.checkpoint && template.steps[0].checkpoint);
    assert_eq!(template.tests[0].common.name, "test-1");
    assert_eq!(template.keep, ["/home/deploy/.ssh"]);
    assert_eq!(template.mutable, ["/var/lib/app", "/etc/app/*.db"]);
    assert_eq!(template.trusted, [template.folder.join("keys/ci.pub")]);
    assert_eq!((template.builder_name.as_str(), template.builder.kind(), template.disk_size), ("qemu", "qemu", None));
    assert_eq!(template.base.label(), "debian bookworm");
}

#[test]
fn script_bodies_are_never_expanded() {
    let bodies = ["echo ${#a[@]} {{ no }} {% if x %} {# c #}", "docker inspect -f '{{.Id}}' {{ unclosed", "echo '{{ image.name }}'"];
    for body in bodies {
        let template = Bench::new(&format!(
            "{HEAD}[[provision]]\nshell = \"\"\"{body}\"\"\"\n[[provision]]\nshell = {{ inline = \"\"\"{body}\"\"\" }}"
        ))
        .good();
        assert!(template.steps.iter().all(|step| made_of(step, "shell", body)), "{body}");
    }
}

#[test]
fn only_double_braces_are_live_elsewhere() {
    let text = "a {# b #} {% if %} ${#x[@]} {single} }} 日本 {{ image.name }}{{ \"{{\" }}{{ 'it}}s' }}";
    let template = Bench::new(&format!("{HEAD}[[provision]]\nshell = 'x'\nenv = {{ A = '''{text}''' }}")).good();
    assert_eq!(template.steps[0].common.env["A"], "a {# b #} {% if %} ${#x[@]} {single} }} 日本 web{{it}}s");
}

#[test]
fn a_script_does_not_see_the_line_ends_of_a_checkout() {
    let text = format!("{HEAD}[[provision]]\nshell = '''\na\nb\n'''\n[[provision]]\nshell = \"\"\"c\\r\n\\\n   d\"\"\"\n");
    let (unix, windows) = (Bench::new(&text).good(), Bench::new(&text.replace('\n', "\r\n")).good());
    for template in [unix, windows] {
        assert!(made_of(&template.steps[0], "shell", "a\nb\n"));
        assert!(made_of(&template.steps[1], "shell", "c\r\nd"));
    }
}

#[test]
fn variables_by_precedence() {
    let template = format!(
        "{HEAD}[variables]\na = 'default'\nb = 'default'\nc = 'default'\nd = {{ env = 'D', default = 'default' }}\ne = {{ file = 'e.txt' }}\n\
         f = {{ command = \"printf '{{{{x}}}}\\\\n'\" }}\ng = '{{{{ var.a }}}}-{{{{ base.debian }}}}'\nh = {{ env = 'UNSET', default = 'default' }}\n\
         [[provision]]\nshell = 'x'\nenv = {{ A = '{{{{ var.a }}}}', B = '{{{{ var.b }}}}', C = '{{{{ var.c }}}}', D = '{{{{ var.d }}}}', \
         E = '{{{{ var.e }}}}', F = '{{{{ var.f }}}}', G = '{{{{ var.g }}}}', H = '{{{{ var.h }}}}' }}\n"
    );
    let template = Bench::new(&template)
        .file("e.txt", "file\n")
        .env("D", "env")
        .env("KILN_VAR_a", "environment")
        .env("KILN_VAR_b", "environment")
        .env("KILN_VAR_c", "environment")
        .env("KILN_VAR_of_another_template", "x")
        .var_file("vars.toml", "a = 'var-file'\nb = 'var-file'")
        .var("a", "first")
        .var("a", "argument")
        .good();
    let values: Vec<&str> = template.steps[0].common.env.values().map(String::as_str).collect();
    assert_eq!(values, ["argument", "var-file", "environment", "env", "file", "{{x}}", "argument-bookworm", "default"]);
}

#[test]
fn a_text_that_is_one_expression_keeps_its_type() {
    let text = format!(
        "{}[variables]\ncpus = 2\nmajor = {{ type = 'integer', default = 12 }}\nfast = true\n[builder.qemu]\ncpus = '{{{{ var.cpus * 2 }}}}'\n\
         [[provision]]\nshell = 'x'\nretries = '{{{{ var.cpus }}}}'\nname = '{{{{ var.major }}}}'\ncheckpoint = '{{{{ not var.fast }}}}'\n",
        HEAD.replace("'1.0'", "1").replace("\"1.0\"", "'{{ var.major }}'")
    );
    let template = Bench::new(&text).good();
    assert_eq!(template.version, "12");
    let step = &template.steps[0];
    assert_eq!((step.common.retries, step.common.name.as_str(), step.checkpoint), (2, "12", false));
}

#[test]
fn includes_are_spliced_in_with_their_own_folder() {
    let template = format!(
        "{HEAD}[variables]\nx = 'v'\n[[provision]]\nshell = 'first'\n[[provision]]\ninclude = '../common/a.toml'\n[[provision]]\nshell = 'last'\n"
    );
    let bench = Bench::new("")
        .file("web/kiln.toml", &template)
        .file("common/a.toml", "[[provision]]\nshell = { script = 'a.sh' }\nenv = { X = '{{ var.x }}' }\n[[provision]]\ninclude = 'more/b.toml'\nonly = { builder = 'ec2' }\n[[provision]]\ninclude = 'more/b.toml'\nonly = { builder = 'qemu' }\n")
        .file("common/a.sh", "from a")
        .file("common/more/b.toml", "[[provision]]\nname = 'b'\nfile = { source = 'b.txt', destination = '/b' }\n")
        .file("common/more/b.txt", "from b");
    let fakes = super::Fakes::default();
    let Ok(template) = super::super::load(&bench.path().join("web"), &bench.inputs, &fakes.kinds()) else { panic!() };
    let names: Vec<&str> = template.steps.iter().map(|step| step.common.name.as_str()).collect();
    assert_eq!(names, ["shell-1", "shell-2", "b", "shell-3"]);
    assert!(made_of(&template.steps[1], "shell", "from a") && made_of(&template.steps[2], "file", "/b=from b"));
    assert_eq!(template.steps[1].common.env["X"], "v");
}

#[test]
fn only_and_builders() {
    let text = format!(
        "{HEAD}[builder.small]\ntype = 'qemu'\nmemory = '1GiB'\n[builder.ec2]\n[[provision]]\nname = 'a'\nshell = 'a'\nonly = {{ builder = ['small'] }}\n\
         [[provision]]\nname = 'a'\nshell = 'b'\nonly = {{ builder = 'ec2', arch = ['amd64', 'arm64'] }}\n[[provision]]\nname = 'c'\nshell = 'c'\nonly = {{ builder = ['qemu'] }}\n\
         [[provision]]\nshell = 'd'\nonly = {{ arch = 'arm64' }}\n"
    );
    for (builder, name, expected) in [(None, "small", "a c"), (Some("ec2"), "ec2", "a"), (Some("qemu"), "qemu", "c")] {
        let mut bench = Bench::new(&text);
        bench.inputs.builder = builder.map(Into::into);
        let template = bench.good();
        let names: Vec<&str> = template.steps.iter().map(|step| step.common.name.as_str()).collect();
        assert_eq!((template.builder_name.as_str(), names.join(" ").as_str()), (name, expected));
    }
}

#[test]
fn a_value_in_a_script_body_is_warned_about() {
    let text = format!("{HEAD}[variables]\nx = 'a'\n[[provision]]\nshell = 'echo {{{{ var.x }}}}'\nenv = {{ X = '{{{{ var.x }}}}' }}\n");
    let template = Bench::new(&text).good();
    let place = template.warnings[0].place.unwrap();
    assert_eq!(&template.sources[place.source].text[place.start..place.end], "{{ var.x }}");
}

#[test]
fn git_tells_the_version() {
    let text = format!(
        "{}[[provision]]\nshell = 'x'\nenv = {{ C = '{{{{ git.commit }}}}', D = '{{{{ git.dirty }}}}', V = '{{{{ image.version }}}}' }}\n",
        HEAD.replace("version = \"1.0\"\n", "")
    );
    let bench = Bench::new(&text);
    bench.git(&["init", "-q"]);
    assert!(bench.bad()[0].message.contains("no commit yet"));
    bench.git(&["add", "."]);
    bench.git(&["commit", "-qm", "one"]);
    let template = bench.good();
    let commit = template.commit.unwrap();
    assert!(commit.len() >= 40 && commit.starts_with(&template.version), "{commit} {}", template.version);
    bench.git(&["tag", "1.4.0"]);
    let template = bench.good();
    assert_eq!((template.version.as_str(), template.steps[0].common.env["C"].as_str()), ("1.4.0", commit.as_str()));
    assert_eq!(template.steps[0].common.env["D"], "false");

    let bench = bench.file("kiln.toml", &format!("{text}\n"));
    let template = bench.good();
    assert_eq!((template.version.as_str(), template.steps[0].common.env["D"].as_str()), ("1.4.0-dirty", "true"));
    assert_eq!(template.steps[0].common.env["V"], "1.4.0-dirty");

    // A shallow clone knows a tag on its commit, and nothing else.
    bench.git(&["commit", "-qam", "two"]);
    let clone = Bench::new("");
    let url = format!("file://{}", bench.path().display());
    clone.git(&["clone", "-q", "--depth", "1", &url, "c"]);
    let fakes = super::Fakes::default();
    let Err(mistakes) = super::super::load(&clone.path().join("c"), &clone.inputs, &fakes.kinds()) else { panic!() };
    assert!(mistakes.problems.0[0].message.contains("shallow clone"), "{:?}", mistakes.problems);
    assert!(mistakes.problems.0[0].help.as_deref().unwrap().contains("git fetch --unshallow --tags"));
    bench.git(&["tag", "1.4.1"]);
    clone.git(&["clone", "-q", "--depth", "1", &url, "d"]);
    let Ok(template) = super::super::load(&clone.path().join("d"), &clone.inputs, &fakes.kinds()) else { panic!() };
    assert_eq!(template.version, "1.4.1");
    clone.git(&["-C", "c", "fetch", "-q", "--unshallow", "--tags"]);
    let Ok(template) = super::super::load(&clone.path().join("c"), &clone.inputs, &fakes.kinds()) else { panic!() };
    assert_eq!(template.version, "1.4.1");
}

#[test]
fn time_is_one_for_the_whole_bake() {
    let mut bench = Bench::new(&format!(
        "{HEAD}[[provision]]\nshell = 'x'\nenv = {{ A = '{{{{ time.date }}}} {{{{ time.rfc3339 }}}} {{{{ time.unix }}}} {{{{ time.stamp }}}}' }}\n"
    ));
    bench.inputs.now = std::time::UNIX_EPOCH + Duration::from_secs(1_795_225_260);
    assert_eq!(bench.good().steps[0].common.env["A"], "2026-11-21 2026-11-21T01:41:00Z 1795225260 20261121T014100Z");
}

#[test]
fn what_provenance_tells_of_a_template() {
    let text = format!(
        "{HEAD}[variables]\nopen = 'written'\ngiven = 'written'\nfetched = {{ env = 'FETCHED' }}\nboth = {{ env = 'BOTH' }}\n\
         token = {{ env = 'API_TOKEN', sensitive = true }}\n\
         [[provision]]\nshell = 'x'\nsecrets = ['token']\n\
         env = {{ A = '{{{{ var.open }}}} {{{{ var.given }}}} {{{{ var.fetched }}}} {{{{ var.both }}}}' }}\n\
         [[provision]]\ninclude = 'common/more.toml'\n"
    );
    let included = "[[provision]]\nshell = 'y'\n";
    let bench =
        Bench::new(&text).file("common/more.toml", included).var("given", "said").env("FETCHED", "hunter22").env("API_TOKEN", "hunter23");
    let bench = bench.env("BOTH", "hunter24").env("KILN_VAR_both", "said too");
    let template = bench.good();
    let files: Vec<_> = template.files.iter().map(|file| (file.name.as_str(), file.digest)).collect();
    assert_eq!(files, [("kiln.toml", Digest::of(&text)), ("common/more.toml", Digest::of(included))]);
    let shown: Vec<_> = template.variables.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    assert_eq!(shown, [("both", Some("said too")), ("fetched", None), ("given", Some("said")), ("open", Some("written"))]);

    bench.git(&["init", "-q"]);
    bench.git(&["add", "."]);
    bench.git(&["commit", "-qm", "one"]);
    let commit = bench.good().commit.unwrap();
    let source = crate::template::repository(&bench.path().join("common"), commit.clone()).unwrap();
    assert_eq!((source.commit, source.folder.as_str(), source.repository, source.dirty), (commit.clone(), "common", None, false));
    bench.git(&["remote", "add", "origin", "https://eve:hunter22@git.example/acme/shop"]);
    let bench = bench.file("common/more.toml", "[[provision]]\nshell = 'z'\n");
    let source = crate::template::repository(bench.path(), commit).unwrap();
    assert_eq!((source.folder.as_str(), source.repository.as_deref(), source.dirty), ("", Some("https://git.example/acme/shop"), true));
}

#[test]
fn the_boots_and_the_user_data_of_tests() {
    let text = format!(
        "{HEAD}[variables]\nwhere = 'data'\n[[test]]\nshell = 'a'\n[[test]]\nshell = 'b'\nboot = 'both'\nuser_data = '{{{{ var.where }}}}/user.yaml'\n\
         [[test]]\nshell = 'c'\nboot = 'again'"
    );
    let template = Bench::new(&text).file("data/user.yaml", "#cloud-config\n").good();
    let boots: Vec<Boot> = template.tests.iter().map(|test| test.boot).collect();
    assert_eq!(boots, [Boot::First, Boot::Both, Boot::Again]);
    let data: Vec<Option<&[u8]>> = template.tests.iter().map(|test| test.user_data.as_deref()).collect();
    assert_eq!(data, [None, Some(b"#cloud-config\n".as_slice()), None]);
}

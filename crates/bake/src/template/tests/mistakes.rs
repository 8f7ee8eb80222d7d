//! Every kind of mistake: the text that is underlined, what is said, and that
//! one mistake is said once.

use super::{Bench, HEAD, Told};

/// One mistake in what follows a good head: what is underlined, a part of the
/// message, a part of the help or label.
const AFTER_HEAD: &[(&str, &str, &str, &str)] = &[
    // Tables.
    ("[dsik]\nsize = \"4GiB\"", "dsik", "unknown key `dsik` in the template", "did you mean `disk`?"),
    ("[matrix]\na = 1", "matrix", "reserved for a later version", ""),
    ("[publish.aws]\na = 1", "publish", "reserved for a later version", ""),
    ("[proxy]\nhttp = 'x'", "proxy", "a setting of the site", "/etc/kiln/config.toml"),
    ("[disk]\nsiez = '4GiB'", "siez", "unknown key `siez` in [disk]", "did you mean `size`?"),
    ("[disk]\nsize = '4 furlongs'", "'4 furlongs'", "`size` is not a size", "4GiB"),
    ("[disk]\nsize = 1000", "1000", "whole sectors", ""),
    ("[disk]\nsize = true", "true", "`size` must be a size", "this is a boolean"),
    ("disk = 4", "4", "[disk] must be a table, not an integer", ""),
    ("[seal]\nkeep = ['home/x']", "'home/x'", "absolute paths", ""),
    ("[seal]\nkeep = ['/home/../etc']", "'/home/../etc'", "absolute paths", ""),
    ("[seal]\nkeep = [1]", "1", "`keep` must be a string", ""),
    ("[drift]\nmutable = ['/']", "'/'", "`mutable` names absolute paths", "/var/lib/app"),
    ("[drift]\nmutable = ['*.db']", "'*.db'", "absolute paths", ""),
    ("[drift]\nmutabel = []", "mutabel", "unknown key `mutabel` in [drift]", "did you mean `mutable`?"),
    ("[cache]\nmax_age = 7", "7", "not a length of time", "7d"),
    ("[cache]\nmax_age = false", "false", "not a length of time", "7d"),
    ("[cache]\ntrusted = 'ci.pub'", "'ci.pub'", "`trusted` must be an array of strings", ""),
    // Builders.
    ("[builder.qemu]\nmemroy = '1GiB'", "memroy", "unknown key `memroy`", "did you mean `memory`?"),
    ("[builder.qmeu]", "qmeu", "no builder of the type `qmeu`", "did you mean `qemu`?"),
    ("[builder.small]\ntype = 'vmware'", "'vmware'", "no builder of the type `vmware`", "known types: qemu, ec2"),
    ("[builder]\nqemu = 3", "qemu", "`qemu` must be a table", "[builder.NAME]"),
    ("[builder.a]\ntype = 3", "3", "`type` must be a string", ""),
    // Steps.
    ("[[provision]]\nshel = 'true'", "shel", "unknown key `shel` in [[provision]]", "did you mean `shell`?"),
    ("[[provision]]\nname = 'x'", "[[provision]]", "does not say what to do", "exactly one of: shell, file"),
    (
        "[[provision]]\nshell = 'a'\nfile = { source = '.', destination = '/x' }",
        "file",
        "two provisioners in one table",
        "`shell` is one already",
    ),
    ("[[provision]]\nscript = 'a.sh'", "script", "belongs into the table of its provisioner", "shell = { script = … }"),
    ("[[provision]]\nshell = 'a'\ninterpreter = 'sh'", "interpreter", "belongs into the table", "shell = { interpreter = … }"),
    ("[[provision]]\nshell = 'a'\nwhen = 'x'", "when", "reserved for a later version", ""),
    ("[[provision]]\nshell = 'a'\ntimout = '5m'", "timout", "unknown key `timout`", "did you mean `timeout`?"),
    ("[[provision]]\nshell = 'a'\ntimeout = 5", "5", "`timeout` must be a length of time", "this is an integer"),
    ("[[provision]]\nshell = 'a'\ntimeout = '0s'", "'0s'", "lets nothing run", ""),
    ("[[provision]]\nshell = 'a'\nretries = -1", "-1", "must not be negative", ""),
    ("[[provision]]\nshell = 'a'\nuser = 'a b'", "'a b'", "cannot be the name of a user", ""),
    ("[[provision]]\nshell = 'a'\nname = ''", "''", "a step's name is not empty", ""),
    ("[[provision]]\nshell = 'a'\nenv = { 'A-B' = 'x' }", "'A-B'", "an environment variable's name", ""),
    ("[[provision]]\nshell = 'a'\nenv = { A = ['x'] }", "['x']", "`A` must be a string", ""),
    ("[[provision]]\nshell = 'a'\ncache = 'often'", "'often'", "not a length of time", "forever"),
    ("[[provision]]\nshell = 'a'\ncheckpoint = 'no'", "'no'", "`checkpoint` must be a boolean", ""),
    ("[[provision]]\nshell = 'a'\nonly = { builder = ['qmeu'] }", "'qmeu'", "no builder `qmeu`", "did you mean `qemu`?"),
    ("[[provision]]\nshell = 'a'\nonly = { arch = 'x86_64' }", "'x86_64'", "no arch `x86_64`", "did you mean `amd64`?"),
    ("[[provision]]\nshell = 'a'\nonly = { bilder = 'qemu' }", "bilder", "unknown key `bilder`", "did you mean `builder`?"),
    ("[[provision]]\nshell = { script = 'gone.sh' }", "'gone.sh'", "cannot read `gone.sh`: there is no such file", "looked for /"),
    ("[[provision]]\nfile = { source = '.' }", "{ source = '.' }", "file needs `destination`", ""),
    ("[[provision]]\nname = 'a'\nshell = 'x'\n[[provision]]\nname = \"a\"\nshell = 'y'", "\"a\"", "two steps are named `a`", "kiln.toml:7"),
    ("[provision]\nshell = 'a'", "[provision]", "two brackets on each side", ""),
    ("provision = 3", "3", "must be an array of tables", ""),
    ("[[test]]\nfile = { source = '.', destination = '/x' }", "file", "`file` is no test", "a [[test]] is one of: shell"),
    ("[[test]]\nshell = 'a'\ncache = false", "cache", "`cache` means nothing in a [[test]]", ""),
    ("[[test]]\nshell = 'a'\nboot = 'twice'", "'twice'", "on which boots of the image a test runs", "\"again\" (after a reboot)"),
    ("[[test]]\nshell = 'a'\nboot = true", "true", "on which boots of the image a test runs", ""),
    ("[[test]]\nshell = 'a'\nuser_data = 'gone.yaml'", "'gone.yaml'", "cannot read `gone.yaml`: there is no such file", "looked for /"),
    ("[[test]]\nshell = 'a'\nuser_data = 3", "3", "`user_data` must be a string", ""),
    ("[[provision]]\nshell = 'a'\nboot = 'again'", "boot", "`boot` means nothing in a [[provision]]", ""),
    ("[[provision]]\nshell = 'a'\nuser_data = 'x'", "user_data", "`user_data` means nothing in a [[provision]]", ""),
    ("[[test]]\nname = 'x'", "[[test]]", "does not say what to do", "exactly one of: shell"),
    ("[[provision]]\ninclude = 'gone.toml'", "'gone.toml'", "cannot read `gone.toml`", "looked for /"),
    ("[[provision]]\ninclude = 'kiln.toml'", "'kiln.toml'", "includes itself", ""),
    // Expressions.
    ("[[provision]]\nshell = 'a'\nenv = { A = 'é {{ var.gone }}' }", "{{ var.gone }}", "`gone` is not declared", "[variables] gone"),
    ("[[provision]]\nshell = 'a'\nenv = { A = \"\\u00e9\\t{{ var.gone }} x\" }", "{{ var.gone }}", "not declared", ""),
    ("[[provision]]\nshell = 'a'\nenv = { A = \"\"\"\nx\n {{ var.gone }} \"\"\" }", "{{ var.gone }}", "not declared", ""),
    ("[[provision]]\nshell = 'a'\nenv = { A = '{{ vra.x }}' }", "{{ vra.x }}", "`vra` is not defined", "did you mean `var`?"),
    ("[[provision]]\nshell = 'a'\nenv = { A = '{{ git.comit }}' }", "{{ git.comit }}", "not defined here", "did you mean `git.commit`?"),
    ("[[provision]]\nshell = 'a'\nenv = { A = '{{ time.now }}' }", "{{ time.now }}", "not defined here", "time.rfc3339"),
    ("[[provision]]\nshell = 'a'\nenv = { A = '{{ var }}' }", "{{ var }}", "not a value by itself", "var.NAME"),
    ("[[provision]]\nshell = 'a'\nenv = { A = 'x {{ image.name' }", "{{ image.name", "without its `}}`", "{{ \"{{\" }}"),
    ("[[provision]]\nshell = 'a'\nenv = { A = '{{.Id}}' }", "{{.Id}}", "not an expression", "{{ \"{{\" }}"),
    ("[[provision]]\nshell = 'a'\nenv = { A = '{{- image.name }}' }", "{{- image.name }}", "white space control", ""),
    ("[[provision]]\nshell = 'a'\nenv = { A = '{{ [1] }}' }", "{{ [1] }}", "this gives a list", ""),
    ("[[provision]]\nshell = 'a'\nenv = { A = '{{ image.name + 1 }}' }", "{{ image.name + 1 }}", "has no value", ""),
    ("[[provision]]\nshell = 'a'\nenv = { A = '{{ git.commit }}' }", "{{ git.commit }}", "not in a git repository", "version = \"0.1.0\""),
    // A failed expression does not make the kind complain too.
    ("[[provision]]\nshell = { script = '{{ var.gone }}.sh' }", "{{ var.gone }}", "not declared", ""),
    ("[builder.qemu]\ncpus = '{{ var.gone }}'", "{{ var.gone }}", "not declared", ""),
    // Variables.
    ("[variables]\nx = 'a'", "x", "`x` is not used", ""),
    ("[variables]\nx = 'a'\n[[provision]]\nshell = 'echo {{ var.x }}'", "x", "`x` is not used", "env = { X = \"{{ var.x }}\" }"),
    ("[variables]\nx = ['a']\n[[provision]]\nshell='a'\nenv = { A = '{{ var.x }}' }", "['a']", "must be a table", ""),
    ("[variables]\nx-y = 'a'", "x-y", "a variable's name", ""),
    ("[variables]\nx = {}\n[[provision]]\nshell='a'\nenv = { A = '{{ var.x }}' }", "x", "`x` has no value", "--var x=…"),
    (
        "[variables]\nx = { defualt = 'a' }\n[[provision]]\nshell='a'\nenv = { A = '{{ var.x }}' }",
        "defualt",
        "unknown key",
        "did you mean `default`?",
    ),
    (
        "[variables]\nx = { type = 'int' }\n[[provision]]\nshell='a'\nenv = { A = '{{ var.x }}' }",
        "'int'",
        "`int` is no type",
        "known types",
    ),
    (
        "[variables]\nx = { type = 'integer', default = 'a' }\n[[provision]]\nshell='a'\nenv = { A = '{{ var.x }}' }",
        "'a'",
        "must be an integer",
        "this is a string",
    ),
    (
        "[variables]\nx = { env = 'KILN_TEST_UNSET' }\n[[provision]]\nshell='a'\nenv = { A = '{{ var.x }}' }",
        "'KILN_TEST_UNSET'",
        "is not set in the environment",
        "",
    ),
    (
        "[variables]\nx = { env = 'A', file = 'b' }\n[[provision]]\nshell='a'\nenv = { A = '{{ var.x }}' }",
        "file",
        "one of env, file and command",
        "",
    ),
    ("[variables]\nx = { file = 'gone' }\n[[provision]]\nshell='a'\nenv = { A = '{{ var.x }}' }", "'gone'", "cannot read", ""),
    (
        "[variables]\nx = { command = 'echo no >&2; exit 4' }\n[[provision]]\nshell='a'\nenv = { A = '{{ var.x }}' }",
        "'echo no >&2; exit 4'",
        "ended with status 4",
        "it said: no",
    ),
    ("[variables]\nx = '{{ var.y }}'\ny = '{{ var.x }}'\n[[provision]]\nshell='a'\nenv = { A = '{{ var.x }}' }", "x", "needs itself", ""),
    // Syntax.
    ("[disk]\nsize = ", "size =", "a value is missing", ""),
    ("[disk]\nsize = big", "big", "a text must be quoted", "\"big\""),
    ("[disk\nsize = 3", "[disk", "unclosed table", ""),
    ("[disk]\nsize = 1.2.3", ".3", "invalid float", ""),
    ("[[provision]]\nshell = \'\'\'\necho\n", "\'\'\'", "this text never ends", ""),
    ("[disk]\nsize = '1GiB'\nsize = '2GiB'", "size", "duplicate key", "already defined above"),
    ("[[provision]]\nshell = \"a\\.b\"", ".", "no escape", "a backslash is only a backslash"),
];

fn check(one: &Told, (at, message, more): (&str, &str, &str), case: &str) {
    assert!(at.is_empty() || one.at == at, "{case}\n-- underlined: {one:#?}");
    assert!(one.message.contains(message), "{case}\n-- said: {one:#?}");
    assert!(one.more.contains(more), "{case}\n-- help: {one:#?}");
    assert_eq!(one.source, "kiln.toml", "{case}");
}

#[test]
fn each_mistake_alone() {
    for (text, at, message, more) in AFTER_HEAD {
        // A top-level value must stand before the first table.
        let template = if text.starts_with('[') { format!("{HEAD}{text}") } else { format!("{text}\n{HEAD}") };
        let found = Bench::new(&template).bad();
        assert_eq!(found.len(), 1, "{text}\n{found:#?}");
        check(&found[0], (at, message, more), text);
    }
}

#[test]
fn mistakes_of_the_head() {
    for (text, at, message, more) in [
        ("[base]\ndebian = 'x'", "", "has no [image]", "name ="),
        ("[image]\nname = 'a'\nversion = '1'", "", "has no [base]", "debian ="),
        ("[image]\nversion = '1'\n[base]\ndebian = 'x'", "[image]", "[image] needs `name`", ""),
        ("[image]\nname = 'Web'\nversion = '1'\n[base]\ndebian = 'x'", "'Web'", "lower-case", ""),
        ("[image]\nname = 'a'\nversion = 'a b'\n[base]\ndebian = 'x'", "'a b'", "`a b` cannot be a version", ""),
        ("[image]\nname = 'a'\n[base]\ndebian = 'x'", "[image]", "not in a git repository", "version = \"0.1.0\""),
        ("[image]\nname = 'a'\nversion = '1'\nlables = {}\n[base]\ndebian = 'x'", "lables", "unknown key", "did you mean `labels`?"),
        ("[image]\nname = 'a'\nversion = '1'\nlabels = 3\n[base]\ndebian = 'x'", "3", "`labels` must be a table", ""),
        (
            "[image]\nname = 'a'\nversion = '{{ image.version }}'\n[base]\ndebian = 'x'",
            "{{ image.version }}",
            "not defined here",
            "image.name",
        ),
        ("[image]\nname = 'a'\nversion = '1'\n[base]\ndebain = 'x'", "debain", "unknown key `debain` in [base]", "did you mean `debian`?"),
        ("[image]\nname = 'a'\nversion = '1'\n[base]", "[base]", "does not say what to start from", "debian, url"),
        ("[image]\nname = 'a'\nversion = '1'\n[base]\nchecksum = 'x'", "[base]", "does not say what to start from", ""),
        ("[image]\nname = 'a'\nversion = '1'\n[base]\ndebian = 'x'\nurl = 'y'", "url", "two bases", "`debian` is one already"),
        ("[image]\nname = 'a'\nversion = '1'\n[base]\ndebian = 'x'\nchekcsum = 'y'", "chekcsum", "unknown key", "did you mean `checksum`?"),
        ("[image]\nname = 'a'\nversion = '1'\n[base]\ndebian = 3", "3", "`debian` must be a string", ""),
        ("image = 3\n[base]\ndebian = 'x'", "3", "[image] must be a table", ""),
    ] {
        let found = Bench::new(text).bad();
        let ours: Vec<_> = found.iter().filter(|told| told.message.contains(message)).collect();
        assert!(!ours.is_empty(), "{text}\n{found:#?}");
        assert_eq!(ours[0].at, at, "{text}\n{found:#?}");
        assert!(ours[0].more.contains(more), "{text}\n{found:#?}");
        assert!(found.len() <= 2, "{text}\n{found:#?}");
    }
}

#[test]
fn all_at_once_in_the_order_of_the_text_whatever_the_line_ends() {
    let text = "[image]\nname = 'Ünïcode'\nversion = '1'\n[base]\ndebian = 'bookworm'\n[dsik]\n\
                [variables]\nunused = 'ä'\n[[provision]]\nshell = '''\necho \"${#a[@]}\"\n'''\nenv = { A = \"ü {{ var.gone }}\" }\n\
                timout = '5m'\n[[provision]]\nfile = { source = 'gone', destination = '/x' }\n";
    for text in [text.to_owned(), text.replace('\n', "\r\n"), format!("\u{feff}{text}")] {
        let found = Bench::new(&text).bad();
        let at: Vec<&str> = found.iter().map(|told| told.at.as_str()).collect();
        assert_eq!(at, ["'Ünïcode'", "dsik", "unused", "{{ var.gone }}", "timout", "'gone'"]);
    }
}

#[test]
fn several_syntax_errors() {
    let found = Bench::new("[image]\nname = \nversion = 1.2.3\n[base\ndebian = 'x'\n").bad();
    assert!(found.len() >= 2, "{found:#?}");
}

#[test]
fn what_is_given_from_outside() {
    let uses = format!("{HEAD}[variables]\nport = 80\n[[provision]]\nshell = 'a'\nenv = {{ P = '{{{{ var.port }}}}' }}\n");
    let cases: [(Bench, &str, &str, &str, &str); 7] = [
        (Bench::new(&uses).var("prot", "1"), "--var", "prot", "`prot` is not declared", "did you mean `port`?"),
        (Bench::new(&uses).var("port", "many"), "--var", "many", "`port` must be an integer", ""),
        (Bench::new(&uses).env("KILN_VAR_port", "x"), "KILN_VAR_port", "x", "`port` must be an integer", ""),
        (Bench::new(&uses).var_file("v.toml", "prot = 1"), "v.toml", "prot", "`prot` is not declared", "did you mean `port`?"),
        (Bench::new(&uses).var_file("v.toml", "port = '1'"), "v.toml", "'1'", "`port` must be an integer", "this is a string"),
        (Bench::new(&uses).var_file("v.toml", "port = "), "v.toml", "", "", ""),
        (Bench::new(&uses).builder("qmeu"), "", "", "no builder `qmeu`", "did you mean `qemu`?"),
    ];
    for (bench, source, at, message, more) in cases {
        let found = bench.bad();
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].source, source, "{found:#?}");
        assert!(at.is_empty() || found[0].at == at, "{found:#?}");
        assert!(found[0].message.contains(message) && found[0].more.contains(more), "{found:#?}");
    }
    let mut bench = Bench::new(&uses);
    bench.inputs.var_files.push("/nowhere/v.toml".into());
    assert!(bench.bad()[0].message.contains("cannot read the var-file"));
}

#[test]
fn mistakes_in_an_included_file_point_into_it() {
    let template = format!("{HEAD}[[provision]]\ninclude = 'common/a.toml'\nname = 'x'\n[[provision]]\nshell = 'true'\nenv = 3\n");
    let included = "[variables]\nx = 1\n[[provision]]\nfile = { source = 'gone', destination = '/x' }\n[[provision]]\ninclude = 'b.toml'\n";
    let found = Bench::new(&template)
        .file("common/a.toml", included)
        .file("common/b.toml", "[[provision]]\ninclude = '../common/a.toml'\n[[provision]]\nshell = 3\n")
        .bad();
    let seen: Vec<(&str, &str)> = found.iter().map(|told| (told.source.as_str(), told.at.as_str())).collect();
    assert_eq!(
        seen,
        [
            ("kiln.toml", "name"),
            ("kiln.toml", "3"),
            ("a.toml", "variables"),
            ("a.toml", "'gone'"),
            ("b.toml", "'../common/a.toml'"),
            ("b.toml", "3"),
        ]
    );
}

#[test]
fn no_template() {
    let folder = tempfile::tempdir().unwrap();
    let fakes = super::Fakes::default();
    let Err(mistakes) = super::super::load(folder.path(), &super::Inputs::default(), &fakes.kinds()) else { panic!() };
    assert!(mistakes.problems.0[0].message.contains("kiln.toml"), "{mistakes:?}");
    std::fs::write(folder.path().join("kiln.toml"), b"[image]\nname = '\xff'\n").unwrap();
    let Err(mistakes) = super::super::load(folder.path(), &super::Inputs::default(), &fakes.kinds()) else { panic!() };
    assert!(mistakes.problems.0[0].message.contains("UTF-8"), "{mistakes:?}");
}

mod soup {
    use proptest::prelude::*;

    use super::Bench;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        /// Nothing that stands in a template makes kiln panic, and every place
        /// is within its text (`told` slices it).
        #[test]
        fn no_text_is_a_panic(parts in prop::collection::vec(prop::sample::select(&[
            "[image]\n", "[[provision]]\n", "[provision]\n", "[base]\n", "[variables]\n", "[builder.qemu]\n", "[provision.shell]\n", "[[test]]\n",
            "name", "version", "shell", "file", "env", "only", "include", "secrets", "x", "default", "type", "sensitive", ".", " = ", "=",
            "'kiln.toml'", "'{{ var.x }}'", "\"{{ \\u00e9 {{ 'a\"", "'''\né{{ git.commit }}\r\n'''", "{", "}", "[", "]", "1", "true", "1979-05-27",
            "\n", "\r\n", "\r", ",", "#é", "\"", "'", "\\", "é", "\u{feff}", "99999999999999999999", "1e999", "{ x = 'a' }", "['x']",
        ][..]), 0..40)) {
            let bench = Bench::new(&parts.concat());
            if let Err(mistakes) = bench.load() {
                prop_assert!(!mistakes.problems.is_empty());
                super::super::told(&mistakes);
            }
        }
    }
}

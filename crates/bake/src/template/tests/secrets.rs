//! Sensitive variables: where they may come from and go to, and that no text
//! that people see holds one.

use std::os::unix::fs::PermissionsExt as _;

use super::{Bench, HEAD, told};

const DECLARED: &str = "[variables]\ntoken = { env = 'API_TOKEN', sensitive = true }\n[[provision]]\nshell = 'x'\nsecrets = ['token']\n";

fn declared() -> Bench {
    Bench::new(&format!("{HEAD}{DECLARED}"))
}

fn secret(bench: &Bench) -> String {
    bench.good().secrets["token"].expose().to_owned()
}

#[test]
fn where_a_secret_comes_from() {
    assert_eq!(secret(&declared().env("API_TOKEN", "hunter22")), "hunter22");
    assert_eq!(secret(&declared().env("API_TOKEN", "x").env("KILN_VAR_token", "hunter22")), "hunter22");
    let bench = declared().var_file("v.toml", "token = 'hunter22'");
    std::fs::set_permissions(bench.path().join("v.toml"), std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(secret(&bench), "hunter22");
    // The last line end of a file is not meant, unless it has several lines.
    for (written, expected) in [("hunter22\n", "hunter22"), ("-----BEGIN\nx\n", "-----BEGIN\nx\n")] {
        let text = format!("{HEAD}{}", DECLARED.replace("env = 'API_TOKEN'", "file = 'secret'"));
        assert_eq!(secret(&Bench::new(&text).file("secret", written)), expected);
    }
}

#[test]
fn a_secret_that_nothing_kept_uses_is_not_needed() {
    let text = format!("{HEAD}{DECLARED}only = {{ builder = 'ec2' }}\n");
    assert!(Bench::new(&text).good().secrets.is_empty());
}

#[test]
fn a_secret_too_short_to_be_hidden_is_warned_about() {
    let template = declared().env("API_TOKEN", "abc").good();
    assert!(template.warnings[0].message.contains("too short"));
    assert!(declared().env("API_TOKEN", "hunter22").good().warnings.is_empty());
}

#[test]
fn mistakes_with_secrets() {
    for (text, at, message, more) in [
        (
            "[[provision]]\nshell = 'x'\nenv = { T = '{{ var.token }}' }\nsecrets = ['token']",
            "{{ var.token }}",
            "is sensitive",
            "secrets = [\"token\"]",
        ),
        ("[[provision]]\nshell = 'x'\nsecrets = ['tokn', 'token']", "'tokn'", "not declared", "did you mean `token`?"),
        (
            "[[provision]]\nshell = 'x'\nsecrets = ['token', 'open']\nenv = { O = '{{ var.open }}' }",
            "'open'",
            "not sensitive",
            "env = { OPEN",
        ),
        ("[[provision]]\nshell = 'x'", "token", "is not used", "secrets = [\"token\"]"),
        ("[[provision]]\nshell = 'x'\nsecrets = 'token'", "'token'", "array of strings", ""),
    ] {
        let open = if text.contains("'open'") { "open = 'x'\n" } else { "" };
        let bench = Bench::new(&format!("{HEAD}[variables]\n{open}token = {{ env = 'API_TOKEN', sensitive = true }}\n{text}"))
            .env("API_TOKEN", "hunter22");
        let found = bench.bad();
        assert_eq!(
            found.iter().filter(|told| told.message.contains(message) && told.at == at && told.more.contains(more)).count(),
            1,
            "{found:#?}"
        );
    }
}

#[test]
fn no_text_that_people_see_holds_a_secret() {
    let with_default = format!("{HEAD}{}", DECLARED.replace("env = 'API_TOKEN'", "type = 'integer'"));
    let command = format!("{HEAD}{}", DECLARED.replace("env = 'API_TOKEN'", "command = 'cat secret >&2; exit 1'"));
    let benches = [
        (declared().env("API_TOKEN", "x").var("token", "hunter22"), "`--var` cannot give"),
        (declared().env("API_TOKEN", "x").var("tokn", "hunter22"), "`tokn` is not declared"),
        (declared().env("API_TOKEN", ""), "is empty"),
        (declared(), "is not set in the environment"),
        (declared().var_file("v.toml", "token = 'hunter22'"), "file that others can read"),
        (declared().var_file("v.toml", "tokn = 'hunter22'\n"), "`tokn` is not declared"),
        (declared().var_file("v.toml", "token = 'hunter22'\nx = \n"), ""),
        (declared().var_file("v.toml", "token = '''\nhunter22=\n"), ""),
        (Bench::new(&with_default).env("KILN_VAR_token", "hunter22"), "must be an integer"),
        (Bench::new(&command).file("secret", "hunter22"), "ended with status 1"),
    ];
    for (bench, message) in benches {
        let Err(mistakes) = bench.load() else { panic!("{message}") };
        let told = told(&mistakes);
        assert!(told.iter().any(|told| told.message.contains(message)), "{message}: {told:#?}");
        assert!(!format!("{mistakes:?}").contains("hunter22"), "{mistakes:?}");
    }
}

#[test]
fn a_secret_does_not_stand_in_the_template() {
    let text =
        format!("{HEAD}[variables]\ntoken = {{ default = 'x', sensitive = true }}\n[[provision]]\nshell = 'x'\nsecrets = ['token']\n");
    let found = Bench::new(&text).bad();
    assert_eq!((found.len(), found[0].at.as_str()), (1, "default"), "{found:#?}");
}

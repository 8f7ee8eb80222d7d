//! Tools that describe a machine: run once, proven, and gone. Puppet, CFEngine,
//! and what stands in for Chef, which cannot be had.

use serde_json::Value;

use crate::context::{Kiln, Ran, Template, contains, new_word, tool};

/// Checks what it is called with, and says what Chef says.
const CHEF: &str = r#"#!/bin/bash
set -eu
[ "$1 $2 $4 $6" = '--local-mode --config --json-attributes --no-color' ] || { echo "FATAL: called with $*"; exit 3; }
config=$3 node=$5
folder=$(dirname "$config")
grep -qxF "cookbook_path ['$folder/cookbooks']" "$config"
grep -qxF '{"page":{"port":80},"run_list":["recipe[site]"]}' <(cat "$node"; echo)
recipe=$folder/cookbooks/site/recipes/default.rb
echo 'Converging 1 resources
Recipe: site::default
  * file[/srv/chef] action create'
if [ "${7-}" = --why-run ]; then
  if cmp -s "$recipe" /srv/chef; then echo ' (up to date)'; n=0; else echo '    - Would update content in file /srv/chef'; n=1; fi
  echo "Infra Phase complete, $n/1 resources would have been updated"
else
  cp "$recipe" /srv/chef
  echo 'Infra Phase complete, 1/1 resources updated in 01 seconds'
fi
"#;

const STEPS: &str = r#"
[[provision]]
name = "new"
env = { WORD = "@WORD@" }
shell = 'echo "$WORD" > /srv/word'
[[provision]]
name = "stand-in"
file = { source = "chef-client", destination = "/usr/local/bin/chef-client", mode = "0755" }
[[provision]]
name = "agent"
[provision.cfengine]
policy = "first.cf"
bootstrap = true
keep = true
converge = "once"
[[provision]]
name = "policy"
env = { OWNER = "root" }
cfengine = { policy = "policy", classes = ["pages"], data = "def.json", converge = "once" }
[[provision]]
name = "cookbooks"
[provision.chef]
cookbooks = "cookbooks"
run_list = ["recipe[site]"]
attributes = { page = { port = 80 } }
converge = "once"
[[provision]]
name = "look"
shell = '''
grep -q first /srv/first
grep -q 'first page of root' /srv/page || grep -q 'second page of root' /srv/page
cmp /srv/chef <(echo "file '/srv/chef'")
test -z "$(ls /run/kiln | grep tool)"
test -z "$(systemctl list-unit-files --no-legend --state=enabled 'cf-*' 'cfengine*')"
test -z "$(pgrep -l '^cf-')"
test ! -e /usr/sbin/policy-rc.d
'''
"#;

const FIRST: &str = r#"
bundle agent main { files: "/srv/first" create => "true", edit_line => line; }
bundle edit_line line { insert_lines: "first"; }
"#;

const PAGE: &str = r#"
body common control { bundlesequence => { "page" }; }
bundle agent page
{
  vars: "owner" string => getenv("OWNER", "20");
  files:
    pages::
      "/srv/page" create => "true", edit_line => line("$(def.which) page of $(owner)");
}
bundle edit_line line(text) { insert_lines: "$(text)"; }
"#;

/// Whether each step came from the cache, by its name.
fn cached(ran: &Ran) -> Vec<(String, bool)> {
    let events = ran.events();
    let baked = events.iter().find(|event| event["event"] == "baked").unwrap_or_else(|| panic!("{ran}"));
    let step = |step: &Value| (step["name"].as_str().unwrap().to_owned(), step["cached"].as_bool().unwrap());
    baked["steps"].as_array().unwrap().iter().map(step).collect()
}

#[test]
fn policies_and_cookbooks_run_once_and_what_did_not_change_does_not_run_again() {
    let kiln = Kiln::shared();
    let template = Template::debian("configuration", &STEPS.replace("@WORD@", &new_word()));
    template.write("chef-client", CHEF);
    template.write("first.cf", FIRST);
    template.write("policy/promises.cf", PAGE);
    template.write("def.json", r#"{ "vars": { "which": "first" } }"#);
    template.write("cookbooks/site/recipes/default.rb", "file '/srv/chef'\n");
    template.write("cookbooks/site/metadata.rb", "name 'site'\nversion '1.0.0'\n");
    let first = kiln.ok(&["bake", template.path(), "--json"]);
    let ran: Vec<_> = cached(&first).into_iter().filter(|(_, cached)| !cached).map(|(name, _)| name).collect();
    assert_eq!(ran, ["new", "stand-in", "agent", "policy", "cookbooks", "look"], "{first}");

    assert!(cached(&kiln.ok(&["bake", template.path(), "--json"])).iter().all(|(_, cached)| *cached));

    // One file of a policy: its step and those after it.
    template.write("def.json", r#"{ "vars": { "which": "second" } }"#);
    let changed = kiln.ok(&["bake", template.path(), "--json"]);
    let ran: Vec<_> = cached(&changed).into_iter().filter(|(_, cached)| !cached).map(|(name, _)| name).collect();
    assert_eq!(ran, ["policy", "cookbooks", "look"], "{changed}");

    // What a second run would do again fails the bake, by its name.
    template.write(
        "policy/promises.cf",
        format!("{PAGE}bundle agent again {{ commands: \"/bin/date\"; }}\n").replace("{ \"page\" }", "{ \"page\", \"again\" }"),
    );
    let failed = kiln.run(&["bake", template.path()]);
    failed.fails(1, &["one run of cfengine was not enough: a second one would change commands promise /bin/date", "policy"]);
}

/// A template of the repository: it bakes, its tests pass, and again it does
/// nothing.
fn template_bakes(name: &str) {
    let kiln = Kiln::shared();
    let template = format!("{}/templates/{name}", env!("CARGO_MANIFEST_DIR"));
    kiln.ok(&["bake", &template, "--no-cache"]);
    let page = kiln.ok(&["run", name, "--exec", "curl -fsS http://localhost"]);
    assert!(page.stdout.contains("Hello from a golden image"), "{page}");
    assert!(cached(&kiln.ok(&["bake", &template, "--json"])).iter().all(|(_, cached)| *cached));
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn the_template_of_puppet_bakes_and_no_agent_is_left() {
    template_bakes("debian-puppet");
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn the_template_of_cfengine_bakes_and_no_agent_is_left() {
    template_bakes("debian-cfengine");
}

const SECRETS: &str = r#"
[variables]
token = { env = "TOKEN_OF_CONFIGURATION", sensitive = true }
[[provision]]
name = "puppet"
secrets = ["token"]
puppet = { manifest = "site.pp", bootstrap = true, keep = true, converge = "once" }
[[provision]]
name = "cfengine"
secrets = ["token"]
cfengine = { policy = "policy.cf", bootstrap = true, converge = "once" }
[[provision]]
name = "look"
shell = '''
test "$(cat /root/of-puppet)" = "$(cat /root/of-cfengine)"
grep -q 'puppet apply' /root/processes-of-puppet
grep -q cf-agent /root/processes-of-cfengine
'''
"#;

const SECRET_OF_PUPPET: &str = r"
$token = Sensitive(file('/run/kiln/secrets/token'))
file { '/root/of-puppet': content => sha256($token.unwrap) }
exec { 'processes': command => '/bin/ps -eww -o args > /root/processes-of-puppet', creates => '/root/processes-of-puppet', provider => shell }
";

const SECRET_OF_CFENGINE: &str = r#"
bundle agent main
{
  vars: "token" string => readfile("/run/kiln/secrets/token", "100");
    "digest" string => hash("$(token)", "sha256");
  files: "/root/of-cfengine" create => "true", edit_line => line("$(digest)");
  commands: "/bin/ps -eww -o args > /root/processes-of-cfengine" contain => shell, if => not(fileexists("/root/processes-of-cfengine"));
}
bundle edit_line line(text) { insert_lines: "$(text)"; }
body contain shell { useshell => "useshell"; }
"#;

#[test]
#[ignore = "takes minutes: ci/prove"]
fn a_secret_given_to_a_tool_is_nowhere_afterwards_and_what_is_not_idempotent_is_named() {
    let kiln = Kiln::fresh();
    crate::context::share(&Kiln::shared(), &kiln, "bases");
    let template = Template::debian("configured-secretly", SECRETS);
    template.write("site.pp", SECRET_OF_PUPPET);
    template.write("policy.cf", SECRET_OF_CFENGINE);
    let secret = "t0ken-5e1a90c7fb22";
    let bake = |arguments: &[&str]| {
        let arguments = [&["bake", template.path(), "--json"], arguments].concat();
        Ran::of(kiln.command(&arguments).env("TOKEN_OF_CONFIGURATION", secret).output().unwrap(), &arguments)
    };
    let ran = bake(&[]);
    assert_eq!(ran.status, 0, "{ran}");
    assert!(!ran.stdout.contains(secret) && !ran.stderr.contains(secret));
    let raw = template.0.path().join("disk.raw");
    kiln.ok(&["export", "configured-secretly", "-f", "raw", "-o", raw.to_str().unwrap()]);
    assert!(!contains(&raw, secret), "the secret is in the image, or was in the list of processes");
    assert!(contains(&raw, "--detailed-exitcodes"), "the search finds what is there");
    // Ledger, history, keys, provenance, checkpoints; the bases are shared.
    let found = tool("sh", &["-c", &format!("grep -rlaF {secret} {} || true", kiln.home.display())]);
    assert_eq!(found, "");

    // A resource that is not idempotent, with the same secret.
    template.write("site.pp", format!("{SECRET_OF_PUPPET}exec {{ '/bin/date': }}\n"));
    let failed = bake(&[]);
    failed.fails(1, &["one run of puppet was not enough: a second one would change /Stage[main]/Main/Exec[/bin/date]"]);
    assert!(!failed.stdout.contains(secret) && !failed.stderr.contains(secret));
}

//! `ansible` on real guests.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::context::{Kiln, Ran, Template, contains, tool, with_base};

const TEMPLATE: &str = r#"
[variables]
vault = { env = "VAULT_OF_TEST", sensitive = true }
token = { env = "TOKEN_OF_TEST", sensitive = true }
[[provision]]
name = "watch"
shell = '''
systemd-run -q --unit watch sh -c 'while :; do cat /proc/[0-9]*/cmdline; sleep 1; done > /run/seen 2> /dev/null'
sleep 6  # so that it is worth keeping
'''
[[provision]]
name = "role"
secrets = ["vault", "token"]
[provision.ansible]
playbook = "play/site.yml"
vault_password = "vault"
secret_vars = { token = "token" }
extra_vars = { greeting = "ahoy" }
converge = "once"
[[provision]]
name = "after"
secrets = ["vault", "token"]
shell = '''
systemctl stop watch
grep -a -c python3 /run/seen
for secret in vault token; do
  if grep -a -q -F -f /run/kiln/secrets/$secret /run/seen; then echo "$secret was on a command line" >&2; exit 1; fi
done
test -z "$(ls -A /dev/shm | grep ansible)"
test ! -e /root/.ansible
! journalctl -b -o cat | grep -q "Invoked with"
'''
"#;

const TASKS: &str = "
- name: write the greeting
  ansible.builtin.copy: { content: \"{{ greeting }}\\n\", dest: /etc/greeting, mode: '0644' }
- name: use the secrets
  ansible.builtin.shell: sha256sum > /etc/digest
  args: { creates: /etc/digest, stdin: '{{ token }} {{ closed }}' }
";

const SECRETS: [&str; 3] = ["vault-pass-7d1f03", "db-t0ken-90ac4e", "closed-word-31be7c"];

/// What stands on the command lines of this machine.
struct Processes {
    stop: Arc<AtomicBool>,
    taker: std::thread::JoinHandle<BTreeSet<Vec<u8>>>,
}

impl Processes {
    fn watch() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let taker = std::thread::spawn(move || {
            let mut seen = BTreeSet::new();
            while !stopped.load(Ordering::Relaxed) {
                for entry in std::fs::read_dir("/proc").unwrap().flatten() {
                    seen.extend(std::fs::read(entry.path().join("cmdline")));
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            seen
        });
        Self { stop, taker }
    }

    fn seen(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        self.taker.join().unwrap().iter().map(|line| String::from_utf8_lossy(line).replace('\0', " ") + "\n").collect()
    }
}

fn bake(kiln: &Kiln, template: &Template) -> Ran {
    let arguments = ["bake", template.path(), "--json"];
    let mut command = kiln.command(&arguments);
    Ran::of(command.env("VAULT_OF_TEST", SECRETS[0]).env("TOKEN_OF_TEST", SECRETS[1]).output().unwrap(), &arguments)
}

/// The steps that ran.
fn ran(ran: &Ran) -> Vec<String> {
    assert_eq!(ran.status, 0, "{ran}");
    let events = ran.events();
    let baked = events.iter().find(|event| event["event"] == "baked").unwrap();
    let steps = baked["steps"].as_array().unwrap().iter().filter(|step| step["cached"] != true);
    steps.map(|step| step["name"].as_str().unwrap().to_owned()).collect()
}

fn close(folder: &Path, text: &str) -> String {
    let [password, plain] = ["password", "plain"].map(|name| folder.join(name));
    std::fs::write(&password, SECRETS[0]).unwrap();
    std::fs::write(&plain, text).unwrap();
    let [password, plain] = [&password, &plain].map(|path| path.to_str().unwrap());
    tool("ansible-vault", &["encrypt", "--output", "-", "--vault-password-file", password, plain])
}

#[test]
fn a_role_is_baked_once_proven_and_its_secrets_are_nowhere() {
    let kiln = with_base();
    let template = Template::debian("ansible", TEMPLATE);
    template.write("play/site.yml", "- hosts: all\n  roles: [greeter]\n");
    template.write("play/roles/greeter/tasks/main.yml", TASKS);
    let apart = tempfile::tempdir().unwrap();
    template.write("play/group_vars/all.yml", close(apart.path(), &format!("closed: {}\n", SECRETS[2])));

    let processes = Processes::watch();
    let first = bake(&kiln, &template);
    let seen = processes.seen();
    assert_eq!(ran(&first), ["watch", "role", "after"], "{first}");
    assert!(first.stderr.contains("asking ansible what a second run would change") || first.stdout.contains("asking ansible"), "{first}");
    assert!(seen.contains("ansible-playbook") && seen.contains("--check"), "the processes were seen");

    // Nothing changed: nothing runs.
    assert!(ran(&bake(&kiln, &template)).is_empty());
    // A task changed: its step runs, and those after it.
    template.write("play/roles/greeter/tasks/main.yml", TASKS.replace("{{ greeting }}", "{{ greeting }}!"));
    let again = bake(&kiln, &template);
    assert_eq!(ran(&again), ["role", "after"], "{again}");

    // One that is not idempotent fails the bake, by name.
    template.write("play/roles/greeter/tasks/more.yml", "- name: one more line\n  ansible.builtin.shell: date >> /etc/lines\n");
    template.write("play/roles/greeter/tasks/main.yml", format!("{TASKS}\n- import_tasks: more.yml\n"));
    let failed = bake(&kiln, &template);
    failed.fails(1, &["a second one would change greeter : one more line (ansible.builtin.shell) on kiln"]);

    let raw = template.0.path().join("disk.raw");
    kiln.ok(&["export", "ansible", "-f", "raw", "-o", raw.to_str().unwrap()]);
    assert!(contains(&raw, "ahoy!"), "the search finds what is there");
    for secret in SECRETS {
        assert!(!seen.contains(secret), "{secret} was on a command line");
        for said in [&first, &again, &failed] {
            assert!(!said.stdout.contains(secret) && !said.stderr.contains(secret), "{secret} in {said}");
        }
        assert!(!contains(&raw, secret), "{secret} is in the image");
        let found = tool("sh", &["-c", &format!("grep -rlaF {secret} {} || true", kiln.home.display())]);
        assert_eq!(found, "", "{secret} is kept");
    }
    assert_eq!(kiln.leftovers(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn mistakes_are_found_before_anything_boots() {
    let kiln = Kiln::fresh();
    let template = Template::debian(
        "ansible-mistakes",
        "[[provision]]\n[provision.ansible]\nplaybook = \"site.yml\"\nvault_password = \"vault\"\ntag = [\"x\"]\n",
    );
    template.write("site.yml", "- hosts: all\n");
    kiln.run(&["validate", template.path()]).fails(2, &["did you mean `tags`?"]);
    let text = std::fs::read_to_string(template.0.path().join("kiln.toml")).unwrap();
    template.write("kiln.toml", text.replace("tag = [\"x\"]\n", ""));
    let said = ["`ansible` uses the secret `vault`, which the step does not get", "write secrets = [\"vault\"] above"];
    kiln.run(&["validate", template.path()]).fails(2, &said);
    kiln.ok(&["validate", concat!(env!("CARGO_MANIFEST_DIR"), "/templates/debian-ansible")]);
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn the_template_serves_its_page_and_keeps_no_agent() {
    let kiln = Kiln::shared();
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/templates/debian-ansible");
    kiln.ok(&["bake", template, "--no-cache"]);
    // The test of the template has fetched the page.
    let run =
        kiln.run(&["run", "debian-ansible", "--exec", "curl -fsS http://localhost; dpkg -s python3-apt 2>&1 | grep -c 'not installed'"]);
    assert!(run.stdout.contains("Hello from a golden image, by Ansible") && run.stdout.ends_with("1\n"), "{run}");
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn inside_the_guest_ansible_comes_and_goes() {
    let kiln = Kiln::shared();
    let body = "[[provision]]\nname = \"before\"\nshell = 'dpkg-query -W > /root/before'\n\
                [[provision]]\n[provision.ansible]\nplaybook = \"play/site.yml\"\nfrom = \"guest\"\nbootstrap = true\nconverge = \"once\"\n\
                [[provision]]\nname = \"after\"\nshell = 'dpkg-query -W | diff /root/before -; grep inside /etc/greeting; ! command -v ansible'\n";
    let template = Template::debian("ansible-inside", body);
    template.write(
        "play/site.yml",
        "- hosts: all\n  tasks:\n    - copy: { content: \"inside {{ ansible_distribution }}\\n\", dest: /etc/greeting }\n",
    );
    kiln.ok(&["bake", template.path(), "--no-cache"]);
}

#[test]
fn what_is_missing_here_is_told_before_a_machine_is_started() {
    let kiln = Kiln::shared();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // Everything that this machine has, but for Ansible.
    for place in std::env::split_paths(&std::env::var_os("PATH").unwrap()) {
        for program in std::fs::read_dir(place).into_iter().flatten().flatten() {
            if !program.file_name().to_string_lossy().starts_with("ansible") {
                drop(std::os::unix::fs::symlink(program.path(), folder.path().join(program.file_name())));
            }
        }
    }
    let template = Template::debian("no-ansible", "[[provision]]\nname = \"site\"\nansible = { playbook = \"site.yml\" }\n");
    template.write("site.yml", "- hosts: all\n");
    let arguments = ["bake", template.path()];
    let ran = Ran::of(kiln.command(&arguments).env("PATH", folder.path()).output().unwrap(), &arguments);
    ran.fails(1, &["step: site", "`ansible-playbook` is missing", "apt-get install ansible-core"]);
    assert!(!ran.stderr.contains("boot"), "{ran}");

    let test = "[[provision]]\nname = \"a\"\nshell = \"true\"\n[[test]]\nname = \"infra\"\ntestinfra = { paths = [\"test_a.py\"], python = \"./none\" }\n";
    let template = Template::debian("no-testinfra", test);
    template.write("test_a.py", "def test_a(host): pass\n");
    let ran = kiln.run(&["bake", template.path()]);
    ran.fails(1, &["step: infra", "there is no ", "python3-venv"]);
    assert!(!ran.stderr.contains("boot"), "{ran}");
}

//! `ansible` on a guest behind a real sshd: the real `ansible-playbook`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking; clippy knows only `#[test]` functions as tests")]

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_model::event::Reports;
use kiln_model::provision::{Common, Provisioner, Step};
use kiln_model::secret::{Redactor, Secret};
use kiln_model::settings::{Problems, Value};
use kiln_model::{Code, Result};
use kiln_ssh::testing::Sshd;

use common::{Log, node, string, strings, table};

/// A guest, and the folder that a template would be in.
struct Kitchen {
    sshd: Sshd,
    folder: tempfile::TempDir,
    work: tempfile::TempDir,
    common: Common,
    secrets: BTreeMap<String, Secret>,
}

impl Kitchen {
    fn new() -> Self {
        let [folder, work] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let common = Common { name: "step".into(), ..Common::default() };
        Self { sshd: Sshd::start(), folder, work, common, secrets: BTreeMap::new() }
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn secret(&mut self, name: &str, value: &str) {
        self.common.secrets.push(name.into());
        self.secrets.insert(name.into(), Secret::new(value));
    }

    /// A file of the guest, which is this machine.
    fn there(&self, name: &str) -> String {
        self.sshd.path().join(name).to_str().unwrap().to_owned()
    }

    fn read(&self, entries: &[(&str, Value)]) -> Box<dyn Provisioner> {
        let kind = kiln_provisioners::all().into_iter().find(|kind| kind.name() == "ansible").unwrap();
        let mut problems = Problems::default();
        let read = kind.read(&node(table(entries)), self.folder.path(), &mut problems);
        assert!(problems.is_empty(), "{:?}", problems.0);
        read.unwrap()
    }

    async fn run(&self, entries: &[(&str, Value)]) -> (Result<()>, String) {
        let there = ("there", string(self.sshd.path().to_str().unwrap()));
        let mut entries = entries.to_vec();
        let extra = entries.iter().position(|(name, _)| *name == "extra_vars").map(|at| entries.remove(at).1);
        let mut given = vec![there];
        if let Some(Value::Table(table)) = &extra {
            given.extend(table.entries.iter().map(|entry| (entry.name.as_str(), entry.node.value.clone())));
        }
        entries.push(("extra_vars", table(&given)));
        let step = self.read(&entries);
        let log = Arc::new(Log::default());
        let reports = Reports::new(log.clone(), Redactor::default());
        let guest = self.sshd.guest().await;
        let step_ = Step { guest, common: &self.common, reports: &reports, secrets: &self.secrets, work: self.work.path() };
        let result = step.run(&step_).await;
        let lines = log.lines().join("\n");
        // Whatever became of it, nothing of it stays.
        assert_eq!(std::fs::read_dir(self.work.path()).unwrap().count(), 0);
        (result, lines)
    }
}

/// A play for the guest with these tasks.
fn play(tasks: &str) -> String {
    format!("- hosts: all\n  gather_facts: false\n  tasks:\n{tasks}")
}

const ROLE: &str = r#"
- name: the folder
  file: { path: "{{ there }}/conf", state: directory, mode: "0750" }
- name: the page
  template: { src: page.j2, dest: "{{ there }}/conf/page" }
  notify: say so
- name: look
  command: cat {{ there }}/conf/page
  register: page
  changed_when: false
- name: each
  copy: { content: "{{ item }}\n", dest: "{{ there }}/conf/{{ item }}" }
  loop: [one, two]
- name: once
  shell: date > {{ there }}/conf/once
  args: { creates: "{{ there }}/conf/once" }
"#;

fn with_role(kitchen: &Kitchen) -> Vec<(&'static str, Value)> {
    kitchen.write("shared/web/tasks/main.yml", ROLE);
    kitchen.write("shared/web/handlers/main.yml", "- name: say so\n  shell: echo told >> {{ there }}/told\n");
    kitchen.write(
        "shared/web/templates/page.j2",
        "{{ greeting }} from {{ inventory_hostname }}, {{ count + 1 }}, {{ of_group }}, {{ lookup('env', 'SAID') }}\n",
    );
    kitchen.write("site.yml", "- hosts: web\n  gather_facts: false\n  roles: [web]\n");
    kitchen.write("group_vars/web.yml", "of_group: grouped\n");
    kitchen.write("kiln.toml", "");
    vec![
        ("playbook", string("site.yml")),
        ("roles", strings(&["shared"])),
        ("groups", strings(&["web"])),
        ("extra_vars", table(&[("greeting", string("it's me")), ("count", Value::Integer(2))])),
        ("converge", string("once")),
    ]
}

#[tokio::test]
async fn a_role_is_applied_and_converges() {
    let mut kitchen = Kitchen::new();
    kitchen.common.env.insert("SAID".into(), "from env".into());
    // What is not declared is not used, whatever stands beside it.
    kitchen.write("ansible.cfg", "[defaults]\nstdout_callback = no_such_callback\n");
    let settings = with_role(&kitchen);
    let (result, lines) = kitchen.run(&settings).await;
    result.unwrap();
    assert!(lines.contains("TASK [web : the page]") && lines.contains("failed=0"), "{lines}");
    let page = std::fs::read_to_string(kitchen.there("conf/page")).unwrap();
    assert_eq!(page, "it's me from kiln, 3, grouped, from env\n");
    assert_eq!(std::fs::read_to_string(kitchen.there("told")).unwrap(), "told\n");
    assert_eq!(std::fs::read_to_string(kitchen.there("conf/two")).unwrap(), "two\n");
    assert_eq!(std::fs::metadata(kitchen.there("conf")).unwrap().permissions().mode() & 0o777, 0o750);
    let left =
        std::fs::read_dir("/dev/shm").unwrap().flatten().filter(|entry| entry.file_name().to_str().unwrap().starts_with("kiln-ansible-"));
    // Other tests run at the same time: what is left is old.
    assert_eq!(left.filter(|entry| entry.metadata().unwrap().modified().unwrap().elapsed().unwrap() > Duration::from_secs(90)).count(), 0);
}

#[tokio::test]
async fn what_a_second_run_would_change_is_named() {
    let kitchen = Kitchen::new();
    let mut settings = with_role(&kitchen);
    kitchen.write(
        "shared/web/tasks/more.yml",
        r#"
- name: the time
  copy: { content: "{{ lookup('pipe', 'date +%N') }}", dest: "{{ there }}/conf/time" }
- name: one more line
  shell: date >> {{ there }}/conf/log
- name: quiet
  copy: { content: "{{ lookup('pipe', 'date +%N') }}", dest: "{{ there }}/conf/quiet" }
  no_log: true
- name: hidden command
  command: touch {{ there }}/conf/hidden
  no_log: true
"#,
    );
    kitchen.write("shared/web/tasks/main.yml", &format!("{ROLE}\n- import_tasks: more.yml\n"));
    let (result, lines) = kitchen.run(&settings).await;
    let error = result.unwrap_err();
    assert_eq!((error.kind(), error.step_name()), (Code::Step, Some("step")));
    let place = kitchen.there("conf/time");
    let first = format!("web : the time (copy) on kiln: {place}");
    assert_eq!(error.to_string(), format!("one run of ansible was not enough: a second one would change {first} and 3 more"), "{lines}");
    let expected = format!(
        "{first}\nweb : one more line (shell) on kiln: it would run again\nweb : quiet (copy) on kiln\nweb : hidden command (command) on kiln: it would run again"
    );
    assert_eq!(error.details()[0], expected);
    // Only looked at, not done again.
    assert_eq!(std::fs::read_to_string(kitchen.there("conf/log")).unwrap().lines().count(), 1);

    // Who does not ask for the proof gets none.
    settings.retain(|(name, _)| *name != "converge");
    kitchen.run(&settings).await.0.unwrap();
}

#[tokio::test]
async fn a_failed_task_is_named_and_what_is_withheld_stays_so() {
    let kitchen = Kitchen::new();
    let settings = [("playbook", string("site.yml"))];
    let fails = async |tasks: &str| {
        kitchen.write("site.yml", &play(tasks));
        kitchen.run(&settings).await.0.unwrap_err()
    };
    let error = fails("    - name: break\n      shell: echo why >&2; exit 3\n").await;
    assert_eq!((error.kind(), error.step_name()), (Code::Step, Some("step")));
    assert_eq!(error.to_string(), "ansible: task `break (shell) on kiln` failed: non-zero return code");
    assert_eq!(error.details(), ["why"]);
    let error = fails("    - name: quiet\n      shell: echo s3cret-word >&2; exit 3\n      no_log: true\n").await;
    assert_eq!(error.to_string(), "ansible: task `quiet (shell) on kiln` failed: its output is hidden (no_log)");
    assert!(!format!("{error:?}").contains("s3cret-word"));
    let error = fails("    - name: some\n      command: \"{{ item }}\"\n      loop: ['true', 'false', 'no-such-program']\n").await;
    assert!(error.to_string().contains("`some (command) on kiln` failed: non-zero return code; "), "{error:?}");
    let error = fails("    - no_such_module: {}\n").await;
    assert!(error.to_string().contains("couldn't resolve module/action 'no_such_module'"), "{error:?}");
    // What was expected is no failure.
    kitchen.write("site.yml", &play("    - command: 'false'\n      ignore_errors: true\n    - block:\n        - command: 'false'\n      rescue:\n        - command: 'true'\n"));
    kitchen.run(&settings).await.0.unwrap();
    // A play for others is none for the guest.
    kitchen.write("site.yml", "- hosts: db\n  tasks: [{ command: 'true' }]\n");
    let error = kitchen.run(&settings).await.0.unwrap_err();
    assert_eq!(error.to_string(), "ansible: no play matched the guest, and so nothing was done");
    // Neither is what the step does not name.
    kitchen.write(
        "sub/site.yml",
        "- hosts: all\n  gather_facts: false\n  tasks:\n    - copy: { src: ../outside, dest: '{{ there }}/outside' }\n",
    );
    kitchen.write("outside", "x");
    let error = kitchen.run(&[("playbook", string("sub/site.yml"))]).await.0.unwrap_err();
    assert!(error.to_string().contains("Could not find or access '../outside'"), "{error:?}");
}

/// Command lines of all processes, taken until it is dropped.
struct Processes {
    stop: Arc<std::sync::atomic::AtomicBool>,
    taker: Option<std::thread::JoinHandle<String>>,
}

impl Processes {
    fn watch() -> Self {
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        let taker = std::thread::spawn(move || {
            let mut seen = std::collections::BTreeSet::new();
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                for entry in std::fs::read_dir("/proc").unwrap().flatten() {
                    seen.insert(std::fs::read(entry.path().join("cmdline")).unwrap_or_default());
                    seen.insert(std::fs::read(entry.path().join("environ")).unwrap_or_default());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            seen.into_iter().map(|line| String::from_utf8_lossy(&line).replace('\0', " ") + "\n").collect()
        });
        Self { stop, taker: Some(taker) }
    }

    fn seen(mut self) -> String {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.taker.take().unwrap().join().unwrap()
    }
}

/// Encrypts as the user would have done.
fn vault(folder: &Path, password: &str, text: &str) -> String {
    let file = folder.join("password");
    std::fs::write(&file, password).unwrap();
    let plain = folder.join("plain");
    std::fs::write(&plain, text).unwrap();
    let output = std::process::Command::new("ansible-vault")
        .args(["encrypt", "--output", "-", "--vault-password-file"])
        .args([&file, &plain])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn secrets_open_vaults_and_are_seen_nowhere() {
    let mut kitchen = Kitchen::new();
    let (password, token) = ("vault-pass-83ab1", "db-t0ken-55cd2");
    let other = tempfile::tempdir().unwrap();
    kitchen.write("group_vars/all.yml", &vault(other.path(), password, "inside: from-the-vault-9912\n"));
    kitchen.write(
        "site.yml",
        &play("    - copy: { content: \"{{ inside }}\", dest: \"{{ there }}/inside\", mode: '0600' }\n    - shell: sleep 1; wc -c\n      args: { stdin: \"{{ db_password }}\" }\n      register: counted\n      changed_when: false\n      no_log: true\n    - debug: { msg: \"{{ counted.stdout }} bytes\" }\n"),
    );
    kitchen.secret("vault", password);
    kitchen.secret("token", token);
    let settings = [
        ("playbook", string("site.yml")),
        ("vault_password", string("vault")),
        ("secret_vars", table(&[("db_password", string("token"))])),
        ("verbose", Value::Boolean(true)),
    ];
    let processes = Processes::watch();
    let (result, lines) = kitchen.run(&settings).await;
    let seen = processes.seen();
    result.unwrap();
    assert_eq!(std::fs::read_to_string(kitchen.there("inside")).unwrap(), "from-the-vault-9912");
    assert!(lines.contains(&format!("{} bytes", token.len() + 1)), "{lines}");
    assert!(
        seen.contains("ansible-playbook") && seen.contains("ansible-tmp") | seen.contains("/usr/bin/python3"),
        "the processes were seen"
    );
    for secret in [password, token, "from-the-vault-9912"] {
        assert!(!lines.contains(secret), "{lines}");
        assert!(!seen.contains(secret), "{secret} was seen");
    }
    // Without its password the vault stays closed, and a name is not enough.
    kitchen.secrets.insert("vault".into(), Secret::new("another"));
    let error = kitchen.run(&settings).await.0.unwrap_err();
    assert!(error.to_string().contains("Decryption failed"), "{error:?}");
    kitchen.secrets.clear();
    let error = kitchen.run(&settings).await.0.unwrap_err();
    assert_eq!((error.kind(), error.next_move()), (Code::Usage, Some("write secrets = [\"token\"] into its [[provision]]")));
}

#[tokio::test]
async fn a_step_of_a_user_runs_as_that_user() {
    let mut kitchen = Kitchen::new();
    kitchen.common.user = Some("nobody".into());
    let tasks = "    - command: id -un\n      register: me\n    - command: id -un\n      become_user: root\n      register: other\n    - debug: { msg: \"{{ me.stdout }} and {{ other.stdout }}\" }\n    - copy: { content: x, dest: /dev/shm/kiln-test-of-nobody }\n";
    kitchen.write("site.yml", &play(tasks));
    let (result, lines) = kitchen.run(&[("playbook", string("site.yml"))]).await;
    result.unwrap();
    assert!(lines.contains("nobody and root"), "{lines}");
    std::fs::remove_file("/dev/shm/kiln-test-of-nobody").unwrap();
}

#[tokio::test]
async fn what_takes_too_long_is_killed_here_and_there() {
    let mut kitchen = Kitchen::new();
    kitchen.common.timeout = Some(Duration::from_secs(4));
    kitchen.write("site.yml", &play("    - command: sleep 9417\n"));
    let began = Instant::now();
    let error = kitchen.run(&[("playbook", string("site.yml"))]).await.0.unwrap_err();
    assert_eq!((error.kind(), error.step_name()), (Code::Timeout, Some("step")));
    assert!(began.elapsed() < Duration::from_secs(40));
    let alive = std::process::Command::new("pgrep").args(["-f", "^sleep 9417"]).output().unwrap();
    assert!(alive.stdout.is_empty());

    // A bake that is interrupted drops the step.
    kitchen.common.timeout = None;
    kitchen.write("site.yml", &play("    - command: sleep 45\n"));
    let settings = [("playbook", string("site.yml"))];
    assert!(tokio::time::timeout(Duration::from_secs(4), kitchen.run(&settings)).await.is_err());
    let end = Instant::now() + Duration::from_secs(10);
    let work = kitchen.work.path().to_str().unwrap().to_owned();
    while std::process::Command::new("pgrep").args(["-f", &work]).output().unwrap().stdout != b"" {
        assert!(Instant::now() < end, "ansible-playbook outlives its step");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn inside_the_guest_it_does_the_same() {
    let mut kitchen = Kitchen::new();
    kitchen.common.env.insert("SAID".into(), "from env".into());
    let mut settings = with_role(&kitchen);
    settings.push(("from", string("guest")));
    kitchen.run(&settings).await.0.unwrap();
    assert_eq!(std::fs::read_to_string(kitchen.there("conf/page")).unwrap(), "it's me from kiln, 3, grouped, from env\n");
    kitchen.write("shared/web/tasks/main.yml", "- name: one more line\n  shell: date >> {{ there }}/log\n");
    let error = kitchen.run(&settings).await.0.unwrap_err();
    assert_eq!(
        error.to_string(),
        "one run of ansible was not enough: a second one would change web : one more line (shell) on kiln: it would run again"
    );
    kitchen.write("shared/web/tasks/main.yml", "- name: break\n  shell: echo why >&2; exit 3\n");
    let error = kitchen.run(&settings).await.0.unwrap_err();
    assert_eq!(error.to_string(), "ansible: task `web : break (shell) on kiln` failed: non-zero return code\nwhy");
}

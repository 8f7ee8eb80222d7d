//! `kiln drift`: a machine beside its image.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::context::{Kiln, Ran, Template, tool, wait_until};

/// Packages to add, to remove and to upgrade, and paths that may change.
const TEMPLATE: &str = r#"
[drift]
mutable = ["/var/lib/app", "/etc/app/*.db"]

[[provision]]
name = "packages and an app"
shell = '''
mkdir -p /opt/debs /var/lib/app /etc/app
make() {
  folder=$(mktemp -d)
  mkdir -p "$folder/DEBIAN" "$folder/usr/share/$1"
  printf 'Package: %s\nVersion: %s\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: one\n' "$1" "$2" \
    > "$folder/DEBIAN/control"
  echo "$2" > "$folder/usr/share/$1/data"
  chmod 755 "$folder"
  dpkg-deb --root-owner-group --build "$folder" "/opt/debs/$1-$2.deb"
}
make kiln-gone 1; make kiln-old 1; make kiln-old 2; make kiln-new 1
dpkg -i /opt/debs/kiln-gone-1.deb /opt/debs/kiln-old-1.deb
echo one > /var/lib/app/data
echo one > /etc/app/a.db
echo one > /etc/app/a.conf
'''
"#;

fn baked(kiln: &Kiln) {
    kiln.ok(&["bake", Template::debian("drifter", TEMPLATE).path()]);
}

/// A machine of an image, as `kiln run` starts it.
struct Guest {
    child: Child,
    arguments: Vec<String>,
}

impl Guest {
    fn start(kiln: &Kiln, image: &str, log: &std::path::Path) -> Self {
        let said = std::fs::File::create(log).unwrap();
        let child = kiln.command(&["run", image]).stdout(Stdio::null()).stderr(said).spawn().unwrap();
        let mut guest = Self { child, arguments: Vec::new() };
        let line = || {
            let text = std::fs::read_to_string(log).unwrap();
            text.lines().find_map(|line| Some(line.split_once("reach it with: ssh ")?.1.to_owned()))
        };
        wait_until(Duration::from_secs(400), || line().is_some());
        guest.arguments = line().unwrap().split(' ').map(Into::into).collect();
        // While it boots, Debian lets sshd begin anew when the network is up.
        let settled = || guest.ssh("systemctl is-system-running --wait || true").output().unwrap().status.success();
        wait_until(Duration::from_secs(400), settled);
        guest
    }

    fn ssh(&self, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(&self.arguments).arg(command);
        ssh
    }

    /// Runs a script in it; it has to succeed.
    #[track_caller]
    fn shell(&self, script: &str) -> String {
        let mut ssh = self.ssh("bash -euo pipefail -s");
        let mut child = ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}\n{script}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What follows an option of ssh's.
    fn after(&self, option: &str) -> &str {
        let found = self.arguments.iter().position(|argument| argument == option).and_then(|at| self.arguments.get(at + 1));
        found.unwrap_or_else(|| panic!("{option}: {:?}", self.arguments))
    }

    fn drift(&self, kiln: &Kiln, image: &str, more: &[&str]) -> Ran {
        self.drift_as("root", kiln, image, more)
    }

    fn drift_as(&self, user: &str, kiln: &Kiln, image: &str, more: &[&str]) -> Ran {
        let host = format!("{user}@127.0.0.1:{}", self.after("-p"));
        let known = self.arguments.iter().find_map(|argument| argument.strip_prefix("UserKnownHostsFile=")).unwrap();
        let fixed = ["drift", image, "--host", &host, "-i", self.after("-i"), "--known-hosts", known];
        kiln.run(&[&fixed, more].concat())
    }

    /// What of its disk was written to while `work` ran, outside of where
    /// machines write by themselves.
    fn writes_nothing<T>(&self, work: impl FnOnce() -> T) -> T {
        // A moment's pause: times of inodes go by the clock's ticks.
        let before = self.shell("sync; sleep 1; date +%s.%N").trim().to_owned();
        let done = work();
        let touched = self.shell(&format!(
            "find / -xdev \\( -path /run -o -path /dev -o -path /proc -o -path /sys -o -path /var/log -o -path /var/lib/systemd \\) \
             -prune -o -newerct @{before} -print; \
             find /tmp /var/tmp /dev/shm -newerct @{before}"
        ));
        assert_eq!(touched, "");
        done
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}

/// The same numbers for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    /// Takes one out.
    fn take(&mut self, list: &mut Vec<String>) -> String {
        let at = self.below(list.len());
        list.swap_remove(at)
    }
}

/// A path that has to be found, with what happened to it: `changed mode`.
type Expected = BTreeMap<String, String>;

/// Random edits as a script, and what has to be found of them: paths and units.
fn edits(guest: &Guest, random: &mut Random, count: usize) -> (String, Expected, BTreeSet<String>) {
    let list = |script: &str| -> Vec<String> { guest.shell(script).lines().map(Into::into).collect() };
    // What is edited must not be what the guest needs to answer.
    let mut files = list(
        "find /usr/share /usr/lib/python3 /usr/lib/systemd/system /etc /opt /boot -xdev -type f -size +1c \
         ! -path '/etc/ssh/*' ! -path '/etc/pam.d/*' ! -path '/etc/security/*' ! -path '/etc/ld.so*' ! -path '/etc/passwd*' \
         ! -path '/etc/shadow*' ! -path '/etc/group*' ! -path '/etc/gshadow*' ! -path '/etc/machine-id' ! -path '/etc/nsswitch*' \
         ! -path '/etc/app/*' ! -path '/opt/debs/*' ! -path '/etc/systemd/system/*' ! -path '/usr/share/kiln-*' ! -path '*[ \\]*' \
         ! -path '/usr/lib/systemd/system/*' | sort",
    );
    let mut programs = list("find /usr/bin /usr/sbin -xdev -type f -perm 755 | sort");
    let mut links = list("find /usr/share /etc/alternatives /etc/rc*.d -xdev -type l ! -path '*[ \\]*' | sort");
    let mut folders = list(
        "find /usr/share /usr/lib /etc /var/lib /srv /opt /home -xdev -type d ! -path '*[ \\]*' ! -path '/etc/app*' \
                            ! -path '/var/lib/app*' ! -path '/var/lib/systemd*' ! -path '/var/lib/apt*' ! -path '/var/lib/dpkg*' \
                            ! -path '/var/lib/dhcp*' ! -path '/etc/systemd/*' ! -path '/usr/lib/systemd*' ! -path '/etc/ssh*' | sort",
    );
    let mut units = list(
        "cd /usr/lib/systemd/system; for u in *.service *.timer; do \
                          [ ! -f $u ] || [ -L $u ] || [ -e /etc/systemd/system/$u ] || case $u in *@*|ssh*|systemd-*) ;; *) echo $u ;; esac; done",
    );
    let mut wanted = list("find /etc/systemd/system -path '*.wants/*' -type l | sort");
    let (mut script, mut expected, mut expected_units) = (String::new(), Expected::new(), BTreeSet::new());
    let mut expect = |path: String, what: &str| drop(expected.insert(path, what.to_owned()));
    let name = |path: &str| path.rsplit('/').next().unwrap().to_owned();
    for number in 0..count {
        match number % 12 {
            0 => {
                let file = random.take(&mut files);
                script += &format!("echo more >> {file}\n");
                expect(file, "changed content");
            }
            1 => {
                // As large as before, and as old.
                let file = random.take(&mut files);
                script += &format!(
                    "touch -r {file} /run/as-old; b=$(head -c 1 {file} | od -An -tu1); \
                     printf \"\\\\$(printf %03o $(( (b + 1) % 256 )))\" | dd of={file} conv=notrunc status=none; touch -r /run/as-old {file}\n"
                );
                expect(file, "changed content");
            }
            2 => {
                let program = random.take(&mut programs);
                script += &format!("chmod {} {program}\n", ["4755", "700", "777", "2755"][random.below(4)]);
                expect(program, "changed mode");
            }
            3 => {
                let file = random.take(&mut files);
                script += &format!("chown {} {file}\n", ["nobody", "1:0", ":4", "65533:65533"][random.below(4)]);
                expect(file, "changed owner");
            }
            4 => {
                let file = random.take(&mut files);
                script += &format!("rm {file}\n");
                expect(file, "removed ");
            }
            5 => {
                let file = format!("{}/a file-{number}", random.take(&mut folders));
                script += &format!("echo new > '{file}'\n");
                expect(file, "added ");
            }
            6 => {
                let folder = format!("{}/folder-{number}", random.take(&mut folders));
                script += &format!("mkdir {folder}; printf x > $'{folder}/two\\nlines'\n");
                expect(format!("{folder}/two\\nlines"), "added ");
                expect(folder, "added ");
            }
            7 => {
                let link = random.take(&mut links);
                script += &format!("ln -sfn /nowhere/{number} {link}\n");
                expect(link, "changed target");
            }
            8 => {
                let file = random.take(&mut files);
                script += &format!("mv {file} /run/moved-{number}; ln -s /run/moved-{number} {file}\n");
                expect(file, "changed type");
            }
            9 => {
                let unit = random.take(&mut units);
                script += &format!("ln -s /dev/null /etc/systemd/system/{unit}\n");
                expect(format!("/etc/systemd/system/{unit}"), "added ");
                expected_units.insert(unit);
            }
            10 if wanted.len() > 2 => {
                let link = random.take(&mut wanted);
                script += &format!("rm {link}\n");
                expected_units.insert(name(&link));
                expect(link, "removed ");
            }
            _ => {
                let unit = random.take(&mut units);
                script += &format!("mkdir /etc/systemd/system/{unit}.d; echo '[Unit]' > /etc/systemd/system/{unit}.d/own.conf\n");
                expect(format!("/etc/systemd/system/{unit}.d"), "added ");
                expect(format!("/etc/systemd/system/{unit}.d/own.conf"), "added ");
                expected_units.insert(unit);
            }
        }
    }
    (script, expected, expected_units)
}

#[test]
fn a_hundred_edits_are_found_and_nothing_else() {
    let kiln = Kiln::shared();
    baked(&kiln);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let guest = Guest::start(&kiln, "drifter", &folder.path().join("log"));

    // Without its host key, or another key, it is not reached, and not looked at.
    let host = format!("root@127.0.0.1:{}", guest.after("-p"));
    let nobody = folder.path().join("nobody");
    std::fs::write(&nobody, "").unwrap();
    let arguments = ["drift", "drifter", "--host", &host, "-i", guest.after("-i"), "--known-hosts", nobody.to_str().unwrap()];
    kiln.run(&arguments).fails(75, &["cannot be reached by ssh", "known_hosts"]);

    let clean = guest.writes_nothing(|| guest.drift(&kiln, "drifter", &["--json", "--quick"]));
    assert_eq!(clean.status, 0, "{clean}");
    let said = clean.json();
    assert_eq!(
        (&said["differs"], &said["files"], &said["unread"]),
        (&false.into(), &serde_json::json!([]), &serde_json::json!([])),
        "{clean}"
    );

    let seed = std::env::var("KILN_DRIFT_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs());
    eprintln!("KILN_DRIFT_SEED={seed}");
    let (script, expected, units) = edits(&guest, &mut Random(seed), 97);
    let may = "echo two > /var/lib/app/data; mkdir /var/lib/app/deep; echo x > /var/lib/app/deep/er; echo two > /etc/app/a.db; echo > /etc/app/b.db\n";
    let packages = "dpkg -i /opt/debs/kiln-new-1.deb /opt/debs/kiln-old-2.deb >/dev/null; dpkg -P kiln-gone >/dev/null\n";
    guest.shell(&format!("{script}{may}{packages}"));

    let ran = guest.drift(&kiln, "drifter", &["--json"]);
    assert_eq!(ran.status, 3, "{ran}");
    let said = ran.json();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let mut found = Expected::new();
    for file in said["files"].as_array().unwrap().iter().filter(|file| file["explained"] == false) {
        let what: Vec<String> = file["what"].as_array().into_iter().flatten().map(text).collect();
        found.insert(text(&file["path"]), format!("{} {}", text(&file["change"]), what.join(" ")));
    }
    let missed: Vec<_> = expected.iter().filter(|(path, what)| found.get(*path) != Some(what)).collect();
    let more: Vec<_> = found.iter().filter(|(path, _)| !expected.contains_key(*path)).collect();
    assert!(missed.is_empty() && more.is_empty(), "seed {seed}\nmissed or other: {missed:#?}\nnot edited: {more:#?}");
    let found_units: BTreeSet<String> = said["units"].as_array().unwrap().iter().map(|unit| text(&unit["name"])).collect();
    assert_eq!(found_units, units, "seed {seed}: {:#}", said["units"]);
    let changes: Vec<_> = said["packages"].as_array().unwrap().iter().map(|p| (text(&p["name"]), text(&p["change"]))).collect();
    let pair = |name: &str, change: &str| (name.to_owned(), change.to_owned());
    assert_eq!(changes, [pair("kiln-gone", "removed"), pair("kiln-new", "added"), pair("kiln-old", "upgraded")]);
    assert!(said["packages"][1]["by"]["command"].as_str().unwrap().starts_with("dpkg"), "{}", said["packages"]);
    assert!(said["mutable"].as_u64().unwrap() >= 4, "{ran}");

    // A quick look finds the same: whoever changes a file touches its inode.
    let quick = guest.drift(&kiln, "drifter", &["--json", "--quick"]).json();
    let paths =
        |said: &serde_json::Value| -> Vec<String> { said["files"].as_array().unwrap().iter().map(|file| text(&file["path"])).collect() };
    assert_eq!(paths(&quick), paths(&said));
    let table = guest.drift(&kiln, "drifter", &["--quick", "--mutable", "/etc", "--mutable", "/usr"]);
    assert!(table.stdout.contains("+ kiln-new 1") && !table.stdout.contains("/usr/share/") && !table.stdout.contains(" /etc/"), "{table}");
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn after_a_reboot_an_untouched_machine_is_what_was_baked() {
    let kiln = Kiln::shared();
    baked(&kiln);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let guest = Guest::start(&kiln, "drifter", &folder.path().join("log"));
    let boot = || {
        let output = Command::new("ssh")
            .args(&guest.arguments)
            .args(["-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=5", "cat /proc/sys/kernel/random/boot_id"])
            .output();
        String::from_utf8_lossy(&output.unwrap().stdout).trim().to_owned()
    };
    let first = boot();
    guest.shell("systemctl is-system-running --wait || true; systemd-run --quiet --on-active=1 systemctl reboot");
    wait_until(Duration::from_secs(400), || ![String::new(), first.clone()].contains(&boot()));
    guest.shell("systemctl is-system-running --wait || true");
    let ran = guest.writes_nothing(|| guest.drift(&kiln, "drifter", &[]));
    assert_eq!(ran.status, 0, "{ran}");
    assert!(ran.stdout.contains("nothing has changed since the bake"), "{ran}");
}

#[test]
#[ignore = "takes minutes: ci/prove"]
fn without_root_it_says_what_it_could_not_read_and_by_sudo_it_reads_everything() {
    let kiln = Kiln::shared();
    baked(&kiln);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let guest = Guest::start(&kiln, "drifter", &folder.path().join("log"));
    // sshd takes the bake's key for whoever it is.
    guest.shell("useradd -m -s /bin/sh eve; mkdir -m 700 /opt/closed; echo x > /opt/closed/in");
    let list = |said: &serde_json::Value, name: &str, key: &str| -> Vec<String> {
        let items = said[name].as_array().unwrap().iter();
        items.map(|item| item.get(key).unwrap_or(item).as_str().unwrap_or_default().to_owned()).collect()
    };
    let ran = guest.drift_as("eve", &kiln, "drifter", &["--json", "--quick"]);
    assert_eq!(ran.status, 3, "{ran}");
    let said = ran.json();
    let unread = list(&said, "unread", "path");
    for path in ["/opt/closed", "/root", "/root/.bashrc"] {
        assert!(unread.contains(&path.to_owned()), "no {path}: {unread:?}");
    }
    let files = list(&said, "files", "path");
    assert!(files.contains(&"/opt/closed".to_owned()) && files.contains(&"/home/eve".to_owned()), "{files:?}");
    assert!(!files.iter().any(|path| path.starts_with("/root") || path.starts_with("/opt/closed/")), "{files:?}");

    guest.shell("echo 'eve ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/eve");
    let ran = guest.drift_as("eve", &kiln, "drifter", &["--json", "--quick"]);
    assert_eq!(ran.status, 3, "{ran}");
    let said = ran.json();
    assert_eq!(list(&said, "unread", "path"), Vec::<String>::new(), "{ran}");
    assert_eq!(list(&said, "packages", "name"), Vec::<String>::new(), "{ran}");
    let files = list(&said, "files", "path");
    for path in ["/opt/closed/in", "/etc/sudoers.d/eve", "/home/eve/.profile"] {
        assert!(files.contains(&path.to_owned()), "no {path}: {files:?}");
    }
}

#[test]
fn a_copy_of_a_disk_is_compared_without_a_machine() {
    let kiln = Kiln::with_nginx();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let raw = folder.path().join("disk.raw");
    kiln.ok(&["export", "debian-nginx", "--format", "raw", "-o", raw.to_str().unwrap()]);
    let drift =
        |disk: &std::path::Path, more: &[&str]| kiln.run(&[&["drift", "debian-nginx", "--disk", disk.to_str().unwrap()], more].concat());
    let clean = drift(&raw, &["--json"]);
    assert_eq!((clean.status, clean.json()["differs"].as_bool()), (0, Some(false)), "{clean}");

    let table: serde_json::Value = serde_json::from_str(&tool("sfdisk", &["--json", raw.to_str().unwrap()])).unwrap();
    let start = table["partitiontable"]["partitions"].as_array().unwrap().last().unwrap()["start"].as_u64().unwrap();
    let root = format!("{}?offset={}", raw.display(), start * 512);
    let other = folder.path().join("release");
    std::fs::write(&other, "NAME=\"web\"\nVERSION=\"7\"\n").unwrap();
    let requests = folder.path().join("requests");
    let edits = "rm /etc/motd\nset_inode_field /usr/bin/env mode 0104755\nea_set /usr/bin/true user.note one\nmkdir /opt/new\n\
                 cd /etc\nrm kiln-release\n";
    std::fs::write(&requests, format!("{edits}write {} kiln-release\n", other.display())).unwrap();
    tool("/sbin/debugfs", &["-w", "-f", requests.to_str().unwrap(), &root]);
    let qcow2 = folder.path().join("disk.qcow2");
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    let ran = drift(&qcow2, &[]);
    assert_eq!(ran.status, 3, "{ran}");
    for line in [
        "- /etc/motd",
        "~ /usr/bin/env  mode 0755 → 4755",
        "~ /usr/bin/true  user.note none → one",
        "+ /opt/new",
        "3 changed, 1 added, 1 removed",
    ] {
        assert!(ran.stdout.contains(line), "no {line:?}: {ran}");
    }
    // It says that it is another image's.
    assert!(ran.stderr.contains("says it is web:7, and not debian-nginx:1.0.0"), "{ran}");
    kiln.run(&["drift", "debian-nginx"]).fails(2, &["--host"]);
    kiln.run(&["drift", "no-such-image", "--disk", qcow2.to_str().unwrap()]).fails(1, &["no image `no-such-image`"]);
}

//! The shell scripts that seal a guest, made from the rules. POSIX sh, since a
//! guest may have no other.

use kiln_model::guest::quote;

use super::rules::{Action, RULES};

/// Removes everything that the rules name, but what `keep` holds, then gives
/// free blocks back to the disk.
///
/// Starting a program costs a guest under emulation a twentieth of a second, so
/// that the shell's own words find what has to go, and one `rm` removes it.
pub(super) fn sweep(keep: &[String]) -> String {
    let keep: Vec<&str> = keep.iter().map(|path| path.trim_end_matches('/')).collect();
    let mut script = String::from("kept() {\n  case \"$1\" in\n");
    for path in &keep {
        let path = quote(path);
        script.push_str(&format!("    {path}|{path}/*) return 0 ;;\n"));
    }
    // A folder that holds something kept cannot go as a whole.
    script.push_str("  esac\n  return 1\n}\nholds_kept() {\n  case \"$1\" in\n");
    for path in &keep {
        let mut above = *path;
        while let Some((parent, _)) = above.rsplit_once('/') {
            if parent.is_empty() {
                break;
            }
            script.push_str(&format!("    {}) return 0 ;;\n", quote(parent)));
            above = parent;
        }
    }
    script.push_str(
        "  esac\n  return 1\n}\n\
         remove() {\n  kept \"$1\" && return\n  [ -e \"$1\" ] || [ -L \"$1\" ] || return\n  \
         if [ -d \"$1\" ] && [ ! -L \"$1\" ] && holds_kept \"$1\"; then empty \"$1\"; else printf '%s\\0' \"$1\"; fi\n}\n\
         empty() {\n  [ -d \"$1\" ] || return\n  for e in \"$1\"/* \"$1\"/.[!.]* \"$1\"/..?*; do remove \"$e\"; done\n}\n",
    );
    let each = |action: Action, act: &str| -> String {
        let patterns = RULES.iter().filter(|rule| rule.action == action).flat_map(|rule| rule.patterns);
        patterns.map(|pattern| format!("for p in {pattern}; do {act}; done\n")).collect()
    };
    script.push_str(&each(Action::Truncate, "kept \"$p\" || [ ! -f \"$p\" ] || : > \"$p\""));
    script.push_str(&each(Action::Files, "[ -d \"$p\" ] && set -- \"$@\" \"$p\""));
    script.push_str("{\n");
    script.push_str(&each(Action::Remove, "remove \"$p\""));
    script.push_str(&each(Action::Empty, "empty \"$p\""));
    let others: String = keep
        .iter()
        .flat_map(|path| [literal(path), format!("{}/*", literal(path))])
        .map(|path| format!(" ! -path {}", quote(&path)))
        .collect();
    script.push_str(&format!("[ $# = 0 ] || find \"$@\" -xdev -type f{others} -print0\n"));
    script.push_str("} | xargs -0 -r rm -rf --\n");
    script.push_str("sync\ncommand -v fstrim >/dev/null 2>&1 && fstrim / 2>/dev/null\n:\n");
    script
}

/// A path as `find -path` takes it.
fn literal(path: &str) -> String {
    path.chars().flat_map(|c| "*?[]\\".contains(c).then_some('\\').into_iter().chain([c])).collect()
}

/// What runs in the guest that still works: writes `/etc/kiln-release`, sees
/// to it that clones make host keys of their own, and leaves the sweep where
/// systemd runs it last of all, with every service stopped and the root file
/// system read-only. Shutting down rewrites several of the files that have to
/// go, so nothing earlier would do. Without systemd the sweep runs at once.
pub(super) fn prepare(release: &str, keep: &[String]) -> String {
    let sweep = sweep(keep);
    let release = quote(release);
    // The sweep, which removes this file too, runs in a shell that has no file
    // open: with the script itself open and deleted, the root file system could
    // not be made read-only again.
    let last = quote(&format!("{sweep}mount -o remount,ro /\n"));
    let own = quote(&format!(
        "#!/bin/sh\n\
         # Left by kiln for the one shutdown that seals the image; removes itself.\n\
         PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
         export PATH\n\
         mount -o remount,rw / || exit 0\n\
         exec sh -c {last}\n"
    ));
    let now = quote(&sweep);
    let unit = quote(HOST_KEYS_UNIT);
    format!(
        "set -e\numask 022\n\
         printf %s {release} > /etc/kiln-release\n\
         [ ! -d /run/kiln/secrets ] || rm -rf /run/kiln/secrets\n\
         if command -v systemctl >/dev/null 2>&1 && [ -d /run/systemd/system ]; then\n\
         \x20 if command -v sshd >/dev/null 2>&1 && command -v ssh-keygen >/dev/null 2>&1 \\\n\
         \x20   && ! grep -rlqs 'ssh-keygen -A\\|sshd-keygen' /etc/systemd/system /usr/lib/systemd/system /lib/systemd/system; then\n\
         \x20   printf %s {unit} > /etc/systemd/system/kiln-host-keys.service\n\
         \x20   systemctl --no-reload enable kiln-host-keys.service >/dev/null 2>&1\n\
         \x20 fi\n\
         \x20 for d in /usr/lib/systemd/system-shutdown /lib/systemd/system-shutdown; do [ -d \"$d\" ] && break; done\n\
         \x20 [ -d \"$d\" ] || mkdir -p \"$d\"\n\
         \x20 printf %s {own} > \"$d/kiln-seal\"\n  chmod 755 \"$d/kiln-seal\"\n\
         else\n  sh -c {now}\n  sync\nfi\n"
    )
}

/// For guests whose distribution makes host keys when its package is installed
/// and never again (Debian): without this their clones would refuse SSH.
const HOST_KEYS_UNIT: &str = "[Unit]\n\
Description=Make missing SSH host keys\n\
Before=ssh.service sshd.service ssh.socket sshd.socket\n\
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key\n\
ConditionPathExists=!/run/kiln/ssh_host_ed25519_key\n\
\n\
[Service]\n\
Type=oneshot\n\
RemainAfterExit=yes\n\
ExecStart=/usr/bin/ssh-keygen -A\n\
\n\
[Install]\n\
WantedBy=multi-user.target\n";

/// Prints `checksum size path` for each file that a step may have put where
/// the seal removes things, with spaces in paths kept.
pub(super) fn inventory() -> String {
    let patterns: Vec<&str> = RULES.iter().filter(|rule| rule.precious).flat_map(|rule| rule.patterns).copied().collect();
    format!(
        "for p in {}; do [ -e \"$p\" ] && set -- \"$@\" \"$p\"; done; [ $# = 0 ] || find \"$@\" -type f -exec cksum {{}} + 2>/dev/null; :",
        patterns.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Runs the sweep on a folder of this machine, as if it were a guest's root.
    fn sweep_in(root: &std::path::Path, keep: &[String]) {
        let keep: Vec<String> = keep.iter().map(|path| format!("{}{path}", root.display())).collect();
        let script = sweep(&keep).replace("for p in /", &format!("for p in {}/", root.display())).replace("fstrim /", "true");
        let output = Command::new("sh").arg("-c").arg(&script).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn the_sweep_removes_what_the_rules_name_and_keeps_what_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        };
        for path in [
            "etc/machine-id",
            "etc/ssh/ssh_host_rsa_key",
            "etc/ssh/sshd_config",
            "root/.ssh/authorized_keys",
            "home/deploy/.ssh/authorized_keys",
            "home/eve/.ssh/id",
            "var/log/nginx/access log",
            "var/log/syslog",
            "tmp/.x",
            "tmp/y z/a",
            "root/.bash_history",
            "etc/passwd",
            "etc/passwd-",
            "var/lib/cloud/instances/i/user-data.txt",
            "var/lib/apt/lists/x",
            "usr/bin/true",
        ] {
            write(path);
        }
        sweep_in(root.path(), &["/home/deploy/.ssh".into()]);
        let there = |path: &str| root.path().join(path).exists();
        for path in [
            "etc/ssh/sshd_config",
            "home/deploy/.ssh/authorized_keys",
            "var/log/nginx",
            "tmp",
            "etc/passwd",
            "usr/bin/true",
            "var/lib/cloud",
        ] {
            assert!(there(path), "{path} is gone");
        }
        for path in [
            "etc/ssh/ssh_host_rsa_key",
            "root/.ssh",
            "home/eve/.ssh",
            "var/log/nginx/access log",
            "var/log/syslog",
            "tmp/.x",
            "tmp/y z",
            "root/.bash_history",
            "etc/passwd-",
            "var/lib/cloud/instances",
            "var/lib/apt/lists/x",
        ] {
            assert!(!there(path), "{path} is there");
        }
        assert_eq!(std::fs::read(root.path().join("etc/machine-id")).unwrap(), b"");
    }

    #[test]
    fn a_folder_that_holds_something_kept_is_emptied_around_it() {
        let root = tempfile::tempdir().unwrap();
        for path in ["root/.ssh/config", "root/.ssh/authorized_keys"] {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        sweep_in(root.path(), &["/root/.ssh/config".into()]);
        assert!(root.path().join("root/.ssh/config").exists());
        assert!(!root.path().join("root/.ssh/authorized_keys").exists());
    }

    #[test]
    fn the_scripts_are_valid_shell() {
        for script in [prepare("NAME=\"it's\"\n", &["/home/a b/.ssh".into()]), inventory()] {
            let output = Command::new("sh").arg("-n").arg("-c").arg(&script).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

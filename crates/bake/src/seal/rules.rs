//! What must not be cloned: one table, from which both the script that removes
//! it in the guest and the check of the stopped disk are made.
//!
//! The base of the table is what virt-sysprep removes by default; added are
//! cloud-init's state, systemd's random seed and credential secret, the host
//! name, and kiln's own way in.

/// How a pattern is meant. Patterns are absolute paths in which `*` stands for
/// any characters within one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// The path goes, with all below it.
    Remove,
    /// The folder stays, what is in it goes.
    Empty,
    /// The folder and the folders below it stay, all files below it go: for
    /// places whose folders belong to packages.
    Files,
    /// The file stays, empty.
    Truncate,
}

/// One rule.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    /// What it is about, for the report.
    pub what: &'static str,
    /// How its patterns are meant.
    pub action: Action,
    /// The patterns.
    pub patterns: &'static [&'static str],
    /// Whether a step may have put it there on purpose: then removing it is an
    /// error that names the step, and not a silent lock-out.
    pub precious: bool,
}

const fn junk(what: &'static str, action: Action, patterns: &'static [&'static str]) -> Rule {
    Rule { what, action, patterns, precious: false }
}

const fn precious(what: &'static str, action: Action, patterns: &'static [&'static str]) -> Rule {
    Rule { what, action, patterns, precious: true }
}

pub(super) const RULES: &[Rule] = &[
    // Who the machine is.
    junk("machine-id", Action::Truncate, &["/etc/machine-id"]),
    junk("machine-id", Action::Remove, &["/var/lib/dbus/machine-id"]),
    precious("host name", Action::Remove, &["/etc/hostname"]),
    junk("SSH host keys", Action::Remove, &["/etc/ssh/ssh_host_*"]),
    junk(
        "random seed",
        Action::Remove,
        &["/var/lib/systemd/random-seed", "/var/lib/urandom/random-seed", "/var/lib/random-seed", "/boot/efi/loader/random-seed"],
    ),
    junk("systemd credential secret", Action::Remove, &["/var/lib/systemd/credential.secret"]),
    junk(
        "hardware addresses",
        Action::Remove,
        &[
            "/etc/udev/rules.d/70-persistent-net.rules",
            "/etc/udev/rules.d/75-persistent-net-generator.rules",
            "/var/lib/NetworkManager/secret_key",
            "/var/lib/NetworkManager/seen-bssids",
            "/var/lib/NetworkManager/timestamps",
        ],
    ),
    junk(
        "block device caches",
        Action::Remove,
        &["/etc/blkid.tab*", "/etc/blkid/blkid.tab*", "/etc/lvm/cache/.cache", "/etc/lvm/devices/*"],
    ),
    // Who may get in.
    precious("SSH keys", Action::Remove, &["/root/.ssh", "/home/*/.ssh"]),
    precious("Kerberos keytab", Action::Remove, &["/etc/krb5.keytab"]),
    junk(
        "kiln's own way in",
        Action::Remove,
        &["/etc/ssh/sshd_config.d/00-kiln.conf", "/usr/lib/systemd/system-shutdown/kiln-seal", "/lib/systemd/system-shutdown/kiln-seal"],
    ),
    // What first boots and deployments leave.
    junk("cloud-init state", Action::Empty, &["/var/lib/cloud"]),
    junk(
        "cloud-init's network",
        Action::Remove,
        &[
            "/etc/netplan/50-cloud-init.yaml",
            "/etc/network/interfaces.d/50-cloud-init*",
            "/etc/systemd/network/10-cloud-init-*",
            "/etc/sudoers.d/90-cloud-init-users",
        ],
    ),
    junk("leases", Action::Files, &["/var/lib/dhcp", "/var/lib/dhclient", "/var/lib/dhcpcd", "/var/lib/dhcpd", "/var/lib/systemd/network"]),
    junk("leases", Action::Remove, &["/var/lib/NetworkManager/*.lease", "/var/lib/NetworkManager/dhclient-*"]),
    // What was going on.
    junk("logs", Action::Files, &["/var/log"]),
    junk(
        "shell histories",
        Action::Remove,
        &[
            "/root/.*_history",
            "/home/*/.*_history",
            "/root/.lesshst",
            "/home/*/.lesshst",
            "/root/.viminfo",
            "/home/*/.viminfo",
            "/root/.wget-hsts",
        ],
    ),
    junk("crash data", Action::Empty, &["/var/crash", "/var/lib/systemd/coredump", "/var/spool/abrt", "/var/tmp/abrt"]),
    junk("temporary files", Action::Empty, &["/tmp", "/var/tmp"]),
    junk("mail", Action::Files, &["/var/mail", "/var/spool/mail"]),
    junk("sudo's memory", Action::Empty, &["/var/lib/sudo/lectured", "/var/lib/sudo/ts", "/var/db/sudo"]),
    precious("cron jobs of users", Action::Files, &["/var/spool/cron"]),
    junk("at jobs", Action::Files, &["/var/spool/at", "/var/spool/atjobs", "/var/spool/atspool"]),
    junk("timer stamps", Action::Files, &["/var/lib/systemd/timers"]),
    // What can be fetched again, and copies of files that changed.
    junk(
        "package caches",
        Action::Files,
        &["/var/cache/apt", "/var/lib/apt/lists", "/var/cache/dnf", "/var/cache/yum", "/var/cache/zypp", "/var/cache/pacman/pkg"],
    ),
    junk(
        "account backups",
        Action::Remove,
        &["/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-", "/etc/subuid-", "/etc/subgid-"],
    ),
    junk("editor backups", Action::Remove, &["/etc/*~", "/root/*~", "/home/*/*~"]),
    // Who it was registered as.
    junk("Puppet certificates", Action::Empty, &["/var/lib/puppet/ssl", "/etc/puppetlabs/puppet/ssl"]),
    junk("subscriptions", Action::Empty, &["/etc/pki/consumer", "/etc/pki/entitlement", "/var/lib/rhsm"]),
    junk("directory caches", Action::Files, &["/var/lib/sss/db", "/var/lib/samba/private"]),
];

/// Whether `keep` holds `path` or a folder above it.
pub(super) fn kept(keep: &[String], path: &str) -> bool {
    keep.iter().any(|kept| {
        let kept = kept.trim_end_matches('/');
        path == kept || path.strip_prefix(kept).is_some_and(|rest| rest.starts_with('/'))
    })
}

/// Whether one part of a path matches one part of a pattern.
pub(super) fn part_matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    // As in a shell, `*` does not match a leading dot.
    if pattern.starts_with('*') && name.starts_with('.') {
        return false;
    }
    let parts: Vec<&str> = parts.collect();
    for (n, part) in parts.iter().enumerate() {
        if n + 1 == parts.len() {
            return rest.ends_with(part);
        }
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_match_as_in_a_shell() {
        for (pattern, name, matches) in [
            ("*", "deploy", true),
            ("*", ".hidden", false),
            (".*_history", ".bash_history", true),
            (".*_history", ".history", false),
            ("ssh_host_*", "ssh_host_rsa_key", true),
            ("*~", "passwd~", true),
            ("*~", "passwd", false),
            ("hosts", "hosts", true),
            ("hosts", "hosts.allow", false),
        ] {
            assert_eq!(part_matches(pattern, name), matches, "{pattern} {name}");
        }
    }

    #[test]
    fn keep_means_the_path_and_all_below() {
        let keep = ["/home/deploy/.ssh/".to_owned()];
        assert!(kept(&keep, "/home/deploy/.ssh"));
        assert!(kept(&keep, "/home/deploy/.ssh/authorized_keys"));
        assert!(!kept(&keep, "/home/deploy/.sshx"));
    }

    #[test]
    fn patterns_are_absolute_and_safe_in_a_shell() {
        for rule in RULES {
            for pattern in rule.patterns {
                assert!(pattern.starts_with('/') && pattern.len() > 4 || *pattern == "/tmp", "{pattern}");
                assert!(pattern.chars().all(|c| c.is_ascii_alphanumeric() || "/._-*~".contains(c)), "{pattern}");
            }
        }
    }
}

//! What every machine changes by itself, whatever it was baked from. As narrow
//! as can be: single files in `/etc` that say who a machine is, state that a
//! boot or a timer writes, logs, and caches that can be made again. Nothing in
//! `/usr`. Each has its reason in `docs/drift.md`.

use super::pattern::Pattern;

/// How much may differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// Whether it is there, and its content. Where both have it, its mode and
    /// owner are compared.
    Content,
    /// That it is there, where the image has none; nothing of what is in it.
    Presence,
    /// Everything below the folder; the folder itself is compared.
    Below,
}

use Extent::{Below, Content, Presence};

const TABLE: &[(Extent, &[&str])] = &[
    // Who the machine is; the seal has removed them from the image.
    (Content, &["/etc/machine-id", "/var/lib/dbus/machine-id", "/etc/hostname"]),
    (
        Content,
        &[
            "/etc/ssh/ssh_host_rsa_key",
            "/etc/ssh/ssh_host_rsa_key.pub",
            "/etc/ssh/ssh_host_ecdsa_key",
            "/etc/ssh/ssh_host_ecdsa_key.pub",
            "/etc/ssh/ssh_host_ed25519_key",
            "/etc/ssh/ssh_host_ed25519_key.pub",
        ],
    ),
    (
        Content,
        &[
            "/var/lib/systemd/random-seed",
            "/var/lib/systemd/credential.secret",
            "/var/lib/urandom/random-seed",
            "/var/lib/NetworkManager/secret_key",
        ],
    ),
    // The network that a deployment gives, in the very files of cloud-init.
    (
        Content,
        &["/etc/netplan/50-cloud-init.yaml", "/etc/network/interfaces.d/50-cloud-init", "/etc/systemd/network/10-cloud-init-*.network"],
    ),
    (Below, &["/var/lib/cloud", "/var/lib/dhcp", "/var/lib/dhclient", "/var/lib/dhcpcd", "/var/lib/systemd/network"]),
    (Content, &["/var/lib/NetworkManager/*.lease", "/var/lib/NetworkManager/timestamps", "/var/lib/NetworkManager/seen-bssids"]),
    // The folder that systemd makes for keys at each boot; a key in it counts.
    (Presence, &["/root/.ssh"]),
    // What boots, timers and time leave.
    (Content, &["/etc/.updated", "/var/.updated"]),
    (Below, &["/var/lib/systemd/timers", "/var/lib/systemd/timesync", "/var/lib/systemd/coredump", "/var/lib/systemd/pstore"]),
    (Below, &["/var/lib/systemd/backlight", "/var/lib/systemd/rfkill"]),
    (Content, &["/var/lib/systemd/catalog/database", "/var/lib/chrony/drift", "/var/lib/ntp/ntp.drift", "/var/lib/ntpsec/ntp.drift"]),
    (Content, &["/var/lib/logrotate/status", "/var/lib/logrotate.status", "/var/lib/plocate/plocate.db"]),
    (Content, &["/var/spool/anacron/cron.daily", "/var/spool/anacron/cron.weekly", "/var/spool/anacron/cron.monthly"]),
    (Below, &["/var/log", "/var/crash"]),
    // Copies of dpkg's state that Debian makes every day.
    (Content, &["/var/backups/dpkg.*", "/var/backups/apt.extended_states*", "/var/backups/alternatives.tar.*"]),
    // What can be fetched or made again.
    (Below, &["/var/lib/apt/lists", "/var/lib/apt/periodic", "/var/cache/apt", "/var/cache/man", "/var/cache/fontconfig"]),
    (Below, &["/var/cache/ldconfig", "/var/cache/private", "/var/cache/dnf", "/var/cache/yum", "/var/cache/zypp"]),
    (Content, &["/var/lib/apt/daily_lock", "/var/lib/dpkg/lock", "/var/lib/dpkg/lock-frontend"]),
    // What people leave who log in.
    (Content, &["/root/.*_history", "/home/*/.*_history", "/root/.lesshst", "/home/*/.lesshst", "/root/.viminfo", "/home/*/.viminfo"]),
    (Below, &["/var/lib/sudo/lectured", "/var/lib/sudo/ts"]),
];

/// The table, ready for use.
pub(super) struct Own(Vec<(Extent, Pattern)>);

/// What may differ at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Free {
    /// Everything.
    All,
    /// Its content, and whether it is there.
    Content,
    /// That it is there.
    Presence,
}

impl Own {
    pub(super) fn new() -> Self {
        let of = |extent: Extent, patterns: &'static [&'static str]| {
            patterns.iter().filter_map(move |pattern| Some((extent, Pattern::new(pattern).ok()?)))
        };
        Self(TABLE.iter().flat_map(|(extent, patterns)| of(*extent, patterns)).collect())
    }

    pub(super) fn of(&self, path: &[u8]) -> Option<Free> {
        self.0.iter().find_map(|(extent, pattern)| match extent {
            Content if pattern.names(path) => Some(Free::Content),
            Presence if pattern.names(path) => Some(Free::Presence),
            Below if pattern.holds(path) && !pattern.names(path) => Some(Free::All),
            _ => None,
        })
    }
}

/// Folders whose files need not be read on a machine.
pub(super) fn unread() -> impl Iterator<Item = &'static str> {
    TABLE.iter().filter(|(extent, _)| *extent == Below).flat_map(|(_, patterns)| patterns.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_narrow() {
        let own = Own::new();
        assert_eq!(own.0.len(), TABLE.iter().map(|(_, patterns)| patterns.len()).sum::<usize>(), "every pattern is one");
        for (extent, pattern) in &own.0 {
            let text = format!("{pattern:?}");
            assert!(!pattern.holds(b"/usr/bin/true") && !pattern.holds(b"/etc/passwd") && !pattern.holds(b"/boot/vmlinuz"), "{text}");
            // In /etc only single files.
            if pattern.0.first().is_some_and(|part| part == b"etc" || part == b"usr" || part == b"root" || part == b"home") {
                assert_ne!(*extent, Below, "{text}");
            }
        }
        for (path, expected) in [
            ("/etc/machine-id", Some(Free::Content)),
            ("/etc/ssh/ssh_host_ed25519_key", Some(Free::Content)),
            ("/etc/ssh/sshd_config", None),
            ("/etc/resolv.conf", None),
            ("/etc/hosts", None),
            ("/var/log", None),
            ("/var/log/journal/x", Some(Free::All)),
            ("/root/.ssh", Some(Free::Presence)),
            ("/root/.ssh/authorized_keys", None),
            ("/root/.bash_history", Some(Free::Content)),
            ("/root/.bashrc", None),
            ("/var/lib/dpkg/status", None),
            ("/var/cache/app/x", None),
        ] {
            assert_eq!(own.of(path.as_bytes()), expected, "{path}");
        }
    }
}

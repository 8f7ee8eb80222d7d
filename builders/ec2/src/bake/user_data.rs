//! How a guest at EC2 gets this bake's keys: a boothook for its cloud-init.
//!
//! Three files: the client's public key and the host's private key on a tmpfs,
//! and a drop-in of sshd that names them, which the seal removes. Whoever may
//! read user data (any process of the instance, whoever may ask EC2 for it) can
//! read that host key: it is made for this bake, and means nothing after it.
//!
//! The boothook runs at each boot, before sshd is started and before anything
//! that the user's own user data asks for.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_ssh::Keys;

/// The client's public key, in the guest.
const AUTHORIZED_KEYS: &str = "/run/kiln/authorized_keys";
/// The host's private key, in the guest.
const HOST_KEY: &str = "/run/kiln/ssh_host_ed25519_key";
/// sshd's drop-in, in the guest: the one file that stays on its disk until the
/// seal.
const SSHD_DROP_IN: &str = "/etc/ssh/sshd_config.d/00-kiln.conf";

/// What the drop-in says. sshd takes the first value of an option, and the
/// first line that has a key: cloud-init may let the same key of the key pair
/// log in as root to do nothing but be told off.
const SSHD: &str = "HostKey /run/kiln/ssh_host_ed25519_key\n\
    AuthorizedKeysFile /run/kiln/authorized_keys .ssh/authorized_keys\n\
    PermitRootLogin prohibit-password\n\
    PubkeyAuthentication yes\n\
    UseDNS no\n";

/// Between the parts of a MIME message.
const BOUNDARY: &str = "kiln-2b6f0c51-9a3e-4d0f-8c27-5e1d74ab90f3";

/// The user data of an instance: kiln's way in, where its keys are injected,
/// and the user's own.
pub(crate) fn user_data(keys: Option<&Keys>, own: Option<&[u8]>) -> Vec<u8> {
    match (keys, own) {
        (None, None) => Vec::new(),
        (None, Some(own)) => own.to_vec(),
        (Some(keys), None) => hook(keys).into_bytes(),
        (Some(keys), Some(own)) => {
            let part = |kind: &str, bytes: &[u8]| {
                let body = wrapped(&STANDARD.encode(bytes));
                format!(
                    "--{BOUNDARY}\nMIME-Version: 1.0\nContent-Type: {kind}; charset=\"utf-8\"\nContent-Transfer-Encoding: base64\n\n{body}\n"
                )
            };
            let head = format!("MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=\"{BOUNDARY}\"\n\n");
            let hook = part("text/cloud-boothook", hook(keys).as_bytes());
            format!("{head}{hook}{}--{BOUNDARY}--\n", part(content_type(own), own)).into_bytes()
        }
    }
}

/// The commands that write the files, for a POSIX shell. Holds a private key.
fn hook(keys: &Keys) -> String {
    let mut script = "#cloud-boothook\n#!/bin/sh\numask 022\nmkdir -p /run/kiln /etc/ssh/sshd_config.d\nchmod 755 /run/kiln\n".to_owned();
    let client = format!("{}\n", keys.client_public());
    for (path, mode, text) in
        [(AUTHORIZED_KEYS, "644", client.as_str()), (HOST_KEY, "600", keys.host_private_openssh()), (SSHD_DROP_IN, "644", SSHD)]
    {
        script.push_str(&format!("(umask 077; printf %s '{}' | base64 -d > {path}; chmod {mode} {path})\n", STANDARD.encode(text)));
    }
    // Where SELinux decides what sshd may read.
    script.push_str(&format!("chcon -t sshd_key_t {HOST_KEY} 2>/dev/null; chcon -t ssh_home_t {AUTHORIZED_KEYS} 2>/dev/null\n"));
    // An sshd that is up already would go on with its old keys.
    script.push_str(
        "if [ -d /run/systemd/system ]; then for unit in ssh sshd; do systemctl try-restart --no-block $unit.service; done; fi\n:\n",
    );
    script
}

/// The type that cloud-init gives user data by how it begins.
fn content_type(data: &[u8]) -> &'static str {
    let known: [(&[u8], &str); 6] = [
        (b"#cloud-config", "text/cloud-config"),
        (b"#!", "text/x-shellscript"),
        (b"#include", "text/x-include-url"),
        (b"#cloud-boothook", "text/cloud-boothook"),
        (b"#part-handler", "text/part-handler"),
        (b"## template: jinja", "text/jinja2"),
    ];
    known.iter().find(|(begin, _)| data.starts_with(begin)).map_or("text/plain", |(_, kind)| kind)
}

fn wrapped(base64: &str) -> String {
    let lines: Vec<&str> = base64.as_bytes().chunks(76).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    lines.join("\n")
}

/// The Ed25519 host key that cloud-init has written to the console between its
/// two marks; `None` before it has.
pub(crate) fn host_key_on(console: &str) -> Option<String> {
    const BEGIN: &str = "-----BEGIN SSH HOST KEY KEYS-----";
    const END: &str = "-----END SSH HOST KEY KEYS-----";
    // The last boot's: the console holds earlier ones too.
    let (_, keys) = console.rsplit_once(BEGIN)?;
    let (keys, _) = keys.split_once(END)?;
    keys.lines().find_map(|line| {
        let at = line.find("ssh-ed25519 ")?;
        let mut words = line.get(at..)?.split_whitespace();
        Some(format!("{} {}", words.next()?, words.next()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_is_a_script_that_writes_the_three_files() {
        let keys = Keys::generate().unwrap();
        let hook = String::from_utf8(user_data(Some(&keys), None)).unwrap();
        assert!(hook.starts_with("#cloud-boothook\n#!/bin/sh\n"), "{hook}");
        // In a folder in place of the root, by a real shell.
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().display().to_string();
        let here = hook.replace("/run/kiln", &format!("{root}/run/kiln")).replace("/etc/ssh", &format!("{root}/etc/ssh"));
        let here = here.replace("/run/systemd/system", &format!("{root}/nothing"));
        let status = std::process::Command::new("sh").arg("-c").arg(here).status().unwrap();
        assert!(status.success());
        let read = |path: &str| std::fs::read_to_string(format!("{root}{path}")).unwrap();
        assert_eq!(read(AUTHORIZED_KEYS).trim_end(), keys.client_public());
        assert_eq!(read(HOST_KEY), keys.host_private_openssh());
        assert_eq!(read(SSHD_DROP_IN), SSHD);
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(format!("{root}{HOST_KEY}")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn own_user_data_comes_along() {
        let keys = Keys::generate().unwrap();
        let both = String::from_utf8(user_data(Some(&keys), Some(b"#cloud-config\npackages: [x]\n"))).unwrap();
        assert!(both.contains("Content-Type: text/cloud-config; charset"), "{both}");
        assert!(both.contains(&STANDARD.encode("#cloud-config\npackages: [x]\n")));
        assert!(both.find("text/cloud-boothook") < both.find("text/cloud-config"));
        assert!(both.lines().all(|line| line.len() <= 100), "{both}");
        assert_eq!(user_data(None, Some(b"#!/bin/sh")), b"#!/bin/sh");
        assert!(user_data(None, None).is_empty());
    }

    #[test]
    fn a_host_key_is_found_on_a_console() {
        let console = "[   12.1] cloud-init[512]: x\r\n<14>Nov 21 10:00:00 cloud-init: -----BEGIN SSH HOST KEY KEYS-----\r\n\
            ecdsa-sha2-nistp256 AAAAE2 root@ip\r\nssh-ed25519 AAAAC3Nz root@ip\r\n-----END SSH HOST KEY KEYS-----\r\nlogin:";
        assert_eq!(host_key_on(console).as_deref(), Some("ssh-ed25519 AAAAC3Nz"));
        let again = format!("{console}\n{}", console.replace("AAAAC3Nz", "AAAAnew"));
        assert_eq!(host_key_on(&again).as_deref(), Some("ssh-ed25519 AAAAnew"));
        assert_eq!(host_key_on("-----BEGIN SSH HOST KEY KEYS-----\nssh-ed25519 AAAA"), None);
        assert_eq!(host_key_on("Debian GNU/Linux 12"), None);
    }
}

//! The way into a guest that kiln did not make: three files, and how they come
//! there.
//!
//! The client's public key and the host's private key lie on a tmpfs, and a
//! drop-in of sshd names them. Nothing of it opens the image to anybody, and the
//! seal removes the drop-in, the one file that stays on the disk until then.
//!
//! Where cloud-init is to write them, it is by a *boothook*: those run first and
//! at each boot, before sshd is started, and take part in no merging.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::Keys;

/// The client's public key, in the guest.
pub const AUTHORIZED_KEYS: &str = "/run/kiln/authorized_keys";
/// The host's private key, in the guest.
pub const HOST_KEY: &str = "/run/kiln/ssh_host_ed25519_key";
/// sshd's drop-in, in the guest.
pub const SSHD_DROP_IN: &str = "/etc/ssh/sshd_config.d/00-kiln.conf";

/// What the drop-in says. sshd takes the first value of an option, and reads its
/// drop-ins first, in order of name. Of the same key on two lines it takes the
/// first: cloud-init may let root's do nothing but be told off.
pub const SSHD: &str = "HostKey /run/kiln/ssh_host_ed25519_key\n\
    AuthorizedKeysFile /run/kiln/authorized_keys .ssh/authorized_keys\n\
    PermitRootLogin prohibit-password\n\
    PubkeyAuthentication yes\n\
    UseDNS no\n";

/// Between the parts of a MIME message.
const BOUNDARY: &str = "kiln-7f1c2d9a-5f0b-4a86-9d3e-e1b7f7c4a6d2";

/// The three files: path, mode, text. Holds a private key.
pub fn files(keys: &Keys) -> [(&'static str, u32, String); 3] {
    [
        (AUTHORIZED_KEYS, 0o644, format!("{}\n", keys.client_public().trim_end())),
        (HOST_KEY, 0o600, keys.host_private_openssh().to_owned()),
        (SSHD_DROP_IN, 0o644, SSHD.to_owned()),
    ]
}

/// The commands that write the files, for a POSIX shell. Holds a private key.
pub fn script(keys: &Keys) -> String {
    let mut script = "umask 022\nmkdir -p /run/kiln /etc/ssh/sshd_config.d\nchmod 755 /run/kiln\n".to_owned();
    for (path, mode, text) in files(keys) {
        script.push_str(&format!("(umask 077; printf %s '{}' | base64 -d > {path}; chmod {mode:o} {path})\n", STANDARD.encode(text)));
    }
    // Where SELinux decides what sshd may read.
    script.push_str(&format!("chcon -t sshd_key_t {HOST_KEY} 2>/dev/null; chcon -t ssh_home_t {AUTHORIZED_KEYS} 2>/dev/null\n"));
    // An sshd that is up already would go on with its old keys.
    script.push_str(
        "if [ -d /run/systemd/system ]; then systemctl --no-block try-reload-or-restart ssh.service sshd.service 2>/dev/null || :; fi\n",
    );
    script
}

/// User data that writes the files and does nothing else. Holds a private key.
pub fn boothook(keys: &Keys) -> String {
    format!("#cloud-boothook\n#!/bin/sh\n{}", script(keys))
}

/// User data that writes the files and then is what `own` is, as one MIME
/// message (cloud-init's "MIME multi-part archive"). Holds a private key.
pub fn boothook_before(keys: &Keys, own: &[u8]) -> Vec<u8> {
    let part = |kind: &str, bytes: &[u8]| {
        let body = wrapped(&STANDARD.encode(bytes));
        format!("--{BOUNDARY}\nMIME-Version: 1.0\nContent-Type: {kind}; charset=\"utf-8\"\nContent-Transfer-Encoding: base64\n\n{body}\n")
    };
    let head = format!("MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=\"{BOUNDARY}\"\n\n");
    let hook = part("text/cloud-boothook", boothook(keys).as_bytes());
    format!("{head}{hook}{}--{BOUNDARY}--\n", part(content_type(own), own)).into_bytes()
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_boothook_is_a_script_that_writes_the_three_files() {
        let keys = Keys::generate().unwrap();
        let hook = boothook(&keys);
        assert!(hook.starts_with("#cloud-boothook\n#!/bin/sh\n"), "{hook}");
        // In a folder in place of the root, by a real shell.
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().display().to_string();
        let here = hook.replace("/run/kiln", &format!("{root}/run/kiln")).replace("/etc/ssh", &format!("{root}/etc/ssh"));
        let here = here.replace("/run/systemd/system", &format!("{root}/nothing"));
        let status = std::process::Command::new("sh").arg("-c").arg(here).status().unwrap();
        assert!(status.success());
        for (path, mode, text) in files(&keys) {
            let path = format!("{root}{path}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode, "{path}");
        }
        assert_eq!(files(&keys)[1].1, 0o600);
    }

    #[test]
    fn own_user_data_comes_along() {
        let keys = Keys::generate().unwrap();
        let both = String::from_utf8(boothook_before(&keys, b"#cloud-config\npackages: [x]\n")).unwrap();
        assert!(both.contains("Content-Type: text/cloud-config; charset"), "{both}");
        assert!(both.contains(&STANDARD.encode("#cloud-config\npackages: [x]\n")));
        assert!(both.find("text/cloud-boothook") < both.find("text/cloud-config"));
        assert!(both.lines().all(|line| line.len() <= 100), "{both}");
    }
}

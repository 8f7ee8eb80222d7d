//! Ways into a guest that kiln did not make, fastest first.
//!
//! 1. *Credentials*: systemd 252 and later reads credentials from SMBIOS
//!    strings of type 11 (systemd.system-credentials(7)); `tmpfiles.extra`
//!    holds lines for systemd-tmpfiles, which writes three files long before
//!    sshd starts. No disk, and no cloud-init to wait for.
//! 2. *Seed*: a small FAT disk labelled `CIDATA` (cloud-init's NoCloud), whose
//!    user data writes the same three files.
//!
//! The files: the client's public key and the host's private key on a tmpfs,
//! and a drop-in of sshd that names them. Nothing of it opens the image to
//! anybody, and the seal removes the drop-in.

use std::io::{Cursor, Write as _};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_model::{Result, ResultExt as _};
use kiln_ssh::Keys;

/// The client's public key, in the guest.
pub const AUTHORIZED_KEYS: &str = "/run/kiln/authorized_keys";
/// The host's private key, in the guest.
pub const HOST_KEY: &str = "/run/kiln/ssh_host_ed25519_key";
/// sshd's drop-in, in the guest: the one file that stays on its disk.
pub const SSHD_DROP_IN: &str = "/etc/ssh/sshd_config.d/00-kiln.conf";

/// What the drop-in says. sshd takes the first value of an option, and reads
/// its drop-ins first, in order of name.
pub const SSHD: &str = "HostKey /run/kiln/ssh_host_ed25519_key\n\
    AuthorizedKeysFile .ssh/authorized_keys /run/kiln/authorized_keys\n\
    PermitRootLogin prohibit-password\n\
    PubkeyAuthentication yes\n\
    UseDNS no\n";

/// The SMBIOS string, for `-smbios type=11,path=FILE`. Holds a private key.
pub(crate) fn credential(keys: &Keys) -> String {
    let base64 = |text: &str| STANDARD.encode(text);
    // f~: write, decoding base64; with + also over what is there (tmpfiles.d(5)).
    let lines = format!(
        "d /run/kiln 0755 root root -\n\
         f+~ {AUTHORIZED_KEYS} 0644 root root - {}\n\
         f+~ {HOST_KEY} 0600 root root - {}\n\
         f+~ {SSHD_DROP_IN} 0644 root root - {}\n",
        base64(&line(keys.client_public())),
        base64(keys.host_private_openssh()),
        base64(SSHD),
    );
    format!("io.systemd.credential.binary:tmpfiles.extra={}", base64(&lines))
}

/// The same files, for a guest that runs already: path, mode and bytes. Holds
/// a private key.
pub(crate) fn files(keys: &Keys) -> Vec<(String, u32, Vec<u8>)> {
    let file = |path: &str, mode, text: &str| (path.to_owned(), mode, text.as_bytes().to_vec());
    vec![
        file(AUTHORIZED_KEYS, 0o644, &line(keys.client_public())),
        file(HOST_KEY, 0o600, keys.host_private_openssh()),
        file(SSHD_DROP_IN, 0o644, SSHD),
    ]
}

/// The commands that write the same files, for a POSIX shell. Holds a private key.
fn script(keys: &Keys) -> String {
    let mut script = "umask 022\nmkdir -p /run/kiln /etc/ssh/sshd_config.d\nchmod 755 /run/kiln\n".to_owned();
    let files = [
        (AUTHORIZED_KEYS, "644", line(keys.client_public())),
        (HOST_KEY, "600", keys.host_private_openssh().to_owned()),
        (SSHD_DROP_IN, "644", SSHD.to_owned()),
    ];
    for (path, mode, text) in files {
        script.push_str(&format!("(umask 077; printf %s '{}' | base64 -d > {path}; chmod {mode} {path})\n", STANDARD.encode(text)));
    }
    // An sshd that is up already would go on with its old keys.
    script.push_str(
        "if [ -d /run/systemd/system ]; then systemctl --no-block try-reload-or-restart ssh.service sshd.service 2>/dev/null || :; fi\n",
    );
    script
}

/// The user data of a machine that is baked: the way in, and nothing that
/// would change the image more than it must.
fn own_user_data(keys: &Keys) -> String {
    format!(
        "#cloud-config\n\
         bootcmd:\n  - [ sh, -c, \"echo {} | base64 -d | sh\" ]\n\
         users: []\n\
         disable_root: false\n\
         ssh_deletekeys: false\n\
         ssh_genkeytypes: []\n\
         preserve_hostname: true\n\
         apt: {{ preserve_sources_list: true }}\n\
         growpart: {{ mode: auto, devices: [\"/\"] }}\n\
         resize_rootfs: true\n",
        STANDARD.encode(script(keys))
    )
}

/// The user's own user data together with the way in, as one MIME message
/// (cloud-init's "MIME multi-part archive"). The way in is a boothook: those
/// run first, and take part in no merging.
fn joined_user_data(keys: &Keys, own: &[u8]) -> Vec<u8> {
    const BOUNDARY: &str = "kiln-7f1c2d9a-5f0b-4a86-9d3e-e1b7f7c4a6d2";
    let kind = content_type(own);
    let part = |kind: &str, bytes: &[u8]| {
        format!(
            "--{BOUNDARY}\nMIME-Version: 1.0\nContent-Type: {kind}; charset=\"utf-8\"\nContent-Transfer-Encoding: base64\n\n{}\n",
            wrapped(&STANDARD.encode(bytes))
        )
    };
    let hook = format!("#cloud-boothook\n#!/bin/sh\n{}", script(keys));
    let head = format!("MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=\"{BOUNDARY}\"\n\n");
    format!("{head}{}{}--{BOUNDARY}--\n", part("text/cloud-boothook", hook.as_bytes()), part(kind, own)).into_bytes()
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
    let mut text = String::with_capacity(base64.len() + base64.len() / 76 + 1);
    for (index, c) in base64.chars().enumerate() {
        if index > 0 && index % 76 == 0 {
            text.push('\n');
        }
        text.push(c);
    }
    text
}

/// What a machine gets to let kiln in.
pub(crate) struct Ways {
    /// The SMBIOS string.
    pub(crate) credential: Option<String>,
    /// The seed disk.
    pub(crate) seed: Option<Vec<u8>>,
}

/// The ways into a guest of which `reads_credentials` is known. `user_data` is
/// passed on by a seed whatever the way in is.
///
/// # Errors
/// When the seed cannot be made.
pub(crate) fn ways(keys: &Keys, reads_credentials: Option<bool>, user_data: Option<&[u8]>, instance: &str) -> Result<Ways> {
    let credential = (reads_credentials != Some(false)).then(|| credential(keys));
    let data = match (user_data, reads_credentials) {
        (Some(own), Some(true)) => Some(own.to_vec()),
        (Some(own), _) => Some(joined_user_data(keys, own)),
        (None, Some(true)) => None,
        (None, _) => Some(own_user_data(keys).into_bytes()),
    };
    let seed = data.map(|data| seed(&data, &format!("instance-id: {instance}\n"))).transpose()?;
    Ok(Ways { credential, seed })
}

/// A NoCloud seed: a FAT disk with the label `CIDATA`. The same content gives
/// the same bytes.
///
/// # Errors
/// When the content does not fit.
pub(crate) fn seed(user_data: &[u8], meta_data: &str) -> Result<Vec<u8>> {
    // FAT12 with room for the content and its own tables.
    let size = (user_data.len() + meta_data.len() + 256 * 1024).next_multiple_of(64 * 1024);
    let mut disk = Cursor::new(vec![0; size]);
    let make = |disk: &mut Cursor<Vec<u8>>| -> std::io::Result<()> {
        let options = fatfs::FormatVolumeOptions::new().volume_label(*b"CIDATA     ").volume_id(0x6b69_6c6e);
        fatfs::format_volume(&mut *disk, options)?;
        disk.set_position(0);
        // The crate's clock stands still without its feature `chrono`.
        let system = fatfs::FileSystem::new(&mut *disk, fatfs::FsOptions::new())?;
        for (name, bytes) in [("user-data", user_data), ("meta-data", meta_data.as_bytes())] {
            let mut file = system.root_dir().create_file(name)?;
            file.truncate()?;
            file.write_all(bytes)?;
            file.flush()?;
        }
        system.unmount()
    };
    make(&mut disk).trying(|| "make the seed disk".into())?;
    Ok(disk.into_inner())
}

fn line(text: &str) -> String {
    format!("{}\n", text.trim_end())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn read(disk: Vec<u8>, name: &str) -> String {
        let system = fatfs::FileSystem::new(Cursor::new(disk), fatfs::FsOptions::new()).unwrap();
        assert_eq!(system.read_volume_label_from_root_dir().unwrap().unwrap(), "CIDATA");
        let mut text = String::new();
        system.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn seeds_are_readable_and_the_same_each_time() {
        let large = vec![b'x'; 3 << 20];
        assert_eq!(read(seed(&large, "m").unwrap(), "user-data").len(), 3 << 20);
        let one = seed(b"#cloud-config\n", "instance-id: a\n").unwrap();
        assert_eq!(one, seed(b"#cloud-config\n", "instance-id: a\n").unwrap());
        assert_eq!(read(one, "meta-data"), "instance-id: a\n");
    }

    #[test]
    fn the_ways_follow_what_is_known_of_the_guest() {
        let keys = Keys::generate().unwrap();
        let some = |known, data: Option<&[u8]>| {
            let ways = ways(&keys, known, data, "kiln-b").unwrap();
            (ways.credential.is_some(), ways.seed.map(|seed| read(seed, "user-data")))
        };
        assert_eq!(some(Some(true), None), (true, None));
        assert_eq!(some(Some(true), Some(b"#!/bin/sh\n")), (true, Some("#!/bin/sh\n".into())));
        for known in [None, Some(false)] {
            let (credential, seed) = some(known, None);
            assert_eq!(credential, known.is_none());
            assert!(seed.unwrap().starts_with("#cloud-config\nbootcmd:\n"));
            let joined = some(known, Some(b"#cloud-config\n")).1.unwrap();
            assert!(joined.contains("text/cloud-boothook") && joined.contains("text/cloud-config"), "{joined}");
        }
    }

    #[test]
    fn both_ways_write_the_same_files() {
        let keys = Keys::generate().unwrap();
        let (_, base64) = credential(&keys).split_once('=').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let lines = String::from_utf8(STANDARD.decode(base64).unwrap()).unwrap();
        let script = script(&keys);
        for line in lines.lines().skip(1) {
            let words: Vec<&str> = line.split(' ').collect();
            assert!(script.contains(&format!("'{}' | base64 -d > {}", words[6], words[1])), "{line}");
        }
        assert!(lines.contains(&format!("{HOST_KEY} 0600")));
        let mut shell = std::process::Command::new("sh");
        assert!(shell.args(["-n", "-c", &script]).status().unwrap().success());
    }
}

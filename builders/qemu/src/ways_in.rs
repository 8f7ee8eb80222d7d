//! Ways into a guest that kiln did not make, fastest first.
//!
//! 1. *Credentials*: systemd 252 and later reads credentials from SMBIOS
//!    strings of type 11 (systemd.system-credentials(7)); `tmpfiles.extra`
//!    holds lines for systemd-tmpfiles, which writes three files long before
//!    sshd starts. No disk, and no cloud-init to wait for.
//! 2. *Seed*: a small FAT disk labelled `CIDATA` (cloud-init's NoCloud), whose
//!    user data writes the same three files.
//!
//! [`way_in`] says what is in the files.

use std::io::{Cursor, Write as _};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_model::{Result, ResultExt as _};
use kiln_ssh::{Keys, way_in};

/// The SMBIOS string, for `-smbios type=11,path=FILE`. Holds a private key.
pub(crate) fn credential(keys: &Keys) -> String {
    // f~: write, decoding base64; with + also over what is there (tmpfiles.d(5)).
    let mut lines = "d /run/kiln 0755 root root -\n".to_owned();
    for (path, mode, text) in way_in::files(keys) {
        lines.push_str(&format!("f+~ {path} {mode:04o} root root - {}\n", STANDARD.encode(text)));
    }
    format!("io.systemd.credential.binary:tmpfiles.extra={}", STANDARD.encode(&lines))
}

/// The same files, for a guest that runs already: path, mode and bytes. Holds
/// a private key.
pub(crate) fn files(keys: &Keys) -> Vec<(String, u32, Vec<u8>)> {
    way_in::files(keys).map(|(path, mode, text)| (path.to_owned(), mode, text.into_bytes())).into()
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
        STANDARD.encode(way_in::script(keys))
    )
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
        (Some(own), _) => Some(way_in::boothook_before(keys, own)),
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
        let script = way_in::script(&keys);
        for line in lines.lines().skip(1) {
            let words: Vec<&str> = line.split(' ').collect();
            assert!(script.contains(&format!("'{}' | base64 -d > {}", words[6], words[1])), "{line}");
        }
        assert!(lines.contains(&format!("{} 0600", way_in::HOST_KEY)));
        let mut shell = std::process::Command::new("sh");
        assert!(shell.args(["-n", "-c", &script]).status().unwrap().success());
    }
}

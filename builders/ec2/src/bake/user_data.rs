//! How a guest at EC2 gets this bake's keys: a boothook for its cloud-init; and
//! what its console says of its own.
//!
//! Whoever may read user data (any process of the instance, whoever may ask EC2
//! for it) can read the host key in it: it is made for this bake, and means
//! nothing after it.

use kiln_ssh::{Keys, way_in};

/// The user data of an instance: kiln's way in, where its keys are injected,
/// and the user's own.
pub(crate) fn user_data(keys: Option<&Keys>, own: Option<&[u8]>) -> Vec<u8> {
    match (keys, own) {
        (None, None) => Vec::new(),
        (None, Some(own)) => own.to_vec(),
        (Some(keys), None) => way_in::boothook(keys).into_bytes(),
        (Some(keys), Some(own)) => way_in::boothook_before(keys, own),
    }
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
    fn the_way_in_comes_only_with_keys() {
        let keys = Keys::generate().unwrap();
        assert!(user_data(Some(&keys), None).starts_with(b"#cloud-boothook\n"));
        assert!(user_data(Some(&keys), Some(b"#!/bin/sh")).starts_with(b"MIME-Version: "));
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

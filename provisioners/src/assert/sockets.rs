//! Who listens where, from the kernel's own tables: no program is needed that
//! a small image may lack.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Which sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// State of a socket that waits for others.
    fn waits(self) -> &'static str {
        match self {
            Self::Tcp => "0A",
            Self::Udp => "07",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// All sockets that wait: address and port. `lines` are those of
/// `/proc/net/{tcp,tcp6,udp,udp6}`, each with the name of its table before it.
fn all(lines: &[String], protocol: Protocol) -> impl Iterator<Item = (IpAddr, u16)> {
    lines.iter().filter_map(move |line| {
        let mut words = line.split_whitespace();
        let table = words.next()?;
        if table.trim_end_matches('6') != protocol.name() {
            return None;
        }
        let (local, state) = (words.nth(1)?, words.nth(1)?);
        let (address, port) = local.split_once(':')?;
        (state == protocol.waits()).then_some(())?;
        Some((parse(address)?, u16::from_str_radix(port, 16).ok()?))
    })
}

/// An address as the kernel writes it: words of 32 bits, each in the
/// machine's own order, which is little-endian wherever kiln bakes.
fn parse(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(hex.get(at..at + 8)?, 16).ok().map(u32::swap_bytes);
    match hex.len() {
        8 => Some(Ipv4Addr::from_bits(word(0)?).into()),
        32 => {
            let bits = [0, 8, 16, 24].into_iter().try_fold(0_u128, |bits, at| Some(bits << 32 | u128::from(word(at)?)))?;
            Some(Ipv6Addr::from_bits(bits).to_canonical())
        }
        _ => None,
    }
}

/// The addresses at which somebody listens at a port.
pub(super) fn listening(lines: &[String], protocol: Protocol, port: u16) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = all(lines, protocol).filter(|(_, open)| *open == port).map(|(address, _)| address).collect();
    found.sort();
    found.dedup();
    found
}

/// The ports at which somebody listens.
pub(super) fn ports(lines: &[String], protocol: Protocol) -> Vec<u16> {
    let mut found: Vec<u16> = all(lines, protocol).map(|(_, port)| port).collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let lines: Vec<String> = [
            "tcp   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
            "tcp    0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1",
            "tcp    1: 0100007F:0019 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1",
            "tcp    2: 0F02000A:0016 0202000A:9C40 01 00000000:00000000 02:000A 00000000     0        0 12345 1",
            "tcp6   0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 1 1",
            "tcp6   1: 00000000000000000000000001000000:0019 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 1 1",
            "udp    7: 00000000:0044 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2",
        ]
        .map(String::from)
        .into();
        let at = |port| listening(&lines, Protocol::Tcp, port).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(at(80), ["0.0.0.0", "::"]);
        assert_eq!(at(25), ["127.0.0.1", "::1"]);
        assert!(at(22).is_empty(), "a connection is no listener");
        assert_eq!((ports(&lines, Protocol::Tcp), ports(&lines, Protocol::Udp)), (vec![25, 80], vec![68]));
    }
}

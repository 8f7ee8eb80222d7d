//! Where an instance is put, and from where it will be reached.

use std::net::{IpAddr, UdpSocket};

use kiln_model::{Code, Error, Result, ResultExt as _};

use super::region::Region;
use super::settings::{Chosen, Settings, Way};
use crate::api::Find;
use crate::api::error::CallExt as _;
use crate::api::machines::Subnet;

/// Where an instance may be put.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Site {
    /// The VPC of its security group; `None`: the default one.
    pub(crate) vpc: Option<String>,
    /// Subnets to try, that with the most free addresses first; empty: EC2
    /// chooses one of the default VPC.
    pub(crate) subnets: Vec<String>,
}

/// Finds the VPC and the subnets that the settings name.
pub(crate) async fn find(settings: &Settings, region: &Region) -> Result<Site> {
    let vpc = match &settings.vpc {
        None => None,
        Some(Chosen::Id(id)) => Some(id.clone()),
        Some(chosen @ Chosen::Filter(_)) => {
            let find = filtered(chosen);
            let mut found = region.calls.make(|| region.machines.vpcs(&find)).await.trying_to(|| "look for the VPC".to_owned())?;
            match found.len() {
                0 => return Err(nothing("VPC", "vpc")),
                1 => found.pop(),
                n => {
                    let error = Error::new(Code::Usage, format!("{n} VPCs match `vpc` in [builder.ec2]")).detail(found.join("\n"));
                    return Err(error.next("make the filter narrower, or name one by its id"));
                }
            }
        }
    };
    let find = match (&settings.subnet, &vpc) {
        (None, None) => return Ok(Site { vpc, subnets: Vec::new() }),
        (None, Some(vpc)) => Find::default().with("vpc-id", vpc),
        (Some(chosen), None) => filtered(chosen),
        (Some(chosen), Some(vpc)) => filtered(chosen).with("vpc-id", vpc),
    };
    let mut found = region.calls.make(|| region.machines.subnets(&find)).await.trying_to(|| "look for the subnet".to_owned())?;
    found.retain(|subnet| subnet.free > 0);
    found.sort_by(|a, b| (b.free, &a.id).cmp(&(a.free, &b.id)));
    let Some(Subnet { vpc, .. }) = found.first().cloned() else { return Err(nothing("subnet with a free address", "subnet")) };
    // A group belongs to one VPC.
    found.retain(|subnet| subnet.vpc == vpc);
    Ok(Site { vpc: Some(vpc), subnets: found.into_iter().map(|subnet| subnet.id).collect() })
}

fn filtered(chosen: &Chosen) -> Find {
    match chosen {
        // As a filter, since an id that is not there is then no error of AWS's.
        Chosen::Id(id) => Find::default().with(if id.starts_with("vpc-") { "vpc-id" } else { "subnet-id" }, id),
        Chosen::Filter(filter) => filter.iter().fold(Find::default(), |find, (name, value)| find.with(name, value)),
    }
}

fn nothing(what: &str, key: &str) -> Error {
    Error::new(Code::Usage, format!("no {what} matches `{key}` in [builder.ec2]")).next("check the region, the account and the filter")
}

/// The networks that may reach the guest, where that is known before there is
/// an instance.
pub(crate) async fn known_sources(settings: &Settings, own_address: &super::OwnAddress) -> Result<Option<Vec<String>>> {
    if !settings.allow_from.is_empty() {
        return Ok(Some(settings.allow_from.clone()));
    }
    match settings.way {
        Way::Public | Way::Explicit { .. } => {
            let address = own_address().await.map_err(|error| {
                error.next("say with `allow_from` in [builder.ec2] from which network this machine reaches the instance")
            })?;
            Ok(Some(vec![network_of(address)]))
        }
        // Settings without `allow_from` have groups of their own then.
        Way::Bastion(_) => Ok(Some(Vec::new())),
        Way::Private => Ok(None),
    }
}

/// This machine's own address on the way to another.
pub(crate) fn address_towards(other: &str) -> Result<String> {
    let look = || -> std::io::Result<IpAddr> {
        let other: IpAddr = other.parse().map_err(|_| std::io::Error::from(std::io::ErrorKind::InvalidInput))?;
        let any: IpAddr = if other.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
        let socket = UdpSocket::bind((any, 0))?;
        // Sends nothing: the kernel only chooses the way.
        socket.connect((other, 22))?;
        Ok(socket.local_addr()?.ip())
    };
    look().map(network_of).trying(|| format!("find the way to {other}"))
}

/// The network that holds this address alone.
fn network_of(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_network_of_its_own() {
        assert_eq!(network_of([203, 0, 113, 4].into()), "203.0.113.4/32");
        assert_eq!(network_of("2001:db8::1".parse::<IpAddr>().unwrap()), "2001:db8::1/128");
        assert_eq!(address_towards("127.0.0.1").unwrap(), "127.0.0.1/32");
        assert!(address_towards("nowhere").is_err());
    }
}

//! A network as it is laid out on the host.
//!
//! Each network is a bridge with one IPv4 subnet. The lower half of the subnet holds
//! the gateway (its first address) and the instances; the upper half holds **service
//! addresses**: one stable address per service, which never belongs to an instance.
//! Names resolve to service addresses; the host answers for all of them (a local
//! route) and the proxy passes what arrives there to an instance that serves. That
//! is why peers that resolve once and keep connections survive a replacement.
//!
//! An environment may join a network of another's (compose's `external`). So that the two
//! never give the same address, the one that it belongs to takes the first half of each
//! range, and those that join have a **share** each of the rest.

use std::net::Ipv4Addr;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// One bridge network of an environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeNetwork {
    /// Full compose name: `<project>_default`.
    pub name: String,
    /// The interface on the host, at most 15 bytes, unique per kiln root.
    pub bridge: String,
    pub subnet: Subnet,
    /// No route out of it.
    pub internal: bool,
    pub mtu: Option<u32>,
}

/// So many environments may join a network of another's.
pub const SHARES: u32 = 16;

/// Smaller networks have no shares: there is hardly room for one environment.
const SMALLEST_SHARED: u32 = 256;

impl BridgeNetwork {
    /// Instances' addresses, as numbers in the subnet. `share`: `None` for the environment
    /// that the network belongs to; empty where the network has no such share.
    pub fn instances(&self, share: Option<u32>) -> Range<u32> {
        // The base and the gateway are nobody's.
        self.part(2..self.subnet.len() / 2, share)
    }

    /// As [`BridgeNetwork::instances`], for services' addresses.
    pub fn services(&self, share: Option<u32>) -> Range<u32> {
        // The last address is the network's broadcast address.
        self.part(self.subnet.len() / 2..self.subnet.len() - 1, share)
    }

    fn part(&self, whole: Range<u32>, share: Option<u32>) -> Range<u32> {
        let half = self.subnet.len() / 2;
        let shared = whole.start / half * half + half / 2;
        let step = half / 2 / SHARES;
        match share {
            _ if self.subnet.len() < SMALLEST_SHARED => match share {
                None => whole,
                Some(_) => whole.end..whole.end,
            },
            None => whole.start..shared,
            Some(n) if n < SHARES => {
                let start = shared + n * step;
                start..(start + step).min(whole.end)
            }
            Some(_) => whole.end..whole.end,
        }
    }

    pub fn gateway(&self) -> Ipv4Addr {
        self.subnet.nth(1)
    }

    /// The upper half: the service addresses.
    pub fn service_range(&self) -> Subnet {
        Subnet {
            base: self.subnet.nth(self.subnet.len() / 2),
            prefix: self.subnet.prefix + 1,
        }
    }
}

/// An IPv4 subnet between /8 and /28.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    base: Ipv4Addr,
    prefix: u8,
}

/// Why a text is not a usable [`Subnet`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an IPv4 subnet between /8 and /28 (like 10.20.0.0/24)")]
pub struct SubnetError(String);

impl Subnet {
    /// `base` is masked to the prefix.
    pub fn new(base: Ipv4Addr, prefix: u8) -> Result<Self, SubnetError> {
        if !(8..=28).contains(&prefix) {
            return Err(SubnetError(format!("{base}/{prefix}")));
        }
        let mask = u32::MAX << (32 - prefix);
        Ok(Self {
            base: Ipv4Addr::from(u32::from(base) & mask),
            prefix,
        })
    }

    pub fn base(&self) -> Ipv4Addr {
        self.base
    }

    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// How many addresses it spans.
    pub fn len(&self) -> u32 {
        1 << (32 - self.prefix)
    }

    /// A subnet always has addresses.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The address `n` after the base; wraps within the subnet.
    pub fn nth(&self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) + n % self.len())
    }

    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let offset = u32::from(address).wrapping_sub(u32::from(self.base));
        offset < self.len()
    }

    pub fn overlaps(&self, other: &Subnet) -> bool {
        self.contains(other.base) || other.contains(self.base)
    }
}

impl std::str::FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let fail = || SubnetError(text.to_owned());
        let (base, prefix) = text.split_once('/').ok_or_else(fail)?;
        Self::new(
            base.parse().map_err(|_| fail())?,
            prefix.parse().map_err(|_| fail())?,
        )
        .map_err(|_| fail())
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl TryFrom<String> for Subnet {
    type Error = SubnetError;
    fn try_from(text: String) -> Result<Self, SubnetError> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_service_range_is_the_upper_half_and_never_holds_the_gateway() {
        let network = BridgeNetwork {
            name: "n".into(),
            bridge: "b".into(),
            subnet: "10.1.16.9/20".parse().unwrap(),
            internal: false,
            mtu: None,
        };
        assert_eq!(network.subnet.to_string(), "10.1.16.0/20");
        assert_eq!(network.gateway(), Ipv4Addr::new(10, 1, 16, 1));
        assert_eq!(network.service_range().to_string(), "10.1.24.0/21");
        assert!(!network.service_range().contains(network.gateway()));
    }

    #[test]
    fn shares_don_t_meet() {
        for (subnet, room) in [("10.1.16.0/20", 64), ("10.1.0.0/24", 4), ("10.0.0.0/25", 0)] {
            let network = BridgeNetwork {
                name: "n".into(),
                bridge: "b".into(),
                subnet: subnet.parse().unwrap(),
                internal: false,
                mtu: None,
            };
            let shares = [None].into_iter().chain((0..SHARES).map(Some));
            let mut all: Vec<_> = shares
                .flat_map(|s| [network.instances(s), network.services(s)])
                .collect();
            assert_eq!(all[3].len(), room);
            all.retain(|range| !range.is_empty());
            all.sort_by_key(|range| range.start);
            assert!(all.windows(2).all(|w| w[0].end <= w[1].start), "{all:?}");
            assert_eq!(
                (all[0].start, all.last().unwrap().end),
                (2, network.subnet.len() - 1)
            );
            assert!(network.services(Some(SHARES)).is_empty());
        }
    }

    #[test]
    fn subnets_overlap_both_ways_round() {
        let wide: Subnet = "10.0.0.0/8".parse().unwrap();
        let narrow: Subnet = "10.9.8.0/24".parse().unwrap();
        let other: Subnet = "192.168.0.0/24".parse().unwrap();
        assert!(wide.overlaps(&narrow) && narrow.overlaps(&wide));
        assert!(!wide.overlaps(&other) && !other.overlaps(&wide));
        assert!("10.0.0.0/30".parse::<Subnet>().is_err());
    }
}

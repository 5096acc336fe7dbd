//! Which subnets are free on this host.
//!
//! kiln carves /20s (2048 addresses for the gateway and instances, 2048 for services)
//! out of [`DEFAULT_POOLS`], in order, and takes the first that meets no address and
//! no route of any table (but default routes), no name server, and none in use by
//! kiln itself. A wide route, as of a VPN to 10.0.0.0/8, makes it go on to the next pool.
//!
//! Two roots may choose the same one at the same time: [`super::ensure_bridge`]
//! gives it to one of them and refuses the other, which then chooses again.

use std::net::Ipv4Addr;

use kiln_model::network::Subnet;

use super::channel::{Channel, NetlinkError};
use super::survey;

/// The size of the subnets that kiln carves out of a pool.
pub const SUBNET_PREFIX: u8 = 20;

/// Where automatic subnets come from: 128, then 64 and 2 more. Docker starts at
/// 172.17.0.0/16 and home routers at 192.168.0.0/24; both are met last.
pub const DEFAULT_POOLS: [(Ipv4Addr, u8); 3] = [
    (Ipv4Addr::new(10, 200, 0, 0), 13),
    (Ipv4Addr::new(172, 28, 0, 0), 14),
    (Ipv4Addr::new(192, 168, 224, 0), 19),
];

/// Why there is no subnet to give.
#[derive(Debug, thiserror::Error)]
pub enum FreeSubnetError {
    #[error("cannot list the host's addresses and routes: {0}")]
    Survey(#[from] NetlinkError),
    #[error(
        "no free /{SUBNET_PREFIX} is left in kiln's address pools: the host's routes and other networks \
         cover them; choose one for the network yourself (ipam.config.subnet)"
    )]
    Exhausted,
}

/// A span of addresses: its start and prefix length, 0 to 32.
pub(super) type Span = (Ipv4Addr, u8);

/// The first free subnet of the default pools.
pub fn free_subnet(in_use: &[Subnet]) -> Result<Subnet, FreeSubnetError> {
    let pools = DEFAULT_POOLS.map(|(base, prefix)| Subnet::new(base, prefix));
    let pools: Vec<Subnet> = pools.into_iter().flatten().collect();
    free_subnet_in(&pools, in_use)
}

/// The first free subnet of `pools`. A pool smaller than a /20 is taken whole.
pub fn free_subnet_in(pools: &[Subnet], in_use: &[Subnet]) -> Result<Subnet, FreeSubnetError> {
    let mut taken = taken_by_host()?;
    taken.extend(in_use.iter().map(|s| (s.base(), s.prefix())));
    pick(pools, &taken).ok_or(FreeSubnetError::Exhausted)
}

fn taken_by_host() -> Result<Vec<Span>, FreeSubnetError> {
    let mut channel = Channel::route().map_err(NetlinkError::from)?;
    let mut taken: Vec<Span> = Vec::new();
    taken.extend(
        survey::addresses(&mut channel)?
            .iter()
            .map(|a| (a.address, a.prefix)),
    );
    for route in survey::routes(&mut channel)? {
        if route.prefix > 0 {
            taken.push((route.destination, route.prefix));
        }
        taken.extend(route.gateway.map(|gateway| (gateway, 32)));
    }
    // No file: no name servers to stay clear of.
    let resolvers = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    taken.extend(
        survey::name_servers(&resolvers)
            .into_iter()
            .map(|address| (address, 32)),
    );
    Ok(taken)
}

/// The first block of `pools` that meets nothing that is taken.
fn pick(pools: &[Subnet], taken: &[Span]) -> Option<Subnet> {
    pools.iter().find_map(|pool| {
        let prefix = SUBNET_PREFIX.max(pool.prefix());
        let step = 1u32 << (32 - prefix);
        (0..pool.len() / step)
            .filter_map(|n| Subnet::new(pool.nth(n * step), prefix).ok())
            .find(|block| !taken.iter().any(|span| meets(block, *span)))
    })
}

/// Whether subnet and span have an address in common.
pub(super) fn meets(subnet: &Subnet, (start, prefix): Span) -> bool {
    let mask = u32::MAX
        .checked_shl(32 - u32::from(prefix.min(32)))
        .unwrap_or(0);
    let start = u32::from(start) & mask;
    subnet.contains(Ipv4Addr::from(start)) || (u32::from(subnet.base()) & mask) == start
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    fn spans(texts: &[&str]) -> Vec<Span> {
        texts
            .iter()
            .map(|text| {
                let (base, prefix) = text.split_once('/').unwrap();
                (base.parse().unwrap(), prefix.parse().unwrap())
            })
            .collect()
    }

    #[test]
    fn the_first_block_that_meets_nothing_is_taken() {
        let pools = [subnet("10.200.0.0/18"), subnet("192.168.0.0/20")];
        let cases: [(&[&str], Option<&str>); 6] = [
            (&[], Some("10.200.0.0/20")),
            (&["10.200.15.255/32"], Some("10.200.16.0/20")),
            (&["10.200.1.1/24", "10.200.30.0/23"], Some("10.200.32.0/20")),
            (&["10.0.0.0/8"], Some("192.168.0.0/20")),
            (&["10.200.77.9/18", "192.168.3.4/24"], Some("10.200.0.0/20")),
            (&["128.0.0.0/1", "0.0.0.0/1"], None),
        ];
        for (taken, expected) in cases {
            assert_eq!(
                pick(&pools, &spans(taken)),
                expected.map(subnet),
                "{taken:?}"
            );
        }
    }

    #[test]
    fn a_full_pool_gives_every_block_once_then_none() {
        let pools = [subnet("10.200.0.0/13")];
        let mut taken = Vec::new();
        while let Some(block) = pick(&pools, &taken) {
            assert!(!taken.contains(&(block.base(), 20)));
            taken.push((block.base(), block.prefix()));
        }
        assert_eq!(taken.len(), 128);
    }

    #[test]
    fn name_servers_are_read_as_the_resolver_does() {
        let text = "# nameserver 1.1.1.1\nsearch x\nnameserver 10.200.0.2\n nameserver\t8.8.8.8 # c\nnameserver ::1\n";
        let expected: Vec<Ipv4Addr> =
            vec!["10.200.0.2".parse().unwrap(), "8.8.8.8".parse().unwrap()];
        assert_eq!(survey::name_servers(text), expected);
    }
}

//! What IPv4 addresses and routes the host has, so that kiln stays clear of them.

use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::channel::{Channel, NetlinkError};

/// An address on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub index: u32,
    pub address: Ipv4Addr,
    pub prefix: u8,
    /// As the kernel gave it: what removes it again.
    pub message: AddressMessage,
}

/// A route that leads somewhere (none that only refuses).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub destination: Ipv4Addr,
    pub prefix: u8,
    pub index: Option<u32>,
    pub gateway: Option<Ipv4Addr>,
    pub source: Option<Ipv4Addr>,
    /// Delivers to the host itself.
    pub local: bool,
}

pub(super) fn addresses(channel: &mut Channel) -> Result<Vec<Address>, NetlinkError> {
    let mut request = AddressMessage::default();
    request.header.family = AddressFamily::Inet;
    let mut found = Vec::new();
    channel.dump(RouteNetlinkMessage::GetAddress(request), |message| {
        if let RouteNetlinkMessage::NewAddress(message) = message {
            found.extend(address(message));
        }
    })?;
    Ok(found)
}

fn address(message: AddressMessage) -> Option<Address> {
    if message.header.family != AddressFamily::Inet {
        return None;
    }
    // On a point-to-point link ADDRESS is the peer and LOCAL the own one.
    let mut own = None;
    let mut peer = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(IpAddr::V4(a)) => own = Some(*a),
            AddressAttribute::Address(IpAddr::V4(a)) => peer = Some(*a),
            _ => {}
        }
    }
    Some(Address {
        index: message.header.index,
        address: own.or(peer)?,
        prefix: message.header.prefix_len,
        message,
    })
}

/// The routes of every table.
pub(super) fn routes(channel: &mut Channel) -> Result<Vec<Route>, NetlinkError> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet;
    let mut found = Vec::new();
    channel.dump(RouteNetlinkMessage::GetRoute(request), |message| {
        if let RouteNetlinkMessage::NewRoute(message) = message {
            found.extend(route(&message));
        }
    })?;
    Ok(found)
}

fn route(message: &RouteMessage) -> Option<Route> {
    let refuses = matches!(
        message.header.kind,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw
    );
    if refuses || message.header.address_family != AddressFamily::Inet {
        return None;
    }
    let mut route = Route {
        destination: Ipv4Addr::UNSPECIFIED,
        prefix: message.header.destination_prefix_length,
        index: None,
        gateway: None,
        source: None,
        local: message.header.kind == RouteType::Local,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(a)) => route.destination = *a,
            RouteAttribute::Gateway(RouteAddress::Inet(a)) => route.gateway = Some(*a),
            RouteAttribute::PrefSource(RouteAddress::Inet(a)) => route.source = Some(*a),
            RouteAttribute::Oif(index) => route.index = Some(*index),
            _ => {}
        }
    }
    Some(route)
}

/// The IPv4 name servers of a `resolv.conf` (resolv.conf(5)); the host must go on
/// reaching them, also when only the default route leads there.
pub(super) fn name_servers(resolv_conf: &str) -> Vec<Ipv4Addr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("nameserver"))
        .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .collect()
}

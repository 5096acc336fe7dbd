//! Bridges: one per network, with the gateway's address, and a local route for the
//! network's service addresses.
//!
//! The local route ("AnyIP", `ip route add local <range> dev <bridge>`) makes every
//! service address the host's own: it answers ARP for all of them, and what the host
//! itself sends to one has the gateway as its source. It is over the bridge, not `lo`,
//! so that it goes with the bridge, however that is removed.
//!
//! Settings are per bridge: no IPv6, strict reverse-path filter (instances can't
//! borrow addresses), no redirects, forwarding only if the network is not internal.
//! What leaves a network comes back over an uplink, which must forward too; kiln
//! can't know which interfaces will be uplinks, so it turns on `net.ipv4.ip_forward`
//! if it is off, once a network that is not internal stands, and says so in a note.
//! Internal bridges are turned off again after that, so that the kernel itself
//! refuses to pass their traffic on, whatever happens to the firewall.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use kiln_model::network::BridgeNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoData, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::channel::{Channel, NetlinkError};
use super::link::{self, Link};
use super::names::{is_interface_name, mac_of};
use super::subnet::{Span, meets};
use super::survey;
use super::sysctl::{self, SysctlError};

/// The size of frames where neither the file nor the uplink asks for less.
const USUAL_MTU: u32 = 1500;
/// The kernel's local routing table (rtnetlink(7), `RT_TABLE_LOCAL`).
const LOCAL_TABLE: u8 = 255;

/// Why a bridge could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    #[error("`{bridge}` can't be a bridge's name (1 to 15 printable bytes, without `/` and `:`)")]
    Name { bridge: String },
    #[error("the interface {bridge} is there and is no bridge; kiln leaves it alone")]
    NotABridge { bridge: String },
    #[error(
        "the subnet {subnet} of network {network} meets {with}; choose another subnet for the network"
    )]
    SubnetTaken {
        network: String,
        subnet: String,
        with: String,
    },
    #[error("cannot {step} bridge {bridge}: {source}")]
    Kernel {
        bridge: String,
        step: &'static str,
        source: NetlinkError,
    },
    #[error("bridge {bridge}: {source}")]
    Sysctl { bridge: String, source: SysctlError },
}

/// What [`ensure_bridge`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ensured {
    /// It was not there before.
    pub created: bool,
    /// What changed on the host beside the bridge, or stands in its way, for the user.
    pub notes: Vec<String>,
}

/// A bridge as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    pub name: String,
    /// Names of its ports.
    pub ports: Vec<String>,
}

/// Makes the network stand, or corrects what differs; nothing to do costs a few
/// requests to the kernel.
///
/// A new bridge's subnet is checked against the host's other addresses and routes.
/// Two roots that chose the same free subnet at the same moment both pass this
/// check; then the kernel decides: only one of them can add the service range's
/// route, the other's bridge is taken back and [`BridgeError::SubnetTaken`] returned.
pub fn ensure_bridge(network: &BridgeNetwork) -> Result<Ensured, BridgeError> {
    let bridge = network.bridge.as_str();
    if !is_interface_name(bridge) {
        return Err(BridgeError::Name {
            bridge: bridge.to_owned(),
        });
    }
    let kernel = |step| {
        move |source| BridgeError::Kernel {
            bridge: bridge.to_owned(),
            step,
            source,
        }
    };
    let mut channel = Channel::route().map_err(|e| kernel("look for")(e.into()))?;
    let mut ensured = Ensured::default();
    let index = match link::find(&mut channel, bridge).map_err(kernel("look for"))? {
        Some(link) if !link.is_bridge => {
            return Err(BridgeError::NotABridge {
                bridge: bridge.to_owned(),
            });
        }
        Some(link) => link.index,
        None => {
            refuse_conflict(&mut channel, network)?;
            ensured.created = true;
            create(&mut channel, network).map_err(kernel("make"))?
        }
    };
    let made = configure(&mut channel, network, index, &mut ensured.notes);
    if let (Err(e), true) = (&made, ensured.created) {
        tracing::debug!(bridge, error = %e, "the new bridge is taken back");
        link::remove(&mut channel, index).map_err(kernel("remove"))?;
    }
    made.map(|()| ensured)
}

fn create(channel: &mut Channel, network: &BridgeNetwork) -> Result<u32, NetlinkError> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(network.bridge.clone()),
        // Fixed: a bridge without an address of its own takes its lowest port's,
        // which changes as instances come and go.
        LinkAttribute::Address(mac_of(network.gateway()).to_vec()),
        bridge_settings(),
    ];
    let made = channel.change(
        RouteNetlinkMessage::NewLink(message),
        NLM_F_CREATE | NLM_F_EXCL,
    );
    match made {
        // Another of our processes was faster; the same settings follow.
        Err(e) if !e.is(libc::EEXIST) => return Err(e),
        _ => {}
    }
    match link::find(channel, &network.bridge)? {
        Some(link) => Ok(link.index),
        None => Err(std::io::Error::from_raw_os_error(libc::ENODEV).into()),
    }
}

/// Ports forward at once (no spanning tree, no delay); multicast is not snooped.
fn bridge_settings() -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Bridge),
        LinkInfo::Data(InfoData::Bridge(vec![
            InfoBridge::StpState(BridgeStpState::Disabled),
            InfoBridge::ForwardDelay(0),
            InfoBridge::MulticastSnooping(false),
        ])),
    ])
}

fn configure(
    channel: &mut Channel,
    network: &BridgeNetwork,
    index: u32,
    notes: &mut Vec<String>,
) -> Result<(), BridgeError> {
    let name = network.bridge.as_str();
    let kernel = |step| {
        move |source| BridgeError::Kernel {
            bridge: name.to_owned(),
            step,
            source,
        }
    };
    settings(network, notes).map_err(|source| BridgeError::Sysctl {
        bridge: name.to_owned(),
        source,
    })?;
    give_address(channel, network, index).map_err(kernel("give an address to"))?;
    let mtu = match network.mtu {
        Some(mtu) => mtu,
        None => uplink_mtu(channel).map_err(kernel("find the uplink for"))?,
    };
    bring_up(channel, network, index, mtu).map_err(kernel("bring up"))?;
    route_services(channel, network, index).map_err(|e| {
        if e.is(libc::EEXIST) {
            taken(
                network,
                "another network with the same service addresses".to_owned(),
            )
        } else {
            kernel("route service addresses of")(e)
        }
    })
}

/// The bridge's kernel settings; see the module's page.
fn settings(network: &BridgeNetwork, notes: &mut Vec<String>) -> Result<(), SysctlError> {
    let name = network.bridge.as_str();
    sysctl::without_ipv6(name)?;
    if !network.internal {
        let all = PathBuf::from("/proc/sys/net/ipv4/ip_forward");
        if sysctl::read(all.clone())? == "0" {
            sysctl::write(all, "1")?;
            notes.push(
                "turned on net.ipv4.ip_forward, so that instances reach the outside; the host now \
                 passes packets between its other interfaces too, unless a firewall forbids it"
                    .to_owned(),
            );
        }
    }
    let forwarding = if network.internal { "0" } else { "1" };
    sysctl::write(sysctl::ipv4(name, "forwarding"), forwarding)?;
    sysctl::write(sysctl::ipv4(name, "rp_filter"), "1")?;
    sysctl::write(sysctl::ipv4(name, "send_redirects"), "0")?;
    sysctl::write(sysctl::ipv4(name, "arp_ignore"), "0")?;
    // The kernel takes the larger of `all` and the interface's own.
    let ignore = sysctl::read(sysctl::ipv4("all", "arp_ignore"))?;
    if ignore != "0" {
        notes.push(format!(
            "net.ipv4.conf.all.arp_ignore is {ignore}: the host won't answer for service addresses; set it to 0"
        ));
    }
    Ok(())
}

/// The gateway's address and no other IPv4 address.
fn give_address(
    channel: &mut Channel,
    network: &BridgeNetwork,
    index: u32,
) -> Result<(), NetlinkError> {
    let (gateway, prefix) = (network.gateway(), network.subnet.prefix());
    let mut present = false;
    for have in survey::addresses(channel)?
        .into_iter()
        .filter(|a| a.index == index)
    {
        if (have.address, have.prefix) == (gateway, prefix) {
            present = true;
        } else {
            channel.change(RouteNetlinkMessage::DelAddress(have.message), 0)?;
        }
    }
    if present {
        return Ok(());
    }
    let broadcast = network.subnet.nth(network.subnet.len() - 1);
    let message = address_message(index, gateway, prefix, broadcast);
    channel.change(
        RouteNetlinkMessage::NewAddress(message),
        NLM_F_CREATE | NLM_F_REPLACE,
    )
}

/// An IPv4 address for an interface.
pub(super) fn address_message(
    index: u32,
    address: Ipv4Addr,
    prefix: u8,
    broadcast: Ipv4Addr,
) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = prefix;
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    message.attributes = vec![
        AddressAttribute::Local(IpAddr::V4(address)),
        AddressAttribute::Address(IpAddr::V4(address)),
        AddressAttribute::Broadcast(broadcast),
    ];
    message
}

/// The smallest MTU among interfaces with a default route, at most the usual one:
/// in a cloud network with smaller frames, instances must not send larger ones.
fn uplink_mtu(channel: &mut Channel) -> Result<u32, NetlinkError> {
    let uplinks: Vec<u32> = survey::routes(channel)?
        .iter()
        .filter(|route| route.prefix == 0)
        .filter_map(|route| route.index)
        .collect();
    let mut mtu = USUAL_MTU;
    for index in uplinks {
        if let Some(link) = link::by_index(channel, index)? {
            mtu = mtu.min(link.mtu);
        }
    }
    Ok(mtu)
}

fn bring_up(
    channel: &mut Channel,
    network: &BridgeNetwork,
    index: u32,
    mtu: u32,
) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![
        LinkAttribute::Address(mac_of(network.gateway()).to_vec()),
        LinkAttribute::Mtu(mtu),
        bridge_settings(),
    ];
    channel.change(RouteNetlinkMessage::NewLink(message), 0)
}

/// The AnyIP route of the service range, and none of an earlier subnet.
fn route_services(
    channel: &mut Channel,
    network: &BridgeNetwork,
    index: u32,
) -> Result<(), NetlinkError> {
    let range = network.service_range();
    let mut present = false;
    for have in survey::routes(channel)? {
        // Local routes of single addresses are the kernel's own.
        if !have.local || have.index != Some(index) || have.prefix == 32 {
            continue;
        }
        let span = (have.destination, have.prefix);
        if span == (range.base(), range.prefix()) && have.source == Some(network.gateway()) {
            present = true;
        } else {
            let stale = local_route(index, span, have.source);
            channel.change(RouteNetlinkMessage::DelRoute(stale), 0)?;
        }
    }
    if present {
        return Ok(());
    }
    // Exclusive: one owner of a range, whoever asks at the same time.
    let route = local_route(
        index,
        (range.base(), range.prefix()),
        Some(network.gateway()),
    );
    channel.change(
        RouteNetlinkMessage::NewRoute(route),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

fn local_route(index: u32, span: Span, source: Option<Ipv4Addr>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = span.1;
    message.header.table = LOCAL_TABLE;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Host;
    message.header.kind = RouteType::Local;
    message.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(span.0)),
        RouteAttribute::Oif(index),
    ];
    let source = source.map(|a| RouteAttribute::PrefSource(RouteAddress::Inet(a)));
    message.attributes.extend(source);
    message
}

/// Refuses a subnet that meets an interface's address or a route as narrow as itself;
/// a wider route (a VPN's) only loses this part of its span.
fn refuse_conflict(channel: &mut Channel, network: &BridgeNetwork) -> Result<(), BridgeError> {
    let kernel = |source| BridgeError::Kernel {
        bridge: network.bridge.clone(),
        step: "check the subnet of",
        source,
    };
    let addresses = survey::addresses(channel).map_err(kernel)?;
    let routes = survey::routes(channel).map_err(kernel)?;
    let subnet = &network.subnet;
    let address = addresses
        .iter()
        .find(|a| meets(subnet, (a.address, a.prefix)));
    let route = routes
        .iter()
        .find(|r| r.prefix >= subnet.prefix() && meets(subnet, (r.destination, r.prefix)));
    let (what, index) = match (address, route) {
        (Some(a), _) => (
            format!("the address {}/{}", a.address, a.prefix),
            Some(a.index),
        ),
        (None, Some(r)) => (
            format!("the route to {}/{}", r.destination, r.prefix),
            r.index,
        ),
        (None, None) => return Ok(()),
    };
    let interface = match index {
        Some(index) => link::by_index(channel, index).map_err(kernel)?,
        None => None,
    };
    let of = interface
        .map(|link| format!(" of interface {}", link.name))
        .unwrap_or_default();
    Err(taken(network, format!("{what}{of}")))
}

fn taken(network: &BridgeNetwork, with: String) -> BridgeError {
    BridgeError::SubnetTaken {
        network: network.name.clone(),
        subnet: network.subnet.to_string(),
        with,
    }
}

/// Removes a bridge with its address and service route; its ports are let go. One that
/// is not there is fine.
pub fn remove_bridge(bridge: &str) -> Result<(), BridgeError> {
    let kernel = |source| BridgeError::Kernel {
        bridge: bridge.to_owned(),
        step: "remove",
        source,
    };
    let mut channel = Channel::route().map_err(|e| kernel(e.into()))?;
    match link::find(&mut channel, bridge).map_err(kernel)? {
        None => Ok(()),
        Some(link) if !link.is_bridge => Err(BridgeError::NotABridge {
            bridge: bridge.to_owned(),
        }),
        Some(link) => link::remove(&mut channel, link.index).map_err(kernel),
    }
}

/// The bridges whose names start with `prefix`: what a root left behind.
pub fn bridges(prefix: &str) -> Result<Vec<Bridge>, BridgeError> {
    let kernel = |source| BridgeError::Kernel {
        bridge: format!("{prefix}*"),
        step: "list",
        source,
    };
    let mut channel = Channel::route().map_err(|e| kernel(e.into()))?;
    let links = link::all(&mut channel).map_err(kernel)?;
    let ports = |bridge: &Link| {
        let own = links.iter().filter(|l| l.bridge == Some(bridge.index));
        own.map(|l| l.name.clone()).collect()
    };
    let ours = links
        .iter()
        .filter(|l| l.is_bridge && l.name.starts_with(prefix));
    Ok(ours
        .map(|l| Bridge {
            name: l.name.clone(),
            ports: ports(l),
        })
        .collect())
}

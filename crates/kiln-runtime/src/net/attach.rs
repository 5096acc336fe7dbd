//! Joins an instance's network namespace to a bridge with a veth pair.
//!
//! The host's end is named after the namespace's file and the interface, so that a
//! half-made or stale pair is found and replaced. When [`attach`] returns, the
//! bridge passes the instance's frames on: its first connection loses no packet.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_model::instance::Interface;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::bridge;
use super::channel::{Channel, NetlinkError};
use super::link::{self, Link};
use super::names::{is_interface_name, mac_of, parse_mac, veth_name};
use super::netns::{NetnsError, inside};
use super::sysctl::{self, SysctlError};

/// How long a bridge port may take to forward; it takes about a millisecond.
const PORT_LIMIT: Duration = Duration::from_secs(2);
const PORT_POLL: Duration = Duration::from_micros(200);

/// Why an instance could not be joined to a bridge.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("interface {interface}: {problem}")]
    Interface { interface: String, problem: String },
    #[error("there is no bridge {bridge} for interface {interface}")]
    NoBridge { interface: String, bridge: String },
    #[error("cannot {step} interface {interface} on bridge {bridge}: {source}")]
    Kernel {
        interface: String,
        bridge: String,
        step: &'static str,
        source: NetlinkError,
    },
    #[error("interface {interface}: {source}")]
    Sysctl {
        interface: String,
        source: SysctlError,
    },
    #[error("the port {port} of bridge {bridge} did not begin to forward within {} s", PORT_LIMIT.as_secs())]
    Port { port: String, bridge: String },
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// What the pair is made with, checked.
struct Plan<'a> {
    interface: &'a Interface,
    port: String,
    mac: [u8; 6],
    mtu: u32,
    bridge: Link,
}

/// Joins the namespace to the bridge: a pair with its end inside named, addressed,
/// up, with the default route if a gateway is given. A pair left from an earlier
/// try is replaced. On failure nothing stays.
pub fn attach(netns: &Path, interface: &Interface) -> Result<(), AttachError> {
    let mut host = Channel::route().map_err(|e| kernel(interface, "make")(e.into()))?;
    let plan = plan(&mut host, netns, interface)?;
    if let Some(stale) = link::find(&mut host, &plan.port).map_err(kernel(interface, "look for"))? {
        link::remove(&mut host, stale.index).map_err(kernel(interface, "replace"))?;
    }
    let joined = inside(netns, |namespace| {
        create(&mut host, &plan, namespace).map_err(kernel(interface, "make"))?;
        set_up(&mut host, &plan)
    });
    let joined = joined.map_err(AttachError::from).and_then(|result| result);
    if joined.is_err() {
        // The error that counts is the one above; the next try replaces what stays.
        let _ = remove_port(&mut host, &plan.port);
    }
    joined
}

/// Removes the pair. Nothing there is fine.
pub fn detach(netns: &Path, interface: &Interface) -> Result<(), AttachError> {
    Channel::route()
        .map_err(NetlinkError::from)
        .and_then(|mut host| remove_port(&mut host, &veth_name(netns, &interface.name)))
        .map_err(kernel(interface, "remove"))
}

fn remove_port(host: &mut Channel, port: &str) -> Result<(), NetlinkError> {
    match link::find(host, port)? {
        Some(link) => link::remove(host, link.index),
        None => Ok(()),
    }
}

fn kernel(interface: &Interface, step: &'static str) -> impl Fn(NetlinkError) -> AttachError {
    let (name, bridge) = (interface.name.clone(), interface.bridge.clone());
    move |source| AttachError::Kernel {
        interface: name.clone(),
        bridge: bridge.clone(),
        step,
        source,
    }
}

fn plan<'a>(
    host: &mut Channel,
    netns: &Path,
    interface: &'a Interface,
) -> Result<Plan<'a>, AttachError> {
    let refuse = |problem: String| AttachError::Interface {
        interface: interface.name.clone(),
        problem,
    };
    if !is_interface_name(&interface.name) || interface.name == "lo" {
        return Err(refuse(
            "its name must be 1 to 15 printable bytes and not lo".to_owned(),
        ));
    }
    if !(1..=31).contains(&interface.prefix) {
        return Err(refuse(format!(
            "/{} is no prefix of an instance's address",
            interface.prefix
        )));
    }
    let mac = match &interface.mac {
        None => mac_of(interface.address),
        Some(text) => parse_mac(text).ok_or_else(|| {
            refuse(format!(
                "`{text}` is no unicast hardware address (aa:bb:cc:dd:ee:ff)"
            ))
        })?,
    };
    let found = if is_interface_name(&interface.bridge) {
        link::find(host, &interface.bridge).map_err(kernel(interface, "find the bridge for"))?
    } else {
        None
    };
    let bridge = found
        .filter(|link| link.is_bridge)
        .ok_or_else(|| AttachError::NoBridge {
            interface: interface.name.clone(),
            bridge: interface.bridge.clone(),
        })?;
    Ok(Plan {
        interface,
        port: veth_name(netns, &interface.name),
        mac,
        mtu: interface.mtu.unwrap_or(bridge.mtu),
        bridge,
    })
}

/// Both ends in one request: the host's end is a port and up, the other is in the
/// namespace from its birth, down until it has its address.
fn create(host: &mut Channel, plan: &Plan<'_>, namespace: &File) -> Result<(), NetlinkError> {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(plan.interface.name.clone()),
        LinkAttribute::Address(plan.mac.to_vec()),
        LinkAttribute::Mtu(plan.mtu),
        LinkAttribute::NetNsFd(namespace.as_raw_fd()),
    ];
    let mut port = LinkMessage::default();
    port.header.flags = LinkFlags::Up;
    port.header.change_mask = LinkFlags::Up;
    port.attributes = vec![
        LinkAttribute::IfName(plan.port.clone()),
        LinkAttribute::Mtu(plan.mtu),
        LinkAttribute::Controller(plan.bridge.index),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    host.change(
        RouteNetlinkMessage::NewLink(port),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

/// The end inside, by a thread that is inside; `host` speaks to the host's namespace.
fn set_up(host: &mut Channel, plan: &Plan<'_>) -> Result<(), AttachError> {
    let interface = plan.interface;
    sysctl::without_ipv6(&interface.name)
        .and_then(|()| sysctl::write(sysctl::ipv4(&interface.name, "arp_notify"), "1"))
        .map_err(|source| AttachError::Sysctl {
            interface: interface.name.clone(),
            source,
        })?;
    let refused = kernel(interface, "configure");
    let mut channel = Channel::route().map_err(|e| refused(e.into()))?;
    let index = configure(&mut channel, interface).map_err(refused)?;
    wait_until_forwarding(host, plan)?;
    announce(&mut channel, index, plan.mac).map_err(kernel(interface, "announce"))
}

/// An ARP announcement (RFC 5227, section 3), so that peers and the bridge learn where
/// the address lives now. With `arp_notify` the kernel sends one when the hardware
/// address is set, also to what it is. (A packet socket would do, but closing one
/// waits 10 ms for the kernel's readers.)
fn announce(channel: &mut Channel, index: u32, mac: [u8; 6]) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::Address(mac.to_vec())];
    channel.change(RouteNetlinkMessage::SetLink(message), 0)
}

/// Address, up, default route.
fn configure(channel: &mut Channel, interface: &Interface) -> Result<u32, NetlinkError> {
    let index = match link::find(channel, &interface.name)? {
        Some(link) => link.index,
        None => return Err(io::Error::from_raw_os_error(libc::ENODEV).into()),
    };
    let host_bits = u32::MAX
        .checked_shr(u32::from(interface.prefix))
        .unwrap_or(0);
    let broadcast = Ipv4Addr::from(u32::from(interface.address) | host_bits);
    let message = bridge::address_message(index, interface.address, interface.prefix, broadcast);
    channel.change(
        RouteNetlinkMessage::NewAddress(message),
        NLM_F_CREATE | NLM_F_EXCL,
    )?;
    let mut up = LinkMessage::default();
    up.header.index = index;
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    channel.change(RouteNetlinkMessage::SetLink(up), 0)?;
    if let Some(gateway) = interface.gateway {
        let route = default_route(index, gateway);
        channel.change(
            RouteNetlinkMessage::NewRoute(route),
            NLM_F_CREATE | NLM_F_EXCL,
        )?;
    }
    Ok(index)
}

pub(super) fn default_route(index: u32, gateway: Ipv4Addr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        RouteAttribute::Gateway(RouteAddress::Inet(gateway)),
        RouteAttribute::Oif(index),
    ];
    message
}

/// A worker of the kernel takes note of a carrier shortly after it is there, and only
/// then starts the interface's queue; what is sent until then is lost. This goes for
/// the port (whose state the bridge believes; unknown, as at first, counts as up)
/// and, with its first port, for the bridge itself.
fn wait_until_forwarding(host: &mut Channel, plan: &Plan<'_>) -> Result<(), AttachError> {
    let look = kernel(plan.interface, "look for");
    let end = Instant::now() + PORT_LIMIT;
    loop {
        let port = link::find(host, &plan.port).map_err(&look)?;
        if port.is_some_and(|link| link.up && link.forwarding) {
            let bridge = link::by_index(host, plan.bridge.index).map_err(&look)?;
            if bridge.is_some_and(|link| link.up) {
                return Ok(());
            }
        }
        if Instant::now() >= end {
            return Err(AttachError::Port {
                port: plan.port.clone(),
                bridge: plan.interface.bridge.clone(),
            });
        }
        std::thread::sleep(PORT_POLL);
    }
}

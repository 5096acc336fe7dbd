//! Links as the kernel lists them: looked up, listed, removed.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    BridgePortState, InfoBridgePort, InfoKind, InfoPortData, LinkAttribute, LinkInfo, LinkMessage,
    State,
};

use super::channel::{Channel, NetlinkError};

/// What kiln wants to know of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub index: u32,
    pub name: String,
    pub is_bridge: bool,
    pub mtu: u32,
    /// The bridge's index, of a port.
    pub bridge: Option<u32>,
    /// The bridge passes this port's frames on. Not to be believed before `up`.
    pub forwarding: bool,
    /// The kernel has taken note that both ends are up (operational state, RFC 2863).
    pub up: bool,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Link {
            index: message.header.index,
            ..Link::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::OperState(state) => link.up = state == State::Up,
                LinkAttribute::Controller(index) => link.bridge = Some(index),
                LinkAttribute::LinkInfo(infos) => infos.into_iter().for_each(|i| link.learn(i)),
                _ => {}
            }
        }
        link
    }
}

impl Link {
    fn learn(&mut self, info: LinkInfo) {
        match info {
            LinkInfo::Kind(InfoKind::Bridge) => self.is_bridge = true,
            LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                self.forwarding =
                    port.contains(&InfoBridgePort::State(BridgePortState::Forwarding));
            }
            _ => {}
        }
    }
}

/// The link of that name, if there is one.
pub(super) fn find(channel: &mut Channel, name: &str) -> Result<Option<Link>, NetlinkError> {
    let mut message = LinkMessage::default();
    message
        .attributes
        .push(LinkAttribute::IfName(name.to_owned()));
    get(channel, message)
}

pub(super) fn by_index(channel: &mut Channel, index: u32) -> Result<Option<Link>, NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    get(channel, message)
}

fn get(channel: &mut Channel, message: LinkMessage) -> Result<Option<Link>, NetlinkError> {
    match channel.get(RouteNetlinkMessage::GetLink(message)) {
        Ok(RouteNetlinkMessage::NewLink(message)) => Ok(Some(message.into())),
        Ok(_) => Ok(None),
        Err(e) if e.is(libc::ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

pub(super) fn all(channel: &mut Channel) -> Result<Vec<Link>, NetlinkError> {
    let mut links = Vec::new();
    channel.dump(
        RouteNetlinkMessage::GetLink(LinkMessage::default()),
        |message| {
            if let RouteNetlinkMessage::NewLink(message) = message {
                links.push(message.into());
            }
        },
    )?;
    Ok(links)
}

/// Removes a link (and a veth's other end with it). One that is gone is fine.
pub(super) fn remove(channel: &mut Channel, index: u32) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    match channel.change(RouteNetlinkMessage::DelLink(message), 0) {
        Err(e) if !e.is(libc::ENODEV) => Err(e),
        _ => Ok(()),
    }
}

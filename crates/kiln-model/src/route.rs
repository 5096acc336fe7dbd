//! Where traffic goes: the whole of what the proxy is told, as one value. Applying a
//! table is idempotent; the proxy refuses one of an older generation.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::spec::Protocol;
use crate::{EnvironmentName, Generation, InstanceId, Millis, ServiceName};

/// One environment's routes. The proxy holds one table per environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutingTable {
    pub environment: EnvironmentName,
    pub generation: Generation,
    pub services: BTreeMap<ServiceName, ServiceRoute>,
    /// Host ports the proxy listens on.
    pub published: Vec<Published>,
    pub networks: Vec<NetworkNames>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRoute {
    pub mode: RouteMode,
    /// Those that take new connections. Draining instances are simply no longer here;
    /// what they still hold goes on until [drained](DrainReport).
    pub backends: Vec<Backend>,
    /// `None`: all backends are alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    /// Ports known to speak a given protocol; others are recognised from the first bytes.
    pub protocols: BTreeMap<u16, AppProtocol>,
}

/// Some of the backends get a part of the traffic, the others the rest: HTTP request by
/// request, everything else connection by connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// Percent.
    pub weight: u8,
    pub to: BTreeSet<InstanceId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouteMode {
    /// New connections and requests go to the backends, each to the one with the
    /// fewest in flight; with no backend they are refused at once.
    Serve,
    /// New connections and requests wait, for at most this long, for the mode to
    /// change; then they are refused (503 for HTTP).
    Park { limit: Millis },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    pub instance: InstanceId,
    /// Reached at its own address with the port the client asked for (service
    /// addresses) or the published port's target.
    pub address: IpAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AppProtocol {
    Http,
    /// HTTP/2 with prior knowledge towards the instance.
    H2c,
    Tcp,
}

/// A host port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Published {
    pub listen: SocketAddr,
    pub protocol: Protocol,
    pub service: ServiceName,
    pub target: u16,
}

/// The names that resolve on one network, and the addresses they stand for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkNames {
    pub network: String,
    /// DNS is answered on this address, port 53, and only to this network.
    pub gateway: Ipv4Addr,
    /// Names (lower case): the service, its aliases, container_name.
    pub names: BTreeMap<String, Name>,
    /// Service address → service: what arrives here on any TCP port (redirected to the
    /// proxy's catch-all listener) goes to that service's backends on this network.
    pub addresses: BTreeMap<Ipv4Addr, ServiceName>,
    /// For instances on several networks, by their address on this one: the gateways of the
    /// others, whose names they may ask for here, too.
    #[serde(default)]
    pub also: BTreeMap<Ipv4Addr, Vec<Ipv4Addr>>,
    /// Instances' addresses on this network, where they differ from [`Backend::address`].
    pub backends: BTreeMap<InstanceId, Ipv4Addr>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Name {
    /// Stable service addresses.
    Addresses(Vec<Ipv4Addr>),
    Alias(String),
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainReport {
    /// Connections that had to be closed when the limit was reached.
    pub cut: u32,
}

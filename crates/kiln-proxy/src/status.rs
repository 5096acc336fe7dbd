//! What the proxy tells about itself: plain data, also the answers of the control socket.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use kiln_model::spec::Protocol;
use kiln_model::{EnvironmentName, Generation, InstanceId, ServiceName};
use serde::{Deserialize, Serialize};

/// The whole state, at one moment. Totals count since the proxy's start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub pid: u32,
    /// kiln's version of the running proxy.
    pub version: String,
    pub uptime_ms: u64,
    /// Clients' connections that are open now, of any kind.
    pub connections: u64,
    pub ports: Ports,
    pub environments: BTreeMap<EnvironmentName, EnvironmentStatus>,
    /// Instances no longer in any table which still have something in flight.
    pub draining: Vec<InstanceStatus>,
    pub dns: DnsStatus,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EnvironmentStatus {
    pub generation: Generation,
    pub services: BTreeMap<ServiceName, ServiceStatus>,
    pub listeners: Vec<ListenerStatus>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListenerStatus {
    pub listen: SocketAddr,
    pub protocol: Protocol,
    pub service: ServiceName,
    pub target: u16,
    /// Why nothing listens there, if so.
    pub failed: Option<ListenFailure>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub parked: bool,
    /// Requests and connections waiting for the end of parking.
    pub waiting: u64,
    pub failures: Failures,
    pub instances: Vec<InstanceStatus>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceStatus {
    pub instance: InstanceId,
    pub address: IpAddr,
    /// Requests, upgraded and raw connections which it holds now.
    pub in_flight: u64,
    /// Requests answered (HTTP).
    pub requests: u64,
    /// Raw connections begun.
    pub connections: u64,
    /// Answers by hundreds of the status: `[1xx, 2xx, 3xx, 4xx, 5xx]`.
    pub answers: [u64; 5],
    /// Sum of the times from request to first byte of the answer, in microseconds.
    pub latency_us: u64,
    pub connect_failures: u64,
    /// Connections and requests cut at a drain limit.
    pub cut: u64,
}

/// Requests and connections which the proxy could not serve, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failures {
    /// No instance in the table.
    pub no_backend: u64,
    /// Waited for as long as parking may last.
    pub park_timeout: u64,
    /// Too many were waiting already.
    pub park_full: u64,
    /// No instance accepted a connection.
    pub connect: u64,
    /// None answered to a connection attempt in time.
    pub connect_timeout: u64,
    /// The instance closed the connection before it answered.
    pub no_answer: u64,
    /// The instance closed the connection within its answer.
    pub half_answer: u64,
    /// Cut at the drain limit.
    pub drain_cut: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsStatus {
    /// Questions about kiln's own names.
    pub answered: u64,
    /// Questions passed on to the host's name servers.
    pub forwarded: u64,
    /// Forwarded ones without an answer.
    pub failed: u64,
}

/// Where the proxy listens for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// TCP to service addresses has to be redirected here. Stable over restarts of the
    /// proxy where nothing else takes it in the meantime.
    pub catch_all: u16,
    /// The port for DNS on every network's gateway.
    pub dns: u16,
}

/// The outcome of applying a table. Everything that is not in `failed` is in effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    pub generation: Generation,
    pub failed: Vec<ListenFailure>,
}

/// Something of a table that the proxy could not listen on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenFailure {
    pub listen: SocketAddr,
    pub purpose: Purpose,
    /// For people: what is wrong, and what to do where that is known.
    pub cause: String,
    /// Who has the port, if it is taken and `/proc` tells.
    pub holder: Option<Holder>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    Published {
        service: ServiceName,
        protocol: Protocol,
    },
    Dns {
        network: String,
    },
}

/// A process on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    pub program: String,
}

impl std::fmt::Display for ListenFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let listen = self.listen;
        match &self.purpose {
            Purpose::Published { service, protocol } => {
                let protocol = match protocol {
                    Protocol::Tcp => "tcp",
                    Protocol::Udp => "udp",
                };
                write!(f, "port {listen}/{protocol} of service `{service}`")?;
            }
            Purpose::Dns { network } => write!(f, "DNS of network `{network}` on {listen}")?,
        }
        write!(f, ": {}", self.cause)?;
        if let Some(holder) = &self.holder {
            write!(f, " (by `{}`, process {})", holder.program, holder.pid)?;
        }
        Ok(())
    }
}

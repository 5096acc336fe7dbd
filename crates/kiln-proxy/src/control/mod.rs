//! The control socket: what is said over it, the server's and the client's side.

pub mod client;
pub(crate) mod server;

use std::collections::BTreeMap;

use kiln_model::route::DrainReport;
use kiln_model::{EnvironmentName, InstanceId, Millis, RoutingTable, Traffic};
use serde::{Deserialize, Serialize};

use crate::listeners::Wanted;
use crate::status::{Applied, Ports, Status};

/// The version of this protocol. A client refuses a proxy of another one.
pub const PROTOCOL: u32 = 1;

/// One line from the client, like `{"drain":{"instance":"web-1","limit":60000}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    Hello,
    Apply(Box<RoutingTable>),
    /// Answered when the instance has nothing in flight any more.
    Drain {
        instance: InstanceId,
        limit: Millis,
    },
    RemoveEnvironment(EnvironmentName),
    Status,
    /// What was counted of these instances.
    Traffic(Vec<InstanceId>),
    Ports,
    /// Copies of all listening sockets, sent beside the answer. Changes nothing.
    TakeOver,
    /// Another proxy serves on the sockets now: take nothing new, let go of the control
    /// socket's place, and end with the last connection.
    Retire,
    Shutdown,
}

/// One line back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Hello {
        protocol: u32,
        pid: u32,
    },
    Applied(Applied),
    Drained(DrainReport),
    Done,
    Status(Box<Status>),
    Traffic(BTreeMap<InstanceId, Traffic>),
    Ports(Ports),
    /// What the descriptors before this line are for, in their order.
    Sockets(Vec<Wanted>),
    /// Nothing has changed; the text is for people.
    Refused {
        kind: Refusal,
        message: String,
    },
}

/// Why something is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// A newer generation is in effect.
    OlderGeneration,
    /// The request makes no sense: it is not understood, or contradicts itself.
    Invalid,
    /// To be drained, but a table still names it.
    StillServing,
    /// The state could not be written.
    State,
}

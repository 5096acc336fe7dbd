//! The host's side of networks: bridges, instances' network namespaces and their
//! interfaces, and the firewall table that joins service addresses to the proxy.
//!
//! Everything is asked of the kernel over netlink, synchronously; no program (`ip`,
//! `nft`, `iptables`) is needed. Every function is idempotent: what stands already is
//! kept or corrected, what is gone already is fine. Nothing is remembered here: the
//! kernel is the truth, and names follow from what they are for.
//!
//! How a packet goes ([`kiln_model::network`] explains the two halves of a subnet):
//! - instance or host → service address (TCP): the host is the address's owner (a
//!   local route), the firewall redirects to the proxy's catch-all port, the proxy
//!   asks for the original destination (`SO_ORIGINAL_DST`) and connects to an instance;
//! - instance → outside: forwarded and masqueraded, unless its network is internal;
//! - instance → another network, outside → instance: dropped. What is published comes
//!   in through the proxy;
//! - host → instance: plain.
//!
//! IPv6: instances get none. Loopback inside has `::1`; other interfaces, bridges
//! and ports have IPv6 disabled.
//!
//! Must not enter: knowledge of releases and services, choice of addresses (the plan
//! makes it), containers' processes.

mod attach;
mod bridge;
mod channel;
mod conflict;
mod firewall;
mod link;
mod names;
mod netns;
mod nft;
mod subnet;
mod survey;
mod sysctl;
mod watch;

pub use attach::{AttachError, attach, detach};
pub use bridge::{Bridge, BridgeError, Ensured, bridges, ensure_bridge, remove_bridge};
pub use channel::NetlinkError;
pub use conflict::{forward_policy_conflict, input_policy_conflict};
pub use firewall::{
    BRIDGE_PREFIX, Direct, Firewall, FirewallError, Recorder, TABLE_PREFIX, remove_stale_tables,
};
pub use names::{INTERFACE_NAME_BYTES, mac_of, root_tag, veth_name};
pub use netns::{NetnsError, create_netns, delete_netns, inside, is_netns, netns_files};
pub use subnet::{DEFAULT_POOLS, FreeSubnetError, SUBNET_PREFIX, free_subnet, free_subnet_in};
pub use sysctl::SysctlError;
pub use watch::RulesetWatch;

#[cfg(test)]
mod recorder_tests;
#[cfg(test)]
mod tests;

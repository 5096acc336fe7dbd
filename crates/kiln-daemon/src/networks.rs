//! The host's side of all environments' networks: subnets that don't meet, bridges,
//! and the one firewall table of this root.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use kiln_model::network::{BridgeNetwork, Subnet};
use kiln_model::{Digest, EnvironmentName, NetworkName, Release};
use kiln_plan::{Layout, World};
use kiln_runtime::net;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, bind, socket, sockopt};

/// Where a network's gateway answers for names.
const DNS_PORT: u16 = 53;
/// Its place in its subnet.
const GATEWAY: u32 = 1;

pub struct Networks {
    tag: String,
    /// Laid out networks, by environment: what subnets are taken.
    known: Mutex<BTreeMap<EnvironmentName, Vec<BridgeNetwork>>>,
    /// Those that stand now: what the firewall is made of.
    standing: Mutex<BTreeMap<EnvironmentName, Vec<BridgeNetwork>>>,
}

impl Networks {
    pub fn new(root: &Path, worlds: &[World]) -> Self {
        let known = worlds
            .iter()
            .map(|w| {
                (
                    w.environment.clone(),
                    w.layout.networks.values().cloned().collect(),
                )
            })
            .collect();
        Self {
            tag: net::root_tag(root),
            known: Mutex::new(known),
            standing: Mutex::new(BTreeMap::new()),
        }
    }

    /// Adds the release's networks to the layout; those that are there and still as the
    /// file says stay.
    pub fn lay_out(
        &self,
        environment: &EnvironmentName,
        release: &Release,
        layout: &mut Layout,
    ) -> Result<(), String> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, network) in &release.networks {
            if network.external {
                return Err(format!(
                    "network `{key}` is external: networks shared between projects are not there yet"
                ));
            }
            let asked: Option<Subnet> = match &network.subnet {
                Some(text) => Some(text.parse().map_err(|e| format!("network `{key}`: {e}"))?),
                None => None,
            };
            let fits = layout.networks.get(key).is_some_and(|have| {
                asked.is_none_or(|a| a == have.subnet)
                    && have.internal == network.internal
                    && have.mtu == network.mtu
                    && have.name == network.name
            });
            if fits {
                continue;
            }
            let taken: Vec<Subnet> = known
                .iter()
                .flat_map(|(env, list)| list.iter().map(move |n| (env, n)))
                .filter(|(env, n)| *env != environment || n.name != network.name)
                .map(|(_, n)| n.subnet)
                .chain(
                    layout
                        .networks
                        .iter()
                        .filter(|(k, _)| *k != key)
                        .map(|(_, n)| n.subnet),
                )
                .collect();
            let subnet = self.subnet_for(key, asked, &taken)?;
            layout.networks.insert(
                key.clone(),
                BridgeNetwork {
                    name: network.name.clone(),
                    bridge: self.bridge_name(environment, key),
                    subnet,
                    internal: network.internal,
                    mtu: network.mtu,
                },
            );
            // Service addresses of the old subnet mean nothing in a new one.
            layout.services.remove(key);
        }
        known.insert(
            environment.clone(),
            layout.networks.values().cloned().collect(),
        );
        Ok(())
    }

    fn subnet_for(
        &self,
        key: &NetworkName,
        asked: Option<Subnet>,
        taken: &[Subnet],
    ) -> Result<Subnet, String> {
        match asked {
            Some(subnet) if taken.iter().any(|t| t.overlaps(&subnet)) => Err(format!(
                "network `{key}`: {subnet} overlaps another network of kiln's"
            )),
            Some(subnet) => Ok(subnet),
            None => free_subnet(taken).map_err(|e| format!("network `{key}`: {e}")),
        }
    }

    /// At most 15 bytes: `kn`, the root's tag, and a hash of whose network it is.
    fn bridge_name(&self, environment: &EnvironmentName, key: &NetworkName) -> String {
        let hash = Digest::of(format!("{environment}/{key}")).hex();
        format!(
            "{}{}{}",
            net::BRIDGE_PREFIX,
            self.tag,
            hash.get(..6).unwrap_or_default()
        )
    }

    /// Makes an environment's networks stand, and the firewall fit them.
    pub fn ensure(
        &self,
        environment: &EnvironmentName,
        networks: Vec<BridgeNetwork>,
        catch_all_port: u16,
    ) -> Result<(), String> {
        for network in &networks {
            for note in net::ensure_bridge(network)
                .map_err(|e| e.to_string())?
                .notes
            {
                tracing::warn!(network = %network.name, note);
            }
        }
        for table in net::remove_stale_tables().map_err(|e| e.to_string())? {
            tracing::info!(table, "removed the firewall table of a root that is gone");
        }
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = standing
            .insert(environment.clone(), networks.clone())
            .unwrap_or_default();
        self.firewall(&standing, catch_all_port)?;
        for old in before
            .iter()
            .filter(|old| !networks.iter().any(|n| n.bridge == old.bridge))
        {
            net::remove_bridge(&old.bridge).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Takes an environment's networks down.
    pub fn forget(&self, environment: &EnvironmentName, catch_all_port: u16) -> Result<(), String> {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        for network in standing.remove(environment).unwrap_or_default() {
            net::remove_bridge(&network.bridge).map_err(|e| e.to_string())?;
        }
        self.firewall(&standing, catch_all_port)
    }

    fn firewall(
        &self,
        standing: &BTreeMap<EnvironmentName, Vec<BridgeNetwork>>,
        catch_all_port: u16,
    ) -> Result<(), String> {
        let networks = standing.values().flatten().cloned().collect();
        net::Firewall {
            table: format!("{}{}", net::TABLE_PREFIX, self.tag),
            networks,
            catch_all_port,
        }
        .apply()
        .map_err(|e| e.to_string())
    }
}

/// So many subnets are tried before one is taken whose gateway's name server's port is
/// not free: a name server on all addresses makes no subnet better than another.
const SUBNETS_TRIED: usize = 32;

/// A subnet nobody uses. Another root's bridge may be gone while its proxy still listens
/// on the gateway's address, so that is looked at, too.
fn free_subnet(taken: &[Subnet]) -> Result<Subnet, net::FreeSubnetError> {
    let first = net::free_subnet(taken)?;
    let mut taken = taken.to_vec();
    let mut subnet = first;
    for _ in 0..SUBNETS_TRIED {
        if names_can_be_served(subnet.nth(GATEWAY)) {
            return Ok(subnet);
        }
        taken.push(subnet);
        match net::free_subnet(&taken) {
            Ok(next) => subnet = next,
            Err(_) => break,
        }
    }
    Ok(first)
}

/// Nobody listens on port 53 of this address, which need not exist yet.
fn names_can_be_served(gateway: Ipv4Addr) -> bool {
    let address = SocketAddrV4::new(gateway, DNS_PORT);
    [SocketType::DGRAM, SocketType::STREAM]
        .into_iter()
        .all(|kind| {
            let Ok(socket) = socket(AddressFamily::INET, kind, None) else {
                return true;
            };
            // What ended connections leave behind is no listener.
            let reuse = kind == SocketType::STREAM;
            let bound = sockopt::set_ip_freebind(&socket, true)
                .and_then(|()| sockopt::set_socket_reuseaddr(&socket, reuse))
                .and_then(|()| bind(&socket, &address));
            bound != Err(Errno::ADDRINUSE)
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_gateway_where_someone_listens_is_seen_though_its_bridge_is_gone() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("KILN_TEST_STRICT").is_none(), "needs root");
            eprintln!("SKIPPED: needs root");
            return;
        }
        let gateway = Ipv4Addr::new(192, 0, 2, 77);
        assert!(names_can_be_served(gateway));
        let other = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
        sockopt::set_ip_freebind(&other, true).unwrap();
        bind(&other, &SocketAddrV4::new(gateway, DNS_PORT)).unwrap();
        assert!(!names_can_be_served(gateway));
        drop(other);
        assert!(names_can_be_served(gateway));
    }
}

//! The host's side of all environments' networks: subnets that don't meet, bridges,
//! and the one firewall table of this root.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_model::network::{BridgeNetwork, SHARES, Subnet};
use kiln_model::spec::Network;
use kiln_model::{Digest, EnvironmentName, NetworkName, Release};
use kiln_plan::{Goal, Layout, World, assign_service_addresses};
use kiln_runtime::net;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, bind, socket, sockopt};

/// Where a network's gateway answers for names.
const DNS_PORT: u16 = 53;
/// Its place in its subnet.
const GATEWAY: u32 = 1;

pub struct Networks {
    tag: String,
    /// What is laid out: which subnets, shares and addresses are taken.
    known: Mutex<Known>,
    /// Those that stand now, or will at once: what the firewall is made of.
    standing: Mutex<BTreeMap<EnvironmentName, Vec<BridgeNetwork>>>,
}

struct Known {
    layouts: BTreeMap<EnvironmentName, Layout>,
    /// Networks that belong to no environment (`kiln networks create`), by name.
    free: BTreeMap<String, BridgeNetwork>,
}

impl Networks {
    pub fn new(root: &Path, worlds: &[World], free: Vec<BridgeNetwork>) -> Self {
        let layouts = worlds.iter().map(|world| {
            let mut layout = world.layout.clone();
            if is_down(world) {
                leave(&mut layout);
            }
            (world.environment.clone(), layout)
        });
        Self {
            tag: net::root_tag(root),
            known: Mutex::new(Known {
                layouts: layouts.collect(),
                free: free.into_iter().map(|n| (n.name.clone(), n)).collect(),
            }),
            // An earlier daemon's: until its turn comes, none may lose its rules to another.
            standing: Mutex::new(worlds.iter().filter_map(standing).collect()),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn standing(&self) -> MutexGuard<'_, BTreeMap<EnvironmentName, Vec<BridgeNetwork>>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the release's networks and its services' addresses on them to the layout; those
    /// that are there and still as the file says stay.
    pub fn lay_out(
        &self,
        environment: &EnvironmentName,
        release: &Release,
        layout: &mut Layout,
    ) -> Result<(), String> {
        let mut known = self.known();
        for (key, network) in &release.networks {
            if network.external {
                known.join(environment, key, &network.name, layout)?;
            } else {
                self.lay_out_own(&known, environment, (key, network), layout)?;
            }
        }
        let problems = assign_service_addresses(layout, release);
        if let Some(problem) = problems.into_iter().next() {
            return Err(problem);
        }
        known.refuse_addresses_of_shares(environment, layout)?;
        known.layouts.insert(environment.clone(), layout.clone());
        Ok(())
    }

    fn lay_out_own(
        &self,
        known: &Known,
        environment: &EnvironmentName,
        (key, network): (&NetworkName, &Network),
        layout: &mut Layout,
    ) -> Result<(), String> {
        let asked: Option<Subnet> = match &network.subnet {
            Some(text) => Some(text.parse().map_err(|e| format!("network `{key}`: {e}"))?),
            None => None,
        };
        let was_shared = layout.shares.remove(key).is_some();
        let before = layout.networks.get(key).filter(|_| !was_shared);
        let fits = before.is_some_and(|have| {
            asked.is_none_or(|a| a == have.subnet)
                && have.internal == network.internal
                && have.mtu == network.mtu
                && have.name == network.name
        });
        if fits {
            return Ok(());
        }
        if let Some(other) = before.and_then(|have| known.sharer(environment, &have.bridge)) {
            return Err(format!(
                "network `{key}` can't change: the environment `{other}` has joined it"
            ));
        }
        let taken: Vec<Subnet> = known
            .subnets(|env, n| env != Some(environment) || n.name != network.name)
            .chain(
                layout
                    .networks
                    .iter()
                    .filter(|(k, _)| *k != key)
                    .map(|(_, n)| n.subnet),
            )
            .collect();
        let subnet = self.subnet_for(key.as_str(), asked, &taken)?;
        let bridge = BridgeNetwork {
            name: network.name.clone(),
            bridge: self.bridge_name(&format!("{environment}/{key}")),
            subnet,
            internal: network.internal,
            mtu: network.mtu,
        };
        layout.networks.insert(key.clone(), bridge);
        // Service addresses of the old subnet mean nothing in a new one.
        layout.services.remove(key);
        Ok(())
    }

    /// A network of no environment's, to be stored by the caller.
    pub fn create(
        &self,
        name: &NetworkName,
        subnet: Option<Subnet>,
        internal: bool,
    ) -> Result<BridgeNetwork, String> {
        let mut known = self.known();
        if let Some(where_) = known.find(None, name.as_str()).next() {
            return Err(format!("the network `{name}` is there already{}", where_.1));
        }
        let taken: Vec<Subnet> = known.subnets(|_, _| true).collect();
        let network = BridgeNetwork {
            name: name.to_string(),
            // No environment's name holds a slash.
            bridge: self.bridge_name(&format!("//{name}")),
            subnet: self.subnet_for(name.as_str(), subnet, &taken)?,
            internal,
            mtu: None,
        };
        known.free.insert(network.name.clone(), network.clone());
        Ok(network)
    }

    /// Forgets a network of no environment's that nobody has joined.
    pub fn remove(&self, name: &str) -> Result<(), String> {
        let mut known = self.known();
        let network = known.free.get(name).ok_or("there is no such network")?;
        let users = self.users(&network.bridge);
        if !users.is_empty() {
            return Err(format!("it is in use by {}", users.join(", ")));
        }
        known.free.remove(name);
        Ok(())
    }

    /// All networks, with who has them and who uses them now.
    pub fn list(&self) -> Vec<(BridgeNetwork, Option<EnvironmentName>, Vec<String>)> {
        let known = self.known();
        let own = known.own().map(|(env, n)| (n.clone(), env.cloned()));
        let mut list: Vec<_> = own
            .map(|(n, env)| {
                let users = self.users(&n.bridge);
                (n, env, users)
            })
            .collect();
        list.sort_by(|a, b| (&a.0.name, &a.1).cmp(&(&b.0.name, &b.1)));
        list
    }

    fn users(&self, bridge: &str) -> Vec<String> {
        let standing = self.standing();
        let of = standing
            .iter()
            .filter(|(_, list)| list.iter().any(|n| n.bridge == bridge));
        of.map(|(env, _)| env.to_string()).collect()
    }

    fn subnet_for(
        &self,
        key: &str,
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
    fn bridge_name(&self, whose: &str) -> String {
        let hash = Digest::of(whose).hex();
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
        let mut standing = self.standing();
        let before = standing
            .insert(environment.clone(), networks)
            .unwrap_or_default();
        self.firewall(&standing, catch_all_port)?;
        remove_unused(&standing, &before)
    }

    /// Puts the firewall back where another program has taken it away (`nft flush ruleset`, a
    /// reload of nftables.service); says whether it had to.
    pub fn mend(&self, catch_all_port: u16) -> Result<bool, String> {
        let standing = self.standing();
        if standing.is_empty() {
            return Ok(false);
        }
        let wanted = self.wanted(&standing, catch_all_port);
        if wanted.is_in_place().map_err(|e| e.to_string())? {
            return Ok(false);
        }
        wanted.apply().map_err(|e| e.to_string())?;
        Ok(true)
    }

    /// Whether there is anything that needs a firewall.
    pub fn any_stand(&self) -> bool {
        !self.standing().is_empty()
    }

    /// Takes an environment's networks down.
    pub fn forget(&self, environment: &EnvironmentName, catch_all_port: u16) -> Result<(), String> {
        if let Some(layout) = self.known().layouts.get_mut(environment) {
            leave(layout);
        }
        let mut standing = self.standing();
        let before = standing.remove(environment).unwrap_or_default();
        remove_unused(&standing, &before)?;
        self.firewall(&standing, catch_all_port)
    }

    fn firewall(
        &self,
        standing: &BTreeMap<EnvironmentName, Vec<BridgeNetwork>>,
        catch_all_port: u16,
    ) -> Result<(), String> {
        let wanted = self.wanted(standing, catch_all_port);
        wanted.apply().map_err(|e| e.to_string())
    }

    fn wanted(
        &self,
        standing: &BTreeMap<EnvironmentName, Vec<BridgeNetwork>>,
        catch_all_port: u16,
    ) -> net::Firewall {
        // Environments that share a network have the same bridge.
        let networks: BTreeMap<&str, &BridgeNetwork> = standing
            .values()
            .flatten()
            .map(|n| (n.bridge.as_str(), n))
            .collect();
        net::Firewall {
            table: format!("{}{}", net::TABLE_PREFIX, self.tag),
            networks: networks.into_values().cloned().collect(),
            catch_all_port: Some(catch_all_port),
            recorder: None,
        }
    }
}

impl Known {
    /// Networks that environments have of their own, and those that belong to none.
    fn own(&self) -> impl Iterator<Item = (Option<&EnvironmentName>, &BridgeNetwork)> {
        let of_environments = self.layouts.iter().flat_map(|(env, layout)| {
            let own = layout.networks.iter();
            own.filter(|(key, _)| !layout.shares.contains_key(*key))
                .map(move |(_, network)| (Some(env), network))
        });
        of_environments.chain(self.free.values().map(|network| (None, network)))
    }

    /// Networks of this full name which `environment` may join, and in words whose they are.
    fn find<'k>(
        &'k self,
        environment: Option<&EnvironmentName>,
        name: &str,
    ) -> impl Iterator<Item = (&'k BridgeNetwork, String)> {
        self.own()
            .filter(move |(env, n)| n.name == name && (env.is_none() || *env != environment))
            .map(|(env, n)| {
                let whose = env.map_or(String::new(), |e| format!(" (environment `{e}`)"));
                (n, whose)
            })
    }

    fn subnets(
        &self,
        counts: impl Fn(Option<&EnvironmentName>, &BridgeNetwork) -> bool,
    ) -> impl Iterator<Item = Subnet> {
        self.own()
            .filter(move |(env, n)| counts(*env, n))
            .map(|(_, n)| n.subnet)
    }

    /// Another environment that has joined this network.
    fn sharer(&self, environment: &EnvironmentName, bridge: &str) -> Option<&EnvironmentName> {
        let mut others = self.layouts.iter().filter(|(env, _)| *env != environment);
        let joined = |layout: &Layout| {
            let mut shares = layout.shares.keys().filter_map(|k| layout.networks.get(k));
            shares.any(|n| n.bridge == bridge)
        };
        others
            .find(|(_, layout)| joined(layout))
            .map(|(env, _)| env)
    }

    /// Lays out an external network: another's, and a share of it that nobody uses.
    fn join(
        &self,
        environment: &EnvironmentName,
        key: &NetworkName,
        name: &str,
        layout: &mut Layout,
    ) -> Result<(), String> {
        let mut found = self.find(Some(environment), name);
        let Some((network, whose)) = found.next() else {
            return Err(format!(
                "network `{key}`: the external network `{name}` is not there; a project makes it \
                 under `name: {name}`, or `kiln networks create {name}` does"
            ));
        };
        if let Some((_, other)) = found.next() {
            return Err(format!(
                "network `{key}`: there are several networks `{name}`{whose}{other}"
            ));
        }
        let same = layout.networks.get(key) == Some(network);
        let own = layout.shares.get(key).copied().filter(|_| same);
        let share = own
            .into_iter()
            .chain(0..SHARES)
            .find(|share| self.is_free(environment, network, *share))
            .ok_or_else(|| {
                format!("network `{key}`: so many environments use `{name}` that none can join")
            })?;
        if own != Some(share) {
            layout.services.remove(key);
        }
        layout.networks.insert(key.clone(), network.clone());
        layout.shares.insert(key.clone(), share);
        Ok(())
    }

    fn is_free(&self, environment: &EnvironmentName, network: &BridgeNetwork, share: u32) -> bool {
        let addresses = network.services(Some(share));
        let mut others = self.layouts.iter().filter(|(env, _)| *env != environment);
        !addresses.is_empty()
            && others.all(|(_, layout)| {
                let on_it = layout
                    .networks
                    .iter()
                    .filter(|(_, n)| n.bridge == network.bridge);
                on_it.into_iter().all(|(key, _)| {
                    let used = layout.services.get(key).into_iter().flatten();
                    let mut used = used.map(|(_, address)| *address);
                    layout.shares.get(key) != Some(&share)
                        && !used.any(|a| addresses.clone().any(|n| network.subnet.nth(n) == a))
                })
            })
    }

    /// An address that a service of the network's owner asks for may lie in another
    /// environment's share.
    fn refuse_addresses_of_shares(
        &self,
        environment: &EnvironmentName,
        layout: &Layout,
    ) -> Result<(), String> {
        let own = layout
            .networks
            .iter()
            .filter(|(key, _)| !layout.shares.contains_key(*key));
        for (key, network) in own {
            let services = layout.services.get(key).into_iter().flatten();
            for (service, address) in services {
                let others = self.layouts.iter().filter(|(env, _)| *env != environment);
                for (other, theirs) in others {
                    let shares = theirs.networks.iter().filter_map(|(k, n)| {
                        (n.bridge == network.bridge).then(|| theirs.shares.get(k))?
                    });
                    let mut numbers = shares.flat_map(|share| network.services(Some(*share)));
                    if numbers.any(|n| network.subnet.nth(n) == *address) {
                        return Err(format!(
                            "service `{service}`: the address {address} on network `{key}` is \
                             kept for the environment `{other}`, which has joined the network"
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Who is not there keeps no share of what is another's: it gets one when it comes back.
fn leave(layout: &mut Layout) {
    for key in std::mem::take(&mut layout.shares).into_keys() {
        layout.networks.remove(&key);
        layout.services.remove(&key);
    }
}

/// The networks of an environment that is not down.
fn standing(world: &World) -> Option<(EnvironmentName, Vec<BridgeNetwork>)> {
    let networks: Vec<BridgeNetwork> = world.layout.networks.values().cloned().collect();
    (!is_down(world)).then(|| (world.environment.clone(), networks))
}

/// Nothing of it is wanted, and nothing is there.
pub fn is_down(world: &World) -> bool {
    world.goal == Goal::Nothing && world.instances.is_empty()
}

/// Removes bridges that no environment needs any more.
fn remove_unused(
    standing: &BTreeMap<EnvironmentName, Vec<BridgeNetwork>>,
    before: &[BridgeNetwork],
) -> Result<(), String> {
    for old in before {
        let mut used = standing.values().flatten();
        if !used.any(|n| n.bridge == old.bridge) {
            net::remove_bridge(&old.bridge).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
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

    fn release(environment: &str, networks: &[(&str, &str, bool)]) -> Release {
        let one = |(key, name, external): &(&str, &str, bool)| {
            let network = Network {
                name: (*name).into(),
                external: *external,
                ..Network::default()
            };
            (key.parse().unwrap(), network)
        };
        Release {
            format: Release::FORMAT,
            environment: environment.parse().unwrap(),
            project: environment.parse().unwrap(),
            services: BTreeMap::new(),
            networks: networks.iter().map(one).collect(),
            volumes: BTreeMap::new(),
        }
    }

    fn laid_out(networks: &Networks, release: &Release) -> Result<Layout, String> {
        let mut layout = Layout::default();
        networks.lay_out(&release.environment, release, &mut layout)?;
        Ok(layout)
    }

    #[test]
    fn an_external_network_is_anothers_and_shared_without_meeting() {
        let networks = Networks::new(Path::new("/x"), &[], vec![]);
        let joins = |environment| release(environment, &[("n", "shared", true)]);
        let missing = laid_out(&networks, &joins("b")).unwrap_err();
        assert!(missing.contains("kiln networks create shared"), "{missing}");
        let own = laid_out(&networks, &release("a", &[("m", "shared", false)])).unwrap();
        let (m, n): (NetworkName, NetworkName) = ("m".parse().unwrap(), "n".parse().unwrap());
        for (share, environment) in ["b", "c"].into_iter().enumerate() {
            let joined = laid_out(&networks, &joins(environment)).unwrap();
            assert_eq!(joined.networks[&n], own.networks[&m]);
            assert_eq!(joined.shares[&n] as usize, share);
        }
        // Who changes it would cut the others off.
        let mut layout = own.clone();
        let mut changed = release("a", &[("m", "shared", false)]);
        changed.networks.get_mut(&m).unwrap().internal = true;
        let a = changed.environment.clone();
        assert!(networks.lay_out(&a, &changed, &mut layout).is_err());
        // Its share is free again when an environment has gone.
        let b: EnvironmentName = "b".parse().unwrap();
        leave(networks.known().layouts.get_mut(&b).unwrap());
        assert_eq!(laid_out(&networks, &joins("d")).unwrap().shares[&n], 0);
        // One name, two networks: nobody can know which is meant.
        assert!(
            networks
                .create(&"shared".parse().unwrap(), None, false)
                .is_err()
        );
        laid_out(&networks, &release("e", &[("m", "shared", false)])).unwrap();
        assert!(laid_out(&networks, &joins("f")).is_err());
        let free = networks
            .create(&"free".parse().unwrap(), None, true)
            .unwrap();
        let joined = laid_out(&networks, &release("f", &[("n", "free", true)])).unwrap();
        assert_eq!(joined.networks[&n], free);
        networks.remove("free").unwrap();
        assert!(networks.remove("free").is_err());
    }

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

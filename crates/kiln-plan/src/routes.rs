//! Which instances traffic goes to, which names stand for what, and which address an
//! instance gets.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use kiln_model::release::{Release, ReleasedService};
use kiln_model::route::{
    AppProtocol, Backend, Name, NetworkNames, Published, RouteMode, RoutingTable, ServiceRoute,
    Split,
};
use kiln_model::spec::{NetworkMode, Port, Protocol};
use kiln_model::{InstanceId, Millis, NetworkName, ServiceName};

use crate::canary::{self, UnderWay};
use crate::decide::next_generation;
use crate::handoff::{can_hand_over, held, making_room};
use crate::service::{batch, joins};
use crate::watch::written_off;
use crate::world::{Instance, Layout, Phase, Prepared, Releases, World};

/// Callers of a service that is between two copies wait at most this long: longer than
/// most programs take to start, shorter than most callers' own patience.
const PARK_LIMIT: Millis = Millis(60_000);
/// A copy that has failed this often is not worth waiting for.
const PARK_FAILURES: u32 = 3;

/// Copies of the wanted revision that serve or are on their way to, by id.
pub(crate) fn current<'w>(
    world: &'w World,
    goal: &Prepared,
    name: &'w ServiceName,
) -> Vec<(&'w InstanceId, &'w Instance)> {
    let revision = goal.revisions.get(name);
    world
        .of_service(name)
        .filter(|(_, i)| i.phase.rising() && !i.job && world.is_current(i, revision))
        .collect()
}

/// A copy that ended by itself and whose policy lets it rest.
pub fn rests(world: &World, goal: &Prepared, name: &ServiceName, index: u32) -> bool {
    let attempt = world.attempt(name, index, goal.revisions.get(name));
    attempt.is_some_and(|attempt| attempt.finished)
}

/// May traffic move? Not before every service's (first batch of) new copies and every
/// job has succeeded; until then the old release serves alone. While turning back, and
/// outside of rollouts, it may always.
pub(crate) fn gate_open(world: &World, releases: &Releases) -> bool {
    let Some(rollout) = world.rollout.as_ref().filter(|r| r.proving()) else {
        return true;
    };
    let Some(goal) = world.goal.release().and_then(|n| releases.get(n)) else {
        return true;
    };
    (rollout.moved || !held(world))
        && goal.release.services.iter().all(|(name, released)| {
            if goal.is_job(name) {
                return world.jobs_done.contains(&(goal.digest, name.clone()));
            }
            let ready = current(world, goal, name)
                .iter()
                .filter(|(_, i)| i.phase.ready())
                .count();
            let resting = (1..=released.service.replicas)
                .filter(|index| rests(world, goal, name, *index))
                .count();
            let spared = written_off(world, goal, name, released);
            (ready + resting + spared) as u32 >= batch(world, released)
        })
}

/// The table that should be in force now.
pub(crate) fn wanted(world: &World, releases: &Releases, now: Millis) -> RoutingTable {
    let open = gate_open(world, releases);
    let goal = world.goal.release().and_then(|n| releases.get(n));
    let canary = canary::under_way(world, releases);
    let from = world
        .rollout
        .as_ref()
        .filter(|_| !open)
        .and_then(|r| r.from)
        .and_then(|n| releases.get(n));
    // Until traffic may move, services look to the outside as the old release says.
    let mut definitions: BTreeMap<&ServiceName, (&ReleasedService, &Release)> = BTreeMap::new();
    for prepared in goal.into_iter().chain(from) {
        for (name, released) in &prepared.release.services {
            match prepared.is_job(name) {
                true => definitions.remove(name),
                false => definitions.insert(name, (released, &prepared.release)),
            };
        }
    }
    let services = definitions
        .iter()
        .map(|(name, (released, _))| {
            (
                (*name).clone(),
                service_route((world, now), (goal, from), name, released, (open, canary)),
            )
        })
        .collect();
    RoutingTable {
        environment: world.environment.clone(),
        generation: next_generation(world),
        services,
        published: published(&definitions, &world.layout),
        // Where nothing is wanted nothing is named: the networks are about to go.
        networks: match definitions.is_empty() {
            true => Vec::new(),
            false => network_names(world, &definitions),
        },
    }
}

pub(crate) fn same_but_for_generation(a: &RoutingTable, b: &mut RoutingTable) -> bool {
    let own = std::mem::replace(&mut b.generation, a.generation);
    let same = *a == *b;
    b.generation = own;
    same
}

fn service_route(
    (world, now): (&World, Millis),
    (goal, from): (Option<&Prepared>, Option<&Prepared>),
    name: &ServiceName,
    released: &ReleasedService,
    (open, canary): (bool, Option<UnderWay<'_>>),
) -> ServiceRoute {
    let ready: Vec<(&InstanceId, &Instance)> = world
        .of_service(name)
        .filter(|(_, i)| i.phase.ready() && !i.job)
        .collect();
    let revision = goal.and_then(|g| g.revisions.get(name));
    let (new, mut old): (Vec<_>, Vec<_>) = ready
        .into_iter()
        .partition(|(_, i)| world.is_current(i, revision));
    let handing_over = goal.is_some_and(|g| can_hand_over(world, g, name, now));
    let leaving = goal.map_or_else(Vec::new, |g| making_room(world, g, name, now));
    old.retain(|(id, _)| !leaving.contains(id));
    // What was kept warm behind the release that serves gets nothing.
    let serves = from.and_then(|f| f.revisions.get(name));
    if old.iter().any(|(_, i)| world.is_current(i, serves)) {
        old.retain(|(_, i)| world.is_current(i, serves));
    }
    let replicas = released.service.replicas;
    let weight = canary.and_then(|c| Some((c.weight(name)?, c.from.revisions.get(name))));
    let (serving, split) = match weight {
        _ if handing_over => (Vec::new(), None),
        _ if !open && !old.is_empty() => (chosen(old, Vec::new(), replicas), None),
        Some((weight, before)) => {
            old.retain(|(_, i)| world.is_current(i, before));
            side_by_side(weight, new, old, replicas)
        }
        None => (chosen(new, old, replicas), None),
    };
    let gone = handing_over || !leaving.is_empty();
    let waits = serving.is_empty() && (gone || worth_waiting(world, goal, name));
    let mode = if waits {
        RouteMode::Park { limit: PARK_LIMIT }
    } else {
        RouteMode::Serve
    };
    ServiceRoute {
        mode,
        backends: serving
            .into_iter()
            .map(|(id, i)| backend(world, id, i, released))
            .collect(),
        split,
        protocols: protocols(&released.service.ports),
    }
}

type Copies<'w> = Vec<(&'w InstanceId, &'w Instance)>;

/// The new copies with their part of the traffic beside the old ones, if there are both.
fn side_by_side<'w>(
    weight: u8,
    new: Copies<'w>,
    mut old: Copies<'w>,
    replicas: u32,
) -> (Copies<'w>, Option<Split>) {
    old.retain(|(_, i)| !i.is_sick());
    if new.is_empty() || old.is_empty() || weight >= 100 {
        return (chosen(new, old, replicas), None);
    }
    let mut serving = chosen(new, Vec::new(), replicas);
    let to = serving.iter().map(|(id, _)| (*id).clone()).collect();
    serving.extend(old);
    (serving, Some(Split { weight, to }))
}

/// The new copies; as long as they are too few, old ones beside them, and those beyond
/// the wanted count, which are on their way out, too; unhealthy ones only when there is
/// nothing better.
fn chosen<'w>(new: Copies<'w>, old: Copies<'w>, replicas: u32) -> Copies<'w> {
    let (surplus, new): (Vec<_>, Vec<_>) = new.into_iter().partition(|(_, i)| i.index > replicas);
    let (ill, well): (Vec<_>, Vec<_>) = new.into_iter().partition(|(_, i)| i.is_sick());
    // Of two well copies with one number, the older is on its way out.
    let mut serving = well.clone();
    serving.retain(|(id, i)| {
        let mut others = well.iter().filter(|(_, other)| other.index == i.index);
        !others.any(|(other, _)| newer(other, id))
    });
    let lacking = (replicas as usize).saturating_sub(serving.len());
    let (worse, others): (Vec<_>, Vec<_>) = surplus
        .into_iter()
        .chain(old)
        .partition(|(_, i)| i.is_sick());
    serving.extend(others.into_iter().take(lacking));
    match () {
        () if !serving.is_empty() => serving,
        () if !ill.is_empty() => ill,
        () => worse,
    }
}

/// Was made later: numbers in ids of one service only grow.
pub(crate) fn newer(one: &InstanceId, other: &InstanceId) -> bool {
    let (one, other) = (one.as_str(), other.as_str());
    (one.len(), one) > (other.len(), other)
}

/// Callers wait when the service served before and a copy is coming.
fn worth_waiting(world: &World, goal: Option<&Prepared>, name: &ServiceName) -> bool {
    let served = world
        .routes
        .as_ref()
        .and_then(|t| t.services.get(name))
        .is_some_and(|route| {
            !route.backends.is_empty() || matches!(route.mode, RouteMode::Park { .. })
        });
    let coming = goal.is_some_and(|g| g.release.services.contains_key(name));
    let revision = goal.and_then(|g| g.revisions.get(name));
    let failing = world.attempts.iter().any(|((service, _, of), a)| {
        let coming = service == name && Some(of) == revision;
        coming && (a.failures >= PARK_FAILURES || a.finished)
    });
    served && coming && !failing
}

fn backend(
    world: &World,
    id: &InstanceId,
    instance: &Instance,
    released: &ReleasedService,
) -> Backend {
    let first = match &released.service.network {
        NetworkMode::Networks(networks) => networks
            .keys()
            .find_map(|n| instance.addresses.get(n))
            .copied(),
        // It is reached where the one whose network it shares is reached.
        NetworkMode::Service(other) => {
            let host = instance
                .joined
                .get(other)
                .and_then(|id| world.instances.get(id));
            host.and_then(|host| host.addresses.values().next())
                .copied()
        }
        NetworkMode::None | NetworkMode::Host => None,
    };
    let address = first.unwrap_or(Ipv4Addr::LOCALHOST);
    Backend {
        instance: id.clone(),
        address: IpAddr::V4(address),
    }
}

fn protocols(ports: &[Port]) -> BTreeMap<u16, AppProtocol> {
    ports
        .iter()
        .filter_map(|p| {
            let protocol = match p.app_protocol.as_deref()? {
                "http" => AppProtocol::Http,
                "http2" | "h2c" | "grpc" => AppProtocol::H2c,
                "tcp" => AppProtocol::Tcp,
                _ => return None,
            };
            Some((p.target, protocol))
        })
        .collect()
}

fn published(
    definitions: &BTreeMap<&ServiceName, (&ReleasedService, &Release)>,
    layout: &Layout,
) -> Vec<Published> {
    let mut list: Vec<Published> = Vec::new();
    for (name, (released, _)) in definitions {
        if released.service.network == NetworkMode::Host {
            continue;
        }
        for port in &released.service.ports {
            let host = port
                .published
                .or_else(|| layout.host_ports.get(&host_port_key(name, port)).copied());
            let Some(host) = host else { continue };
            let ip = port.host_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            let entry = Published {
                listen: SocketAddr::new(ip, host),
                protocol: port.protocol,
                service: (*name).clone(),
                target: port.target,
            };
            if !list
                .iter()
                .any(|p| p.listen == entry.listen && p.protocol == entry.protocol)
            {
                list.push(entry);
            }
        }
    }
    list.sort();
    list
}

/// The key of [`Layout::host_ports`].
pub fn host_port_key(service: &ServiceName, port: &Port) -> String {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!("{service}/{}/{protocol}", port.target)
}

fn network_names(
    world: &World,
    definitions: &BTreeMap<&ServiceName, (&ReleasedService, &Release)>,
) -> Vec<NetworkNames> {
    world
        .layout
        .networks
        .iter()
        .map(|(network, bridge)| {
            let mut names = BTreeMap::new();
            let mut addresses = BTreeMap::new();
            for (name, (released, _)) in definitions {
                let NetworkMode::Networks(attached) = &released.service.network else {
                    continue;
                };
                let Some(attachment) = attached.get(network) else {
                    continue;
                };
                let Some(address) = world
                    .layout
                    .services
                    .get(network)
                    .and_then(|s| s.get(*name))
                    .copied()
                else {
                    continue;
                };
                addresses.insert(address, (*name).clone());
                let own = std::iter::once(name.as_str())
                    .chain(released.service.names.container_name.as_deref())
                    .chain(attachment.aliases.iter().map(String::as_str));
                for alias in own {
                    let entry = names
                        .entry(alias.to_lowercase())
                        .or_insert_with(|| Name::Addresses(Vec::new()));
                    if let Name::Addresses(list) = entry {
                        list.push(address);
                    }
                }
            }
            NetworkNames {
                network: bridge.name.clone(),
                gateway: bridge.gateway(),
                names,
                addresses,
                also: other_gateways(world, network),
                backends: world
                    .instances
                    .iter()
                    .filter(|(_, i)| i.phase.ready())
                    .filter_map(|(id, i)| Some((id.clone(), *i.addresses.get(network)?)))
                    .collect(),
            }
        })
        .collect()
}

/// By the address on `network` of each instance there: its other networks' gateways.
fn other_gateways(world: &World, network: &NetworkName) -> BTreeMap<Ipv4Addr, Vec<Ipv4Addr>> {
    let alive = world.instances.values().filter(|i| i.phase.alive());
    alive
        .filter_map(|i| {
            let others = i.addresses.keys().filter(|other| *other != network);
            let gateways: Vec<_> = others
                .filter_map(|other| Some(world.layout.networks.get(other)?.gateway()))
                .collect();
            let own = *i.addresses.get(network)?;
            (!gateways.is_empty()).then_some((own, gateways))
        })
        .collect()
}

/// An instance of each service whose namespaces one of `released` shares: the copy of the
/// same number, or else the first. `None`: one of them is not there.
pub(crate) fn partners(
    world: &World,
    goal: &Prepared,
    released: &ReleasedService,
    index: u32,
) -> Option<BTreeMap<ServiceName, InstanceId>> {
    joins(&released.service)
        .map(|other| {
            let (id, _) = current(world, goal, other)
                .into_iter()
                .filter(|(_, i)| i.phase != Phase::Starting)
                .min_by_key(|(_, i)| {
                    let sick = i.is_sick();
                    (sick, i.index != index, i.index)
                })?;
            Some((other.clone(), id.clone()))
        })
        .collect()
}

/// One address on each of the service's networks, none of them in use, taken in turn
/// so that an address is not used again soon. `None` when a network is full.
pub(crate) fn take_addresses(
    world: &World,
    released: &ReleasedService,
) -> Option<BTreeMap<NetworkName, Ipv4Addr>> {
    let NetworkMode::Networks(attached) = &released.service.network else {
        return Some(BTreeMap::new());
    };
    attached
        .keys()
        .map(|network| {
            let subnet = world.layout.networks.get(network)?.subnet;
            let range = world.layout.instance_range(network)?;
            let room = range.end.checked_sub(range.start).filter(|n| *n > 0)?;
            let first = (world.counter % u64::from(room)) as u32;
            let free = (0..room)
                .map(|n| subnet.nth(range.start + (first + n) % room))
                .find(|address| {
                    !world
                        .instances
                        .values()
                        .any(|i| i.addresses.get(network) == Some(address))
                })?;
            Some((network.clone(), free))
        })
        .collect()
}

/// Some service asks for this very address.
fn stated(release: &Release, network: &NetworkName, address: Ipv4Addr) -> bool {
    release.services.values().any(|released| {
        matches!(&released.service.network, NetworkMode::Networks(attached)
            if attached.get(network).is_some_and(|a| a.ipv4_address == Some(address)))
    })
}

/// Gives every service of `release` a stable address on each of its networks: those it
/// has stay, new ones are the lowest free of the network's upper half, unless the file
/// asks for one. Returns what could not be given.
pub fn assign_service_addresses(layout: &mut Layout, release: &Release) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, released) in &release.services {
        let NetworkMode::Networks(attached) = &released.service.network else {
            continue;
        };
        for (network, attachment) in attached {
            let Some(bridge) = layout.networks.get(network) else {
                continue;
            };
            let share = layout.shares.get(network).copied();
            let (subnet, own) = (bridge.subnet, bridge.services(share));
            // The environment that a network belongs to may name any address of its upper
            // half; the others have only their share.
            let allowed = |address: Ipv4Addr| match share {
                None => bridge.service_range().contains(address),
                Some(_) => own.clone().any(|n| subnet.nth(n) == address),
            };
            let taken = layout.services.entry(network.clone()).or_default();
            if let Some(asked) = attachment.ipv4_address {
                let mut others = taken
                    .iter()
                    .filter(|(other, a)| **a == asked && *other != name);
                let holder = others.next().map(|(other, _)| other.clone());
                let holder = holder.filter(|other| release.services.contains_key(other));
                if let Some(other) = holder {
                    problems.push(format!(
                        "service `{name}`: ipv4_address {asked} on network `{network}` is that of \
                         service `{other}`"
                    ));
                } else if allowed(asked) {
                    taken.retain(|_, address| *address != asked);
                    taken.insert(name.clone(), asked);
                } else {
                    let (first, last) = (subnet.nth(own.start), subnet.nth(own.end - 1));
                    problems.push(format!(
                        "service `{name}`: ipv4_address {asked} on network `{network}` must lie \
                         from {first} to {last}, the part of the network kept for services' \
                         addresses"
                    ));
                }
                continue;
            }
            if taken.get(name).is_some_and(|a| allowed(*a)) {
                continue;
            }
            let free = own
                .map(|n| subnet.nth(n))
                .find(|a| !taken.values().any(|other| other == a) && !stated(release, network, *a));
            match free {
                Some(address) => {
                    taken.insert(name.clone(), address);
                }
                None => problems.push(format!("network `{network}` has no address left")),
            }
        }
    }
    problems
}

//! Who is meant by an address: the tables of all environments, put together for looking
//! up. Replaced as a whole when a table is applied.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use kiln_model::route::NetworkNames;
use kiln_model::spec::Protocol;
use kiln_model::{EnvironmentName, InstanceId, RoutingTable, ServiceName};

use crate::dns::zone::Zone;
use crate::instance::Instance;
use crate::service::Service;

/// Where a connection came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A published port.
    Published(SocketAddr),
    /// A service address, through the catch-all.
    Service(SocketAddr),
}

/// Where it goes.
#[derive(Clone)]
pub(crate) struct Destination {
    pub(crate) service: Arc<Service>,
    pub(crate) port: u16,
    /// From outside kiln's networks.
    pub(crate) edge: bool,
    network: Option<Arc<BTreeMap<InstanceId, Ipv4Addr>>>,
}

impl Destination {
    pub(crate) fn address(&self, instance: &Instance) -> SocketAddr {
        let own = self.network.as_ref().and_then(|n| n.get(&instance.id));
        let address = own.map_or(instance.address, |address| IpAddr::V4(*address));
        SocketAddr::new(address, self.port)
    }
}

/// The key of a published port.
pub(crate) type PublishedKey = (SocketAddr, Protocol);

/// Which environment has a published port, where several may want it.
pub(crate) type Owners = BTreeMap<PublishedKey, EnvironmentName>;

#[derive(Default)]
pub(crate) struct Routes {
    published: BTreeMap<PublishedKey, Destination>,
    addresses: HashMap<Ipv4Addr, Destination>,
    zones: HashMap<Ipv4Addr, Zone>,
    /// Gateway and asker → other gateways whose names the asker may know.
    also: HashMap<(Ipv4Addr, Ipv4Addr), Vec<Ipv4Addr>>,
}

impl Routes {
    pub(crate) fn add(
        &mut self,
        table: &RoutingTable,
        services: &BTreeMap<ServiceName, Arc<Service>>,
        owners: &Owners,
    ) {
        for published in &table.published {
            let key = (published.listen, published.protocol);
            let Some(service) = services.get(&published.service) else {
                continue;
            };
            if owners.get(&key) == Some(&table.environment) {
                let destination = Destination {
                    service: Arc::clone(service),
                    port: published.target,
                    edge: true,
                    network: None,
                };
                self.published.insert(key, destination);
            }
        }
        for network in &table.networks {
            self.add_network(network, services);
        }
    }

    fn add_network(
        &mut self,
        network: &NetworkNames,
        services: &BTreeMap<ServiceName, Arc<Service>>,
    ) {
        let backends = (!network.backends.is_empty()).then(|| Arc::new(network.backends.clone()));
        for (address, service) in &network.addresses {
            let Some(service) = services.get(service) else {
                continue;
            };
            let destination = Destination {
                service: Arc::clone(service),
                port: 0,
                edge: false,
                network: backends.clone(),
            };
            self.addresses.insert(*address, destination);
        }
        self.zones.entry(network.gateway).or_default().add(network);
        for (asker, gateways) in &network.also {
            let key = (network.gateway, *asker);
            self.also.insert(key, gateways.clone());
        }
    }

    pub(crate) fn resolve(&self, entry: &Entry) -> Option<Destination> {
        match entry {
            Entry::Published(listen) => self.published(*listen, Protocol::Tcp).cloned(),
            Entry::Service(address) => {
                let IpAddr::V4(ip) = address.ip().to_canonical() else {
                    return None;
                };
                let destination = self.addresses.get(&ip)?;
                Some(Destination {
                    port: address.port(),
                    ..destination.clone()
                })
            }
        }
    }

    pub(crate) fn published(&self, listen: SocketAddr, protocol: Protocol) -> Option<&Destination> {
        self.published.get(&(listen, protocol))
    }

    /// The names that `asker` may ask for at a gateway: its network's first, then those of
    /// its other networks.
    pub(crate) fn zones(&self, gateway: Ipv4Addr, asker: IpAddr) -> impl Iterator<Item = &Zone> {
        let also = match asker.to_canonical() {
            IpAddr::V4(asker) => self.also.get(&(gateway, asker)),
            IpAddr::V6(_) => None,
        };
        let gateways = std::iter::once(gateway).chain(also.into_iter().flatten().copied());
        gateways.filter_map(|gateway| self.zones.get(&gateway))
    }

    /// Where the proxy itself answers DNS: never to be asked by it.
    pub(crate) fn gateways(&self) -> Vec<IpAddr> {
        self.zones
            .keys()
            .map(|gateway| IpAddr::V4(*gateway))
            .collect()
    }
}

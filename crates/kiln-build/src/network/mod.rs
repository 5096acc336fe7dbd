//! The network of RUN: a bridge of this process's own, masqueraded, whose gateway answers
//! for names as the host's name servers do.
//!
//! Several builds run at once, each in a process of its own. A process makes its bridge
//! and firewall table when the first RUN asks for them and takes them away at its end, so
//! that none takes away what another uses. A process that is killed leaves the folder that
//! they are named after ([`crate::held`]), by which the next build finds and removes them.

mod names;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_model::instance::{InstanceNetwork, Interface, Resolver};
use kiln_model::network::BridgeNetwork;
use kiln_runtime::net;

use self::names::Names;
use crate::containerfile::RunNetwork;
use crate::held::Held;

/// Before the six letters and digits that a network is named by.
pub(crate) const FOLDER_PREFIX: &str = "net-";
/// So many subnets are tried: others may take the same one at the same time.
const SUBNETS_TRIED: usize = 16;

/// Why a RUN can't have a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("can't hold the build's network in {folder}")]
    Hold {
        folder: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(transparent)]
    Subnet(#[from] net::FreeSubnetError),
    #[error(transparent)]
    Bridge(#[from] net::BridgeError),
    #[error(transparent)]
    Firewall(#[from] net::FirewallError),
    #[error(
        "can't answer for names at {gateway}, port 53; `RUN --network=host` and `build.network: host` need no answers there"
    )]
    Names {
        gateway: std::net::Ipv4Addr,
        #[source]
        cause: io::Error,
    },
    #[error("too many commands run at once for one network")]
    Full,
}

/// The network of all builds of this process.
pub struct Network {
    tag: String,
    scratch: PathBuf,
    resolver: Resolver,
    standing: Mutex<Option<Arc<Standing>>>,
}

/// What a RUN is started with. Its address is nobody else's until this is dropped.
pub(crate) struct Connection {
    pub network: InstanceNetwork,
    pub resolver: Option<Resolver>,
    _seat: Option<Seat>,
}

impl Network {
    /// `resolver`: the host's.
    pub fn new(root: &Path, cache: &Path, resolver: Resolver) -> Self {
        Self {
            tag: net::root_tag(root),
            scratch: cache.join("run"),
            resolver,
            standing: Mutex::new(None),
        }
    }

    /// `warn`: is told what stands in the network's way.
    pub(crate) fn connect(
        &self,
        how: RunNetwork,
        warn: &mut dyn FnMut(String),
    ) -> Result<Connection, NetworkError> {
        let (network, resolver, seat) = match how {
            RunNetwork::None => (InstanceNetwork::Isolated, None, None),
            RunNetwork::Host => (InstanceNetwork::Host, Some(self.resolver.clone()), None),
            RunNetwork::Default => {
                let seat = Seat::take(self.standing(warn)?)?;
                let bridge = &seat.of.bridge;
                let interface = Interface {
                    name: "eth0".into(),
                    bridge: bridge.bridge.clone(),
                    address: bridge.subnet.nth(seat.number),
                    prefix: bridge.subnet.prefix(),
                    gateway: Some(bridge.gateway()),
                    mtu: None,
                    mac: None,
                };
                let resolver = Resolver {
                    nameservers: vec![bridge.gateway().into()],
                    ..self.resolver.clone()
                };
                let network = InstanceNetwork::Bridged(vec![interface]);
                (network, Some(resolver), Some(seat))
            }
        };
        Ok(Connection {
            network,
            resolver,
            _seat: seat,
        })
    }

    fn standing(&self, warn: &mut dyn FnMut(String)) -> Result<Arc<Standing>, NetworkError> {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(standing) = &*standing {
            return Ok(standing.clone());
        }
        let made = Arc::new(self.make(warn)?);
        *standing = Some(made.clone());
        Ok(made)
    }

    fn make(&self, warn: &mut dyn FnMut(String)) -> Result<Standing, NetworkError> {
        let hold = |cause| NetworkError::Hold {
            folder: self.scratch.clone(),
            cause,
        };
        let folder = Held::new(&self.scratch, FOLDER_PREFIX).map_err(hold)?;
        let id = id(&self.tag, &folder);
        // A dead root's rules may drop what this network sends.
        net::remove_stale_tables()?;
        let mut in_use = Vec::new();
        let (bridge, ensured) = loop {
            let subnet = net::free_subnet(&in_use)?;
            let bridge = BridgeNetwork {
                name: format!("build {id}"),
                bridge: bridge_name(&id),
                subnet,
                internal: false,
                mtu: None,
            };
            match net::ensure_bridge(&bridge) {
                Err(net::BridgeError::SubnetTaken { .. }) if in_use.len() < SUBNETS_TRIED => {
                    in_use.push(subnet);
                }
                made => break (bridge, made?),
            }
        };
        // From here on, dropping it takes the bridge away.
        let mut standing = Standing {
            id,
            bridge,
            taken: Mutex::default(),
            names: None,
            _folder: folder,
        };
        firewall(&standing.id, vec![standing.bridge.clone()]).apply()?;
        let gateway = standing.bridge.gateway();
        let names = Names::serve(gateway.into(), names::PORT, &self.resolver.nameservers);
        standing.names = Some(names.map_err(|cause| NetworkError::Names { gateway, cause })?);
        let conflicts = [net::forward_policy_conflict(), net::input_policy_conflict()];
        ensured.notes.into_iter().for_each(&mut *warn);
        conflicts.into_iter().flatten().for_each(warn);
        Ok(standing)
    }
}

/// The host's own name servers.
pub fn host_resolver() -> Resolver {
    // Without the file there are none to name: the host itself is asked then.
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    resolver(&text)
}

/// resolv.conf(5).
fn resolver(text: &str) -> Resolver {
    let words = |key: &str| -> Vec<String> {
        let lines = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix(key));
        let words = lines.flat_map(str::split_whitespace);
        words.map(str::to_owned).collect()
    };
    Resolver {
        nameservers: words("nameserver")
            .iter()
            .filter_map(|word| word.parse().ok())
            .collect(),
        search: words("search"),
        options: words("options"),
    }
}

/// Takes away the network of a process that is gone.
pub(crate) fn remove(root_tag: &str, folder: &Held) -> Result<(), NetworkError> {
    take_down(&id(root_tag, folder))
}

/// `<root's tag>-<six letters and digits>`.
fn id(tag: &str, folder: &Held) -> String {
    let name = folder.name();
    let own = name.strip_prefix(FOLDER_PREFIX).unwrap_or(&name);
    format!("{tag}-{own}")
}

/// 15 bytes: as long as an interface's name may be.
fn bridge_name(id: &str) -> String {
    format!("{}{id}", net::BRIDGE_PREFIX)
}

fn firewall(id: &str, networks: Vec<BridgeNetwork>) -> net::Firewall {
    net::Firewall {
        table: format!("{}{id}", net::TABLE_PREFIX),
        networks,
        catch_all_port: None,
    }
}

fn take_down(id: &str) -> Result<(), NetworkError> {
    net::remove_bridge(&bridge_name(id))?;
    Ok(firewall(id, Vec::new()).remove()?)
}

struct Standing {
    id: String,
    bridge: BridgeNetwork,
    /// Addresses in use, as numbers in the subnet.
    taken: Mutex<BTreeSet<u32>>,
    names: Option<Names>,
    /// Let go last: until then nobody else takes the network away.
    _folder: Held,
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.names = None;
        if let Err(cause) = take_down(&self.id) {
            tracing::warn!(%cause, "the build's network can't be taken away");
        }
    }
}

/// One address.
struct Seat {
    of: Arc<Standing>,
    number: u32,
}

impl Seat {
    fn take(of: Arc<Standing>) -> Result<Self, NetworkError> {
        let mut taken = of.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let free = of.bridge.instances(None).find(|n| !taken.contains(n));
        let number = free.ok_or(NetworkError::Full)?;
        taken.insert(number);
        drop(taken);
        Ok(Self { of, number })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let taken = self.of.taken.lock();
        taken
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.number);
    }
}

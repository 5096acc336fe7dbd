//! The network of RUN: a bridge of this process's own, masqueraded, whose gateway answers
//! for names as the host's name servers do. What a RUN fetches goes through a proxy of this
//! process and is recorded ([`record`]); what goes past it is seen by the firewall and named.
//!
//! Several builds run at once, each in a process of its own. A process makes its bridge
//! and firewall table when the first RUN asks for them and takes them away at its end, so
//! that none takes away what another uses. A process that is killed leaves the folder that
//! they are named after ([`crate::held`]), by which the next build finds and removes them.

mod names;
pub mod record;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_model::Digest;
use kiln_model::instance::{InstanceNetwork, Interface, Resolver};
use kiln_model::network::BridgeNetwork;
use kiln_runtime::net;

use self::names::Names;
use self::record::{Callers, Listening, Recorder, Session, Who};
use crate::containerfile::RunNetwork;
use crate::held::Held;

/// Before the six letters and digits that a network is named by.
pub(crate) const FOLDER_PREFIX: &str = "net-";
/// So many subnets are tried: others may take the same one at the same time.
const SUBNETS_TRIED: usize = 16;

/// Where a RUN finds the recording proxy, in every build on every machine: an address for
/// documentation (RFC 5737), that nobody has, and the usual port.
const PROXY: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 3128);
const TCP: u8 = 6;
const UDP: u8 = 17;

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
    #[error("what commands fetch can't be recorded")]
    Record(#[source] io::Error),
}

/// Why what a RUN fetches could not be recorded, or not be given again.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error(
        "{url} is not what kiln.lock has recorded: expected {expected}, found {found}; \
         `kiln build --network=live` records anew"
    )]
    Changed {
        url: String,
        expected: Digest,
        found: String,
    },
    #[error(
        "{url} is recorded in kiln.lock, but its content {expected} is not on this machine and \
         can't be fetched: {cause}"
    )]
    Gone {
        url: String,
        expected: Digest,
        cause: String,
    },
    #[error("the recorded response {digest} can't be read or kept: {cause}")]
    Body { digest: Digest, cause: io::Error },
    #[error("a response can't be kept: {0}")]
    Disk(io::Error),
    #[error("a response has more than {limit} bytes")]
    TooLong { limit: u64 },
    #[error("the command makes more than {limit} requests, which can't be recorded")]
    TooMany { limit: usize },
}

/// The network of all builds of this process.
pub struct Network {
    tag: String,
    scratch: PathBuf,
    resolver: Resolver,
    standing: Mutex<Option<Arc<Standing>>>,
    recorder: Mutex<Option<Arc<Recorder>>>,
}

/// What a RUN is started with. Its address is nobody else's until this is dropped.
pub(crate) struct Connection {
    pub network: InstanceNetwork,
    pub resolver: Option<Resolver>,
    /// `None`: nothing can be fetched.
    pub proxy: Option<Proxy>,
    seat: Option<Seat>,
    _listening: Option<Listening>,
}

/// The recording proxy, as a RUN sees it.
pub(crate) struct Proxy {
    /// `http://…`.
    pub url: String,
    /// Its certificate authority, in PEM.
    pub certificate: String,
}

impl Connection {
    /// What the command reached past the proxy; what can't be told is a line, too.
    pub fn direct(&self) -> Vec<String> {
        let Some(seat) = &self.seat else {
            return match self.network {
                InstanceNetwork::Host => {
                    vec!["anything past the proxy, in the host's network".into()]
                }
                _ => Vec::new(),
            };
        };
        let own = IpAddr::V4(seat.of.bridge.subnet.nth(seat.number));
        let seen = match seat.of.firewall().direct() {
            Ok(seen) => seen,
            Err(cause) => {
                return vec![format!(
                    "anything past the proxy, which can't be seen: {cause}"
                )];
            }
        };
        let seen = seen
            .into_iter()
            .filter(|direct| IpAddr::V4(direct.from) == own);
        let shown = seen.map(|direct| match direct.protocol {
            TCP => format!("{}:{}/tcp", direct.to, direct.port),
            UDP => format!("{}:{}/udp", direct.to, direct.port),
            other => format!("{} (IP protocol {other})", direct.to),
        });
        let mut all: Vec<String> = shown.collect();
        all.sort();
        all.dedup();
        all
    }
}

impl Network {
    /// `resolver`: the host's.
    pub fn new(root: &Path, cache: &Path, resolver: Resolver) -> Self {
        Self {
            tag: net::root_tag(root),
            scratch: cache.join("run"),
            resolver,
            standing: Mutex::new(None),
            recorder: Mutex::new(None),
        }
    }

    /// What the recording proxy and its certificate are known by in files: in none they may
    /// be.
    pub(crate) fn marks(&self) -> Vec<Vec<u8>> {
        let recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        let mut marks = recorder
            .as_ref()
            .map_or_else(Vec::new, |r| r.authority.marks());
        marks.push(format!("{}:{}", PROXY.0, PROXY.1).into_bytes());
        marks
    }

    fn recorder(&self) -> Result<Arc<Recorder>, NetworkError> {
        let mut recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(recorder) = &*recorder {
            return Ok(recorder.clone());
        }
        let made = Arc::new(Recorder::start().map_err(NetworkError::Record)?);
        *recorder = Some(made.clone());
        Ok(made)
    }

    /// `session`: what is fetched is recorded by. `warn`: is told what stands in the
    /// network's way.
    pub(crate) fn connect(
        &self,
        how: RunNetwork,
        session: &Arc<Session>,
        warn: &mut dyn FnMut(String),
    ) -> Result<Connection, NetworkError> {
        match how {
            RunNetwork::None => Ok(Connection {
                network: InstanceNetwork::Isolated,
                resolver: None,
                proxy: None,
                seat: None,
                _listening: None,
            }),
            RunNetwork::Host => self.on_host(session),
            RunNetwork::Default => self.on_bridge(session, warn),
        }
    }

    /// The proxy has a port of its own for each command.
    fn on_host(&self, session: &Arc<Session>) -> Result<Connection, NetworkError> {
        let recorder = self.recorder()?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(NetworkError::Record)?;
        let listening = recorder.listen(listener, Who::One(session.clone()));
        let listening = listening.map_err(NetworkError::Record)?;
        Ok(Connection {
            network: InstanceNetwork::Host,
            resolver: Some(self.resolver.clone()),
            proxy: Some(Proxy {
                url: format!("http://{}:{}", Ipv4Addr::LOCALHOST, listening.port),
                certificate: recorder.authority.pem(),
            }),
            seat: None,
            _listening: Some(listening),
        })
    }

    fn on_bridge(
        &self,
        session: &Arc<Session>,
        warn: &mut dyn FnMut(String),
    ) -> Result<Connection, NetworkError> {
        let recorder = self.recorder()?;
        let seat = Seat::take(self.standing(warn)?, session.clone())?;
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
        Ok(Connection {
            network: InstanceNetwork::Bridged(vec![interface]),
            resolver: Some(resolver),
            proxy: Some(Proxy {
                url: format!("http://{}:{}", PROXY.0, PROXY.1),
                certificate: recorder.authority.pem(),
            }),
            seat: Some(seat),
            _listening: None,
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
            callers: Callers::default(),
            recording: None,
            names: None,
            _folder: folder,
        };
        let gateway = standing.bridge.gateway();
        let listener = TcpListener::bind((gateway, 0)).map_err(NetworkError::Record)?;
        let who = Who::ByAddress(standing.callers.clone());
        let recording = self.recorder()?.listen(listener, who);
        standing.recording = Some(recording.map_err(NetworkError::Record)?);
        standing.firewall().apply()?;
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

fn firewall(id: &str, networks: Vec<BridgeNetwork>, listens: Option<u16>) -> net::Firewall {
    net::Firewall {
        table: format!("{}{id}", net::TABLE_PREFIX),
        networks,
        catch_all_port: None,
        recorder: listens.map(|listens| net::Recorder {
            address: PROXY.0,
            port: PROXY.1,
            listens,
        }),
    }
}

fn take_down(id: &str) -> Result<(), NetworkError> {
    net::remove_bridge(&bridge_name(id))?;
    Ok(firewall(id, Vec::new(), None).remove()?)
}

struct Standing {
    id: String,
    bridge: BridgeNetwork,
    /// Addresses in use, as numbers in the subnet.
    taken: Mutex<Taken>,
    /// Whose address is whose.
    callers: Callers,
    recording: Option<Listening>,
    names: Option<Names>,
    /// Let go last: until then nobody else takes the network away.
    _folder: Held,
}

#[derive(Default)]
struct Taken {
    now: BTreeSet<u32>,
    last: u32,
}

impl Standing {
    fn firewall(&self) -> net::Firewall {
        let listens = self.recording.as_ref().map(|recording| recording.port);
        firewall(&self.id, vec![self.bridge.clone()], listens)
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.names = None;
        self.recording = None;
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
    /// An address that nobody had lately: what the firewall has seen of one is its own.
    fn take(of: Arc<Standing>, session: Arc<Session>) -> Result<Self, NetworkError> {
        let mut taken = of.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |n: &u32| !taken.now.contains(n);
        let later = |n: &u32| *n > taken.last && free(n);
        let mut all = of.bridge.instances(None);
        let number = all
            .find(later)
            .or_else(|| of.bridge.instances(None).find(free));
        let number = number.ok_or(NetworkError::Full)?;
        taken.now.insert(number);
        taken.last = number;
        drop(taken);
        let address = IpAddr::V4(of.bridge.subnet.nth(number));
        let mut callers = of.callers.lock().unwrap_or_else(PoisonError::into_inner);
        callers.insert(address, session);
        drop(callers);
        Ok(Self { of, number })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let address = IpAddr::V4(self.of.bridge.subnet.nth(self.number));
        let callers = self.of.callers.lock();
        callers
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&address);
        let taken = self.of.taken.lock();
        taken
            .unwrap_or_else(PoisonError::into_inner)
            .now
            .remove(&self.number);
    }
}

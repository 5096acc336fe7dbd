//! The one nftables table of a kiln root: redirects service addresses to the proxy,
//! masquerades what leaves, and keeps networks apart.
//!
//! The table is replaced as a whole, in one transaction; connections that stand are
//! not touched. It lives beside other tables: a packet must be accepted by all, so
//! it can refuse what others accept but not the other way round (see
//! [`super::forward_policy_conflict`]).

use std::net::Ipv4Addr;

use kiln_model::Digest;
use kiln_model::network::{BridgeNetwork, Subnet};

use super::channel::{Channel, NetlinkError};
use super::names::is_interface_name;
use super::nft::{
    Chain, ChainKind, Hook, Rule, Set, Table, remembered, table_comment, table_names,
};

/// Before a root's tag, in its table's and its bridges' names.
pub const TABLE_PREFIX: &str = "kiln-";
pub const BRIDGE_PREFIX: &str = "kn";

/// Where instances find the resolver, at their network's gateway.
const DNS_PORT: u16 = 53;
/// The kernel's bound of a table's name is 255; kiln's names are short.
const TABLE_NAME_BYTES: usize = 64;

/// Why the firewall could not be set.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    #[error("`{name}` can't be the firewall table's name (1 to 64 letters, digits, `-` and `_`)")]
    TableName { name: String },
    #[error("`{bridge}` is no interface's name")]
    BridgeName { bridge: String },
    #[error(
        "the kernel refused the firewall table {table}: {source}; kiln needs nf_tables with nat \
         (kernel modules nf_tables, nft_chain_nat, nft_redir, nft_masq, nft_ct, nft_reject_ipv4)"
    )]
    Kernel { table: String, source: NetlinkError },
    #[error(transparent)]
    Bridges(#[from] super::BridgeError),
}

/// The rules for all networks of one kiln root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Firewall {
    /// `kiln-<root tag>`.
    pub table: String,
    pub networks: Vec<BridgeNetwork>,
    /// Where the proxy takes connections to service addresses, on all addresses. `None`:
    /// these networks have no services.
    pub catch_all_port: Option<u16>,
    /// For networks of builds.
    pub recorder: Option<Recorder>,
}

/// A proxy on the host at an address that is the same in every network, and a list of the
/// connections that go past it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorder {
    /// Nobody's else.
    pub address: Ipv4Addr,
    pub port: u16,
    /// Where it really listens, at the networks' gateways.
    pub listens: u16,
}

/// A connection that left a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Direct {
    pub from: Ipv4Addr,
    pub to: Ipv4Addr,
    /// As in IP's header: 6 is TCP, 17 is UDP.
    pub protocol: u8,
    /// Of TCP and UDP.
    pub port: u16,
}

impl Direct {
    fn read(key: &[u8]) -> Option<Self> {
        let address = |at: usize| {
            let bytes: [u8; 4] = key.get(at..at + 4)?.try_into().ok()?;
            Some(Ipv4Addr::from(bytes))
        };
        Some(Self {
            from: address(0)?,
            to: address(4)?,
            protocol: *key.get(8)?,
            port: u16::from_be_bytes(key.get(12..14)?.try_into().ok()?),
        })
    }
}

/// What went past the recorder.
const DIRECT: Set = Set {
    name: "direct",
    id: 1,
};

impl Firewall {
    /// The connections that left the networks and did not go to the recorder.
    pub fn direct(&self) -> Result<Vec<Direct>, FirewallError> {
        if self.recorder.is_none() {
            return Ok(Vec::new());
        }
        let mut channel = Channel::netfilter().map_err(|e| self.refused(e.into()))?;
        let keys = remembered(&mut channel, &self.table, &DIRECT);
        let keys = keys.map_err(|e| self.refused(e))?;
        Ok(keys.iter().filter_map(|key| Direct::read(key)).collect())
    }

    /// Makes the kernel's table be this one. Without networks there is none.
    pub fn apply(&self) -> Result<(), FirewallError> {
        let table = self.table()?;
        let mut channel = Channel::netfilter().map_err(|e| self.refused(e.into()))?;
        let done = if self.networks.is_empty() {
            table.remove(&mut channel)
        } else {
            table.replace(&mut channel, &self.comment())
        };
        done.map_err(|e| self.refused(e))
    }

    /// Removes the table; it need not be there.
    pub fn remove(&self) -> Result<(), FirewallError> {
        let table = self.table()?;
        let mut channel = Channel::netfilter().map_err(|e| self.refused(e.into()))?;
        table.remove(&mut channel).map_err(|e| self.refused(e))
    }

    /// Whether a table that [`Firewall::apply`] made of the same values is there:
    /// other programs flush the whole ruleset (`nft flush ruleset`, a reload of
    /// nftables.service). Rules changed one by one are not seen.
    pub fn is_in_place(&self) -> Result<bool, FirewallError> {
        let mut channel = Channel::netfilter().map_err(|e| self.refused(e.into()))?;
        let found = table_comment(&mut channel, &self.table).map_err(|e| self.refused(e))?;
        Ok(match found {
            Some(comment) => !self.networks.is_empty() && comment == self.comment(),
            None => self.networks.is_empty(),
        })
    }

    fn refused(&self, source: NetlinkError) -> FirewallError {
        FirewallError::Kernel {
            table: self.table.clone(),
            source,
        }
    }

    /// Says whose table it is, and which rules it was made of.
    fn comment(&self) -> String {
        let rules = format!("{:?}", self.chains());
        format!(
            "made by kiln, replaced as a whole; rules {}",
            Digest::of(rules).short()
        )
    }

    fn table(&self) -> Result<Table, FirewallError> {
        let name = &self.table;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if !(1..=TABLE_NAME_BYTES).contains(&name.len()) || !name.bytes().all(plain) {
            return Err(FirewallError::TableName { name: name.clone() });
        }
        if let Some(network) = self.networks.iter().find(|n| !is_interface_name(&n.bridge)) {
            return Err(FirewallError::BridgeName {
                bridge: network.bridge.clone(),
            });
        }
        Ok(Table {
            name: name.clone(),
            sets: self.recorder.iter().map(|_| DIRECT).collect(),
            chains: self.chains(),
        })
    }

    fn chains(&self) -> Vec<Chain> {
        let chain = |name, kind, hook, rules| Chain {
            name,
            kind,
            hook,
            rules,
        };
        vec![
            chain(
                "prerouting",
                ChainKind::Nat,
                Hook::Prerouting,
                self.prerouting(),
            ),
            chain("output", ChainKind::Nat, Hook::Output, self.output()),
            chain(
                "postrouting",
                ChainKind::Nat,
                Hook::Postrouting,
                self.postrouting(),
            ),
            chain("input", ChainKind::Filter, Hook::Input, self.input()),
            chain("forward", ChainKind::Filter, Hook::Forward, self.forward()),
        ]
    }

    /// From instances to their own network's service addresses: to the proxy. From builds
    /// to the recorder's address: to the recorder.
    fn prerouting(&self) -> Vec<Rule> {
        let mut rules = self.redirects(|n| Rule::new(&n.name).in_by(&n.bridge));
        if let Some(recorder) = &self.recorder {
            rules.extend(self.networks.iter().map(|n| {
                let rule = Rule::new(&n.name).in_by(&n.bridge);
                let rule = rule.for_address(recorder.address).tcp();
                rule.for_port(recorder.port).redirect(recorder.listens)
            }));
        }
        rules
    }

    /// From the host itself to any service address.
    fn output(&self) -> Vec<Rule> {
        self.redirects(|n| Rule::new(&n.name))
    }

    fn redirects(&self, rule: impl Fn(&BridgeNetwork) -> Rule) -> Vec<Rule> {
        let Some(port) = self.catch_all_port else {
            return vec![];
        };
        self.each(|n, range| vec![rule(n).to(range).tcp().redirect(port)])
    }

    /// What leaves the host gets the host's address. What the host sends itself (to a
    /// service address, redirected) is left as it is.
    fn postrouting(&self) -> Vec<Rule> {
        let open = self.networks.iter().filter(|n| !n.internal);
        open.map(|n| {
            Rule::new(&n.name)
                .from(&n.subnet)
                .out_not_by(&n.bridge)
                .out_not_by("lo")
                .masquerade()
        })
        .collect()
    }

    /// To the host. A network's addresses are only for the network and the host;
    /// the catch-all port only for what was redirected.
    fn input(&self) -> Vec<Rule> {
        let mut rules = vec![Rule::new("what was let in before").established().accept()];
        if let Some(port) = self.catch_all_port {
            let rule = |what| Rule::new(what).tcp().for_port(port);
            rules.push(rule("to the proxy").redirected().accept());
            rules.push(rule("not past a service address").drop());
        }
        rules.extend(self.each(|n, range| {
            let rule = || Rule::new(&n.name);
            let mut rules = vec![
                rule()
                    .to(&n.subnet)
                    .in_not_by(&n.bridge)
                    .in_not_by("lo")
                    .drop(),
                rule().in_by(&n.bridge).not_from(&n.subnet).drop(),
                rule().to(range).icmp().accept(),
                rule().to(range).reject(),
                dns(n.gateway(), rule().in_by(&n.bridge).udp()),
                dns(n.gateway(), rule().in_by(&n.bridge).tcp()),
            ];
            if n.internal {
                rules.push(
                    rule()
                        .in_by(&n.bridge)
                        .for_address(n.gateway())
                        .icmp()
                        .accept(),
                );
                rules.push(rule().in_by(&n.bridge).reject());
            }
            rules
        }));
        rules
    }

    /// Between interfaces. Ports of one bridge see each other (their frames come by
    /// here with br_netfilter); nothing new goes into a bridge, so nothing passes
    /// between two; nothing leaves an internal one.
    fn forward(&self) -> Vec<Rule> {
        let mut rules = vec![
            Rule::new("what was let through before")
                .established()
                .accept(),
        ];
        rules.extend(self.each(|n, _| {
            let rule = || Rule::new(&n.name);
            vec![
                rule().in_by(&n.bridge).out_by(&n.bridge).accept(),
                rule().out_by(&n.bridge).drop(),
                rule().in_by(&n.bridge).not_from(&n.subnet).drop(),
            ]
        }));
        if self.recorder.is_some() {
            let seen = self.networks.iter();
            rules.extend(seen.map(|n| {
                let rule = Rule::new("past the recorder").in_by(&n.bridge);
                rule.remember(DIRECT.name, DIRECT.id)
            }));
        }
        // After all drops into bridges: an accept would end the chain before them.
        rules.extend(self.networks.iter().map(|n| {
            let rule = Rule::new(&n.name).in_by(&n.bridge);
            if n.internal {
                rule.drop()
            } else {
                rule.accept()
            }
        }));
        rules
    }

    fn each(&self, rules: impl Fn(&BridgeNetwork, &Subnet) -> Vec<Rule>) -> Vec<Rule> {
        self.networks
            .iter()
            .flat_map(|n| rules(n, &n.service_range()))
            .collect()
    }
}

/// Removes the tables of roots that have no bridge left (deleted by hand, or killed and
/// never started again), and gives their names: their rules would drop what another root
/// sends in a subnet that is free again. A root's bridges are made before its table.
pub fn remove_stale_tables() -> Result<Vec<String>, FirewallError> {
    let fail = |table: &str| {
        let table = table.to_owned();
        move |source: NetlinkError| FirewallError::Kernel { table, source }
    };
    let any = format!("{TABLE_PREFIX}*");
    let mut channel = Channel::netfilter().map_err(|e| fail(&any)(e.into()))?;
    let mut removed = table_names(&mut channel).map_err(fail(&any))?;
    let bridges = super::bridges(BRIDGE_PREFIX)?;
    removed.retain(|name| {
        let tag = name.strip_prefix(TABLE_PREFIX);
        tag.is_some_and(|tag| {
            let prefix = format!("{BRIDGE_PREFIX}{tag}");
            !bridges.iter().any(|b| b.name.starts_with(&prefix))
        })
    });
    for name in &removed {
        let table = Table {
            name: name.clone(),
            sets: vec![],
            chains: vec![],
        };
        table.remove(&mut channel).map_err(fail(name))?;
    }
    Ok(removed)
}

fn dns(gateway: Ipv4Addr, from: Rule) -> Rule {
    from.for_port(DNS_PORT).for_address(gateway).accept()
}

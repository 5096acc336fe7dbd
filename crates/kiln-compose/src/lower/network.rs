//! Networks, ports, and who shares whose network.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use kiln_model::NetworkName;
use kiln_model::spec::{Attachment, ExposedPort, Network, NetworkMode, Port, Protocol};

use super::{Lowering, flag, integer, items, text, texts};
use crate::node::Node;
use crate::short;

const MTU: &str = "com.docker.network.driver.mtu";

impl Lowering<'_> {
    pub(super) fn networks(&mut self) -> BTreeMap<NetworkName, Network> {
        let mut out = BTreeMap::new();
        for (key, node) in self.project.section("networks") {
            let Some(name) = self.id::<NetworkName>(key, node.key) else {
                continue;
            };
            if !flag(node, "external") {
                self.network_values(node);
            }
            let (subnet, gateway) = self.ipam(node);
            let network = Network {
                name: text(node, "name").unwrap_or_else(|| key.to_owned()),
                external: flag(node, "external"),
                internal: flag(node, "internal"),
                subnet,
                gateway,
                mtu: self.network_options(node),
                labels: self.pairs(node.get("labels")),
            };
            out.insert(name, network);
        }
        out
    }

    fn network_values(&mut self, node: &Node) {
        if let Some(driver) = node.get("driver")
            && !matches!(driver.as_str(), Some("bridge" | "default" | ""))
        {
            self.refuse_value("networks.*.driver", driver, "kiln has bridge networks only");
        }
        if let Some(said) = node.get("enable_ipv4")
            && !flag(node, "enable_ipv4")
        {
            self.refuse_value("networks.*.enable_ipv4", said, "kiln's networks are IPv4");
        }
        if let Some(said) = node.get("enable_ipv6")
            && flag(node, "enable_ipv6")
        {
            self.refuse_value(
                "networks.*.enable_ipv6",
                said,
                "kiln's networks are IPv4 only",
            );
        }
    }

    fn network_options(&mut self, node: &Node) -> Option<u32> {
        let mut mtu = None;
        let options = node.get("driver_opts").and_then(Node::as_map);
        for (key, value) in options.into_iter().flatten() {
            if key == MTU {
                let number = value.text().unwrap_or_default().parse::<u32>();
                mtu = self.take(
                    number.map_err(|_| "the MTU must be a number".into()),
                    value.span,
                );
                continue;
            }
            let hint = format!("kiln knows {MTU} only");
            self.refuse(
                "networks.*.driver_opts",
                &format!("network option {key}"),
                value.key,
                &hint,
            );
        }
        mtu
    }

    fn ipam(&mut self, node: &Node) -> (Option<String>, Option<Ipv4Addr>) {
        let Some(ipam) = node.get("ipam") else {
            return (None, None);
        };
        if let Some(driver) = ipam.get("driver")
            && !matches!(driver.as_str(), Some("default" | ""))
        {
            self.refuse_value(
                "networks.*.ipam.driver",
                driver,
                "kiln gives out addresses itself",
            );
        }
        let mut found = (None, None);
        for pool in items(ipam, "config") {
            let Some(subnet) = pool.get("subnet") else {
                continue;
            };
            let said = subnet.text().unwrap_or_default();
            if said.contains(':') {
                self.refuse_value(
                    "networks.*.ipam.config.[].subnet",
                    subnet,
                    "kiln's networks are IPv4 only",
                );
                continue;
            }
            if found.0.is_some() {
                self.refuse_value(
                    "networks.*.ipam.config.[].subnet",
                    subnet,
                    "a network has one subnet",
                );
                continue;
            }
            let Some(subnet) = self.take(check_subnet(&said), subnet.span) else {
                continue;
            };
            let gateway = pool
                .get("gateway")
                .and_then(|node| self.ipv4(node, "gateway"));
            let first = subnet.split('/').next().and_then(|base| base.parse().ok());
            let first = first.map(|base: Ipv4Addr| Ipv4Addr::from(u32::from(base) + 1));
            if let Some(said) = pool.get("gateway")
                && gateway.is_some()
                && gateway != first
            {
                self.refuse_value(
                    "networks.*.ipam.config.[].gateway",
                    said,
                    "kiln's gateway has the first address of the subnet; leave it out",
                );
            }
            found = (Some(subnet), gateway);
        }
        found
    }

    fn ipv4(&mut self, node: &Node, what: &str) -> Option<Ipv4Addr> {
        let said = node.text().filter(|text| !text.is_empty())?;
        let parsed = said
            .parse()
            .map_err(|_| format!("{what}: `{said}` is not an IPv4 address"));
        self.take(parsed, node.span)
    }

    /// `None`: an error, reported.
    pub(super) fn network_mode(&mut self, node: &Node) -> Option<NetworkMode> {
        let Some(mode) = node.get("network_mode").filter(|n| n.as_str() != Some("")) else {
            return Some(NetworkMode::Networks(self.attachments(node)));
        };
        match mode.as_str().unwrap_or_default() {
            "none" => Some(NetworkMode::None),
            "host" => Some(NetworkMode::Host),
            said => {
                if let Some(service) = said.strip_prefix("service:") {
                    return Some(NetworkMode::Service(self.service_ref(service, mode.span)?));
                }
                let hint = match said {
                    "bridge" | "default" => {
                        "take it out: a service joins the project's own bridge network"
                    }
                    _ => "use none, host, service:<name>, or `networks`",
                };
                self.refuse_value("services.*.network_mode", mode, hint);
                Some(NetworkMode::None)
            }
        }
    }

    fn attachments(&mut self, node: &Node) -> BTreeMap<NetworkName, Attachment> {
        let mut out = BTreeMap::new();
        let networks = node.get("networks").and_then(Node::as_map);
        for (key, said) in networks.into_iter().flatten() {
            let Some(name) = self.id::<NetworkName>(key, said.key) else {
                continue;
            };
            let address = said.get("ipv4_address");
            let priority = |key: &str| {
                integer(said, key)
                    .and_then(|n| i32::try_from(n).ok())
                    .unwrap_or(0)
            };
            let attachment = Attachment {
                aliases: texts(said, "aliases"),
                ipv4_address: address.and_then(|node| self.ipv4(node, "ipv4_address")),
                mac_address: text(said, "mac_address"),
                interface_name: text(said, "interface_name"),
                priority: priority("priority"),
                gw_priority: priority("gw_priority"),
            };
            out.insert(name, attachment);
        }
        // The service's own mac_address is that of its first network.
        if let Some(mac) = text(node, "mac_address")
            && let Some(first) = out.values_mut().reduce(|best, next| {
                if next.priority > best.priority {
                    next
                } else {
                    best
                }
            })
        {
            first.mac_address.get_or_insert(mac);
        }
        out
    }

    pub(super) fn ports(&mut self, node: &Node) -> Vec<Port> {
        items(node, "ports")
            .iter()
            .filter_map(|port| self.port(port))
            .collect()
    }

    fn port(&mut self, node: &Node) -> Option<Port> {
        let target = integer(node, "target").unwrap_or(0);
        let span = node.get("target").map_or(node.span, |node| node.span);
        let target = u16::try_from(target)
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| format!("ports: {target} is not a port (1 to 65535)"));
        let target = self.take(target, span)?;
        let mode = node.get("mode");
        if let Some(mode) = mode.filter(|n| !matches!(n.as_str(), Some("ingress" | "host" | ""))) {
            self.refuse_value("services.*.ports.[].mode", mode, "use ingress or host");
        }
        let published = text(node, "published").unwrap_or_default();
        let span = node.get("published").map_or(node.span, |node| node.span);
        let range = match published.as_str() {
            "" | "0" => None,
            said => Some(self.take(short::port_range(said, said), span)?),
        };
        let host_ip: Option<IpAddr> = text(node, "host_ip").and_then(|ip| ip.parse().ok());
        Some(Port {
            target,
            published: range.filter(|(a, b)| a == b).map(|(port, _)| port),
            range: range.filter(|(a, b)| a != b),
            host_ip: host_ip.filter(|ip| !ip.is_unspecified()),
            protocol: self.protocol(node)?,
            app_protocol: text(node, "app_protocol"),
            name: text(node, "name"),
        })
    }

    fn protocol(&mut self, node: &Node) -> Option<Protocol> {
        match text(node, "protocol").as_deref() {
            None | Some("tcp") => Some(Protocol::Tcp),
            Some("udp") => Some(Protocol::Udp),
            Some(_) => {
                if let Some(said) = node.get("protocol") {
                    self.refuse_value("services.*.ports.[].protocol", said, "use tcp or udp");
                }
                None
            }
        }
    }

    pub(super) fn expose(&mut self, node: &Node) -> Vec<ExposedPort> {
        let mut out = vec![];
        for item in items(node, "expose") {
            let said = item.text().unwrap_or_default();
            let (range, protocol) = said.split_once('/').unwrap_or((&said, "tcp"));
            let protocol = match protocol {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                _ => {
                    self.refuse_value("services.*.expose", item, "use tcp or udp");
                    continue;
                }
            };
            let range = short::port_range(&said, range);
            if let Some((start, end)) = self.take(range, item.span) {
                out.extend((start..=end).map(|port| ExposedPort { port, protocol }));
            }
        }
        out
    }
}

fn check_subnet(text: &str) -> Result<String, String> {
    let bad = || format!("`{text}` is not a subnet; write for example 10.5.0.0/16");
    let (address, bits) = text.split_once('/').ok_or_else(bad)?;
    let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
    let bits: u32 = bits.parse().map_err(|_| bad())?;
    if bits > 30 {
        return Err(format!(
            "`{text}` has no room for addresses; use /30 or bigger"
        ));
    }
    let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
    Ok(format!(
        "{}/{bits}",
        Ipv4Addr::from(u32::from(address) & mask)
    ))
}

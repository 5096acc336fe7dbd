//! Bounds on memory, CPUs, processes and disks.

use std::collections::BTreeMap;

use kiln_model::spec::{Blkio, Limits};

use super::{Lowering, bytes, flag, integer, items, text, unsigned_bytes};
use crate::node::Node;
use crate::{units, values};

impl Lowering<'_> {
    pub(super) fn limits(&mut self, node: &Node) -> Limits {
        let limits = node.at(&["deploy", "resources", "limits"]);
        let reservations = node.at(&["deploy", "resources", "reservations"]);
        let unsigned = |key: &str| integer(node, key).and_then(|n| u64::try_from(n).ok());
        let memory = |own: &str, group: Option<&Node>| {
            unsigned_bytes(node, own).or_else(|| unsigned_bytes(group?, "memory"))
        };
        let swap = bytes(node, "memswap_limit");
        let shm_size = unsigned_bytes(node, "shm_size");
        Limits {
            memory: memory("mem_limit", limits),
            memory_reservation: memory("mem_reservation", reservations),
            memory_swap: swap,
            memory_swappiness: unsigned_bytes(node, "mem_swappiness"),
            nano_cpus: nano_cpus(node).or_else(|| nano_cpus(limits?)),
            cpu_shares: unsigned("cpu_shares").filter(|n| *n > 0),
            cpu_period: unsigned("cpu_period").filter(|n| *n > 0),
            cpu_quota: integer(node, "cpu_quota").filter(|n| *n != 0),
            cpuset: text(node, "cpuset"),
            pids: integer(node, "pids_limit")
                .filter(|n| *n != 0)
                .or_else(|| integer(limits?, "pids").filter(|n| *n != 0)),
            shm_size,
            ulimits: self.ulimits(node),
            oom_score_adj: integer(node, "oom_score_adj")
                .and_then(|n| i32::try_from(n).ok())
                .filter(|n| *n != 0),
            oom_kill_disable: flag(node, "oom_kill_disable"),
            blkio: node.get("blkio_config").map(|node| self.blkio(node)),
        }
    }

    /// Of a service or of its build.
    pub(super) fn ulimits(&mut self, node: &Node) -> BTreeMap<String, (i64, i64)> {
        let mut out = BTreeMap::new();
        let map = node.get("ulimits").and_then(Node::as_map);
        for (name, said) in map.into_iter().flatten() {
            let pair = match said.as_map() {
                None => values::integer(said).map(|n| (n, n)),
                Some(_) => Ok((
                    integer(said, "soft").unwrap_or(0),
                    integer(said, "hard").unwrap_or(0),
                )),
            };
            let pair = pair.and_then(units::ulimit);
            let pair = pair.map_err(|why| format!("ulimits.{name}: {why}"));
            out.extend(self.take(pair, said.span).map(|pair| (name.clone(), pair)));
        }
        out
    }

    fn blkio(&mut self, node: &Node) -> Blkio {
        let weight = |node: &Node| {
            integer(node, "weight")
                .and_then(|n| u16::try_from(n).ok())
                .filter(|n| *n > 0)
        };
        let rates = |key: &str| -> Vec<(String, u64)> {
            items(node, key)
                .iter()
                .filter_map(|item| Some((text(item, "path")?, unsigned_bytes(item, "rate")?)))
                .collect()
        };
        Blkio {
            weight: weight(node),
            weight_device: items(node, "weight_device")
                .iter()
                .filter_map(|item| Some((text(item, "path")?, weight(item)?)))
                .collect(),
            read_bps: rates("device_read_bps"),
            read_iops: rates("device_read_iops"),
            write_bps: rates("device_write_bps"),
            write_iops: rates("device_write_iops"),
        }
    }
}

fn nano_cpus(node: &Node) -> Option<u64> {
    let cpus = values::number(node.get("cpus").filter(|n| !n.is_null())?).ok()?;
    let nanos = (cpus * 1e9).round();
    // In range, so the cast loses nothing.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    (1.0..9e18).contains(&nanos).then_some(nanos as u64)
}

//! What a service may do, and how much of the machine it may have.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ServiceName;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Security {
    /// Without `CAP_`, upper case; `ALL` for every one.
    pub cap_add: Vec<String>,
    pub cap_drop: Vec<String>,
    /// `None`: kiln's default, which is true.
    pub no_new_privileges: Option<bool>,
    pub seccomp: Seccomp,
    pub apparmor: Option<String>,
    pub privileged: bool,
    pub devices: Vec<Device>,
    pub device_cgroup_rules: Vec<String>,
    pub sysctls: BTreeMap<String, String>,
    /// compose `read_only: true`: also takes away `/tmp` and the other default scratch.
    pub read_only: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seccomp {
    #[default]
    Default,
    Unconfined,
    /// A profile in Docker's JSON form: its content.
    Profile(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub source: String,
    pub target: String,
    /// Of `rwm`.
    pub permissions: String,
}

/// Bounds; `None`: none. Bytes and billionths of a CPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    pub memory: Option<u64>,
    pub memory_reservation: Option<u64>,
    /// Memory and swap together, as Docker counts; -1: without bound.
    pub memory_swap: Option<i64>,
    pub memory_swappiness: Option<u64>,
    pub nano_cpus: Option<u64>,
    pub cpu_shares: Option<u64>,
    pub cpu_period: Option<u64>,
    pub cpu_quota: Option<i64>,
    pub cpuset: Option<String>,
    pub pids: Option<i64>,
    pub shm_size: Option<u64>,
    /// name (`nofile`) → (soft, hard).
    pub ulimits: BTreeMap<String, (i64, i64)>,
    pub oom_score_adj: Option<i32>,
    pub oom_kill_disable: bool,
    pub blkio: Option<Blkio>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Blkio {
    pub weight: Option<u16>,
    pub weight_device: Vec<(String, u16)>,
    pub read_bps: Vec<(String, u64)>,
    pub read_iops: Vec<(String, u64)>,
    pub write_bps: Vec<(String, u64)>,
    pub write_iops: Vec<(String, u64)>,
}

/// `pid`, `ipc`, `uts`, `cgroup`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Namespaces {
    pub pid: NamespaceMode,
    pub ipc: NamespaceMode,
    pub uts: NamespaceMode,
    pub cgroup: NamespaceMode,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NamespaceMode {
    #[default]
    Private,
    Host,
    Service(ServiceName),
}

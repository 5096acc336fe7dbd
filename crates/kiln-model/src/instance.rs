//! Everything the runtime needs to start one instance, decided beforehand: every
//! id, address, path and digest is fixed, so that starting makes no choices.
//! The shim reads it as JSON ([`InstanceSpec::FORMAT`]).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::spec::{Blkio, Device, Logging, Seccomp};
use crate::{Digest, EnvironmentName, InstanceId, Millis, ReleaseNumber, ServiceName};

/// One running copy of a service, a one-off job, an image's isolated test, or a
/// builder's RUN step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// [`InstanceSpec::FORMAT`].
    pub format: u32,
    pub id: InstanceId,
    pub purpose: Purpose,
    pub argv: Vec<String>,
    /// `KEY=value` pairs, keys unique.
    pub env: BTreeMap<String, String>,
    /// Absolute; made if the image lacks it (in writable roots only).
    pub cwd: String,
    /// `user[:group]`, names (looked up in the image's passwd and group) or numbers.
    pub user: String,
    pub group_add: Vec<String>,
    pub hostname: String,
    pub domainname: Option<String>,
    pub root: Root,
    pub mounts: Vec<InstanceMount>,
    pub network: InstanceNetwork,
    /// Written to `/etc/resolv.conf`; `None`: an empty one.
    pub resolver: Option<Resolver>,
    /// `/etc/hosts` beside localhost and the hostname.
    pub hosts: Vec<(IpAddr, String)>,
    pub namespaces: SharedNamespaces,
    pub security: InstanceSecurity,
    pub limits: InstanceLimits,
    /// A signal's name (`SIGTERM`, `TERM`) or number.
    pub stop_signal: String,
    pub stop_grace: Millis,
    pub init: bool,
    pub tty: bool,
    pub stdin_open: bool,
    pub logging: Logging,
}

impl InstanceSpec {
    /// The serialised form's version.
    pub const FORMAT: u32 = 1;
}

/// What an instance is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Serves as part of an environment's release.
    Service(Membership),
    /// Runs once to its end.
    Job(Membership),
    /// An image's test in isolation.
    Test,
    /// A builder's step.
    Build,
}

impl Purpose {
    pub fn membership(&self) -> Option<&Membership> {
        match self {
            Purpose::Service(m) | Purpose::Job(m) => Some(m),
            Purpose::Test | Purpose::Build => None,
        }
    }
}

/// Whose copy an instance is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    pub environment: EnvironmentName,
    pub service: ServiceName,
    /// The release that first started it; a later one that leaves the service
    /// unchanged keeps it.
    pub release: ReleaseNumber,
    /// Identifies everything that makes one instance of the service different from
    /// one of another release: the digest of its released service.
    pub revision: Digest,
    /// 1 … replicas.
    pub index: u32,
    /// The image's manifest.
    pub image: Digest,
}

/// An image tree on disk: what `mount` needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreePaths {
    /// The EROFS metadata image's file.
    pub metadata: PathBuf,
    /// The folder of content objects the metadata redirects into.
    pub objects: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Root {
    /// The image's tree, read-only, with these directories as scratch.
    Sealed {
        tree: TreePaths,
        scratch: Vec<Scratch>,
    },
    /// The image's tree below a writable layer in `upper` (`work` beside it, same
    /// file system), kept or thrown away by the caller. `tree` `None`: an empty root.
    Layered {
        tree: Option<TreePaths>,
        upper: PathBuf,
        work: PathBuf,
    },
    /// A throw-away writable layer that goes with the instance.
    Unsealed { tree: TreePaths },
}

/// A bounded tmpfs that shows the image's content of `path` underneath.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Scratch {
    /// Absolute, in the instance.
    pub path: String,
    /// Bytes.
    pub size: u64,
    pub exec: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceMount {
    pub source: InstanceMountSource,
    /// Absolute, in the instance; a missing mount point is made where the root allows
    /// it and otherwise must have been planned into the image's tree.
    pub target: String,
    pub read_only: bool,
    /// Without `noexec`.
    pub exec: bool,
    /// With `nodev` left out (the builder's and privileged instances' mounts only).
    pub dev: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum InstanceMountSource {
    /// A file or folder of the host (binds, whole volumes).
    Bind {
        path: PathBuf,
        recursive: bool,
        propagation: Option<String>,
    },
    /// What is at `subpath` of a volume's folder. It is looked up within the folder: links
    /// that a program has left there lead nowhere else.
    Volume { path: PathBuf, subpath: String },
    /// A small file, shown read-only with this owner and mode; content from `path`.
    /// Secrets are copied to a tmpfs so that no disk block of the instance holds them.
    File {
        path: PathBuf,
        uid: u32,
        gid: u32,
        mode: u32,
        secret: bool,
    },
    Tmpfs {
        size: Option<u64>,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
    },
    /// Another image's tree, read-only.
    Tree {
        tree: TreePaths,
        subpath: Option<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceNetwork {
    /// Only a loopback interface.
    Isolated,
    Host,
    /// A network namespace of its own, joined to these bridges; the first holds the
    /// default route (none if it is internal).
    Bridged(Vec<Interface>),
    /// That of a running instance.
    Join(InstanceId),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name inside: `eth0`…
    pub name: String,
    /// The bridge on the host.
    pub bridge: String,
    pub address: Ipv4Addr,
    pub prefix: u8,
    /// `None`: no default route over this interface.
    pub gateway: Option<Ipv4Addr>,
    pub mtu: Option<u32>,
    /// `aa:bb:cc:dd:ee:ff`; `None`: derived from the address.
    pub mac: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolver {
    pub nameservers: Vec<IpAddr>,
    pub search: Vec<String>,
    pub options: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SharedNamespaces {
    pub pid: SharedNamespace,
    pub ipc: SharedNamespace,
    pub uts: SharedNamespace,
    pub cgroup: SharedNamespace,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SharedNamespace {
    #[default]
    Private,
    Host,
    Of(InstanceId),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceSecurity {
    /// Beyond Docker's default set; without `CAP_`; may be `ALL`.
    pub cap_add: Vec<String>,
    pub cap_drop: Vec<String>,
    pub no_new_privileges: bool,
    pub seccomp: Seccomp,
    pub apparmor: Option<String>,
    pub privileged: bool,
    pub devices: Vec<Device>,
    pub device_cgroup_rules: Vec<String>,
    pub sysctls: BTreeMap<String, String>,
}

impl Default for InstanceSecurity {
    fn default() -> Self {
        Self {
            cap_add: Vec::new(),
            cap_drop: Vec::new(),
            no_new_privileges: true,
            seccomp: Seccomp::Default,
            apparmor: None,
            privileged: false,
            devices: Vec::new(),
            device_cgroup_rules: Vec::new(),
            sysctls: BTreeMap::new(),
        }
    }
}

/// As in [`crate::spec::Limits`]; what the machine can't enforce is reported in
/// [`Observed::warnings`], never dropped in silence.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct InstanceLimits {
    pub memory: Option<u64>,
    pub memory_reservation: Option<u64>,
    pub memory_swap: Option<i64>,
    pub memory_swappiness: Option<u64>,
    pub nano_cpus: Option<u64>,
    pub cpu_shares: Option<u64>,
    pub cpu_period: Option<u64>,
    pub cpu_quota: Option<i64>,
    pub cpuset: Option<String>,
    pub pids: Option<i64>,
    /// `/dev/shm`, bytes; `None`: 64 MiB.
    pub shm_size: Option<u64>,
    pub ulimits: BTreeMap<String, (i64, i64)>,
    pub oom_score_adj: Option<i32>,
    pub oom_kill_disable: bool,
    pub blkio: Option<Blkio>,
}

/// What the runtime sees of one instance, read from the shim's files and the kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    pub id: InstanceId,
    pub state: ObservedState,
    /// What could not be honoured on this machine, in words.
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum ObservedState {
    /// Its folder exists and nothing runs: a start that never finished, or a reboot.
    Dead,
    Starting,
    Running {
        /// The first process, in the host's pid namespace.
        pid: u32,
        /// Milliseconds since the epoch.
        since: Millis,
    },
    Exited {
        status: ExitStatus,
        at: Millis,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    Code(i32),
    /// Ended by this signal.
    Signal(i32),
    /// The kernel's memory bound ended it.
    OutOfMemory,
    /// The container could not be made; the text is in the log.
    StartFailed,
    /// The shim was killed: nobody saw the end.
    Unknown,
}

impl ExitStatus {
    pub fn success(self) -> bool {
        self == ExitStatus::Code(0)
    }
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(signal) => write!(f, "ended by signal {signal}"),
            Self::OutOfMemory => f.write_str("ran out of its memory limit"),
            Self::StartFailed => f.write_str("could not be started"),
            Self::Unknown => f.write_str("ended unseen (its shim was killed)"),
        }
    }
}

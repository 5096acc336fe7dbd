//! The desired state of one project, as its compose file says it, resolved and
//! normalised: no interpolation, no short forms, no relative paths left. Images
//! are still by reference or by build; a [`Release`](crate::Release) has digests.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use crate::confinement::{Blkio, Device, Limits, NamespaceMode, Namespaces, Seccomp, Security};
pub use crate::declared::{
    DeclaredContent, DeclaredEntry, DeclaredGroup, DeclaredImage, DeclaredPlace, DeclaredUser,
};
pub use crate::rollout::{Analysis, CanaryStep, Number, Prometheus, RolloutOptions, Strategy};
use crate::suite::{Suite, SuiteKind};
use crate::{Digest, Millis, NetworkName, ProjectName, ServiceName, VolumeName};

/// A whole project.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    pub project: ProjectName,
    /// The folder of the (first) compose file, absolute. Never part of a release.
    pub folder: PathBuf,
    pub services: BTreeMap<ServiceName, Service>,
    pub networks: BTreeMap<NetworkName, Network>,
    /// By the key services use in the file.
    pub volumes: BTreeMap<String, Volume>,
    pub configs: BTreeMap<String, FileSource>,
    pub secrets: BTreeMap<String, FileSource>,
    /// Debian bases, `x-kiln.bases`, by the name `FROM` uses.
    pub bases: BTreeMap<String, DebianBase>,
    /// `x-kiln.debian.mirror`; `None`: the machine's own apt configuration.
    pub debian_mirror: Option<String>,
    /// `x-kiln.allow_secrets`: places in images that may hold what looks like a secret.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_secrets: Vec<String>,
    /// `develop.watch`, by service. Beside the services, as no release is made of it.
    #[serde(default)]
    pub watch: BTreeMap<ServiceName, Vec<WatchRule>>,
    /// `x-kiln.test`: what the whole stack is tested by.
    #[serde(default)]
    pub stack: Option<StackTest>,
    /// What the files of [`Check::Suite`] say, by their digest. A release has the digest.
    #[serde(default)]
    pub suites: BTreeMap<Digest, Suite>,
}

/// A service whose exit code is the verdict over a candidate release. It is no part of the
/// release itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackTest {
    pub service: ServiceName,
    /// How long all of it may take.
    pub timeout: Millis,
}

impl Spec {
    /// What the files among these checks say.
    pub fn suites_of(&self, checks: &[Check]) -> BTreeMap<Digest, Suite> {
        let named = checks.iter().filter_map(|check| match check {
            Check::Suite { digest, .. } => Some(digest),
            _ => None,
        });
        named
            .filter_map(|digest| Some((*digest, self.suites.get(digest)?.clone())))
            .collect()
    }
}

/// One rule of `develop.watch`: what a change of files leads to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WatchRule {
    /// Absolute; a folder or a file.
    pub path: PathBuf,
    pub action: WatchAction,
    /// Patterns of `.dockerignore`, relative to `path`, of what is not looked at.
    pub ignore: Vec<String>,
    /// Such patterns of what alone is looked at; empty: everything.
    pub include: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WatchAction {
    Rebuild,
    Restart,
    /// `sync`, `sync+restart` and `sync+exec`: who gets new files is a new instance anyway.
    Sync {
        /// Where `path` is in the instance.
        target: String,
        /// Everything is put there at the beginning.
        initial: bool,
        /// Run in an instance after its start, once something was put there.
        exec: Option<Hook>,
    },
}

/// Where a service's image comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageSource {
    /// A reference: registry, `x-kiln.bases` name, `oci:<folder>` or `docker-archive:<file>`.
    Reference(String),
    /// Built from a Containerfile or `x-kiln.image`; `tag` is the service's `image` key, if
    /// it has one.
    Build {
        build: Box<Build>,
        tag: Option<String>,
    },
}

/// compose `build`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Build {
    /// Absolute folder of the context.
    pub context: PathBuf,
    /// Absolute path; `None`: `Containerfile`, then `Dockerfile`, in the context.
    pub containerfile: Option<PathBuf>,
    /// `dockerfile_inline`: the text itself.
    pub inline: Option<String>,
    /// `x-kiln.image`, in place of a Containerfile.
    pub declared: Option<Box<DeclaredImage>>,
    pub args: BTreeMap<String, String>,
    pub target: Option<String>,
    pub labels: BTreeMap<String, String>,
    /// Named contexts: a folder, or a reference with its scheme.
    pub additional_contexts: BTreeMap<String, String>,
    /// `none`, `host` or empty for the default.
    pub network: String,
    pub no_cache: bool,
    pub pull: bool,
    pub extra_hosts: Vec<(String, String)>,
    pub shm_size: Option<u64>,
    /// Name → soft and hard limit of every RUN, as [`Limits::ulimits`].
    pub ulimits: BTreeMap<String, (i64, i64)>,
    /// The most time that one RUN may take; `None`: the builder's own limit. Not of compose.
    pub time_limit: Option<Millis>,
    /// Secret id → key in [`Spec::secrets`].
    pub secrets: BTreeMap<String, String>,
    pub ssh: Vec<String>,
    pub cache_from: Vec<String>,
    pub cache_to: Vec<String>,
    pub platforms: Vec<String>,
    pub tags: Vec<String>,
}

/// `x-kiln.bases.<name>`: a base image composed of Debian packages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DebianBase {
    /// `bookworm`, `trixie`…
    pub suite: String,
    /// Beside what the suite's essential set brings.
    pub packages: Vec<String>,
    /// Default `main`.
    pub components: Vec<String>,
    /// Also install the essential packages (a shell, dpkg, apt). Default true; false
    /// gives just `packages` and what they depend on.
    pub essential: bool,
    /// No maintainer scripts are run and no shell is promised.
    pub distroless: bool,
    pub env: BTreeMap<String, String>,
}

/// One compose service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    pub image: ImageSource,
    pub pull_policy: PullPolicy,
    /// `None`: this host's.
    pub platform: Option<String>,
    pub process: Process,
    /// Writable and read-only file systems beside the root.
    pub mounts: Vec<Mount>,
    /// Configs and secrets as read-only files.
    pub files: Vec<FileMount>,
    pub ports: Vec<Port>,
    pub expose: Vec<ExposedPort>,
    pub network: NetworkMode,
    pub names: Names,
    pub depends_on: BTreeMap<ServiceName, Dependency>,
    pub health: HealthcheckSetting,
    pub restart: RestartPolicy,
    pub security: Security,
    pub limits: Limits,
    pub namespaces: Namespaces,
    pub logging: Logging,
    pub replicas: u32,
    pub mode: ServiceMode,
    pub update: UpdateConfig,
    pub rollback: Option<UpdateConfig>,
    pub post_start: Vec<Hook>,
    pub pre_stop: Vec<Hook>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub kiln: KilnOptions,
}

/// The program and its surroundings; `None` means: what the image says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    pub entrypoint: Option<Vec<String>>,
    pub command: Option<Vec<String>>,
    pub environment: BTreeMap<String, String>,
    pub working_dir: Option<String>,
    pub user: Option<String>,
    pub group_add: Vec<String>,
    /// A signal's name or number.
    pub stop_signal: Option<String>,
    /// Compose's default is 10 s.
    pub stop_grace: Option<Millis>,
    /// A small init as pid 1.
    pub init: bool,
    pub tty: bool,
    pub stdin_open: bool,
}

/// What the instance and its peers call each other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Names {
    pub container_name: Option<String>,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    /// `(name, address or "host-gateway")`.
    pub extra_hosts: Vec<(String, String)>,
    pub dns: Vec<IpAddr>,
    pub dns_search: Vec<String>,
    pub dns_opt: Vec<String>,
    /// `links`: service → alias this service knows it by.
    pub links: Vec<(ServiceName, String)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    pub source: MountSource,
    /// Absolute path in the instance.
    pub target: String,
    pub read_only: bool,
    /// `x-kiln.exec`: leave out `noexec` on this writable mount.
    pub exec: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum MountSource {
    Bind {
        /// Absolute path on the host.
        path: PathBuf,
        /// Made as a folder when it is missing (compose's short syntax does).
        create: bool,
        propagation: Option<String>,
    },
    Volume {
        /// The key in [`Spec::volumes`].
        volume: String,
        subpath: Option<String>,
        /// Don't copy the image's content into a new, empty volume.
        nocopy: bool,
    },
    /// An anonymous volume: new and empty for every instance, like scratch on disk.
    Anonymous,
    Tmpfs {
        size: Option<u64>,
        mode: Option<u32>,
    },
    Image {
        reference: String,
        subpath: Option<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileMount {
    pub kind: FileKind,
    /// The key in [`Spec::configs`] or [`Spec::secrets`].
    pub source: String,
    /// Absolute path in the instance.
    pub target: String,
    pub uid: u32,
    pub gid: u32,
    /// Permission bits; compose's default is 0o444.
    pub mode: u32,
}

impl FileMount {
    /// Names its content in a release: a config and a secret may have the same name.
    pub fn key(&self) -> String {
        match self.kind {
            FileKind::Config => self.source.clone(),
            // No name in a compose file holds a colon.
            FileKind::Secret => format!("secret:{}", self.source),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    Config,
    Secret,
}

/// Where the content of a config or secret is read from when a release is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileSource {
    File(PathBuf),
    Content(String),
    /// The name of a variable in the caller's environment.
    Environment(String),
    /// Kept by kiln under this name.
    External(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    Tcp,
    Udp,
}

/// One published port (ranges are already spread out).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Port {
    /// Port in the instance.
    pub target: u16,
    /// `None`: any free port of the host.
    pub published: Option<u16>,
    /// A range to take the free host port from, both ends included.
    pub range: Option<(u16, u16)>,
    /// `None`: all of the host's addresses.
    pub host_ip: Option<IpAddr>,
    pub protocol: Protocol,
    /// `http`, `http2`, `tcp`…; `None`: recognised from the first bytes.
    pub app_protocol: Option<String>,
    pub name: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExposedPort {
    pub port: u16,
    pub protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    None,
    Host,
    /// The network namespace of another service's instance.
    Service(ServiceName),
    Networks(BTreeMap<NetworkName, Attachment>),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attachment {
    pub aliases: Vec<String>,
    /// The service's stable address on this network (its instances have their own).
    pub ipv4_address: Option<Ipv4Addr>,
    pub mac_address: Option<String>,
    pub interface_name: Option<String>,
    pub priority: i32,
    pub gw_priority: i32,
}

/// A top-level network.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Full name: `name`, or `<project>_<key>`.
    pub name: String,
    /// Made by someone else; kiln joins it and never removes it.
    pub external: bool,
    /// No way out of it.
    pub internal: bool,
    /// `a.b.c.d/n`; `None`: kiln takes a free one.
    pub subnet: Option<String>,
    pub gateway: Option<Ipv4Addr>,
    pub mtu: Option<u32>,
    pub labels: BTreeMap<String, String>,
}

/// A top-level volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    pub name: VolumeName,
    pub external: bool,
    /// `driver: local` with `driver_opts` (mount type, device, options).
    pub driver_opts: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dependency {
    pub condition: Condition,
    /// Replace this service too when the dependency is replaced.
    pub restart: bool,
    /// Missing is no error when false.
    pub required: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    Started,
    Healthy,
    CompletedSuccessfully,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthcheckSetting {
    /// What the image says, if anything.
    #[default]
    Inherit,
    Disabled,
    /// Unset keys come from the image.
    Set(Healthcheck),
}

/// compose `healthcheck` / Dockerfile `HEALTHCHECK`; unset keys have Docker's defaults:
/// interval 30 s, timeout 30 s, start period 0, start interval 5 s, retries 3.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Healthcheck {
    pub test: Option<HealthTest>,
    pub interval: Option<Millis>,
    pub timeout: Option<Millis>,
    pub start_period: Option<Millis>,
    pub start_interval: Option<Millis>,
    pub retries: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthTest {
    /// `["CMD", …]`
    Exec(Vec<String>),
    /// `["CMD-SHELL", text]`: through the image's shell.
    Shell(String),
}

/// When an instance that has ended is replaced by a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    #[default]
    No,
    Always,
    UnlessStopped,
    OnFailure {
        /// `None`: without end.
        max_retries: Option<u32>,
    },
}

/// `json-file` and `local` options; kiln's log is one bounded, rotated file set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logging {
    /// Bytes after which the file is rotated.
    pub max_size: u64,
    pub max_files: u32,
    /// `driver: none`.
    pub discard: bool,
}

impl Default for Logging {
    /// 10 MiB × 3 files: a bound, unlike Docker's default, so that logs can't fill a disk.
    fn default() -> Self {
        Self {
            max_size: 10 << 20,
            max_files: 3,
            discard: false,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceMode {
    #[default]
    Replicated,
    Global,
    /// `replicated-job` / `global-job`.
    Job,
}

/// `deploy.update_config`; unset: kiln's own choice (all at once, start first).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UpdateConfig {
    /// Instances at a time; 0: all.
    pub parallelism: Option<u32>,
    pub delay: Option<Millis>,
    pub order: Option<Order>,
    pub monitor: Option<Millis>,
    pub failure_action: Option<FailureAction>,
    /// In thousandths.
    pub max_failure_ratio: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    StartFirst,
    StopFirst,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureAction {
    Continue,
    Rollback,
    Pause,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hook {
    pub command: Vec<String>,
    pub user: Option<String>,
    pub privileged: bool,
    pub working_dir: Option<String>,
    pub environment: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PullPolicy {
    /// Use what the lock and the store have.
    #[default]
    Missing,
    Always,
    Never,
    Build,
    /// `daily`, `weekly`, `every_<duration>`.
    Every(Millis),
}

/// A service's `x-kiln`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct KilnOptions {
    pub root: RootSetting,
    /// Directories that are scratch beside the learned ones.
    pub scratch: Vec<ScratchDir>,
    pub ready: Option<Ready>,
    pub test: Vec<Check>,
    /// How long open connections keep an old instance. Default 60 s.
    pub drain: Option<Millis>,
    /// `Some(true)`: never two copies at once, although no volume asks for it.
    pub exclusive: Option<bool>,
    /// Left out where nothing is said, so that digests of earlier releases stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutOptions>,
    /// How long an instance serves at most before another takes its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Millis>,
    /// Volumes (the project's names for them) that are copied before a release's first
    /// instance of this service may write to them.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub snapshot: BTreeSet<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RootSetting {
    /// Read-only.
    #[default]
    Sealed,
    /// A throw-away writable layer over the image: unsealed.
    Scratch,
}

/// A bounded, throw-away tmpfs over one directory of the image.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ScratchDir {
    /// Absolute path in the instance.
    pub path: String,
    /// Bytes; `None`: kiln's default of 64 MiB.
    pub size: Option<u64>,
    pub exec: bool,
}

/// `x-kiln.ready`: when an instance may take traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ready {
    Http {
        port: u16,
        path: String,
        status: Option<u16>,
    },
    Tcp {
        port: u16,
    },
    /// Up for this long without ending.
    Settled(Millis),
}

/// One check of `x-kiln.test`, run against the isolated test instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    Http {
        port: u16,
        path: String,
        /// Default 200.
        status: u16,
        /// The body contains this.
        body: Option<String>,
    },
    Tcp {
        port: u16,
    },
    Exec {
        command: Vec<String>,
        /// Default 0.
        exit: i32,
        /// Standard output contains this.
        output: Option<String>,
    },
    File {
        path: String,
        exists: bool,
        contains: Option<String>,
        mode: Option<u32>,
    },
    /// A file of tests.
    Suite {
        kind: SuiteKind,
        /// As it is shown: from the project's folder, where it is below that.
        path: String,
        /// Of its bytes, and of those that it includes.
        digest: Digest,
    },
}

/// The digest of a config's content, or a secret's version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileVersion {
    /// The content is a blob of the store.
    Config(Digest),
    /// A keyed digest: it tells versions apart without letting anyone guess the content.
    Secret(Digest),
}

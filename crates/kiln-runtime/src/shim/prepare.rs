//! From an [`InstanceSpec`] to what libcontainer and the executor need.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kiln_model::InstanceSpec;
use kiln_model::instance::{InstanceNetwork, InstanceSecurity, SharedNamespace};
use kiln_model::spec::{Device, Seccomp};
use serde_json::{Value, json};

use super::program::{DEFAULT_PATH, Program, ZeroByte};
use crate::capabilities::{self, CapabilityError};
use crate::oci::{self, Namespaces};
use crate::paths::InstancePaths;
use crate::seccomp::{self, SeccompError, Surroundings};
use crate::status::{Phase, Status};
use crate::sys;
use crate::users::{Identity, UserError};

#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    ZeroByte(#[from] ZeroByte),
    #[error("instance {0}, whose namespace is to be shared, is not running")]
    NotRunning(String),
    #[error("the device {path} cannot be given to the instance: {source}")]
    Device { path: String, source: io::Error },
    #[error("`{0}` is no ulimit (see setrlimit(2))")]
    Ulimit(String),
    #[error("the working directory {path} is not usable: {source}")]
    WorkingDirectory { path: String, source: io::Error },
    #[error("apparmor profile `{0}`: AppArmor is not active on this machine")]
    AppArmor(String),
    #[error("the sysctl `{0}` belongs to the whole machine (or to another instance), not to this instance")]
    ForeignSysctl(String),
    #[error("this kernel has no sysctl `{0}`")]
    UnknownSysctl(String),
    #[error("`{0}` is no device cgroup rule (like `c 1:3 rwm`)")]
    DeviceRule(String),
    #[error("cannot read this process's capabilities: {0}")]
    Capabilities(io::Error),
}

/// The program with its rights. `warnings` gets what this machine can't give.
pub fn program(
    spec: &InstanceSpec,
    identity: &Identity,
    report: RawFd,
    warnings: &mut Vec<String>,
) -> Result<Program, PrepareError> {
    let mut env = spec.env.clone();
    env.entry("PATH".into())
        .or_insert_with(|| DEFAULT_PATH.into());
    env.entry("HOME".into())
        .or_insert_with(|| identity.home.clone());
    env.entry("HOSTNAME".into())
        .or_insert_with(|| spec.hostname.clone());
    if spec.tty {
        env.entry("TERM".into()).or_insert_with(|| "xterm".into());
    }
    let mut program = Program::new(&spec.argv, &env, report)?;
    (program.capabilities, program.filters) = rights(&spec.security, warnings)?;
    program.no_new_privileges = oci::no_new_privileges(spec);
    Ok(program)
}

/// Capabilities and seccomp filters.
pub fn rights(
    security: &InstanceSecurity,
    warnings: &mut Vec<String>,
) -> Result<(u64, Vec<seccompiler::BpfProgram>), PrepareError> {
    let wanted =
        capabilities::effective(&security.cap_add, &security.cap_drop, security.privileged)?;
    let held = sys::permitted_capabilities().map_err(PrepareError::Capabilities)?;
    for name in &security.cap_add {
        let bits = capabilities::parse(name)?;
        if bits != capabilities::ALL && bits & held == 0 {
            warnings.push(format!(
                "the capability {name} cannot be given: kiln itself does not have it here"
            ));
        }
    }
    let around = Surroundings::here(wanted & held);
    let filters = match &security.seccomp {
        _ if security.privileged => Vec::new(),
        Seccomp::Unconfined => Vec::new(),
        Seccomp::Default => seccomp::default_filters(&around)?,
        Seccomp::Profile(text) => seccomp::filters(text, &around)?,
    };
    Ok((wanted & held, filters))
}

/// Refuses what libcontainer would refuse with less to say.
pub fn check(spec: &InstanceSpec, root: &Path) -> Result<(), PrepareError> {
    if let Some(profile) = &spec.security.apparmor {
        let active = fs::read_to_string("/sys/module/apparmor/parameters/enabled")
            .is_ok_and(|text| text.trim() == "Y");
        if !active && profile != "unconfined" {
            return Err(PrepareError::AppArmor(profile.clone()));
        }
    }
    for name in spec.security.sysctls.keys() {
        check_sysctl(name, spec)?;
    }
    let fail = |source| PrepareError::WorkingDirectory {
        path: spec.cwd.clone(),
        source,
    };
    // The kernel's own folders are not mounted yet.
    if ["/proc", "/sys", "/dev"]
        .iter()
        .any(|p| spec.cwd.starts_with(p))
    {
        return Ok(());
    }
    let resolved = crate::root::inside::resolve(root, &spec.cwd).map_err(fail)?;
    if !resolved.exists() {
        return Err(fail(io::ErrorKind::NotFound.into()));
    }
    let meta = fs::metadata(root.join(resolved.existing)).map_err(fail)?;
    if !meta.is_dir() {
        return Err(fail(io::ErrorKind::NotADirectory.into()));
    }
    Ok(())
}

/// Only settings of the instance's own namespaces may be changed, as with Docker.
fn check_sysctl(name: &str, spec: &InstanceSpec) -> Result<(), PrepareError> {
    let own_network = !matches!(spec.network, InstanceNetwork::Host | InstanceNetwork::Join(_));
    let own_ipc = spec.namespaces.ipc == SharedNamespace::Private;
    let ipc = ["kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue."]
        .iter()
        .any(|p| name.starts_with(p));
    let plain = !name.contains('/') && !name.contains("..");
    let ours = (name.starts_with("net.") && own_network) || (ipc && own_ipc);
    if !plain || !(ours || spec.security.privileged) {
        return Err(PrepareError::ForeignSysctl(name.to_owned()));
    }
    if !Path::new("/proc/sys").join(name.replace('.', "/")).exists() {
        return Err(PrepareError::UnknownSysctl(name.to_owned()));
    }
    Ok(())
}

/// Namespaces that are not the instance's own.
pub fn namespaces(spec: &InstanceSpec, paths: &InstancePaths) -> Result<Namespaces, PrepareError> {
    let other = |id: &kiln_model::InstanceId, kind: &str| -> Result<PathBuf, PrepareError> {
        let not_running = || PrepareError::NotRunning(id.to_string());
        let dir = paths
            .dir()
            .parent()
            .ok_or_else(not_running)?
            .join(id.as_str());
        match Status::read(&InstancePaths::from_dir(dir).status()).map(|s| s.phase) {
            Some(Phase::Running { pid, .. }) => Ok(format!("/proc/{pid}/ns/{kind}").into()),
            _ => Err(not_running()),
        }
    };
    let shared = |namespace: &SharedNamespace, kind: &str| match namespace {
        SharedNamespace::Private => Ok(None),
        SharedNamespace::Host => Ok(Some(PathBuf::new())),
        SharedNamespace::Of(id) => other(id, kind).map(Some),
    };
    Ok(Namespaces {
        pid: shared(&spec.namespaces.pid, "pid")?,
        ipc: shared(&spec.namespaces.ipc, "ipc")?,
        uts: shared(&spec.namespaces.uts, "uts")?,
        cgroup: shared(&spec.namespaces.cgroup, "cgroup")?,
        network: match &spec.network {
            InstanceNetwork::Isolated | InstanceNetwork::Bridged(_) => Some(paths.netns()),
            InstanceNetwork::Host => Some(PathBuf::new()),
            InstanceNetwork::Join(id) => Some(other(id, "net")?),
        },
    })
}

/// Limits of setrlimit(2), clamped to what this process may set.
pub fn rlimits(
    spec: &InstanceSpec,
    warnings: &mut Vec<String>,
) -> Result<Vec<Value>, PrepareError> {
    let may_raise = sys::permitted_capabilities().map_err(PrepareError::Capabilities)?
        & capabilities::parse("SYS_RESOURCE")?
        != 0;
    let mut list = Vec::new();
    for (name, (soft, hard)) in &spec.limits.ulimits {
        let (resource, kind) = resource(name).ok_or_else(|| PrepareError::Ulimit(name.clone()))?;
        let number = |n: i64| u64::try_from(n).unwrap_or(u64::MAX);
        let (mut soft, mut hard) = (number(*soft), number(*hard));
        let now = rustix::process::getrlimit(resource)
            .maximum
            .unwrap_or(u64::MAX);
        if hard > now && !may_raise {
            warnings.push(format!(
                "the ulimit {name} is held at {now}: kiln may not raise it here (CAP_SYS_RESOURCE is missing)"
            ));
            hard = now;
        }
        soft = soft.min(hard);
        list.push(json!({ "type": kind, "soft": soft, "hard": hard }));
    }
    Ok(list)
}

fn resource(name: &str) -> Option<(rustix::process::Resource, &'static str)> {
    use rustix::process::Resource as R;
    Some(match name {
        "as" => (R::As, "RLIMIT_AS"),
        "core" => (R::Core, "RLIMIT_CORE"),
        "cpu" => (R::Cpu, "RLIMIT_CPU"),
        "data" => (R::Data, "RLIMIT_DATA"),
        "fsize" => (R::Fsize, "RLIMIT_FSIZE"),
        "locks" => (R::Locks, "RLIMIT_LOCKS"),
        "memlock" => (R::Memlock, "RLIMIT_MEMLOCK"),
        "msgqueue" => (R::Msgqueue, "RLIMIT_MSGQUEUE"),
        "nice" => (R::Nice, "RLIMIT_NICE"),
        "nofile" => (R::Nofile, "RLIMIT_NOFILE"),
        "nproc" => (R::Nproc, "RLIMIT_NPROC"),
        "rss" => (R::Rss, "RLIMIT_RSS"),
        "rtprio" => (R::Rtprio, "RLIMIT_RTPRIO"),
        "rttime" => (R::Rttime, "RLIMIT_RTTIME"),
        "sigpending" => (R::Sigpending, "RLIMIT_SIGPENDING"),
        "stack" => (R::Stack, "RLIMIT_STACK"),
        _ => return None,
    })
}

/// A device node and the rule that lets the instance use it.
pub struct Devices {
    pub nodes: Vec<Value>,
    pub rules: Vec<Value>,
}

/// What every instance may use: making any node, and null, zero, full, random,
/// urandom, tty, console, ptmx and the pseudo terminals.
const STANDARD: [(&str, i64, i64, &str); 9] = [
    ("c", 1, 3, "rwm"),
    ("c", 1, 5, "rwm"),
    ("c", 1, 7, "rwm"),
    ("c", 1, 8, "rwm"),
    ("c", 1, 9, "rwm"),
    ("c", 5, 0, "rwm"),
    ("c", 5, 1, "rwm"),
    ("c", 5, 2, "rwm"),
    ("c", 136, -1, "rwm"),
];

pub fn devices(security: &InstanceSecurity) -> Result<Devices, PrepareError> {
    let allow = |kind: &str, major: i64, minor: i64, access: &str| {
        let mut rule = json!({ "allow": true, "type": kind, "access": access });
        for (key, number) in [("major", major), ("minor", minor)] {
            if number >= 0 {
                rule[key] = json!(number);
            }
        }
        rule
    };
    let mut devices = Devices {
        nodes: Vec::new(),
        rules: Vec::new(),
    };
    if security.privileged {
        devices
            .rules
            .push(json!({ "allow": true, "access": "rwm" }));
        return Ok(devices);
    }
    devices
        .rules
        .push(json!({ "allow": false, "access": "rwm" }));
    devices.rules.push(allow("c", -1, -1, "m"));
    devices.rules.push(allow("b", -1, -1, "m"));
    devices
        .rules
        .extend(STANDARD.map(|(kind, major, minor, access)| allow(kind, major, minor, access)));
    for device in &security.devices {
        for (kind, meta, target) in nodes(device)? {
            let (major, minor) = (
                rustix::fs::major(meta.rdev()),
                rustix::fs::minor(meta.rdev()),
            );
            let access = if device.permissions.is_empty() {
                "rwm"
            } else {
                &device.permissions
            };
            devices
                .rules
                .push(allow(kind, i64::from(major), i64::from(minor), access));
            devices.nodes.push(json!({
                "path": target, "type": kind, "major": major, "minor": minor,
                "fileMode": meta.mode() & 0o7777, "uid": meta.uid(), "gid": meta.gid(),
            }));
        }
    }
    for rule in &security.device_cgroup_rules {
        devices
            .rules
            .push(parse_rule(rule).ok_or_else(|| PrepareError::DeviceRule(rule.clone()))?);
    }
    Ok(devices)
}

/// `c 1:3 rwm`, `a *:* rwm`.
fn parse_rule(text: &str) -> Option<Value> {
    let mut words = text.split_whitespace();
    let (kind, numbers, access) = (words.next()?, words.next()?, words.next()?);
    let (major, minor) = numbers.split_once(':')?;
    let known = matches!(kind, "a" | "b" | "c")
        && !access.is_empty()
        && access.chars().all(|c| "rwm".contains(c))
        && words.next().is_none();
    let mut rule = json!({ "allow": true, "type": kind, "access": access });
    for (key, number) in [("major", major), ("minor", minor)] {
        if number != "*" {
            rule[key] = json!(number.parse::<u32>().ok()?);
        }
    }
    known.then_some(rule)
}

/// A device, or all devices of a folder.
fn nodes(device: &Device) -> Result<Vec<(&'static str, fs::Metadata, String)>, PrepareError> {
    const MAX_NODES: usize = 1024;
    let fail = |source| PrepareError::Device {
        path: device.source.clone(),
        source,
    };
    let kind = |meta: &fs::Metadata| {
        let kind = meta.file_type();
        match (kind.is_char_device(), kind.is_block_device()) {
            (true, _) => Some("c"),
            (_, true) => Some("b"),
            _ => None,
        }
    };
    let meta = fs::metadata(&device.source).map_err(fail)?;
    if let Some(kind) = kind(&meta) {
        return Ok(vec![(kind, meta, device.target.clone())]);
    }
    if !meta.is_dir() {
        return Err(fail(io::Error::other("it is not a device")));
    }
    let mut list = Vec::new();
    for entry in fs::read_dir(&device.source).map_err(fail)?.take(MAX_NODES) {
        let entry = entry.map_err(fail)?;
        let meta = fs::metadata(entry.path()).map_err(fail)?;
        if let (Some(kind), Ok(name)) = (kind(&meta), entry.file_name().into_string()) {
            list.push((
                kind,
                meta,
                format!("{}/{name}", device.target.trim_end_matches('/')),
            ));
        }
    }
    Ok(list)
}

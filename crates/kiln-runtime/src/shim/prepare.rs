//! From an [`InstanceSpec`] to what libcontainer and the executor need.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use kiln_model::instance::{InstanceNetwork, InstanceSecurity, Purpose, SharedNamespace};
use kiln_model::spec::Seccomp;
use kiln_model::{InstanceId, InstanceSpec};
use serde_json::{Value, json};

use super::program::{DEFAULT_PATH, Program, ZeroByte};
use crate::capabilities::{self, CapabilityError};
use crate::oci::{self, Namespaces};
use crate::paths::InstancePaths;
use crate::root::{self, Late, RootError};
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
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("`{0}` is no ulimit (see setrlimit(2))")]
    Ulimit(String),
    #[error(
        "the ulimit {name} can't be {wanted} here: this machine gives at most {most}, and kiln may \
         not raise it (CAP_SYS_RESOURCE is missing); ask for no more than that, or start kiln \
         with a higher hard limit"
    )]
    Unraisable {
        name: String,
        wanted: Limit,
        most: Limit,
    },
    #[error("the working directory {path} is not usable: {source}")]
    WorkingDirectory { path: String, source: io::Error },
    #[error("apparmor profile `{0}`: AppArmor is not active on this machine")]
    AppArmor(String),
    #[error(
        "the sysctl `{0}` belongs to the whole machine (or to another instance), not to this instance"
    )]
    ForeignSysctl(String),
    #[error("this kernel has no sysctl `{0}`")]
    UnknownSysctl(String),
    #[error("cannot read this process's capabilities: {0}")]
    Capabilities(io::Error),
}

/// A limit of setrlimit(2), for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(u64);

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            u64::MAX => f.write_str("unlimited"),
            number => write!(f, "{number}"),
        }
    }
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
    let own_network = !matches!(
        spec.network,
        InstanceNetwork::Host | InstanceNetwork::Join(_)
    );
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

/// The first process of another instance.
fn first_process(id: &InstanceId, paths: &InstancePaths) -> Result<u32, PrepareError> {
    let not_running = || PrepareError::NotRunning(id.to_string());
    let instances = paths.dir().parent().ok_or_else(not_running)?;
    let other = InstancePaths::from_dir(instances.join(id.as_str()));
    match Status::read(&other.status()).map(|s| s.phase) {
        Some(Phase::Running { pid, .. }) => Ok(pid),
        _ => Err(not_running()),
    }
}

/// Shared memory goes with the IPC namespace, unless the instance has its own mount there.
pub fn shared_memory(
    spec: &InstanceSpec,
    paths: &InstancePaths,
    late: &mut Vec<Late>,
) -> Result<(), PrepareError> {
    if let SharedNamespace::Of(id) = &spec.namespaces.ipc
        && !late.iter().any(|l| l.target == "/dev/shm")
    {
        late.push(root::share::shm_of(
            first_process(id, paths)?,
            &paths.stage(),
        )?);
    }
    Ok(())
}

/// Namespaces that are not the instance's own.
pub fn namespaces(spec: &InstanceSpec, paths: &InstancePaths) -> Result<Namespaces, PrepareError> {
    let other = |id: &InstanceId, kind: &str| -> Result<PathBuf, PrepareError> {
        let pid = first_process(id, paths)?;
        Ok(format!("/proc/{pid}/ns/{kind}").into())
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

/// Limits of setrlimit(2). What this process may not set is clamped and warned of, for an
/// instance that would serve otherwise; a build is refused, as what it makes is kept.
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
            if spec.purpose == Purpose::Build {
                return Err(PrepareError::Unraisable {
                    name: name.clone(),
                    wanted: Limit(hard),
                    most: Limit(now),
                });
            }
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

//! What libcontainer is told: an [OCI runtime configuration][1] as JSON. Pure.
//!
//! The program's environment, capabilities, seccomp and limits are not in it: kiln
//! applies them itself (see [`crate::shim`]), because libcontainer would fail the
//! whole start where kiln warns.
//!
//! [1]: https://github.com/opencontainers/runtime-spec/blob/v1.2.0/config.md

use std::path::{Path, PathBuf};

use kiln_model::InstanceSpec;
use kiln_model::instance::{InstanceNetwork, SharedNamespace};
use serde_json::{Value, json};

use crate::root::Late;
use crate::users::Identity;

/// `/dev/shm` when nothing else is said (Docker's default).
const DEFAULT_SHM: u64 = 64 << 20;

/// As Docker masks them.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// As Docker write-protects them.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// What has been found out before the configuration is written.
pub struct Facts<'a> {
    pub rootfs: &'a Path,
    pub identity: &'a Identity,
    pub late: &'a [Late],
    /// `/kiln-<tag>/<id>`.
    pub cgroup: &'a str,
    /// Paths of the namespaces that are not new ones of the instance's own.
    pub namespaces: &'a Namespaces,
    pub rlimits: &'a [Value],
    /// Device nodes beside the standard ones.
    pub devices: &'a [Value],
    /// Rules for the devices cgroup; `None`: it is not used.
    pub device_rules: Option<&'a [Value]>,
    /// v1 hierarchies inside: libcontainer mounts them writable.
    pub cgroup_mounts: &'a [String],
}

/// `None`: new; `Some("")`: the host's; else the path to join.
#[derive(Default)]
pub struct Namespaces {
    pub pid: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
    pub cgroup: Option<PathBuf>,
    pub network: Option<PathBuf>,
}

/// The whole `config.json`.
pub fn config(spec: &InstanceSpec, facts: &Facts<'_>) -> Value {
    let privileged = spec.security.privileged;
    let masked: &[&str] = if privileged { &[] } else { &MASKED };
    let read_only: Vec<&str> = if privileged {
        Vec::new()
    } else {
        let cgroups = facts.cgroup_mounts.iter().map(String::as_str);
        READ_ONLY.into_iter().chain(cgroups).collect()
    };
    let mut linux = json!({
        "cgroupsPath": facts.cgroup,
        "namespaces": namespaces(facts.namespaces),
        "maskedPaths": masked,
        "readonlyPaths": read_only,
        "sysctl": sysctls(spec),
        "devices": facts.devices,
    });
    if let Some(rules) = facts.device_rules {
        linux["resources"] = json!({ "devices": rules });
    }
    let mut config = json!({
        "ociVersion": "1.0.2",
        "root": { "path": facts.rootfs, "readonly": false },
        "mounts": mounts(spec, facts.late),
        "process": process(spec, facts),
        "linux": linux,
    });
    if facts.namespaces.uts.is_none() {
        config["hostname"] = json!(spec.hostname);
        if let Some(domain) = &spec.domainname {
            config["domainname"] = json!(domain);
        }
    }
    config
}

fn process(spec: &InstanceSpec, facts: &Facts<'_>) -> Value {
    let mut process = json!({
        "terminal": spec.tty,
        "user": {
            "uid": facts.identity.uid,
            "gid": facts.identity.gid,
            "additionalGids": facts.identity.groups,
        },
        "args": spec.argv,
        "env": [],
        "cwd": spec.cwd,
        "noNewPrivileges": no_new_privileges(spec),
        "rlimits": facts.rlimits,
    });
    if let Some(profile) = spec
        .security
        .apparmor
        .as_ref()
        .filter(|p| *p != "unconfined")
    {
        process["apparmorProfile"] = json!(profile);
    }
    process
}

/// Privileged instances may gain privileges, as with Docker.
pub fn no_new_privileges(spec: &InstanceSpec) -> bool {
    spec.security.no_new_privileges && !spec.security.privileged
}

fn namespaces(shared: &Namespaces) -> Vec<Value> {
    let mut list = vec![json!({ "type": "mount" })];
    for (kind, path) in [
        ("pid", &shared.pid),
        ("ipc", &shared.ipc),
        ("uts", &shared.uts),
        ("cgroup", &shared.cgroup),
        ("network", &shared.network),
    ] {
        match path {
            None => list.push(json!({ "type": kind })),
            Some(path) if path.as_os_str().is_empty() => {}
            Some(path) => list.push(json!({ "type": kind, "path": path })),
        }
    }
    list
}

fn sysctls(spec: &InstanceSpec) -> Value {
    let mut map = serde_json::Map::new();
    if matches!(
        spec.network,
        InstanceNetwork::Isolated | InstanceNetwork::Bridged(_)
    ) {
        // As with Docker: an instance's network is its own, so any user may take low ports and ping.
        map.insert("net.ipv4.ip_unprivileged_port_start".into(), json!("0"));
        map.insert("net.ipv4.ping_group_range".into(), json!("0 2147483647"));
    }
    for (name, value) in &spec.security.sysctls {
        map.insert(name.clone(), json!(value));
    }
    Value::Object(map)
}

fn mounts(spec: &InstanceSpec, late: &[Late]) -> Vec<Value> {
    let privileged = spec.security.privileged;
    let system = if privileged { "rw" } else { "ro" };
    let mount = |target: &str, kind: &str, options: &[&str]| json!({ "destination": target, "type": kind, "source": kind, "options": options });
    let mut list = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            &["nosuid", "noexec", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", system]),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", system],
        ),
    ];
    let own = |target: &str| late.iter().any(|l| l.target == target);
    // It shows the queues of the IPC namespace, whosever that is.
    if !own("/dev/mqueue") {
        list.push(mount(
            "/dev/mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ));
    }
    if !own("/dev/shm") && spec.namespaces.ipc == SharedNamespace::Host {
        list.push(
            json!({ "destination": "/dev/shm", "type": "bind", "source": "/dev/shm",
                    "options": ["rbind", "nosuid", "nodev", "noexec"] }),
        );
    } else if !own("/dev/shm") {
        let size = format!("size={}", spec.limits.shm_size.unwrap_or(DEFAULT_SHM));
        list.push(mount(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777", &size],
        ));
    }
    list.extend(late.iter().map(|late| {
        let kind = if late.source.is_some() { "bind" } else { "tmpfs" };
        let source = late.source.clone().unwrap_or_else(|| "tmpfs".into());
        json!({ "destination": late.target, "type": kind, "source": source, "options": late.options })
    }));
    list
}

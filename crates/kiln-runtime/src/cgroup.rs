//! The control groups of one instance, under v1, v1 with a unified hierarchy
//! beside it, and v2. libcontainer makes and joins them; kiln writes the limits
//! (what can't be enforced becomes a warning), kills by them, and removes them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kiln_model::instance::InstanceLimits;
use serde_json::Value;

use crate::devices;

/// How long a killed group may take to be empty.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// `cgroup.procs` is read this often while groups are being emptied.
const KILL_STEP: Duration = Duration::from_millis(2);

/// A process that has ended leaves its group within moments.
const PARENT_ATTEMPTS: u32 = 100;

/// How this machine lays out its control groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The unified hierarchy's mount point.
    V2(PathBuf),
    /// Controller and mount point, sorted by mount point.
    V1(Vec<(String, PathBuf)>),
    None,
}

impl Layout {
    /// Read once a process: a machine's hierarchies are mounted at boot, while the list of
    /// mounts grows with every instance.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Layout> = OnceLock::new();
        let read = || fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        DETECTED.get_or_init(|| Self::parse(&read())).clone()
    }

    fn parse(mounts: &str) -> Self {
        let mut v1 = Vec::new();
        let mut v2 = None;
        for line in mounts.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let [_, at, kind, options, ..] = fields[..] else {
                continue;
            };
            match kind {
                "cgroup" => v1.extend(
                    options
                        .split(',')
                        .filter(|o| CONTROLLERS.contains(o))
                        .map(|o| (o.to_owned(), PathBuf::from(at))),
                ),
                "cgroup2" if v2.is_none() => v2 = Some(PathBuf::from(at)),
                _ => {}
            }
        }
        if !v1.is_empty() {
            v1.sort_by(|a, b| a.1.cmp(&b.1));
            return Self::V1(v1);
        }
        v2.map_or(Self::None, Self::V2)
    }

    pub fn has(&self, controller: &str) -> bool {
        match self {
            Self::V1(list) => list.iter().any(|(name, _)| name == controller),
            Self::V2(at) => fs::read_to_string(at.join("cgroup.controllers"))
                .is_ok_and(|text| text.split_whitespace().any(|name| name == controller)),
            Self::None => false,
        }
    }
}

const CONTROLLERS: [&str; 12] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "hugetlb",
    "memory",
    "pids",
    "perf_event",
    "blkio",
    "net_prio",
    "net_cls",
    "freezer",
];

/// Where v1 hierarchies appear inside an instance, the common folder first.
pub fn v1_mounts() -> Vec<String> {
    const ROOT: &str = "/sys/fs/cgroup";
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut list: Vec<String> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (at, kind) = (fields.nth(1)?, fields.next()?);
            (kind == "cgroup" && at.starts_with(ROOT)).then(|| at.to_owned())
        })
        .collect();
    if !list.is_empty() {
        list.insert(0, ROOT.to_owned());
    }
    list
}

/// Moves this process out of its caller's group, so that a service manager that
/// ends the daemon's group leaves the shims alone. Best effort: in containers the
/// hierarchy may be read-only, and then no service manager is there either.
pub fn leave_callers_group(tag: &str) {
    let dir = match Layout::detect() {
        Layout::V2(at) => Some(at),
        // systemd's own hierarchy is the one it ends services by.
        _ => systemd_hierarchy(),
    };
    if let Some(dir) = dir.map(|dir| dir.join(tag).join(".shims")) {
        let _ = fs::create_dir_all(&dir);
        let _ = fs::write(dir.join("cgroup.procs"), std::process::id().to_string());
    }
}

fn systemd_hierarchy() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, at, "cgroup", options, ..] = fields[..] else {
            return None;
        };
        options
            .split(',')
            .any(|o| o == "name=systemd")
            .then(|| PathBuf::from(at))
    })
}

/// One instance's groups.
pub struct Cgroup {
    layout: Layout,
    /// Relative to each mount point: `kiln-<tag>/<id>`.
    path: PathBuf,
}

impl Cgroup {
    /// `path`: `/kiln-<tag>/<id>`.
    pub fn new(layout: Layout, path: &str) -> Self {
        Self {
            layout,
            path: PathBuf::from(path.trim_start_matches('/')),
        }
    }

    /// Sees to it that the instance can only use what is allowed. For v1, the rules
    /// that libcontainer is to write are given back; for v2 the group is made and
    /// confined here, before anything is in it.
    pub fn confine_devices(&self, allowed: &[devices::Rule]) -> io::Result<Option<Vec<Value>>> {
        match &self.layout {
            Layout::V1(_) if self.layout.has("devices") => Ok(Some(devices::v1_rules(allowed))),
            Layout::V2(at) => {
                let dir = at.join(&self.path);
                fs::create_dir_all(&dir)?;
                devices::confine_v2(&dir, allowed)?;
                Ok(None)
            }
            _ => Err(io::Error::other("there is no devices control group")),
        }
    }

    /// The group's folders, one for every hierarchy.
    fn dirs(&self) -> Vec<PathBuf> {
        let mut dirs: Vec<PathBuf> = match &self.layout {
            Layout::V2(at) => vec![at.join(&self.path)],
            Layout::V1(list) => list.iter().map(|(_, at)| at.join(&self.path)).collect(),
            Layout::None => Vec::new(),
        };
        dirs.dedup();
        dirs
    }

    fn dir(&self, controller: &str) -> Option<PathBuf> {
        match &self.layout {
            Layout::V2(at) => Some(at.join(&self.path)),
            Layout::V1(list) => list
                .iter()
                .find(|(name, _)| name == controller)
                .map(|(_, at)| at.join(&self.path)),
            Layout::None => None,
        }
    }

    /// Every process in the groups, also in groups the instance made below its own.
    pub fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for dir in self.dirs() {
            collect(&dir, 0, &mut |dir| {
                let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()));
            });
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Kills every process, and waits until they are gone; `false`: some are left.
    pub fn kill(&self) -> bool {
        let end = Instant::now() + KILL_WAIT;
        loop {
            if let Layout::V2(at) = &self.layout {
                let _ = fs::write(at.join(&self.path).join("cgroup.kill"), "1");
            }
            let pids = self.processes();
            if pids.is_empty() {
                return true;
            }
            for pid in pids {
                kill_one(pid);
            }
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(KILL_STEP);
        }
    }

    /// Removes the groups, which must be empty.
    pub fn remove(&self) -> io::Result<()> {
        let end = Instant::now() + KILL_WAIT;
        for dir in self.dirs() {
            let mut dirs = Vec::new();
            collect(&dir, 0, &mut |dir| dirs.push(dir.to_owned()));
            for dir in dirs.into_iter().rev() {
                // A group stays busy for a moment after its last process ended.
                loop {
                    match fs::remove_dir(&dir) {
                        Ok(()) => break,
                        Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                        Err(e) if Instant::now() >= end => return Err(e),
                        Err(_) => std::thread::sleep(KILL_STEP),
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes the groups that were above the last instance of a kiln root. Others
    /// that are still in use keep theirs: the kernel refuses.
    pub fn remove_parent(&self) {
        let Some(parent) = self.path.parent().filter(|p| p.file_name().is_some()) else {
            return;
        };
        let mut mounts: Vec<PathBuf> = match &self.layout {
            Layout::V2(at) => vec![at.clone()],
            Layout::V1(list) => list.iter().map(|(_, at)| at.clone()).collect(),
            Layout::None => Vec::new(),
        };
        mounts.extend(systemd_hierarchy());
        for at in mounts {
            let shims = at.join(parent).join(".shims");
            // The last shim may still be on its way out.
            for _ in 0..PARENT_ATTEMPTS {
                match fs::remove_dir(&shims) {
                    Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                        std::thread::sleep(KILL_STEP);
                    }
                    _ => break,
                }
            }
            let _ = fs::remove_dir(at.join(parent));
        }
    }

    /// Whether the kernel's memory bound has ended a process of it.
    pub fn out_of_memory(&self) -> bool {
        let file = match self.layout {
            Layout::V2(_) => "memory.events",
            _ => "memory.oom_control",
        };
        self.dir("memory")
            .and_then(|dir| fs::read_to_string(dir.join(file)).ok())
            .is_some_and(|text| {
                text.lines().any(|line| {
                    line.strip_prefix("oom_kill ")
                        .is_some_and(|n| n.trim() != "0")
                })
            })
    }

    /// How often it was refused a process, as it had as many as it may have.
    pub fn processes_refused(&self) -> u64 {
        let events = self
            .dir("pids")
            .and_then(|dir| fs::read_to_string(dir.join("pids.events")).ok());
        let count = events.as_deref().unwrap_or_default().lines();
        let mut count = count.filter_map(|line| line.strip_prefix("max ")?.trim().parse().ok());
        count.next().unwrap_or(0)
    }

    /// Writes the limits; gives a warning for each that can't be enforced here.
    pub fn limit(&self, limits: &InstanceLimits) -> Vec<String> {
        let v2 = matches!(self.layout, Layout::V2(_));
        let mut warnings = Vec::new();
        let settings = if v2 {
            settings_v2(limits)
        } else {
            settings_v1(limits)
        };
        for setting in settings {
            let Some(dir) = self.dir(setting.controller) else {
                warnings.push(format!(
                    "{} is not enforced: this machine has no `{}` control group",
                    setting.what, setting.controller
                ));
                continue;
            };
            if let Err(e) = fs::write(dir.join(setting.file), &setting.value) {
                // The kernel knows no such file: the controller or option is off.
                let why = match e.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => {
                        "this machine's control groups lack it".to_owned()
                    }
                    _ => e.to_string(),
                };
                warnings.push(format!(
                    "{} is not enforced: {why} ({})",
                    setting.what, setting.file
                ));
            }
        }
        warnings
    }
}

/// Calls `with` for a group and those below it, parents first.
fn collect(dir: &Path, depth: u32, with: &mut dyn FnMut(&Path)) {
    const MAX_DEPTH: u32 = 32;
    if depth > MAX_DEPTH || !dir.is_dir() {
        return;
    }
    with(dir);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth + 1, with);
        }
    }
}

fn kill_one(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// One file to write.
struct Setting {
    what: &'static str,
    controller: &'static str,
    file: &'static str,
    value: String,
}

fn setting(
    what: &'static str,
    controller: &'static str,
    file: &'static str,
    value: impl ToString,
) -> Setting {
    Setting {
        what,
        controller,
        file,
        value: value.to_string(),
    }
}

/// `(quota, period)` in microseconds.
fn cpu_bandwidth(limits: &InstanceLimits) -> Option<(i64, u64)> {
    const PERIOD: u64 = 100_000;
    if let Some(nano) = limits.nano_cpus.filter(|n| *n > 0) {
        let quota = i64::try_from(u128::from(nano) * u128::from(PERIOD) / 1_000_000_000);
        // The kernel takes no quota below a millisecond.
        return Some((quota.unwrap_or(i64::MAX).max(1000), PERIOD));
    }
    limits
        .cpu_quota
        .filter(|q| *q > 0)
        .map(|quota| (quota, limits.cpu_period.unwrap_or(PERIOD)))
}

fn settings_v1(limits: &InstanceLimits) -> Vec<Setting> {
    let mut list = Vec::new();
    let memory = |what, file, value: String| setting(what, "memory", file, value);
    if let Some(bytes) = limits.memory {
        list.push(memory(
            "the memory limit",
            "memory.limit_in_bytes",
            bytes.to_string(),
        ));
    }
    if let Some(bytes) = memory_and_swap(limits) {
        list.push(memory(
            "the swap limit",
            "memory.memsw.limit_in_bytes",
            bytes,
        ));
    }
    if let Some(bytes) = limits.memory_reservation {
        list.push(memory(
            "the memory reservation",
            "memory.soft_limit_in_bytes",
            bytes.to_string(),
        ));
    }
    if let Some(n) = limits.memory_swappiness {
        list.push(memory("the swappiness", "memory.swappiness", n.to_string()));
    }
    if limits.oom_kill_disable {
        list.push(memory("oom_kill_disable", "memory.oom_control", "1".into()));
    }
    if let Some(shares) = limits.cpu_shares {
        list.push(setting("the CPU weight", "cpu", "cpu.shares", shares));
    }
    if let Some((quota, period)) = cpu_bandwidth(limits) {
        list.push(setting("the CPU limit", "cpu", "cpu.cfs_period_us", period));
        list.push(setting("the CPU limit", "cpu", "cpu.cfs_quota_us", quota));
    }
    if let Some(cpus) = &limits.cpuset {
        list.push(setting("the CPU set", "cpuset", "cpuset.cpus", cpus));
    }
    if let Some(n) = limits.pids {
        list.push(setting(
            "the process limit",
            "pids",
            "pids.max",
            count_or_max(n),
        ));
    }
    list.extend(blkio(limits, true));
    list
}

fn settings_v2(limits: &InstanceLimits) -> Vec<Setting> {
    let mut list = Vec::new();
    let memory = |what, file, value: String| setting(what, "memory", file, value);
    if let Some(bytes) = limits.memory {
        list.push(memory("the memory limit", "memory.max", bytes.to_string()));
    }
    match (limits.memory_swap, limits.memory) {
        (Some(-1), _) => list.push(memory("the swap limit", "memory.swap.max", "max".into())),
        (Some(total), Some(bytes)) => {
            let swap = u64::try_from(total).unwrap_or(0).saturating_sub(bytes);
            list.push(memory(
                "the swap limit",
                "memory.swap.max",
                swap.to_string(),
            ));
        }
        _ => {}
    }
    if let Some(bytes) = limits.memory_reservation {
        list.push(memory(
            "the memory reservation",
            "memory.low",
            bytes.to_string(),
        ));
    }
    if limits.memory_swappiness.is_some() {
        list.push(memory("the swappiness", "memory.swappiness", String::new()));
    }
    if limits.oom_kill_disable {
        list.push(memory(
            "oom_kill_disable",
            "memory.oom_control",
            String::new(),
        ));
    }
    if let Some(shares) = limits.cpu_shares {
        // The weight runs from 1 to 10000 where shares run from 2 to 262144.
        let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
        list.push(setting("the CPU weight", "cpu", "cpu.weight", weight));
    }
    if let Some((quota, period)) = cpu_bandwidth(limits) {
        list.push(setting(
            "the CPU limit",
            "cpu",
            "cpu.max",
            format!("{quota} {period}"),
        ));
    }
    if let Some(cpus) = &limits.cpuset {
        list.push(setting("the CPU set", "cpuset", "cpuset.cpus", cpus));
    }
    if let Some(n) = limits.pids {
        list.push(setting(
            "the process limit",
            "pids",
            "pids.max",
            count_or_max(n),
        ));
    }
    list.extend(blkio(limits, false));
    list
}

/// v1 counts both together, and so does Docker.
fn memory_and_swap(limits: &InstanceLimits) -> Option<String> {
    limits.memory_swap.map(|n| n.to_string())
}

fn count_or_max(n: i64) -> String {
    if n > 0 { n.to_string() } else { "max".into() }
}

fn blkio(limits: &InstanceLimits, v1: bool) -> Vec<Setting> {
    let Some(blkio) = &limits.blkio else {
        return Vec::new();
    };
    let controller = if v1 { "blkio" } else { "io" };
    let mut list = Vec::new();
    if let Some(weight) = blkio.weight {
        let file = if v1 { "blkio.weight" } else { "io.weight" };
        list.push(setting("the I/O weight", controller, file, weight));
    }
    for (device, weight) in &blkio.weight_device {
        let file = if v1 {
            "blkio.weight_device"
        } else {
            "io.weight"
        };
        list.push(setting(
            "the I/O weight",
            controller,
            file,
            format!("{} {weight}", device_number(device)),
        ));
    }
    for (rates, v1_file, v2_key) in [
        (&blkio.read_bps, "blkio.throttle.read_bps_device", "rbps"),
        (&blkio.write_bps, "blkio.throttle.write_bps_device", "wbps"),
        (&blkio.read_iops, "blkio.throttle.read_iops_device", "riops"),
        (
            &blkio.write_iops,
            "blkio.throttle.write_iops_device",
            "wiops",
        ),
    ] {
        for (device, rate) in rates {
            let number = device_number(device);
            list.push(if v1 {
                setting(
                    "the I/O limit",
                    controller,
                    v1_file,
                    format!("{number} {rate}"),
                )
            } else {
                setting(
                    "the I/O limit",
                    controller,
                    "io.max",
                    format!("{number} {v2_key}={rate}"),
                )
            });
        }
    }
    list
}

/// `major:minor` of a device's path; the path itself if there is no such device
/// (the kernel then refuses it, which becomes a warning).
fn device_number(path: &str) -> String {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).map_or_else(
        |_| path.to_owned(),
        |m| {
            let device = m.rdev();
            format!(
                "{}:{}",
                rustix::fs::major(device),
                rustix::fs::minor(device)
            )
        },
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_layout_is_read_from_the_mounts() {
        let v2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        assert_eq!(Layout::parse(v2), Layout::V2("/sys/fs/cgroup".into()));
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /c/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
                      cgroup /c/systemd cgroup rw,name=systemd 0 0\ncgroup2 /c/unified cgroup2 rw 0 0\n";
        let Layout::V1(list) = Layout::parse(hybrid) else {
            unreachable!("hybrid is v1")
        };
        assert_eq!(list.len(), 2);
        assert_eq!(Layout::parse(""), Layout::None);
    }

    #[test]
    fn limits_become_the_kernels_numbers() {
        let limits = InstanceLimits {
            memory: Some(64 << 20),
            memory_swap: Some(128 << 20),
            nano_cpus: Some(1_500_000_000),
            cpu_shares: Some(1024),
            pids: Some(0),
            ..InstanceLimits::default()
        };
        let v2: Vec<_> = settings_v2(&limits)
            .into_iter()
            .map(|s| (s.file, s.value))
            .collect();
        assert!(v2.contains(&("memory.swap.max", (64u64 << 20).to_string())));
        assert!(v2.contains(&("cpu.max", "150000 100000".into())));
        assert!(v2.contains(&("cpu.weight", "39".into())));
        assert!(v2.contains(&("pids.max", "max".into())));
        let v1: Vec<_> = settings_v1(&limits)
            .into_iter()
            .map(|s| (s.file, s.value))
            .collect();
        assert!(v1.contains(&("memory.memsw.limit_in_bytes", (128u64 << 20).to_string())));
        assert!(v1.contains(&("cpu.cfs_quota_us", "150000".into())));
    }
}

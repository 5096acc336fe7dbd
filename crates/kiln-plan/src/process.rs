//! What an instance's process is: the compose file's statements over the image's.

use std::collections::BTreeMap;

use kiln_model::ImageConfig;
use kiln_model::instance::{InstanceLimits, InstanceSecurity};
use kiln_model::spec::{Limits, Service};

/// What Docker gives programs whose image names no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A stated entrypoint takes the image's command with it, as in Docker.
pub fn command(service: &Service, image: &ImageConfig) -> Vec<String> {
    let process = &service.process;
    let (entrypoint, default) = match &process.entrypoint {
        Some(stated) => (stated.clone(), Vec::new()),
        None => (image.entrypoint.clone(), image.cmd.clone()),
    };
    let arguments = process.command.clone().unwrap_or(default);
    entrypoint.into_iter().chain(arguments).collect()
}

/// The image's variables under the compose file's.
pub fn environment(
    service: &Service,
    image: &ImageConfig,
    hostname: &str,
) -> BTreeMap<String, String> {
    let mut env = BTreeMap::from([("PATH".to_owned(), DEFAULT_PATH.to_owned())]);
    env.extend(image.env.iter().cloned());
    env.insert("HOSTNAME".into(), hostname.to_owned());
    env.extend(service.process.environment.clone());
    env
}

/// How an instance of the service is confined.
pub fn security(service: &Service) -> InstanceSecurity {
    let s = &service.security;
    InstanceSecurity {
        cap_add: s.cap_add.clone(),
        cap_drop: s.cap_drop.clone(),
        no_new_privileges: s.no_new_privileges.unwrap_or(!s.privileged),
        seccomp: s.seccomp.clone(),
        apparmor: s.apparmor.clone(),
        privileged: s.privileged,
        devices: s.devices.clone(),
        device_cgroup_rules: s.device_cgroup_rules.clone(),
        sysctls: s.sysctls.clone(),
    }
}

/// What an instance of the service may use.
pub fn limits(l: &Limits) -> InstanceLimits {
    InstanceLimits {
        memory: l.memory,
        memory_reservation: l.memory_reservation,
        memory_swap: l.memory_swap,
        memory_swappiness: l.memory_swappiness,
        nano_cpus: l.nano_cpus,
        cpu_shares: l.cpu_shares,
        cpu_period: l.cpu_period,
        cpu_quota: l.cpu_quota,
        cpuset: l.cpuset.clone(),
        pids: l.pids,
        shm_size: l.shm_size,
        ulimits: l.ulimits.clone(),
        oom_score_adj: l.oom_score_adj,
        oom_kill_disable: l.oom_kill_disable,
        blkio: l.blkio.clone(),
    }
}

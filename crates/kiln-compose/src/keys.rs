//! What kiln does with each key of the compose schema: the one table, from which the docs'
//! support table is made and by which a project is refused or noted. Values that matter on
//! their own (a driver's name) are judged where they are lowered.

use std::collections::HashMap;
use std::sync::OnceLock;

/// What becomes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    Honoured,
    /// An error, with what to do instead. Stands for the keys below it, too.
    Refused(&'static str),
    /// No effect, and nothing is lost: told once, with the reason.
    Note(&'static str),
}

use Support::{Honoured, Note, Refused};

const WINDOWS: &str = "it is for Windows containers; take it out";
const MODELS: &str = "kiln runs no language models; run one as a service with an image";
const GPUS: &str = "kiln cannot give GPUs to services; pass single device files with `devices`";
const PLACEMENT: &str = "there is one host only; take it out";
const REAL_TIME: &str = "control groups of today have no real-time CPU time; use `cpus`, or \
     `ulimits` with rtprio and `cap_add: [SYS_NICE]`";
const NO_LABELS: &str = "labels of configs and secrets have no effect";
const NO_DRIVER: &str =
    "kiln reads configs and secrets from files, the environment or its own store";

/// Keys that are not honoured; every other key of the schema is.
pub const EXCEPTIONS: &[(&str, Support)] = &[
    ("version", Note("it is obsolete and has no effect")),
    ("models", Refused(MODELS)),
    ("services.*.models", Refused(MODELS)),
    (
        "services.*.provider",
        Refused("kiln starts no provider programs; take the service out, or give it an image"),
    ),
    (
        "services.*.attach",
        Note("it only says whose output a terminal shows"),
    ),
    ("services.*.deploy.placement", Refused(PLACEMENT)),
    (
        "services.*.deploy.resources.reservations.cpus",
        Note("on one host a reservation of CPUs has no effect; docker compose ignores it, too"),
    ),
    (
        "services.*.deploy.resources.reservations.generic_resources",
        Refused(PLACEMENT),
    ),
    (
        "services.*.deploy.resources.reservations.devices",
        Refused(GPUS),
    ),
    (
        "services.*.deploy.restart_policy.delay",
        Note("kiln chooses the pause between restarts itself; docker compose ignores it, too"),
    ),
    (
        "services.*.deploy.restart_policy.window",
        Note("kiln judges restarts itself; docker compose ignores it, too"),
    ),
    ("services.*.gpus", Refused(GPUS)),
    ("services.*.build.isolation", Refused(WINDOWS)),
    (
        "services.*.build.privileged",
        Refused("builds are always confined; take it out"),
    ),
    (
        "services.*.build.entitlements",
        Refused("builds are always confined; take it out"),
    ),
    (
        "services.*.build.provenance",
        Note("kiln records every build's provenance anyway"),
    ),
    (
        "services.*.build.sbom",
        Note("kiln records every build's packages anyway"),
    ),
    (
        "services.*.build.secrets.[].uid",
        Refused("say uid at `RUN --mount=type=secret`"),
    ),
    (
        "services.*.build.secrets.[].gid",
        Refused("say gid at `RUN --mount=type=secret`"),
    ),
    (
        "services.*.build.secrets.[].mode",
        Refused("say mode at `RUN --mount=type=secret`"),
    ),
    (
        "services.*.cgroup_parent",
        Refused("kiln gives every instance its own cgroup; take it out"),
    ),
    (
        "services.*.cpu_count",
        Refused("it is for Windows containers; use `cpus`"),
    ),
    (
        "services.*.cpu_percent",
        Refused("it is for Windows containers; use `cpus`"),
    ),
    ("services.*.cpu_rt_period", Refused(REAL_TIME)),
    ("services.*.cpu_rt_runtime", Refused(REAL_TIME)),
    ("services.*.credential_spec", Refused(WINDOWS)),
    (
        "services.*.external_links",
        Refused("kiln knows no containers of other programs; use a shared external network"),
    ),
    ("services.*.isolation", Refused(WINDOWS)),
    (
        "services.*.networks.*.gw_priority",
        Refused("the first network that is not internal, by name, is the way out"),
    ),
    (
        "services.*.networks.*.ipv6_address",
        Refused("kiln's networks are IPv4 only"),
    ),
    (
        "services.*.networks.*.link_local_ips",
        Refused("kiln gives each instance one address on a network"),
    ),
    (
        "services.*.networks.*.driver_opts",
        Refused("kiln's bridge has no options for an endpoint; use `sysctls`"),
    ),
    (
        "services.*.pull_refresh_after",
        Refused("use `pull_policy: every_<time>`"),
    ),
    (
        "services.*.runtime",
        Refused("kiln has one runtime; take it out"),
    ),
    (
        "services.*.storage_opt",
        Refused("an image's tree takes no writes; bound scratch with `x-kiln.scratch`"),
    ),
    (
        "services.*.use_api_socket",
        Refused("kiln has no Docker API to give"),
    ),
    (
        "services.*.volumes.[].consistency",
        Note("it only matters on Docker Desktop for Mac"),
    ),
    (
        "services.*.volumes.[].bind.selinux",
        Note("it only matters where SELinux is enforced"),
    ),
    (
        "services.*.volumes.[].volume.labels",
        Refused("put the labels at the volume itself, under `volumes:`"),
    ),
    (
        "networks.*.ipam.config.[].ip_range",
        Refused("kiln gives out addresses of the whole subnet; make it smaller"),
    ),
    (
        "networks.*.ipam.config.[].aux_addresses",
        Refused("kiln reserves no addresses; give services an `ipv4_address`"),
    ),
    (
        "networks.*.ipam.options",
        Refused("kiln has one way to give out addresses; take it out"),
    ),
    ("networks.*.attachable", Note("it only matters in a swarm")),
    ("secrets.*.labels", Note(NO_LABELS)),
    ("secrets.*.driver", Refused(NO_DRIVER)),
    ("secrets.*.driver_opts", Refused(NO_DRIVER)),
    ("secrets.*.template_driver", Refused(NO_DRIVER)),
    ("configs.*.labels", Note(NO_LABELS)),
    ("configs.*.template_driver", Refused(NO_DRIVER)),
];

/// Keys that are honoured but for some values, which are refused where they stand.
pub const LIMITS: &[(&str, &str)] = &[
    ("networks.*.driver", "bridge only"),
    (
        "networks.*.driver_opts",
        "com.docker.network.driver.mtu only",
    ),
    ("networks.*.enable_ipv4", "true only"),
    ("networks.*.enable_ipv6", "false only"),
    (
        "networks.*.ipam.config.[].gateway",
        "the first address of the subnet",
    ),
    ("networks.*.ipam.config.[].subnet", "one, of IPv4"),
    ("networks.*.ipam.driver", "default only"),
    ("services.*.build.context", "folders only"),
    ("services.*.build.network", "host, none or the default"),
    ("services.*.deploy.endpoint_mode", "vip only"),
    (
        "services.*.deploy.rollback_config.failure_action",
        AFTER_THE_SWITCH,
    ),
    (
        "services.*.deploy.update_config.failure_action",
        AFTER_THE_SWITCH,
    ),
    ("services.*.develop.watch.[].action", WATCHED),
    ("services.*.expose", "tcp and udp"),
    ("services.*.ipc", SHARED),
    ("services.*.logging.driver", "json-file, local or none"),
    ("services.*.logging.options", "max-size and max-file"),
    ("services.*.network_mode", "none, host or service:NAME"),
    ("services.*.pid", SHARED),
    ("services.*.ports.[].mode", "ingress or host"),
    ("services.*.ports.[].protocol", "tcp or udp"),
    (
        "services.*.pull_policy",
        "no others than the specification's",
    ),
    (
        "services.*.security_opt",
        "no-new-privileges, seccomp and apparmor",
    ),
    ("services.*.tmpfs", "size, mode, ro, rw, exec, noexec"),
    ("services.*.userns_mode", "host only"),
    ("services.*.uts", "host or private"),
    ("services.*.volumes.[].bind.recursive", "enabled only"),
    ("services.*.volumes.[].source", "Linux paths"),
    (
        "services.*.volumes.[].type",
        "bind, volume, tmpfs and image",
    ),
    ("services.*.volumes_from", "services only"),
    ("volumes.*.driver", "local only"),
    (
        "volumes.*.driver_opts",
        "bind mounts (`o: bind`) and memory (`type: tmpfs`)",
    ),
];

const WATCHED: &str = "by `kiln watch`; each is a new release, so sync is sync+restart";
const AFTER_THE_SWITCH: &str = "of what happens after the switch, `rollback` unless stated; \
     before it a release that does not prove itself never takes over";
const SHARED: &str = "host, private or service:NAME";

/// Refusals that cannot be ignored: nothing could be put in the place of what is said.
pub const NEEDED: &[&str] = &[
    "services.*.build.context",
    "services.*.provider",
    "services.*.volumes.[].source",
    "services.*.volumes.[].type",
];

/// The keys that kiln honours: sorted, one a line. A test holds that this list, with the
/// exceptions and the keys below them, is exactly the schema.
pub const HONOURED: &str = include_str!("../schema/honoured.txt");

/// What becomes of the key with this pattern (`services.*.ports.[].mode`); `None`: it is
/// not a key of the schema.
pub fn support(pattern: &str) -> Option<Support> {
    static TABLE: OnceLock<HashMap<&str, Support>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        HONOURED
            .lines()
            .map(|line| (line, Honoured))
            .chain(EXCEPTIONS.iter().copied())
            .collect()
    });
    if let Some(found) = table.get(pattern) {
        return Some(*found);
    }
    // Below an exception, the exception says it.
    let mut at = pattern;
    while let Some((parent, _)) = at.rsplit_once('.') {
        if let Some(found) = table.get(parent) {
            return (*found != Honoured).then_some(*found);
        }
        at = parent;
    }
    None
}

/// The support table in Markdown, for the docs.
pub fn support_table() -> String {
    let mut out = String::from("| key | kiln | why |\n|---|---|---|\n");
    for key in crate::schema::all_keys() {
        let (word, why) = match support(&key) {
            Some(Honoured) | None => {
                let limit = LIMITS.iter().find(|(pattern, _)| *pattern == key);
                ("honoured", limit.map_or("", |(_, values)| *values))
            }
            Some(Refused(why)) => ("refused", why),
            Some(Note(why)) => ("no effect", why),
        };
        out.push_str(&format!("| `{key}` | {word} | {why} |\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn every_key_of_the_schema_is_in_exactly_one_list() {
        let honoured: Vec<&str> = HONOURED.lines().collect();
        let mut sorted = honoured.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(honoured, sorted, "schema/honoured.txt is not sorted");
        let keys = crate::schema::all_keys();
        for key in &keys {
            let below = |parent: &str| key == parent || key.starts_with(&format!("{parent}."));
            let exceptions = EXCEPTIONS
                .iter()
                .filter(|(parent, _)| below(parent))
                .count();
            let lists = usize::from(honoured.contains(&key.as_str())) + exceptions;
            assert_eq!(lists, 1, "{key} is in {lists} lists");
        }
        for key in honoured.iter().chain(EXCEPTIONS.iter().map(|(key, _)| key)) {
            assert!(keys.iter().any(|k| k == key), "{key} is not in the schema");
        }
        for (key, _) in LIMITS {
            assert!(
                honoured.contains(key),
                "{key} has limits but is not honoured"
            );
        }
        for key in NEEDED {
            let refused = matches!(support(key), Some(Refused(_)));
            let limited = LIMITS.iter().any(|(limited, _)| limited == key);
            assert!(refused || limited, "{key} is never refused");
        }
        let table = support_table();
        assert!(table.contains("| `services.*.image` | honoured |"));
        assert!(table.contains("| `services.*.provider` | refused |"));
        assert!(table.contains("| `services.*.pid` | honoured | host, private or service"));
    }
}

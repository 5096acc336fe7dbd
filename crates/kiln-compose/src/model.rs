//! The specification's model as tables: which keys each mapping has, and of which type. A
//! canonical tree is read through them into JSON as `docker compose config` prints it, and
//! what is not of its type is reported.

use serde_json::{Map as JsonMap, Value as Json};

use crate::diag::{Code, Diagnostics};
use crate::node::{Map, Node};
use crate::units;
use crate::values::{
    Bound, boolean, bytes, command, device_count, duration, float, health_test, hosts, integer,
    key_values, mode, multi_options, object, ssh, texts, ulimits,
};

/// One key of a mapping.
pub struct Field {
    pub key: &'static str,
    kind: Kind,
}

/// How a value is read and printed. Empty values are left out, as Go's `omitempty` does,
/// unless said otherwise.
#[derive(Clone, Copy)]
enum Kind {
    Str,
    /// False is left out.
    Bool,
    /// Printed whenever it is said.
    BoolPtr,
    Int,
    IntPtr,
    Float32,
    Bytes,
    Duration,
    DurationPtr,
    List,
    /// A text is split like a shell does; printed also when missing.
    Shell,
    HealthTest,
    /// Names to texts; nothing becomes "".
    Mapping,
    /// Names to texts or null.
    Environment,
    Options,
    MultiOptions,
    Hosts,
    FileMode,
    /// Permission bits that must be a number, as for compose.
    NumberMode,
    Ssh,
    DeviceCount,
    Ulimits,
    Struct(&'static [Field]),
    /// Printed also when it is empty or missing.
    Always(&'static [Field]),
    ListOf(&'static [Field]),
    MapOf(&'static [Field]),
}

use Kind::{
    Always, Bool, BoolPtr, Bytes, DeviceCount, Duration, DurationPtr, Environment, FileMode,
    Float32, HealthTest, Hosts, Int, IntPtr, List, ListOf, MapOf, Mapping, MultiOptions,
    NumberMode, Options, Shell, Ssh, Str, Struct, Ulimits,
};

const fn f(key: &'static str, kind: Kind) -> Field {
    Field { key, kind }
}

static HOOK: &[Field] = &[
    f("command", Shell),
    f("user", Str),
    f("privileged", Bool),
    f("working_dir", Str),
    f("environment", Environment),
];

static FILE_MOUNT: &[Field] = &[
    f("source", Str),
    f("target", Str),
    f("uid", Str),
    f("gid", Str),
    f("mode", FileMode),
];

static DEVICE_REQUEST: &[Field] = &[
    f("capabilities", List),
    f("driver", Str),
    f("count", DeviceCount),
    f("device_ids", List),
    f("options", Mapping),
];

static BUILD: &[Field] = &[
    f("context", Str),
    f("dockerfile", Str),
    f("dockerfile_inline", Str),
    f("entitlements", List),
    f("args", Environment),
    f("provenance", Str),
    f("sbom", Str),
    f("ssh", Ssh),
    f("labels", Mapping),
    f("cache_from", List),
    f("cache_to", List),
    f("no_cache", Bool),
    f("additional_contexts", Mapping),
    f("pull", Bool),
    f("extra_hosts", Hosts),
    f("isolation", Str),
    f("network", Str),
    f("target", Str),
    f("secrets", ListOf(FILE_MOUNT)),
    f("shm_size", Bytes),
    f("tags", List),
    f("ulimits", Ulimits),
    f("platforms", List),
    f("privileged", Bool),
];

static WATCH: &[Field] = &[
    f("path", Str),
    f("action", Str),
    f("target", Str),
    f("exec", Always(HOOK)),
    f("include", List),
    f("ignore", List),
    f("initial_sync", Bool),
];

static DEVELOP: &[Field] = &[f("watch", ListOf(WATCH))];

static THROTTLE: &[Field] = &[f("path", Str), f("rate", Bytes)];
static WEIGHT: &[Field] = &[f("path", Str), f("weight", Int)];
static BLKIO: &[Field] = &[
    f("weight", Int),
    f("weight_device", ListOf(WEIGHT)),
    f("device_read_bps", ListOf(THROTTLE)),
    f("device_read_iops", ListOf(THROTTLE)),
    f("device_write_bps", ListOf(THROTTLE)),
    f("device_write_iops", ListOf(THROTTLE)),
];

static UPDATE: &[Field] = &[
    f("parallelism", IntPtr),
    f("delay", Duration),
    f("failure_action", Str),
    f("monitor", Duration),
    f("max_failure_ratio", Float32),
    f("order", Str),
];

static DISCRETE: &[Field] = &[f("kind", Str), f("value", IntPtr)];
static GENERIC: &[Field] = &[f("discrete_resource_spec", Struct(DISCRETE))];
static RESOURCE: &[Field] = &[
    f("cpus", Float32),
    f("memory", Bytes),
    f("pids", Int),
    f("devices", ListOf(DEVICE_REQUEST)),
    f("generic_resources", ListOf(GENERIC)),
];
static RESOURCES: &[Field] = &[
    f("limits", Struct(RESOURCE)),
    f("reservations", Struct(RESOURCE)),
];
static RESTART: &[Field] = &[
    f("condition", Str),
    f("delay", DurationPtr),
    f("max_attempts", IntPtr),
    f("window", DurationPtr),
];
static PREFERENCE: &[Field] = &[f("spread", Str)];
static PLACEMENT: &[Field] = &[
    f("constraints", List),
    f("preferences", ListOf(PREFERENCE)),
    f("max_replicas_per_node", Int),
];
static DEPLOY: &[Field] = &[
    f("mode", Str),
    f("replicas", IntPtr),
    f("labels", Mapping),
    f("update_config", Struct(UPDATE)),
    f("rollback_config", Struct(UPDATE)),
    f("resources", Always(RESOURCES)),
    f("restart_policy", Struct(RESTART)),
    f("placement", Always(PLACEMENT)),
    f("endpoint_mode", Str),
];

static DEPENDENCY: &[Field] = &[
    f("condition", Str),
    f("restart", Bool),
    f("required", BoolPtr),
];
static DEVICE: &[Field] = &[f("source", Str), f("target", Str), f("permissions", Str)];
static CREDENTIAL: &[Field] = &[f("config", Str), f("file", Str), f("registry", Str)];
static PROVIDER: &[Field] = &[f("type", Str), f("options", MultiOptions)];
static ENV_FILE: &[Field] = &[f("path", Str), f("required", Bool), f("format", Str)];
static EXTENDS: &[Field] = &[f("file", Str), f("service", Str)];
static HEALTH: &[Field] = &[
    f("test", HealthTest),
    f("timeout", DurationPtr),
    f("interval", DurationPtr),
    f("retries", IntPtr),
    f("start_period", DurationPtr),
    f("start_interval", DurationPtr),
    f("disable", Bool),
];
static LOGGING: &[Field] = &[f("driver", Str), f("options", Options)];
static SERVICE_MODEL: &[Field] = &[f("endpoint_var", Str), f("model_var", Str)];
static ATTACHMENT: &[Field] = &[
    f("aliases", List),
    f("driver_opts", Options),
    f("gw_priority", Int),
    f("interface_name", Str),
    f("ipv4_address", Str),
    f("ipv6_address", Str),
    f("link_local_ips", List),
    f("mac_address", Str),
    f("priority", Int),
];
static PORT: &[Field] = &[
    f("name", Str),
    f("mode", Str),
    f("host_ip", Str),
    f("target", Int),
    f("published", Str),
    f("protocol", Str),
    f("app_protocol", Str),
];
static BIND: &[Field] = &[
    f("selinux", Str),
    f("propagation", Str),
    f("create_host_path", Bool),
    f("recursive", Str),
];
static NAMED: &[Field] = &[f("labels", Mapping), f("nocopy", Bool), f("subpath", Str)];
static TMPFS: &[Field] = &[f("size", Bytes), f("mode", NumberMode)];
static IMAGE_MOUNT: &[Field] = &[f("subpath", Str)];
static VOLUME_MOUNT: &[Field] = &[
    f("type", Str),
    f("source", Str),
    f("target", Str),
    f("read_only", Bool),
    f("consistency", Str),
    f("bind", Struct(BIND)),
    f("volume", Struct(NAMED)),
    f("tmpfs", Struct(TMPFS)),
    f("image", Struct(IMAGE_MOUNT)),
];

/// The keys of a service.
pub static SERVICE: &[Field] = &[
    f("profiles", List),
    f("annotations", Mapping),
    f("attach", BoolPtr),
    f("build", Struct(BUILD)),
    f("develop", Struct(DEVELOP)),
    f("blkio_config", Struct(BLKIO)),
    f("cap_add", List),
    f("cap_drop", List),
    f("cgroup_parent", Str),
    f("cgroup", Str),
    f("cpu_count", Int),
    f("cpu_percent", Float32),
    f("cpu_period", Int),
    f("cpu_quota", Int),
    f("cpu_rt_period", Int),
    f("cpu_rt_runtime", Int),
    f("cpus", Float32),
    f("cpuset", Str),
    f("cpu_shares", Int),
    f("command", Shell),
    f("configs", ListOf(FILE_MOUNT)),
    f("container_name", Str),
    f("credential_spec", Struct(CREDENTIAL)),
    f("depends_on", MapOf(DEPENDENCY)),
    f("deploy", Struct(DEPLOY)),
    f("device_cgroup_rules", List),
    f("devices", ListOf(DEVICE)),
    f("dns", List),
    f("dns_opt", List),
    f("dns_search", List),
    f("domainname", Str),
    f("entrypoint", Shell),
    f("provider", Struct(PROVIDER)),
    f("environment", Environment),
    f("env_file", ListOf(ENV_FILE)),
    f("expose", List),
    f("extends", Struct(EXTENDS)),
    f("external_links", List),
    f("extra_hosts", Hosts),
    f("group_add", List),
    f("gpus", ListOf(DEVICE_REQUEST)),
    f("hostname", Str),
    f("healthcheck", Struct(HEALTH)),
    f("image", Str),
    f("init", BoolPtr),
    f("ipc", Str),
    f("isolation", Str),
    f("labels", Mapping),
    f("label_file", List),
    f("links", List),
    f("logging", Struct(LOGGING)),
    f("mem_limit", Bytes),
    f("mem_reservation", Bytes),
    f("memswap_limit", Bytes),
    f("mem_swappiness", Bytes),
    f("mac_address", Str),
    f("models", MapOf(SERVICE_MODEL)),
    f("network_mode", Str),
    f("networks", MapOf(ATTACHMENT)),
    f("oom_kill_disable", Bool),
    f("oom_score_adj", Int),
    f("pid", Str),
    f("pids_limit", Int),
    f("platform", Str),
    f("ports", ListOf(PORT)),
    f("privileged", Bool),
    f("pull_policy", Str),
    f("read_only", Bool),
    f("restart", Str),
    f("runtime", Str),
    f("scale", IntPtr),
    f("secrets", ListOf(FILE_MOUNT)),
    f("security_opt", List),
    f("shm_size", Bytes),
    f("stdin_open", Bool),
    f("stop_grace_period", DurationPtr),
    f("stop_signal", Str),
    f("storage_opt", Options),
    f("sysctls", Mapping),
    f("tmpfs", List),
    f("tty", Bool),
    f("ulimits", Ulimits),
    f("use_api_socket", Bool),
    f("user", Str),
    f("userns_mode", Str),
    f("uts", Str),
    f("volumes", ListOf(VOLUME_MOUNT)),
    f("volumes_from", List),
    f("working_dir", Str),
    f("post_start", ListOf(HOOK)),
    f("pre_stop", ListOf(HOOK)),
];

static IPAM_POOL: &[Field] = &[
    f("subnet", Str),
    f("gateway", Str),
    f("ip_range", Str),
    f("aux_addresses", Mapping),
];
static IPAM: &[Field] = &[
    f("driver", Str),
    f("config", ListOf(IPAM_POOL)),
    f("options", Options),
];
/// The keys of a top-level network.
pub static NETWORK: &[Field] = &[
    f("name", Str),
    f("driver", Str),
    f("driver_opts", Options),
    f("ipam", Always(IPAM)),
    f("external", Bool),
    f("internal", Bool),
    f("attachable", Bool),
    f("labels", Mapping),
    f("enable_ipv4", BoolPtr),
    f("enable_ipv6", BoolPtr),
];
/// The keys of a top-level volume.
pub static VOLUME: &[Field] = &[
    f("name", Str),
    f("driver", Str),
    f("driver_opts", Options),
    f("external", Bool),
    f("labels", Mapping),
];
/// The keys of a top-level config or secret.
pub static FILE_OBJECT: &[Field] = &[
    f("name", Str),
    f("file", Str),
    f("environment", Str),
    f("content", Str),
    f("external", Bool),
    f("labels", Mapping),
    f("driver", Str),
    f("driver_opts", Options),
    f("template_driver", Str),
];
/// The keys of a top-level model.
pub static MODEL: &[Field] = &[
    f("name", Str),
    f("model", Str),
    f("context_size", Int),
    f("runtime_flags", List),
];

/// Reads `node` by a table. `extensions`: keep keys that begin with `x-`.
pub struct Binder<'a> {
    pub diagnostics: &'a mut Diagnostics,
    pub extensions: bool,
}

/// Where in the model a value is: only written out where something is wrong.
#[derive(Clone, Copy)]
pub struct At<'a> {
    above: Option<&'a At<'a>>,
    key: &'a str,
}

impl<'a> At<'a> {
    pub fn top(key: &'a str) -> Self {
        Self { above: None, key }
    }

    pub fn below(&'a self, key: &'a str) -> Self {
        Self {
            above: Some(self),
            key,
        }
    }

    /// An item of a list of a service's `blkio_config`.
    fn is_block_device(&self) -> bool {
        let depth = std::iter::successors(Some(self), |at| at.above).count();
        // services, its name, blkio_config, the list
        depth == 4 && self.above.is_some_and(|above| above.key == "blkio_config")
    }
}

impl std::fmt::Display for At<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(above) = self.above {
            write!(f, "{above}.")?;
        }
        f.write_str(self.key)
    }
}

impl Binder<'_> {
    pub fn bind(&mut self, fields: &'static [Field], node: &Node, at: &At<'_>) -> Json {
        let empty = Map::default();
        let map = node.as_map().unwrap_or(&empty);
        // A mapping says few of the keys that it may have: each is looked for once.
        let mut said: Vec<Option<&Node>> = vec![None; fields.len()];
        for (key, node) in map {
            if let Some(place) = fields.iter().position(|field| field.key == key) {
                said[place] = Some(node);
            }
        }
        let mut out = JsonMap::new();
        for (field, node) in fields.iter().zip(said) {
            let value = match node {
                Some(node) => self.field(field, node, at),
                None => self.missing(field, at),
            };
            if let Some(value) = value {
                let key = match field.key {
                    // Go prints these without a tag.
                    "path" | "rate" | "weight" if at.is_block_device() => {
                        let mut key = field.key.to_owned();
                        key[..1].make_ascii_uppercase();
                        key
                    }
                    key => key.to_owned(),
                };
                out.insert(key, value);
            }
        }
        if self.extensions {
            for (key, value) in map.iter().filter(|(key, _)| key.starts_with("x-")) {
                out.insert(key.clone(), crate::output::to_json(value));
            }
        }
        Json::Object(out)
    }

    /// What is printed of a key that is not there.
    fn missing(&mut self, field: &Field, at: &At<'_>) -> Option<Json> {
        match field.kind {
            Shell => Some(Json::Null),
            Always(fields) => {
                let nothing = Node::null(crate::span::Span::NONE);
                Some(self.bind(fields, &nothing, &at.below(field.key)))
            }
            _ => None,
        }
    }

    fn field(&mut self, field: &Field, node: &Node, at: &At<'_>) -> Option<Json> {
        let here = at.below(field.key);
        match field.kind {
            Struct(_) if node.is_null() => None,
            Struct(fields) | Always(fields) => Some(self.bind(fields, node, &here)),
            ListOf(fields) => {
                let list: Vec<Json> = node
                    .as_seq()?
                    .iter()
                    .map(|item| self.bind(fields, item, &here))
                    .collect();
                (!list.is_empty()).then_some(Json::Array(list))
            }
            MapOf(fields) => {
                let mut keys: Vec<(&String, &Node)> = node.as_map()?.iter().collect();
                keys.sort_by_key(|(key, _)| *key);
                let mut out = JsonMap::new();
                for (key, item) in keys {
                    let value = if item.is_null() {
                        Json::Null
                    } else {
                        self.bind(fields, item, &here)
                    };
                    out.insert(key.clone(), value);
                }
                (!out.is_empty()).then_some(Json::Object(out))
            }
            kind => match scalar(kind, node) {
                Ok(value) => value,
                Err(what) => {
                    let text = format!("{here}: {what}");
                    self.diagnostics.error(Code::Schema, node.span, text);
                    None
                }
            },
        }
    }
}

fn scalar(kind: Kind, node: &Node) -> Bound {
    if node.is_null() {
        return Ok(match kind {
            Shell => Some(Json::Null),
            _ => None,
        });
    }
    match kind {
        Str => Ok(node.text().filter(|t| !t.is_empty()).map(Json::String)),
        Bool => Ok(boolean(node)?.then_some(Json::Bool(true))),
        BoolPtr => Ok(Some(Json::Bool(boolean(node)?))),
        Int => Ok(Some(integer(node)?).filter(|n| *n != 0).map(Json::from)),
        IntPtr => Ok(Some(Json::from(integer(node)?))),
        Float32 => float(node),
        Bytes => Ok(Some(bytes(node)?)
            .filter(|n| *n != 0)
            .map(|n| Json::String(n.to_string()))),
        Duration => Ok(Some(duration(node)?)
            .filter(|n| *n != 0)
            .map(|n| Json::String(units::go_duration(n)))),
        DurationPtr => Ok(Some(Json::String(units::go_duration(duration(node)?)))),
        List => Ok(texts(node).filter(|l| !l.is_empty()).map(Json::from)),
        Shell => command(node).map(|words| Some(Json::from(words))),
        HealthTest => Ok(health_test(node).filter(|l| !l.is_empty()).map(Json::from)),
        Mapping | Options => Ok(object(key_values(node)?, || Json::String(String::new()))),
        Environment => Ok(object(key_values(node)?, || Json::Null)),
        MultiOptions => Ok(multi_options(node)),
        Hosts => {
            let hosts = hosts(node)?;
            let list: Vec<String> = hosts.iter().map(|(h, ip)| format!("{h}={ip}")).collect();
            Ok((!list.is_empty()).then_some(Json::from(list)))
        }
        FileMode => Ok(Some(Json::String(format!("0{:o}", mode(node)?)))),
        NumberMode => match node.as_int() {
            Some(bits) => Ok((bits != 0).then(|| Json::from(bits))),
            None => Err("must be a number; write for example `0o1777`".into()),
        },
        Ssh => Ok(ssh(node)),
        DeviceCount => Ok(Some(device_count(node)?)
            .filter(|n| *n != 0)
            .map(Json::from)),
        Ulimits => ulimits(node),
        Struct(_) | Always(_) | ListOf(_) | MapOf(_) => Ok(None),
    }
}

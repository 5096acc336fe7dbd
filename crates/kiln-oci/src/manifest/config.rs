//! The image configuration (image-spec v1.1 config.md, with Docker's `Healthcheck`,
//! `Shell` and `OnBuild`) ⇄ [`ImageConfig`].

use std::collections::BTreeMap;

use kiln_model::spec::{ExposedPort, HealthTest, Healthcheck, Protocol};
use kiln_model::{Digest, ImageConfig, Millis};
use serde::{Deserialize, Serialize};

use super::{MAX_CONFIG_BYTES, MAX_LAYERS, null_is_default};
use crate::platform::Platform;

/// All of a configuration that kiln reads or writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigDocument {
    pub config: ImageConfig,
    /// RFC 3339, as written; see [`timestamp`].
    pub created: Option<String>,
    pub author: Option<String>,
    /// Digests of the uncompressed layers, base first.
    pub diff_ids: Vec<Digest>,
    /// One entry per instruction, base first.
    pub history: Vec<History>,
    /// Instructions that an image built on this one begins with.
    pub on_build: Vec<String>,
}

/// How one layer, or one change of the configuration, came to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// It made no layer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

/// Why bytes are not a usable image configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("it is {size} bytes long; configurations may have {MAX_CONFIG_BYTES}")]
    TooLarge { size: u64 },
    #[error("it is not an image configuration: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it lists {found} layers, more than the {MAX_LAYERS} that kiln takes")]
    TooManyLayers { found: usize },
    #[error("its rootfs has type `{found}`, not `layers`")]
    RootFs { found: String },
    #[error("it exposes `{text}`, which is not a TCP or UDP port (like 80/tcp)")]
    Port { text: String },
    #[error("its healthcheck's {field} is {problem}")]
    Healthcheck {
        field: &'static str,
        problem: String,
    },
    #[error("its {field} holds a NUL character")]
    Nul { field: &'static str },
}

/// Seconds since the Unix epoch as configurations write them; before year 1 or after
/// 9999 it saturates.
pub fn timestamp(seconds: i64) -> String {
    let instant = jiff::Timestamp::from_second(seconds).unwrap_or(if seconds < 0 {
        jiff::Timestamp::MIN
    } else {
        jiff::Timestamp::MAX
    });
    instant.to_string()
}

/// Parses an image configuration.
pub fn parse_config(bytes: &[u8]) -> Result<ConfigDocument, ConfigError> {
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(ConfigError::TooLarge {
            size: bytes.len() as u64,
        });
    }
    let raw: RawConfig = serde_json::from_slice(bytes)?;
    if raw.rootfs.kind != "layers" {
        return Err(ConfigError::RootFs {
            found: raw.rootfs.kind,
        });
    }
    if raw.rootfs.diff_ids.len() > MAX_LAYERS {
        return Err(ConfigError::TooManyLayers {
            found: raw.rootfs.diff_ids.len(),
        });
    }
    let platform = Platform {
        architecture: raw.architecture,
        os: raw.os,
        os_version: None,
        variant: raw.variant,
    };
    let process = raw.config;
    check_no_nul(&process)?;
    let config = ImageConfig {
        platform: platform.to_string(),
        user: process.user,
        env: process.env.iter().map(|pair| split_env(pair)).collect(),
        entrypoint: process.entrypoint,
        cmd: process.cmd,
        working_dir: process.working_dir,
        exposed: parse_ports(&process.exposed_ports)?,
        volumes: process.volumes.into_keys().collect(),
        labels: process.labels,
        stop_signal: process.stop_signal.filter(|s| !s.is_empty()),
        healthcheck: process.healthcheck.map(parse_health).transpose()?.flatten(),
        shell: process.shell,
    };
    Ok(ConfigDocument {
        config,
        created: raw.created,
        author: raw.author,
        diff_ids: raw.rootfs.diff_ids,
        history: raw.history,
        on_build: process.on_build,
    })
}

/// Writes a configuration: compact JSON in the specification's field order. Equal
/// values give equal bytes.
pub fn write_config(document: &ConfigDocument) -> Vec<u8> {
    let config = &document.config;
    let mut platform = config.platform.splitn(3, '/').map(str::to_owned);
    let mut part = || platform.next().filter(|part| !part.is_empty());
    let os = part().unwrap_or_default();
    let architecture = part().unwrap_or_default();
    let variant = part();
    let process = RawProcess {
        user: config.user.clone(),
        exposed_ports: config
            .exposed
            .iter()
            .map(|p| (port_text(*p), Empty {}))
            .collect(),
        env: config.env.iter().map(|(k, v)| format!("{k}={v}")).collect(),
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        healthcheck: config.healthcheck.as_ref().map(raw_health),
        volumes: config
            .volumes
            .iter()
            .map(|v| (v.clone(), Empty {}))
            .collect(),
        working_dir: config.working_dir.clone(),
        labels: config.labels.clone(),
        stop_signal: config.stop_signal.clone(),
        shell: config.shell.clone(),
        on_build: document.on_build.clone(),
    };
    super::to_json(&RawConfig {
        created: document.created.clone(),
        author: document.author.clone(),
        architecture,
        os,
        variant,
        config: process,
        rootfs: RawRootFs {
            kind: "layers".into(),
            diff_ids: document.diff_ids.clone(),
        },
        history: document.history.clone(),
    })
}

fn split_env(pair: &str) -> (String, String) {
    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
    (name.into(), value.into())
}

/// The kernel ends every argument and variable at a NUL.
fn check_no_nul(process: &RawProcess) -> Result<(), ConfigError> {
    let lists = [
        ("Env", &process.env),
        ("Entrypoint", &process.entrypoint),
        ("Cmd", &process.cmd),
        ("Shell", &process.shell),
    ];
    let in_list = lists
        .into_iter()
        .find(|(_, list)| list.iter().any(|text| text.contains('\0')))
        .map(|(field, _)| field);
    let in_text = [
        ("User", &process.user),
        ("WorkingDir", &process.working_dir),
    ]
    .into_iter()
    .find(|(_, text)| text.contains('\0'))
    .map(|(field, _)| field);
    match in_list.or(in_text) {
        Some(field) => Err(ConfigError::Nul { field }),
        None => Ok(()),
    }
}

/// `80`, `80/tcp`, `53/udp`, sorted by number.
fn parse_ports(ports: &BTreeMap<String, Empty>) -> Result<Vec<ExposedPort>, ConfigError> {
    let mut exposed = Vec::with_capacity(ports.len());
    for text in ports.keys() {
        let fail = || ConfigError::Port { text: text.clone() };
        let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        exposed.push(ExposedPort {
            port: number
                .parse()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(fail)?,
            protocol: match protocol {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                _ => return Err(fail()),
            },
        });
    }
    exposed.sort_by_key(|p| (p.port, p.protocol));
    exposed.dedup_by_key(|p| (p.port, p.protocol));
    Ok(exposed)
}

fn port_text(port: ExposedPort) -> String {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!("{}/{protocol}", port.port)
}

/// `None`: the image says that there is none.
fn parse_health(raw: RawHealth) -> Result<Option<Healthcheck>, ConfigError> {
    let test = match raw.test.split_first() {
        None => None,
        Some((kind, [])) if kind == "NONE" => return Ok(None),
        Some((kind, arguments)) if kind == "CMD" && !arguments.is_empty() => {
            Some(HealthTest::Exec(arguments.to_vec()))
        }
        Some((kind, [text])) if kind == "CMD-SHELL" => Some(HealthTest::Shell(text.clone())),
        Some(_) => {
            return Err(ConfigError::Healthcheck {
                field: "Test",
                problem: format!("`{}`, which is no known form", raw.test.join(" ")),
            });
        }
    };
    let retries = raw.retries.unwrap_or(0);
    Ok(Some(Healthcheck {
        test,
        interval: span("Interval", raw.interval)?,
        timeout: span("Timeout", raw.timeout)?,
        start_period: span("StartPeriod", raw.start_period)?,
        start_interval: span("StartInterval", raw.start_interval)?,
        retries: match u32::try_from(retries) {
            Ok(0) => None,
            Ok(retries) => Some(retries),
            Err(_) => {
                return Err(ConfigError::Healthcheck {
                    field: "Retries",
                    problem: format!("{retries}, which is out of range"),
                });
            }
        },
    }))
}

/// Docker's spans are nanoseconds and 0 means unset. Parts of a millisecond round up.
fn span(field: &'static str, nanoseconds: Option<i64>) -> Result<Option<Millis>, ConfigError> {
    match nanoseconds.unwrap_or(0) {
        0 => Ok(None),
        n => match u64::try_from(n) {
            Ok(n) => Ok(Some(Millis(n.div_ceil(1_000_000)))),
            Err(_) => Err(ConfigError::Healthcheck {
                field,
                problem: format!("{n}, which is negative"),
            }),
        },
    }
}

fn raw_health(health: &Healthcheck) -> RawHealth {
    let nanoseconds = |span: Option<Millis>| {
        span.map(|s| i64::try_from(s.0.saturating_mul(1_000_000)).unwrap_or(i64::MAX))
    };
    RawHealth {
        test: match &health.test {
            None => Vec::new(),
            Some(HealthTest::Shell(text)) => vec!["CMD-SHELL".into(), text.clone()],
            Some(HealthTest::Exec(arguments)) => {
                let mut test = vec!["CMD".to_owned()];
                test.extend(arguments.iter().cloned());
                test
            }
        },
        interval: nanoseconds(health.interval),
        timeout: nanoseconds(health.timeout),
        start_period: nanoseconds(health.start_period),
        start_interval: nanoseconds(health.start_interval),
        retries: health.retries.map(i64::from),
    }
}

#[derive(Serialize, Deserialize)]
struct RawConfig {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    author: Option<String>,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    variant: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    config: RawProcess,
    rootfs: RawRootFs,
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    history: Vec<History>,
}

#[derive(Serialize, Deserialize)]
struct RawRootFs {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default, deserialize_with = "null_is_default")]
    diff_ids: Vec<Digest>,
}

/// `{}`: Go's way to write a set.
#[derive(Default, Serialize, Deserialize)]
struct Empty {}

/// `config` in a configuration; every field may be absent or null.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct RawProcess {
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "String::is_empty"
    )]
    user: String,
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    exposed_ports: BTreeMap<String, Empty>,
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    env: Vec<String>,
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    entrypoint: Vec<String>,
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    cmd: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    healthcheck: Option<RawHealth>,
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    volumes: BTreeMap<String, Empty>,
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "String::is_empty"
    )]
    working_dir: String,
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_signal: Option<String>,
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    shell: Vec<String>,
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    on_build: Vec<String>,
}

/// Docker's healthcheck; spans in nanoseconds.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct RawHealth {
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    test: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interval: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    start_period: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    start_interval: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retries: Option<i64>,
}

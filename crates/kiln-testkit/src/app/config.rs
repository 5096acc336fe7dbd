//! What the program's environment says.

use std::path::PathBuf;
use std::time::Duration;

pub(super) struct Config {
    pub version: String,
    pub port: u16,
    pub tcp_port: Option<u16>,
    /// Before it listens.
    pub boot: Duration,
    /// Of every answer to `/`.
    pub delay: Duration,
    pub crash_after: Option<Duration>,
    /// So many of a hundred answers to `/` are 500.
    pub fail_percent: u64,
    /// `/health` is 500.
    pub sick: bool,
    pub ignore_term: bool,
    /// It runs, and never listens.
    pub never_ready: bool,
    /// The file that only one writer at a time may hold.
    pub lock: Option<PathBuf>,
}

impl Config {
    pub fn read() -> Result<Self, String> {
        let ms = |key: &str| Ok::<_, String>(number(key)?.map(Duration::from_millis));
        let port = |key: &str| match number(key)? {
            Some(port) => u16::try_from(port)
                .map(Some)
                .map_err(|e| format!("{key}: {e}")),
            None => Ok(None),
        };
        Ok(Self {
            version: text("APP_VERSION").unwrap_or_else(|| "0".into()),
            port: port("APP_PORT")?.unwrap_or(8000),
            tcp_port: port("APP_TCP_PORT")?,
            boot: ms("APP_BOOT_MS")?.unwrap_or_default(),
            delay: ms("APP_DELAY_MS")?.unwrap_or_default(),
            crash_after: ms("APP_CRASH_AFTER_MS")?,
            fail_percent: number("APP_FAIL_PERCENT")?.unwrap_or(0),
            sick: text("APP_SICK").is_some(),
            ignore_term: text("APP_IGNORE_TERM").is_some(),
            never_ready: text("APP_NEVER_READY").is_some(),
            lock: text("APP_LOCK").map(PathBuf::from),
        })
    }
}

/// Empty is as good as not there: what compose files interpolate may be.
fn text(key: &str) -> Option<String> {
    std::env::var(key).ok().filter(|text| !text.is_empty())
}

fn number(key: &str) -> Result<Option<u64>, String> {
    text(key)
        .map(|text| text.parse().map_err(|e| format!("{key}: `{text}`: {e}")))
        .transpose()
}

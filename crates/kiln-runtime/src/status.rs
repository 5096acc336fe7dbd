//! `status.json`: what the shim says about its instance. Replaced atomically, so a
//! reader sees the old or the new text, never half of one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use kiln_model::Millis;
use kiln_model::instance::ExitStatus;
use serde::{Deserialize, Serialize};

/// The serialised form's version.
const FORMAT: u32 = 1;
/// A status file is small; a bigger one is not ours.
const MAX_STATUS: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub format: u32,
    /// The boot it was written in: after a reboot nothing of it is true any more.
    pub boot: String,
    pub phase: Phase,
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub enum Phase {
    Starting,
    Running {
        pid: u32,
        /// The process's start time in clock ticks: tells it from a later process
        /// with the same number.
        ticks: u64,
        since: Millis,
    },
    Exited {
        status: ExitStatus,
        at: Millis,
        /// Why it could not be started.
        cause: Option<String>,
    },
}

impl Status {
    pub fn new(phase: Phase, warnings: &[String]) -> Self {
        Self {
            format: FORMAT,
            boot: boot_id(),
            phase,
            warnings: warnings.to_vec(),
        }
    }

    /// `None`: there is no (readable, complete) status.
    pub fn read(path: &Path) -> Option<Self> {
        let mut text = Vec::new();
        File::open(path)
            .ok()?
            .take(MAX_STATUS)
            .read_to_end(&mut text)
            .ok()?;
        serde_json::from_slice(&text)
            .ok()
            .filter(|s: &Self| s.format == FORMAT)
    }

    pub fn write(&self, path: &Path) -> io::Result<()> {
        write_atomically(path, &serde_json::to_vec(self)?)
    }
}

/// Writes a small file by way of a temporary one beside it, mode 0600.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let temporary = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content)?;
    drop(file);
    std::fs::rename(&temporary, path)
}

/// The kernel's name for this boot; empty when it can't be read.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// Now, in milliseconds since the epoch.
pub fn now() -> Millis {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map(Millis::from)
        .unwrap_or_default()
}

//! Kernel settings below `/proc/sys/net`, of the calling thread's network namespace.

use std::io;
use std::path::PathBuf;

/// A setting that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("the kernel setting {}: {source}", path.display())]
pub struct SysctlError {
    path: PathBuf,
    source: io::Error,
}

/// The settings of one interface (or `all`, `default`).
pub(super) fn ipv4(interface: &str, key: &str) -> PathBuf {
    PathBuf::from(format!("/proc/sys/net/ipv4/conf/{interface}/{key}"))
}

pub(super) fn read(path: PathBuf) -> Result<String, SysctlError> {
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(SysctlError { path, source }),
    }
}

/// Writes only what differs, so that a read-only `/proc/sys` with the right value is fine.
pub(super) fn write(path: PathBuf, value: &str) -> Result<(), SysctlError> {
    if read(path.clone()).is_ok_and(|have| have == value) {
        return Ok(());
    }
    std::fs::write(&path, value).map_err(|source| SysctlError { path, source })
}

/// Turns IPv6 off for one interface (or `default`: those that come later). A kernel
/// without IPv6 has nothing to turn off.
pub(super) fn without_ipv6(interface: &str) -> Result<(), SysctlError> {
    let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"));
    match write(path, "1") {
        Err(e) if e.source.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

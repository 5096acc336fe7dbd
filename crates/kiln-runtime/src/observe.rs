//! Looking at a running instance from outside: its seal, its ports, its writes.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::TcpStream;
use std::path::PathBuf;

use kiln_model::InstanceId;
use kiln_model::instance::{InstanceNetwork, Root};

use crate::cgroup::{Cgroup, Layout};
use crate::netns;
use crate::runtime::{Runtime, RuntimeError};
use crate::shim;
use crate::upper::{Change, ScanError, scan_upper};

/// Whether an instance still is what was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealState {
    /// Its root file system can't be written to.
    pub read_only: bool,
    /// Processes whose program isn't a file of the image.
    pub foreign: Vec<ForeignProcess>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignProcess {
    /// In the host's pid namespace.
    pub pid: u32,
    /// The program's path as the kernel shows it.
    pub program: String,
}

impl Runtime {
    /// Connects to `port` on the instance's own loopback address.
    pub fn dial(&self, id: &InstanceId, port: u16) -> io::Result<TcpStream> {
        let (pid, _process) = self.first_process(id).map_err(io::Error::other)?;
        netns::dial(&PathBuf::from(format!("/proc/{pid}/ns/net")), port)
    }

    /// TCP ports that something in the instance's network namespace listens on, sorted.
    pub fn listening(&self, id: &InstanceId) -> Result<Vec<u16>, RuntimeError> {
        let (pid, _process) = self.first_process(id)?;
        let mut ports = BTreeSet::new();
        for name in ["tcp", "tcp6"] {
            let path = format!("/proc/{pid}/net/{name}");
            match fs::read_to_string(&path) {
                Ok(text) => ports.extend(text.lines().skip(1).filter_map(listening_port)),
                // Without IPv6.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(RuntimeError::Read { path, source }),
            }
        }
        Ok(ports.into_iter().collect())
    }

    /// Whether the root is really read-only, and what runs that isn't of the image.
    pub fn seal_state(&self, id: &InstanceId) -> Result<SealState, RuntimeError> {
        let (pid, _process) = self.first_process(id)?;
        let path = format!("/proc/{pid}/mountinfo");
        let mounts =
            fs::read_to_string(&path).map_err(|source| RuntimeError::Read { path, source })?;
        let root_device = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let device = fields.nth(2)?.to_owned();
            (fields.nth(1)? == "/").then_some((device, fields.next()?.to_owned()))
        });
        let read_only = root_device
            .as_ref()
            .is_some_and(|(_, options)| options.split(',').any(|o| o == "ro"));
        let cgroup = Cgroup::new(Layout::detect(), &shim::cgroup_path(&self.paths(id)));
        let mut pids: BTreeSet<i32> = cgroup.processes().into_iter().collect();
        pids.extend(i32::try_from(pid));
        let foreign = pids
            .into_iter()
            .filter_map(|pid| foreign_process(u32::try_from(pid).ok()?))
            .collect();
        Ok(SealState { read_only, foreign })
    }

    /// What the instance has written into its root: only unsealed and layered ones
    /// have a writable layer. Reading it while it is in use may miss the last moment.
    pub fn write_set(&self, id: &InstanceId) -> Result<Vec<Change>, ScanError> {
        let upper = match self.spec(id).map(|spec| spec.root) {
            Some(Root::Layered { upper, .. }) => upper,
            Some(Root::Unsealed { .. }) => self.paths(id).upper(),
            Some(Root::Sealed { .. }) | None => return Ok(Vec::new()),
        };
        if !upper.exists() {
            return Ok(Vec::new());
        }
        scan_upper(&upper)
    }

    /// Where the instance's network namespace is bound; `None`: it has none of its own.
    pub fn network_namespace(&self, id: &InstanceId) -> Option<PathBuf> {
        let own = matches!(
            self.spec(id)?.network,
            InstanceNetwork::Isolated | InstanceNetwork::Bridged(_)
        );
        own.then(|| self.paths(id).netns())
    }
}

/// The local port of a line of `/proc/net/tcp` in state LISTEN (0A).
fn listening_port(line: &str) -> Option<u16> {
    let mut fields = line.split_whitespace();
    let local = fields.nth(1)?;
    let state = fields.nth(1)?;
    let (_, port) = local.rsplit_once(':')?;
    (state == "0A").then(|| u16::from_str_radix(port, 16).ok())?
}

/// A process whose executable has been deleted, or lies on another mount than `/`.
fn foreign_process(pid: u32) -> Option<ForeignProcess> {
    let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let text = program.to_string_lossy().into_owned();
    if !text.ends_with(" (deleted)") && on_root(pid) == Some(true) {
        return None;
    }
    Some(ForeignProcess { pid, program: text })
}

/// Whether the program's file is of the same file system as the process's root.
fn on_root(pid: u32) -> Option<bool> {
    use std::os::unix::fs::MetadataExt;
    let program = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    let root = fs::metadata(format!("/proc/{pid}/root")).ok()?;
    Some(program.dev() == root.dev())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_ports_are_read_and_others_are_not() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1";
        assert_eq!(listening_port(line), Some(8080));
        assert_eq!(listening_port(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(listening_port("nonsense"), None);
    }
}

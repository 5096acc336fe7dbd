//! Looking at a running instance from outside: its seal, its ports, its writes.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use kiln_model::InstanceId;
use kiln_model::instance::{InstanceNetwork, Root};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::cgroup::{Cgroup, Layout};
use crate::netns;
use crate::runtime::{Runtime, RuntimeError};
use crate::shim;
use crate::upper::{Change, ScanError, scan_upper};

/// `STATX_MNT_ID` (Linux 5.8).
const STATX_MNT_ID: u32 = 0x1000;

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
            match self.read_of(id, path) {
                Ok(text) => ports.extend(text.lines().skip(1).filter_map(listening_port)),
                // Without IPv6.
                Err(RuntimeError::Read { source, .. })
                    if source.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(ports.into_iter().collect())
    }

    /// Whether the root is really read-only, and what runs that isn't of the image.
    pub fn seal_state(&self, id: &InstanceId) -> Result<SealState, RuntimeError> {
        let (pid, _process) = self.first_process(id)?;
        let path = format!("/proc/{pid}/mountinfo");
        let mounts = self.read_of(id, path)?;
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
        let spec = self.spec(id);
        // The small init is kiln's own program.
        if spec.as_ref().is_some_and(|s| s.init) {
            pids.retain(|p| u32::try_from(*p) != Ok(pid));
        }
        let upper = match spec.map(|s| s.root) {
            Some(Root::Unsealed { .. }) => Some(self.paths(id).upper()),
            Some(Root::Layered { upper, .. }) => Some(upper),
            _ => None,
        };
        let foreign = pids
            .into_iter()
            .filter_map(|pid| foreign_process(u32::try_from(pid).ok()?, upper.as_deref()))
            .collect();
        Ok(SealState { read_only, foreign })
    }

    /// Reads a file of the first process; an instance that ends meanwhile isn't running.
    fn read_of(&self, id: &InstanceId, path: String) -> Result<String, RuntimeError> {
        fs::read_to_string(&path).or_else(|source| {
            self.first_process(id)?;
            Err(RuntimeError::Read { path, source })
        })
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

/// A process whose program has been deleted, lies on another mount than `/`, or in
/// the writable layer over the image.
fn foreign_process(pid: u32, upper: Option<&Path>) -> Option<ForeignProcess> {
    let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let text = program.to_string_lossy().into_owned();
    let written = upper
        .zip(program.strip_prefix("/").ok())
        .is_some_and(|(upper, path)| upper.join(path).symlink_metadata().is_ok());
    if !text.ends_with(" (deleted)") && !written && on_root(pid) == Some(true) {
        return None;
    }
    Some(ForeignProcess { pid, program: text })
}

/// Whether the program's file is of the same mount as the process's root. (The
/// device number won't do: an overlay shows its layers' own.)
fn on_root(pid: u32) -> Option<bool> {
    let mount = |path: String| {
        let flags = StatxFlags::from_bits_retain(STATX_MNT_ID);
        let stat = statx(CWD, path, AtFlags::empty(), flags).ok()?;
        Some(stat.stx_mnt_id)
    };
    Some(mount(format!("/proc/{pid}/exe"))? == mount(format!("/proc/{pid}/root"))?)
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

//! Removing an instance entirely, however far its making or its end has come.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_model::InstanceId;
use kiln_model::instance::InstanceNetwork;
use rustix::mount::UnmountFlags;

use crate::cgroup::{Cgroup, Layout};
use crate::lock::{self, Turn};
use crate::net;
use crate::runtime::{Runtime, RuntimeError};
use crate::shim_io::wait_readable;
use crate::{shim, sys};

/// After its container has been killed, a shim cleans up and ends; one that doesn't
/// in this time is killed too.
const SHIM_WAIT: Duration = Duration::from_secs(5);
const SHIM_STEP: Duration = Duration::from_millis(20);
/// A folder whose mounts are being torn down by the kernel stays busy for a moment.
const BUSY_ATTEMPTS: u32 = 100;
const BUSY_STEP: Duration = Duration::from_millis(10);

impl Runtime {
    /// Ends the instance and removes processes, control groups, network namespace,
    /// scratch and folder. Twice, after a reboot, or on a half-made one: no error.
    pub fn remove(&self, id: &InstanceId) -> Result<(), RuntimeError> {
        let paths = self.paths(id);
        if !paths.dir().exists() {
            return Ok(());
        }
        let fail = |source| RuntimeError::Remove {
            id: id.clone(),
            what: paths.turn().display().to_string(),
            source,
        };
        let turn = match Turn::take(&paths.turn()) {
            Ok(turn) => turn,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(fail(e)),
        };
        self.clean_up(id, true)?;
        drop(turn);
        Ok(())
    }

    /// The turn must be the caller's. `folder`: remove that too.
    pub(crate) fn clean_up(&self, id: &InstanceId, folder: bool) -> Result<(), RuntimeError> {
        let paths = self.paths(id);
        let fail = |what: &Path| {
            let (id, what) = (id.clone(), what.display().to_string());
            move |source| RuntimeError::Remove { id, what, source }
        };
        // The first process, if the shim told; the rest by the control groups, which
        // know every process since before its exec.
        if let Ok((_, first)) = self.first_process(id) {
            let _ = sys::signal_pidfd(first.as_fd(), libc::SIGKILL);
        }
        let cgroup = Cgroup::new(Layout::detect(), &shim::cgroup_path(&paths));
        if let Some(shim) = lock::holder_fd(&paths.lock()) {
            end_shim(&cgroup, shim.as_fd());
        }
        if !cgroup.kill() {
            return Err(fail(paths.dir())(io::Error::other(
                "processes that even SIGKILL does not end are left",
            )));
        }
        cgroup.remove().map_err(fail(paths.dir()))?;
        self.detach(id).map_err(fail(&paths.netns()))?;
        net::delete_netns(&paths.netns()).map_err(|e| fail(&paths.netns())(io::Error::other(e)))?;
        // Never there by our doing (mounts are the shim's own), but a mount below a
        // folder about to be emptied would take the host's files with it.
        let _ =
            rustix::mount::unmount(paths.stage(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        for path in [paths.state(), paths.bundle()] {
            remove_all(&path).map_err(fail(&path))?;
        }
        if folder {
            remove_all(paths.dir()).map_err(fail(paths.dir()))?;
            // No start is under way where there is no folder.
            let instances = self.config.root.join("instances");
            if fs::read_dir(instances).is_ok_and(|mut entries| entries.next().is_none()) {
                cgroup.remove_parent();
            }
        }
        Ok(())
    }

    /// Takes the interfaces away now: the kernel takes a namespace's apart some time
    /// after its last process, and until then the bridge has the port and the address.
    fn detach(&self, id: &InstanceId) -> io::Result<()> {
        let Some(InstanceNetwork::Bridged(interfaces)) = self.spec(id).map(|s| s.network) else {
            return Ok(());
        };
        let netns = self.paths(id).netns();
        interfaces
            .iter()
            .try_for_each(|interface| net::detach(&netns, interface).map_err(io::Error::other))
    }
}

/// One that is still starting makes processes while others are killed.
fn end_shim(cgroup: &Cgroup, shim: BorrowedFd<'_>) {
    let end = Instant::now() + SHIM_WAIT;
    while Instant::now() < end {
        cgroup.kill();
        if wait_readable(shim, Some(SHIM_STEP)) {
            return;
        }
    }
    let _ = sys::signal_pidfd(shim, libc::SIGKILL);
    wait_readable(shim, Some(SHIM_WAIT));
}

fn remove_all(path: &Path) -> io::Result<()> {
    for _ in 1..BUSY_ATTEMPTS {
        match fs::remove_dir_all(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(BUSY_STEP),
            other => return other,
        }
    }
    fs::remove_dir_all(path)
}

//! `/dev/shm` of another instance, for one that shares its IPC namespace: POSIX shared
//! memory is files there, which the namespace alone doesn't bring.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::{Late, RootError};

const SHM: &str = "/dev/shm";

/// Puts the `/dev/shm` of process `pid` below `stage`, to be bound into the instance. The
/// calling process must be single-threaded.
pub fn shm_of(pid: u32, stage: &Path) -> Result<Late, RootError> {
    let at = stage.join("shared-shm");
    let fail = |source| RootError::Attach {
        what: "the other instance's /dev/shm".into(),
        target: SHM.into(),
        source,
    };
    let tree = clone_from(pid).map_err(fail)?;
    std::fs::create_dir(&at).map_err(fail)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&tree, "", CWD, &at, flags).map_err(|e| fail(e.into()))?;
    Ok(Late {
        source: Some(at),
        target: SHM.into(),
        options: ["rbind", "nosuid", "nodev", "noexec"]
            .map(str::to_owned)
            .into(),
    })
}

/// Mounts can be cloned only from within the namespace they are in.
fn clone_from(pid: u32) -> io::Result<std::os::fd::OwnedFd> {
    let own = File::open("/proc/self/ns/mnt")?;
    let theirs = File::open(format!("/proc/{pid}/ns/mnt"))?;
    setns(&theirs, CloneFlags::CLONE_NEWNS)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, SHM, flags);
    // Where this fails nothing of this process's is in reach any more: it must not go on.
    setns(&own, CloneFlags::CLONE_NEWNS)?;
    Ok(tree?)
}

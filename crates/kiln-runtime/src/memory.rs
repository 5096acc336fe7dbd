//! Volumes in memory: a tmpfs on a folder of the host, which instances bind. It is there from
//! its first use until it is let go, or until the next boot.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

use crate::root::tree::fd_path;

/// A tmpfs that is on no folder yet.
pub struct Memory(OwnedFd);

impl Memory {
    /// `options`: those of tmpfs(5), like `size` and `mode`.
    pub fn new(options: &[(String, String)]) -> io::Result<Self> {
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in options {
            fsconfig_set_string(&fs, key.as_str(), value.as_str())?;
        }
        fsconfig_create(&fs)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        Ok(Self(mount))
    }

    /// For filling it before anybody sees it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(fd_path(&self.0))
    }

    pub fn put_on(self, folder: &Path) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&self.0, "", CWD, folder, flags)?)
    }
}

/// Whether something is mounted on the folder.
pub fn is_mounted(folder: &Path) -> io::Result<bool> {
    let parent = folder.parent().unwrap_or(folder);
    let (own, around) = match (std::fs::metadata(folder), std::fs::metadata(parent)) {
        (Err(e), _) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        (own, around) => (own?, around?),
    };
    Ok(own.dev() != around.dev())
}

/// Takes the tmpfs off the folder; its content goes with the last instance that has it.
pub fn let_go(folder: &Path) -> io::Result<()> {
    Ok(unmount(folder, UnmountFlags::DETACH)?)
}

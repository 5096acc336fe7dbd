//! Mounting an image's tree: one EROFS mount of its metadata, one overlay that
//! finds the contents in the object folder.
//!
//! Kernels from 6.12 mount EROFS straight from the file and kernels from 6.5 know
//! data-only layers; older ones get a loop device and an ordinary lowest layer
//! (whose names the tree's root hides with whiteouts).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use kiln_model::instance::TreePaths;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::MountFlags;

use crate::sys;

/// Another process may take the free loop device first.
const LOOP_ATTEMPTS: u32 = 64;

/// Which of the kernel's newer abilities to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// Mount EROFS from a plain file where the kernel can.
    pub file_backed: bool,
    /// Data-only lower layers where the kernel can.
    pub data_only: bool,
}

impl Default for Abilities {
    fn default() -> Self {
        Self {
            file_backed: true,
            data_only: true,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("cannot open {path}: {source}")]
    Open { path: String, source: io::Error },
    #[error("cannot mount the image tree {path}: {source}{}", hint(source))]
    Metadata { path: String, source: io::Error },
    #[error("cannot attach {path} to a loop device: {source} (is the `loop` kernel module there?)")]
    Loop { path: String, source: io::Error },
    #[error("cannot mount the overlay for {what}: {source}{}", hint(source))]
    Overlay { what: String, source: io::Error },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENODEV) => " (the kernel lacks this file system: `modprobe erofs overlay`)",
        Some(libc::EPERM | libc::EACCES) => " (kiln must run as root)",
        _ => "",
    }
}

/// A directory's descriptor, to name it in mount options without any quoting.
pub fn open_dir(path: &Path) -> Result<OwnedFd, MountError> {
    openat(
        CWD,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| MountError::Open {
        path: path.display().to_string(),
        source: e.into(),
    })
}

/// `/proc/self/fd/N`.
pub fn fd_path(fd: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// Mounts the tree's metadata read-only at `at`.
pub fn mount_metadata(tree: &TreePaths, at: &Path, use_file: bool) -> Result<(), MountError> {
    let path = || tree.metadata.display().to_string();
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    if use_file {
        match rustix::mount::mount(&tree.metadata, at, "erofs", flags, None) {
            Ok(()) => return Ok(()),
            // Before 6.12: only block devices.
            Err(rustix::io::Errno::NOTBLK | rustix::io::Errno::INVAL) => {}
            Err(e) => {
                return Err(MountError::Metadata {
                    path: path(),
                    source: e.into(),
                });
            }
        }
    }
    // The device is released when the mount ends.
    let (device, _open) = loop_device(&tree.metadata).map_err(|source| MountError::Loop {
        path: path(),
        source,
    })?;
    rustix::mount::mount(device.as_str(), at, "erofs", flags, None).map_err(|e| {
        MountError::Metadata {
            path: path(),
            source: e.into(),
        }
    })
}

fn loop_device(path: &Path) -> io::Result<(String, File)> {
    let file = File::open(path)?;
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    for _ in 0..LOOP_ATTEMPTS {
        let name = format!("/dev/loop{}", sys::free_loop_device(control.as_fd())?);
        let device = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(&name)?;
        match sys::configure_loop(device.as_fd(), file.as_fd()) {
            Ok(()) => return Ok((name, device)),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other("no free loop device"))
}

/// An overlay to be mounted.
pub struct Overlay<'a> {
    /// For messages.
    pub what: &'a str,
    /// Topmost first.
    pub lower: &'a [&'a OwnedFd],
    /// Where the lower layers' redirected contents are.
    pub objects: Option<&'a OwnedFd>,
    /// `(upper, work)`.
    pub upper: Option<(&'a OwnedFd, &'a OwnedFd)>,
    pub flags: MountFlags,
}

impl Overlay<'_> {
    fn options(&self, data_only: bool) -> String {
        let mut lower = self.lower.iter().map(fd_path).collect::<Vec<_>>().join(":");
        let mut tail = String::new();
        if let Some(objects) = self.objects {
            lower.push_str(if data_only { "::" } else { ":" });
            lower.push_str(&fd_path(objects));
            tail.push_str(",metacopy=on,redirect_dir=on");
        }
        if let Some((upper, work)) = self.upper {
            tail.push_str(&format!(
                ",upperdir={},workdir={}",
                fd_path(upper),
                fd_path(work)
            ));
            if self.objects.is_none() {
                // Upper files hold their whole content and folders are never
                // redirected, so that a scan of the upper folder tells all.
                tail.push_str(",metacopy=off,redirect_dir=off,index=off");
            }
        }
        format!("lowerdir={lower}{tail}")
    }

    /// Mounts at `at`; gives whether data-only layers were used.
    pub fn mount(&self, at: &str, data_only: bool) -> Result<bool, MountError> {
        let attempt = |data_only: bool| {
            let options = std::ffi::CString::new(self.options(data_only))
                .map_err(|_| rustix::io::Errno::INVAL)?;
            rustix::mount::mount(
                "overlay",
                at,
                "overlay",
                self.flags,
                Some(options.as_c_str()),
            )
        };
        let result = match attempt(data_only) {
            Err(rustix::io::Errno::INVAL) if data_only && self.objects.is_some() => {
                attempt(false).map(|()| false)
            }
            other => other.map(|()| data_only),
        };
        result.map_err(|e| MountError::Overlay {
            what: self.what.to_owned(),
            source: e.into(),
        })
    }
}

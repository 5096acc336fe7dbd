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
            // What is written is thrown away, or read before the machine can lose it:
            // no fsync of a program inside has to reach the disk.
            tail.push_str(&format!(
                ",upperdir={},workdir={},volatile",
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
        if let Some((_, work)) = self.upper {
            forget_volatile(work).map_err(|source| MountError::Overlay {
                what: self.what.to_owned(),
                source,
            })?;
        }
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

/// A work folder that has been mounted `volatile` is refused until its mark is gone
/// (Documentation/filesystems/overlayfs.rst, "Volatile mount"). A builder goes on with
/// a layer it has just written; after a crash it begins anew.
fn forget_volatile(work: &OwnedFd) -> io::Result<()> {
    let mark = std::path::Path::new(&fd_path(work)).join("work/incompat");
    match std::fs::remove_dir_all(mark) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use rustix::fs::XattrFlags;
    use std::path::PathBuf;

    /// A tree as the store lays it out: one file whose content is an object, and
    /// whiteouts over the objects' folders for kernels without data-only layers.
    pub fn composefs(dir: &Path) -> TreePaths {
        let (files, objects) = (dir.join("files"), dir.join("objects"));
        std::fs::create_dir_all(files.join("sub")).unwrap();
        std::fs::create_dir_all(objects.join("ab")).unwrap();
        std::fs::write(objects.join("ab/cdef"), "the content").unwrap();
        for path in ["top", "sub/file"] {
            let path = files.join(path);
            File::create(&path).unwrap().set_len(11).unwrap();
            let set = |name: &str, value: &[u8]| {
                rustix::fs::lsetxattr(&path, name, value, XattrFlags::empty()).unwrap();
            };
            set("trusted.overlay.metacopy", b"");
            set("trusted.overlay.redirect", b"/ab/cdef");
        }
        for n in 0..=255 {
            let name = files.join(format!("{n:02x}"));
            let kind = rustix::fs::FileType::CharacterDevice;
            rustix::fs::mknodat(CWD, name, kind, Mode::empty(), 0).unwrap();
        }
        let metadata = dir.join("tree.erofs");
        let made = std::process::Command::new("mkfs.erofs")
            .args(["-x1", "--quiet"])
            .args([&metadata, &files])
            .status()
            .unwrap();
        assert!(made.success());
        TreePaths { metadata, objects }
    }

    fn mounted(abilities: Abilities, dir: PathBuf) -> Vec<String> {
        let tree = composefs(&dir);
        // Namespaces belong to threads: this one is the test's own.
        std::thread::spawn(move || {
            crate::root::private_namespace().unwrap();
            let (at, view, sub) = (dir.join("at"), dir.join("view"), dir.join("sub"));
            for path in [&at, &view, &sub] {
                std::fs::create_dir_all(path).unwrap();
            }
            mount_metadata(&tree, &at, abilities.file_backed).unwrap();
            let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let device = mounts.lines().find(|l| l.contains(" - erofs ")).unwrap();
            assert_eq!(
                device.contains("/dev/loop"),
                !abilities.file_backed,
                "{device}"
            );
            let (lower, objects) = (open_dir(&at).unwrap(), open_dir(&tree.objects).unwrap());
            let empty = open_dir(&sub).unwrap();
            let used = Overlay {
                what: "test",
                lower: &[&empty, &lower],
                objects: Some(&objects),
                upper: None,
                flags: MountFlags::RDONLY,
            }
            .mount(&view.display().to_string(), abilities.data_only)
            .unwrap();
            assert_eq!(used, abilities.data_only);
            for path in ["top", "sub/file"] {
                assert_eq!(
                    std::fs::read_to_string(view.join(path)).unwrap(),
                    "the content"
                );
            }
            let names = std::fs::read_dir(&view).unwrap().flatten();
            let mut names: Vec<String> = names
                .map(|e| e.file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        })
        .join()
        .unwrap()
    }

    /// On any kernel from 6.12, also the ways of older ones.
    #[test]
    fn a_tree_is_mounted_the_new_way_and_the_old_ways() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("KILN_TEST_STRICT").is_none(), "needs root");
            eprintln!("SKIPPED: needs root");
            return;
        }
        let new = crate::seccomp::kernel_version() >= (6, 12);
        for (n, (file_backed, data_only)) in
            [(true, true), (false, true), (true, false), (false, false)]
                .into_iter()
                .filter(|(file_backed, data_only)| new || !(*file_backed || *data_only))
                .enumerate()
        {
            let dir = std::env::temp_dir().join(format!("kiln-tree-{}-{n}", std::process::id()));
            let abilities = Abilities {
                file_backed,
                data_only,
            };
            assert_eq!(
                mounted(abilities, dir.clone()),
                ["sub", "top"],
                "{abilities:?}"
            );
            std::fs::remove_dir_all(&dir).unwrap();
        }
    }
}

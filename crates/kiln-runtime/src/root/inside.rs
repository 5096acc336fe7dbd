//! Paths inside an instance's root, resolved as the instance would: no symlink and
//! no `..` leads out of it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

/// As the kernel's own limit.
const MAX_LINKS: u32 = 40;

fn open_below(root: &Path, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let dir = openat(
        CWD,
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // A rename elsewhere in the tree makes the kernel give up with EAGAIN.
    const ATTEMPTS: u32 = 16;
    for _ in 1..ATTEMPTS {
        match openat2(
            &dir,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        ) {
            Err(rustix::io::Errno::AGAIN) => {}
            other => return Ok(other?),
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// Opens a file for reading. FIFOs don't block.
pub fn open_read(root: &Path, path: &str) -> io::Result<OwnedFd> {
    open_below(
        root,
        path,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY,
    )
}

/// Opens a place to mount on or to look at.
pub fn open_path(root: &Path, path: &str) -> io::Result<OwnedFd> {
    open_below(root, path, OFlags::PATH)
}

/// Where a path leads to in a root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The part that exists, relative to the root, without symlinks.
    pub existing: PathBuf,
    /// What would have to be made below it.
    pub missing: Vec<OsString>,
}

impl Resolved {
    pub fn exists(&self) -> bool {
        self.missing.is_empty()
    }

    /// The whole path, relative to the root.
    pub fn path(&self) -> PathBuf {
        self.missing
            .iter()
            .fold(self.existing.clone(), |path, name| path.join(name))
    }
}

/// Follows `target` component by component. The root must not change meanwhile
/// (it is mounted privately and nothing runs in it yet).
pub fn resolve(root: &Path, target: &str) -> io::Result<Resolved> {
    let mut todo: VecDeque<OsString> = components(Path::new(target));
    let mut existing = PathBuf::new();
    let mut missing: Vec<OsString> = Vec::new();
    let mut links = 0;
    while let Some(name) = todo.pop_front() {
        if name == ".." {
            if missing.pop().is_none() {
                existing.pop();
            }
            continue;
        }
        if !missing.is_empty() {
            missing.push(name);
            continue;
        }
        let next = existing.join(&name);
        let kind = match std::fs::symlink_metadata(root.join(&next)) {
            Ok(meta) => meta.file_type(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                missing.push(name);
                continue;
            }
            Err(e) => return Err(e),
        };
        if !kind.is_symlink() {
            existing = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let link = std::fs::read_link(root.join(&next))?;
        if link.is_absolute() {
            existing = PathBuf::new();
        }
        for name in components(&link).into_iter().rev() {
            todo.push_front(name);
        }
    }
    Ok(Resolved { existing, missing })
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

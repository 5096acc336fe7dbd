//! Two locks in every instance's folder.
//!
//! `lock` is a POSIX record lock held by the shim: it proves that the shim lives,
//! names its pid, ends with it, and (unlike flock) isn't inherited by the
//! container's processes. `turn` is a flock held by whoever starts or removes the
//! instance, so that two callers don't work on it at once. A new shim has a share of it
//! until it holds `lock`: at no time is there a shim that no lock tells of.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Held by the shim until it ends. Dropping it releases the lock, and so does
/// closing any other descriptor of the same file in this process.
pub struct Liveness {
    _file: File,
}

fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

impl Liveness {
    /// Fails with `EAGAIN` when another process holds it.
    pub fn acquire(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        fcntl(
            file.as_raw_fd(),
            FcntlArg::F_SETLK(&whole_file(libc::F_WRLCK)),
        )?;
        Ok(Self { _file: file })
    }
}

/// The pid of the shim that holds the lock, if one does.
pub fn holder(path: &Path) -> Option<i32> {
    let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
    let mut query = whole_file(libc::F_WRLCK);
    fcntl(file.as_raw_fd(), FcntlArg::F_GETLK(&mut query)).ok()?;
    (i32::from(query.l_type) != libc::F_UNLCK && query.l_pid > 0).then_some(query.l_pid)
}

/// A pidfd of the shim that holds the lock.
pub fn holder_fd(path: &Path) -> Option<OwnedFd> {
    let pid = holder(path)?;
    let fd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    // The number may have been given away in between; the lock can't.
    (holder(path) == Some(pid)).then_some(fd)
}

/// The right to start or remove an instance.
pub struct Turn {
    file: File,
}

impl Turn {
    /// Waits until no one else has it.
    pub fn take(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))?;
        Ok(Self { file })
    }

    /// As long as this is open somewhere, the turn is taken.
    pub fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }
}

/// Whether someone is starting or removing the instance just now.
pub fn turn_taken(path: &Path) -> bool {
    let Ok(file) = File::open(path) else {
        return false;
    };
    flock(&file, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
}

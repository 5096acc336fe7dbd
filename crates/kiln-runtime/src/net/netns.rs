//! Network namespaces kept alive by a file: an nsfs bind mount, as `ip netns` makes.
//!
//! A namespace is configured before its file is mounted, so one that is there is
//! ready. Inside:
//! - loopback is up with 127.0.0.1 and ::1;
//! - interfaces that come later have no IPv6: kiln lays out IPv4 only, and a
//!   link-local address would reach around the firewall;
//! - any user may bind ports below 1024 and send echo requests, as in Docker (the
//!   namespace is the instance's own, and unmodified images rely on it).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use super::channel::{Channel, NetlinkError};
use super::sysctl::{self, SysctlError};

/// The loopback interface's index in every namespace.
const LOOPBACK: u32 = 1;
/// Mounts that may lie over each other on one file; more means something mounts in a loop.
const STACKED_MOUNTS: usize = 64;

/// Why a network namespace could not be made, entered or removed.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("the network namespace file {}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} is no network namespace (a machine's restart leaves such empty files)", path.display())]
    NotANamespace { path: PathBuf },
    #[error("cannot make a network namespace (needs root): {0}")]
    Unshare(#[source] io::Error),
    #[error("cannot mount the network namespace on {}: {source}", path.display())]
    Mount { path: PathBuf, source: io::Error },
    #[error("cannot unmount the network namespace {}: {source}", path.display())]
    Unmount { path: PathBuf, source: io::Error },
    #[error("cannot set up loopback in the new network namespace: {0}")]
    Loopback(#[source] NetlinkError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("cannot read the mount table: {0}")]
    MountTable(#[source] io::Error),
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

/// Makes a network namespace held by the file `path`, whose folder must exist. One that
/// is already there is kept; an empty file left from before a restart is used.
pub fn create_netns(path: &Path) -> Result<(), NetnsError> {
    if is_netns(path)? {
        return Ok(());
    }
    let file = |source| NetnsError::File {
        path: path.to_owned(),
        source,
    };
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o444)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(file)?;
    let made = on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|e| NetnsError::Unshare(e.into()))?;
        configure()?;
        let bind = MsFlags::MS_BIND;
        mount(
            Some("/proc/thread-self/ns/net"),
            path,
            None::<&str>,
            bind,
            None::<&str>,
        )
        .map_err(|e| NetnsError::Mount {
            path: path.to_owned(),
            source: e.into(),
        })
    });
    if made.is_err() {
        // The error that counts is the one above; an empty file does no harm.
        let _ = std::fs::remove_file(path);
    }
    made
}

/// Settings of a new namespace; see the module's page.
fn configure() -> Result<(), NetnsError> {
    sysctl::without_ipv6("default")?;
    let ipv4 = Path::new("/proc/sys/net/ipv4");
    sysctl::write(ipv4.join("ip_unprivileged_port_start"), "0")?;
    sysctl::write(ipv4.join("ping_group_range"), "0\t2147483647")?;
    bring_up_loopback().map_err(NetnsError::Loopback)
}

pub(super) fn bring_up_loopback() -> Result<(), NetlinkError> {
    let mut link = LinkMessage::default();
    link.header.index = LOOPBACK;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    Channel::route()?.change(RouteNetlinkMessage::SetLink(link), 0)
}

/// Unmounts and removes the file. The namespace ends with its last process. Nothing
/// there is fine.
pub fn delete_netns(path: &Path) -> Result<(), NetnsError> {
    for _ in 0..STACKED_MOUNTS {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // EINVAL: not a mount point (any more).
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
            Err(e) => {
                return Err(NetnsError::Unmount {
                    path: path.to_owned(),
                    source: e.into(),
                });
            }
        }
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(NetnsError::File {
            path: path.to_owned(),
            source: e,
        }),
        _ => Ok(()),
    }
}

/// Whether `path` is a live namespace file. One of another kind counts too: `setns`
/// refuses it with a clear error.
pub fn is_netns(path: &Path) -> Result<bool, NetnsError> {
    match File::open(path) {
        Ok(file) => is_nsfs(&file).map_err(|source| NetnsError::File {
            path: path.to_owned(),
            source,
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(NetnsError::File {
            path: path.to_owned(),
            source,
        }),
    }
}

fn is_nsfs(file: &File) -> io::Result<bool> {
    Ok(fstatfs(file)?.filesystem_type() == NSFS_MAGIC)
}

/// The namespace files mounted below `folder`: what a kiln root left, also where
/// the instance's own folder no longer tells.
pub fn netns_files(folder: &Path) -> Result<Vec<PathBuf>, NetnsError> {
    // The thread's own table: mount namespaces belong to threads.
    let table = std::fs::read("/proc/thread-self/mountinfo").map_err(NetnsError::MountTable)?;
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let mut found: Vec<PathBuf> = table
        .split(|b| *b == b'\n')
        .filter_map(nsfs_mount_point)
        .filter(|path| path.starts_with(&folder))
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// The mount point of one line of mountinfo (proc(5)) if it is an nsfs.
fn nsfs_mount_point(line: &[u8]) -> Option<PathBuf> {
    let mut fields = line.split(|b| *b == b' ');
    let point = fields.nth(4)?;
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    (kind == b"nsfs").then(|| PathBuf::from(std::ffi::OsString::from_vec(unescape(point))))
}

/// Undoes mountinfo's `\ooo`.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(first);
                rest = after;
            }
        }
    }
    plain
}

/// Runs `work` on a thread inside the namespace; sockets it opens stay there.
pub fn inside<T: Send>(
    netns: &Path,
    work: impl FnOnce(&File) -> T + Send,
) -> Result<T, NetnsError> {
    let fail = |source| NetnsError::File {
        path: netns.to_owned(),
        source,
    };
    let file = File::open(netns).map_err(fail)?;
    if !is_nsfs(&file).map_err(fail)? {
        return Err(NetnsError::NotANamespace {
            path: netns.to_owned(),
        });
    }
    on_own_thread(|| {
        setns(&file, CloneFlags::CLONE_NEWNET).map_err(|e| fail(e.into()))?;
        Ok(work(&file))
    })
}

/// A thread of its own ends with its changed namespace; the caller's stays as it is.
fn on_own_thread<T: Send>(
    work: impl FnOnce() -> Result<T, NetnsError> + Send,
) -> Result<T, NetnsError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("kiln-netns".to_owned())
            .spawn_scoped(scope, work)
            .map_err(NetnsError::Thread)?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

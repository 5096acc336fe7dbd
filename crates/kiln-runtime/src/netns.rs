//! An instance's network namespace, bound to a file in its folder.

use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::UnmountFlags;

/// A local connection is made at once or not at all.
const DIAL_WAIT: Duration = Duration::from_secs(5);

/// Makes a namespace with a loopback interface that is up.
pub fn create(path: &Path) -> io::Result<()> {
    delete(path)?;
    File::create(path)?;
    on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        crate::sys::loopback_up()?;
        rustix::mount::mount_bind("/proc/thread-self/ns/net", path)?;
        Ok(())
    })
}

/// Lets go of it. Also after a reboot, when only the file is left; and twice.
pub fn delete(path: &Path) -> io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(e) => return Err(e.into()),
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Connects to a port of the namespace's own loopback address.
pub fn dial(namespace: &Path, port: u16) -> io::Result<TcpStream> {
    let namespace = File::open(namespace)?;
    on_a_thread(|| {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), DIAL_WAIT)
    })
}

/// A namespace belongs to a thread: one is made for the purpose and ends with it.
fn on_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("kiln-netns".into())
            .spawn_scoped(scope, work)?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread for a network namespace ended")))
    })
}

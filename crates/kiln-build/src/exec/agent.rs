//! `RUN --mount=type=ssh`: the host's ssh agent, through a socket of the step's own.
//!
//! The step gets a socket that ends with it. Bytes are passed on and never looked at or
//! kept: keys stay in the agent.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// How often the end of the step is looked for.
const LOOK: Duration = Duration::from_millis(20);
/// Connections at once; more are closed.
const MAX_CONNECTIONS: usize = 64;

/// Passes connections on until it is dropped.
pub(super) struct Agent {
    pub path: PathBuf,
    end: Arc<AtomicBool>,
}

impl Agent {
    /// Listens at `folder/name` for `agent`.
    pub fn start(
        folder: &Path,
        name: &str,
        agent: PathBuf,
        mode: u32,
        owner: (u32, u32),
    ) -> io::Result<Self> {
        // Sockets' paths are short by law; the folder's may be long.
        let handle = std::fs::File::open(folder)?;
        let short = format!("/proc/self/fd/{}/{name}", handle.as_raw_fd());
        let listener = UnixListener::bind(&short)?;
        let path = folder.join(name);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))?;
        chown(&path, Some(owner.0), Some(owner.1))?;
        listener.set_nonblocking(true)?;
        let end = Arc::new(AtomicBool::new(false));
        let stop = end.clone();
        std::thread::spawn(move || accept(&listener, &agent, &stop));
        Ok(Self { path, end })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

fn accept(listener: &UnixListener, agent: &Path, stop: &AtomicBool) {
    let open = Arc::new(AtomicUsize::new(0));
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((client, _)) if open.load(Ordering::Relaxed) < MAX_CONNECTIONS => {
                let (agent, open) = (agent.to_owned(), open.clone());
                open.fetch_add(1, Ordering::Relaxed);
                std::thread::spawn(move || {
                    if let Err(cause) = pass(client, &agent) {
                        tracing::debug!(%cause, "the ssh agent was not reached");
                    }
                    open.fetch_sub(1, Ordering::Relaxed);
                });
            }
            Ok(_) => {}
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

fn pass(client: UnixStream, agent: &Path) -> io::Result<()> {
    client.set_nonblocking(false)?;
    let agent = UnixStream::connect(agent)?;
    let (mut from, mut to) = (client.try_clone()?, agent.try_clone()?);
    let up = std::thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut from, mut to) = (agent, client);
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
    let _ = up.join();
    Ok(())
}

//! Wakes up when something may have changed in a set of folders (inotify). What did change
//! is found by looking, so that an event that is lost, late or told twice does no harm.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

/// So long nothing may have stirred: editors and compilers write more than one file.
const QUIET: Duration = Duration::from_millis(100);
/// What never rests is looked at all the same.
const LONGEST_UNREST: Duration = Duration::from_secs(2);
/// Events that are taken at a time; what they say is not looked at.
const EVENT_BYTES: usize = 16 << 10;

pub struct Eyes {
    fd: Arc<OwnedFd>,
    /// One place: that something has stirred need not be known twice.
    stirs: mpsc::Receiver<io::Result<()>>,
}

impl Eyes {
    pub fn new() -> io::Result<Self> {
        let fd = Arc::new(inotify::init(CreateFlags::CLOEXEC)?);
        let (tell, stirs) = mpsc::channel(1);
        let ears = fd.clone();
        // A thread, as reading blocks. It ends with the process, or when nobody listens.
        std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || listen(&ears, &tell))?;
        Ok(Self { fd, stirs })
    }

    /// Watches a folder, but not what is below it. One that is watched already stays so; one
    /// that has gone away is no error, as its parent tells of it.
    pub fn on(&self, folder: &Path) -> io::Result<()> {
        let events = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::ONLYDIR;
        match inotify::add_watch(&*self.fd, folder, events) {
            Ok(_) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns when something has stirred and it is quiet again.
    pub async fn stirred(&mut self) -> io::Result<()> {
        self.event().await?;
        let end = Instant::now() + LONGEST_UNREST;
        while Instant::now() < end {
            match timeout(QUIET, self.event()).await {
                Ok(event) => event?,
                Err(_) => break,
            }
        }
        Ok(())
    }

    async fn event(&mut self) -> io::Result<()> {
        let told = self.stirs.recv().await;
        told.unwrap_or_else(|| Err(io::Error::other("nobody listens to the kernel any more")))
    }
}

fn listen(fd: &OwnedFd, tell: &mpsc::Sender<io::Result<()>>) {
    loop {
        let mut events = [0; EVENT_BYTES];
        match rustix::io::read(fd, &mut events) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) if tell.is_closed() => return,
            // Full: it is known already.
            Ok(_) => drop(tell.try_send(Ok(()))),
            Err(error) => {
                let _ = tell.blocking_send(Err(error.into()));
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn it_sleeps_until_something_stirs_in_a_watched_folder() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("below");
        std::fs::create_dir(&below).unwrap();
        std::fs::write(folder.path().join("file"), "1").unwrap();
        let mut eyes = Eyes::new().unwrap();
        eyes.on(folder.path()).unwrap();
        eyes.on(folder.path()).unwrap();
        eyes.on(&folder.path().join("nowhere")).unwrap();
        let while_nothing_stirs = Duration::from_millis(300);
        std::fs::read(folder.path().join("file")).unwrap();
        std::fs::write(below.join("x"), "not watched").unwrap();
        let woken = timeout(while_nothing_stirs, eyes.stirred()).await;
        assert!(woken.is_err(), "by reading, or below");
        std::fs::write(folder.path().join("file"), "2").unwrap();
        std::fs::write(folder.path().join("other"), "2").unwrap();
        eyes.stirred().await.unwrap();
        let woken = timeout(while_nothing_stirs, eyes.stirred()).await;
        assert!(woken.is_err(), "twice by one change");
        std::fs::remove_file(folder.path().join("other")).unwrap();
        eyes.stirred().await.unwrap();
    }
}

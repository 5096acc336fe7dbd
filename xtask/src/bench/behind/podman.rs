//! `podman run --replace`, one copy after the other.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use super::super::Failure;
use super::super::bed::REPLICAS;
use super::super::peers::{installed, said};
use super::{Haproxy, Peer, Started, addresses, site};
use crate::cargo::program;

struct Podman {
    root: PathBuf,
    copies: Vec<SocketAddr>,
    haproxy: Option<Haproxy>,
    /// Where podman's own choice can't start a container here (crun on hybrid cgroups).
    runtime: &'static [&'static str],
    folder: tempfile::TempDir,
}

pub fn start() -> Started {
    installed("podman")?;
    let folder = tempfile::Builder::new().prefix("kiln-bench-").tempdir()?;
    let mut all = Podman {
        root: site(folder.path())?,
        copies: addresses(REPLICAS)?,
        haproxy: None,
        runtime: &[],
        folder,
    };
    if all.replace(0).is_err() {
        all.runtime = &["--runtime", "runc"];
        all.replace(0)?;
    }
    all.haproxy = Some(Haproxy::before(&all.copies, all.folder.path())?);
    Ok(Box::new(all))
}

impl Podman {
    fn podman(&self) -> Command {
        let mut command = program("podman");
        command.args(self.runtime);
        command
    }

    fn name(&self, copy: usize) -> String {
        format!("kiln-bench-{}-{copy}", std::process::id())
    }
}

impl Peer for Podman {
    fn address(&self) -> SocketAddr {
        let haproxy = self.haproxy.as_ref();
        haproxy.map_or(self.copies[0], |haproxy| haproxy.address)
    }

    fn replace(&mut self, revision: u64) -> Result<Duration, Failure> {
        let begun = Instant::now();
        for (n, copy) in self.copies.iter().enumerate() {
            let mut command = self.podman();
            command
                .args(["run", "--detach", "--replace", "--name", &self.name(n)])
                .args(["--network=host", "--stop-signal=KILL"])
                // podman's own limits are above what an unprivileged root may set.
                .args(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"])
                .args(["--env", &format!("REVISION={revision}"), "--rootfs"])
                .arg(&self.root)
                .args(["/bin/busybox", "httpd", "-f", "-h", "/www", "-p"])
                .arg(copy.to_string());
            said(&command.output()?)?;
        }
        Ok(begun.elapsed())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        for n in 0..self.copies.len() {
            let removed = self
                .podman()
                .args(["rm", "--force", &self.name(n)])
                .output();
            if let Err(error) = removed {
                eprintln!("warning: cleaning up: {error}");
            }
        }
    }
}

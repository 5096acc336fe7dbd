//! A docker engine's two ways: `docker compose up`, and a Swarm service that starts the new
//! task first. The engine is the one that the `docker` in the PATH reaches (`DOCKER_HOST`).
//! Containers take the host's network: published ports need iptables, Swarm's mesh IPVS.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use super::super::Failure;
use super::super::bed::REPLICAS;
use super::super::compose;
use super::super::peers::{import, said};
use super::{Haproxy, Peer, Started, addresses, site};
use crate::cargo::program;

/// Removing the old ones must not take longer.
const LIMIT: Duration = Duration::from_secs(120);

/// The engine, an image in it, and what is before the copies.
struct Bed {
    copies: Vec<SocketAddr>,
    image: String,
    haproxy: Option<Haproxy>,
    folder: tempfile::TempDir,
}

impl Bed {
    fn new(name: &str, copies: u32) -> Result<Self, Failure> {
        said(&program("docker").arg("info").output()?)?;
        let folder = tempfile::Builder::new().prefix("kiln-bench-").tempdir()?;
        let root = site(folder.path())?;
        let image = format!("kiln-bench-{name}:{}", std::process::id());
        import(&root, &folder.path().join("root.tar"), &image)?;
        Ok(Self {
            copies: addresses(copies)?,
            image,
            haproxy: None,
            folder,
        })
    }

    fn put_haproxy_before(&mut self) -> Result<(), Failure> {
        self.haproxy = Some(Haproxy::before(&self.copies, self.folder.path())?);
        Ok(())
    }

    fn address(&self) -> SocketAddr {
        let haproxy = self.haproxy.as_ref();
        haproxy.map_or(self.copies[0], |haproxy| haproxy.address)
    }

    /// The ids of the image's containers that have not been removed or have not ended.
    fn running(&self) -> Result<BTreeSet<String>, Failure> {
        let filter = format!("ancestor={}", self.image);
        let listed = program("docker")
            .args(["ps", "--quiet", "--filter", &filter])
            .output()?;
        said(&listed)?;
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        Ok(text.lines().map(str::to_owned).collect())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        tidy(&["rmi", "--force", &self.image]);
    }
}

fn tidy(words: &[&str]) {
    let done = program("docker").args(words).output();
    if let Err(error) = done.map_err(Failure::from).and_then(|output| said(&output)) {
        eprintln!("warning: docker {}: {error}", words.join(" "));
    }
}

/// `docker compose up --detach` over a file with a service for each copy.
struct Compose {
    program: OsString,
    bed: Bed,
}

pub fn compose() -> Started {
    let program = compose::other().ok_or("docker compose is not installed")?;
    let bed = Bed::new("compose", REPLICAS)?;
    let mut all = Compose { program, bed };
    all.replace(0)?;
    all.bed.put_haproxy_before()?;
    Ok(Box::new(all))
}

impl Compose {
    fn file(&self, revision: u64) -> String {
        let mut text = format!("name: kiln-bench-{}\nservices:\n", std::process::id());
        for (n, copy) in self.bed.copies.iter().enumerate() {
            text.push_str(&format!(
                "  copy{n}:\n    image: {}\n    network_mode: host\n    stop_signal: SIGKILL\n    \
                 environment: {{REVISION: \"{revision}\"}}\n    \
                 command: [/bin/busybox, httpd, -f, -h, /www, -p, \"{copy}\"]\n",
                self.bed.image
            ));
        }
        text
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = program(&self.program);
        command
            .arg("--file")
            .arg(self.bed.folder.path().join("compose.yaml"))
            .args(words);
        command
    }
}

impl Peer for Compose {
    fn address(&self) -> SocketAddr {
        self.bed.address()
    }

    fn replace(&mut self, revision: u64) -> Result<Duration, Failure> {
        let path = self.bed.folder.path().join("compose.yaml");
        fs::write(path, self.file(revision))?;
        let begun = Instant::now();
        said(&self.command(&["up", "--detach"]).output()?)?;
        Ok(begun.elapsed())
    }
}

impl Drop for Compose {
    fn drop(&mut self) {
        let down = self.command(&["down"]).output();
        if let Err(error) = down.map_err(Failure::from).and_then(|output| said(&output)) {
            eprintln!("warning: docker compose down: {error}");
        }
    }
}

/// A service of three tasks; each takes the first address that nobody has, so that old
/// and new can run side by side on one network.
struct Swarm {
    bed: Bed,
    /// Whether it was this that made the engine a manager.
    joined: bool,
}

pub fn swarm() -> Started {
    let bed = Bed::new("swarm", REPLICAS * 2)?;
    let state = program("docker")
        .args(["info", "--format", "{{.Swarm.LocalNodeState}}"])
        .output()?;
    let joined = String::from_utf8_lossy(&state.stdout).trim() != "active";
    if joined {
        let own = "127.0.0.1";
        let begun = program("docker")
            .args([
                "swarm",
                "init",
                "--advertise-addr",
                own,
                "--listen-addr",
                own,
            ])
            .output()?;
        said(&begun)?;
    }
    let mut all = Swarm { bed, joined };
    all.create()?;
    all.bed.put_haproxy_before()?;
    Ok(Box::new(all))
}

impl Swarm {
    fn name(&self) -> String {
        format!("kiln-bench-{}", std::process::id())
    }

    fn create(&self) -> Result<(), Failure> {
        let addresses: Vec<_> = self.bed.copies.iter().map(SocketAddr::to_string).collect();
        let first_free = format!(
            "for at in {}; do /bin/busybox httpd -f -h /www -p $at; done",
            addresses.join(" ")
        );
        let made = program("docker")
            .args(["service", "create", "--name", &self.name()])
            .args([
                "--network=host",
                "--no-resolve-image",
                "--stop-signal=SIGKILL",
            ])
            .args(["--update-order=start-first", "--env=REVISION=0"])
            .args(["--replicas", &REPLICAS.to_string(), &self.bed.image])
            .args(["/bin/busybox", "sh", "-c", &first_free])
            .output()?;
        said(&made)
    }
}

impl Peer for Swarm {
    fn address(&self) -> SocketAddr {
        self.bed.address()
    }

    fn replace(&mut self, revision: u64) -> Result<Duration, Failure> {
        let old = self.bed.running()?;
        let begun = Instant::now();
        let updated = program("docker")
            .args(["service", "update", "--detach", "--no-resolve-image"])
            .args(["--env-add", &format!("REVISION={revision}"), &self.name()])
            .output()?;
        said(&updated)?;
        while !old.is_disjoint(&self.bed.running()?) {
            if begun.elapsed() > LIMIT {
                return Err(format!("old tasks are still there: {old:?}").into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(begun.elapsed())
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        tidy(&["service", "rm", &self.name()]);
        let begun = Instant::now();
        while self.bed.running().is_ok_and(|left| !left.is_empty()) && begun.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(100));
        }
        if self.joined {
            tidy(&["swarm", "leave", "--force"]);
        }
    }
}

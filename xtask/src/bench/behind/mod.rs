//! What people do without kiln: another program's containers behind haproxy, replaced the
//! way that program replaces them. Each serves the same page with the same busybox as
//! kiln's bed, and ends at SIGKILL, the quickest end there is (busybox has no handler for
//! SIGTERM).

mod docker;
mod podman;

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use super::Failure;
use super::bed::free_address;
use super::peers::root;
use crate::cargo::program;

/// For haproxy to pass something on.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Somebody else's way to replace what serves at an address.
pub trait Peer {
    fn address(&self) -> SocketAddr;

    /// Puts this revision in place of what runs: from the command until the last old
    /// container is gone.
    fn replace(&mut self, revision: u64) -> Result<Duration, Failure>;
}

/// One that was started, or why it can't be.
pub type Started = Result<Box<dyn Peer>, Failure>;

type Start = fn() -> Started;

/// All, by name.
pub fn peers() -> Vec<(&'static str, Started)> {
    let all: [(&str, Start); 3] = [
        ("podman run --replace behind haproxy", podman::start),
        ("docker compose up behind haproxy", docker::compose),
        ("docker swarm start-first behind haproxy", docker::swarm),
    ];
    all.map(|(who, start)| (who, start())).into()
}

/// A root with the page, which engines must be able to enter.
fn site(folder: &Path) -> Result<PathBuf, Failure> {
    let root = root(folder)?;
    fs::create_dir_all(root.join("www"))?;
    fs::write(root.join("www/index.html"), "hello\n")?;
    Ok(root)
}

fn addresses(count: u32) -> Result<Vec<SocketAddr>, Failure> {
    (0..count).map(|_| free_address()).collect()
}

/// It asks each server every 100 ms whether it serves, and tries another when one doesn't.
struct Haproxy {
    address: SocketAddr,
    process: Child,
}

impl Haproxy {
    fn before(servers: &[SocketAddr], folder: &Path) -> Result<Self, Failure> {
        let address = free_address()?;
        let mut config = format!(
            "defaults\n  mode http\n  timeout connect 1s\n  timeout client 30s\n  \
             timeout server 30s\n  retries 3\n  option redispatch\n\
             frontend all\n  bind {address}\n  default_backend copies\n\
             backend copies\n  balance roundrobin\n  option httpchk GET /\n",
        );
        for (n, server) in servers.iter().enumerate() {
            config.push_str(&format!(
                "  server copy{n} {server} check inter 100ms fall 1 rise 1\n"
            ));
        }
        let path = folder.join("haproxy.cfg");
        fs::write(&path, config)?;
        let log = folder.join("haproxy.log");
        let process = program("haproxy")
            .arg("-f")
            .arg(&path)
            .stderr(fs::File::create(&log)?)
            .spawn()
            .map_err(|error| format!("haproxy: {error}"))?;
        let all = Self { address, process };
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            if begun.elapsed() > START_LIMIT {
                let said = fs::read_to_string(&log)?;
                return Err(format!("haproxy does not accept connections: {said}").into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(all)
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

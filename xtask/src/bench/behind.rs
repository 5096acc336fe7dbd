//! What people do without kiln: containers of another program behind haproxy, replaced one
//! after the other.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use super::Failure;
use super::bed::{REPLICAS, free_address};
use super::peers::{installed, root, said};
use crate::cargo::program;

/// For haproxy to pass something on.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Copies of busybox' httpd that podman runs, and the haproxy before them.
pub struct Podman {
    folder: tempfile::TempDir,
    pub address: SocketAddr,
    copies: Vec<SocketAddr>,
    haproxy: Option<Child>,
    /// Where podman's own choice can't start a container here (crun on hybrid cgroups).
    runtime: &'static [&'static str],
}

impl Podman {
    pub fn new() -> Result<Self, Failure> {
        installed("podman")?;
        if program("haproxy").arg("-v").output().is_err() {
            return Err("haproxy is not installed".into());
        }
        let folder = tempfile::Builder::new().prefix("kiln-bench-").tempdir()?;
        fs::create_dir_all(root(folder.path())?.join("www"))?;
        fs::write(folder.path().join("rootfs/www/index.html"), "hello\n")?;
        let copies = (0..REPLICAS).map(|_| free_address());
        let mut all = Self {
            address: free_address()?,
            copies: copies.collect::<Result<_, _>>()?,
            haproxy: None,
            runtime: &[],
            folder,
        };
        if all.replace_all(0).is_err() {
            all.runtime = &["--runtime", "runc"];
            all.replace_all(0)?;
        }
        all.put_haproxy_before()?;
        Ok(all)
    }

    /// All copies, one after the other; how long it took.
    pub fn replace_all(&self, revision: u64) -> Result<Duration, Failure> {
        let begun = Instant::now();
        for (n, copy) in self.copies.iter().enumerate() {
            let mut command = self.podman();
            command
                .args(["run", "--detach", "--replace", "--name", &self.name(n)])
                // busybox has no handler for SIGTERM; this is the quickest end there is.
                .args(["--network=host", "--stop-signal=KILL"])
                // podman's own limits are above what an unprivileged root may set.
                .args(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"])
                .args(["--env", &format!("REVISION={revision}"), "--rootfs"])
                .arg(self.root())
                .args(["/bin/busybox", "httpd", "-f", "-h", "/www", "-p"])
                .arg(copy.to_string());
            said(&command.output()?)?;
        }
        Ok(begun.elapsed())
    }

    fn put_haproxy_before(&mut self) -> Result<(), Failure> {
        let mut config = format!(
            "defaults\n  mode http\n  timeout connect 1s\n  timeout client 30s\n  \
             timeout server 30s\n  retries 3\n  option redispatch\n\
             frontend all\n  bind {}\n  default_backend copies\n\
             backend copies\n  balance roundrobin\n  option httpchk GET /\n",
            self.address
        );
        for (n, copy) in self.copies.iter().enumerate() {
            config.push_str(&format!(
                "  server copy{n} {copy} check inter 100ms fall 1 rise 1\n"
            ));
        }
        let path = self.folder.path().join("haproxy.cfg");
        fs::write(&path, config)?;
        self.haproxy = Some(program("haproxy").arg("-f").arg(&path).spawn()?);
        let begun = Instant::now();
        while TcpStream::connect(self.address).is_err() {
            if begun.elapsed() > START_LIMIT {
                return Err("haproxy does not accept connections".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn podman(&self) -> Command {
        let mut command = program("podman");
        command.args(self.runtime);
        command
    }

    fn name(&self, copy: usize) -> String {
        format!("kiln-bench-{}-{copy}", std::process::id())
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("rootfs")
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        if let Some(haproxy) = &mut self.haproxy {
            let _ = haproxy.kill();
            let _ = haproxy.wait();
        }
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

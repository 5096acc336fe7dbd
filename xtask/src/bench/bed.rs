//! The project that is measured, and the kiln that runs it.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::Failure;
use crate::cargo::{kiln, program, suite};

pub const REPLICAS: u32 = 3;
/// For the daemon, and then the proxy, to end when measuring is over.
const END_LIMIT: Duration = Duration::from_secs(15);

const CONTAINERFILE: &str = "\
FROM busybox AS packages
FROM scratch
COPY --from=packages /bin/busybox /bin/busybox
COPY index.html /www/index.html
EXPOSE 8000
CMD [\"/bin/busybox\", \"httpd\", \"-f\", \"-p\", \"8000\", \"-h\", \"/www\"]
";

pub struct Bed {
    folder: tempfile::TempDir,
    kiln: PathBuf,
    pub address: SocketAddr,
    suite: String,
}

impl Bed {
    pub fn new() -> Result<Self, Failure> {
        let kiln = kiln()?;
        let folder = tempfile::Builder::new().prefix("kiln-bench-").tempdir()?;
        fs::create_dir(folder.path().join("project"))?;
        fs::write(folder.path().join("project/Containerfile"), CONTAINERFILE)?;
        fs::write(folder.path().join("project/index.html"), "hello\n")?;
        Ok(Self {
            kiln,
            address: free_address()?,
            suite: suite(),
            folder,
        })
    }

    pub fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    pub fn scratch(&self) -> PathBuf {
        self.folder.path().join("scratch")
    }

    pub fn program(&self) -> &PathBuf {
        &self.kiln
    }

    /// `init`: busybox has no handler for SIGTERM, which a first process then ignores.
    fn compose(&self, revision: u64, replicas: u32) -> String {
        format!(
            "name: bench\n\
             x-kiln:\n  bases:\n    busybox: {{suite: {}, packages: [busybox-static], distroless: true}}\n\
             services:\n  web:\n    build: .\n    init: true\n    environment: {{REVISION: \"{revision}\"}}\n    \
             ports: [\"{}:8000\"]\n    deploy: {{replicas: {replicas}}}\n    \
             x-kiln: {{ready: {{http: {{port: 8000, path: /}}}}}}\n",
            self.suite, self.address
        )
    }

    /// Writes the project with this revision in its environment, and puts it in place.
    pub fn up(&self, revision: u64) -> Result<String, Failure> {
        self.up_with(revision, REPLICAS)
    }

    /// Puts a release with this page in place.
    pub fn page(&self, text: &str) -> Result<String, Failure> {
        fs::write(self.folder.path().join("project/index.html"), text)?;
        self.up(0)
    }

    /// A command that goes on by itself.
    pub fn begin(&self, words: &[&str]) -> Result<Child, Failure> {
        let mut command = self.command(words);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command.spawn()?)
    }

    /// More or fewer copies of the same.
    pub fn scale(&self, replicas: u32) -> Result<String, Failure> {
        self.up_with(0, replicas)
    }

    pub fn status(&self) -> Result<String, Failure> {
        self.kiln(&["status", &self.project()])
    }

    fn up_with(&self, revision: u64, replicas: u32) -> Result<String, Failure> {
        let compose = self.compose(revision, replicas);
        fs::write(self.folder.path().join("project/compose.yaml"), compose)?;
        self.kiln(&["up", &self.project()])
    }

    fn project(&self) -> String {
        self.folder.path().join("project").display().to_string()
    }

    /// What kiln prints to stdout.
    pub fn kiln(&self, words: &[&str]) -> Result<String, Failure> {
        let output = self.command(words).output()?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            return Err(format!("kiln {}: {}\n{errors}", words.join(" "), output.status).into());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = program(&self.kiln);
        command.args(words).env("KILN_ROOT", self.root());
        command
    }

    /// The ids of all instances that have not been removed.
    pub fn instances(&self) -> Result<BTreeSet<String>, Failure> {
        let entries = fs::read_dir(self.root().join("instances"))?;
        let folders = entries
            .flatten()
            .filter(|entry| entry.path().join("spec.json").exists());
        Ok(folders
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect())
    }

    /// The daemon's and the proxy's process ids.
    pub fn processes(&self) -> Result<Vec<u32>, Failure> {
        let status: serde_json::Value =
            serde_json::from_str(&self.kiln(&["--json", "daemon", "status"])?)?;
        let pid = |key: &str| status[key].as_u64().and_then(|pid| u32::try_from(pid).ok());
        let daemon = pid("pid").ok_or("the daemon's status has no pid")?;
        let proxy = pid("proxy_pid").ok_or("the daemon's status has no proxy_pid")?;
        Ok(vec![daemon, proxy])
    }
}

impl Drop for Bed {
    /// Nothing of a measurement may stay: instances, networks, the daemon, the proxy.
    fn drop(&mut self) {
        let processes = self.processes().unwrap_or_default();
        let project = self.project();
        for words in [vec!["down", &project], vec!["daemon", "stop"]] {
            if let Err(error) = self.kiln(&words) {
                eprintln!("warning: cleaning up: {error}");
            }
        }
        // The proxy outlives the daemon by design, and a living daemon starts it again.
        if let [daemon, proxy] = processes[..] {
            wait_for_end(daemon);
            let _ = program("kill").arg(proxy.to_string()).output();
            wait_for_end(proxy);
        }
    }
}

fn wait_for_end(pid: u32) {
    let begun = Instant::now();
    while Path::new("/proc").join(pid.to_string()).exists() && begun.elapsed() < END_LIMIT {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A port that nobody listens on just now.
pub fn free_address() -> Result<SocketAddr, Failure> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

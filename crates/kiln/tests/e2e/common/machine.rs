//! One kiln root for one test, and its cleaning up.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use kiln_runtime::net;
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use tempfile::TempDir;

use super::process::{Ran, Running, kill, wait_until};
use super::{Project, leftovers};

/// So many tests run at a time, whatever runs them: each is a small machine.
const AT_A_TIME: usize = 2;

/// A root of its own, the binary, and ports that nobody else takes.
pub struct Kiln {
    pub root: PathBuf,
    folder: TempDir,
    _turn: File,
}

impl Kiln {
    /// `None`: not root, and the test is skipped. In CI it may not be.
    pub fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("KILN_TEST_STRICT").is_none(), "needs root");
            eprintln!("SKIPPED: needs root");
            return None;
        }
        Some(Self::of_turn(turn()))
    }

    /// Another machine, as far as kiln can tell: a root of its own, within this one's turn.
    pub fn another(&self) -> Self {
        Self::of_turn(self._turn.try_clone().unwrap())
    }

    fn of_turn(turn: File) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("kiln-e2e-")
            .tempdir_in("/var/tmp")
            .unwrap();
        let root = folder.path().join("root");
        lend_packages(&root);
        Self {
            root,
            folder,
            _turn: turn,
        }
    }

    /// A folder of this test's own.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn command(&self, words: &[&str]) -> Command {
        self.command_of(Path::new(env!("CARGO_BIN_EXE_kiln")), words)
    }

    /// The same of another kiln.
    pub fn command_of(&self, program: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        for (key, _) in std::env::vars_os() {
            let name = key.to_string_lossy();
            if name.starts_with("KILN_") || name.starts_with("COMPOSE_") {
                command.env_remove(&key);
            }
        }
        command
            .arg("--root")
            .arg(&self.root)
            .args(words)
            .current_dir(self.folder.path())
            .env("USER", "tester")
            .env_remove("SUDO_USER")
            .env_remove("LOGNAME");
        command
    }

    #[track_caller]
    pub fn run(&self, words: &[&str]) -> Ran {
        Running::start(self.command(words)).end()
    }

    /// A project in a folder of its own, named like it.
    pub fn project(&self, name: &str, files: &[(&str, &str)]) -> Project<'_> {
        Project::new(self, name, files)
    }

    /// The daemon's process, if one answers.
    pub fn daemon(&self) -> Option<u32> {
        self.daemon_says("pid")
    }

    pub fn proxy(&self) -> Option<u32> {
        self.daemon_says("proxy_pid")
    }

    fn daemon_says(&self, field: &str) -> Option<u32> {
        let ran = self.run(&["daemon", "status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&ran.stdout).ok()?;
        u32::try_from(status[field].as_u64()?).ok()
    }

    /// Starts a daemon as a service manager would, and waits until it answers.
    #[track_caller]
    pub fn start_daemon(&self) -> Running {
        let daemon = Running::start(self.command(&["daemon", "run"]));
        let pid = daemon.pid();
        wait_until("a daemon that answers", || self.daemon() == Some(pid));
        daemon
    }

    #[track_caller]
    pub fn kill_daemon(&self) {
        let pid = self.daemon().expect("no daemon to kill");
        kill(pid, Signal::KILL);
        wait_until("the daemon's end", || !super::alive(pid));
    }

    /// The machine loses power: every process ends at once, and nothing that lives in
    /// the kernel is there after it.
    pub fn lose_power(&self) {
        for _ in 0..50 {
            let left = leftovers::processes(&self.root);
            if left.is_empty() {
                break;
            }
            for (pid, _) in left {
                kill(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for point in leftovers::mounts(&self.root) {
            let _ = rustix::mount::unmount(&point, rustix::mount::UnmountFlags::DETACH);
        }
        for bridge in leftovers::bridges(&self.root) {
            let _ = net::remove_bridge(&bridge);
        }
        let table = format!("kiln-{}", net::root_tag(&self.root));
        let _ = net::Firewall {
            table,
            networks: vec![],
            catch_all_port: None,
            recorder: None,
        }
        .remove();
        for group in leftovers::cgroups(&self.root) {
            remove_groups(&group);
        }
    }
}

impl Drop for Kiln {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["daemon.log", "proxy.log"] {
                let text = fs::read_to_string(self.root.join("run").join(name));
                let text = text.unwrap_or_default();
                let from = text.lines().count().saturating_sub(60);
                let last: Vec<&str> = text.lines().skip(from).collect();
                eprintln!("--- {name}\n{}", last.join("\n"));
            }
            if std::env::var_os("KILN_TEST_KEEP").is_some() {
                eprintln!("kept: {}", self.folder.path().display());
                self.folder.disable_cleanup(true);
                return;
            }
        }
        self.lose_power();
        let tag = format!("kiln-{}", net::root_tag(&self.root));
        let top = Path::new("/sys/fs/cgroup");
        let hierarchies = fs::read_dir(top)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path());
        for hierarchy in hierarchies.chain([top.to_owned()]) {
            remove_groups(&hierarchy.join(&tag));
        }
    }
}

fn remove_groups(group: &Path) {
    for below in fs::read_dir(group).into_iter().flatten().flatten() {
        if below.file_type().is_ok_and(|t| t.is_dir()) {
            remove_groups(&below.path());
        }
    }
    let _ = fs::remove_dir(group);
}

/// Debian's packages are fetched once for all tests.
pub fn lend_packages(root: &Path) {
    fs::create_dir_all(root.join("cache")).unwrap();
    fs::create_dir_all(shared().join("debian")).unwrap();
    std::os::unix::fs::symlink(shared().join("debian"), root.join("cache/debian")).unwrap();
}

/// What tests share between runs, too: packages, and locks.
pub fn shared() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("kiln-e2e")
}

/// Waits until fewer than [`AT_A_TIME`] others are at it, in this process or another.
fn turn() -> File {
    fs::create_dir_all(shared()).unwrap();
    let slots: Vec<File> = (0..AT_A_TIME)
        .map(|n| {
            let path = shared().join(format!("turn-{n}"));
            OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(path)
                .unwrap()
        })
        .collect();
    loop {
        for slot in &slots {
            if flock(slot, FlockOperation::NonBlockingLockExclusive).is_ok() {
                return slot.try_clone().unwrap();
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A TCP port nobody listens on, below those which the system gives out by itself.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 10_000;
    let start = (std::process::id() % u32::from(COUNT)) as u16;
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + (start.wrapping_mul(37).wrapping_add(step)) % COUNT;
        if std::net::TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return port;
        }
    }
}

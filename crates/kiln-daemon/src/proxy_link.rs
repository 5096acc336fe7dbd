//! The proxy's process: found or started, watched, and told what to do. It is a process
//! of its own and outlives the daemon.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use kiln_model::{InstanceId, Millis, RoutingTable, Traffic};
use kiln_proxy::Client;
use tokio::sync::{Mutex, oneshot};
use tokio::time::Instant;

use crate::shared::ended;

/// How long a new proxy may take to answer.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How often it is looked for until then.
const START_LOOK: Duration = Duration::from_millis(20);
/// What makes a new proxy take the place of the one that there is.
const TAKE_OVER: &str = "--take-over";

/// Tells how a proxy that this daemon started has ended.
type Ended = oneshot::Receiver<std::io::Result<ExitStatus>>;

pub struct ProxyLink {
    root: PathBuf,
    /// Runs this program as proxy.
    command: Vec<OsString>,
    socket: PathBuf,
    /// Held while a proxy is being started: two must not be.
    starting: Mutex<()>,
}

impl ProxyLink {
    pub fn new(root: PathBuf, command: Vec<OsString>) -> Self {
        let socket = root.join("run/proxy.sock");
        Self {
            root,
            command,
            socket,
            starting: Mutex::new(()),
        }
    }

    /// A connection to the proxy, which is started if none answers.
    async fn client(&self) -> Result<Client, String> {
        if let Ok(client) = Client::connect(&self.socket).await {
            return Ok(client);
        }
        let _one = self.starting.lock().await;
        if let Ok(client) = Client::connect(&self.socket).await {
            return Ok(client);
        }
        let ended = self.spawn(&[])?;
        self.new_proxy(ended, None).await?;
        let client = Client::connect(&self.socket).await;
        client.map_err(|e| e.to_string())
    }

    /// Puts this program's proxy in the place of one that another program runs, which is
    /// how a new kiln comes in: no listener or connection is closed. If it can't be done,
    /// the proxy that there is goes on.
    pub async fn renew(&self) -> Result<(), String> {
        let _one = self.starting.lock().await;
        let Some(old) = self.pid() else {
            return Ok(());
        };
        let program = self.command.first().map(Path::new);
        if program.is_none_or(|program| runs(old, program)) {
            return Ok(());
        }
        let ended = self.spawn(&[TAKE_OVER])?;
        let pid = self.new_proxy(ended, Some(old)).await?;
        tracing::info!(old, new = pid, "this program's proxy has taken over");
        Ok(())
    }

    /// Waits until another than the old proxy listens; which one.
    async fn new_proxy(&self, mut ended: Ended, old: Option<u32>) -> Result<u32, String> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(pid) = self.pid().filter(|pid| Some(*pid) != old) {
                return Ok(pid);
            }
            let why = match ended.try_recv() {
                Ok(Ok(status)) => status.to_string(),
                _ if Instant::now() > deadline => "it does not answer".to_owned(),
                _ => {
                    tokio::time::sleep(START_LOOK).await;
                    continue;
                }
            };
            let log = self.root.join("run/proxy.log");
            return Err(format!(
                "the proxy did not start: {why}; see {}",
                log.display()
            ));
        }
    }

    fn spawn(&self, more: &[&str]) -> Result<Ended, String> {
        let log_path = self.root.join("run/proxy.log");
        let fail = |e: std::io::Error| format!("the proxy could not be started: {e}");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(fail)?;
        let (program, arguments) = self
            .command
            .split_first()
            .ok_or("the proxy's command is empty")?;
        let mut child = Command::new(program)
            .args(arguments)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .current_dir("/")
            .spawn()
            .map_err(fail)?;
        let (tell, ended) = oneshot::channel();
        // Also there to reap it, should it end when nobody asks any more.
        std::thread::spawn(move || tell.send(child.wait()));
        Ok(ended)
    }

    /// Returns when the present proxy has ended, having started it if there was none.
    pub async fn ended(&self) -> Result<(), String> {
        self.client().await?;
        let Some(pid) = self.pid() else {
            // It went away in between.
            return Ok(());
        };
        let raw = rustix::process::Pid::from_raw(pid as i32).ok_or("the proxy's pid is 0")?;
        let fd = match rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(error) => return Err(format!("the proxy can't be watched: {error}")),
        };
        ended(fd).await.map_err(|e| e.to_string())
    }

    /// Ends the proxy, if one runs; open connections have their time to end.
    pub async fn stop(&self) -> Result<(), String> {
        let Ok(client) = Client::connect(&self.socket).await else {
            return Ok(());
        };
        client.shutdown().await.map_err(|e| e.to_string())
    }

    /// The process behind the control socket.
    pub fn pid(&self) -> Option<u32> {
        let stream = std::os::unix::net::UnixStream::connect(&self.socket).ok()?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
    }

    pub async fn catch_all_port(&self) -> Result<u16, String> {
        let ports = self
            .client()
            .await?
            .ports()
            .await
            .map_err(|e| e.to_string())?;
        Ok(ports.catch_all)
    }

    /// Applies a table; `Some` says which ports could not be opened and why.
    pub async fn apply(&self, table: &RoutingTable) -> Result<Option<String>, String> {
        let applied = self
            .client()
            .await?
            .apply(table)
            .await
            .map_err(|e| e.to_string())?;
        let failed: Vec<String> = applied.failed.iter().map(ToString::to_string).collect();
        Ok((!failed.is_empty()).then(|| failed.join("; ")))
    }

    /// What the proxy has counted of these.
    pub async fn traffic(
        &self,
        of: Vec<InstanceId>,
    ) -> Result<BTreeMap<InstanceId, Traffic>, String> {
        let client = self.client().await?;
        client.traffic(of).await.map_err(|e| e.to_string())
    }

    /// What it has counted; one that does not run is not started for it.
    pub async fn status(&self) -> Result<kiln_proxy::Status, kiln_proxy::ClientError> {
        Client::connect(&self.socket).await?.status().await
    }

    pub async fn drain(&self, id: &InstanceId, limit: Millis) -> Result<u32, String> {
        let report = self
            .client()
            .await?
            .drain(id, limit)
            .await
            .map_err(|e| e.to_string())?;
        Ok(report.cut)
    }
}

/// Whether the process runs the program that is at this path now. What can't be told is
/// taken for the same.
pub fn runs(pid: u32, program: &Path) -> bool {
    let runs = fs::metadata(format!("/proc/{pid}/exe"));
    let (Ok(runs), Ok(program)) = (runs, fs::metadata(program)) else {
        return true;
    };
    (runs.dev(), runs.ino()) == (program.dev(), program.ino())
}

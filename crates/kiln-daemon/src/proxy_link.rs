//! The proxy's process: found or started, watched, and told what to do. It is a process
//! of its own and outlives the daemon.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use kiln_model::{InstanceId, Millis, RoutingTable};
use kiln_proxy::Client;
use tokio::sync::Mutex;

use crate::shared::ended;

/// How long a new proxy may take to answer.
const START_LIMIT: Duration = Duration::from_secs(10);

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
        self.spawn()?;
        let deadline = tokio::time::Instant::now() + START_LIMIT;
        loop {
            match Client::connect(&self.socket).await {
                Ok(client) => return Ok(client),
                Err(error) if tokio::time::Instant::now() > deadline => {
                    return Err(format!(
                        "the proxy did not start: {error}; see {}",
                        self.root.join("run/proxy.log").display()
                    ));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    fn spawn(&self) -> Result<(), String> {
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
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .current_dir("/")
            .spawn()
            .map_err(fail)?;
        // Only there to reap it should it end while this daemon lives.
        std::thread::spawn(move || child.wait());
        Ok(())
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

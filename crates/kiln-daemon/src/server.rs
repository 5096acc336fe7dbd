//! Starts and ends the daemon: one per root, engines for every stored environment, the
//! API on its socket.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_plan::Event;
use kiln_runtime::{Runtime, RuntimeConfig, net};
use kiln_store::Store;
use kiln_trust::{AuditLog, SecretStore};
use rustix::fs::{FlockOperation, flock};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast;

use crate::api;
use crate::engine::{self, Message};
use crate::networks::{Networks, is_down};
use crate::proxy_link::ProxyLink;
use crate::shared::{EVENT_QUEUE, Shared, blocking};
use crate::state::State;

/// What is changed within this time is looked at together.
const SETTLED: Duration = Duration::from_millis(50);

/// What the daemon is told by whoever starts it.
pub struct DaemonConfig {
    /// KILN_ROOT.
    pub root: PathBuf,
    /// Runs this program as an instance's shim.
    pub shim: Vec<OsString>,
    /// Runs this program as the proxy.
    pub proxy: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("another daemon (pid {pid}) already runs on {root}")]
    AlreadyRunning { root: PathBuf, pid: String },
    #[error("{what} {path}: {source}")]
    Io {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{0}")]
    Part(String),
}

fn part(error: impl std::fmt::Display) -> DaemonError {
    DaemonError::Part(error.to_string())
}

/// The API's socket under a root.
pub fn socket_path(root: &Path) -> PathBuf {
    root.join("run/kiln.sock")
}

/// Locked as long as a daemon runs on the root; holds its pid.
pub fn lock_path(root: &Path) -> PathBuf {
    root.join("run/daemon.lock")
}

/// Runs until SIGTERM, SIGINT or a call to shut down. Services go on; where there are none,
/// the proxy ends too.
pub async fn run(config: DaemonConfig) -> Result<(), DaemonError> {
    let root = config.root.clone();
    let io = |what, path: &Path| {
        let path = path.to_owned();
        move |source| DaemonError::Io { what, path, source }
    };
    let folder = root.join("run");
    fs::create_dir_all(&folder).map_err(io("making", &folder))?;
    fs::set_permissions(&root, Permissions::from_mode(0o700)).map_err(io("securing", &root))?;
    // Kept to the last moment of the process: threads may still carry something out when
    // this has returned.
    std::mem::forget(lock(&root)?);
    let shared = open(config)?;
    if let Err(cause) = shared.proxy.renew().await {
        tracing::warn!(%cause, "the proxy of an earlier kiln goes on");
    }
    let socket = socket_path(&root);
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).map_err(io("listening on", &socket))?;
    fs::set_permissions(&socket, Permissions::from_mode(0o600)).map_err(io("securing", &socket))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(io("signals of", &root))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io("signals of", &root))?;
    let (stop, mut stopped) = tokio::sync::mpsc::channel(1);
    let router = api::router(shared.clone(), stop);
    let watch = tokio::spawn(watch_proxy(shared.clone()));
    let firewall = shared.clone();
    tokio::spawn(async move {
        if let Err(cause) = watch_firewall(firewall).await {
            tracing::warn!(cause, "what other programs do to the firewall is not seen");
        }
    });
    tracing::info!(root = %root.display(), "serving");
    tokio::select! {
        served = axum::serve(listener, router) => served.map_err(io("serving", &socket))?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = stopped.recv() => {
            // The answer to the call that asked for it is on its way.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let _ = fs::remove_file(&socket);
    watch.abort();
    if (shared.state.environments().map_err(part)?.iter()).all(is_down) {
        shared.proxy.stop().await.map_err(part)?;
    }
    Ok(())
}

/// One daemon per root; the lock goes with the process, however it ends.
fn lock(root: &Path) -> Result<File, DaemonError> {
    let path = lock_path(root);
    let io = |source| DaemonError::Io {
        what: "locking",
        path: path.clone(),
        source,
    };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(io)?;
    // Who waits for a daemon's end has it too, for a moment.
    let free = (0..5).any(|_| {
        let mine = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if !mine {
            std::thread::sleep(Duration::from_millis(10));
        }
        mine
    });
    if !free {
        let pid = fs::read_to_string(&path)
            .unwrap_or_default()
            .trim()
            .to_owned();
        return Err(DaemonError::AlreadyRunning {
            root: root.to_owned(),
            pid,
        });
    }
    file.set_len(0).map_err(io)?;
    fs::write(&path, std::process::id().to_string()).map_err(io)?;
    Ok(file)
}

fn open(config: DaemonConfig) -> Result<Arc<Shared>, DaemonError> {
    let root = config.root;
    let state = State::open(&root).map_err(part)?;
    let worlds = state.environments().map_err(part)?;
    let runtime = Runtime::open(RuntimeConfig {
        root: root.clone(),
        shim: config.shim,
    })
    .map_err(part)?;
    let (events, _) = broadcast::channel(EVENT_QUEUE);
    let shared = Arc::new(Shared {
        started: Shared::now(),
        store: Arc::new(Store::open(&root).map_err(part)?),
        runtime: Arc::new(runtime),
        secrets: SecretStore::open(&root).map_err(part)?,
        audit: AuditLog::open(&root).map_err(part)?,
        proxy: ProxyLink::new(root.clone(), config.proxy),
        networks: Networks::new(&root, &worlds, state.networks().map_err(part)?),
        state,
        events,
        engines: Mutex::new(BTreeMap::new()),
        root,
    });
    for world in worlds {
        let name = world.environment.clone();
        let handle = engine::spawn(shared.clone(), world);
        shared
            .engines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name, handle);
    }
    Ok(shared)
}

/// Whenever the proxy ends it is started again and told everything anew.
async fn watch_proxy(shared: Arc<Shared>) {
    loop {
        if let Err(cause) = shared.proxy.ended().await {
            tracing::error!(%cause, "proxy");
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        tracing::warn!("the proxy ended; starting it again");
        for engine in shared.all_engines() {
            // An engine only ends with the daemon.
            let _ = engine.send(Message::Event(Event::ProxyRestarted)).await;
        }
    }
}

/// Whenever another program takes the firewall's table away, it is put back.
// `new` is deprecated for descriptors that might be closed meanwhile; this one is owned.
#[allow(deprecated)]
async fn watch_firewall(shared: Arc<Shared>) -> Result<(), String> {
    let watch = net::RulesetWatch::open().map_err(|e| e.to_string())?;
    let watch = AsyncFd::new(watch).map_err(|e| e.to_string())?;
    loop {
        let mut ready = watch.readable().await.map_err(|e| e.to_string())?;
        // Who reloads all rules does so in several changes.
        tokio::time::sleep(SETTLED).await;
        ready.clear_ready();
        watch.get_ref().clear().map_err(|e| e.to_string())?;
        if !shared.networks.any_stand() {
            continue;
        }
        let inner = shared.clone();
        let mended = match shared.proxy.catch_all_port().await {
            Ok(port) => blocking(move || inner.networks.mend(port)).await,
            Err(cause) => Ok(Err(cause)),
        };
        match mended.and_then(|mended| mended) {
            Ok(true) => tracing::warn!("another program removed the firewall's table; it is back"),
            Ok(false) => {}
            Err(cause) => tracing::error!(cause, "the firewall"),
        }
    }
}

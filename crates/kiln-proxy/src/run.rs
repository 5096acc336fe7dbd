//! The process: start, serve, end.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::Client;
use crate::control::server::{Socket, SocketError};
use crate::core::Core;
use crate::handover::{self, TakeOverError};
use crate::limits::{CONNECTIONS, POOL_SWEEP, RESERVED_FILES, SHUTDOWN};
use crate::state::{self, StateError};

/// Threads which serve.
const WORKERS: usize = 2;

#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// The control socket. Made with mode 0600; its folder must exist.
    pub socket: PathBuf,
    /// Where the tables are kept for the next start. Its folder must exist.
    pub state: PathBuf,
    /// Where redirected connections to service addresses arrive. Port 0: the one of the
    /// last start if it is free, else any.
    pub catch_all: SocketAddr,
    /// Names the host's name servers.
    pub resolv_conf: PathBuf,
    /// The port of DNS on the gateways. 53, but for tests.
    pub dns_port: u16,
    /// Takes the place of a proxy that has the control socket, without a closed listener
    /// or connection. Else a second proxy is refused.
    pub take_over: bool,
}

impl ProxyConfig {
    /// With what is usual for all but the files.
    pub fn new(socket: PathBuf, state: PathBuf) -> Self {
        Self {
            socket,
            state,
            catch_all: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            dns_port: 53,
            take_over: false,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    TakeOver(#[from] TakeOverError),
    #[error("can't listen on {address} for service addresses")]
    CatchAll {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("can't start")]
    Start(#[source] std::io::Error),
}

/// Runs the proxy on a runtime of its own, until it has ended.
pub fn run_blocking(config: ProxyConfig) -> Result<(), ProxyError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(2)
        .thread_name("kiln-proxy")
        .enable_all()
        .build()
        .map_err(ProxyError::Start)?;
    runtime.block_on(run(config))
}

/// Serves until SIGTERM, SIGINT or a request to end; then takes nothing new, finishes
/// open requests for up to 10 s, and returns. Raises the limit of open files as far as
/// it may.
pub async fn run(config: ProxyConfig) -> Result<(), ProxyError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ProxyError::Start)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ProxyError::Start)?;
    let first = match Socket::bind(&config.socket) {
        Err(SocketError::Running(_)) if config.take_over => None,
        bound => Some(bound?),
    };
    let core = Core::new(
        config.state.clone(),
        config.resolv_conf.clone(),
        config.dns_port,
        connections(raise_open_files()),
    );
    let socket = match first {
        Some(socket) => {
            begin(&core, &config).await?;
            socket
        }
        None => succeed(&core, &config).await?,
    };
    core.succeed(&config.socket).await;
    core.save().await?;
    let socket = Arc::new(socket);

    let (shutdown, mut asked) = watch::channel(false);
    tokio::select! {
        () = socket.serve(Arc::clone(&core), shutdown) => {}
        () = sweep(&core) => {}
        () = core.left() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = asked.wait_for(|asked| *asked) => {}
    }
    core.end(SHUTDOWN).await;
    Ok(())
}

/// Opens the catch-all, and whatever the last tables say.
async fn begin(core: &Arc<Core>, config: &ProxyConfig) -> Result<(), ProxyError> {
    let state = state::load(&config.state)?;
    open_catch_all(core, config.catch_all, state.catch_all).await?;
    core.restore(state.tables).await;
    Ok(())
}

/// Serves beside the running proxy, then instead of it. What it was told while both did is
/// in the state file, which is why that is read again.
async fn succeed(core: &Arc<Core>, config: &ProxyConfig) -> Result<Socket, ProxyError> {
    let running = Client::connect(&config.socket)
        .await
        .map_err(TakeOverError::from)?;
    let path = config.socket.clone();
    let taken = tokio::task::spawn_blocking(move || handover::take(&path)).await;
    core.inherit(taken.map_err(|e| ProxyError::Start(e.into()))??)
        .await;
    begin(core, config).await?;
    running.retire().await.map_err(TakeOverError::from)?;
    let socket = Socket::bind(&config.socket)?;
    core.restore(state::load(&config.state)?.tables).await;
    Ok(socket)
}

/// Takes the port of the last start again if it is free: the firewall knows it.
async fn open_catch_all(
    core: &Arc<Core>,
    address: SocketAddr,
    last: u16,
) -> Result<(), ProxyError> {
    if address.port() == 0 && last != 0 {
        let again = SocketAddr::new(address.ip(), last);
        match core.open_catch_all(again).await {
            Ok(_) => return Ok(()),
            Err(error) => tracing::warn!(%error, port = last, "the catch-all moves"),
        }
    }
    match core.open_catch_all(address).await {
        Ok(_) => Ok(()),
        Err(source) => Err(ProxyError::CatchAll { address, source }),
    }
}

async fn sweep(core: &Core) {
    let mut tick = tokio::time::interval(POOL_SWEEP);
    loop {
        tick.tick().await;
        core.sweep().await;
    }
}

/// Returns the limit in effect.
fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let in_effect = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    in_effect.unwrap_or(u64::MAX)
}

/// How many clients fit: each takes two descriptors.
fn connections(open_files: u64) -> usize {
    let fit = open_files.saturating_sub(RESERVED_FILES) / 2;
    usize::try_from(fit.clamp(16, CONNECTIONS)).unwrap_or(16)
}

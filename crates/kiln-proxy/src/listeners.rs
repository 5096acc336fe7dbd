//! The only owner of listening sockets. A socket that both the old and the new tables want
//! is never touched; so a table can be applied at any rate without a lost connection,
//! and the sockets could be handed to another process from here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use kiln_model::ServiceName;
use kiln_model::spec::Protocol;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::core::Core;
use crate::routes::Entry;
use crate::status::{ListenFailure, Purpose};
use crate::{connection, dns, holder, sockets, udp};

/// Something to listen on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wanted {
    CatchAll(SocketAddr),
    Published(SocketAddr, Protocol),
    Dns(Ipv4Addr, u16),
}

/// A wanted listener, and for whom: for what is told about a failure.
pub(crate) type Wishes = BTreeMap<Wanted, Purpose>;

#[derive(Default)]
pub(crate) struct Listeners {
    held: BTreeMap<Wanted, Held>,
}

/// The sockets, and the tasks which take from them.
struct Held {
    tasks: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
    local: SocketAddr,
}

impl Held {
    /// Returns when the sockets are closed.
    async fn end(self) {
        for (stop, task) in self.tasks {
            drop(stop);
            if task.await.is_err() {
                tracing::warn!("a listener's task had failed");
            }
        }
    }
}

impl Listeners {
    /// Closes what is not wanted any more and opens what is missing. What fails is told,
    /// and everything else is in effect.
    pub(crate) async fn reconcile(
        &mut self,
        core: &Arc<Core>,
        wishes: &Wishes,
    ) -> BTreeMap<Wanted, ListenFailure> {
        let keys: BTreeSet<Wanted> = self.held.keys().cloned().collect();
        for old in keys {
            if !wishes.contains_key(&old) && !matches!(old, Wanted::CatchAll(_)) {
                self.close(&old).await;
            }
        }
        let mut failed = BTreeMap::new();
        for (wanted, purpose) in wishes {
            if !self.held.contains_key(wanted)
                && let Err(error) = self.open(core, wanted.clone())
            {
                let failure = explain(wanted, purpose.clone(), &error).await;
                failed.insert(wanted.clone(), failure);
            }
        }
        failed
    }

    /// Returns the address that is listened on.
    pub(crate) fn open(&mut self, core: &Arc<Core>, wanted: Wanted) -> std::io::Result<SocketAddr> {
        let held = match wanted {
            Wanted::CatchAll(address) => open_tcp(core, address, None)?,
            Wanted::Published(address, Protocol::Tcp) => {
                open_tcp(core, address, Some(Entry::Published(address)))?
            }
            Wanted::Published(address, Protocol::Udp) => {
                let socket = Arc::new(sockets::bind_udp(address)?);
                let local = socket.local_addr()?;
                let relay = udp::relay(Arc::clone(core), socket, address);
                Held {
                    tasks: vec![until_stopped(relay)],
                    local,
                }
            }
            Wanted::Dns(gateway, port) => open_dns(core, gateway, port)?,
        };
        let local = held.local;
        self.held.insert(wanted, held);
        Ok(local)
    }

    async fn close(&mut self, wanted: &Wanted) {
        if let Some(held) = self.held.remove(wanted) {
            held.end().await;
        }
    }

    pub(crate) async fn close_all(&mut self) {
        for (_, held) in std::mem::take(&mut self.held) {
            held.end().await;
        }
    }
}

fn open_tcp(core: &Arc<Core>, address: SocketAddr, entry: Option<Entry>) -> std::io::Result<Held> {
    let listener = sockets::listen(address)?;
    let local = listener.local_addr()?;
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(accept_all(Arc::clone(core), listener, entry, stopped));
    Ok(Held {
        tasks: vec![(stop, task)],
        local,
    })
}

fn open_dns(core: &Arc<Core>, gateway: Ipv4Addr, port: u16) -> std::io::Result<Held> {
    let local = dns::address(gateway, port);
    let datagrams = Arc::new(sockets::bind_udp(local)?);
    let streams = Arc::new(sockets::listen(local)?);
    Ok(Held {
        tasks: vec![
            until_stopped(dns::serve_udp(Arc::clone(core), datagrams, gateway)),
            until_stopped(dns::serve_tcp(Arc::clone(core), streams, gateway)),
        ],
        local,
    })
}

fn until_stopped(
    serve: impl Future<Output = ()> + Send + 'static,
) -> (oneshot::Sender<()>, JoinHandle<()>) {
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        tokio::select! {
            () = serve => {}
            _ = stopped => {}
        }
    });
    (stop, task)
}

/// Takes connections until it is stopped; what the kernel has accepted by then is still
/// served. `entry`: `None` for the catch-all, where each connection tells its own.
async fn accept_all(
    core: Arc<Core>,
    listener: TcpListener,
    entry: Option<Entry>,
    mut stopped: oneshot::Receiver<()>,
) {
    loop {
        let Some(place) = core.place().await else {
            return;
        };
        let accepted = tokio::select! {
            biased;
            accepted = accept(&listener) => accepted,
            _ = &mut stopped => break,
        };
        if let Some((stream, peer)) = accepted {
            spawn(&core, stream, peer, entry, place);
        }
    }
    while let Some(place) = core.try_place()
        && let Some(Ok((stream, peer))) = futures_util::FutureExt::now_or_never(listener.accept())
    {
        spawn(&core, stream, peer, entry, place);
    }
}

fn spawn(
    core: &Arc<Core>,
    stream: TcpStream,
    peer: SocketAddr,
    entry: Option<Entry>,
    place: tokio::sync::OwnedSemaphorePermit,
) {
    let entry = match entry {
        Some(entry) => entry,
        None => match sockets::original_destination(&stream) {
            Ok(address) => Entry::Service(address),
            Err(_) => return,
        },
    };
    let (core, opened) = (Arc::clone(core), core.opened());
    tokio::spawn(async move {
        connection::serve(core, stream, peer, entry).await;
        drop((place, opened));
    });
}

/// `None` when nothing was accepted: the client has gone again, or there are no more
/// file descriptors, which passes.
pub(crate) async fn accept(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    match listener.accept().await {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            if error.kind() != std::io::ErrorKind::ConnectionAborted {
                tracing::warn!(%error, "accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            None
        }
    }
}

async fn explain(wanted: &Wanted, purpose: Purpose, error: &std::io::Error) -> ListenFailure {
    let (listen, protocol) = match wanted {
        Wanted::CatchAll(address) => (*address, Protocol::Tcp),
        Wanted::Published(address, protocol) => (*address, *protocol),
        Wanted::Dns(gateway, port) => (dns::address(*gateway, *port), Protocol::Udp),
    };
    let taken = error.kind() == std::io::ErrorKind::AddrInUse;
    let holder = if taken {
        let found = tokio::task::spawn_blocking(move || holder::holder(listen, protocol)).await;
        found.ok().flatten()
    } else {
        None
    };
    ListenFailure {
        listen,
        purpose,
        cause: cause(error),
        holder,
    }
}

fn cause(error: &std::io::Error) -> String {
    use std::io::ErrorKind::{AddrInUse, AddrNotAvailable, PermissionDenied};
    match error.kind() {
        AddrInUse => "the port is in use by another program".into(),
        AddrNotAvailable => "this host does not have the address (yet)".into(),
        PermissionDenied => "the proxy may not listen on this port".into(),
        _ => error.to_string(),
    }
}

/// What is told when another environment has the port.
pub(crate) fn taken_by(
    listen: SocketAddr,
    protocol: Protocol,
    service: &ServiceName,
    environment: &kiln_model::EnvironmentName,
) -> ListenFailure {
    ListenFailure {
        listen,
        purpose: Purpose::Published {
            service: service.clone(),
            protocol,
        },
        cause: format!("environment `{environment}` publishes this port already"),
        holder: None,
    }
}

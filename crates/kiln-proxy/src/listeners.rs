//! The only owner of listening sockets. A socket that both the old and the new tables want
//! is never touched; so a table can be applied at any rate without a lost connection,
//! and from here the sockets are handed to another process.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use kiln_model::ServiceName;
use kiln_model::spec::Protocol;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::core::Core;
use crate::handover::Sockets;
use crate::routes::Entry;
use crate::status::{ListenFailure, Purpose};
use crate::{connection, dns, holder, sockets, udp};

/// Something to listen on. A part of what proxies say to each other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Wanted {
    CatchAll(SocketAddr),
    Published(SocketAddr, Protocol),
    Dns(Ipv4Addr, u16),
}

/// A wanted listener, and for whom: for what is told about a failure.
pub(crate) type Wishes = BTreeMap<Wanted, Purpose>;

#[derive(Default)]
pub(crate) struct Listeners {
    held: BTreeMap<Wanted, Held>,
    /// Of the proxy before this one, until they are wanted or forgotten.
    inherited: BTreeMap<Wanted, VecDeque<OwnedFd>>,
}

/// The sockets, and the tasks which take from them.
struct Held {
    tasks: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
    /// For another proxy to take over.
    sockets: Vec<OwnedFd>,
    local: SocketAddr,
}

impl Held {
    /// Returns when the sockets are closed.
    async fn end(self) {
        drop(self.sockets);
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
        let mut ready = self.inherited.remove(&wanted).unwrap_or_default();
        let held = match wanted {
            Wanted::CatchAll(address) => open_tcp(core, &mut ready, address, None)?,
            Wanted::Published(address, Protocol::Tcp) => {
                open_tcp(core, &mut ready, address, Some(Entry::Published(address)))?
            }
            Wanted::Published(address, Protocol::Udp) => {
                let socket = Arc::new(udp(&mut ready, address)?);
                let local = socket.local_addr()?;
                let sockets = vec![socket.as_fd().try_clone_to_owned()?];
                let relay = udp::relay(Arc::clone(core), socket, address);
                Held {
                    tasks: vec![until_stopped(relay)],
                    sockets,
                    local,
                }
            }
            Wanted::Dns(gateway, port) => open_dns(core, &mut ready, gateway, port)?,
        };
        let local = held.local;
        self.held.insert(wanted, held);
        Ok(local)
    }

    /// Copies of all sockets. The catch-all's goes by the address it really has.
    pub(crate) fn copies(&self) -> std::io::Result<Sockets> {
        let mut copies = Sockets::new();
        for (wanted, held) in &self.held {
            let wanted = match wanted {
                Wanted::CatchAll(_) => Wanted::CatchAll(held.local),
                other => other.clone(),
            };
            for socket in &held.sockets {
                copies.push((wanted.clone(), socket.try_clone()?));
            }
        }
        Ok(copies)
    }

    /// Has these ready for when they are wanted.
    pub(crate) fn inherit(&mut self, sockets: Sockets) {
        for (wanted, socket) in sockets {
            self.inherited.entry(wanted).or_default().push_back(socket);
        }
    }

    /// Closes what was inherited and is not wanted.
    pub(crate) fn disinherit(&mut self) {
        self.inherited.clear();
    }

    /// Takes nothing new; answers to UDP clients still come, until they are silent.
    pub(crate) async fn retire(&mut self, core: &Arc<Core>) {
        for (wanted, held) in std::mem::take(&mut self.held) {
            if !matches!(wanted, Wanted::Published(_, Protocol::Udp)) {
                held.end().await;
                continue;
            }
            let open = core.opened(None);
            tokio::spawn(async move {
                for (stop, task) in held.tasks {
                    let _ = task.await;
                    drop(stop);
                }
                drop(open);
            });
        }
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

/// The socket that is there already, else a new one.
fn tcp(ready: &mut VecDeque<OwnedFd>, address: SocketAddr) -> std::io::Result<TcpListener> {
    match ready.pop_front() {
        Some(fd) => TcpListener::from_std(fd.into()),
        None => sockets::listen(address),
    }
}

fn udp(ready: &mut VecDeque<OwnedFd>, address: SocketAddr) -> std::io::Result<UdpSocket> {
    match ready.pop_front() {
        Some(fd) => UdpSocket::from_std(fd.into()),
        None => sockets::bind_udp(address),
    }
}

fn open_tcp(
    core: &Arc<Core>,
    ready: &mut VecDeque<OwnedFd>,
    address: SocketAddr,
    entry: Option<Entry>,
) -> std::io::Result<Held> {
    let listener = tcp(ready, address)?;
    let local = listener.local_addr()?;
    let copy = listener.as_fd().try_clone_to_owned()?;
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(accept_all(Arc::clone(core), listener, entry, stopped));
    Ok(Held {
        tasks: vec![(stop, task)],
        sockets: vec![copy],
        local,
    })
}

fn open_dns(
    core: &Arc<Core>,
    ready: &mut VecDeque<OwnedFd>,
    gateway: Ipv4Addr,
    port: u16,
) -> std::io::Result<Held> {
    let local = dns::address(gateway, port);
    let datagrams = Arc::new(udp(ready, local)?);
    let streams = Arc::new(tcp(ready, local)?);
    let copies = [datagrams.as_fd(), streams.as_fd()].map(|fd| fd.try_clone_to_owned());
    let [first, second] = copies;
    Ok(Held {
        sockets: vec![first?, second?],
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
    let opened = Arc::new(core.opened(Some(place)));
    tokio::spawn(connection::serve(opened, stream, peer, entry));
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

//! Published UDP ports: datagrams passed on to an instance and its answers back. A client
//! (address and port) keeps its instance while it serves and until both have been silent
//! for [`UDP_IDLE`]; then, or when the instance is replaced, the next datagram chooses
//! anew. UDP is not parked: datagrams for a parked service are dropped, as lost ones are.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_model::spec::Protocol;
use tokio::net::UdpSocket;
use tokio::task::AbortHandle;

use crate::core::Core;
use crate::instance::Instance;
use crate::limits::{UDP_IDLE, UDP_SESSIONS};
use crate::lock;
use crate::routes::Destination;

/// The largest datagram.
const DATAGRAM: usize = 65_536;

struct Session {
    instance: Arc<Instance>,
    socket: Arc<UdpSocket>,
    used: LastUse,
    answers: AbortHandle,
}

/// When the client or the instance last said something.
type LastUse = Arc<Mutex<Instant>>;

impl Drop for Session {
    fn drop(&mut self) {
        self.answers.abort();
    }
}

/// Passes datagrams on until it is dropped. When the proxy retires, only answers are passed
/// on, and it ends with the last client.
pub(crate) async fn relay(core: Arc<Core>, socket: Arc<UdpSocket>, listen: SocketAddr) {
    let mut sessions: HashMap<SocketAddr, Session> = HashMap::new();
    let mut buffer = vec![0u8; DATAGRAM];
    let mut sweep = tokio::time::interval(UDP_IDLE / 2);
    let retired = core.retired();
    tokio::pin!(retired);
    loop {
        let (n, peer) = tokio::select! {
            () = &mut retired => break,
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                Err(_) => continue,
            },
            _ = sweep.tick() => {
                sessions.retain(|_, session| lock(&session.used).elapsed() < UDP_IDLE);
                continue;
            }
        };
        let destination = core.routes().published(listen, Protocol::Udp).cloned();
        let Some(destination) = destination else {
            continue;
        };
        let datagram = buffer.get(..n).unwrap_or_default();
        let known = sessions
            .get(&peer)
            .is_some_and(|session| session.instance.is_serving());
        if !known {
            sessions.remove(&peer);
            make_room(&mut sessions);
            match open(&destination, &socket, peer).await {
                Some(session) => sessions.insert(peer, session),
                None => continue,
            };
        }
        if let Some(session) = sessions.get(&peer) {
            *lock(&session.used) = Instant::now();
            // A refused datagram is a lost one.
            let _ = session.socket.send(datagram).await;
        }
    }
    while !sessions.is_empty() {
        sweep.tick().await;
        sessions.retain(|_, session| lock(&session.used).elapsed() < UDP_IDLE);
    }
}

fn make_room(sessions: &mut HashMap<SocketAddr, Session>) {
    if sessions.len() < UDP_SESSIONS {
        return;
    }
    let oldest = sessions
        .iter()
        .min_by_key(|(_, session)| *lock(&session.used));
    if let Some(peer) = oldest.map(|(peer, _)| *peer) {
        sessions.remove(&peer);
    }
}

async fn open(
    destination: &Destination,
    client: &Arc<UdpSocket>,
    peer: SocketAddr,
) -> Option<Session> {
    let instance = destination.service.choose()?;
    let address = destination.address(&instance);
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = Arc::new(UdpSocket::bind((any, 0)).await.ok()?);
    socket.connect(address).await.ok()?;
    instance.counts.connections.add(1);
    let used = LastUse::new(Mutex::new(Instant::now()));
    let task = answers(
        Arc::clone(&socket),
        Arc::clone(client),
        peer,
        Arc::clone(&used),
    );
    let answers = tokio::spawn(task);
    Some(Session {
        instance,
        socket,
        used,
        answers: answers.abort_handle(),
    })
}

async fn answers(from: Arc<UdpSocket>, client: Arc<UdpSocket>, peer: SocketAddr, used: LastUse) {
    loop {
        // No buffer is held while there is nothing to read.
        let received = from.readable().await.and_then(|()| {
            let mut datagram = Vec::with_capacity(DATAGRAM);
            from.try_recv_buf(&mut datagram).map(|_| datagram)
        });
        match received {
            Ok(datagram) => {
                *lock(&used) = Instant::now();
                let _ = client.send_to(&datagram, peer).await;
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            // The instance's port is closed, as ICMP tells. It may open later.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

//! DNS on every network's gateway, over UDP and TCP: kiln's own names from the tables,
//! all others from the host's name servers.

pub(crate) mod forward;
pub(crate) mod zone;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use hickory_proto::op::{Message, ResponseCode};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::core::Core;
use crate::limits::{DNS_FORWARDS, DNS_MESSAGE, DNS_TCP, DNS_TCP_IDLE};
use forward::{Transport, read_message, write_message};

/// Answers datagrams until it is dropped.
pub(crate) async fn serve_udp(core: Arc<Core>, socket: Arc<UdpSocket>, gateway: Ipv4Addr) {
    // Twice the forwards: own names are answered while all of those wait.
    let places = Arc::new(Semaphore::new(2 * DNS_FORWARDS));
    let mut buffer = vec![0u8; DNS_MESSAGE];
    loop {
        let Ok((n, peer)) = socket.recv_from(&mut buffer).await else {
            // An earlier answer could not be delivered: nothing to do with this socket.
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            continue;
        };
        let query = buffer.get(..n).unwrap_or_default().to_vec();
        let (core, socket) = (Arc::clone(&core), Arc::clone(&socket));
        tokio::spawn(async move {
            if let Some(answer) = answer(&core, (gateway, peer.ip()), &query, Transport::Udp).await
            {
                let _ = socket.send_to(&answer, peer).await;
            }
            drop(place);
        });
    }
}

/// Answers connections until it is dropped.
pub(crate) async fn serve_tcp(core: Arc<Core>, listener: Arc<TcpListener>, gateway: Ipv4Addr) {
    let places = Arc::new(Semaphore::new(DNS_TCP));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let Some((stream, peer)) = crate::listeners::accept(&listener).await else {
            continue;
        };
        let core = Arc::clone(&core);
        tokio::spawn(async move {
            serve_stream(&core, stream, (gateway, peer.ip())).await;
            drop(place);
        });
    }
}

async fn serve_stream(core: &Core, mut stream: TcpStream, at: (Ipv4Addr, IpAddr)) {
    loop {
        let Ok(Ok(Some(query))) = timeout(DNS_TCP_IDLE, read_message(&mut stream)).await else {
            return;
        };
        let Some(answer) = answer(core, at, &query, Transport::Tcp).await else {
            return;
        };
        let written = timeout(DNS_TCP_IDLE, write_message(&mut stream, &answer)).await;
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
    }
}

/// `None` for what is no question: answering an answer could go on for ever. It was asked at
/// `gateway` by `asker`.
async fn answer(
    core: &Core,
    (gateway, asker): (Ipv4Addr, IpAddr),
    query: &[u8],
    transport: Transport,
) -> Option<Vec<u8>> {
    let is_response = query.get(2)? & 0x80 != 0;
    if is_response {
        return None;
    }
    let Ok(message) = Message::from_vec(query) else {
        let id = u16::from_be_bytes([*query.first()?, *query.get(1)?]);
        let code = ResponseCode::FormErr;
        return Message::error_msg(id, hickory_proto::op::OpCode::Query, code)
            .to_vec()
            .ok();
    };
    let routes = core.routes();
    let mut zones = routes.zones(gateway, asker);
    if let Some(answer) = zones.find_map(|zone| zone.answer(&message)) {
        core.dns.answered.add(1);
        return encode(answer, &message, transport);
    }
    core.dns.forwarded.add(1);
    drop(zones);
    let own = routes.gateways();
    drop(routes);
    if let Some(answer) = core.forwarder.ask(query, transport, &own).await {
        return Some(answer);
    }
    core.dns.failed.add(1);
    zone::response(&message, ResponseCode::ServFail)
        .to_vec()
        .ok()
}

/// Cut to what the client takes over UDP; it then asks again over TCP.
fn encode(answer: Message, query: &Message, transport: Transport) -> Option<Vec<u8>> {
    let bytes = answer.to_vec().ok()?;
    if transport == Transport::Udp && bytes.len() > usize::from(query.max_payload()) {
        return answer.truncate().to_vec().ok();
    }
    Some(bytes)
}

/// The address of a network's DNS.
pub(crate) fn address(gateway: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::from((gateway, port))
}

//! One accepted TCP connection: what it speaks, and who serves it.
//!
//! Where the protocol is not known, the client's first bytes and a connection to an
//! instance are waited for at the same time: in some protocols the server speaks first.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kiln_model::route::AppProtocol;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::core::Opened;
use crate::http;
use crate::http::connect_failure;
use crate::instance::Lease;
use crate::limits::{
    CONNECT_ATTEMPTS, HEADER_READ, HTTP_HINT_WAIT, REFUSED_WAIT, SNIFF_BYTES, SNIFF_WAIT,
};
use crate::pool;
use crate::prefixed::Prefixed;
use crate::routes::{Destination, Entry};
use crate::service::Unit;
use crate::sniff::{Sniffed, guess, sniff};
use crate::sockets;
use crate::stats::Failure;
use crate::tunnel::{Content, tunnel};

pub(crate) async fn serve(
    opened: Arc<Opened>,
    mut stream: TcpStream,
    peer: SocketAddr,
    entry: Entry,
) {
    sockets::tune(&stream);
    let Some(destination) = opened.core.resolve(&entry) else {
        return;
    };
    let mut first = BytesMut::new();
    let decided = match destination.service.protocol(destination.port) {
        Some(AppProtocol::Tcp) => match dial(&destination).await {
            Ok(dialled) => Decided::Raw(dialled),
            Err(failure) => Decided::Refused(failure),
        },
        Some(AppProtocol::Http | AppProtocol::H2c) => {
            match timeout(HEADER_READ, read_first(&mut stream, &mut first)).await {
                Ok(sniffed) => Decided::Http(sniffed == Sniffed::H2),
                Err(_) => return,
            }
        }
        None => recognise(&destination, &mut stream, &mut first).await,
    };
    let first = first.freeze();
    match decided {
        Decided::Http(h2) => {
            let client = http::Client::new(opened, entry, peer, destination);
            http::serve(client, Prefixed::new(first, stream), h2).await;
        }
        Decided::Raw(dialled) => raw(&opened, &destination, stream, first, dialled).await,
        Decided::Refused(failure) => destination.service.failures.count(failure),
    }
}

enum Decided {
    /// HTTP/2 or not.
    Http(bool),
    Raw(Dialled),
    Refused(Failure),
}

struct Dialled {
    stream: TcpStream,
    lease: Lease,
}

async fn raw(
    opened: &Opened,
    destination: &Destination,
    stream: TcpStream,
    first: Bytes,
    dialled: Dialled,
) {
    dialled.lease.instance.counts.connections.add(1);
    let lease = Arc::new(dialled.lease);
    let client = Prefixed::new(first, stream);
    if tunnel(opened, client, dialled.stream, lease, Content::Raw).await {
        destination.service.failures.count(Failure::DrainCut);
    }
}

/// Reads until the first bytes tell the protocol. Their end without a decision counts as
/// raw: the client may wait for the server with its own direction closed.
async fn read_first(stream: &mut TcpStream, first: &mut BytesMut) -> Sniffed {
    loop {
        if let Some(sniffed) = sniff(first) {
            return sniffed;
        }
        let read = (&mut *stream)
            .take((SNIFF_BYTES - first.len().min(SNIFF_BYTES)) as u64)
            .read_buf(first)
            .await;
        if !matches!(read, Ok(1..)) {
            return guess(first);
        }
    }
}

/// As [`read_first`], but does not wait long for the rest of a line once it has begun.
async fn sniff_client(stream: &mut TcpStream, first: &mut BytesMut) -> Sniffed {
    if stream.readable().await.is_err() {
        return Sniffed::Tcp;
    }
    match timeout(SNIFF_WAIT, read_first(stream, first)).await {
        Ok(sniffed) => sniffed,
        Err(_) => guess(first),
    }
}

async fn recognise(
    destination: &Destination,
    stream: &mut TcpStream,
    first: &mut BytesMut,
) -> Decided {
    let service = &destination.service;
    let port = destination.port;
    let head_start = if service.spoke_http(port) || sockets::has_input(stream) {
        HTTP_HINT_WAIT
    } else {
        Duration::ZERO
    };
    let sniffing = sniff_client(stream, first);
    tokio::pin!(sniffing);
    let mut sniffed = None;
    if !head_start.is_zero() {
        sniffed = timeout(head_start, &mut sniffing).await.ok();
    }
    let mut race = Race {
        destination,
        dialled: None,
    };
    loop {
        match sniffed {
            Some(Sniffed::Http1) => {
                service.learn(port, true);
                race.keep_for_http().await;
                return Decided::Http(false);
            }
            Some(Sniffed::H2) => return Decided::Http(true),
            Some(Sniffed::Tcp) | None => {}
        }
        tokio::select! {
            biased;
            known = &mut sniffing, if sniffed.is_none() => sniffed = Some(known),
            step = race.step(sniffed.is_some()) => match step {
                Step::Raw(dialled) => {
                    service.learn(port, false);
                    return Decided::Raw(dialled);
                }
                Step::Again => {}
                Step::Refused(failure) => {
                    if sniffed.is_none() {
                        sniffed = timeout(REFUSED_WAIT, &mut sniffing).await.ok();
                    }
                    return match sniffed {
                        Some(Sniffed::Http1) => Decided::Http(false),
                        Some(Sniffed::H2) => Decided::Http(true),
                        Some(Sniffed::Tcp) | None => Decided::Refused(failure),
                    };
                }
            },
        }
    }
}

/// The side of the instance, while the protocol is not known.
struct Race<'a> {
    destination: &'a Destination,
    dialled: Option<Dialled>,
}

enum Step {
    Raw(Dialled),
    Again,
    Refused(Failure),
}

impl Race<'_> {
    /// Safe to be dropped at any time: then nothing has been sent or read.
    async fn step(&mut self, client_is_raw: bool) -> Step {
        let Some(dialled) = &self.dialled else {
            return match dial(self.destination).await {
                Ok(dialled) if client_is_raw => Step::Raw(dialled),
                Ok(dialled) => {
                    self.dialled = Some(dialled);
                    Step::Again
                }
                Err(failure) => Step::Refused(failure),
            };
        };
        if !client_is_raw {
            let mut byte = [0u8; 1];
            tokio::select! {
                // The instance speaks first, or has closed.
                _ = dialled.stream.peek(&mut byte) => {}
                // Nobody has said anything yet: another one can take it over.
                () = dialled.lease.retired() => {
                    self.dialled = None;
                    return Step::Again;
                }
            }
        }
        match self.dialled.take() {
            Some(dialled) => Step::Raw(dialled),
            None => Step::Again,
        }
    }

    /// It is HTTP after all: the connection is as good as any for a request.
    async fn keep_for_http(&mut self) {
        let Some(Dialled { stream, lease }) = self.dialled.take() else {
            return;
        };
        let address = self.destination.address(&lease.instance);
        if let Ok(sender) = pool::handshake_h1(stream).await {
            lease.instance.pool.put_h1(address, sender);
        }
    }
}

/// A connection to an instance; to another one, as long as they refuse.
async fn dial(destination: &Destination) -> Result<Dialled, Failure> {
    let mut tried: Vec<IpAddr> = Vec::new();
    let mut last = Failure::Connect;
    for _ in 0..CONNECT_ATTEMPTS {
        let lease = match destination.service.acquire(Unit::Connection, &tried).await {
            Ok(lease) => lease,
            Err(Failure::Connect) => return Err(last),
            Err(failure) => return Err(failure),
        };
        match pool::connect(destination.address(&lease.instance)).await {
            Ok(stream) => return Ok(Dialled { stream, lease }),
            Err(error) => {
                lease.instance.connect_failed();
                last = connect_failure(&error);
                tried.push(lease.instance.address);
            }
        }
    }
    Err(last)
}

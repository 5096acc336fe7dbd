//! Idle connections to one instance, by address and port, and how new ones are made.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::http::body::InBody;
use crate::limits::{
    CONNECT, CONNECT_AGAIN, H2_UPSTREAM_STREAMS, HEADER_BYTES, HEADER_COUNT, HTTP_BUFFER, POOL_AGE,
    POOL_IDLE,
};
use crate::quickack::QuickAck;
use crate::{lock, sockets};

/// Sends one request at a time.
pub(crate) type H1 = http1::SendRequest<InBody>;

/// One of the streams of a shared connection.
pub(crate) struct H2 {
    pub(crate) sender: http2::SendRequest<InBody>,
    _stream: Arc<()>,
}

#[derive(Default)]
pub(crate) struct Pool {
    inner: Mutex<Inner>,
    /// One HTTP/2 connection is opened at a time; who waits then shares it.
    opening: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Inner {
    closed: bool,
    h1: HashMap<SocketAddr, Vec<IdleH1>>,
    h2: HashMap<SocketAddr, Vec<SharedH2>>,
}

struct IdleH1 {
    sender: H1,
    since: Instant,
}

struct SharedH2 {
    sender: http2::SendRequest<InBody>,
    /// As many owners as there are streams, and this one.
    streams: Arc<()>,
}

impl Pool {
    pub(crate) fn open(&self) {
        lock(&self.inner).closed = false;
    }

    /// Drops the idle connections, and those which would be given back later.
    pub(crate) fn close(&self) {
        *lock(&self.inner) = Inner {
            closed: true,
            ..Inner::default()
        };
    }

    /// The connection used last that has been idle for at most `age`.
    pub(crate) fn take_h1(&self, address: SocketAddr, age: Duration) -> Option<H1> {
        let mut inner = lock(&self.inner);
        let idle = inner.h1.get_mut(&address)?;
        idle.retain(|one| !one.sender.is_closed());
        let at = idle
            .iter()
            .rposition(|one| one.sender.is_ready() && one.since.elapsed() <= age)?;
        Some(idle.remove(at).sender)
    }

    pub(crate) fn put_h1(&self, address: SocketAddr, sender: H1) {
        let mut inner = lock(&self.inner);
        if inner.closed || sender.is_closed() {
            return;
        }
        let idle = inner.h1.entry(address).or_default();
        if idle.len() >= POOL_IDLE {
            idle.remove(0);
        }
        idle.push(IdleH1 {
            sender,
            since: Instant::now(),
        });
    }

    /// A stream of a connection, which is opened if need be.
    pub(crate) async fn h2(&self, address: SocketAddr) -> io::Result<H2> {
        if let Some(h2) = self.take_h2(address) {
            return Ok(h2);
        }
        let _opening = self.opening.lock().await;
        if let Some(h2) = self.take_h2(address) {
            return Ok(h2);
        }
        let sender = handshake_h2(connect(address).await?).await?;
        let streams = Arc::new(());
        let h2 = H2 {
            sender: sender.clone(),
            _stream: Arc::clone(&streams),
        };
        let mut inner = lock(&self.inner);
        if !inner.closed {
            let shared = inner.h2.entry(address).or_default();
            shared.push(SharedH2 { sender, streams });
        }
        Ok(h2)
    }

    fn take_h2(&self, address: SocketAddr) -> Option<H2> {
        let mut inner = lock(&self.inner);
        let shared = inner.h2.get_mut(&address)?;
        shared.retain(|one| !one.sender.is_closed());
        let free = |one: &&SharedH2| Arc::strong_count(&one.streams) <= H2_UPSTREAM_STREAMS;
        let one = shared.iter().find(free)?;
        Some(H2 {
            sender: one.sender.clone(),
            _stream: Arc::clone(&one.streams),
        })
    }

    /// Closes what has been idle for too long.
    pub(crate) fn sweep(&self) {
        let mut inner = lock(&self.inner);
        inner.h1.retain(|_, idle| {
            idle.retain(|one| !one.sender.is_closed() && one.since.elapsed() <= POOL_AGE);
            !idle.is_empty()
        });
        inner.h2.retain(|_, shared| {
            shared.retain(|one| !one.sender.is_closed());
            !shared.is_empty()
        });
    }
}

/// Connects within [`CONNECT`].
pub(crate) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let attempts = async {
        let mut wait = CONNECT_AGAIN;
        loop {
            if let Ok(outcome) = timeout(wait, TcpStream::connect(address)).await {
                return outcome;
            }
            wait *= 2;
        }
    };
    let stream = timeout(CONNECT, attempts)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    sockets::tune(&stream);
    Ok(stream)
}

/// Speaks HTTP/1.1 over `stream`.
pub(crate) async fn handshake_h1(stream: TcpStream) -> io::Result<H1> {
    let (sender, connection) = http1::Builder::new()
        .preserve_header_case(true)
        .max_headers(HEADER_COUNT)
        .max_header_size(HEADER_BYTES)
        .max_buf_size(HTTP_BUFFER)
        .handshake(TokioIo::new(QuickAck(stream)))
        .await
        .map_err(io::Error::other)?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "connection to an instance ended");
        }
    });
    Ok(sender)
}

async fn handshake_h2(stream: TcpStream) -> io::Result<http2::SendRequest<InBody>> {
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(HEADER_BYTES).unwrap_or(u32::MAX))
        .handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "HTTP/2 connection to an instance ended");
        }
    });
    Ok(sender)
}

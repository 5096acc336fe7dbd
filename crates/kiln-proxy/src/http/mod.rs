//! HTTP: a client's connection is served request by request, each going to the instance
//! with the fewest in flight, so that a keep-alive connection is not tied to any.

pub(crate) mod body;
mod forward;
pub(crate) use forward::connect_failure;
mod headers;
mod refusal;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;

use crate::core::Opened;
use crate::limits::{H2_CLIENT_STREAMS, HEADER_BYTES, HEADER_COUNT, HEADER_READ, HTTP_BUFFER};
use crate::lock;
use crate::prefixed::Prefixed;
use crate::routes::{Destination, Entry};

/// One client's connection.
pub(crate) struct Client {
    opened: Arc<Opened>,
    entry: Entry,
    peer: SocketAddr,
    /// Where the last request went: kept for when the table no longer names the entry.
    last: Mutex<Destination>,
}

impl Client {
    pub(crate) fn new(
        opened: Arc<Opened>,
        entry: Entry,
        peer: SocketAddr,
        destination: Destination,
    ) -> Arc<Self> {
        Arc::new(Self {
            opened,
            entry,
            peer,
            last: Mutex::new(destination),
        })
    }

    /// Where the next request goes, and whether this entry is still in the table.
    fn destination(&self) -> (Destination, bool) {
        let mut last = lock(&self.last);
        match self.opened.core.resolve(&self.entry) {
            Some(destination) => {
                *last = destination.clone();
                (destination, true)
            }
            None => (last.clone(), false),
        }
    }
}

/// Serves a connection to its end.
pub(crate) async fn serve(client: Arc<Client>, stream: Prefixed<TcpStream>, h2: bool) {
    let core = &client.opened.core;
    let (ended, retired) = (core.ending(), core.retired());
    // A retired proxy's HTTP/1 clients are told with the next answer (`forward::handle`):
    // closing a quiet connection could meet a request that is on its way.
    let ending = async {
        tokio::select! {
            () = ended => {}
            () = retired, if h2 => {}
        }
    };
    tokio::pin!(ending);
    let service = {
        let client = Arc::clone(&client);
        service_fn(move |request| {
            let client = Arc::clone(&client);
            async move { Ok::<_, Infallible>(forward::handle(&client, request).await) }
        })
    };
    let io = TokioIo::new(stream);
    macro_rules! until_the_end {
        ($connection:expr) => {{
            let connection = $connection;
            tokio::pin!(connection);
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = &mut ending => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        }};
    }
    let ended = if h2 {
        until_the_end!(http2_builder().serve_connection(io, service))
    } else {
        until_the_end!(
            http1_builder()
                .serve_connection(io, service)
                .with_upgrades()
        )
    };
    if let Err(error) = ended {
        tracing::debug!(%error, peer = %client.peer, "client's connection ended");
    }
}

fn http1_builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ)
        .preserve_header_case(true)
        .max_headers(HEADER_COUNT)
        .max_header_size(HEADER_BYTES)
        .max_buf_size(HTTP_BUFFER);
    builder
}

fn http2_builder() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_CLIENT_STREAMS)
        .max_header_list_size(u32::try_from(HEADER_BYTES).unwrap_or(u32::MAX))
        .keep_alive_interval(crate::limits::TCP_IDLE)
        .keep_alive_timeout(HEADER_READ);
    builder
}

//! The proxy that RUNs are pointed at: plain HTTP by whole addresses, everything else
//! through CONNECT. What comes within a tunnel is read if it is TLS or HTTP, and else passed
//! on unread and named as not recorded.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio_rustls::LazyConfigAcceptor;

use super::authority::Authority;
use super::session::{Body, Session, said};

/// Connections at once, of all RUNs; more wait to be accepted.
const AT_ONCE: usize = 512;
/// Threads that read and write.
const THREADS: usize = 2;
/// Who says nothing in a tunnel for so long waits for the other side: it is not HTTP. At
/// HTTP's own ports it is only slow (npm opens many tunnels at once).
const FIRST_WORD: Duration = Duration::from_secs(5);
const FIRST_WORD_OF_HTTP: Duration = Duration::from_secs(300);
const PORTS_OF_HTTP: [u16; 4] = [80, 443, 8080, 8443];
/// A TLS handshake takes no longer.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// The first byte of a TLS connection (RFC 8446: a handshake record).
const TLS: u8 = 0x16;

/// Which RUN has which address.
pub(in crate::network) type Callers = Arc<Mutex<BTreeMap<IpAddr, Arc<Session>>>>;

/// Whose connections come to a listener.
#[derive(Clone)]
pub(in crate::network) enum Who {
    One(Arc<Session>),
    ByAddress(Callers),
}

impl Who {
    fn is(&self, address: IpAddr) -> Option<Arc<Session>> {
        match self {
            Who::One(session) => Some(session.clone()),
            Who::ByAddress(callers) => {
                let callers = callers.lock().unwrap_or_else(PoisonError::into_inner);
                callers.get(&address).cloned()
            }
        }
    }
}

/// What serves all listeners of a process, on threads of its own.
pub(in crate::network) struct Recorder {
    handle: tokio::runtime::Handle,
    pub authority: Arc<Authority>,
    permits: Arc<Semaphore>,
    /// Dropping it ends the threads.
    _end: oneshot::Sender<()>,
}

/// Listens until it is dropped.
pub(in crate::network) struct Listening {
    pub port: u16,
    task: tokio::task::AbortHandle,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Recorder {
    pub fn start() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("build-record")
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        // A runtime may not be dropped where another one works.
        std::thread::Builder::new()
            .name("build-record".into())
            .spawn(move || {
                let _: Result<(), _> = runtime.block_on(ended);
                runtime.shutdown_background();
            })?;
        Ok(Self {
            handle,
            authority: Arc::new(Authority::new()?),
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            _end: end,
        })
    }

    pub fn listen(&self, listener: std::net::TcpListener, who: Who) -> io::Result<Listening> {
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let _in = self.handle.enter();
        let listener = TcpListener::from_std(listener)?;
        let (authority, permits) = (self.authority.clone(), self.permits.clone());
        let task = self.handle.spawn(accept(listener, who, authority, permits));
        Ok(Listening {
            port,
            task: task.abort_handle(),
        })
    }
}

async fn accept(
    listener: TcpListener,
    who: Who,
    authority: Arc<Authority>,
    permits: Arc<Semaphore>,
) {
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(cause) => {
                tracing::debug!(%cause, "a connection was not accepted");
                // Too many open files, most likely: some will close.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some(session) = who.is(from.ip()) else {
            continue;
        };
        let authority = authority.clone();
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let answer = |request| front(session.clone(), authority.clone(), request);
            serve(TokioIo::new(stream), answer).await;
            drop(permit);
        });
    }
}

/// Serves one connection to its end.
async fn serve<I, F, A>(io: I, answer: F)
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    F: Fn(Request<Incoming>) -> A,
    A: Future<Output = Response<Body>> + Send + 'static,
{
    let service = service_fn(|request| {
        let answer = answer(request);
        async { Ok::<_, Infallible>(answer.await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // Nothing that is another one each time.
        .auto_date_header(false)
        .serve_connection(io, service)
        .with_upgrades()
        .await;
    if let Err(cause) = served {
        tracing::debug!(%cause, "a connection of a RUN ended early");
    }
}

/// A request to the proxy itself.
async fn front(
    session: Arc<Session>,
    authority: Arc<Authority>,
    mut request: Request<Incoming>,
) -> Response<Body> {
    if request.method() != Method::CONNECT {
        let url = request.uri().to_string();
        return match request.uri().scheme_str() {
            Some("http" | "https") => session.exchange(url, request).await,
            _ => {
                session.not_recorded(&url);
                said(StatusCode::NOT_IMPLEMENTED, &format!("not HTTP: {url}"))
            }
        };
    }
    let Some(to) = request.uri().authority().cloned() else {
        return said(StatusCode::BAD_REQUEST, "CONNECT names no host");
    };
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let (host, port) = (
            to.host().trim_matches(['[', ']']).to_owned(),
            to.port_u16().unwrap_or(443),
        );
        match upgrade.await {
            Ok(io) => tunnel(&session, &authority, TokioIo::new(io), &host, port).await,
            Err(cause) => tracing::debug!(%cause, "a tunnel was not begun"),
        }
    });
    said(StatusCode::OK, "")
}

async fn tunnel(
    session: &Arc<Session>,
    authority: &Arc<Authority>,
    mut io: TokioIo<hyper::upgrade::Upgraded>,
    host: &str,
    port: u16,
) {
    let mut first = [0; 8];
    let patience = match PORTS_OF_HTTP.contains(&port) {
        true => FIRST_WORD_OF_HTTP,
        false => FIRST_WORD,
    };
    let read = tokio::time::timeout(patience, io.read(&mut first)).await;
    let length = match read {
        Ok(Ok(0) | Err(_)) => return,
        Ok(Ok(length)) => length,
        Err(_) => 0,
    };
    let first = Bytes::copy_from_slice(&first[..length]);
    let kind = kind(&first);
    let io = Begun { first, io };
    match kind {
        Inside::Tls => tls(session, authority, io, host, port).await,
        Inside::Http => within(session, io, "http", host, port).await,
        Inside::Other => {
            session.not_recorded(&format!("{host}:{port}/tcp"));
            if let Err(cause) = pass_on(session, io, host, port).await {
                session.tell(format!("{host}:{port}: {cause}"));
            }
        }
    }
}

enum Inside {
    Tls,
    Http,
    Other,
}

fn kind(first: &[u8]) -> Inside {
    const METHODS: [&[u8]; 7] = [
        b"GET ",
        b"HEAD ",
        b"POST ",
        b"PUT ",
        b"OPTIONS ",
        b"PATCH ",
        b"DELETE ",
    ];
    let begins = |method: &&[u8]| first.starts_with(method) || method.starts_with(first);
    match first.first() {
        Some(&TLS) => Inside::Tls,
        Some(_) if METHODS.iter().any(begins) => Inside::Http,
        _ => Inside::Other,
    }
}

async fn tls<I>(session: &Arc<Session>, authority: &Authority, io: I, host: &str, port: u16)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = async {
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), io).await?;
        let hello = start.client_hello();
        let config = authority.server(hello.server_name().unwrap_or(host))?;
        start.into_stream(config).await
    };
    match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(stream)) => within(session, stream, "https", host, port).await,
        Ok(Err(cause)) => session.refused(host, port, &cause),
        Err(_) => {}
    }
}

/// HTTP within a tunnel.
async fn within<I>(session: &Arc<Session>, io: I, scheme: &'static str, host: &str, port: u16)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let host = if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    };
    let origin = format!("{scheme}://{host}:{port}");
    let answer = |request: Request<Incoming>| {
        let path = request
            .uri()
            .path_and_query()
            .map_or("/", |path| path.as_str());
        let url = format!("{origin}{path}");
        let session = session.clone();
        async move { session.exchange(url, request).await }
    };
    serve(TokioIo::new(io), answer).await;
}

async fn pass_on<I>(session: &Session, mut io: I, host: &str, port: u16) -> io::Result<()>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let addresses = session.addresses(host, port).await?;
    let mut server = TcpStream::connect(addresses.as_slice()).await?;
    // How either side ends it is theirs.
    let _ = tokio::io::copy_bidirectional(&mut io, &mut server).await;
    Ok(())
}

/// A connection whose first bytes were read already.
struct Begun<I> {
    first: Bytes,
    io: I,
}

impl<I: AsyncRead + Unpin> AsyncRead for Begun<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.io).poll_read(context, buffer);
        }
        let length = self.first.len().min(buffer.remaining());
        buffer.put_slice(&self.first.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Begun<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

//! A program for services under test: it answers what the load generator sends, and
//! misbehaves as its environment says.
//!
//! On `APP_PORT` (8000): `GET /` says `APP_VERSION`; `/echo` gives the body back;
//! `/slow?ms=N` takes that long; `/health` is 200 or, with `APP_SICK`, 500; an upgrade to
//! websocket is an echo of frames. On `APP_TCP_PORT`, if there is one: an echo of bytes.
//! Each answer's header `x-instance` is the host's name. At SIGTERM nothing new is taken,
//! open requests are finished, and the program ends.

mod config;
mod echo;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use config::Config;

type Answer = Response<Full<Bytes>>;

/// What [`echo::websocket`]'s client sends has this answer (RFC 6455, 1.3).
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

struct App {
    config: Config,
    instance: String,
    requests: AtomicU64,
}

/// Runs it until it is told to end.
///
/// # Errors
/// Its environment is wrong, a port is taken, or it was asked to crash.
pub fn run() -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::read()?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let crash = crash(config.crash_after);
            tokio::select! {
                ended = serve(config) => ended,
                () = crash => Err("crashes as asked".into()),
            }
        })
}

/// Never comes to an end where no crash is asked for.
async fn crash(after: Option<Duration>) {
    match after {
        Some(after) => tokio::time::sleep(after).await,
        None => std::future::pending().await,
    }
}

async fn serve(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let instance = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    let instance = instance.trim().to_owned();
    let begin = |path| writer::begin(path, &format!("{instance} {}", config.version));
    let _writer = config.lock.as_deref().map(begin).transpose()?;
    tokio::time::sleep(config.boot).await;
    if config.never_ready {
        terminate.recv().await;
        return Ok(());
    }
    let listener = TcpListener::bind(("0.0.0.0", config.port)).await?;
    if let Some(port) = config.tcp_port {
        let listener = TcpListener::bind(("0.0.0.0", port)).await?;
        tokio::spawn(echo::bytes(listener));
    }
    let ignore_term = config.ignore_term;
    let app = Arc::new(App {
        config,
        instance,
        requests: AtomicU64::new(0),
    });
    let open = GracefulShutdown::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted?.0,
            _ = terminate.recv(), if !ignore_term => break,
        };
        let app = app.clone();
        let service = service_fn(move |request| answer(app.clone(), request));
        let builder = auto::Builder::new(TokioExecutor::new());
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        let connection = open.watch(connection.into_owned());
        tokio::spawn(async move {
            // The client sees, and counts, what goes wrong.
            let _ = connection.await;
        });
    }
    drop(listener);
    open.shutdown().await;
    Ok(())
}

async fn answer(app: Arc<App>, request: Request<Incoming>) -> Result<Answer, hyper::Error> {
    let mut answer = match request.uri().path() {
        "/health" => text(app.config.sick, "health"),
        "/echo" => {
            let body = request.into_body().collect().await?.to_bytes();
            Response::new(Full::new(body))
        }
        "/slow" => {
            let asked = request.uri().query().and_then(|q| q.strip_prefix("ms="));
            let ms = asked.and_then(|ms| ms.parse().ok()).unwrap_or(1000);
            tokio::time::sleep(Duration::from_millis(ms)).await;
            text(false, "slow")
        }
        _ if request.headers().contains_key(UPGRADE) => upgrade(request),
        _ => {
            tokio::time::sleep(app.config.delay).await;
            let number = app.requests.fetch_add(1, Ordering::Relaxed);
            let fails = number % 100 < app.config.fail_percent;
            text(fails, &app.config.version)
        }
    };
    if let Ok(name) = HeaderValue::from_str(&app.instance) {
        answer.headers_mut().insert("x-instance", name);
    }
    Ok(answer)
}

fn text(fails: bool, text: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::copy_from_slice(text.as_bytes())));
    if fails {
        *answer.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    }
    answer
}

fn upgrade(request: Request<Incoming>) -> Answer {
    tokio::spawn(async move {
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            // The client sees, and counts, how it ends.
            let _ = echo::websocket(TokioIo::new(upgraded)).await;
        }
    });
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert("sec-websocket-accept", HeaderValue::from_static(ACCEPT));
    answer
}

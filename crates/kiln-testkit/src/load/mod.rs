//! A load generator: requests at a fixed rate, every one counted, every failure by kind.
//!
//! The rate does not slow down when the server does: each request has its moment, and its
//! latency counts from then, so that a stall is seen by all who would have met it. What
//! has been begun when the time is up is waited for and counted; what could not be begun
//! (all of a mode's connections busy and the queue full) counts as [`Failure::Overrun`].
//!
//! ```no_run
//! # async fn example() {
//! use kiln_testkit::load::{Load, Mode};
//! let report = Load::new(([127, 0, 0, 1], 8080).into(), 500, Mode::NewConnection)
//!     .run(tokio::time::sleep(std::time::Duration::from_secs(10)))
//!     .await;
//! assert_eq!(report.failed(), 0, "{report}");
//! # }
//! ```

mod h2;
mod http;
mod latency;
mod report;
mod tcp;
mod websocket;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

pub use hyper::Method;
pub use latency::Latency;
pub use report::{Failure, Report};

/// Requests which wait for a connection, at most, before they count as overrun.
const QUEUE: usize = 4096;

/// What is sent, how, and how often.
#[derive(Clone, Debug)]
pub struct Load {
    pub target: SocketAddr,
    /// Requests a second; in [`Mode::Websocket`] messages a second over all connections.
    pub rate: u32,
    pub mode: Mode,
    pub method: hyper::Method,
    /// Path and query.
    pub path: String,
    /// The `Host` header.
    pub host: String,
    /// The body: of a request, or the bytes echoed by [`Mode::Tcp`].
    pub body: Vec<u8>,
    /// Send the body in chunks of this many bytes, without a length.
    pub chunked: Option<usize>,
    /// The answer's body has to be the request's.
    pub echoed: bool,
    /// For each request, from its moment to the last byte of its answer.
    pub timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Each request on a connection of its own.
    NewConnection,
    /// On so many connections, one request at a time on each. A connection that the
    /// server has closed between two requests is opened again; that is no failure.
    KeepAlive { connections: usize },
    /// HTTP/2 with prior knowledge: all requests on so many connections, at once. One that
    /// the server ends with GOAWAY is opened again; what was sent before has to be answered.
    Http2 { connections: usize },
    /// Numbered messages, each of which has to come back before the next one, on so many
    /// connections which have to last. Ends of connections are told in
    /// [`Report::closed_websockets`]; then another one is opened.
    Websocket { connections: usize },
    /// A connection for each: sends the body, closes its direction, and has to get the
    /// same bytes back.
    Tcp,
}

impl Load {
    /// `GET /` without a body.
    pub fn new(target: SocketAddr, rate: u32, mode: Mode) -> Self {
        Self {
            target,
            rate,
            mode,
            method: hyper::Method::GET,
            path: "/".into(),
            host: target.to_string(),
            body: Vec::new(),
            chunked: None,
            echoed: false,
            timeout: Duration::from_secs(30),
        }
    }

    /// With another method and body.
    #[must_use]
    pub fn send(mut self, method: hyper::Method, path: &str, body: impl Into<Vec<u8>>) -> Self {
        self.method = method;
        self.path = path.into();
        self.body = body.into();
        self
    }

    #[must_use]
    pub fn chunked(mut self, bytes: usize) -> Self {
        self.chunked = Some(bytes.max(1));
        self
    }

    #[must_use]
    pub fn echoed(mut self) -> Self {
        self.echoed = true;
        self
    }

    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Goes on until `until` resolves and everything begun by then has ended.
    pub async fn run(self, until: impl Future<Output = ()>) -> Report {
        let load = Arc::new(self);
        let begun = Instant::now();
        let mut report = match load.mode {
            Mode::NewConnection | Mode::Tcp | Mode::Http2 { .. } => {
                one_task_each(&load, until).await
            }
            Mode::KeepAlive { connections } => workers(&load, connections, until).await,
            Mode::Websocket { connections } => workers(&load, connections, until).await,
        };
        report.elapsed = begun.elapsed();
        report
    }

    fn ticks(&self) -> tokio::time::Interval {
        let every = Duration::from_secs(1) / self.rate.max(1);
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        ticks
    }
}

/// The outcome of one request: its status (0 where there is none) and who answered.
pub(crate) struct Answered {
    pub(crate) status: u16,
    /// The header `x-instance`, if the server sets it.
    pub(crate) by: Option<String>,
}

async fn one_task_each(load: &Arc<Load>, until: impl Future<Output = ()>) -> Report {
    tokio::pin!(until);
    let mut report = Report::default();
    let mut running = JoinSet::new();
    let mut ticks = load.ticks();
    let connections = match load.mode {
        Mode::Http2 { connections } => connections,
        _ => 0,
    };
    let pool = Arc::new(h2::Pool::new(connections));
    loop {
        tokio::select! {
            biased;
            () = &mut until => break,
            Some(done) = running.join_next() => record_joined(&mut report, done),
            moment = ticks.tick() => {
                let (load, pool) = (Arc::clone(load), Arc::clone(&pool));
                running.spawn(async move {
                    let outcome = in_time(&load, moment, async {
                        match load.mode {
                            Mode::Tcp => tcp::exchange(&load).await,
                            Mode::Http2 { .. } => pool.exchange(&load).await,
                            _ => http::one(&load).await,
                        }
                    });
                    (outcome.await, moment.elapsed())
                });
            }
        }
    }
    while let Some(done) = running.join_next().await {
        record_joined(&mut report, done);
    }
    report.connections += pool.opened.load(std::sync::atomic::Ordering::Relaxed);
    report
}

type Outcome = (Result<Answered, Failure>, Duration);

fn record_joined(report: &mut Report, done: Result<Outcome, tokio::task::JoinError>) {
    match done {
        Ok((outcome, latency)) => report.record(outcome, latency),
        Err(_) => report.record(Err(Failure::Generator), Duration::ZERO),
    }
}

/// The deadline counts from the request's moment.
pub(crate) async fn in_time<T>(
    load: &Load,
    moment: Instant,
    exchange: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    match tokio::time::timeout_at(moment + load.timeout, exchange).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failure::Timeout),
    }
}

/// A fixed number of connections take the moments from one queue.
async fn workers(load: &Arc<Load>, connections: usize, until: impl Future<Output = ()>) -> Report {
    tokio::pin!(until);
    let (send, receive) = mpsc::channel::<Instant>(QUEUE);
    let receive = Arc::new(tokio::sync::Mutex::new(receive));
    let mut running = JoinSet::new();
    for number in 0..connections.max(1) {
        let (load, receive) = (Arc::clone(load), Arc::clone(&receive));
        running.spawn(async move {
            match load.mode {
                Mode::Websocket { .. } => websocket::worker(&load, number, &receive).await,
                _ => http::worker(&load, &receive).await,
            }
        });
    }
    let mut report = Report::default();
    let mut ticks = load.ticks();
    loop {
        tokio::select! {
            biased;
            () = &mut until => break,
            moment = ticks.tick() => {
                if send.try_send(moment).is_err() {
                    report.record(Err(Failure::Overrun), Duration::ZERO);
                }
            }
        }
    }
    drop(send);
    while let Some(done) = running.join_next().await {
        match done {
            Ok(part) => report.merge(part),
            Err(_) => report.record(Err(Failure::Generator), Duration::ZERO),
        }
    }
    report
}

/// The moments of a worker; `None` when the time is up and the queue empty.
pub(crate) type Moments = tokio::sync::Mutex<mpsc::Receiver<Instant>>;

pub(crate) async fn next(moments: &Moments) -> Option<Instant> {
    moments.lock().await.recv().await
}

//! Asks an instance whether it is ready and, from then on, whether it is well.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use kiln_model::InstanceId;
use kiln_plan::{Event, Probe, ProbePlan};
use kiln_runtime::{ExecSpec, Runtime};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use crate::engine::Message;
use crate::inside;
use crate::shared::blocking;

/// Longest single attempt while it is not ready yet: a hung attempt must not hide that
/// the next would succeed.
const FIRST_ATTEMPTS: Duration = Duration::from_secs(5);

pub struct Target {
    pub id: InstanceId,
    /// `None`: it is reached through its own network namespace.
    pub address: Option<IpAddr>,
    /// It has been ready before (the daemon is new): only its health is watched.
    pub proven: bool,
}

/// Runs until the instance is given up or the task is aborted.
pub async fn run(
    runtime: Arc<Runtime>,
    target: Target,
    plan: ProbePlan,
    sender: mpsc::Sender<Message>,
) {
    let prober = Prober {
        runtime,
        target,
        plan,
        sender,
    };
    if !prober.target.proven && !prober.becomes_ready().await {
        return;
    }
    prober.stays_healthy().await;
}

struct Prober {
    runtime: Arc<Runtime>,
    target: Target,
    plan: ProbePlan,
    sender: mpsc::Sender<Message>,
}

impl Prober {
    async fn tell(&self, event: Event) {
        // The engine only ends with the daemon.
        let _ = self.sender.send(Message::Event(event)).await;
    }

    async fn becomes_ready(&self) -> bool {
        let began = Instant::now();
        let deadline = began + self.plan.deadline.into();
        let mut remaining: Vec<&Probe> = self.plan.ready.iter().collect();
        while let Some(probe) = remaining.first() {
            let attempt = self
                .ask(probe, FIRST_ATTEMPTS.min(self.plan.timeout.into()))
                .await;
            let Err(last) = attempt else {
                remaining.remove(0);
                continue;
            };
            if Instant::now() >= deadline {
                let reason = format!("not ready after {}: {last}", self.plan.deadline);
                self.tell(Event::Unhealthy {
                    id: self.target.id.clone(),
                    reason,
                })
                .await;
                return false;
            }
            tokio::time::sleep(self.plan.start_interval.into()).await;
        }
        tokio::time::sleep_until(began + self.plan.settle.into()).await;
        self.tell(Event::Ready {
            id: self.target.id.clone(),
        })
        .await;
        true
    }

    async fn stays_healthy(&self) {
        let Some(probe) = &self.plan.health else {
            return;
        };
        let mut failures = 0;
        loop {
            tokio::time::sleep(self.plan.interval.into()).await;
            match self.ask(probe, self.plan.timeout.into()).await {
                Ok(()) if failures >= self.plan.retries => {
                    failures = 0;
                    self.tell(Event::Healthy {
                        id: self.target.id.clone(),
                    })
                    .await;
                }
                Ok(()) => failures = 0,
                Err(reason) => {
                    failures = failures.saturating_add(1);
                    // Said again as long as it is so: the first time may have gone unheard.
                    if failures % self.plan.retries == 0 {
                        let id = self.target.id.clone();
                        self.tell(Event::Unhealthy { id, reason }).await;
                    }
                }
            }
        }
    }

    async fn ask(&self, probe: &Probe, limit: Duration) -> Result<(), String> {
        match probe {
            Probe::Exec(argv) => self.exec(argv.clone(), limit).await,
            Probe::Tcp(port) => self.connect(*port, limit).await.map(drop),
            Probe::AnyTcp(ports) => {
                let mut last = String::new();
                for port in ports {
                    match self.connect(*port, limit).await {
                        Ok(_) => return Ok(()),
                        Err(cause) => last = cause,
                    }
                }
                Err(last)
            }
            Probe::Http { port, path, status } => self.http(*port, path, *status, limit).await,
        }
    }

    async fn exec(&self, argv: Vec<String>, limit: Duration) -> Result<(), String> {
        let runtime = self.runtime.clone();
        let id = self.target.id.clone();
        let spec = ExecSpec {
            argv,
            timeout: Some(limit.into()),
            ..ExecSpec::default()
        };
        blocking(move || inside::run(&runtime, &id, &spec)).await?
    }

    async fn connect(&self, port: u16, limit: Duration) -> Result<TcpStream, String> {
        let stream = match self.target.address {
            Some(ip) => timeout(limit, TcpStream::connect(SocketAddr::new(ip, port)))
                .await
                .map_err(|_| format!("port {port} did not answer within {limit:?}"))?,
            None => {
                let runtime = self.runtime.clone();
                let id = self.target.id.clone();
                blocking(move || runtime.dial(&id, port))
                    .await?
                    .and_then(|stream| {
                        stream.set_nonblocking(true)?;
                        TcpStream::from_std(stream)
                    })
            }
        };
        stream.map_err(|e| format!("port {port}: {e}"))
    }

    async fn http(
        &self,
        port: u16,
        path: &str,
        status: Option<u16>,
        limit: Duration,
    ) -> Result<(), String> {
        let request = async {
            let stream = self.connect(port, limit).await?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream))
                    .await
                    .map_err(|e| format!("port {port}: {e}"))?;
            let connection = tokio::spawn(connection);
            let request = hyper::Request::get(path)
                .header(hyper::header::HOST, "localhost")
                .header(hyper::header::USER_AGENT, "kiln-health")
                .body(Empty::<Bytes>::new())
                .map_err(|e| format!("{path}: {e}"))?;
            let response = sender.send_request(request).await;
            connection.abort();
            response
                .map(|r| r.status())
                .map_err(|e| format!("http port {port}{path}: {e}"))
        };
        let answered = timeout(limit, request)
            .await
            .map_err(|_| format!("http port {port}{path} did not answer within {limit:?}"))??;
        let good = match status {
            Some(wanted) => answered.as_u16() == wanted,
            None => answered.as_u16() < 400,
        };
        if good {
            Ok(())
        } else {
            Err(format!("http port {port}{path} answered {answered}"))
        }
    }
}

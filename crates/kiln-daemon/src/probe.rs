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
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use crate::engine::Message;
use crate::inside;
use crate::shared::blocking;

/// Longest single attempt while it is not ready yet: a hung attempt must not hide that
/// the next would succeed.
const FIRST_ATTEMPTS: Duration = Duration::from_secs(5);

/// Who speaks HTTP has answered by then, or is busy: that says nothing against it.
const ANSWER_WAIT: Duration = Duration::from_secs(1);

/// Without a `Host`: Redis takes that for an attack, and HTTP/1.0 does without (RFC 1945 section 5).
const QUESTION: &[u8] = b"GET / HTTP/1.0\r\nUser-Agent: kiln-health\r\n\r\n";

/// The status of an answer, if it is one: `HTTP/1.x NNN` (RFC 9112 section 4).
async fn status_of(mut stream: TcpStream) -> Option<u16> {
    let mut line = [0; "HTTP/1.1 200".len()];
    stream.write_all(QUESTION).await.ok()?;
    stream.read_exact(&mut line).await.ok()?;
    let digits = line.strip_prefix(b"HTTP/1.")?.get(2..)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

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
            Probe::Serves(ports) => {
                let mut last = String::new();
                for port in ports {
                    match self.serves(*port, limit).await {
                        Ok(()) => return Ok(()),
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

    /// Nobody said what the port speaks: it is asked in HTTP, and whatever is no answer in
    /// HTTP is as good as the connection that it came on.
    async fn serves(&self, port: u16, limit: Duration) -> Result<(), String> {
        let stream = self.connect(port, limit).await?;
        let status = timeout(ANSWER_WAIT.min(limit), status_of(stream)).await;
        match status.ok().flatten() {
            Some(status) if status >= 500 => Err(format!(
                "port {port} answered GET / with {status} (`x-kiln.ready` says what else to ask)"
            )),
            _ => Ok(()),
        }
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::Ipv4Addr;

    use kiln_model::Millis;
    use kiln_runtime::RuntimeConfig;
    use tokio::net::TcpListener;

    use super::*;

    /// A port on which everybody is told this, and hears nothing more.
    async fn telling(answer: &'static [u8]) -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                stream.write_all(answer).await.unwrap();
                held.push(stream);
            }
        });
        port
    }

    async fn asked(ports: Vec<u16>) -> Result<(), String> {
        let root = tempfile::tempdir().unwrap();
        let config = RuntimeConfig {
            root: root.path().to_owned(),
            shim: vec![],
        };
        let target = Target {
            id: InstanceId::new("asked").unwrap(),
            address: Some(Ipv4Addr::LOCALHOST.into()),
            proven: false,
        };
        let plan = ProbePlan {
            ready: vec![],
            health: None,
            interval: Millis(1),
            start_interval: Millis(1),
            timeout: Millis(1),
            retries: 1,
            settle: Millis(0),
            deadline: Millis(1),
        };
        let prober = Prober {
            runtime: Arc::new(Runtime::open(config).unwrap()),
            target,
            plan,
            sender: mpsc::channel(1).0,
        };
        prober
            .ask(&Probe::Serves(ports), Duration::from_secs(5))
            .await
    }

    #[tokio::test]
    async fn a_port_serves_unless_it_answers_in_http_that_it_does_not() {
        let bad = telling(b"HTTP/1.1 503 Service Unavailable\r\n\r\n").await;
        let error = asked(vec![bad]).await.unwrap_err();
        assert!(error.contains("answered GET / with 503"), "{error}");
        let good: [&[u8]; 5] = [
            b"HTTP/1.1 404 Not Found\r\n\r\n",
            b"HTTP/1.0 302 Found\r\n\r\n",
            b"-ERR unknown command\r\n",
            b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03",
            b"",
        ];
        for answer in good {
            let port = telling(answer).await;
            assert_eq!(asked(vec![port]).await, Ok(()));
            assert_eq!(asked(vec![bad, port]).await, Ok(()));
        }
    }
}

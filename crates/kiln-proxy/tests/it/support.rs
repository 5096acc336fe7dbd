//! A proxy and instances for tests.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONNECTION, HeaderValue, TRAILER, UPGRADE};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kiln_model::route::{AppProtocol, Backend, Published, RouteMode, ServiceRoute, Split};
use kiln_model::spec::Protocol;
use kiln_model::{Generation, InstanceId, Millis, RoutingTable, Traffic};
use kiln_proxy::{Applied, Client, ProxyConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// A /24 of loopback for each test, so that they may run at the same time, also in
/// several processes: whoever listens on its last address has it.
pub struct Net(
    Ipv4Addr,
    AtomicU8,
    #[allow(dead_code)] std::net::TcpListener,
);

impl Net {
    pub fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let low = NEXT.fetch_add(1, Ordering::Relaxed);
        let first = (std::process::id() % 250) as u8;
        let highs = (first..250).chain(0..first).map(|n| n + 1);
        let claim = |high| {
            Some((
                high,
                std::net::TcpListener::bind((Ipv4Addr::new(127, high, low, 255), 1)).ok()?,
            ))
        };
        let (high, claim) = highs.into_iter().find_map(claim).unwrap();
        Self(Ipv4Addr::new(127, high, low, 0), AtomicU8::new(1), claim)
    }

    pub fn address(&self) -> Ipv4Addr {
        let [a, b, c, _] = self.0.octets();
        Ipv4Addr::new(a, b, c, self.1.fetch_add(1, Ordering::Relaxed))
    }
}

/// The port of every instance.
pub const PORT: u16 = 8000;

pub struct Proxy {
    pub net: Net,
    pub client: Client,
    pub config: ProxyConfig,
    pub table: RoutingTable,
    pub listen: SocketAddr,
    _folder: tempfile::TempDir,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// With service `web` published on an own address, port 80.. of it.
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut ProxyConfig)) -> Self {
        let net = Net::new();
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| -> PathBuf { folder.path().join(name) };
        let mut config = ProxyConfig::new(path("proxy.sock"), path("proxy.json"));
        config.dns_port = 5300;
        config.catch_all = SocketAddr::from((net.address(), 0));
        config.resolv_conf = path("resolv.conf");
        change(&mut config);
        let listen = SocketAddr::from((net.address(), 8080));
        let (client, thread) = spawn(&config).await;
        let table = RoutingTable {
            environment: "shop".parse().unwrap(),
            generation: Generation(1),
            services: [("web".parse().unwrap(), route(&[]))].into(),
            published: vec![Published {
                listen,
                protocol: Protocol::Tcp,
                service: "web".parse().unwrap(),
                target: PORT,
            }],
            networks: vec![],
        };
        Self {
            net,
            client,
            config,
            table,
            listen,
            _folder: folder,
            thread: Some(thread),
        }
    }

    /// Ends it as `SIGTERM` does, and starts it again.
    pub async fn restart(&mut self) {
        self.stop().await;
        let (client, thread) = spawn(&self.config).await;
        self.client = client;
        self.thread = Some(thread);
    }

    pub async fn stop(&mut self) {
        self.client.shutdown().await.unwrap();
        let thread = self.thread.take().unwrap();
        tokio::task::spawn_blocking(move || thread.join().unwrap())
            .await
            .unwrap();
    }

    /// Another proxy takes its place. Returns the old one's thread, which ends with its
    /// last connection.
    pub async fn hand_over(&mut self) -> std::thread::JoinHandle<()> {
        let retired = self.retired();
        let mut config = self.config.clone();
        config.take_over = true;
        let new = std::thread::spawn(move || kiln_proxy::run_blocking(config).unwrap());
        let old = self.thread.replace(new).unwrap();
        for _ in 0..500 {
            let gone = old.is_finished() || self.retired() > retired;
            if gone && Client::connect(&self.config.socket).await.is_ok() {
                return old;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nobody took over");
    }

    /// Retired proxies that have not ended.
    pub fn retired(&self) -> usize {
        let files = self.config.socket.parent().unwrap().read_dir().unwrap();
        let names = files.map(|f| f.unwrap().file_name().into_string().unwrap());
        names.filter(|n| n.starts_with("proxy.before-")).count()
    }

    pub fn web(&mut self) -> &mut ServiceRoute {
        self.table.services.get_mut("web").unwrap()
    }

    pub async fn apply(&mut self) -> Applied {
        self.table.generation = self.table.generation.next();
        self.client.apply(&self.table).await.unwrap()
    }

    /// Service `web` goes to these from now on.
    pub async fn serve(&mut self, instances: &[&Instance]) {
        let protocols = self.web().protocols.clone();
        *self.web() = ServiceRoute {
            protocols,
            ..route(instances)
        };
        let applied = self.apply().await;
        assert_eq!(applied.failed, []);
    }

    /// As [`serve`](Self::serve), with so many percent to the last of them.
    pub async fn split(&mut self, weight: u8, instances: &[&Instance]) {
        let to = instances.iter().rev().take(1);
        *self.web() = ServiceRoute {
            split: Some(Split {
                weight,
                to: to.map(|i| i.id.clone()).collect(),
            }),
            protocols: self.web().protocols.clone(),
            ..route(instances)
        };
        self.apply().await;
    }

    pub async fn traffic(&self, instance: &Instance) -> Traffic {
        let of = vec![instance.id.clone()];
        let traffic = self.client.traffic(of).await.unwrap();
        traffic.get(&instance.id).cloned().unwrap_or_default()
    }

    pub async fn park(&mut self, limit: Millis) {
        self.web().backends.clear();
        self.web().mode = RouteMode::Park { limit };
        self.apply().await;
    }

    pub fn protocol(&mut self, protocol: AppProtocol) {
        self.web().protocols.insert(PORT, protocol);
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.listen).await.unwrap()
    }

    pub async fn drain(&self, instance: &Instance, limit: Duration) -> u32 {
        let report = self.client.drain(&instance.id, limit.into()).await;
        report.unwrap().cut
    }
}

/// The thread ends, soon.
pub async fn ends(thread: std::thread::JoinHandle<()>) {
    for _ in 0..500 {
        if thread.is_finished() {
            return thread.join().unwrap();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it goes on");
}

async fn spawn(config: &ProxyConfig) -> (Client, std::thread::JoinHandle<()>) {
    let run = config.clone();
    let thread = std::thread::spawn(move || {
        kiln_proxy::run_blocking(run).unwrap();
    });
    for _ in 0..500 {
        if let Ok(client) = Client::connect(&config.socket).await {
            return (client, thread);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the proxy does not start");
}

pub fn route(instances: &[&Instance]) -> ServiceRoute {
    ServiceRoute {
        mode: RouteMode::Serve,
        backends: instances.iter().map(|i| i.backend()).collect(),
        split: None,
        protocols: BTreeMap::new(),
    }
}

/// What an instance speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum App {
    Http,
    H2c,
    /// Echoes until the client closes its direction.
    Echo,
    /// Says `hello\n`, then echoes.
    Greets,
    /// Accepts and never says anything.
    Silent,
}

/// Runs on a thread and a runtime of its own; dropping it kills it, connections and all.
pub struct Instance {
    pub id: InstanceId,
    pub address: IpAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Instance {
    pub fn start(net: &Net, app: App) -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let id: InstanceId = format!("web-{number}").parse().unwrap();
        let address = net.address();
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let name = id.to_string();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = TcpListener::bind((address, PORT)).await.unwrap();
                ready.send(()).unwrap();
                tokio::select! {
                    () = serve(listener, app, name) => {}
                    _ = stopped => {}
                }
            });
        });
        is_ready.recv().unwrap();
        Self {
            id,
            address: address.into(),
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub fn backend(&self) -> Backend {
        Backend {
            instance: self.id.clone(),
            address: self.address,
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

async fn serve(listener: TcpListener, app: App, name: String) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let name = name.clone();
        tokio::spawn(async move {
            match app {
                App::Http => {
                    let service = service_fn(move |request| respond(request, name.clone()));
                    let served = http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades();
                    let _ = served.await;
                }
                App::H2c => {
                    let service = service_fn(move |request| respond(request, name.clone()));
                    let served = http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service);
                    let _ = served.await;
                }
                App::Echo => echo(stream).await,
                App::Greets => {
                    let mut stream = stream;
                    stream.write_all(b"hello\n").await.unwrap();
                    echo(stream).await;
                }
                App::Silent => {
                    let _stream = stream;
                    std::future::pending::<()>().await;
                }
            }
        });
    }
}

async fn echo(mut stream: TcpStream) {
    let (mut read, mut write) = stream.split();
    let _ = tokio::io::copy(&mut read, &mut write).await;
    let _ = write.shutdown().await;
}

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// `/echo`: the body comes back as it comes. `/slow?ms`: waits. `/headers`: tells the
/// request. `/trailers`: a body and a trailer. `/half`: breaks off. `/fail`: 500.
/// `/crash`: closes the connection. `/ws`: echoes frames.
async fn respond(
    mut request: Request<Incoming>,
    name: String,
) -> Result<Response<Body>, Infallible> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let mut response = match request.uri().path() {
        "/echo" => Response::new(request.into_body().boxed_unsync()),
        "/count" => {
            let body = request.into_body().collect().await;
            let length = body.map(|b| b.to_bytes().len().to_string());
            Response::new(full(length.unwrap_or_else(|_| "broken".into())))
        }
        "/refuse" => {
            let mut response = Response::new(full("too large"));
            *response.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
            response
        }
        "/fail" => {
            let mut response = Response::new(full("fails as asked"));
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        }
        // No answer at all.
        "/crash" => panic!("crashes as asked"),
        "/slow" => {
            tokio::time::sleep(Duration::from_millis(query.parse().unwrap())).await;
            Response::new(full("slow"))
        }
        "/headers" => Response::new(full(format!(
            "{} {} {:?}\n{:#?}",
            request.method(),
            request.uri(),
            request.version(),
            request.headers()
        ))),
        "/trailers" => {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", HeaderValue::from_static("42"));
            let frames = [
                Ok(Frame::data(Bytes::from("body"))),
                Ok(Frame::trailers(trailers)),
            ];
            let body = StreamBody::new(futures_util::stream::iter(frames));
            let mut response = Response::new(BodyExt::boxed_unsync(body));
            let names = HeaderValue::from_static("x-sum");
            response.headers_mut().insert(TRAILER, names);
            response
        }
        "/half" => {
            let frames = futures_util::stream::unfold(0, |n| async move {
                if n == 2 {
                    // The thread's runtime is not harmed; only this connection ends.
                    panic!("breaks off as asked");
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
                Some((Ok(Frame::data(Bytes::from("part"))), n + 1))
            });
            Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)))
        }
        "/ws" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                echo_frames(TokioIo::new(upgrade.await.unwrap())).await;
            });
            let mut response = Response::new(full(""));
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let headers = response.headers_mut();
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            response
        }
        _ => Response::new(full(format!("{name}\n"))),
    };
    let name = HeaderValue::from_str(&name).unwrap();
    response.headers_mut().insert("x-instance", name);
    Ok(response)
}

async fn echo_frames(mut stream: TokioIo<hyper::upgrade::Upgraded>) {
    loop {
        // Short, masked frames only.
        let mut head = [0u8; 6];
        if stream.read_exact(&mut head).await.is_err() {
            return;
        }
        let mut payload = vec![0u8; usize::from(head[1] & 0x7f)];
        stream.read_exact(&mut payload).await.unwrap();
        for (at, byte) in payload.iter_mut().enumerate() {
            *byte ^= head[2 + at % 4];
        }
        let frame = [&[head[0], payload.len() as u8], payload.as_slice()].concat();
        if stream.write_all(&frame).await.is_err() {
            return;
        }
    }
}

/// Sends `request` as it is, and reads to the end of the stream.
pub async fn raw(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// `GET path`, as a connection of its own.
pub async fn get(address: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: shop.test\r\nConnection: close\r\n\r\n");
    raw(address, &request).await
}

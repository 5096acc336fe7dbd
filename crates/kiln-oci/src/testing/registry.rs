//! A small registry in memory, true enough to push to and pull from, that can fail in
//! chosen ways.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kiln_model::Digest;
use tokio::net::TcpListener;

use super::SampleImage;
use crate::manifest::{self, Document};

/// The only user of a [`TestRegistry`] that wants a login.
pub const USER: &str = "potter";
pub const PASSWORD: &str = "clay:1";
/// That user's long-lived token.
pub const IDENTITY_TOKEN: &str = "long-lived";

/// What the registry demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Login {
    None,
    Basic,
    /// A token that anyone gets for pulling and [`USER`] for pushing.
    AnonymousToken,
    /// A token that only [`USER`] gets.
    UserToken,
}

/// How to fail.
#[derive(Clone, Debug)]
pub enum Failure {
    Status {
        code: u16,
        retry_after: Option<String>,
        body: String,
    },
    /// The connection breaks after so many bytes of the body.
    BreakAfter(usize),
    /// One byte of the body is another, and its digest header is left out.
    Corrupt,
    /// The answer's body is this instead.
    Body(Vec<u8>),
    /// The token that came with the request is no longer taken.
    TokenExpired,
    /// Redirected to this address.
    Redirect(String),
    /// The upload is to go to this address.
    UploadAt(String),
    /// Ranges are not known: the whole body is sent.
    NoRanges,
}

struct Fault {
    /// Applies to requests whose `METHOD /path` contains this.
    at: String,
    times: usize,
    failure: Failure,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    /// `GET /v2/…`, without the query.
    pub line: String,
    pub authorization: Option<String>,
    pub range: Option<String>,
}

#[derive(Default)]
struct State {
    blobs: BTreeMap<Digest, Vec<u8>>,
    /// By `repository:tag` or `repository@digest`: content type and bytes.
    manifests: BTreeMap<String, (String, Vec<u8>)>,
    faults: Vec<Fault>,
    seen: Vec<Seen>,
    uploads: usize,
}

/// Ends when it is dropped.
pub struct TestRegistry {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: tokio::task::JoinHandle<()>,
}

struct Shared {
    login: Login,
    address: SocketAddr,
    state: Mutex<State>,
}

type Body = BoxBody<Bytes, std::io::Error>;

impl TestRegistry {
    #[allow(clippy::unwrap_used, reason = "a fixture")]
    pub async fn start(login: Login) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            login,
            address,
            state: Mutex::default(),
        });
        let of_server = Arc::clone(&shared);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = Arc::clone(&of_server);
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let shared = Arc::clone(&shared);
                        async move { Ok::<_, Infallible>(shared.answer(request).await) }
                    });
                    let connection = hyper::server::conn::http1::Builder::new();
                    // Broken connections are part of the tests.
                    let _ = connection
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self {
            address,
            shared,
            server,
        }
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Adds an image under a tag, as if it had been pushed.
    pub fn put_image(&self, repository: &str, tag: &str, image: &SampleImage) {
        for bytes in image.blobs().into_iter().skip(1) {
            self.put_blob(&bytes);
        }
        self.put_manifest(repository, tag, &image.manifest);
    }

    pub fn put_blob(&self, bytes: &[u8]) {
        let digest = Digest::of(bytes);
        self.shared.state().blobs.insert(digest, bytes.to_vec());
    }

    /// Adds a manifest or index by its tag and by its digest.
    pub fn put_manifest(&self, repository: &str, tag: &str, bytes: &[u8]) {
        let mut state = self.shared.state();
        state.put_manifest(repository, tag, manifest_type(bytes), bytes.to_vec());
    }

    /// The bytes under `repository:tag` or `repository@digest`.
    pub fn manifest(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.shared.state();
        state.manifests.get(name).map(|(_, bytes)| bytes.clone())
    }

    pub fn blob(&self, digest: &Digest) -> Option<Vec<u8>> {
        self.shared.state().blobs.get(digest).cloned()
    }

    /// Fails the next `times` requests whose `METHOD /path` contains `at`.
    pub fn fail(&self, at: &str, times: usize, failure: Failure) {
        let at = at.into();
        let fault = Fault { at, times, failure };
        self.shared.state().faults.push(fault);
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state().seen.clone()
    }

    /// How many requests' `METHOD /path` contain `what`.
    pub fn count(&self, what: &str) -> usize {
        let state = self.shared.state();
        state.seen.iter().filter(|s| s.line.contains(what)).count()
    }
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl State {
    fn put_manifest(&mut self, repository: &str, tag: &str, kind: String, bytes: Vec<u8>) {
        let by_digest = format!("{repository}@{}", Digest::of(&bytes));
        let names = match tag.starts_with("sha256:") {
            true => vec![by_digest],
            false => vec![by_digest, format!("{repository}:{tag}")],
        };
        for name in names {
            self.manifests.insert(name, (kind.clone(), bytes.clone()));
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let line = format!("{} {}", parts.method, parts.uri.path());
        let header = |name: &str| text(&parts.headers, name);
        self.state().seen.push(Seen {
            line: line.clone(),
            authorization: header("authorization"),
            range: header("range"),
        });
        let failure = self.failure(&line);
        match &failure {
            Some(Failure::Status {
                code,
                retry_after,
                body,
            }) => return failed(*code, retry_after.as_deref(), body),
            Some(Failure::Redirect(address)) => {
                return plain(
                    Response::builder().status(307).header("location", address),
                    "",
                );
            }
            Some(Failure::UploadAt(address)) => {
                let builder = Response::builder().status(202).header("location", address);
                return plain(builder, "");
            }
            Some(Failure::TokenExpired) => return self.demand(),
            _ => {}
        }
        if parts.uri.path() == "/token" {
            return self
                .token(&parts.method, parts.uri.query(), &parts.headers, body)
                .await;
        }
        if !self.allowed(&parts.method, header("authorization").as_deref()) {
            return self.demand();
        }
        let query = parts.uri.query().unwrap_or_default().to_owned();
        let range = header("range").filter(|_| !matches!(failure, Some(Failure::NoRanges)));
        let content_type = header("content-type").unwrap_or_default();
        let Ok(content) = body.collect().await else {
            return failed(400, None, "the body broke off");
        };
        let content = content.to_bytes().to_vec();
        let path = parts.uri.path().strip_prefix("/v2/").unwrap_or_default();
        let answer = self.route(&parts.method, path, &query, &content_type, content);
        answer.finish(range.as_deref(), failure)
    }

    fn failure(&self, line: &str) -> Option<Failure> {
        let mut state = self.state();
        let fault = state
            .faults
            .iter_mut()
            .find(|f| f.times > 0 && line.contains(&f.at))?;
        fault.times -= 1;
        Some(fault.failure.clone())
    }

    fn route(
        &self,
        method: &Method,
        path: &str,
        query: &str,
        content_type: &str,
        content: Vec<u8>,
    ) -> Answer {
        let mut state = self.state();
        if path.is_empty() {
            return Answer::new(200);
        }
        if let Some((repository, selector)) = path.rsplit_once("/manifests/") {
            return match *method {
                Method::PUT => {
                    let digest = Digest::of(&content);
                    state.put_manifest(repository, selector, content_type.into(), content);
                    Answer::new(201).header("docker-content-digest", digest)
                }
                _ => state.get_manifest(repository, selector),
            };
        }
        if path.ends_with("/blobs/uploads/") {
            state.uploads += 1;
            let location = format!("/v2/{path}{}?state=x%2Fy", state.uploads);
            return Answer::new(202).header("location", location);
        }
        if path.contains("/blobs/uploads/") {
            let digest = Digest::of(&content);
            if !query.contains("state=x%2Fy") || !query.contains(&digest.hex()) {
                return Answer::new(400);
            }
            state.blobs.insert(digest, content);
            return Answer::new(201);
        }
        let digest = path
            .rsplit_once("/blobs/")
            .and_then(|(_, d)| d.parse().ok());
        match digest.and_then(|d: Digest| state.blobs.get(&d)) {
            Some(bytes) => Answer::new(200).body(bytes.clone()),
            None => Answer::new(404).body(error_body("BLOB_UNKNOWN")),
        }
    }

    fn allowed(&self, method: &Method, authorization: Option<&str>) -> bool {
        let reading = matches!(*method, Method::GET | Method::HEAD);
        match self.login {
            Login::None => true,
            Login::Basic => authorization == Some(&basic()),
            Login::AnonymousToken | Login::UserToken => match authorization {
                Some("Bearer pull") => reading,
                Some("Bearer push") => true,
                _ => false,
            },
        }
    }

    fn demand(&self) -> Response<Body> {
        let challenge = match self.login {
            Login::None | Login::Basic => "Basic realm=\"clay\"".into(),
            _ => format!(
                "Bearer realm=\"http://{}/token\",service=\"test\"",
                self.address
            ),
        };
        let builder = Response::builder().status(401);
        plain(builder.header("www-authenticate", challenge), "{}")
    }

    async fn token(
        &self,
        method: &Method,
        query: Option<&str>,
        headers: &HeaderMap,
        body: Incoming,
    ) -> Response<Body> {
        let mut query = query.unwrap_or_default().to_owned();
        let mut user = text(headers, "authorization").is_some_and(|a| a == basic());
        if *method == Method::POST {
            let Ok(form) = body.collect().await else {
                return failed(400, None, "");
            };
            query = String::from_utf8_lossy(&form.to_bytes()).into_owned();
            user = query.contains("grant_type=refresh_token")
                && query.contains(&format!("refresh_token={IDENTITY_TOKEN}"));
        }
        let push = query.contains("push");
        let service = query.contains("service=test") && query.contains("scope=repository%3A");
        if !service || !(user || (self.login == Login::AnonymousToken && !push)) {
            return failed(401, None, "{}");
        }
        let token = if push { "push" } else { "pull" };
        let key = if *method == Method::POST {
            "access_token"
        } else {
            "token"
        };
        plain(Response::builder(), format!("{{\"{key}\":\"{token}\"}}"))
    }
}

impl State {
    fn get_manifest(&self, repository: &str, selector: &str) -> Answer {
        let separator = if selector.starts_with("sha256:") {
            '@'
        } else {
            ':'
        };
        match self
            .manifests
            .get(&format!("{repository}{separator}{selector}"))
        {
            Some((kind, bytes)) => Answer::new(200)
                .header("content-type", kind)
                .header("docker-content-digest", Digest::of(bytes))
                .body(bytes.clone()),
            None => Answer::new(404).body(error_body("MANIFEST_UNKNOWN")),
        }
    }
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    fn header(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }

    fn body(mut self, body: Vec<u8>) -> Self {
        self.body = body;
        self
    }

    fn finish(mut self, range: Option<&str>, failure: Option<Failure>) -> Response<Body> {
        let start = range
            .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
            .filter(|start: &usize| *start < self.body.len() && self.status == 200);
        if let Some(start) = start {
            let total = self.body.len();
            self.body.drain(..start);
            self.status = 206;
            let value = format!("bytes {start}-{}/{total}", total - 1);
            self.headers.push(("content-range", value));
        }
        match &failure {
            Some(Failure::Corrupt) => {
                let middle = self.body.len() / 2;
                if let Some(byte) = self.body.get_mut(middle) {
                    *byte ^= 1;
                }
                self.headers
                    .retain(|(name, _)| *name != "docker-content-digest");
            }
            Some(Failure::Body(body)) => {
                self.body.clone_from(body);
                self.headers
                    .retain(|(name, _)| *name != "docker-content-digest");
            }
            _ => {}
        }
        let mut builder = Response::builder().status(self.status);
        for (name, value) in self.headers {
            builder = builder.header(name, value);
        }
        match failure {
            Some(Failure::BreakAfter(bytes)) => {
                let builder = builder.header("content-length", self.body.len());
                let first = Bytes::from(self.body).split_to(bytes);
                let first = futures_util::stream::once(async { Ok(Frame::data(first)) });
                let broken = futures_util::stream::once(async {
                    // What was written must be on its way before the connection goes.
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    Err(std::io::Error::other("broken on purpose"))
                });
                let stream = StreamBody::new(futures_util::StreamExt::chain(first, broken));
                finished(builder.body(BodyExt::boxed(stream)))
            }
            _ => plain(builder, self.body),
        }
    }
}

fn plain(builder: http::response::Builder, body: impl Into<Bytes>) -> Response<Body> {
    finished(
        builder.body(
            Full::new(body.into())
                .map_err(|never| match never {})
                .boxed(),
        ),
    )
}

#[allow(clippy::unwrap_used, reason = "a fixture; tests choose the headers")]
fn finished(response: Result<Response<Body>, http::Error>) -> Response<Body> {
    response.unwrap()
}

fn failed(code: u16, retry_after: Option<&str>, body: &str) -> Response<Body> {
    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut builder = Response::builder().status(status);
    if let Some(value) = retry_after {
        builder = builder.header("retry-after", value);
    }
    plain(builder, body.to_owned())
}

fn error_body(code: &str) -> Vec<u8> {
    format!(r#"{{"errors":[{{"code":"{code}","message":"not here"}}]}}"#).into_bytes()
}

fn manifest_type(bytes: &[u8]) -> String {
    let said = match manifest::parse(bytes, None) {
        Ok(Document::Manifest(m)) => m.media_type,
        Ok(Document::Index(i)) => i.media_type,
        Err(_) => None,
    };
    said.unwrap_or_else(|| "application/json".into())
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn basic() -> String {
    use base64::Engine;
    let pair = format!("{USER}:{PASSWORD}");
    format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(pair)
    )
}

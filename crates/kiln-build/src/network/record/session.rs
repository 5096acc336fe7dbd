//! One RUN's exchanges: what is recorded is given again, what is new is fetched, given and
//! recorded.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::HeaderMap;
use hyper::{Method, Request, Response, StatusCode};
use kiln_model::{Digest, Hasher};
use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use super::bodies::Bodies;
use super::mask::Mask;
use super::tape::{ACCEPT, Asked, MAX_EXCHANGES, Tape};
use super::upstream::{self, PATIENCE, Route, Upstream};
use super::{Exchange, Recording};
use crate::network::RecordError;

pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The body of a request is held in memory.
const MAX_REQUEST: usize = 8 << 20;
/// A response larger than this is refused: 64 GiB.
const MAX_RESPONSE: u64 = 64 << 30;
/// A larger response is not looked into for tokens.
const LOOKED_INTO: u64 = 64 << 10;
/// How much of a response waits in memory for who asked.
const CHUNKS: usize = 8;
const CHUNK: usize = 64 << 10;
/// So many times people are told of one RUN's network.
const TOLD: usize = 20;
/// Headers of a request that decide what comes back, beside `Accept`.
const CONDITIONS: [&str; 2] = ["range", "git-protocol"];

/// What one RUN's exchanges go by.
pub(crate) struct Setting<'a> {
    pub known: Vec<Exchange>,
    /// Also what the RUN does not ask for this time is kept: a cache mount may have it.
    pub keep_all: bool,
    /// The folder of the bodies.
    pub bodies: &'a Path,
    pub route: Route,
    /// The build's own secrets, to be kept out of what is written down.
    pub secrets: &'a BTreeMap<String, Vec<u8>>,
    /// Tells people.
    pub tell: Box<dyn Fn(String) + Send + Sync>,
}

/// What came of it.
pub(crate) struct Outcome {
    pub recording: Recording,
    pub error: Option<RecordError>,
}

pub(crate) struct Session {
    tape: Mutex<Tape>,
    keep_all: bool,
    bodies: Bodies,
    upstream: Upstream,
    mask: Mask,
    tell: Box<dyn Fn(String) + Send + Sync>,
    told: AtomicUsize,
    error: Mutex<Option<RecordError>>,
    under_way: Arc<UnderWay>,
}

/// Responses that are still coming in.
#[derive(Default)]
struct UnderWay {
    count: Mutex<usize>,
    ended: Condvar,
}

struct Coming(Arc<UnderWay>);

impl Coming {
    fn new(of: &Arc<UnderWay>) -> Self {
        *of.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Self(of.clone())
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        *self.0.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.ended.notify_all();
    }
}

/// A request that is to be sent on.
struct Sent {
    /// As it may be written down.
    asked: Asked,
    /// Where it really goes.
    url: reqwest::Url,
    method: Method,
    headers: HeaderMap,
    body: Bytes,
}

/// Text for who asked; also the empty one.
pub(super) fn said(status: StatusCode, text: &str) -> Response<Body> {
    let text = match text {
        "" => Bytes::new(),
        text => Bytes::from(format!("kiln: {text}\n")),
    };
    let body = Full::new(text)
        .map_err(|never| match never {})
        .boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

fn shown(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

impl Session {
    pub fn new(setting: Setting<'_>) -> Self {
        Self {
            tape: Mutex::new(Tape::new(setting.known)),
            keep_all: setting.keep_all,
            bodies: Bodies::new(setting.bodies),
            upstream: Upstream::new(setting.route),
            mask: Mask::new(setting.secrets.values().map(Vec::as_slice)),
            tell: setting.tell,
            told: AtomicUsize::new(0),
            error: Mutex::default(),
            under_way: Arc::default(),
        }
    }

    /// After the command has ended, and nobody asks any more. `direct`: what went past.
    pub fn finish(&self, direct: Vec<String>) -> Outcome {
        let begun = Instant::now();
        let mut count = self
            .under_way
            .count
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while *count > 0 && begun.elapsed() < PATIENCE {
            let waited = self
                .under_way
                .ended
                .wait_timeout(count, Duration::from_millis(100));
            count = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if *count > 0 {
            self.not_recorded("a response that did not come to its end");
        }
        drop(count);
        for what in direct {
            self.not_recorded(&what);
        }
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        Outcome {
            recording: self.tape().recording(self.keep_all),
            error: error.take(),
        }
    }

    fn tape(&self) -> MutexGuard<'_, Tape> {
        self.tape.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self, text: String) {
        if self.told.fetch_add(1, Ordering::Relaxed) < TOLD {
            (self.tell)(text);
        }
    }

    /// Names something that a later build will not have.
    pub(super) fn not_recorded(&self, what: &str) {
        let what = self.mask.url(what);
        if self.tape().note(what.clone()) {
            self.tell(format!("not hermetic: {what} is not recorded"));
        }
    }

    /// A program ended a TLS connection that was answered for `host`.
    pub(super) fn refused(&self, host: &str, port: u16, cause: &io::Error) {
        if cause.to_string().contains("alert") {
            self.tell(format!(
                "a program does not trust kiln's recording proxy for {host}:{port} ({cause}): it \
                 goes by none of the variables that name certificates (SSL_CERT_FILE …)"
            ));
        }
    }

    pub(super) async fn addresses(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        self.upstream.addresses(host, port).await
    }

    fn fail(&self, error: RecordError) -> Response<Body> {
        let text = error.to_string();
        let mut first = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
        said(StatusCode::BAD_GATEWAY, &text)
    }

    pub(super) async fn exchange(
        self: &Arc<Self>,
        url: String,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let sent = match self.read(&url, request).await {
            Ok(sent) => sent,
            Err((status, text)) => {
                self.tell(format!("{}: {text}", self.mask.url(&url)));
                return said(status, &text);
            }
        };
        let known = self.tape().play(&sent.asked);
        match known {
            Some(exchange) => self.replay(exchange, sent).await,
            None => self.live(sent).await,
        }
    }

    async fn read(
        &self,
        url: &str,
        request: Request<Incoming>,
    ) -> Result<Sent, (StatusCode, String)> {
        let bad = |text: String| (StatusCode::BAD_REQUEST, text);
        let (parts, body) = request.into_parts();
        let body = Limited::new(body, MAX_REQUEST).collect().await;
        let body = body.map_err(|cause| {
            let text = format!(
                "a request's body can't be read, or has more than {MAX_REQUEST} bytes: {cause}"
            );
            (StatusCode::PAYLOAD_TOO_LARGE, text)
        })?;
        let body = body.to_bytes();
        let parsed = reqwest::Url::parse(url).map_err(|e| bad(format!("no address: {e}")))?;
        let real = self.upstream.real(parsed.as_str());
        let changed = real != parsed.as_str();
        let real = reqwest::Url::parse(&real).map_err(|e| bad(format!("no address: {e}")))?;
        // Where the machine itself has its mirror, that may be on it.
        if !changed && !self.upstream.allows(&real) {
            return Err((
                StatusCode::FORBIDDEN,
                "this machine's own addresses are out of a RUN's reach".into(),
            ));
        }
        let header = |name: &str| {
            let value = parts.headers.get(name)?.to_str().ok()?;
            Some(value.to_owned())
        };
        let headers = upstream::outgoing(&parts.headers);
        let mut conditions: BTreeMap<String, String> = CONDITIONS
            .iter()
            .filter(|name| headers.contains_key(**name))
            .filter_map(|name| Some(((*name).to_owned(), header(name)?)))
            .collect();
        if parts.headers.contains_key("authorization") || !parsed.username().is_empty() {
            conditions.insert("authorization".into(), "given".into());
        }
        if !body.is_empty() {
            conditions.insert("body".into(), Digest::of(&body).to_string());
        }
        Ok(Sent {
            asked: Asked {
                url: self.mask.url(parsed.as_str()),
                method: parts.method.to_string(),
                conditions,
                accept: header(ACCEPT).unwrap_or_default(),
            },
            url: real,
            method: parts.method,
            headers,
            body,
        })
    }

    async fn replay(&self, exchange: Exchange, sent: Sent) -> Response<Body> {
        let head = sent.method == Method::HEAD;
        let (bodies, digest) = (self.bodies.clone(), exchange.sha256);
        let file = match exchange.size {
            0 => None,
            _ => {
                let opened = tokio::task::spawn_blocking(move || bodies.open(&digest)).await;
                match opened.unwrap_or_else(|e| Err(io::Error::other(e))) {
                    Ok(Some(file)) => Some(file),
                    Ok(None) => match self.again(&exchange, sent).await {
                        Ok(file) => Some(file),
                        Err(error) => return self.fail(error),
                    },
                    Err(cause) => {
                        return self.fail(RecordError::Body { digest, cause });
                    }
                }
            }
        };
        let body = match file {
            Some(file) => from_file(file),
            None => empty(),
        };
        let length = (!head).then_some(exchange.size);
        response(
            exchange.status,
            upstream::given(&exchange.headers),
            length,
            body,
        )
    }

    /// Fetches a recorded response whose body is not here; it must be what it was.
    async fn again(&self, exchange: &Exchange, sent: Sent) -> Result<File, RecordError> {
        let gone = |cause: String| RecordError::Gone {
            url: exchange.url.clone(),
            expected: exchange.sha256,
            cause,
        };
        let asked = self.send(&sent).await;
        let mut found = match asked {
            Ok(response) => self.spooled(response, exchange).await,
            Err(cause) => Err(gone(cause)),
        };
        // An address that was valid for a moment: whoever named it names another now.
        if found.is_err()
            && sent.method == Method::GET
            && let Some(origin) = self.origin(&exchange.url)
        {
            let client = self.upstream.following().map_err(|e| gone(shown(&e)))?;
            let mut headers = sent.headers.clone();
            headers.remove("authorization");
            let request = client.get(self.upstream.real(&origin)).headers(headers);
            found = match request.send().await {
                Ok(response) => self.spooled(response, exchange).await,
                Err(cause) => Err(gone(shown(&cause.without_url()))),
            };
        }
        found
    }

    /// The first of the addresses that led to this one.
    fn origin(&self, url: &str) -> Option<String> {
        let tape = self.tape();
        let mut url = url;
        let mut origin = None;
        // More steps than this are a circle.
        for _ in 0..20 {
            let Some(before) = tape.leads_to(url) else {
                break;
            };
            url = &before.url;
            origin = Some(before.url.clone());
        }
        origin
    }

    async fn spooled(
        &self,
        mut response: reqwest::Response,
        exchange: &Exchange,
    ) -> Result<File, RecordError> {
        let changed = |found: String| RecordError::Changed {
            url: exchange.url.clone(),
            expected: exchange.sha256,
            found,
        };
        let status = response.status().as_u16();
        if status != exchange.status {
            return Err(changed(format!("status {status}")));
        }
        let mut spool = Spool::new(&self.bodies)?;
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) => spool.add(&chunk).await?,
                Ok(None) => break,
                Err(cause) => {
                    return Err(RecordError::Gone {
                        url: exchange.url.clone(),
                        expected: exchange.sha256,
                        cause: shown(&cause.without_url()),
                    });
                }
            }
        }
        let (file, digest, _) = spool.end().await?;
        if digest != exchange.sha256 {
            return Err(changed(digest.to_string()));
        }
        let body = |cause| RecordError::Body { digest, cause };
        let kept = self.bodies.keep(file, &digest).map_err(body)?;
        // Written from its beginning: it is read from there, too.
        io::Seek::rewind(&mut &kept).map_err(body)?;
        Ok(kept)
    }

    async fn send(&self, sent: &Sent) -> Result<reqwest::Response, String> {
        let client = self.upstream.client().map_err(|e| shown(&e))?;
        let again = sent.method == Method::GET || sent.method == Method::HEAD;
        let mut tries = if again { 2 } else { 1 };
        loop {
            tries -= 1;
            let mut request = client.request(sent.method.clone(), sent.url.clone());
            request = request.headers(sent.headers.clone());
            if !sent.body.is_empty() {
                request = request.body(sent.body.clone());
            }
            match request.send().await {
                Ok(response) => return Ok(response),
                // The address may hold what may not be told.
                Err(cause) if tries == 0 => return Err(shown(&cause.without_url())),
                Err(_) => {}
            }
        }
    }

    /// Fetches what is not recorded, gives it on as it comes, and records it.
    async fn live(self: &Arc<Self>, sent: Sent) -> Response<Body> {
        let Some(place) = self.tape().place() else {
            return self.fail(RecordError::TooMany {
                limit: MAX_EXCHANGES,
            });
        };
        let coming = Coming::new(&self.under_way);
        let response = match self.send(&sent).await {
            Ok(response) => response,
            Err(cause) => {
                let text = format!("can't fetch {}: {cause}", sent.asked.url);
                self.tell(text.clone());
                return said(StatusCode::BAD_GATEWAY, &text);
            }
        };
        let status = response.status();
        let head = sent.method == Method::HEAD;
        let mut kept = upstream::kept(response.headers(), head);
        let mut passed = upstream::given(&kept);
        for cookie in response.headers().get_all("set-cookie") {
            passed.append("set-cookie", cookie.clone());
        }
        if let Some(location) = kept.get_mut("location") {
            *location = self.mask.url(location);
        }
        let mut request = sent.asked.conditions.clone();
        if upstream::varies(response.headers()) {
            request.insert(ACCEPT.into(), sent.asked.accept.clone());
        }
        let recorded = Exchange {
            method: sent.asked.method,
            url: sent.asked.url,
            request,
            status: status.as_u16(),
            headers: kept,
            sha256: Digest::of(b""),
            size: 0,
        };
        let length = response.content_length().filter(|_| !head);
        let length = length.filter(|_| status != StatusCode::NO_CONTENT);
        let (to, from) = mpsc::channel(CHUNKS);
        let session = self.clone();
        tokio::spawn(async move {
            session.record(response, place, recorded, to).await;
            drop(coming);
        });
        let body = match head {
            true => empty(),
            false => from_channel(from),
        };
        response_of(status, passed, length, body)
    }

    async fn record(
        &self,
        mut response: reqwest::Response,
        place: u64,
        mut recorded: Exchange,
        to: mpsc::Sender<io::Result<Bytes>>,
    ) {
        let url = recorded.url.clone();
        let received = self.receive(&mut response, to).await;
        let (file, digest, size) = match received {
            Ok(received) => received,
            Err(cause) => {
                self.tell(format!("{url} did not come to its end: {cause}"));
                return;
            }
        };
        let status = response.status();
        let passing = [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT];
        if status.is_server_error() || passing.contains(&status) {
            self.tell(format!(
                "{url}: the server says {status}; that is not recorded"
            ));
            return;
        }
        (recorded.sha256, recorded.size) = (digest, size);
        if size > 0 {
            if size <= LOOKED_INTO && self.lets_in(file.path()) {
                self.not_recorded(&format!("a token from {url}"));
                return;
            }
            if let Err(cause) = self.bodies.keep(file, &digest) {
                self.tell(format!("{url} can't be recorded: {cause}"));
                return;
            }
        }
        self.tape().learn(place, recorded);
    }

    /// Whether a small response is a token, or holds a secret of the build.
    fn lets_in(&self, path: &Path) -> bool {
        const KEYS: [&str; 4] = ["token", "access_token", "refresh_token", "id_token"];
        let Ok(text) = std::fs::read_to_string(path) else {
            return false;
        };
        let object = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&text);
        self.mask.hides(&text)
            || object.is_ok_and(|o| {
                KEYS.iter()
                    .any(|key| o.get(*key).is_some_and(|v| v.is_string()))
            })
    }

    async fn receive(
        &self,
        response: &mut reqwest::Response,
        to: mpsc::Sender<io::Result<Bytes>>,
    ) -> Result<(NamedTempFile, Digest, u64), String> {
        let mut spool = Spool::new(&self.bodies).map_err(|e| shown(&e))?;
        // Who leaves early still has the whole recorded.
        let mut to = Some(to);
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return spool.end().await.map_err(|e| shown(&e)),
                Err(cause) => {
                    let text = shown(&cause.without_url());
                    if let Some(to) = to {
                        let _ = to.send(Err(io::Error::other(text.clone()))).await;
                    }
                    return Err(text);
                }
            };
            spool.add(&chunk).await.map_err(|e| shown(&e))?;
            if let Some(open) = &to
                && open.send(Ok(chunk)).await.is_err()
            {
                to = None;
            }
        }
    }
}

/// A body on its way into the store.
struct Spool {
    file: NamedTempFile,
    out: tokio::fs::File,
    hasher: Hasher,
    size: u64,
}

impl Spool {
    fn new(bodies: &Bodies) -> Result<Self, RecordError> {
        let begin = || {
            let file = bodies.begin()?;
            let out = tokio::fs::File::from_std(file.as_file().try_clone()?);
            Ok((file, out))
        };
        let (file, out) = begin().map_err(RecordError::Disk)?;
        Ok(Self {
            file,
            out,
            hasher: Hasher::new(),
            size: 0,
        })
    }

    async fn add(&mut self, chunk: &[u8]) -> Result<(), RecordError> {
        self.size += chunk.len() as u64;
        if self.size > MAX_RESPONSE {
            return Err(RecordError::TooLong {
                limit: MAX_RESPONSE,
            });
        }
        self.hasher.update(chunk);
        self.out.write_all(chunk).await.map_err(RecordError::Disk)
    }

    async fn end(mut self) -> Result<(NamedTempFile, Digest, u64), RecordError> {
        self.out.flush().await.map_err(RecordError::Disk)?;
        Ok((self.file, self.hasher.finish(), self.size))
    }
}

fn empty() -> Body {
    Full::new(Bytes::new())
        .map_err(|never| match never {})
        .boxed_unsync()
}

fn from_file(file: File) -> Body {
    let file = tokio::fs::File::from_std(file);
    let chunks = stream::unfold(Some(file), |file| async {
        let mut file = file?;
        let mut chunk = vec![0; CHUNK];
        match file.read(&mut chunk).await {
            Ok(0) => None,
            Ok(length) => {
                chunk.truncate(length);
                Some((Ok(Frame::data(Bytes::from(chunk))), Some(file)))
            }
            Err(cause) => Some((Err(cause), None)),
        }
    });
    BodyExt::boxed_unsync(StreamBody::new(chunks))
}

fn from_channel(from: mpsc::Receiver<io::Result<Bytes>>) -> Body {
    let chunks = stream::unfold(from, |mut from| async {
        let chunk = from.recv().await?;
        Some((chunk.map(Frame::data), from))
    });
    BodyExt::boxed_unsync(StreamBody::new(chunks))
}

fn response(status: u16, headers: HeaderMap, length: Option<u64>, body: Body) -> Response<Body> {
    // The lock is a file that people may change.
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    response_of(status, headers, length, body)
}

fn response_of(
    status: StatusCode,
    headers: HeaderMap,
    length: Option<u64>,
    body: Body,
) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    if let Some(length) = length {
        response
            .headers_mut()
            .insert("content-length", length.into());
    }
    response
}

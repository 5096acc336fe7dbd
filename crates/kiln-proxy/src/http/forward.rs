//! One request: prepared once, sent to one instance (to another only while nothing has
//! been sent), its answer passed on.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderValue, TRANSFER_ENCODING, UPGRADE};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use kiln_model::route::AppProtocol;

use super::Client;
use super::body::{Connection, Gate, Held, InBody, OutBody};
use super::headers;
use super::refusal::{plain, refused};
use crate::core::Opened;
use crate::instance::{Instance, Lease};
use crate::limits::{CONNECT_ATTEMPTS, POOL_AGE, POOL_AGE_UNREPEATABLE};
use crate::pool;
use crate::routes::Destination;
use crate::service::Unit;
use crate::stats::Failure;
use crate::tunnel::{Content, tunnel};

/// Never fails: what can't be served is refused with a status.
pub(super) async fn handle(client: &Client, request: Request<Incoming>) -> Response<OutBody> {
    let (destination, listed) = client.destination();
    let h1_client = request.version() < Version::HTTP_2;
    let mut response = match prepare(client, &destination, request) {
        Ok(outgoing) => match exchange(&client.opened, &destination, outgoing).await {
            Ok(response) => response,
            Err(failure) => {
                destination.service.failures.count(failure);
                refused(&destination.service, failure)
            }
        },
        Err(refusal) => *refusal,
    };
    let last = !listed || client.opened.core.is_retired();
    if last && h1_client && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
    response
}

/// A request as the instance gets it.
struct Outgoing {
    request: Request<InBody>,
    upgrade: Option<(OnUpgrade, HeaderValue)>,
    gate: Option<Arc<Gate>>,
    h2: bool,
    /// Sending it twice does no harm, and it can be sent twice.
    repeatable: bool,
}

fn prepare(
    client: &Client,
    destination: &Destination,
    mut request: Request<Incoming>,
) -> Result<Outgoing, Box<Response<OutBody>>> {
    let refuse = |status, text: &str| Box::new(plain(status, format!("kiln: {text}\n")));
    if request.method() == Method::CONNECT {
        return Err(refuse(
            StatusCode::NOT_IMPLEMENTED,
            "CONNECT is not supported",
        ));
    }
    if !headers::transfer_encoding_is_known(request.headers()) {
        let text = "the only transfer coding supported is chunked";
        return Err(refuse(StatusCode::NOT_IMPLEMENTED, text));
    }
    let from_h2 = request.version() >= Version::HTTP_2;
    let h2 = match destination.service.protocol(destination.port) {
        Some(AppProtocol::H2c) => true,
        Some(_) => false,
        None => from_h2,
    };
    let upgrade = (!from_h2 && !h2)
        .then(|| headers::wanted_upgrade(request.headers()))
        .flatten()
        .map(|wanted| (hyper::upgrade::on(&mut request), wanted));
    let expects = !from_h2 && !h2 && headers::expects_continue(request.headers());
    let gate = expects.then(Arc::<Gate>::default);

    let (mut parts, body) = request.into_parts();
    let body = InBody::new(body, gate.clone());
    let host = host(&parts);
    headers::strip_hop_by_hop(&mut parts.headers);
    if from_h2 {
        headers::join_cookies(&mut parts.headers);
    }
    headers::forwarded(
        &mut parts.headers,
        client.peer.ip(),
        host.as_ref().and_then(|host| host.to_str().ok()),
        destination.edge,
    );
    if let Some((_, wanted)) = &upgrade {
        let upgrade = HeaderValue::from_static("upgrade");
        parts.headers.insert(CONNECTION, upgrade);
        parts.headers.insert(UPGRADE, wanted.clone());
    }
    let Some(uri) = set_target(&mut parts, host, h2) else {
        return Err(refuse(
            StatusCode::BAD_REQUEST,
            "this request has no usable Host",
        ));
    };
    parts.uri = uri;
    if !h2 && !body.is_empty() && !parts.headers.contains_key(CONTENT_LENGTH) {
        // hyper would take a GET without a length for one without a body.
        let chunked = HeaderValue::from_static("chunked");
        parts.headers.insert(TRANSFER_ENCODING, chunked);
    }
    let repeatable = parts.method.is_safe() && body.is_empty() && upgrade.is_none();
    let mut request = Request::from_parts(parts, body);
    if let Some(gate) = gate.clone() {
        hyper::ext::on_informational(&mut request, move |answer| {
            if answer.status() == StatusCode::CONTINUE {
                gate.open();
            }
        });
    }
    Ok(Outgoing {
        request,
        upgrade,
        gate,
        h2,
        repeatable,
    })
}

/// What the client calls this server: the target's authority goes before `Host`
/// (RFC 9112, 3.2.2).
fn host(parts: &http::request::Parts) -> Option<HeaderValue> {
    match parts.uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        None => parts.headers.get(HOST).cloned(),
    }
}

/// HTTP/1: a path, and `Host`. HTTP/2: the whole, and no `Host`.
fn set_target(
    parts: &mut http::request::Parts,
    host: Option<HeaderValue>,
    h2: bool,
) -> Option<Uri> {
    let path = parts.uri.path_and_query().cloned();
    let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
    if !h2 {
        parts.version = Version::HTTP_11;
        if let Some(host) = host {
            parts.headers.insert(HOST, host);
        }
        return Some(Uri::from(path));
    }
    parts.version = Version::HTTP_2;
    parts.headers.remove(HOST);
    let host = host?;
    let authority = host.to_str().ok()?;
    Uri::builder()
        .scheme("http")
        .authority(authority)
        .path_and_query(path)
        .build()
        .ok()
}

/// Where a request went, with everything that has to be held until the answer's end.
struct Sent {
    response: Response<Incoming>,
    lease: Arc<Lease>,
    connection: Connection,
}

async fn exchange(
    opened: &Arc<Opened>,
    destination: &Destination,
    outgoing: Outgoing,
) -> Result<Response<OutBody>, Failure> {
    let Outgoing {
        request,
        upgrade,
        gate,
        h2,
        repeatable,
    } = outgoing;
    let sent = send(destination, request, h2, repeatable).await?;
    if sent.response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let (client, wanted) = upgrade.ok_or(Failure::NoAnswer)?;
        return Ok(switch_protocols(opened, sent, client, &wanted));
    }
    if let Some(gate) = &gate
        && sent.response.status().is_success()
    {
        // It answers without having asked for the body, and still reads it: an echo.
        gate.open();
    }
    let (mut parts, body) = sent.response.into_parts();
    headers::strip_hop_by_hop(&mut parts.headers);
    let held = Held {
        lease: sent.lease,
        service: Arc::clone(&destination.service),
        connection: sent.connection,
        gate,
    };
    Ok(Response::from_parts(parts, OutBody::instance(body, held)))
}

/// Sends it to one instance after the other, as long as nothing reaches any of them.
async fn send(
    destination: &Destination,
    mut request: Request<InBody>,
    h2: bool,
    repeatable: bool,
) -> Result<Sent, Failure> {
    let mut tried: Vec<IpAddr> = Vec::new();
    let mut last = Failure::Connect;
    let mut fresh = false;
    for _ in 0..CONNECT_ATTEMPTS {
        let lease = match destination.service.acquire(Unit::Request, &tried).await {
            Ok(lease) => Arc::new(lease),
            Err(Failure::Connect) => return Err(last),
            Err(failure) => return Err(failure),
        };
        let instance = &lease.instance;
        let address = destination.address(instance);
        let age = if repeatable {
            POOL_AGE
        } else {
            POOL_AGE_UNREPEATABLE
        };
        let pooled = (!fresh && !h2)
            .then(|| instance.pool.take_h1(address, age))
            .flatten();
        let reused = pooled.is_some();
        let mut connection = match pooled {
            Some(sender) => Connection::H1(address, sender),
            None => match open(instance, address, h2).await {
                Ok(connection) => connection,
                Err(error) => {
                    instance.connect_failed();
                    last = connect_failure(&error);
                    tried.push(instance.address);
                    continue;
                }
            },
        };
        request.body_mut().hold(&lease);
        let copy = (reused && repeatable).then(|| copy(&request));
        let begun = Instant::now();
        let sent = tokio::select! {
            sent = connection.send(request) => sent,
            () = lease.cut() => {
                lease.was_cut();
                return Err(Failure::DrainCut);
            }
        };
        match sent {
            Ok(response) => {
                record(instance, &response, begun);
                return Ok(Sent {
                    response,
                    lease,
                    connection,
                });
            }
            Err(mut error) => {
                tracing::debug!(error = %error.error(), instance = %instance.id, "not answered");
                last = Failure::NoAnswer;
                let again = error.take_message().or(copy);
                // A kept connection that it had closed already says nothing against it.
                if again.is_none() || !reused {
                    instance.counts.unanswered.add(1);
                }
                request = again.ok_or(Failure::NoAnswer)?;
                fresh = true;
            }
        }
    }
    Err(last)
}

async fn open(instance: &Instance, address: SocketAddr, h2: bool) -> io::Result<Connection> {
    if h2 {
        return Ok(Connection::H2(instance.pool.h2(address).await?));
    }
    let stream = pool::connect(address).await?;
    let sender = pool::handshake_h1(stream).await?;
    Ok(Connection::H1(address, sender))
}

impl Connection {
    async fn send(
        &mut self,
        request: Request<InBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<InBody>>> {
        match self {
            Self::H1(_, sender) => sender.try_send_request(request).await,
            Self::H2(stream) => stream.sender.try_send_request(request).await,
        }
    }
}

pub(crate) fn connect_failure(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::TimedOut => Failure::ConnectTimeout,
        _ => Failure::Connect,
    }
}

/// Of a request without a body.
fn copy(request: &Request<InBody>) -> Request<InBody> {
    let mut copy = Request::new(InBody::Empty);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    *copy.extensions_mut() = request.extensions().clone();
    copy
}

fn record(instance: &Instance, response: &Response<Incoming>, begun: Instant) {
    let latency = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    instance.counts.answer(response.status(), latency);
}

/// Both sides have agreed: from here on bytes are passed on. The instance keeps it in
/// flight, and the proxy open, until it ends.
fn switch_protocols(
    opened: &Arc<Opened>,
    sent: Sent,
    client: OnUpgrade,
    wanted: &HeaderValue,
) -> Response<OutBody> {
    let Sent {
        mut response,
        lease,
        ..
    } = sent;
    let content = if headers::is_websocket(wanted) {
        Content::Websocket
    } else {
        Content::Raw
    };
    let instance = hyper::upgrade::on(&mut response);
    let opened = Arc::clone(opened);
    tokio::spawn(async move {
        match futures_util::future::try_join(client, instance).await {
            Ok((client, instance)) => {
                let (client, instance) = (TokioIo::new(client), TokioIo::new(instance));
                tunnel(&opened, client, instance, lease, content).await;
            }
            Err(error) => tracing::debug!(%error, "upgrade did not happen"),
        }
    });
    let (mut parts, _) = response.into_parts();
    let upgrade = parts.headers.get(UPGRADE).cloned();
    headers::strip_hop_by_hop(&mut parts.headers);
    let connection = HeaderValue::from_static("upgrade");
    parts.headers.insert(CONNECTION, connection);
    let upgrade = upgrade.unwrap_or_else(|| wanted.clone());
    parts.headers.insert(UPGRADE, upgrade);
    Response::from_parts(parts, OutBody::Text(None))
}

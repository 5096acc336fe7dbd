//! HTTP/1.1 requests.

use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::HOST;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::{Answered, Failure, Load, Moments, Report, in_time, next};

pub(super) type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, std::convert::Infallible>;

/// One request on a connection of its own.
pub(super) async fn one(load: &Load) -> Result<Answered, Failure> {
    let mut sender = connect(load).await?;
    exchange(load, &mut sender).await
}

/// Requests one after the other, on one connection as long as it lasts.
pub(super) async fn worker(load: &Load, moments: &Moments) -> Report {
    let mut report = Report::default();
    let mut kept: Option<SendRequest<Body>> = None;
    while let Some(moment) = next(moments).await {
        let outcome = in_time(load, moment, async {
            let mut sender = match still_open(kept.take()).await {
                Some(sender) => sender,
                None => {
                    report.connections += 1;
                    connect(load).await?
                }
            };
            let answered = exchange(load, &mut sender).await?;
            kept = Some(sender);
            Ok(answered)
        });
        let outcome = outcome.await;
        report.record(outcome, moment.elapsed());
    }
    report
}

/// `None` if the server has closed it, which it may between two requests.
async fn still_open(kept: Option<SendRequest<Body>>) -> Option<SendRequest<Body>> {
    let mut sender = kept?;
    sender.ready().await.ok()?;
    Some(sender)
}

async fn connect(load: &Load) -> Result<SendRequest<Body>, Failure> {
    let stream = TcpStream::connect(load.target).await;
    let stream = stream.map_err(|_| Failure::Connect)?;
    stream.set_nodelay(true).map_err(|_| Failure::Connect)?;
    let (sender, connection) = handshake(TokioIo::new(stream))
        .await
        .map_err(|_| Failure::Connect)?;
    tokio::spawn(async move {
        // The request's own outcome says what went wrong.
        let _ = connection.await;
    });
    Ok(sender)
}

async fn exchange(load: &Load, sender: &mut SendRequest<Body>) -> Result<Answered, Failure> {
    let request = request(load).map_err(|_| Failure::Generator)?;
    let response = sender.send_request(request).await;
    read(load, response.map_err(|_| Failure::NoAnswer)?).await
}

pub(super) async fn read(load: &Load, response: Response<Incoming>) -> Result<Answered, Failure> {
    let answered = answered(&response);
    let body = response.into_body().collect().await;
    let body = body.map_err(|_| Failure::HalfAnswer)?.to_bytes();
    if load.echoed && answered.status < 400 && body != load.body {
        return Err(Failure::Wrong);
    }
    Ok(answered)
}

fn answered<B>(response: &Response<B>) -> Answered {
    let by = response.headers().get("x-instance");
    Answered {
        status: response.status().as_u16(),
        by: by.and_then(|by| by.to_str().ok()).map(str::to_owned),
    }
}

fn request(load: &Load) -> Result<Request<Body>, hyper::http::Error> {
    Request::builder()
        .method(load.method.clone())
        .uri(&load.path)
        .header(HOST, &load.host)
        .body(body(load))
}

pub(super) fn body(load: &Load) -> Body {
    let bytes = Bytes::from(load.body.clone());
    let Some(size) = load.chunked else {
        return http_body_util::Full::new(bytes).boxed_unsync();
    };
    let chunks: Vec<_> = bytes
        .chunks(size)
        .map(|chunk| Ok(Frame::data(Bytes::copy_from_slice(chunk))))
        .collect();
    // A pause before each chunk, so that it is sent as one.
    let chunks = futures_util::stream::unfold(chunks.into_iter(), |mut chunks| async {
        tokio::task::yield_now().await;
        let chunk = chunks.next()?;
        Some((chunk, chunks))
    });
    StreamBody::new(chunks).boxed_unsync()
}

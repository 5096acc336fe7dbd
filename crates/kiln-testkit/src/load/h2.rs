//! HTTP/2 with prior knowledge (RFC 9113, 3.3): many requests at once on few connections.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use hyper::Request;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::Mutex;

use super::http::{Body, body, read};
use super::{Answered, Failure, Load};

/// Tries to find a connection that still takes requests; a server that sends GOAWAY again
/// and again is at fault.
const TRIES: usize = 3;

/// The connections; one that the server has said goodbye on is replaced by another.
pub(super) struct Pool {
    slots: Vec<Mutex<Option<SendRequest<Body>>>>,
    turn: AtomicUsize,
    pub(super) opened: AtomicU64,
}

impl Pool {
    pub(super) fn new(connections: usize) -> Self {
        Self {
            slots: (0..connections.max(1)).map(|_| Mutex::default()).collect(),
            turn: AtomicUsize::new(0),
            opened: AtomicU64::new(0),
        }
    }

    async fn sender(&self, load: &Load) -> Result<SendRequest<Body>, Failure> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.slots.len();
        let mut slot = self.slots[turn].lock().await;
        if let Some(sender) = slot.as_mut()
            && sender.ready().await.is_ok()
        {
            return Ok(sender.clone());
        }
        self.opened.fetch_add(1, Ordering::Relaxed);
        let sender = connect(load).await?;
        Ok(slot.insert(sender).clone())
    }

    pub(super) async fn exchange(&self, load: &Load) -> Result<Answered, Failure> {
        for _ in 0..TRIES {
            let mut sender = self.sender(load).await?;
            let request = request(load).map_err(|_| Failure::Generator)?;
            match sender.try_send_request(request).await {
                Ok(response) => return read(load, response).await,
                Err(mut error) => {
                    let never_sent = error.take_message().is_some();
                    if !never_sent {
                        return Err(Failure::NoAnswer);
                    }
                }
            }
        }
        Err(Failure::NoAnswer)
    }
}

async fn connect(load: &Load) -> Result<SendRequest<Body>, Failure> {
    let stream = TcpStream::connect(load.target).await;
    let stream = stream.map_err(|_| Failure::Connect)?;
    stream.set_nodelay(true).map_err(|_| Failure::Connect)?;
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(|_| Failure::Connect)?;
    tokio::spawn(async move {
        // The requests' own outcomes say what went wrong.
        let _ = connection.await;
    });
    Ok(sender)
}

fn request(load: &Load) -> Result<Request<Body>, hyper::http::Error> {
    Request::builder()
        .method(load.method.clone())
        .uri(format!("http://{}{}", load.host, load.path))
        .body(body(load))
}

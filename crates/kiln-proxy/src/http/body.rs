//! Bodies on their way through, frame by frame: nothing is buffered here, so that a slow
//! receiver slows the sender.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::Sleep;

use crate::instance::Lease;
use crate::limits::EXPECT_WAIT;
use crate::pool::{H1, H2};
use crate::service::Service;
use crate::stats::Failure;

/// A request's body, from the client to the instance.
pub(crate) enum InBody {
    Empty,
    Client(Box<ClientBody>),
}

pub(crate) struct ClientBody {
    inner: Incoming,
    /// An upload counts as in flight to its end, even when the answer came before.
    lease: Option<Arc<Lease>>,
    gate: Option<(Arc<Gate>, Pin<Box<Sleep>>)>,
}

impl InBody {
    pub(crate) fn new(inner: Incoming, gate: Option<Arc<Gate>>) -> Self {
        if inner.is_end_stream() {
            return Self::Empty;
        }
        Self::Client(Box::new(ClientBody {
            inner,
            lease: None,
            gate: gate.map(|gate| (gate, Box::pin(tokio::time::sleep(EXPECT_WAIT)))),
        }))
    }

    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    pub(crate) fn hold(&mut self, lease: &Arc<Lease>) {
        if let Self::Client(body) = self {
            body.lease = Some(Arc::clone(lease));
        }
    }
}

impl Body for InBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let Self::Client(body) = self.get_mut() else {
            return Poll::Ready(None);
        };
        if let Some((gate, wait)) = &mut body.gate {
            match gate.poll(cx) {
                Poll::Ready(true) => body.gate = None,
                Poll::Ready(false) => {
                    return Poll::Ready(Some(Err(io::Error::other("the body is not wanted"))));
                }
                Poll::Pending if wait.as_mut().poll(cx).is_ready() => body.gate = None,
                Poll::Pending => return Poll::Pending,
            }
        }
        let frame = std::task::ready!(Pin::new(&mut body.inner).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            body.lease = None;
        }
        Poll::Ready(frame.map(|frame| frame.map_err(io::Error::other)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Client(body) => body.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Client(body) => body.inner.size_hint(),
        }
    }
}

/// Holds a body back until the instance says `100 Continue`: only reading it makes the
/// server side say so to the client.
#[derive(Default)]
pub(crate) struct Gate {
    state: AtomicU8,
    waker: AtomicWaker,
}

const GATE_OPEN: u8 = 1;
const GATE_SHUT: u8 = 2;

impl Gate {
    pub(crate) fn open(&self) {
        self.change(GATE_OPEN);
    }

    /// The exchange is over without the body.
    fn shut(&self) {
        self.change(GATE_SHUT);
    }

    fn change(&self, to: u8) {
        let _ = self
            .state
            .compare_exchange(0, to, Ordering::AcqRel, Ordering::Acquire);
        self.waker.wake();
    }

    /// Ready with whether it is open.
    fn poll(&self, cx: &mut Context<'_>) -> Poll<bool> {
        self.waker.register(cx.waker());
        match self.state.load(Ordering::Acquire) {
            0 => Poll::Pending,
            state => Poll::Ready(state == GATE_OPEN),
        }
    }
}

/// An answer's body, from the instance or from the proxy itself, to the client.
pub(crate) enum OutBody {
    Text(Option<Bytes>),
    Instance(Box<InstanceBody>),
}

pub(crate) struct InstanceBody {
    inner: Incoming,
    held: Option<Held>,
    /// Made when the instance lets wait for the first time.
    cut: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// What an exchange holds until its answer has been passed on completely.
pub(crate) struct Held {
    pub(crate) lease: Arc<Lease>,
    pub(crate) service: Arc<Service>,
    pub(crate) connection: Connection,
    pub(crate) gate: Option<Arc<Gate>>,
}

/// The connection of an exchange.
pub(crate) enum Connection {
    /// Goes back to the pool when the answer is complete.
    H1(SocketAddr, H1),
    H2(H2),
}

impl Held {
    fn complete(self) {
        if let Some(gate) = &self.gate {
            gate.shut();
        }
        match self.connection {
            Connection::H1(address, sender) => {
                self.lease.instance.pool.put_h1(address, sender);
            }
            Connection::H2(stream) => drop(stream),
        }
    }
}

impl OutBody {
    pub(crate) fn text(text: impl Into<Bytes>) -> Self {
        Self::Text(Some(text.into()))
    }

    pub(crate) fn instance(inner: Incoming, held: Held) -> Self {
        if inner.is_end_stream() {
            held.complete();
            return Self::Text(None);
        }
        Self::Instance(Box::new(InstanceBody {
            inner,
            held: Some(held),
            cut: None,
        }))
    }
}

impl InstanceBody {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match Pin::new(&mut self.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if self.inner.is_end_stream() {
                    self.complete();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                if let Some(held) = self.held.take() {
                    held.service.failures.count(Failure::HalfAnswer);
                    held.lease.instance.counts.broken_off.add(1);
                }
                Poll::Ready(Some(Err(io::Error::other(error))))
            }
            Poll::Ready(None) => {
                self.complete();
                Poll::Ready(None)
            }
            Poll::Pending => self.poll_cut(cx),
        }
    }

    fn complete(&mut self) {
        self.cut = None;
        if let Some(held) = self.held.take() {
            held.complete();
        }
    }

    fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let Some(held) = &self.held else {
            return Poll::Pending;
        };
        let cut = self.cut.get_or_insert_with(|| Box::pin(held.lease.cut()));
        std::task::ready!(cut.as_mut().poll(cx));
        self.cut = None;
        if let Some(held) = self.held.take() {
            held.lease.was_cut();
            held.service.failures.count(Failure::DrainCut);
        }
        let cut = io::Error::other("the instance's drain limit was reached");
        Poll::Ready(Some(Err(cut)))
    }
}

impl Body for OutBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match self.get_mut() {
            Self::Text(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Instance(body) => body.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Text(text) => text.is_none(),
            Self::Instance(body) => body.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, |t| t.len() as u64)),
            Self::Instance(body) => body.inner.size_hint(),
        }
    }
}

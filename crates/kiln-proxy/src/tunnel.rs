//! Bytes passed on both ways between a client and an instance, until both have ended
//! their direction, or the instance's drain limit cuts the connection.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::watch;

use crate::core::Opened;
use crate::instance::Lease;
use crate::limits::{CLOSE_FRAME_WAIT, HALF_CLOSED_IDLE, TUNNEL_BUFFER};
use crate::websocket::{Frames, GOING_AWAY};

/// What is inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Raw,
    /// Ends with a close frame when it is cut.
    Websocket,
}

/// How one direction ended, which says if the other one may go on.
enum Ended {
    /// End of stream, passed on.
    Eof,
    /// The receiver takes no more; it may still have something to say.
    NotTaken,
    /// The sender's connection broke.
    Broken,
    /// Cut, and the close frame was sent.
    Closed,
}

/// Returns whether it was cut. The lease ends with the tunnel.
pub(crate) async fn tunnel<C, S>(
    opened: &Opened,
    client: C,
    server: S,
    lease: Arc<Lease>,
    content: Content,
) -> bool
where
    C: AsyncRead + AsyncWrite + Send,
    S: AsyncRead + AsyncWrite + Send,
{
    let (client_read, client_write) = tokio::io::split(client);
    let (server_read, server_write) = tokio::io::split(server);
    let (server_ended, server_state) = watch::channel(false);
    let cut = until_cut(opened, &lease, content);
    let hard_cut = async {
        cut.await;
        if content == Content::Websocket {
            tokio::time::sleep(CLOSE_FRAME_WAIT).await;
        }
    };
    let both = async {
        let up = up(client_read, server_write, server_state);
        let down = down(
            server_read,
            client_write,
            until_cut(opened, &lease, content),
            content,
        );
        tokio::pin!(up, down);
        tokio::select! {
            ended = &mut down => match ended {
                Ended::Eof | Ended::Closed => {
                    server_ended.send_replace(true);
                    up.await;
                    matches!(ended, Ended::Closed)
                }
                Ended::NotTaken | Ended::Broken => false,
            },
            ended = &mut up => match ended {
                Ended::Broken => false,
                _ => matches!(down.await, Ended::Closed),
            },
        }
    };
    let was_cut = tokio::select! {
        closed = both => closed,
        () = hard_cut => true,
    };
    if was_cut {
        lease.was_cut();
    }
    was_cut
}

/// Client to instance. Once the instance has ended its direction, a silent client is
/// waited for only so long.
async fn up<C, S>(
    mut from: ReadHalf<C>,
    mut to: WriteHalf<S>,
    mut server_ended: watch::Receiver<bool>,
) -> Ended
where
    C: AsyncRead,
    S: AsyncWrite,
{
    let mut buffer = vec![0u8; TUNNEL_BUFFER];
    loop {
        let silent = async {
            if server_ended.wait_for(|ended| *ended).await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(HALF_CLOSED_IDLE).await;
        };
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            () = silent => return Ended::Broken,
        };
        match read {
            Ok(0) => return end(&mut to).await,
            Ok(n) => {
                let bytes = buffer.get(..n).unwrap_or_default();
                if pass(&mut to, bytes).await.is_err() {
                    return Ended::NotTaken;
                }
            }
            Err(_) => return Ended::Broken,
        }
    }
}

/// Resolves when it has to end: its instance's drain limit is reached or, as a websocket
/// may never end by itself, the proxy ends.
fn until_cut(
    opened: &Opened,
    lease: &Lease,
    content: Content,
) -> impl Future<Output = ()> + Send + use<> {
    let (cut, ending) = (lease.cut(), opened.core.ending());
    async move {
        tokio::select! {
            () = cut => {}
            () = ending, if content == Content::Websocket => {}
        }
    }
}

/// Instance to client; the frames of a websocket are followed, so that it can be ended
/// between two of them.
async fn down<S, C>(
    mut from: ReadHalf<S>,
    mut to: WriteHalf<C>,
    cut: impl Future<Output = ()>,
    content: Content,
) -> Ended
where
    S: AsyncRead,
    C: AsyncWrite,
{
    let mut frames = (content == Content::Websocket).then(Frames::default);
    let mut buffer = vec![0u8; TUNNEL_BUFFER];
    let mut cutting = false;
    tokio::pin!(cut);
    loop {
        let read = tokio::select! {
            biased;
            () = &mut cut, if !cutting => {
                cutting = true;
                if frames.as_ref().is_some_and(Frames::at_boundary) {
                    return close(&mut to).await;
                }
                continue;
            }
            read = from.read(&mut buffer) => read,
        };
        let bytes = match read {
            Ok(0) => return end(&mut to).await,
            Ok(n) => buffer.get(..n).unwrap_or_default(),
            Err(_) => return Ended::Broken,
        };
        let take = match &mut frames {
            Some(frames) if cutting => frames.feed_to_boundary(bytes),
            Some(frames) => {
                frames.feed(bytes);
                bytes.len()
            }
            None => bytes.len(),
        };
        let bytes = bytes.get(..take).unwrap_or_default();
        if pass(&mut to, bytes).await.is_err() {
            return Ended::NotTaken;
        }
        if cutting && frames.as_ref().is_some_and(Frames::at_boundary) {
            return close(&mut to).await;
        }
    }
}

async fn pass<W: AsyncWrite>(to: &mut WriteHalf<W>, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

async fn end<W: AsyncWrite>(to: &mut WriteHalf<W>) -> Ended {
    match to.shutdown().await {
        Ok(()) => Ended::Eof,
        Err(_) => Ended::NotTaken,
    }
}

/// The client answers a close frame with its own and then closes, or is silent and is
/// closed.
async fn close<W: AsyncWrite>(to: &mut WriteHalf<W>) -> Ended {
    let say = async {
        pass(to, &GOING_AWAY).await?;
        to.shutdown().await
    };
    let _: Result<io::Result<()>, _> = tokio::time::timeout(CLOSE_FRAME_WAIT, say).await;
    Ended::Closed
}

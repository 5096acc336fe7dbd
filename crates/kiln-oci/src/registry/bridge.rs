//! Between the network, which is asynchronous, and the store, which is not.

use std::io::{self, Read};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use kiln_model::Digest;
use tokio::sync::mpsc;

use crate::blob::BlobRead;

/// Pieces on their way between the two at most; the faster side waits.
pub(super) const PIECES: usize = 16;
/// Bytes read from the store at once.
const PIECE_BYTES: usize = 128 << 10;

/// What the network side sends.
pub(super) enum Piece {
    Content(Bytes),
    /// The content is whole. Without it, the end of the channel is a failure: the
    /// download was cancelled or broke off.
    End,
}

/// Blocking reader of what arrives.
pub(super) struct Arriving {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    ended: bool,
}

impl Arriving {
    pub fn new(pieces: mpsc::Receiver<Piece>) -> Self {
        Self {
            pieces,
            current: Bytes::new(),
            ended: false,
        }
    }
}

impl Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            if self.ended {
                return Ok(0);
            }
            match self.pieces.blocking_recv() {
                Some(Piece::Content(bytes)) => self.current = bytes,
                Some(Piece::End) => self.ended = true,
                None => {
                    let why = "the download broke off";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
                }
            }
        }
        let n = buffer.len().min(self.current.len());
        buffer[..n].copy_from_slice(&self.current[..n]);
        self.current.advance(n);
        Ok(n)
    }
}

/// A body for a request from a blob, which is opened and read on a thread of its own.
pub(super) fn body(blobs: Arc<dyn BlobRead>, digest: Digest) -> reqwest::Body {
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(PIECES);
    tokio::task::spawn_blocking(move || {
        let gone = || io::Error::new(io::ErrorKind::NotFound, "the blob is gone");
        let opened = blobs.open(&digest).and_then(|found| found.ok_or_else(gone));
        let mut content = match opened {
            Ok(content) => content,
            Err(error) => {
                let _ = sender.blocking_send(Err(error));
                return;
            }
        };
        loop {
            let mut piece = Vec::with_capacity(PIECE_BYTES);
            let mut bounded = content.by_ref().take(PIECE_BYTES as u64);
            let next = match bounded.read_to_end(&mut piece) {
                Ok(0) => return,
                Ok(_) => Ok(Bytes::from(piece)),
                Err(error) => Err(error),
            };
            let failed = next.is_err();
            // A closed channel means that nobody sends this body any more.
            if sender.blocking_send(next).is_err() || failed {
                return;
            }
        }
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|piece| (piece, receiver))
    });
    reqwest::Body::wrap_stream(stream)
}

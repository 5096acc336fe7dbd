//! What was sent comes back: bytes, and frames of websockets.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;

const CLOSE: u8 = 0x88;
/// The longest payload that needs no longer length (RFC 6455, 5.2).
const SHORT: u8 = 125;

pub(super) async fn bytes(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let (mut read, mut write) = stream.split();
            // The client sees, and counts, what goes wrong.
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        });
    }
}

/// Short frames that are not fragmented, until a close frame, which is answered.
pub(super) async fn websocket(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    loop {
        let mut head = [0; 2];
        stream.read_exact(&mut head).await?;
        let [kind, length] = head;
        let (masked, length) = (length & 0x80 != 0, length & 0x7f);
        if !masked || length > SHORT {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut mask = [0; 4];
        stream.read_exact(&mut mask).await?;
        let mut payload = vec![0; usize::from(length)];
        stream.read_exact(&mut payload).await?;
        for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
            *byte ^= mask;
        }
        let mut frame = vec![kind, length];
        frame.extend(payload);
        stream.write_all(&frame).await?;
        if kind == CLOSE {
            return stream.shutdown().await;
        }
    }
}

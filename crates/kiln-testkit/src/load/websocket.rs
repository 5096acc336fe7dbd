//! Websockets: numbered messages which have to come back. Only as much of RFC 6455 as an
//! echo needs: short frames which are not fragmented.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Answered, Failure, Load, Moments, Report, in_time, next};

/// Fixed: the answer to it is not checked, as the server's honesty is not the subject.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;

/// The largest answer to the handshake.
const HEAD: usize = 16 * 1024;

pub(super) async fn worker(load: &Load, number: usize, moments: &Moments) -> Report {
    let mut report = Report::default();
    let mut socket: Option<TcpStream> = None;
    let mut sequence = (number as u64) << 32;
    while let Some(moment) = next(moments).await {
        let outcome = in_time(load, moment, async {
            loop {
                let mut stream = match socket.take() {
                    Some(stream) => stream,
                    None => {
                        report.connections += 1;
                        open(load).await?
                    }
                };
                sequence += 1;
                match echo(&mut stream, sequence).await? {
                    Echo::Same => {
                        socket = Some(stream);
                        return Ok(Answered {
                            status: 0,
                            by: None,
                        });
                    }
                    // Told before it closed: the message is sent again on a new one.
                    Echo::Closed(status) => {
                        *report.closed_websockets.entry(status).or_default() += 1;
                        if status.is_none() {
                            return Err(Failure::NoAnswer);
                        }
                    }
                }
            }
        });
        let outcome = outcome.await;
        report.record(outcome, moment.elapsed());
    }
    report
}

async fn open(load: &Load) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect(load.target).await;
    let mut stream = stream.map_err(|_| Failure::Connect)?;
    stream.set_nodelay(true).map_err(|_| Failure::Connect)?;
    let head = format!(
        "GET {} HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n",
        load.path, load.host
    );
    let written = stream.write_all(head.as_bytes()).await;
    written.map_err(|_| Failure::NoAnswer)?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let byte = stream.read_u8().await.map_err(|_| Failure::NoAnswer)?;
        answer.push(byte);
        if answer.len() > HEAD {
            return Err(Failure::Wrong);
        }
    }
    if answer.starts_with(b"HTTP/1.1 101") {
        Ok(stream)
    } else {
        Err(Failure::Status)
    }
}

enum Echo {
    Same,
    /// With the close frame's status, if there was one.
    Closed(Option<u16>),
}

async fn echo(stream: &mut TcpStream, sequence: u64) -> Result<Echo, Failure> {
    let payload = sequence.to_be_bytes();
    // A mask of zeros leaves the payload as it is.
    let mut frame = vec![BINARY, 0x80 | 8, 0, 0, 0, 0];
    frame.extend(payload);
    // A failure shows when reading: a close frame may have come before.
    let _ = stream.write_all(&frame).await;
    let Ok((kind, back)) = read_frame(stream).await else {
        return Ok(Echo::Closed(None));
    };
    match (kind, back.as_slice()) {
        (BINARY, back) if back == payload => Ok(Echo::Same),
        (CLOSE, [high, low, ..]) => {
            let _ = stream.write_all(&[CLOSE, 0x80, 0, 0, 0, 0]).await;
            Ok(Echo::Closed(Some(u16::from_be_bytes([*high, *low]))))
        }
        (CLOSE, _) => Ok(Echo::Closed(None)),
        _ => Err(Failure::Wrong),
    }
}

/// The first byte, and the payload, of a frame that is not masked.
async fn read_frame(stream: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let kind = stream.read_u8().await?;
    let length = match stream.read_u8().await? {
        126 => u64::from(stream.read_u16().await?),
        127 => stream.read_u64().await?,
        length => u64::from(length),
    };
    let mut payload = Vec::new();
    stream.take(length).read_to_end(&mut payload).await?;
    Ok((kind, payload))
}

//! Raw TCP: an echo of everything until the client closes its direction.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Answered, Failure, Load};

pub(super) async fn exchange(load: &Load) -> Result<Answered, Failure> {
    let stream = TcpStream::connect(load.target).await;
    let mut stream = stream.map_err(|_| Failure::Connect)?;
    let (mut read, mut write) = stream.split();
    let send = async {
        write.write_all(&load.body).await?;
        write.shutdown().await
    };
    let mut back = Vec::with_capacity(load.body.len());
    let receive = read.read_to_end(&mut back);
    let (sent, received) = tokio::join!(send, receive);
    sent.map_err(|_| Failure::NoAnswer)?;
    received.map_err(|_| Failure::HalfAnswer)?;
    match back.len().cmp(&load.body.len()) {
        _ if back == load.body => Ok(Answered {
            status: 0,
            by: None,
        }),
        std::cmp::Ordering::Less if back.is_empty() => Err(Failure::NoAnswer),
        std::cmp::Ordering::Less => Err(Failure::HalfAnswer),
        _ => Err(Failure::Wrong),
    }
}

//! Questions about other names: passed on to the host's name servers, unchanged, and
//! their answers back.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Instant, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::limits::{DNS_FORWARD, DNS_FORWARDS, DNS_MESSAGE, DNS_SERVERS, RESOLV_CHECK};
use crate::lock;

/// Knows the host's name servers, and asks them.
pub(crate) struct Forwarder {
    file: PathBuf,
    known: Mutex<Known>,
    places: Semaphore,
}

#[derive(Default)]
struct Known {
    servers: Vec<SocketAddr>,
    modified: Option<SystemTime>,
    checked: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

impl Forwarder {
    pub(crate) fn new(file: PathBuf) -> Self {
        Self {
            file,
            known: Mutex::default(),
            places: Semaphore::new(DNS_FORWARDS),
        }
    }

    /// The first answer of a name server that is not one of `own` (which would ask again
    /// for ever). `None` if there is none in time, or too many are waiting.
    pub(crate) async fn ask(
        &self,
        query: &[u8],
        transport: Transport,
        own: &[IpAddr],
    ) -> Option<Vec<u8>> {
        let _place = self.places.try_acquire().ok()?;
        for server in self.servers() {
            if own.contains(&server.ip()) {
                continue;
            }
            let asked = async {
                match transport {
                    Transport::Udp => ask_udp(server, query).await,
                    Transport::Tcp => ask_tcp(server, query).await,
                }
            };
            match timeout(DNS_FORWARD, asked).await {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::debug!(%server, %error, "name server"),
                Err(_) => tracing::debug!(%server, "name server does not answer"),
            }
        }
        None
    }

    /// Reads the file again when it has changed, looking at most once a second.
    fn servers(&self) -> Vec<SocketAddr> {
        let mut known = lock(&self.known);
        if known.checked.is_some_and(|at| at.elapsed() < RESOLV_CHECK) {
            return known.servers.clone();
        }
        known.checked = Some(Instant::now());
        let modified = std::fs::metadata(&self.file)
            .and_then(|m| m.modified())
            .ok();
        if modified.is_none() || modified != known.modified {
            let text = std::fs::read_to_string(&self.file).unwrap_or_default();
            known.servers = name_servers(&text);
            known.modified = modified;
        }
        known.servers.clone()
    }
}

/// The name servers of a resolv.conf(5). None named: this host, as libc does.
fn name_servers(text: &str) -> Vec<SocketAddr> {
    let mut servers: Vec<SocketAddr> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next())?
        })
        .filter_map(parse_server)
        .take(DNS_SERVERS)
        .collect();
    if servers.is_empty() {
        servers.push(SocketAddr::from((Ipv4Addr::LOCALHOST, 53)));
    }
    servers
}

/// An address. Not understood by libc, but by other resolvers and of use for tests:
/// with a port, `127.0.0.1:5353`.
fn parse_server(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some(address);
    }
    let address = text.parse::<IpAddr>().ok()?;
    Some(SocketAddr::new(address, 53))
}

/// From a port of its own for each question, as a forged answer would have to guess it.
async fn ask_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut answer = vec![0u8; DNS_MESSAGE];
    loop {
        let n = socket.recv(&mut answer).await?;
        // The id comes first. Another one answers a question nobody asked here.
        if n >= 12 && answer.get(..2) == query.get(..2) {
            answer.truncate(n);
            return Ok(answer);
        }
    }
}

async fn ask_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_message(&mut stream, query).await?;
    read_message(&mut stream)
        .await?
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// A message over TCP: its length in two bytes before it (RFC 1035, 4.2.2).
pub(crate) async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let framed = [&length.to_be_bytes(), message].concat();
    stream.write_all(&framed).await
}

/// `None` at the end of the stream.
pub(crate) async fn read_message(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0u8; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn name_servers_are_read_as_libc_does() {
        let text = "# made by x\nsearch a b\nnameserver 127.0.0.53\n options ndots:0\n\
                    nameserver fe80::1\nnameserver nonsense\nnameserver\nnameserver 1.1.1.1:5353\n\
                    nameserver 9.9.9.9\n";
        let expected: Vec<SocketAddr> = ["127.0.0.53:53", "[fe80::1]:53", "1.1.1.1:5353"]
            .map(|a| a.parse().unwrap())
            .into();
        assert_eq!(name_servers(text), expected);
        assert_eq!(name_servers(""), ["127.0.0.1:53".parse().unwrap()]);
    }
}

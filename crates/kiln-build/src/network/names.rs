//! A name server that passes every question on to the host's: also to those that only the
//! host itself can reach (`127.0.0.53`). Messages are passed on unread.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Where name servers listen.
pub(super) const PORT: u16 = 53;
/// How often the end of the build is looked for.
const LOOK: Duration = Duration::from_millis(50);
/// How long one of the host's servers may take before the next is asked; resolvers ask
/// again themselves after 5 s.
const PATIENCE: Duration = Duration::from_secs(2);
/// A connection that is silent for so long is closed.
const SILENCE: Duration = Duration::from_secs(10);
/// Questions and connections at once; more are dropped, and asked again.
const AT_ONCE: usize = 128;
/// The largest datagram.
const DATAGRAM: usize = 65_535;
/// RFC 1035: id, flags, four counts.
const HEADER: usize = 12;
const IS_ANSWER: u8 = 0x80;
const CODE: u8 = 0x0f;
const SERVER_FAILURE: u8 = 2;

/// Answers until it is dropped.
pub(super) struct Names {
    end: Arc<AtomicBool>,
}

impl Drop for Names {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

/// What its threads share.
struct Shared {
    /// The host's servers; at least one.
    servers: Vec<SocketAddr>,
    end: Arc<AtomicBool>,
    busy: AtomicUsize,
}

impl Names {
    pub fn serve(address: IpAddr, port: u16, servers: &[IpAddr]) -> io::Result<Self> {
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        // resolv.conf(5): without any, it is the host itself.
        let servers = match servers {
            [] => vec![(local, PORT).into()],
            servers => servers.iter().map(|s| (*s, PORT).into()).collect(),
        };
        Self::serve_from((address, port).into(), servers).map(|(names, _)| names)
    }

    /// Also gives the address that it listens at, for port 0.
    fn serve_from(at: SocketAddr, servers: Vec<SocketAddr>) -> io::Result<(Self, SocketAddr)> {
        let datagrams = UdpSocket::bind(at)?;
        datagrams.set_read_timeout(Some(LOOK))?;
        let at = datagrams.local_addr()?;
        let streams = TcpListener::bind(at)?;
        streams.set_nonblocking(true)?;
        let end = Arc::new(AtomicBool::new(false));
        let shared = Arc::new(Shared {
            servers,
            end: end.clone(),
            busy: AtomicUsize::new(0),
        });
        let names = Self { end };
        let other = shared.clone();
        thread::Builder::new()
            .name("build-names-udp".into())
            .spawn(move || answer(&Arc::new(datagrams), &other))?;
        thread::Builder::new()
            .name("build-names-tcp".into())
            .spawn(move || accept(&streams, &shared))?;
        Ok((names, at))
    }
}

impl Shared {
    fn ended(&self) -> bool {
        self.end.load(Ordering::Relaxed)
    }

    /// Does something on a thread of its own, unless there is too much to do.
    fn begin(self: &Arc<Self>, work: impl FnOnce(&Shared) + Send + 'static) {
        let shared = self.clone();
        if shared.busy.fetch_add(1, Ordering::Relaxed) >= AT_ONCE {
            shared.busy.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        thread::spawn(move || {
            work(&shared);
            shared.busy.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn answer(socket: &Arc<UdpSocket>, shared: &Arc<Shared>) {
    let mut buffer = vec![0; DATAGRAM];
    while !shared.ended() {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let question = buffer[..length].to_vec();
        if question.len() < HEADER {
            continue;
        }
        let socket = socket.clone();
        shared.begin(move |shared| {
            let answers = shared
                .servers
                .iter()
                .filter_map(|s| ask(*s, &question).ok());
            let answer = { answers }
                .next()
                .unwrap_or_else(|| failure(question.clone()));
            if let Err(cause) = socket.send_to(&answer, from) {
                tracing::debug!(%cause, "an answer was not taken");
            }
        });
    }
}

/// Asks one of the host's servers, from a port of its own.
fn ask(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(question)?;
    let mut buffer = vec![0; DATAGRAM];
    let length = socket.recv(&mut buffer)?;
    buffer.truncate(length);
    match length >= HEADER && buffer[..2] == question[..2] {
        true => Ok(buffer),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The question as an answer: none of the servers could be reached.
fn failure(mut question: Vec<u8>) -> Vec<u8> {
    question[2] |= IS_ANSWER;
    question[3] = question[3] & !CODE | SERVER_FAILURE;
    question
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while !shared.ended() {
        match listener.accept() {
            Ok((client, _)) => shared.begin(move |shared| {
                if let Err(cause) = pass(client, &shared.servers) {
                    tracing::debug!(%cause, "a question over TCP was not passed on");
                }
            }),
            Err(_) => thread::sleep(LOOK),
        }
    }
}

/// Passes a connection on to the first server that takes it.
fn pass(client: TcpStream, servers: &[SocketAddr]) -> io::Result<()> {
    let mut connected = servers
        .iter()
        .filter_map(|s| TcpStream::connect_timeout(s, PATIENCE).ok());
    let server = connected.next().ok_or(io::ErrorKind::ConnectionRefused)?;
    client.set_nonblocking(false)?;
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(SILENCE))?;
    }
    let (from, to) = (client.try_clone()?, server.try_clone()?);
    let up = thread::spawn(move || copy(from, to));
    copy(server, client);
    let _ = up.join();
    Ok(())
}

fn copy(mut from: impl Read, mut to: TcpStream) {
    let copied = io::copy(&mut from, &mut to).and_then(|_| to.flush());
    if let Err(cause) = copied {
        tracing::debug!(%cause, "a connection for names ended");
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const QUESTION: [u8; 14] = [7, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 65];

    fn here() -> SocketAddr {
        (Ipv4Addr::LOCALHOST, 0).into()
    }

    /// An address where nobody is (RFC 1078's service has died out).
    fn nobody() -> SocketAddr {
        (Ipv4Addr::LOCALHOST, 1).into()
    }

    /// The port must be free for both protocols, and other tests take some, too.
    fn serve(servers: &[SocketAddr]) -> (Names, SocketAddr) {
        let mut tries = (0..50).map(|_| Names::serve_from(here(), servers.to_vec()));
        tries.find_map(Result::ok).unwrap()
    }

    fn question(names: SocketAddr) -> Vec<u8> {
        let client = UdpSocket::bind(here()).unwrap();
        client.send_to(&QUESTION, names).unwrap();
        let mut buffer = [0; 64];
        let length = client.recv(&mut buffer).unwrap();
        buffer[..length].to_vec()
    }

    #[test]
    fn the_first_server_that_answers_is_heard() {
        let server = UdpSocket::bind(here()).unwrap();
        let servers = [nobody(), server.local_addr().unwrap()];
        let (_names, at) = serve(&servers);
        let answering = thread::spawn(move || {
            let mut buffer = [0; 64];
            let (length, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[..length], QUESTION);
            server.send_to(b"\x07\x09 an answer", from).unwrap();
        });
        assert_eq!(question(at), b"\x07\x09 an answer");
        answering.join().unwrap();
    }

    #[test]
    fn without_any_server_the_answer_is_a_failure() {
        let (_names, at) = serve(&[nobody()]);
        let mut expected = QUESTION;
        (expected[2], expected[3]) = (0x81, 2);
        assert_eq!(question(at), expected);
    }

    #[test]
    fn streams_are_passed_on_both_ways() {
        let server = TcpListener::bind(here()).unwrap();
        let servers = [nobody(), server.local_addr().unwrap()];
        let (_names, at) = serve(&servers);
        let answering = thread::spawn(move || {
            let (mut client, _) = server.accept().unwrap();
            let mut question = Vec::new();
            client.read_to_end(&mut question).unwrap();
            assert_eq!(question, QUESTION);
            client.write_all(b"answer").unwrap();
        });
        let mut client = TcpStream::connect(at).unwrap();
        client.write_all(&QUESTION).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"answer");
        answering.join().unwrap();
    }

    #[test]
    fn its_address_is_free_soon_after_it_is_dropped() {
        let (names, at) = serve(&[nobody()]);
        assert!(UdpSocket::bind(at).is_err());
        drop(names);
        let free = || UdpSocket::bind(at).is_ok() && TcpListener::bind(at).is_ok();
        assert!((0..100).any(|_| {
            thread::sleep(LOOK);
            free()
        }));
    }
}

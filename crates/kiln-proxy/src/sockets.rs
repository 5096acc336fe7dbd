//! Socket options, and how listening sockets are made.

use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::AsFd;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use crate::limits::{BACKLOG, TCP_IDLE, TCP_PROBE, TCP_PROBES};

/// No delay, and probes which notice that the peer is gone. A connection without them
/// still works, so failing is not an error.
pub(crate) fn tune(stream: &TcpStream) {
    let set = || -> io::Result<()> {
        stream.set_nodelay(true)?;
        let fd = stream.as_fd();
        sockopt::set_socket_keepalive(fd, true)?;
        sockopt::set_tcp_keepidle(fd, TCP_IDLE)?;
        sockopt::set_tcp_keepintvl(fd, TCP_PROBE)?;
        sockopt::set_tcp_keepcnt(fd, TCP_PROBES)?;
        Ok(())
    };
    if let Err(error) = set() {
        tracing::debug!(%error, "socket options");
    }
}

/// Listens. IPv6 means only IPv6, as both families may be published side by side.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => {
            let socket = TcpSocket::new_v6()?;
            sockopt::set_ipv6_v6only(socket.as_fd(), true)?;
            socket
        }
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

pub(crate) fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&fd, true)?;
    }
    rustix::net::bind(&fd, &address)?;
    UdpSocket::from_std(std::net::UdpSocket::from(fd))
}

/// Where the client wanted to connect to, before the firewall redirected it here. Without
/// a redirection: the address it did connect to.
pub(crate) fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    match sockopt::ip_original_dst(stream.as_fd()) {
        Ok(address) => Ok(SocketAddr::V4(SocketAddrV4::new(
            *address.ip(),
            address.port(),
        ))),
        Err(_) => stream.local_addr(),
    }
}

/// Is there something to read already? Asks the kernel, not the runtime, which may not
/// have heard of it yet.
pub(crate) fn has_input(stream: &TcpStream) -> bool {
    use rustix::net::RecvFlags;
    let mut byte = [0u8; 1];
    rustix::net::recv(stream, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok()
}

//! An ARP announcement (RFC 5227, section 3): peers and the bridge learn at once
//! where an address lives now, instead of asking a port that has gone.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Ethernet, IPv4, request (RFC 826).
const HEADER: [u8; 8] = [0, 1, 0x08, 0, 6, 4, 0, 1];
const PACKET_BYTES: usize = 28;

/// Announces `address` at `mac` over the interface `index` of the calling thread's
/// network namespace.
#[allow(unsafe_code)] // No safe wrapper makes a link-layer address to send to.
pub(super) fn announce(index: u32, mac: [u8; 6], address: Ipv4Addr) -> io::Result<()> {
    let packet = announcement(mac, address);
    // Without a protocol it receives nothing.
    let socket = socket(
        AddressFamily::Packet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let everyone = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ARP as u16).to_be(),
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    };
    // SAFETY: both pointers are to live values of the lengths given, and the call
    // keeps neither.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            std::ptr::from_ref(&everyone).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn announcement(mac: [u8; 6], address: Ipv4Addr) -> [u8; PACKET_BYTES] {
    let mut packet = [0; PACKET_BYTES];
    packet[0..8].copy_from_slice(&HEADER);
    packet[8..14].copy_from_slice(&mac);
    packet[14..18].copy_from_slice(&address.octets());
    // 18..24: the target's hardware address, zero in an announcement.
    packet[24..28].copy_from_slice(&address.octets());
    packet
}

//! Tells when anyone has changed the kernel's packet filter.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::channel::NetlinkError;

/// Changes of tables, chains and rules: `NFNLGRP_NFTABLES` of `linux/netfilter/nfnetlink.h`.
const NFTABLES_GROUP: u32 = 7;
/// Only that something came matters; longer messages are cut.
const READ_BYTES: usize = 4096;

/// Readable when rules of this network namespace have been changed, by whomever.
pub struct RulesetWatch {
    socket: Socket,
}

impl RulesetWatch {
    /// Needs CAP_NET_ADMIN.
    pub fn open() -> Result<Self, NetlinkError> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.add_membership(NFTABLES_GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket })
    }

    /// Reads away what has been told so far.
    pub fn clear(&self) -> Result<(), NetlinkError> {
        let mut buffer = Vec::with_capacity(READ_BYTES);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // There was more than fits: that, too, says that something has changed.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsRawFd for RulesetWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

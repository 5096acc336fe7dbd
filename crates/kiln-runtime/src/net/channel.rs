//! One netlink socket, and requests over it: send, then read the kernel's answer.
//!
//! Frames are laid out as in `linux/netlink.h`; error texts are the extended
//! acknowledgements of `Documentation/userspace-api/netlink/intro.rst`.

use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// The kernel answers from within `send`; this only bounds a wait that should not exist.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// The kernel never makes a larger datagram for a dump (`NLMSG_GOODSIZE`, 32 KiB at most).
const DATAGRAM_BYTES: usize = 64 * 1024;
/// Bounds one answer: a host with a full internet routing table has about a million routes.
const FRAMES_LIMIT: usize = 4_000_000;

const HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const FLAG_CAPPED: u16 = 0x100;
const FLAG_ACK_TLVS: u16 = 0x200;
const ATTRIBUTE_MESSAGE: u16 = 1;

/// The kernel refused a request, or could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("{source}{}", reason.as_deref().map(|r| format!(" ({r})")).unwrap_or_default())]
pub struct NetlinkError {
    source: io::Error,
    /// The kernel's own words.
    reason: Option<String>,
}

impl NetlinkError {
    pub(super) fn is(&self, errno: i32) -> bool {
        self.source.raw_os_error() == Some(errno)
    }
}

impl From<io::Error> for NetlinkError {
    fn from(source: io::Error) -> Self {
        Self {
            source,
            reason: None,
        }
    }
}

/// One message of an answer.
pub(super) struct Frame<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

/// A socket of one netlink protocol, in the network namespace of the thread that
/// opened it (it stays there, whatever thread uses it).
pub(super) struct Channel {
    socket: Socket,
    sequence: u32,
}

impl Channel {
    pub fn route() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE)
    }

    pub fn netfilter() -> io::Result<Self> {
        Self::open(NETLINK_NETFILTER)
    }

    fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Acknowledgements without a copy of the request, with the kernel's reason.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        let limit = TimeVal::new(ANSWER_LIMIT.as_secs() as i64, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Sends complete, framed messages as one datagram.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        // A datagram must fit the socket's send buffer; many networks make a long one.
        if bytes.len() > DATAGRAM_BYTES {
            setsockopt(&self.socket, sockopt::SndBufForce, &(bytes.len() * 2))?;
        }
        let sent = self.socket.send(bytes, 0)?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::WriteZero,
                "netlink took only a part of the request",
            ))
        }
    }

    /// Gives every frame of the answer to `on_frame` until it breaks. Refusals end
    /// it with the kernel's error; an acknowledgement and a dump's end are given
    /// as frames with an empty payload.
    pub fn receive<T>(
        &mut self,
        mut on_frame: impl FnMut(Frame<'_>) -> ControlFlow<Result<T, NetlinkError>>,
    ) -> Result<T, NetlinkError> {
        let mut buffer = Vec::with_capacity(DATAGRAM_BYTES);
        let mut frames = 0;
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            }
            let mut rest: &[u8] = &buffer;
            while let Some((frame, after)) = split_frame(rest) {
                rest = after;
                frames += 1;
                if frames > FRAMES_LIMIT {
                    return Err(garbled("the answer is longer than its bound").into());
                }
                let frame = match frame.kind {
                    NLMSG_ERROR | NLMSG_DONE => conclude(frame)?,
                    _ => frame,
                };
                if let ControlFlow::Break(result) = on_frame(frame) {
                    return result;
                }
            }
            if !rest.is_empty() {
                return Err(garbled("the answer ends in a broken frame").into());
            }
        }
    }

    /// Asks for a change, and waits until the kernel has made it.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        let sequence = self.ask(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.receive(|frame| match frame.kind {
            NLMSG_ERROR if frame.sequence == sequence => ControlFlow::Break(Ok(())),
            _ => ControlFlow::Continue(()),
        })
    }

    /// Asks for one thing.
    pub fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<RouteNetlinkMessage, NetlinkError> {
        let sequence = self.ask(message, NLM_F_REQUEST)?;
        self.receive(|frame| match frame.sequence == sequence {
            true => ControlFlow::Break(parse(&frame)),
            false => ControlFlow::Continue(()),
        })
    }

    /// Asks for all things of a kind.
    pub fn dump(
        &mut self,
        message: RouteNetlinkMessage,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> Result<(), NetlinkError> {
        let sequence = self.ask(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        self.receive(|frame| match frame.kind {
            _ if frame.sequence != sequence => ControlFlow::Continue(()),
            NLMSG_DONE | NLMSG_ERROR => ControlFlow::Break(Ok(())),
            _ => match parse(&frame) {
                Ok(message) => {
                    each(message);
                    ControlFlow::Continue(())
                }
                Err(e) => ControlFlow::Break(Err(e)),
            },
        })
    }

    fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<u32> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.next_sequence();
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.send(&bytes)?;
        Ok(self.sequence)
    }
}

fn parse(frame: &Frame<'_>) -> Result<RouteNetlinkMessage, NetlinkError> {
    let mut header = NetlinkHeader::default();
    header.length = (HEADER_BYTES + frame.payload.len()) as u32;
    header.message_type = frame.kind;
    header.flags = frame.flags;
    header.sequence_number = frame.sequence;
    RouteNetlinkMessage::deserialize(&header, frame.payload)
        .map_err(|e| garbled(&e.to_string()).into())
}

fn garbled(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink: {what}"))
}

/// The first frame, and what follows it; `None` at the end or if it is cut short.
fn split_frame(bytes: &[u8]) -> Option<(Frame<'_>, &[u8])> {
    let length = u32_at(bytes, 0)? as usize;
    let frame = Frame {
        kind: u16_at(bytes, 4)?,
        flags: u16_at(bytes, 6)?,
        sequence: u32_at(bytes, 8)?,
        payload: bytes.get(HEADER_BYTES..length)?,
    };
    let next = length.next_multiple_of(4).min(bytes.len());
    Some((frame, bytes.get(next..)?))
}

/// An acknowledgement or a dump's end: an error if it carries a code.
fn conclude(frame: Frame<'_>) -> Result<Frame<'_>, NetlinkError> {
    let code = u32_at(frame.payload, 0).map_or(0, |raw| raw as i32);
    if code == 0 {
        return Ok(Frame {
            payload: &[],
            ..frame
        });
    }
    Err(NetlinkError {
        source: io::Error::from_raw_os_error(code.saturating_abs()),
        reason: refusal_text(&frame),
    })
}

/// The extended acknowledgement's text, which follows the code and the (whole or
/// capped) request.
fn refusal_text(frame: &Frame<'_>) -> Option<String> {
    if frame.flags & FLAG_ACK_TLVS == 0 {
        return None;
    }
    let mut at = if frame.kind == NLMSG_DONE {
        4
    } else if frame.flags & FLAG_CAPPED != 0 {
        4 + HEADER_BYTES
    } else {
        4 + (u32_at(frame.payload, 4)? as usize).next_multiple_of(4)
    };
    loop {
        let length = u16_at(frame.payload, at)? as usize;
        let kind = u16_at(frame.payload, at + 2)?;
        let value = frame.payload.get(at + 4..at + length)?;
        if kind == ATTRIBUTE_MESSAGE {
            let text = value.strip_suffix(&[0]).unwrap_or(value);
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        at += length.next_multiple_of(4);
    }
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let raw = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(raw.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let raw = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(raw.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn frame(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER_BYTES + payload.len()) as u32)
            .to_ne_bytes()
            .to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn cut_and_lying_frames_are_not_read() {
        let whole = frame(16, 0, &[1, 2, 3, 4]);
        assert!(split_frame(&whole).is_some());
        for cut in 0..whole.len() {
            assert!(split_frame(&whole[..cut]).is_none(), "cut at {cut}");
        }
        let mut lying = whole;
        lying[0..4].copy_from_slice(&3u32.to_ne_bytes());
        assert!(split_frame(&lying).is_none());
    }

    #[test]
    fn a_refusal_carries_the_kernels_words() {
        let mut payload = (-libc::EEXIST).to_ne_bytes().to_vec();
        payload.extend([0; HEADER_BYTES]);
        payload.extend(8u16.to_ne_bytes());
        payload.extend(ATTRIBUTE_MESSAGE.to_ne_bytes());
        payload.extend(b"no!\0");
        let bytes = frame(NLMSG_ERROR, FLAG_ACK_TLVS | FLAG_CAPPED, &payload);
        let refusal = conclude(split_frame(&bytes).unwrap().0).err().unwrap();
        assert!(refusal.is(libc::EEXIST));
        assert!(refusal.to_string().ends_with("(no!)"), "{refusal}");
    }
}

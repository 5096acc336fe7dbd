//! Netlink attributes and nfnetlink messages as bytes.

use super::super::channel::{u16_at, u32_at};

/// `NFPROTO_IPV4`.
pub const IPV4: u8 = 2;
/// All families, in requests for lists.
pub const ANY_FAMILY: u8 = 0;

const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
const SUBSYSTEM_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `struct nlmsghdr` and `struct nfgenmsg`.
const NLMSG_BYTES: usize = 16;
const NFGENMSG_BYTES: usize = 4;

/// Attributes under construction. Lengths are 16 bit: one level must stay below
/// 64 KiB, which names of bounded length and fixed expressions do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    pub fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (4 + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// nf_tables' numbers are big endian.
    pub fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// With the end mark the kernel wants.
    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    pub fn nest(self, kind: u16, inner: Attributes) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// A message of the nf_tables subsystem.
pub fn message(
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    attributes: &Attributes,
) -> Vec<u8> {
    frame(
        SUBSYSTEM_NFTABLES << 8 | kind,
        flags,
        sequence,
        family,
        0,
        &attributes.0,
    )
}

/// The start of a transaction.
pub fn batch_begin(flags: u16, sequence: u32) -> Vec<u8> {
    frame(BATCH_BEGIN, flags, sequence, 0, SUBSYSTEM_NFTABLES, &[])
}

/// Its end: the kernel commits all or nothing.
pub fn batch_end(flags: u16, sequence: u32) -> Vec<u8> {
    frame(BATCH_END, flags, sequence, 0, SUBSYSTEM_NFTABLES, &[])
}

fn frame(
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
    attributes: &[u8],
) -> Vec<u8> {
    let length = NLMSG_BYTES + NFGENMSG_BYTES + attributes.len();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend((length as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    bytes.push(family);
    bytes.push(0);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

/// The attributes of a received nfnetlink message's payload.
pub fn attributes_of(payload: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    attributes(payload.get(NFGENMSG_BYTES..).unwrap_or_default())
}

/// The family of a received nfnetlink message.
pub fn family_of(payload: &[u8]) -> u8 {
    payload.first().copied().unwrap_or_default()
}

/// Attributes by kind, up to the first that is broken.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u16_at(bytes, 0)? as usize;
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub fn number(value: &[u8]) -> Option<u32> {
    u32_at(value, 0).map(u32::from_be)
}

pub fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_read_back_and_broken_ones_end_the_list() {
        let inner = Attributes::default().number(2, 0xdead_beef);
        let all = Attributes::default().text(1, "abcd").nest(5, inner);
        let read: Vec<_> = attributes(&all.0).collect();
        assert_eq!(read.len(), 2);
        assert_eq!(text(read[0].1), "abcd");
        let nested: Vec<_> = attributes(read[1].1).collect();
        assert_eq!(nested[0].0, 2);
        assert_eq!(number(nested[0].1), Some(0xdead_beef));
        for cut in 0..all.0.len() {
            assert!(attributes(&all.0[..cut]).count() < 2, "cut at {cut}");
        }
    }
}

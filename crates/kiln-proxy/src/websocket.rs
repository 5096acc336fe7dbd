//! Frame boundaries of a websocket stream (RFC 6455, 5.2), followed without looking into
//! the frames, so that a close frame can be put between two of them. Pure.

/// A close frame of a server: status 1001, "going away".
pub(crate) const GOING_AWAY: [u8; 4] = [0x88, 0x02, 0x03, 0xe9];

/// The longest frame header: 2 bytes, 8 of length, 4 of mask.
const HEADER: usize = 14;

#[derive(Debug, Default)]
pub(crate) struct Frames {
    header: [u8; HEADER],
    have: usize,
    /// Payload bytes still to come.
    payload: u64,
}

impl Frames {
    pub(crate) fn at_boundary(&self) -> bool {
        self.have == 0 && self.payload == 0
    }

    /// Follows `bytes`, which came after all that were fed before.
    pub(crate) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let used = self.step(bytes);
            bytes = bytes.get(used..).unwrap_or_default();
        }
    }

    /// Follows `bytes` up to the first boundary in them, and says how many that were
    /// (all, if there is none).
    pub(crate) fn feed_to_boundary(&mut self, bytes: &[u8]) -> usize {
        let mut used = 0;
        while used < bytes.len() {
            used += self.step(bytes.get(used..).unwrap_or_default());
            if self.at_boundary() {
                break;
            }
        }
        used
    }

    /// Takes the rest of a payload, or one byte of a header. At least one byte.
    fn step(&mut self, bytes: &[u8]) -> usize {
        if self.payload > 0 {
            let take = (bytes.len() as u64).min(self.payload);
            self.payload -= take;
            return usize::try_from(take).unwrap_or(bytes.len());
        }
        if let (Some(slot), Some(byte)) = (self.header.get_mut(self.have), bytes.first()) {
            *slot = *byte;
            self.have += 1;
        }
        if let Some(length) = self.payload_length() {
            self.payload = length;
            self.have = 0;
        }
        1
    }

    /// Known once the header is complete.
    fn payload_length(&self) -> Option<u64> {
        let second = self.header[1];
        let extended = match second & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let mask = if second & 0x80 == 0 { 0 } else { 4 };
        if self.have < 2 || self.have < 2 + extended + mask {
            return None;
        }
        if extended == 0 {
            return Some(u64::from(second & 0x7f));
        }
        let bytes = self.header.get(2..2 + extended)?;
        Some(bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: usize, masked: bool) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut bytes = vec![0x82];
        match length {
            0..126 => bytes.push(mask | length as u8),
            126..65_536 => {
                bytes.push(mask | 126);
                bytes.extend((length as u16).to_be_bytes());
            }
            _ => {
                bytes.push(mask | 127);
                bytes.extend((length as u64).to_be_bytes());
            }
        }
        bytes.extend(vec![7; length + if masked { 4 } else { 0 }]);
        bytes
    }

    #[test]
    fn boundaries_are_found_however_the_bytes_are_split() {
        for masked in [false, true] {
            for length in [0, 1, 125, 126, 300, 65_535, 65_536, 70_000] {
                let one = frame(length, masked);
                let mut stream = one.clone();
                stream.extend(frame(3, masked));
                for chunk in [1, 2, 3, 7, 4096, stream.len()] {
                    let mut frames = Frames::default();
                    let mut at = 0;
                    let mut boundaries = Vec::new();
                    for part in stream.chunks(chunk) {
                        let mut rest = part;
                        while !rest.is_empty() {
                            let used = frames.feed_to_boundary(rest);
                            at += used;
                            rest = &rest[used..];
                            if frames.at_boundary() {
                                boundaries.push(at);
                            }
                        }
                    }
                    assert_eq!(boundaries, [one.len(), stream.len()], "{length} {chunk}");
                }
            }
        }
    }

    #[test]
    fn within_a_frame_is_no_boundary() {
        let mut frames = Frames::default();
        assert!(frames.at_boundary());
        frames.feed(&frame(300, false)[..200]);
        assert!(!frames.at_boundary());
        frames.feed(&frame(300, false)[200..]);
        assert!(frames.at_boundary());
    }
}

//! One 512-byte tar header (POSIX.1-1988 ustar; GNU's variations when reading).

pub(crate) const BLOCK: usize = 512;

/// Largest number in the 8-byte octal fields (ids, device numbers).
pub(crate) const MAX_OCTAL_7: u64 = 0o7777777;
/// Largest number in the 12-byte octal fields (size, time).
pub(crate) const MAX_OCTAL_11: u64 = 0o77777777777;

/// A header's fields as they stand in the block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// With the ustar prefix.
    pub name: Vec<u8>,
    pub mode: i64,
    pub uid: i64,
    pub gid: i64,
    pub size: i64,
    pub mtime: i64,
    pub kind: u8,
    pub link: Vec<u8>,
    pub major: i64,
    pub minor: i64,
}

/// Parses a block that is not all zeros; `Err` says what is wrong with it.
pub(crate) fn decode(block: &[u8; BLOCK]) -> Result<Header, &'static str> {
    let stored = number(&block[148..156]).ok_or("its checksum field is no number")?;
    if !checksums(block).contains(&stored) {
        return Err("its checksum is wrong, so this is no tar header");
    }
    let posix = &block[257..263] == b"ustar\0";
    let extended = posix || &block[257..265] == b"ustar  \0";
    let mut name = text(&block[0..100]).to_vec();
    let prefix = text(&block[345..500]);
    if posix && !prefix.is_empty() {
        name = [prefix, b"/", &name].concat();
    }
    let device = |range: std::ops::Range<usize>| match extended {
        true => number(&block[range]),
        false => Some(0),
    };
    Ok(Header {
        name,
        mode: number(&block[100..108]).ok_or("its mode is no number")?,
        uid: number(&block[108..116]).ok_or("its owner is no number")?,
        gid: number(&block[116..124]).ok_or("its group is no number")?,
        size: number(&block[124..136]).ok_or("its size is no number")?,
        mtime: number(&block[136..148]).ok_or("its time is no number")?,
        kind: block[156],
        link: text(&block[157..257]).to_vec(),
        major: device(329..337).ok_or("its device number is no number")?,
        minor: device(337..345).ok_or("its device number is no number")?,
    })
}

/// Writes a header whose fields all fit; what does not fit is cut, and stands in a
/// PAX header before it.
pub(crate) fn encode(header: &Header) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let cut = |bytes: &[u8]| bytes.len().min(100);
    block[..cut(&header.name)].copy_from_slice(&header.name[..cut(&header.name)]);
    octal(&mut block[100..108], header.mode);
    octal(&mut block[108..116], header.uid);
    octal(&mut block[116..124], header.gid);
    octal(&mut block[124..136], header.size);
    octal(&mut block[136..148], header.mtime);
    block[156] = header.kind;
    block[157..157 + cut(&header.link)].copy_from_slice(&header.link[..cut(&header.link)]);
    block[257..265].copy_from_slice(b"ustar\x0000");
    octal(&mut block[329..337], header.major);
    octal(&mut block[337..345], header.minor);
    let sum = checksums(&block)[0];
    octal(&mut block[148..155], sum);
    block[155] = b' ';
    block
}

/// The sum over the block with its checksum field blank: of unsigned bytes as POSIX
/// says, and of signed ones as some old writers did.
fn checksums(block: &[u8; BLOCK]) -> [i64; 2] {
    let mut sums = [0; 2];
    for (at, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) {
            b' '
        } else {
            *byte
        };
        sums[0] += i64::from(byte);
        sums[1] += i64::from(byte.cast_signed());
    }
    sums
}

fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    &field[..end]
}

/// Octal text, blank for zero, or GNU's big-endian two's complement, marked by the
/// first bit. `None`: neither, or beyond 64 bits.
fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        // The mark is no part of the number; the next bit is its sign.
        let fill: u8 = if first & 0x40 != 0 { 0xff } else { 0 };
        let first = if fill == 0 { first & 0x7f } else { first };
        let (high, low) = field.split_at(field.len() - 8);
        let head_fits = match high.split_first() {
            None => true,
            Some((_, rest)) => first == fill && rest.iter().all(|b| *b == fill),
        };
        let mut bytes: [u8; 8] = low.try_into().ok()?;
        if high.is_empty() {
            bytes[0] = first;
        }
        let value = i64::from_be_bytes(bytes);
        return (head_fits && (value < 0) == (fill != 0)).then_some(value);
    }
    let blank = |b: &u8| *b == b' ' || *b == 0;
    let start = field.iter().position(|b| !blank(b)).unwrap_or(field.len());
    let digits = &field[start..];
    let digits = &digits[..digits.iter().position(blank).unwrap_or(digits.len())];
    digits.iter().try_fold(0i64, |sum, digit| match digit {
        b'0'..=b'7' => sum.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

/// Octal digits with leading zeros, and a NUL; 0 where the number does not fit.
fn octal(field: &mut [u8], value: i64) {
    let digits = field.len() - 1;
    let fits = u64::try_from(value).is_ok_and(|v| digits >= 21 || v < 1 << (3 * digits));
    let mut rest = if fits { value } else { 0 };
    for slot in field[..digits].iter_mut().rev() {
        *slot = b'0' + u8::try_from(rest & 7).unwrap_or(0);
        rest >>= 3;
    }
    field[digits] = 0;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn numbers_in_all_forms() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"0000689\0"), None);
        assert_eq!(number(b"-000001\0"), None);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 0]), Some(256));
        assert_eq!(number(&[0xff; 8]), Some(-1));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(
            number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]),
            Some(1 << 33)
        );
        assert_eq!(
            number(&[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
            None,
            "beyond 64 bits"
        );
        assert_eq!(
            number(&[0x80, 0, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0]),
            None,
            "beyond i64"
        );
    }

    #[test]
    fn a_written_header_reads_back_and_a_changed_one_does_not() {
        let header = Header {
            name: b"etc/passwd".to_vec(),
            mode: 0o4755,
            uid: 1000,
            gid: 0o7777777,
            size: 0o77777777777,
            mtime: 1_700_000_000,
            kind: b'0',
            link: vec![b'l'; 100],
            major: 8,
            minor: 1,
        };
        let mut block = encode(&header);
        assert_eq!(decode(&block).unwrap(), header);
        block[0] ^= 1;
        assert!(decode(&block).is_err());
    }
}

//! Reading bzip2, for ADD of archives: there is no description but the program itself
//! (bzip2 1.0.8, `decompress.c`); several streams may follow each other.
//!
//! Invariants: whatever the bytes, memory is bounded by nine times [`LEVEL_BYTES`] (five
//! bytes each, and where they are runs 52 times as much given out), and every block is
//! checked against its CRC before any of it is given out.

use std::io::{self, BufRead, Read};

/// A block has at most nine times so many bytes, before its runs are written out.
const LEVEL_BYTES: usize = 100_000;

const BLOCK: u64 = 0x3141_5926_5359;
const END: u64 = 0x1772_4538_5090;

/// Longest code; symbols, and tables of codes, of one block.
const MAX_CODE: usize = 20;
const MAX_SYMBOLS: usize = 258;
const MAX_TABLES: usize = 6;
/// A table holds for so many symbols.
const GROUP: usize = 50;

/// Gives what a compressed stream holds.
pub struct Decoder<R> {
    bits: Bits<R>,
    /// Most bytes of a block of this stream; 0: before a stream.
    limit: usize,
    /// Of all blocks of this stream so far.
    combined: u32,
    block: Vec<u8>,
    given: usize,
    ended: bool,
}

impl<R: BufRead> Decoder<R> {
    pub fn new(content: R) -> Self {
        Self {
            bits: Bits {
                content,
                buffer: 0,
                count: 0,
            },
            limit: 0,
            combined: 0,
            block: Vec::new(),
            given: 0,
            ended: false,
        }
    }

    /// Makes the next block, if there is one.
    fn next(&mut self) -> io::Result<()> {
        if self.limit == 0 && !self.stream()? {
            self.ended = true;
            return Ok(());
        }
        match self.bits.take(48)? {
            BLOCK => {
                let expected = self.bits.take(32)? as u32;
                self.block = block(&mut self.bits, self.limit)?;
                self.given = 0;
                let found = crc(&self.block);
                if found != expected {
                    return Err(damaged("a block's checksum is wrong"));
                }
                self.combined = self.combined.rotate_left(1) ^ found;
            }
            END => {
                if self.bits.take(32)? as u32 != self.combined {
                    return Err(damaged("the checksum is wrong"));
                }
                self.bits.align();
                self.limit = 0;
                self.combined = 0;
            }
            _ => return Err(damaged("no block is where one must begin")),
        }
        Ok(())
    }

    /// Reads a stream's head; false: there is none.
    fn stream(&mut self) -> io::Result<bool> {
        if self.bits.is_at_end()? {
            return Ok(false);
        }
        let head = self.bits.take(32)?.to_be_bytes();
        match head {
            [.., b'B', b'Z', b'h', level @ b'1'..=b'9'] => {
                self.limit = usize::from(level - b'0') * LEVEL_BYTES;
                Ok(true)
            }
            _ => Err(damaged("it doesn't begin with BZh")),
        }
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.given == self.block.len() && !self.ended {
            self.next()?;
        }
        let left = &self.block[self.given..];
        let count = left.len().min(out.len());
        out[..count].copy_from_slice(&left[..count]);
        self.given += count;
        Ok(count)
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("bzip2: {what}"))
}

/// Bits from the highest of each byte on.
struct Bits<R> {
    content: R,
    buffer: u64,
    count: u32,
}

impl<R: BufRead> Bits<R> {
    /// At most 48.
    fn take(&mut self, count: u32) -> io::Result<u64> {
        while self.count < count {
            let mut byte = [0];
            self.content.read_exact(&mut byte)?;
            self.buffer = self.buffer << 8 | u64::from(byte[0]);
            self.count += 8;
        }
        self.count -= count;
        Ok(self.buffer >> self.count & ((1 << count) - 1))
    }

    fn bit(&mut self) -> io::Result<bool> {
        Ok(self.take(1)? == 1)
    }

    /// Leaves what is left of the byte.
    fn align(&mut self) {
        self.count -= self.count % 8;
    }

    fn is_at_end(&mut self) -> io::Result<bool> {
        Ok(self.count == 0 && self.content.fill_buf()?.is_empty())
    }
}

/// A block's bytes: Huffman codes, runs and places of recently used bytes, the
/// Burrows-Wheeler transform, and runs again.
fn block<R: BufRead>(bits: &mut Bits<R>, limit: usize) -> io::Result<Vec<u8>> {
    if bits.bit()? {
        return Err(damaged("it is of before version 0.9.5"));
    }
    let origin = bits.take(24)? as usize;
    let mut recent = alphabet(bits)?;
    let symbols = recent.len() + 2;
    let (tables, selectors) = tables(bits, symbols)?;
    let last = symbols - 1;
    let mut sorted = Vec::new();
    let (mut run, mut weight) = (0, 1);
    for number in 0.. {
        let table = selectors.get(number / GROUP);
        let table = table.and_then(|t| tables.get(usize::from(*t)));
        let symbol = table
            .ok_or_else(|| damaged("it has no end"))?
            .symbol(bits)?;
        if symbol < 2 {
            // A run's length, in digits that stand for 1 and 2.
            run += weight << symbol;
            weight <<= 1;
            if run > limit {
                return Err(damaged("a block is too long"));
            }
            continue;
        }
        let length = sorted.len() + run;
        if length > limit || (symbol != last && length == limit) {
            return Err(damaged("a block is too long"));
        }
        sorted.resize(length, recent[0]);
        (run, weight) = (0, 1);
        if symbol == last {
            break;
        }
        recent[..symbol].rotate_right(1);
        sorted.push(recent[0]);
    }
    if origin >= sorted.len() {
        return Err(damaged("a block begins nowhere"));
    }
    runs(&sorted, origin)
}

/// The bytes that a block has, in their order.
fn alphabet<R: BufRead>(bits: &mut Bits<R>) -> io::Result<Vec<u8>> {
    let ranges = bits.take(16)?;
    let mut used = Vec::new();
    for range in (0..16).filter(|range| ranges >> (15 - range) & 1 == 1) {
        let within = bits.take(16)?;
        let bytes = (0..16).filter(|byte| within >> (15 - byte) & 1 == 1);
        used.extend(bytes.map(|byte| range << 4 | byte));
    }
    match used.is_empty() {
        true => Err(damaged("a block has no bytes")),
        false => Ok(used),
    }
}

type Tables = (Vec<Table>, Vec<u8>);

fn tables<R: BufRead>(bits: &mut Bits<R>, symbols: usize) -> io::Result<Tables> {
    let count = bits.take(3)? as usize;
    let chosen = bits.take(15)?;
    if !(2..=MAX_TABLES).contains(&count) || chosen == 0 {
        return Err(damaged("a block has no codes"));
    }
    let mut recent: [u8; MAX_TABLES] = [0, 1, 2, 3, 4, 5];
    let mut selectors = Vec::new();
    for _ in 0..chosen {
        let mut place = 0;
        while bits.bit()? {
            place += 1;
            if place >= count {
                return Err(damaged("a code is not there"));
            }
        }
        recent[..=place].rotate_right(1);
        selectors.push(recent[0]);
    }
    let mut tables = Vec::new();
    for _ in 0..count {
        let mut lengths = [0; MAX_SYMBOLS];
        let mut length = bits.take(5)? as usize;
        for slot in &mut lengths[..symbols] {
            loop {
                if !(1..=MAX_CODE).contains(&length) {
                    return Err(damaged("a code has an impossible length"));
                }
                if !bits.bit()? {
                    break;
                }
                match bits.bit()? {
                    false => length += 1,
                    true => length -= 1,
                }
            }
            *slot = length;
        }
        tables.push(Table::new(&lengths[..symbols]));
    }
    Ok((tables, selectors))
}

/// Canonical Huffman codes: those of one length follow each other.
struct Table {
    /// How many codes have this length.
    counts: [u32; MAX_CODE + 1],
    /// In the order of their codes.
    symbols: Vec<usize>,
}

impl Table {
    fn new(lengths: &[usize]) -> Self {
        let mut counts = [0; MAX_CODE + 1];
        for length in lengths {
            counts[*length] += 1;
        }
        let mut symbols: Vec<usize> = (0..lengths.len()).collect();
        symbols.sort_by_key(|symbol| lengths[*symbol]);
        Self { counts, symbols }
    }

    fn symbol<R: BufRead>(&self, bits: &mut Bits<R>) -> io::Result<usize> {
        let (mut code, mut first, mut index) = (0_u32, 0_u32, 0_u32);
        for count in &self.counts[1..] {
            code |= u32::from(bits.bit()?);
            if code.wrapping_sub(first) < *count {
                return Ok(self.symbols[(index + code - first) as usize]);
            }
            index += count;
            first = (first + count) << 1;
            code <<= 1;
        }
        Err(damaged("a code is not known"))
    }
}

/// Undoes the transform, and writes out runs: after four equal bytes one says how many more.
fn runs(sorted: &[u8], origin: usize) -> io::Result<Vec<u8>> {
    let mut starts = [0_usize; 256];
    for byte in sorted {
        starts[usize::from(*byte)] += 1;
    }
    let mut sum = 0;
    for start in &mut starts {
        sum += std::mem::replace(start, sum);
    }
    let mut follows = vec![0_u32; sorted.len()];
    for (place, byte) in sorted.iter().enumerate() {
        let start = &mut starts[usize::from(*byte)];
        follows[*start] = place as u32;
        *start += 1;
    }
    let mut out = Vec::with_capacity(sorted.len());
    let mut place = follows[origin] as usize;
    let (mut same, mut before) = (0, None);
    for _ in 0..sorted.len() {
        let byte = sorted[place];
        place = follows[place] as usize;
        if same == 4 {
            let length = out.len() + usize::from(byte);
            out.resize(length, before.unwrap_or_default());
            same = 0;
            before = None;
            continue;
        }
        same = if before == Some(byte) { same + 1 } else { 1 };
        before = Some(byte);
        out.push(byte);
    }
    Ok(out)
}

/// CRC-32 from the highest bit on, as bzip2 has it.
fn crc(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut value = (index as u32) << 24;
            let mut bit = 0;
            while bit < 8 {
                value = (value << 1) ^ if value >> 31 == 1 { 0x04c1_1db7 } else { 0 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, byte| {
        (crc << 8) ^ TABLE[usize::from((crc >> 24) as u8 ^ byte)]
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Two streams after each other: runs, repeated words, every byte.
    const COMPRESSED: &str = "\
425a68313141592653592018468f000007510001004000202d2000310c008a0d17c253904a43609c278bb9229c28\
48100c234780425a6839314159265359bea595bc00004b7fffffffffffffffffffffffffffffffffffffffffffff\
fffffffffffffffffffffb000dad3200000000000000002600000000000000001300000000000000000000000000\
009809831400013000000000000004c000000000000264d3260000000000000000099300000469813268d3065349\
81302613001a00000000098982600000000000000004c0000000023260130004c989809800000d0027b058000304\
ca0800d0e0f1011f889098a0a8b0bfc86064686fe6383a3c3e40424446484a4c0dc4a010500003292a2b292a2b2c\
2d2a2e2f303132333435363738393a3b3c3d3e3ffe2020a121a222a323a424a525a626a727a828a929aa2aab2bac\
2f2fb030b131b232b333b434b3827cd412d6d8dadcdee0e60020397c4100049730b0b00101d010407554767778797\
a767778797a7b7c7d7e7f80818283fec242c343c444c545c646c747c848c949ca4acb4bcc4ccd4dce4ecf4fd050d1\
51d252d353d454d555d656d757d858d959da5adb5bdc5cdd5dde5edf5fe060e161e262e363e464e565e666e767e86\
8e969ea6aeb6bec6a7fb575b5f63676b6fffb9bbbdbfc1c3c5c7c9cbcdcfd1d3d5d7d9dbdddfe1e3e4124bcfcfd3d7\
dbdc5dc914e14242fa9656f00";

    fn plain() -> Vec<u8> {
        let mut bytes = vec![b'a'; 10];
        bytes.extend(b"kiln ".repeat(20));
        bytes.extend(0..=255_u8);
        bytes.extend([0; 300]);
        bytes.extend(b"bbbb");
        bytes
    }

    fn read(compressed: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Decoder::new(compressed).read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn streams_after_each_other_are_read() {
        assert_eq!(read(&hex::decode(COMPRESSED).unwrap()).unwrap(), plain());
        assert_eq!(read(b"").unwrap(), b"");
        assert_eq!(
            crc(b"123456789"),
            0xfc89_1918,
            "the catalogue's check value"
        );
    }

    #[test]
    fn no_damage_goes_unseen() {
        let whole = hex::decode(COMPRESSED).unwrap();
        for length in 1..whole.len() {
            let cut = read(&whole[..length]);
            // Cut between the streams the first is whole.
            assert!(
                cut.is_err() || cut.unwrap() == plain()[..60],
                "cut at {length}"
            );
        }
        for place in 0..whole.len() {
            for bit in 0..8 {
                let mut damaged = whole.clone();
                damaged[place] ^= 1 << bit;
                match read(&damaged) {
                    Err(_) => {}
                    // Bits after a stream's end, or a larger block size, mean nothing.
                    Ok(out) => assert_eq!(out, plain(), "byte {place}, bit {bit}"),
                }
            }
        }
    }
}

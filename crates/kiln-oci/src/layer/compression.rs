//! Which compression a stream has, by its first bytes.

use std::io::{self, BufReader, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

/// Bytes read ahead from a source.
const READ_AHEAD: usize = 128 << 10;
/// Largest window a zstd stream may ask for: 128 MiB, zstd's own default.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Memory an xz stream may ask for, in bytes: `xz -9` needs 65 MiB.
const XZ_MEMORY_MAX: u64 = 128 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
    Xz,
}

impl Compression {
    /// By the first bytes of a stream; six are enough. What is not recognised is
    /// [`Compression::None`].
    pub fn sniff(first: &[u8]) -> Self {
        // zstd: a frame, or one of the 16 kinds of skippable frame (RFC 8878, 3.1).
        let skippable = |b: &[u8]| b[0] & 0xf0 == 0x50 && b[1..4] == [0x2a, 0x4d, 0x18];
        match first {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            _ if first.len() >= 4 && skippable(first) => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// The uncompressed content of `source`, whichever of the known compressions it has.
/// Memory is bounded; the caller bounds the length.
pub fn decompress<'a>(
    mut source: impl Read + Send + 'a,
) -> io::Result<(Compression, Box<dyn Read + Send + 'a>)> {
    let mut first = Vec::with_capacity(6);
    source.by_ref().take(6).read_to_end(&mut first)?;
    let compression = Compression::sniff(&first);
    let whole = BufReader::with_capacity(READ_AHEAD, Cursor::new(first).chain(source));
    let content: Box<dyn Read + Send + 'a> = match compression {
        Compression::None => Box::new(whole),
        Compression::Gzip => Box::new(MultiGzDecoder::new(whole)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(whole)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
        Compression::Xz => {
            let stream =
                xz2::stream::Stream::new_stream_decoder(XZ_MEMORY_MAX, xz2::stream::CONCATENATED)?;
            Box::new(xz2::bufread::XzDecoder::new_stream(whole, stream))
        }
    };
    Ok((compression, content))
}

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use kiln_model::{Digest, Hasher};

use super::path::{self, PathProblem, shown};
use super::ustar::{self, BLOCK, Header, MAX_OCTAL_7, MAX_OCTAL_11};
use super::{Entry, EntryKind, MAX_XATTR_BYTES, pax};
use crate::manifest::{Descriptor, media_type};

/// Pinned, with the checksum and the piece size: they shape the bytes, so changing one
/// changes the digest of everything that is built.
const ZSTD_LEVEL: i32 = 2;
const ZSTD_CHECKSUM: bool = true;
/// The compressor gets its input in pieces of exactly this many bytes, so that its
/// output can't depend on how the content was read.
const PIECE: usize = 128 << 10;

/// Why a layer could not be written.
#[derive(Debug, thiserror::Error)]
pub enum LayerWriteError {
    #[error("the layer could not be written: {0}")]
    Io(#[from] io::Error),
    #[error("`{}` can't be in a layer: {problem}", shown(path))]
    Path {
        path: Vec<u8>,
        #[source]
        problem: PathProblem,
    },
    #[error("`{}` can't be in a layer: {problem}", shown(path))]
    Entry {
        path: Vec<u8>,
        problem: &'static str,
    },
    #[error("the content of `{}` could not be read: {source}", shown(path))]
    Content {
        path: Vec<u8>,
        #[source]
        source: io::Error,
    },
    #[error(
        "`{}` has {found} bytes where {expected} were announced: it changed while it was read",
        shown(path)
    )]
    ContentSize {
        path: Vec<u8>,
        expected: u64,
        /// At least this many; counting stops at the first byte too many.
        found: u64,
    },
}

/// What a [`LayerWriter`] has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenLayer {
    /// Of the compressed bytes.
    pub digest: Digest,
    /// Of the compressed bytes, in bytes.
    pub size: u64,
    /// Of the tar stream.
    pub diff_id: Digest,
    /// Of the tar stream, in bytes.
    pub tar_size: u64,
}

impl WrittenLayer {
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(media_type::OCI_LAYER_ZSTD, self.digest, self.size)
    }
}

/// Writes a layer; see the module for its form.
///
/// The order of entries is the caller's, and part of the digest: parents before what
/// they hold, a hard link's target before the link, else by path.
pub struct LayerWriter<W: Write> {
    tar: Hashing<Pieces<zstd::stream::write::Encoder<'static, Hashing<W>>>>,
    latest_mtime: Option<i64>,
}

impl<W: Write> LayerWriter<W> {
    /// `latest_mtime`: later times are clamped to it (seconds since the Unix epoch;
    /// SOURCE_DATE_EPOCH).
    pub fn new(out: W, latest_mtime: Option<i64>) -> Result<Self, LayerWriteError> {
        let mut encoder = zstd::stream::write::Encoder::new(Hashing::new(out), ZSTD_LEVEL)?;
        encoder.include_checksum(ZSTD_CHECKSUM)?;
        Ok(Self {
            tar: Hashing::new(Pieces::new(encoder)),
            latest_mtime,
        })
    }

    /// Adds one entry. `content` is read only for [`EntryKind::File`], and must then
    /// have exactly the announced size.
    pub fn entry(&mut self, entry: &Entry, content: &mut dyn Read) -> Result<(), LayerWriteError> {
        check(entry)?;
        let (header, records) = self.header(entry);
        self.headers(&header, &records)?;
        match entry.kind {
            EntryKind::File { size } => self.content(&entry.path, size, content),
            _ => Ok(()),
        }
    }

    /// Says that what lower layers have at `path` is gone.
    pub fn whiteout(&mut self, path: &[u8]) -> Result<(), LayerWriteError> {
        let (folder, name) = path::split(path);
        if name.is_empty() {
            return Err(path_error(path, PathProblem::Empty));
        }
        path::check_normal(path).map_err(|problem| path_error(path, problem))?;
        self.mark(&path::join(folder, &[b".wh.", name].concat()))
    }

    /// Says that whatever lower layers have inside the folder `path` is gone.
    pub fn opaque(&mut self, path: &[u8]) -> Result<(), LayerWriteError> {
        path::check_normal(path).map_err(|problem| path_error(path, problem))?;
        self.mark(&path::join(path, b".wh..wh..opq"))
    }

    /// Ends the layer, and gives back what it was written to.
    pub fn finish(mut self) -> Result<(WrittenLayer, W), LayerWriteError> {
        self.tar.write_all(&[0; 2 * BLOCK])?;
        let (diff_id, tar_size, pieces) = self.tar.finish();
        let (digest, size, mut out) = pieces.finish()?.finish()?.finish();
        out.flush()?;
        let written = WrittenLayer {
            digest,
            size,
            diff_id,
            tar_size,
        };
        Ok((written, out))
    }

    fn mark(&mut self, path: &[u8]) -> Result<(), LayerWriteError> {
        let header = Header {
            name: path.to_vec(),
            ..blank(b'0')
        };
        let mut records = BTreeMap::new();
        if path.len() > 100 {
            records.insert(b"path".to_vec(), path.to_vec());
        }
        self.headers(&header, &records)
    }

    /// The ustar header, and what it cannot say.
    fn header(&self, entry: &Entry) -> (Header, BTreeMap<Vec<u8>, Vec<u8>>) {
        let mut name = match entry.path.as_slice() {
            b"" => b".".to_vec(),
            path => path.to_vec(),
        };
        let mut header = blank(b'0');
        match &entry.kind {
            EntryKind::File { size } => header.size = i64::try_from(*size).unwrap_or(i64::MAX),
            EntryKind::Dir => {
                header.kind = b'5';
                name.push(b'/');
            }
            EntryKind::Hardlink { target } => {
                header.kind = b'1';
                header.link.clone_from(target);
            }
            EntryKind::Symlink { target } => {
                header.kind = b'2';
                header.link.clone_from(target);
            }
            EntryKind::Char { major, minor } | EntryKind::Block { major, minor } => {
                let character = matches!(entry.kind, EntryKind::Char { .. });
                header.kind = if character { b'3' } else { b'4' };
                (header.major, header.minor) = (i64::from(*major), i64::from(*minor));
            }
            EntryKind::Fifo => header.kind = b'6',
        }
        header.name = name;
        header.mode = i64::from(entry.mode);
        (header.uid, header.gid) = (i64::from(entry.uid), i64::from(entry.gid));
        header.mtime = entry.mtime.min(self.latest_mtime.unwrap_or(i64::MAX));
        let mut records = overflow(&header);
        for (name, value) in &entry.xattrs {
            records.insert([pax::XATTR, name].concat(), value.clone());
        }
        (header, records)
    }

    fn headers(
        &mut self,
        header: &Header,
        records: &BTreeMap<Vec<u8>, Vec<u8>>,
    ) -> Result<(), LayerWriteError> {
        if !records.is_empty() {
            let bytes = pax::encode(records);
            let extended = Header {
                name: b"././@PaxHeader".to_vec(),
                mode: 0o644,
                size: i64::try_from(bytes.len()).unwrap_or(i64::MAX),
                ..blank(b'x')
            };
            self.tar.write_all(&ustar::encode(&extended))?;
            self.tar.write_all(&bytes)?;
            self.pad(bytes.len() as u64)?;
        }
        self.tar.write_all(&ustar::encode(header))?;
        Ok(())
    }

    fn content(
        &mut self,
        path: &[u8],
        expected: u64,
        content: &mut dyn Read,
    ) -> Result<(), LayerWriteError> {
        let mut buffer = [0; 16 << 10];
        let mut found = 0;
        loop {
            let n = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(LayerWriteError::Content {
                        path: path.into(),
                        source,
                    });
                }
            };
            found += n as u64;
            if found > expected {
                break;
            }
            self.tar.write_all(&buffer[..n])?;
        }
        if found != expected {
            return Err(LayerWriteError::ContentSize {
                path: path.into(),
                expected,
                found,
            });
        }
        self.pad(expected)
    }

    /// Zeros up to the next block.
    fn pad(&mut self, size: u64) -> Result<(), LayerWriteError> {
        let over = usize::try_from(size % BLOCK as u64).unwrap_or(0);
        if over > 0 {
            self.tar.write_all(&[0; BLOCK][over..])?;
        }
        Ok(())
    }
}

fn path_error(path: &[u8], problem: PathProblem) -> LayerWriteError {
    LayerWriteError::Path {
        path: path.into(),
        problem,
    }
}

fn check(entry: &Entry) -> Result<(), LayerWriteError> {
    path::check_normal(&entry.path).map_err(|problem| path_error(&entry.path, problem))?;
    let target = match &entry.kind {
        EntryKind::Hardlink { target } => {
            path::check_normal(target).map_err(|problem| path_error(target, problem))?;
            Some(target)
        }
        EntryKind::Symlink { target } => Some(target),
        _ => None,
    };
    let no_dir = !matches!(entry.kind, EntryKind::Dir);
    let bad_target = |t: &Vec<u8>| t.is_empty() || t.contains(&0);
    let bad_name = |name: &Vec<u8>| name.is_empty() || name.iter().any(|b| matches!(b, 0 | b'='));
    let huge = matches!(entry.kind, EntryKind::File { size } if size > i64::MAX.cast_unsigned());
    let device = match entry.kind {
        EntryKind::Char { major, minor } | EntryKind::Block { major, minor } => major.max(minor),
        _ => 0,
    };
    let problem = if entry.path.is_empty() && no_dir {
        "the root can only be a folder"
    } else if entry.mode > 0o7777 {
        "its mode has bits beyond 0o7777"
    } else if huge {
        "its size is beyond 63 bits"
    } else if u64::from(device) > MAX_OCTAL_7 {
        "its device number is beyond 21 bits"
    } else if target.is_some_and(bad_target) {
        "its link target is empty or holds a NUL byte"
    } else if entry.xattrs.keys().any(bad_name) {
        "the name of an extended attribute is empty or holds `=` or a NUL byte"
    } else if entry.xattrs.values().any(|v| v.len() > MAX_XATTR_BYTES) {
        "an extended attribute is longer than 64 KiB"
    } else {
        return Ok(());
    };
    Err(LayerWriteError::Entry {
        path: entry.path.clone(),
        problem,
    })
}

/// The records that ustar has no room for.
fn overflow(header: &Header) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let fits = |value: i64, limit: u64| u64::try_from(value).is_ok_and(|v| v <= limit);
    let mut records = BTreeMap::new();
    for (key, bytes) in [("path", &header.name), ("linkpath", &header.link)] {
        if bytes.len() > 100 {
            records.insert(key.into(), bytes.clone());
        }
    }
    for (key, value, limit) in [
        ("uid", header.uid, MAX_OCTAL_7),
        ("gid", header.gid, MAX_OCTAL_7),
        ("size", header.size, MAX_OCTAL_11),
        ("mtime", header.mtime, MAX_OCTAL_11),
    ] {
        if !fits(value, limit) {
            records.insert(key.into(), value.to_string().into_bytes());
        }
    }
    records
}

fn blank(kind: u8) -> Header {
    Header {
        name: Vec::new(),
        mode: 0,
        uid: 0,
        gid: 0,
        size: 0,
        mtime: 0,
        kind,
        link: Vec::new(),
        major: 0,
        minor: 0,
    }
}

/// Hashes and counts what passes.
struct Hashing<W> {
    out: W,
    hasher: Hasher,
    count: u64,
}

impl<W> Hashing<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            hasher: Hasher::new(),
            count: 0,
        }
    }

    fn finish(self) -> (Digest, u64, W) {
        (self.hasher.finish(), self.count, self.out)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.count += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Passes bytes on in pieces of [`PIECE`]; only the last may be shorter.
struct Pieces<W> {
    out: W,
    held: Vec<u8>,
}

impl<W: Write> Pieces<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            held: Vec::with_capacity(PIECE),
        }
    }

    fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&self.held)?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Pieces<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.held.len() == PIECE {
            self.out.write_all(&self.held)?;
            self.held.clear();
        }
        let n = bytes.len().min(PIECE - self.held.len());
        self.held.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    /// Holds on to what is less than a piece: flushing early would shape the output.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

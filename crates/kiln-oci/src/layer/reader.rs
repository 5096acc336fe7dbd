use std::collections::BTreeMap;
use std::io::{self, Read};

use kiln_model::{Digest, Hasher};

use super::path::{self, PathProblem, shown};
use super::ustar::{self, BLOCK, Header};
use super::{
    Compression, Entry, EntryKind, LayerItem, MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_XATTR_BYTES,
    decompress, pax,
};

/// Longest PAX header, and longest GNU long name, in bytes. Go's reader has the same.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;

/// How much a layer may be, so that a small file can't become endless work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most entries, headers of extensions included.
    pub entries: u64,
    /// Most bytes of the uncompressed stream.
    pub bytes: u64,
}

impl Limits {
    /// For one layer of an image that a user asked for: two million entries, 64 GiB.
    pub const IMAGE: Self = Self {
        entries: 2_000_000,
        bytes: 64 << 30,
    };
}

/// What names that begin with `.wh.` mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteouts {
    /// Deletions, as in a layer.
    Interpret,
    /// Nothing, as in any other archive (`ADD x.tar`, a Debian package).
    Plain,
}

/// Why a layer could not be read. The caller knows which layer it is.
#[derive(Debug, thiserror::Error)]
pub enum LayerReadError {
    #[error("it could not be read: {0}")]
    Io(#[source] io::Error),
    #[error(
        "it is damaged: {problem} ({compression:?} compression, after {offset} bytes): {source}"
    )]
    Compression {
        compression: Compression,
        problem: &'static str,
        /// Of the uncompressed stream.
        offset: u64,
        #[source]
        source: io::Error,
    },
    #[error("it ends in the middle of an entry, after {offset} bytes: it was cut short")]
    Truncated { offset: u64 },
    #[error("it is no valid tar archive: at byte {offset}, {problem}")]
    Malformed { offset: u64, problem: &'static str },
    #[error("its entry `{}` is refused: {problem}", shown(path))]
    Path {
        path: Vec<u8>,
        #[source]
        problem: PathProblem,
    },
    #[error("its entry `{}` is refused: {problem}", shown(path))]
    Entry {
        path: Vec<u8>,
        problem: &'static str,
    },
    #[error("its entry `{}` is {what}, which kiln does not support", shown(path))]
    Unsupported { path: Vec<u8>, what: String },
    #[error("it has more than the {limit} entries that are allowed")]
    TooManyEntries { limit: u64 },
    #[error("it is larger uncompressed than the {limit} bytes that are allowed")]
    TooLarge { limit: u64 },
    #[error("its content has digest {found}, but the image says {expected}")]
    WrongDiffId { expected: Digest, found: Digest },
}

/// Reads a layer entry by entry; see the module for what it takes.
///
/// After [`next_entry`](Self::next_entry) has given a file, its content is read from
/// the reader itself (`impl Read`); what is not read is skipped. What was read so far
/// is only proven by [`finish`](Self::finish).
pub struct LayerReader<'a> {
    stream: Meter<Box<dyn Read + Send + 'a>>,
    limits: Limits,
    whiteouts: Whiteouts,
    entries: u64,
    /// Content of the current entry not yet read.
    content: u64,
    /// Zeros after that content.
    padding: u64,
    ended: bool,
}

/// What extension headers said about the entry after them.
#[derive(Default)]
struct Extensions {
    pax: BTreeMap<Vec<u8>, Vec<u8>>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<'a> LayerReader<'a> {
    pub fn new(
        source: impl Read + Send + 'a,
        limits: Limits,
        whiteouts: Whiteouts,
    ) -> Result<Self, LayerReadError> {
        let (compression, content) = decompress(source).map_err(LayerReadError::Io)?;
        Ok(Self {
            stream: Meter {
                inner: content,
                compression,
                hasher: Hasher::new(),
                count: 0,
                limit: limits.bytes,
            },
            limits,
            whiteouts,
            entries: 0,
            content: 0,
            padding: 0,
            ended: false,
        })
    }

    /// The next thing the layer says; `None` after the last.
    pub fn next_entry(&mut self) -> Result<Option<LayerItem>, LayerReadError> {
        let mut extensions = Extensions::default();
        let mut extended = false;
        loop {
            self.skip_content()?;
            if self.ended {
                return Ok(None);
            }
            let Some(header) = self.header()? else {
                if extended {
                    return Err(self.malformed("the archive ends after an extension header"));
                }
                self.ended = true;
                return Ok(None);
            };
            self.entries += 1;
            if self.entries > self.limits.entries {
                return Err(LayerReadError::TooManyEntries {
                    limit: self.limits.entries,
                });
            }
            match header.kind {
                b'x' => extensions.pax = self.pax(&header)?,
                b'L' => extensions.long_name = Some(self.long_text(&header)?),
                b'K' => extensions.long_link = Some(self.long_text(&header)?),
                // Global headers are comments of `git archive`; Docker skips them too.
                b'g' => {
                    self.extension(&header)?;
                    continue;
                }
                _ => match self.item(header, std::mem::take(&mut extensions))? {
                    Some(item) => return Ok(Some(item)),
                    None => {
                        extended = false;
                        continue;
                    }
                },
            }
            extended = true;
        }
    }

    /// Reads to the end and says the digest of the uncompressed stream, which must be
    /// `expected` if that is given.
    pub fn finish(mut self, expected: Option<&Digest>) -> Result<Digest, LayerReadError> {
        while self.next_entry()?.is_some() {}
        self.only_zeros_follow()?;
        let found = self.stream.hasher.finish();
        match expected {
            Some(expected) if *expected != found => Err(LayerReadError::WrongDiffId {
                expected: *expected,
                found,
            }),
            _ => Ok(found),
        }
    }

    /// Bytes of the uncompressed stream read so far.
    pub fn offset(&self) -> u64 {
        self.stream.count
    }

    fn item(
        &mut self,
        header: Header,
        extensions: Extensions,
    ) -> Result<Option<LayerItem>, LayerReadError> {
        let raw = raw_entry(header, extensions)?;
        if raw.kind == b'0' {
            self.begin_content(raw.size);
        }
        let refuse = |problem| LayerReadError::Path {
            path: raw.name.clone(),
            problem,
        };
        let path = path::normalise(&raw.name).map_err(refuse)?;
        if self.whiteouts == Whiteouts::Interpret
            && let Some(mark) = whiteout(&path)?
        {
            return Ok(mark);
        }
        path::check_names(&path).map_err(refuse)?;
        entry(path, raw).map(|entry| Some(LayerItem::Entry(entry)))
    }

    /// The next header; `None` at the end of the archive: two zero blocks, one zero
    /// block at the very end, or the very end itself (as Go and GNU tar take it).
    fn header(&mut self) -> Result<Option<Header>, LayerReadError> {
        let Some(block) = self.block()? else {
            return Ok(None);
        };
        if block != [0; BLOCK] {
            return ustar::decode(&block)
                .map(Some)
                .map_err(|problem| self.malformed(problem));
        }
        match self.block()? {
            Some(second) if second != [0; BLOCK] => {
                Err(self.malformed("a header follows a single zero block"))
            }
            _ => Ok(None),
        }
    }

    /// The next 512 bytes; `None` at the very end.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, LayerReadError> {
        let mut block = [0; BLOCK];
        match read_full(&mut self.stream, &mut block).map_err(unwrap_error)? {
            0 => Ok(None),
            BLOCK => Ok(Some(block)),
            _ => Err(self.truncated()),
        }
    }

    fn pax(&mut self, header: &Header) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, LayerReadError> {
        let bytes = self.extension(header)?;
        let records = pax::decode(&bytes).map_err(|problem| self.malformed(problem))?;
        if records.keys().any(|key| key.starts_with(b"GNU.sparse.")) {
            return Err(LayerReadError::Unsupported {
                path: records
                    .get(&b"GNU.sparse.name"[..])
                    .cloned()
                    .unwrap_or_default(),
                what: "a sparse file".into(),
            });
        }
        Ok(records)
    }

    /// A GNU long name, up to its NUL.
    fn long_text(&mut self, header: &Header) -> Result<Vec<u8>, LayerReadError> {
        let mut bytes = self.extension(header)?;
        if let Some(end) = bytes.iter().position(|b| *b == 0) {
            bytes.truncate(end);
        }
        Ok(bytes)
    }

    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, LayerReadError> {
        let size = u64::try_from(header.size)
            .ok()
            .filter(|size| *size <= MAX_EXTENSION_BYTES)
            .ok_or_else(|| self.malformed("an extension header is larger than 1 MiB"))?;
        self.begin_content(size);
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes).map_err(unwrap_error)?;
        Ok(bytes)
    }

    fn begin_content(&mut self, size: u64) {
        self.content = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    fn skip_content(&mut self) -> Result<(), LayerReadError> {
        let left = self.content.saturating_add(self.padding);
        let skipped =
            io::copy(&mut (&mut self.stream).take(left), &mut io::sink()).map_err(unwrap_error)?;
        if skipped < left {
            return Err(self.truncated());
        }
        (self.content, self.padding) = (0, 0);
        Ok(())
    }

    /// Writers pad archives with zeros to a round size. Anything else after the end
    /// is content that some readers see and others don't.
    fn only_zeros_follow(&mut self) -> Result<(), LayerReadError> {
        let mut buffer = [0; 16 << 10];
        loop {
            match read_full(&mut self.stream, &mut buffer).map_err(unwrap_error)? {
                0 => return Ok(()),
                n if buffer[..n].iter().all(|b| *b == 0) => {}
                _ => return Err(self.malformed("there is content after the archive's end")),
            }
        }
    }

    fn malformed(&self, problem: &'static str) -> LayerReadError {
        LayerReadError::Malformed {
            offset: self.stream.count,
            problem,
        }
    }

    fn truncated(&self) -> LayerReadError {
        LayerReadError::Truncated {
            offset: self.stream.count,
        }
    }
}

/// The content of the current file. Errors carry a [`LayerReadError`].
impl Read for LayerReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.content).unwrap_or(usize::MAX);
        let room = room.min(buffer.len());
        if room == 0 {
            return Ok(0);
        }
        let n = self.stream.read(&mut buffer[..room])?;
        if n == 0 {
            return Err(io::Error::other(self.truncated()));
        }
        self.content -= n as u64;
        Ok(n)
    }
}

/// A header with its extensions applied.
struct RawEntry {
    name: Vec<u8>,
    link: Vec<u8>,
    /// `0` for all forms of a file.
    kind: u8,
    /// 0 for everything but files.
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
    major: u32,
    minor: u32,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

fn raw_entry(header: Header, extensions: Extensions) -> Result<RawEntry, LayerReadError> {
    let Extensions {
        mut pax,
        long_name,
        long_link,
    } = extensions;
    // An empty value takes a record back.
    let mut take = |key: &[u8]| pax.remove(key).filter(|value| !value.is_empty());
    let pax_path = take(b"path");
    let pax_link = take(b"linkpath");
    let numbers = [b"size".as_slice(), b"uid", b"gid", b"mtime"].map(&mut take);
    let name = long_name.or(pax_path).unwrap_or(header.name);
    let link = long_link.or(pax_link).unwrap_or(header.link);
    let problem = |problem| LayerReadError::Entry {
        path: name.clone(),
        problem,
    };
    let unsigned = |record: &Option<Vec<u8>>, field: i64| match record {
        Some(text) => pax::decimal(text),
        None => u64::try_from(field).ok(),
    };
    let id = |record, field| unsigned(record, field).and_then(|id| u32::try_from(id).ok());
    let device = |field| u32::try_from(field).map_err(|_| problem("its device number is invalid"));
    let kind = match header.kind {
        // Before 1988 a folder was a file with a slash after its name.
        0 if name.ends_with(b"/") => b'5',
        // Contiguous files are plain files to everyone but their makers.
        0 | b'7' => b'0',
        other => other,
    };
    Ok(RawEntry {
        // Only files have content; other kinds' sizes mean nothing, as in Go's reader.
        size: match kind {
            b'0' => {
                unsigned(&numbers[0], header.size).ok_or_else(|| problem("its size is invalid"))?
            }
            _ => 0,
        },
        uid: id(&numbers[1], header.uid).ok_or_else(|| problem("its owner is no 32-bit number"))?,
        gid: id(&numbers[2], header.gid).ok_or_else(|| problem("its group is no 32-bit number"))?,
        mtime: match &numbers[3] {
            Some(text) => pax::seconds(text).ok_or_else(|| problem("its time is invalid"))?,
            None => header.mtime,
        },
        mode: u32::try_from(header.mode & 0o7777).unwrap_or(0),
        major: device(header.major)?,
        minor: device(header.minor)?,
        xattrs: xattrs(pax).map_err(problem)?,
        kind,
        link,
        name,
    })
}

fn xattrs(pax: BTreeMap<Vec<u8>, Vec<u8>>) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, &'static str> {
    let mut xattrs = BTreeMap::new();
    for (key, value) in pax {
        let Some(name) = key.strip_prefix(pax::XATTR) else {
            continue;
        };
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(&0) {
            return Err("the name of an extended attribute is empty, too long or holds a NUL byte");
        }
        if value.len() > MAX_XATTR_BYTES {
            return Err("an extended attribute is longer than 64 KiB");
        }
        xattrs.insert(name.to_vec(), value);
    }
    Ok(xattrs)
}

/// `None`: an ordinary path. `Some(None)`: a mark of the old AUFS driver, which means
/// nothing outside it and is skipped, as Docker does.
fn whiteout(path: &[u8]) -> Result<Option<Option<LayerItem>>, LayerReadError> {
    let (folder, name) = path::split(path);
    let refuse = |problem| LayerReadError::Entry {
        path: path.into(),
        problem,
    };
    let aufs = |name: &[u8]| name.starts_with(b".wh..wh.");
    let folders = || folder.split(|b| *b == b'/');
    if folders().any(aufs) {
        return Ok(Some(None));
    }
    if folders().any(|name| name.starts_with(b".wh.")) {
        return Err(refuse("it lies inside a deletion mark"));
    }
    let Some(hidden) = name.strip_prefix(b".wh.") else {
        return Ok(None);
    };
    match hidden {
        b".wh..opq" => Ok(Some(Some(LayerItem::OpaqueDir {
            path: folder.into(),
        }))),
        _ if aufs(name) => Ok(Some(None)),
        b"" | b"." | b".." => Err(refuse("it is a deletion mark for no file")),
        _ => Ok(Some(Some(LayerItem::Whiteout {
            path: path::join(folder, hidden),
        }))),
    }
}

fn entry(path: Vec<u8>, raw: RawEntry) -> Result<Entry, LayerReadError> {
    let refuse = |problem| LayerReadError::Entry {
        path: raw.name.clone(),
        problem,
    };
    let kind = match raw.kind {
        b'0' => EntryKind::File { size: raw.size },
        b'1' => EntryKind::Hardlink {
            target: hardlink_target(&raw)?,
        },
        b'2' if raw.link.is_empty() || raw.link.contains(&0) => {
            return Err(refuse("its link target is empty or holds a NUL byte"));
        }
        b'2' if raw.link.len() > MAX_PATH_BYTES => {
            return Err(refuse("its link target is too long"));
        }
        b'2' => EntryKind::Symlink {
            target: raw.link.clone(),
        },
        b'3' => EntryKind::Char {
            major: raw.major,
            minor: raw.minor,
        },
        b'4' => EntryKind::Block {
            major: raw.major,
            minor: raw.minor,
        },
        b'5' => EntryKind::Dir,
        b'6' => EntryKind::Fifo,
        other => {
            return Err(LayerReadError::Unsupported {
                what: unsupported(other),
                path: raw.name,
            });
        }
    };
    if path.is_empty() && kind != EntryKind::Dir {
        return Err(LayerReadError::Path {
            path: raw.name,
            problem: PathProblem::Empty,
        });
    }
    Ok(Entry {
        path,
        kind,
        mode: raw.mode,
        uid: raw.uid,
        gid: raw.gid,
        mtime: raw.mtime,
        xattrs: raw.xattrs,
    })
}

fn hardlink_target(raw: &RawEntry) -> Result<Vec<u8>, LayerReadError> {
    let target = path::normalise(&raw.link);
    match target {
        Ok(target) if !target.is_empty() => Ok(target),
        Ok(_) => Err(LayerReadError::Entry {
            path: raw.name.clone(),
            problem: "it is a hard link to nothing",
        }),
        Err(_) => Err(LayerReadError::Entry {
            path: raw.name.clone(),
            problem: "its hard link target leads out of the image or is no valid path",
        }),
    }
}

fn unsupported(kind: u8) -> String {
    match kind {
        b'S' => "a sparse file (GNU)".into(),
        b'M' => "a part of a multi-volume archive".into(),
        b'V' => "a volume label".into(),
        b'D' => "a GNU incremental dump's folder".into(),
        other => format!("of tar type `{}`", other.escape_ascii()),
    }
}

/// Counts, hashes and bounds the uncompressed stream.
struct Meter<R> {
    inner: R,
    compression: Compression,
    hasher: Hasher,
    count: u64,
    limit: u64,
}

impl<R: Read> Read for Meter<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = match self.inner.read(buffer) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Err(e),
            Err(source) => return Err(io::Error::other(self.explain(source))),
        };
        self.hasher.update(&buffer[..n]);
        self.count += n as u64;
        if self.count > self.limit {
            return Err(io::Error::other(LayerReadError::TooLarge {
                limit: self.limit,
            }));
        }
        Ok(n)
    }
}

impl<R> Meter<R> {
    fn explain(&self, source: io::Error) -> LayerReadError {
        let problem = match source.kind() {
            io::ErrorKind::UnexpectedEof => "it was cut short",
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => "it can't be decompressed",
            // zstd and xz have no kinds of their own; a system error has its number.
            io::ErrorKind::Other if source.raw_os_error().is_none() => "it can't be decompressed",
            _ => return LayerReadError::Io(source),
        };
        match self.compression {
            Compression::None => LayerReadError::Io(source),
            compression => LayerReadError::Compression {
                compression,
                problem,
                offset: self.count,
                source,
            },
        }
    }
}

/// The [`LayerReadError`] that an I/O error from a [`LayerReader`] carries.
fn unwrap_error(error: io::Error) -> LayerReadError {
    match error.downcast::<LayerReadError>() {
        Ok(inner) => inner,
        Err(error) => LayerReadError::Io(error),
    }
}

/// Fills `buffer` as far as there is content.
fn read_full(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

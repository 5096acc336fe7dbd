//! The two traits through which this crate meets whatever keeps blobs.

use std::io::{self, Read};

use kiln_model::{Digest, Hasher};

/// What a blob must turn out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
}

/// Reads blobs by digest.
pub trait BlobRead: Send + Sync {
    /// The blob's content from its first byte; `None`: there is no such blob.
    fn open(&self, digest: &Digest) -> io::Result<Option<Box<dyn Read + Send>>>;

    /// The blob's size in bytes; `None`: there is no such blob.
    fn size(&self, digest: &Digest) -> io::Result<Option<u64>>;
}

/// Takes blobs in.
pub trait BlobWrite: Send + Sync {
    fn contains(&self, digest: &Digest) -> io::Result<bool>;

    /// Streams `content` in and says what was written. With `expected`, nothing is
    /// kept unless digest and size are exactly that, and reading stops at the first
    /// byte too many. On any error nothing is kept.
    fn write(
        &self,
        expected: Option<Expected>,
        content: &mut dyn Read,
    ) -> Result<(Digest, u64), BlobWriteError>;
}

/// Why a blob was not taken in.
#[derive(Debug, thiserror::Error)]
pub enum BlobWriteError {
    /// Reading the source failed, not the store.
    #[error("the content could not be read: {0}")]
    Source(#[source] io::Error),
    #[error("the content is not what was asked for: expected {expected}, got {found}")]
    WrongDigest { expected: Digest, found: Digest },
    #[error("the content of {digest} has the wrong size: expected {expected} bytes, got {found}")]
    WrongSize {
        digest: Digest,
        expected: u64,
        /// At least this many; counting stops at the first byte too many.
        found: u64,
    },
    /// The store failed: full disk, permission.
    #[error("the blob store could not take it: {0}")]
    Store(#[source] io::Error),
}

/// Passes content through while counting and hashing it; for [`BlobWrite::write`].
///
/// Reads at most one byte more than expected, so an endless source ends.
pub struct VerifyingReader<'a> {
    source: &'a mut dyn Read,
    hasher: Hasher,
    count: u64,
    limit: u64,
}

impl<'a> VerifyingReader<'a> {
    pub fn new(expected: Option<Expected>, source: &'a mut dyn Read) -> Self {
        Self {
            source,
            hasher: Hasher::new(),
            count: 0,
            limit: expected.map_or(u64::MAX, |e| e.size.saturating_add(1)),
        }
    }

    /// After the last byte: what was read, if it is what was expected.
    pub fn finish(self, expected: Option<Expected>) -> Result<(Digest, u64), BlobWriteError> {
        let found = self.hasher.finish();
        if let Some(expected) = expected {
            if self.count != expected.size {
                return Err(BlobWriteError::WrongSize {
                    digest: expected.digest,
                    expected: expected.size,
                    found: self.count,
                });
            }
            if found != expected.digest {
                return Err(BlobWriteError::WrongDigest {
                    expected: expected.digest,
                    found,
                });
            }
        }
        Ok((found, self.count))
    }
}

impl Read for VerifyingReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.limit - self.count).unwrap_or(usize::MAX);
        let room = room.min(buffer.len());
        let n = self.source.read(&mut buffer[..room])?;
        self.hasher.update(&buffer[..n]);
        self.count += n as u64;
        Ok(n)
    }
}

/// Reads a whole blob of at most `limit` bytes, verifying its digest.
pub fn read_small(
    blobs: &dyn BlobRead,
    digest: &Digest,
    limit: u64,
) -> Result<Vec<u8>, ReadSmallError> {
    let io = |source| ReadSmallError::Io {
        digest: *digest,
        source,
    };
    let content = blobs
        .open(digest)
        .map_err(io)?
        .ok_or(ReadSmallError::Missing { digest: *digest })?;
    let mut bytes = Vec::new();
    content
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(ReadSmallError::TooLarge {
            digest: *digest,
            limit,
        });
    }
    let found = Digest::of(&bytes);
    if found != *digest {
        return Err(ReadSmallError::Corrupt {
            digest: *digest,
            found,
        });
    }
    Ok(bytes)
}

/// Why a small blob (manifest, configuration) could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadSmallError {
    #[error("blob {digest} is not there")]
    Missing { digest: Digest },
    #[error("blob {digest} could not be read: {source}")]
    Io {
        digest: Digest,
        #[source]
        source: io::Error,
    },
    #[error("blob {digest} is larger than {limit} bytes, which no manifest or configuration is")]
    TooLarge { digest: Digest, limit: u64 },
    #[error("blob {digest} is damaged: its content has digest {found}")]
    Corrupt { digest: Digest, found: Digest },
}

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_model::Digest;

use crate::blob::{BlobRead, BlobWrite, BlobWriteError, Expected, VerifyingReader};

/// Blobs in memory. Clones share their content.
#[derive(Clone, Default)]
pub struct MemoryBlobs(Arc<Mutex<BTreeMap<Digest, Vec<u8>>>>);

impl MemoryBlobs {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a blob as it is.
    pub fn put(&self, bytes: impl Into<Vec<u8>>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.lock().insert(digest, bytes);
        digest
    }

    pub fn get(&self, digest: &Digest) -> Option<Vec<u8>> {
        self.lock().get(digest).cloned()
    }

    pub fn digests(&self) -> Vec<Digest> {
        self.lock().keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Digest, Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlobRead for MemoryBlobs {
    fn open(&self, digest: &Digest) -> io::Result<Option<Box<dyn Read + Send>>> {
        Ok(self
            .get(digest)
            .map(|bytes| Box::new(Cursor::new(bytes)) as Box<dyn Read + Send>))
    }

    fn size(&self, digest: &Digest) -> io::Result<Option<u64>> {
        Ok(self.lock().get(digest).map(|bytes| bytes.len() as u64))
    }
}

impl BlobWrite for MemoryBlobs {
    fn contains(&self, digest: &Digest) -> io::Result<bool> {
        Ok(self.lock().contains_key(digest))
    }

    fn write(
        &self,
        expected: Option<Expected>,
        content: &mut dyn Read,
    ) -> Result<(Digest, u64), BlobWriteError> {
        let mut bytes = Vec::new();
        let mut reader = VerifyingReader::new(expected, content);
        reader
            .read_to_end(&mut bytes)
            .map_err(BlobWriteError::Source)?;
        let written = reader.finish(expected)?;
        self.lock().insert(written.0, bytes);
        Ok(written)
    }
}

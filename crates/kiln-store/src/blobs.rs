//! Blobs: manifests, configurations and layers as they came, by their digest. Served to
//! and filled by kiln-oci through its traits.

use std::io::{self, Read, Write};

use kiln_model::Digest;
use kiln_oci::blob::VerifyingReader;
use kiln_oci::{BlobRead, BlobWrite, BlobWriteError, Expected};

use crate::layout::{PathError, Shelf};
use crate::store::{PutError, Store, copy, file_size, open};
use crate::unfinished::Unfinished;

/// A blob that is written by whoever hashes it; gone if it is dropped.
pub struct NewBlob<'s> {
    store: &'s Store,
    unfinished: Unfinished,
}

impl Store {
    pub fn new_blob(&self) -> Result<NewBlob<'_>, PathError> {
        let unfinished = self.unfinished()?;
        Ok(NewBlob {
            store: self,
            unfinished,
        })
    }
}

impl NewBlob<'_> {
    /// Keeps it under the digest and size (bytes) of all that was written, for which the
    /// caller vouches.
    pub fn keep(self, digest: &Digest, size: u64) -> Result<(), PathError> {
        let store = self.store;
        if store.reuse(Shelf::Blobs, digest, Some(size))?.is_some() {
            return Ok(());
        }
        store.publish(Shelf::Blobs, digest, size, self.unfinished)
    }
}

impl Write for NewBlob<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.unfinished.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl BlobRead for Store {
    fn open(&self, digest: &Digest) -> io::Result<Option<Box<dyn Read + Send>>> {
        let file = open(&self.layout.path(Shelf::Blobs, digest)).map_err(io_error)?;
        Ok(file.map(|file| Box::new(file) as Box<dyn Read + Send>))
    }

    fn size(&self, digest: &Digest) -> io::Result<Option<u64>> {
        file_size(&self.layout.path(Shelf::Blobs, digest)).map_err(io_error)
    }
}

impl BlobWrite for Store {
    /// What is there is also kept under the leases of now: the caller means to use it.
    fn contains(&self, digest: &Digest) -> io::Result<bool> {
        let found = self.reuse(Shelf::Blobs, digest, None).map_err(io_error)?;
        Ok(found.is_some())
    }

    fn write(
        &self,
        expected: Option<Expected>,
        content: &mut dyn Read,
    ) -> Result<(Digest, u64), BlobWriteError> {
        let store = |error: PathError| BlobWriteError::Store(io_error(error));
        let mut unfinished = self.unfinished().map_err(store)?;
        let mut reader = VerifyingReader::new(expected, content);
        match copy(&mut reader, &mut unfinished) {
            Ok(_) => {}
            Err(PutError::Source(error)) => return Err(BlobWriteError::Source(error)),
            Err(PutError::Store(error)) => return Err(store(error)),
        }
        let (digest, size) = reader.finish(expected)?;
        self.publish(Shelf::Blobs, &digest, size, unfinished)
            .map_err(store)?;
        Ok((digest, size))
    }
}

/// Keeps the kind (not found, no space) and tells the path.
fn io_error(error: PathError) -> io::Error {
    io::Error::new(error.source.kind(), error)
}

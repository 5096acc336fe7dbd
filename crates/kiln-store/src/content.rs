//! Blobs and objects: files named by what they hold.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kiln_model::{Digest, Hasher};
use kiln_oci::blob::VerifyingReader;
use kiln_oci::{BlobRead, BlobWrite, BlobWriteError, Expected};
use tempfile::NamedTempFile;

use crate::{Store, StoreError};

/// Contents up to this size are hashed in memory first: most are there already.
const IN_MEMORY: u64 = 1 << 20;
const PIECE: usize = 128 << 10;

impl Store {
    /// Takes a file's content in and says what it is. Every object has mode 0644 and
    /// root's ownership: what an image says of it is in the tree.
    pub fn put_object(&self, content: &mut dyn Read) -> Result<(Digest, u64), StoreError> {
        let objects = self.folder.join("objects");
        let io = StoreError::io(&objects);
        let mut first = Vec::new();
        if let Err(error) = content.take(IN_MEMORY + 1).read_to_end(&mut first) {
            return Err(io(error));
        }
        if first.len() as u64 <= IN_MEMORY {
            let digest = Digest::of(&first);
            let path = self.object_path(&digest);
            if !path.exists() {
                place(&self.folder, &path, &first).map_err(io)?;
            }
            return Ok((digest, first.len() as u64));
        }
        self.put_large(first, content).map_err(io)
    }

    fn put_large(&self, first: Vec<u8>, rest: &mut dyn Read) -> io::Result<(Digest, u64)> {
        let mut temporary = self.temporary()?;
        let mut hasher = Hasher::new();
        let mut size = 0;
        let mut source = first.as_slice().chain(rest);
        let mut piece = vec![0; PIECE];
        loop {
            let n = source.read(&mut piece)?;
            let Some(part) = piece.get(..n).filter(|p| !p.is_empty()) else {
                break;
            };
            hasher.update(part);
            temporary.write_all(part)?;
            size += n as u64;
        }
        let digest = hasher.finish();
        keep(temporary, &self.object_path(&digest))?;
        Ok((digest, size))
    }

    pub fn has_object(&self, digest: &Digest) -> bool {
        self.object_path(digest).exists()
    }

    pub fn open_object(&self, digest: &Digest) -> Result<File, StoreError> {
        let path = self.object_path(digest);
        File::open(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => StoreError::Missing {
                what: "the file content",
                digest: *digest,
            },
            _ => StoreError::io(&path)(e),
        })
    }

    /// A small blob, whole. `None`: it is not there.
    pub fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.blob_path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(StoreError::io(&path)(e)),
        };
        let mut bytes = Vec::new();
        file.take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(StoreError::io(&path))?;
        if bytes.len() as u64 > limit {
            let cause = format!("it is larger than {limit} bytes");
            return Err(StoreError::Damaged {
                what: "the blob",
                digest: *digest,
                cause,
            });
        }
        Ok(Some(bytes))
    }

    /// Takes a small blob in.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        let path = self.blob_path(&digest);
        if !path.exists() {
            place(&self.folder, &path, bytes).map_err(StoreError::io(&path))?;
        }
        Ok(digest)
    }

    fn temporary(&self) -> io::Result<NamedTempFile> {
        NamedTempFile::new_in(self.folder.join("tmp"))
    }
}

impl BlobRead for Store {
    fn open(&self, digest: &Digest) -> io::Result<Option<Box<dyn Read + Send>>> {
        match File::open(self.blob_path(digest)) {
            Ok(file) => Ok(Some(Box::new(file))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn size(&self, digest: &Digest) -> io::Result<Option<u64>> {
        match fs::metadata(self.blob_path(digest)) {
            Ok(meta) => Ok(Some(meta.len())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl BlobWrite for Store {
    fn contains(&self, digest: &Digest) -> io::Result<bool> {
        Ok(self.size(digest)?.is_some())
    }

    fn write(
        &self,
        expected: Option<Expected>,
        content: &mut dyn Read,
    ) -> Result<(Digest, u64), BlobWriteError> {
        let mut temporary = self.temporary().map_err(BlobWriteError::Store)?;
        let mut reader = VerifyingReader::new(expected, content);
        let mut piece = vec![0; PIECE];
        loop {
            let n = reader.read(&mut piece).map_err(BlobWriteError::Source)?;
            let Some(part) = piece.get(..n).filter(|p| !p.is_empty()) else {
                break;
            };
            temporary.write_all(part).map_err(BlobWriteError::Store)?;
        }
        let (digest, size) = reader.finish(expected)?;
        keep(temporary, &self.blob_path(&digest)).map_err(BlobWriteError::Store)?;
        Ok((digest, size))
    }
}

/// Writes a file whole or not at all. Someone else's equal file is as good.
pub(crate) fn place(folder: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = NamedTempFile::new_in(folder.join("tmp"))?;
    temporary.write_all(bytes)?;
    keep(temporary, path)
}

fn keep(temporary: NamedTempFile, path: &Path) -> io::Result<()> {
    temporary
        .as_file()
        .set_permissions(Permissions::from_mode(0o644))?;
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    temporary.persist(path).map(drop).map_err(|e| e.error)
}

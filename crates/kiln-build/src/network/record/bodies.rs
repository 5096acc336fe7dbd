//! Where the bodies of recorded responses are: `KILN_ROOT/cache/network/<sha256>`, part of
//! the bounded cache. A folder that was copied from another machine serves as well: nothing
//! is believed but what has its name's digest.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use kiln_model::{Digest, Hasher};
use tempfile::NamedTempFile;

use crate::cache;

/// Below the builder's cache folder.
pub(crate) const FOLDER: &str = "network";
const CHUNK: usize = 64 << 10;

#[derive(Clone, Debug)]
pub(in crate::network) struct Bodies {
    folder: PathBuf,
}

impl Bodies {
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.folder.join(digest.hex())
    }

    /// The body, read once to see that it is what its name says; `None`: it is not here. One
    /// that is damaged goes.
    pub fn open(&self, digest: &Digest) -> io::Result<Option<File>> {
        let path = self.path(digest);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; CHUNK];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => hasher.update(&buffer[..length]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if hasher.finish() != *digest {
            let shown = path.display();
            tracing::warn!(path = %shown, "a recorded file is damaged, and taken for missing");
            fs::remove_file(&path)?;
            return Ok(None);
        }
        file.rewind()?;
        cache::used(&path);
        Ok(Some(file))
    }

    /// A body that is not complete yet.
    pub fn begin(&self) -> io::Result<NamedTempFile> {
        fs::create_dir_all(&self.folder)?;
        tempfile::Builder::new()
            .prefix(".new-")
            .tempfile_in(&self.folder)
    }

    /// Gives a complete body its name.
    pub fn keep(&self, file: NamedTempFile, digest: &Digest) -> io::Result<File> {
        file.persist(self.path(digest)).map_err(|e| e.error)
    }
}

//! References: names that keep a manifest, a tree or a blob from being collected.

use std::io;
use std::path::{Path, PathBuf};

use kiln_model::Digest;

use crate::{Store, StoreError, content};

impl Store {
    /// Points `name` (like `release/shop/3/web/image`) at a digest, replacing what it
    /// pointed at.
    pub fn set_ref(&self, name: &str, digest: &Digest) -> Result<(), StoreError> {
        let path = self.ref_path(name)?;
        content::place(&self.folder, &path, digest.to_string().as_bytes())
            .map_err(StoreError::io(&path))
    }

    /// True if it was there.
    pub fn remove_ref(&self, name: &str) -> Result<bool, StoreError> {
        let path = self.ref_path(name)?;
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(StoreError::io(&path)(e)),
        }
    }

    pub fn get_ref(&self, name: &str) -> Result<Option<Digest>, StoreError> {
        let path = self.ref_path(name)?;
        match std::fs::read_to_string(&path) {
            Ok(text) => parse(&path, &text).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(StoreError::io(&path)(e)),
        }
    }

    /// Every reference whose name begins with `prefix`, by name. One that can't be read
    /// is an error: collecting without it would lose what it keeps.
    pub fn refs(&self, prefix: &str) -> Result<Vec<(String, Digest)>, StoreError> {
        let top = self.folder.join("refs");
        let mut found = Vec::new();
        let mut folders = vec![top.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).map_err(StoreError::io(&folder))? {
                let path = entry.map_err(StoreError::io(&folder))?.path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let Ok(name) = path.strip_prefix(&top) else {
                    continue;
                };
                let name = name.to_string_lossy().into_owned();
                if name.starts_with(prefix) {
                    let text = std::fs::read_to_string(&path).map_err(StoreError::io(&path))?;
                    found.push((name, parse(&path, &text)?));
                }
            }
        }
        found.sort();
        Ok(found)
    }

    fn ref_path(&self, name: &str) -> Result<PathBuf, StoreError> {
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.len() <= 200
                && part.bytes().all(|b| b.is_ascii_graphic())
        };
        if !name.split('/').all(plain) {
            return Err(StoreError::BadRef(name.into()));
        }
        Ok(self.folder.join("refs").join(name))
    }
}

fn parse(path: &Path, text: &str) -> Result<Digest, StoreError> {
    text.trim()
        .parse()
        .map_err(|e| StoreError::io(path)(io::Error::other(e)))
}

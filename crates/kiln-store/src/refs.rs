//! Refs: names that keep what they point at, and all it needs, from being collected.
//!
//! # Format
//! `refs/<sha256 of the name, hex>`: three lines, `kiln-ref 1`, the digest, the name.
//! Written atomically and durably. (Names hold slashes and may be longer than a file's.)

use kiln_model::Digest;

use crate::layout::{PathError, Shelf, entries, read_file, remove_file};
use crate::store::{Store, file_size};

/// Longest name of a ref, in bytes: an image reference with a prefix fits.
pub const MAX_REF_BYTES: usize = 1024;

const HEADER: &str = "kiln-ref 1";

/// Why a ref could not be set, removed or read.
#[derive(Debug, thiserror::Error)]
pub enum RefError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("`{}` is no name for a ref (1 to {MAX_REF_BYTES} bytes, no control characters)", name.escape_debug())]
    Name { name: String },
    #[error("ref `{name}` can't point at {digest}: it is not in the store")]
    NoTarget { name: String, digest: Digest },
    #[error("{} is no ref that this kiln can read", path.display())]
    Damaged { path: std::path::PathBuf },
}

impl Store {
    /// Points `name` at a manifest, index, tree or other blob that is in the store.
    /// Durable when it returns, with all that was written before it.
    pub fn set_ref(&self, name: &str, digest: &Digest) -> Result<(), RefError> {
        check_name(name)?;
        self.sync()?;
        // Nothing is collected between the check and the ref.
        let _lock = self.layout.publishing()?;
        if !self.has(digest)? {
            return Err(RefError::NoTarget {
                name: name.into(),
                digest: *digest,
            });
        }
        let text = format!("{HEADER}\n{digest}\n{name}\n");
        Ok(self.replace(&self.layout.reference(name), text.as_bytes())?)
    }

    /// Takes a ref away; `false`: there was none.
    pub fn remove_ref(&self, name: &str) -> Result<bool, RefError> {
        check_name(name)?;
        Ok(remove_file(&self.layout.reference(name))?)
    }

    /// Where `name` points; `None`: there is no such ref.
    pub fn get_ref(&self, name: &str) -> Result<Option<Digest>, RefError> {
        check_name(name)?;
        let path = self.layout.reference(name);
        match read_file(&path)? {
            None => Ok(None),
            Some(bytes) => match parse(&bytes) {
                Some((_, digest)) => Ok(Some(digest)),
                None => Err(RefError::Damaged { path }),
            },
        }
    }

    /// Every ref whose name begins with `prefix`, sorted by name.
    pub fn refs(&self, prefix: &str) -> Result<Vec<(String, Digest)>, RefError> {
        let mut refs = Vec::new();
        for (_, path) in entries(&self.layout.sub("refs"))? {
            let Some(bytes) = read_file(&path)? else {
                continue;
            };
            let (name, digest) = parse(&bytes).ok_or(RefError::Damaged { path })?;
            if name.starts_with(prefix) {
                refs.push((name, digest));
            }
        }
        refs.sort_unstable();
        Ok(refs)
    }

    fn has(&self, digest: &Digest) -> Result<bool, PathError> {
        for shelf in [Shelf::Blobs, Shelf::Trees, Shelf::Images] {
            if file_size(&self.layout.path(shelf, digest))?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn check_name(name: &str) -> Result<(), RefError> {
    if name.is_empty() || name.len() > MAX_REF_BYTES || name.chars().any(char::is_control) {
        return Err(RefError::Name { name: name.into() });
    }
    Ok(())
}

fn parse(bytes: &[u8]) -> Option<(String, Digest)> {
    let mut lines = std::str::from_utf8(bytes).ok()?.lines();
    (lines.next()? == HEADER).then_some(())?;
    let digest = lines.next()?.parse().ok()?;
    Some((lines.next()?.into(), digest))
}

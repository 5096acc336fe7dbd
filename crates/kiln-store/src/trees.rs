//! Trees on disk: `trees/<sha256 of the file>.erofs`, in the format of [`crate::erofs`].

use std::collections::HashSet;

use kiln_model::Digest;
use kiln_model::instance::TreePaths;

use crate::erofs::{self, ErofsReadError, ErofsWriteError};
use crate::layout::{PathError, Shelf, read_file};
use crate::store::Store;
use crate::tree::{Change, Kind, Tree, diff};

/// Why a tree could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteTreeError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(transparent)]
    Erofs(#[from] ErofsWriteError),
    #[error(
        "`{}` has the content {digest} ({size} bytes), which is not in the store",
        path.escape_ascii()
    )]
    MissingObject {
        path: Vec<u8>,
        digest: Digest,
        size: u64,
    },
}

/// Why a tree could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadTreeError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("tree {digest} is not in the store")]
    NotFound { digest: Digest },
    #[error("tree {digest} is damaged, its content has digest {found}: run `kiln fsck --repair`")]
    Corrupt { digest: Digest, found: Digest },
    #[error("tree {digest} can't be read: {source}")]
    Format {
        digest: Digest,
        #[source]
        source: ErofsReadError,
    },
}

impl Store {
    /// Writes a tree's metadata image and gives its digest. Every object that it names
    /// must be in the store.
    pub fn write_tree(&self, tree: &Tree) -> Result<Digest, WriteTreeError> {
        let image = erofs::write(tree)?;
        let digest = Digest::of(&image);
        // From the check to the end nothing may be collected.
        let _lock = self.layout.publishing()?;
        self.check_objects(tree)?;
        self.put_bytes(Shelf::Trees, &digest, &image)?;
        Ok(digest)
    }

    /// Reads a tree back, verifying its digest.
    pub fn load_tree(&self, digest: &Digest) -> Result<Tree, LoadTreeError> {
        let image = read_file(&self.layout.path(Shelf::Trees, digest))?
            .ok_or(LoadTreeError::NotFound { digest: *digest })?;
        let found = Digest::of(&image);
        if found != *digest {
            return Err(LoadTreeError::Corrupt {
                digest: *digest,
                found,
            });
        }
        erofs::read(&image).map_err(|source| LoadTreeError::Format {
            digest: *digest,
            source,
        })
    }

    /// What mounting the tree needs, whether it is there or not.
    pub fn tree_paths(&self, digest: &Digest) -> TreePaths {
        TreePaths {
            metadata: self.layout.path(Shelf::Trees, digest),
            objects: self.layout.folder(Shelf::Objects),
        }
    }

    /// What leads from tree `a` to tree `b`: [`diff`].
    pub fn diff(a: &Tree, b: &Tree) -> Vec<Change> {
        diff(a, b)
    }

    /// Every object that `tree` names is there with its size.
    pub(crate) fn check_objects(&self, tree: &Tree) -> Result<(), WriteTreeError> {
        let mut seen = HashSet::new();
        for item in tree.walk() {
            if let Kind::File { digest, size } = item.node.kind
                && size > 0
                && seen.insert(digest)
                && self.layout.object_size(&digest)? != Some(size)
            {
                return Err(WriteTreeError::MissingObject {
                    path: item.path,
                    digest,
                    size,
                });
            }
        }
        Ok(())
    }
}

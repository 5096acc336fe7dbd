//! Trees on disk: `trees/<sha256 of the file>.erofs`, in the format of [`crate::erofs`].

use std::panic::resume_unwind;
use std::thread::available_parallelism;

use kiln_model::Digest;
use kiln_model::instance::TreePaths;

use crate::erofs::{self, ErofsReadError, ErofsWriteError};
use crate::layout::{PathError, Shelf, read_file};
use crate::store::Store;
use crate::tree::{Change, Kind, Tree, diff};

/// Objects looked for at the same time.
const MAX_THREADS: usize = 4;
/// Objects that are not worth a thread of their own.
const FEW: usize = 1_000;

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
        // From the check to the end nothing may be collected.
        let _lock = self.layout.publishing()?;
        let (image, digest) = std::thread::scope(|scope| {
            let checked = scope.spawn(|| self.check_objects(tree));
            let image = erofs::write(tree)?;
            let digest = Digest::of(&image);
            checked
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))?;
            Ok::<_, WriteTreeError>((image, digest))
        })?;
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
    pub fn diff<'t>(a: &'t Tree, b: &'t Tree) -> Vec<Change<'t>> {
        diff(a, b)
    }

    /// Every object that `tree` names is there with its size.
    pub(crate) fn check_objects(&self, tree: &Tree) -> Result<(), WriteTreeError> {
        let files = tree.nodes().filter_map(|node| match node.kind {
            Kind::File { digest, size } => Some((digest, size)),
            _ => None,
        });
        let Some((digest, size)) = self.missing_object(files)? else {
            return Ok(());
        };
        let holds = Kind::File { digest, size };
        let place = tree.walk().find(|item| item.node.kind == holds);
        Err(WriteTreeError::MissingObject {
            path: place.map(|item| item.path).unwrap_or_default(),
            digest,
            size,
        })
    }

    /// One of these contents (digest, bytes) that is not there with its size. What is empty
    /// is never missing.
    pub fn missing_object(
        &self,
        wanted: impl Iterator<Item = (Digest, u64)>,
    ) -> Result<Option<(Digest, u64)>, PathError> {
        // In the folders' order, and each once.
        let mut wanted: Vec<_> = wanted.filter(|(_, size)| *size > 0).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let look = |part: &[(Digest, u64)]| {
            for (digest, size) in part {
                if self.layout.object_size(digest)? != Some(*size) {
                    return Ok(Some((*digest, *size)));
                }
            }
            Ok(None)
        };
        let threads = available_parallelism()
            .map_or(1, usize::from)
            .min(MAX_THREADS);
        let part = wanted.len().div_ceil(threads).max(FEW);
        let (first, others) = wanted.split_at(part.min(wanted.len()));
        let found = std::thread::scope(|scope| {
            let others = others.chunks(part);
            let others: Vec<_> = others.map(|part| scope.spawn(move || look(part))).collect();
            let mut found = vec![look(first)];
            let joined = others.into_iter().map(|other| other.join());
            found.extend(joined.map(|found| found.unwrap_or_else(|e| resume_unwind(e))));
            found
        });
        let found: Result<Vec<_>, PathError> = found.into_iter().collect();
        Ok(found?.into_iter().flatten().next())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_of_thousands_that_is_missing_is_found_wherever_it_is() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let mut batch = store.batch();
        let texts = (0..3 * FEW).map(|n| n.to_string());
        let put = texts.map(|text| batch.put(&mut text.as_bytes(), 4).unwrap());
        let mut all: Vec<(Digest, u64)> = put.collect();
        batch.finish().unwrap();
        let missing = |all: &[(Digest, u64)]| store.missing_object(all.iter().copied()).unwrap();
        assert_eq!(missing(&all), None);
        all.sort_unstable();
        for at in [0, FEW, 2 * FEW, all.len() - 1] {
            let (digest, size) = all[at];
            let path = store.object_path(&digest);
            std::fs::rename(&path, root.path().join("away")).unwrap();
            assert_eq!(missing(&all), Some((digest, size)), "{at}");
            std::fs::rename(root.path().join("away"), &path).unwrap();
            all[at].1 += 1;
            assert_eq!(missing(&all), Some(all[at]), "of another size");
            all[at].1 = 0;
            assert_eq!(missing(&all), None, "what is empty is never missing");
            all[at].1 = size;
        }
    }
}

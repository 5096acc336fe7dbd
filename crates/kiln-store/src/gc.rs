//! Removing what nothing needs, and finding what is damaged.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use kiln_model::{Digest, Hasher};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

use crate::tree::Kind;
use crate::{Store, StoreError};

/// As long as it lives, nothing is collected. Whoever writes holds one until what it
/// wrote is referenced. It ends with its process, however that ends.
pub struct Lease {
    _lock: File,
}

/// What [`Store::gc`] removed (or would have).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    pub images: usize,
    pub trees: usize,
    pub blobs: usize,
    pub objects: usize,
    pub bytes: u64,
}

/// What [`Store::fsck`] found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FsckReport {
    /// Files whose content was read and hashed.
    pub checked: usize,
    pub bad: Vec<Damage>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Damage {
    pub path: PathBuf,
    /// What it should be, and what it is.
    pub cause: String,
    /// It was moved to `quarantine/`.
    pub moved: bool,
}

/// Bytes on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub blobs: u64,
    pub objects: u64,
    pub trees: u64,
}

/// What is needed.
#[derive(Default)]
struct Marked {
    images: BTreeSet<Digest>,
    trees: BTreeSet<Digest>,
    blobs: BTreeSet<Digest>,
    objects: BTreeSet<Digest>,
}

impl Store {
    /// See [`Lease`]. Waits while a collection runs.
    pub fn lease(&self) -> Result<Lease, StoreError> {
        let lock = self.use_lock()?;
        flock(&lock, FlockOperation::LockShared)
            .map_err(|e| StoreError::io(&self.folder)(e.into()))?;
        Ok(Lease { _lock: lock })
    }

    fn use_lock(&self) -> Result<File, StoreError> {
        let path = self.folder.join("use.lock");
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(StoreError::io(&path))
    }

    /// Removes whatever neither a reference nor one of `roots` needs.
    ///
    /// # Errors
    /// [`StoreError::InUse`] while a lease lives; any reference or needed record that
    /// can't be read stops it before anything is removed.
    pub fn gc(&self, roots: &[Digest], dry_run: bool) -> Result<GcReport, StoreError> {
        let lock = self.use_lock()?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(StoreError::InUse);
        }
        let mut marked = Marked::default();
        for (_, digest) in self.refs("")? {
            self.mark(&mut marked, &digest)?;
        }
        for digest in roots {
            self.mark(&mut marked, digest)?;
        }
        let mut report = GcReport::default();
        let mut sweep = |folder: &str, needed: &BTreeSet<Digest>| -> Result<usize, StoreError> {
            let mut count = 0;
            for (path, digest) in self.files(folder)? {
                if digest.is_none_or(|d| needed.contains(&d)) {
                    continue;
                }
                let size = fs::metadata(&path).map_err(StoreError::io(&path))?.len();
                if !dry_run {
                    fs::remove_file(&path).map_err(StoreError::io(&path))?;
                }
                report.bytes += size;
                count += 1;
            }
            Ok(count)
        };
        let images = sweep("images", &marked.images)?;
        let trees = sweep("trees", &marked.trees)?;
        let blobs = sweep("blobs", &marked.blobs)?;
        let objects = sweep("objects", &marked.objects)?;
        if !dry_run {
            self.forget_chains()?;
            self.clear_temporaries()?;
        }
        Ok(GcReport {
            images,
            trees,
            blobs,
            objects,
            ..report
        })
    }

    /// A reference may mean a manifest, a tree or a blob.
    fn mark(&self, marked: &mut Marked, digest: &Digest) -> Result<(), StoreError> {
        marked.blobs.insert(*digest);
        if let Some(image) = self.image(digest)? {
            if !marked.images.insert(*digest) {
                return Ok(());
            }
            marked.blobs.insert(image.config_digest);
            marked.blobs.extend(image.layers.iter().map(|l| l.digest));
            self.mark_tree(marked, &image.tree)?;
        }
        if self.tree_path(digest).exists() {
            self.mark_tree(marked, digest)?;
        }
        Ok(())
    }

    fn mark_tree(&self, marked: &mut Marked, tree: &Digest) -> Result<(), StoreError> {
        if !marked.trees.insert(*tree) {
            return Ok(());
        }
        for step in self.load_tree(tree)?.walk() {
            if let Kind::File { digest, .. } = &step.node.kind {
                marked.objects.insert(*digest);
            }
        }
        Ok(())
    }

    /// Lines that lead to trees which are gone.
    fn forget_chains(&self) -> Result<(), StoreError> {
        let folder = self.folder.join("layers");
        for entry in fs::read_dir(&folder).map_err(StoreError::io(&folder))? {
            let path = entry.map_err(StoreError::io(&folder))?.path();
            let text = fs::read_to_string(&path).map_err(StoreError::io(&path))?;
            let alive = text
                .trim()
                .parse()
                .is_ok_and(|d: Digest| self.tree_path(&d).exists());
            if !alive {
                fs::remove_file(&path).map_err(StoreError::io(&path))?;
            }
        }
        Ok(())
    }

    /// Nobody holds a lease, so nobody is writing these any more.
    fn clear_temporaries(&self) -> Result<(), StoreError> {
        let folder = self.folder.join("tmp");
        for entry in fs::read_dir(&folder).map_err(StoreError::io(&folder))? {
            let path = entry.map_err(StoreError::io(&folder))?.path();
            if path.is_file() {
                fs::remove_file(&path).map_err(StoreError::io(&path))?;
            }
        }
        Ok(())
    }

    /// Files of one kind with the digest their name says; `None`: no such name.
    fn files(&self, kind: &str) -> Result<Vec<(PathBuf, Option<Digest>)>, StoreError> {
        let top = self.folder.join(kind);
        let mut files = Vec::new();
        for entry in fs::read_dir(&top).map_err(StoreError::io(&top))? {
            let path = entry.map_err(StoreError::io(&top))?.path();
            if !path.is_dir() {
                let digest = path
                    .file_stem()
                    .and_then(|s| Digest::from_hex(&s.to_string_lossy()).ok());
                files.push((path, digest));
                continue;
            }
            for inner in fs::read_dir(&path).map_err(StoreError::io(&path))? {
                let inner = inner.map_err(StoreError::io(&path))?.path();
                files.push((inner.clone(), digest_of_path(&inner)));
            }
        }
        files.sort();
        Ok(files)
    }

    /// Reads and hashes everything. With `repair` what is damaged is moved aside, so
    /// that it is fetched or built anew.
    pub fn fsck(&self, repair: bool) -> Result<FsckReport, StoreError> {
        let mut report = FsckReport::default();
        for kind in ["blobs", "objects", "trees"] {
            for (path, expected) in self.files(kind)? {
                report.checked += 1;
                let found = hash_file(&path).map_err(StoreError::io(&path))?;
                let cause = match expected {
                    Some(expected) if expected == found => continue,
                    Some(expected) => format!("its content should be {expected}, is {found}"),
                    None => "its name is no digest".to_owned(),
                };
                self.damaged(&mut report, path, cause, repair)?;
            }
        }
        for image in self.images()? {
            self.fsck_image(&mut report, &image, repair)?;
        }
        Ok(report)
    }

    /// Everything the image is made of must be there.
    fn fsck_image(
        &self,
        report: &mut FsckReport,
        image: &crate::Image,
        repair: bool,
    ) -> Result<(), StoreError> {
        let cause = match self.load_tree(&image.tree) {
            Err(error) => Some(error.to_string()),
            Ok(tree) => tree.walk().find_map(|step| match &step.node.kind {
                Kind::File { digest, size } if *size > 0 && !self.has_object(digest) => Some(
                    format!("the content of {} is missing", step.path.escape_ascii()),
                ),
                _ => None,
            }),
        };
        let Some(cause) = cause else { return Ok(()) };
        let path = self
            .folder
            .join("images")
            .join(format!("{}.json", image.manifest.hex()));
        self.damaged(report, path, cause, repair)
    }

    fn damaged(
        &self,
        report: &mut FsckReport,
        path: PathBuf,
        cause: String,
        repair: bool,
    ) -> Result<(), StoreError> {
        if repair {
            let name = path.strip_prefix(&self.folder).unwrap_or(&path);
            let name = name.to_string_lossy().replace('/', "-");
            let aside = self.folder.join("quarantine").join(name);
            fs::rename(&path, &aside).map_err(StoreError::io(&path))?;
        }
        report.bad.push(Damage {
            path,
            cause,
            moved: repair,
        });
        Ok(())
    }

    pub fn usage(&self) -> Result<Usage, StoreError> {
        let sum = |kind: &str| -> Result<u64, StoreError> {
            let mut bytes = 0;
            for (path, _) in self.files(kind)? {
                bytes += fs::metadata(&path).map_err(StoreError::io(&path))?.len();
            }
            Ok(bytes)
        };
        Ok(Usage {
            blobs: sum("blobs")?,
            objects: sum("objects")?,
            trees: sum("trees")?,
        })
    }
}

/// `…/ab/cdef…` → the digest `abcdef…`.
fn digest_of_path(path: &Path) -> Option<Digest> {
    let folder = path.parent()?.file_name()?.to_string_lossy().into_owned();
    Digest::from_hex(&format!("{folder}{}", path.file_name()?.to_string_lossy())).ok()
}

fn hash_file(path: &Path) -> io::Result<Digest> {
    struct Sink(Hasher);
    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut sink = Sink(Hasher::new());
    io::copy(&mut File::open(path)?, &mut sink)?;
    Ok(sink.0.finish())
}

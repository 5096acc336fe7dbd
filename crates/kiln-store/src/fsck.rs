//! Checks that everything in the store is what its name says, and that everything named
//! is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use kiln_model::{Digest, Hasher};
use serde::Serialize;

use crate::layout::{PathError, Shelf, at, remove_file};
use crate::refs::RefError;
use crate::store::{Store, file_size, open};
use crate::tree::Kind;

/// What `fsck` saw and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FsckReport {
    /// Files whose content was read.
    pub checked: u64,
    /// Bytes of them.
    pub bytes: u64,
    pub bad: Vec<Bad>,
    /// Images that were damaged and could be made again from their blobs.
    pub healed: Vec<Digest>,
    /// Images that stay damaged; they must be pulled or built again.
    pub lost: Vec<Lost>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bad {
    pub path: PathBuf,
    pub expected: Digest,
    pub found: Found,
    /// Where it was moved to by a repair.
    pub quarantine: Option<PathBuf>,
}

/// What is there instead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// Content with this digest.
    Digest(Digest),
    /// Nothing, though something in the store needs it.
    Missing,
    /// It could not be read; the reason in words.
    Unreadable(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lost {
    pub manifest: Digest,
    pub reason: String,
}

/// Why `fsck` stopped. What is wrong with the store's content never stops it.
#[derive(Debug, thiserror::Error)]
pub enum FsckError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(transparent)]
    Ref(#[from] RefError),
    #[error("a garbage collection, or another check, is running; try again when it has ended")]
    Busy,
}

impl Store {
    /// Reads and hashes everything. With `repair`, what is bad is moved aside into
    /// `quarantine/`, and images that need it are made again from their layers.
    pub fn fsck(&self, repair: bool) -> Result<FsckReport, FsckError> {
        // What is collected meanwhile would look missing; and while a damaged image has no
        // record, nothing protects what is left of it.
        let _only = self.collecting()?.ok_or(FsckError::Busy)?;
        let mut report = FsckReport::default();
        for shelf in [Shelf::Blobs, Shelf::Objects, Shelf::Trees] {
            for (digest, path) in self.layout.list(shelf)? {
                self.check_file(digest, &path, &mut report)?;
            }
        }
        let damaged = self.check_needs(&mut report)?;
        if repair {
            for bad in &mut report.bad {
                bad.quarantine = self.quarantine(bad)?;
            }
            self.heal(damaged, &mut report)?;
        }
        Ok(report)
    }

    fn check_file(
        &self,
        digest: Digest,
        path: &Path,
        report: &mut FsckReport,
    ) -> Result<(), PathError> {
        let found = match hash(path) {
            Ok(None) => return Ok(()), // Collected meanwhile.
            Ok(Some((found, size))) => {
                report.bytes += size;
                report.checked += 1;
                if found == digest {
                    return Ok(());
                }
                Found::Digest(found)
            }
            Err(error) => Found::Unreadable(error.source.to_string()),
        };
        report.bad.push(Bad {
            path: path.into(),
            expected: digest,
            found,
            quarantine: None,
        });
        Ok(())
    }

    /// Looks that trees have their objects and images their parts; gives the images that
    /// miss any.
    fn check_needs(&self, report: &mut FsckReport) -> Result<BTreeSet<Digest>, FsckError> {
        let bad: BTreeSet<PathBuf> = report.bad.iter().map(|bad| bad.path.clone()).collect();
        let mut missing: BTreeMap<PathBuf, Digest> = BTreeMap::new();
        // Whether a file that should be there is no good.
        let mut needs = |path: PathBuf, digest: Digest| {
            let there = file_size(&path)?.is_some();
            let good = there && !bad.contains(&path);
            if !there {
                missing.insert(path, digest);
            }
            Ok::<_, PathError>(!good)
        };
        let mut damaged_trees = BTreeSet::new();
        for (digest, _) in self.layout.list(Shelf::Trees)? {
            // One that can't be read is in the list already.
            let Ok(tree) = self.load_tree(&digest) else {
                damaged_trees.insert(digest);
                continue;
            };
            for item in tree.walk() {
                if let Kind::File {
                    digest: object,
                    size: 1..,
                } = item.node.kind
                    && needs(self.object_path(&object), object)?
                {
                    damaged_trees.insert(digest);
                }
            }
        }
        let mut damaged = BTreeSet::new();
        for (manifest, path) in self.layout.list(Shelf::Images)? {
            let Ok(Some(image)) = self.image(&manifest) else {
                report.bad.push(Bad {
                    path,
                    expected: manifest,
                    found: Found::Unreadable("it is no image record".into()),
                    quarantine: None,
                });
                damaged.insert(manifest);
                continue;
            };
            let mut lacks = needs(self.layout.path(Shelf::Trees, &image.tree), image.tree)?
                || damaged_trees.contains(&image.tree);
            for blob in image.blobs() {
                lacks |= needs(self.layout.path(Shelf::Blobs, &blob), blob)?;
            }
            if lacks {
                damaged.insert(manifest);
            }
        }
        self.check_refs(&mut missing)?;
        let missing = missing.into_iter().map(|(path, expected)| Bad {
            path,
            expected,
            found: Found::Missing,
            quarantine: None,
        });
        report.bad.extend(missing);
        Ok(damaged)
    }

    fn check_refs(&self, missing: &mut BTreeMap<PathBuf, Digest>) -> Result<(), FsckError> {
        for (name, digest) in self.refs("")? {
            let mut there = false;
            for shelf in [Shelf::Blobs, Shelf::Trees, Shelf::Images] {
                there |= file_size(&self.layout.path(shelf, &digest))?.is_some();
            }
            if !there {
                missing.insert(self.layout.reference(&name), digest);
            }
        }
        Ok(())
    }

    fn quarantine(&self, bad: &Bad) -> Result<Option<PathBuf>, PathError> {
        if bad.found == Found::Missing {
            return Ok(None);
        }
        let folder = self.layout.sub("quarantine");
        let mut number = 0;
        let hex = bad.expected.hex();
        let target = loop {
            let target = folder.join(format!("{hex}.{number}"));
            if file_size(&target)?.is_none() {
                break target;
            }
            number += 1;
        };
        let _lock = self.layout.removing()?;
        fs::rename(&bad.path, &target).map_err(at("move aside", &bad.path))?;
        Ok(Some(target))
    }

    /// Forgets the damaged images and adds them again. Chains that lead to damage are
    /// not taken: `add_image` looks at what they need.
    fn heal(&self, damaged: BTreeSet<Digest>, report: &mut FsckReport) -> Result<(), FsckError> {
        for manifest in damaged {
            let record = self.layout.path(Shelf::Images, &manifest);
            let old = record.with_extension("damaged");
            if file_size(&record)?.is_some() {
                fs::rename(&record, &old).map_err(at("move aside", &record))?;
            }
            match self.add_image(&manifest) {
                Ok(_) => {
                    remove_file(&old)?;
                    report.healed.push(manifest);
                }
                Err(error) => {
                    // The record still protects what is left of the image.
                    if file_size(&old)?.is_some() {
                        fs::rename(&old, &record).map_err(at("put back", &record))?;
                    }
                    report.lost.push(Lost {
                        manifest,
                        reason: error.to_string(),
                    });
                }
            }
        }
        Ok(())
    }
}

fn hash(path: &Path) -> Result<Option<(Digest, u64)>, PathError> {
    let Some(mut file) = open(path)? else {
        return Ok(None);
    };
    let mut writer = HashWriter(Hasher::new());
    let size = std::io::copy(&mut file, &mut writer).map_err(at("read", path))?;
    Ok(Some((writer.0.finish(), size)))
}

struct HashWriter(Hasher);

impl std::io::Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

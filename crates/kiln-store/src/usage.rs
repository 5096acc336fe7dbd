use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Serialize;

use crate::layout::{PathError, Shelf, entries};
use crate::store::Store;

/// Files, and the bytes they take on disk (not their lengths).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Space {
    pub count: u64,
    pub bytes: u64,
}

/// What the store takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub objects: Space,
    pub blobs: Space,
    pub trees: Space,
    pub images: Space,
    pub quarantine: Space,
    pub refs: u64,
}

impl Usage {
    /// Bytes on disk in all.
    pub fn bytes(&self) -> u64 {
        [
            self.objects,
            self.blobs,
            self.trees,
            self.images,
            self.quarantine,
        ]
        .iter()
        .map(|space| space.bytes)
        .sum()
    }
}

impl Store {
    /// Counts everything; takes a look at every file.
    pub fn usage(&self) -> Result<Usage, PathError> {
        let shelf = |shelf| {
            let files = self.layout.list(shelf)?;
            Ok::<_, PathError>(space(files.into_iter().map(|(_, path)| path)))
        };
        let paths = |folder| {
            let files = entries(&self.layout.sub(folder))?;
            Ok::<_, PathError>(files.into_iter().map(|(_, path)| path))
        };
        Ok(Usage {
            objects: shelf(Shelf::Objects)?,
            blobs: shelf(Shelf::Blobs)?,
            trees: shelf(Shelf::Trees)?,
            images: shelf(Shelf::Images)?,
            quarantine: space(paths("quarantine")?),
            refs: paths("refs")?.count() as u64,
        })
    }
}

/// Files that go meanwhile are not counted.
fn space(paths: impl Iterator<Item = PathBuf>) -> Space {
    let mut space = Space::default();
    for metadata in paths.filter_map(|path| fs::symlink_metadata(path).ok()) {
        space.count += 1;
        // Linux counts blocks of 512 bytes, whatever the file system's.
        space.bytes += metadata.blocks() * 512;
    }
    space
}

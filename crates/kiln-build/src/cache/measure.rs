//! What is in the cache, with its size, age and cost.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiln_model::Digest;
use kiln_store::{Needs, Store};

use super::{CacheError, Entry, Pruning, at, used_ref};
use crate::exec::state::{StepCache, remembered};
use crate::network::record::FOLDER as FETCHES;

/// Refs of images that can be fetched or composed again.
const REFS: &str = "cache/";
/// Folders whose parts are entries each, and what one is taken to have cost at least:
/// downloads and compilers' caches are dear, records of what was seen are not.
const FOLDERS: [(&str, Duration); 9] = [
    ("debian", Duration::from_secs(1)),
    ("debian/images", Duration::from_secs(10)),
    ("mounts", Duration::from_secs(60)),
    // Servers may have nothing like it any more.
    (FETCHES, Duration::from_secs(600)),
    ("git", Duration::from_secs(10)),
    ("context", Duration::from_secs(1)),
    ("tests", Duration::from_secs(2)),
    ("scans", Duration::from_secs(1)),
    ("reasons", Duration::from_millis(1)),
];
/// What a network gives in a second.
const FETCHED: u64 = 10 << 20;

/// What an entry is, so that it can be removed.
pub(super) enum What {
    /// A remembered result, and the layer it is in.
    Step(PathBuf, Option<Digest>),
    Path(PathBuf),
    Ref {
        name: String,
        used: PathBuf,
    },
}

pub(super) struct Found {
    pub entries: Vec<(What, Entry)>,
}

impl Found {
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|(_, entry)| entry.bytes).sum()
    }

    pub fn layers(&self) -> impl Iterator<Item = Digest> + '_ {
        self.entries.iter().filter_map(|(what, _)| match what {
            What::Step(_, layer) => *layer,
            _ => None,
        })
    }

    /// Removes these, and gives the layers of those that stay.
    pub fn remove(&self, store: &Store, going: &[usize]) -> Result<Vec<Digest>, CacheError> {
        let mut kept = Vec::new();
        let mut gone = vec![false; self.entries.len()];
        going.iter().for_each(|index| gone[*index] = true);
        for ((what, _), gone) in self.entries.iter().zip(gone) {
            match (what, gone) {
                (What::Step(_, layer), false) => kept.extend(*layer),
                (_, false) => {}
                (What::Step(path, _) | What::Path(path), true) => remove(path)?,
                (What::Ref { name, used }, true) => {
                    store.remove_ref(name)?;
                    remove(used)?;
                }
            }
        }
        Ok(kept)
    }
}

pub(super) fn remove(path: &Path) -> Result<(), CacheError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at(path)(e)),
        _ => Ok(()),
    }
}

pub(super) fn measure(pruning: &Pruning<'_>) -> Result<Found, CacheError> {
    let Pruning { store, cache, .. } = pruning;
    let mut needs = Needs::default();
    store.weigh(&mut needs, pruning.running)?;
    let (cached, pinned): (Vec<_>, Vec<_>) = store
        .refs("")?
        .into_iter()
        .partition(|(name, _)| name.starts_with(REFS));
    for (_, digest) in pinned {
        store.weigh(&mut needs, &[digest])?;
    }
    let mut entries = Vec::new();
    for (name, digest) in cached {
        let bytes = store.weigh(&mut needs, &[digest])?;
        let path = cache.join("refs").join(Digest::of(&name).hex());
        let used = match fs::metadata(&path).and_then(|meta| meta.modified()) {
            Ok(used) => used,
            // Nobody has said so far.
            Err(_) => {
                used_ref(cache, &name);
                SystemTime::now()
            }
        };
        let entry = Entry {
            bytes,
            used,
            cost: Duration::from_secs(1 + bytes / FETCHED),
        };
        entries.push((What::Ref { name, used: path }, entry));
    }
    steps(
        store,
        &cache.join(StepCache::FOLDER),
        &mut needs,
        &mut entries,
    )?;
    for (name, cost) in FOLDERS {
        for (path, meta) in parts(&cache.join(name))? {
            // Folders of their own.
            if name == "debian" && meta.is_dir() {
                continue;
            }
            let bytes = size(&path, &meta)?;
            let entry = Entry {
                bytes,
                used: meta.modified().map_err(at(&path))?,
                cost: cost.max(Duration::from_secs(bytes / FETCHED)),
            };
            entries.push((What::Path(path), entry));
        }
    }
    Ok(Found { entries })
}

fn steps(
    store: &Store,
    folder: &Path,
    needs: &mut Needs,
    entries: &mut Vec<(What, Entry)>,
) -> Result<(), CacheError> {
    for (path, meta) in parts(folder)? {
        let record = remembered(&path);
        // Each of several layers has a record of its own, which holds it.
        let layer = match record.as_ref().map(|record| record.layers.as_slice()) {
            Some([layer]) => Some(layer.digest),
            _ => None,
        };
        let mut bytes = meta.blocks() * 512;
        if let Some(layer) = layer {
            bytes += store.weigh(needs, &[layer])?;
        }
        let entry = Entry {
            bytes,
            used: meta.modified().map_err(at(&path))?,
            cost: record.map_or(Duration::ZERO, |record| record.took.into()),
        };
        entries.push((What::Step(path, layer), entry));
    }
    Ok(())
}

/// What is in a folder, sorted; a folder that is not there has nothing.
fn parts(folder: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>, CacheError> {
    let listed = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed.map_err(at(folder))?,
    };
    let mut parts = Vec::new();
    for entry in listed {
        let path = entry.map_err(at(folder))?.path();
        match fs::symlink_metadata(&path) {
            Ok(meta) => parts.push((path, meta)),
            // Somebody has just put another one in its place.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(at(&path)(e)),
        }
    }
    parts.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(parts)
}

/// Bytes on disk, of a folder with all that is in it.
fn size(path: &Path, meta: &fs::Metadata) -> Result<u64, CacheError> {
    let mut bytes = meta.blocks() * 512;
    if meta.is_dir() {
        for (path, meta) in parts(path)? {
            bytes += size(&path, &meta)?;
        }
    }
    Ok(bytes)
}

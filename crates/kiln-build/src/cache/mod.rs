//! The build cache as a whole: what it takes on disk, and what goes first when that is too
//! much. It is all that could be made or fetched again: results of instructions (their
//! layers in the store), composed bases and pulled images that no release needs, package
//! files, cache mounts, repositories, and small records of what was seen.
//!
//! The cap counts blocks on disk and is kept after every image that is built, and by `kiln
//! gc`. Builds that overlap without end would never let anybody cut it: who finds it at twice
//! its cap and others building says so (`cache/overfull`), and nobody begins another build
//! until it is cut ([`is_overfull`]). What goes is chosen by [`choose`]: what saves the least
//! time for its size, the less the longer nobody asked for it. Before anything that was made
//! goes, so do contents of files that no image needs and that layers have anyway.
//!
//! On disk: of everything, its file's time is when it was used last; of refs, whose files are
//! the store's, that of `cache/refs/<digest of the name>`, which holds the name.
//!
//! Invariants: what a ref of a release, or a lease, protects in the store stays; nothing is
//! removed while a build of another process is under way (`cache/lock`).

mod measure;
mod worth;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kiln_model::Digest;
use kiln_store::{GcError, GcReport, RefError, Store};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

pub use worth::{Entry, choose};

/// Of the file system's size, as BuildKit's default keeps to.
const SHARE: u64 = 10;
/// But never more: a cache is not what a large disk is for.
const MOST: u64 = 20 << 30;
/// See [`is_overfull`].
const OVERFULL: &str = "overfull";

/// Why the cache could not be measured or cut.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("can't use {path}")]
    Io {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(transparent)]
    Gc(#[from] GcError),
    #[error(transparent)]
    Ref(#[from] RefError),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> CacheError + '_ {
    move |cause| CacheError::Io {
        path: path.to_owned(),
        cause,
    }
}

/// What was cut, or would be.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Pruned {
    /// Bytes on disk before, and of what is kept.
    pub before: u64,
    pub kept: u64,
    /// Entries that went.
    pub entries: usize,
    /// `None`: the store was left alone.
    pub store: Option<GcReport>,
}

/// What a cache is cut by.
#[derive(Clone, Copy)]
pub struct Pruning<'a> {
    pub store: &'a Store,
    /// `KILN_ROOT/cache`.
    pub cache: &'a Path,
    /// Manifests of running instances.
    pub running: &'a [Digest],
    /// Bytes.
    pub cap: u64,
    pub dry_run: bool,
}

/// The cap where none is set: a tenth of the file system, at most 20 GiB.
pub fn default_cap(cache: &Path) -> Result<u64, CacheError> {
    let space = rustix::fs::statvfs(cache).map_err(|e| at(cache)(e.into()))?;
    let size = space.f_blocks.saturating_mul(space.f_frsize);
    Ok((size / SHARE).min(MOST))
}

/// While it lives, nobody cuts the cache.
pub struct InUse {
    _lock: File,
}

/// Says that a build uses the cache; waits for one that is being cut.
pub fn in_use(cache: &Path) -> io::Result<InUse> {
    let lock = lock(cache)?;
    flock(&lock, FlockOperation::LockShared)?;
    Ok(InUse { _lock: lock })
}

fn lock(cache: &Path) -> io::Result<File> {
    fs::create_dir_all(cache)?;
    let mut options = File::options();
    options.create(true).truncate(false).write(true);
    options.open(cache.join("lock"))
}

/// Remembers that something of the cache was used now. It is only a cache: what can't be
/// remembered goes earlier.
pub(crate) fn used(path: &Path) {
    let touched = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
    if let Err(cause) = touched {
        let path = path.display();
        tracing::debug!(%path, %cause, "its use was not remembered");
    }
}

/// The same of a ref, whose file is the store's.
pub(crate) fn used_ref(cache: &Path, name: &str) {
    let folder = cache.join("refs");
    let path = folder.join(Digest::of(name).hex());
    let written = fs::create_dir_all(&folder).and_then(|()| fs::write(&path, name));
    if let Err(cause) = written {
        tracing::debug!(name, %cause, "its use was not remembered");
    }
}

/// Says whether the cache is so far beyond its cap that it is to be cut before anything more
/// is built.
pub fn is_overfull(cache: &Path) -> bool {
    cache.join(OVERFULL).exists()
}

/// Cuts the cache down to its cap. `None`: a build is under way, which does so at its end.
pub fn prune(pruning: &Pruning<'_>) -> Result<Option<Pruned>, CacheError> {
    let path = pruning.cache.join("lock");
    let lock = lock(pruning.cache).map_err(at(&path))?;
    let mark = pruning.cache.join(OVERFULL);
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            if !pruning.dry_run && !mark.exists() {
                let (found, loose) = weigh(pruning)?;
                if found.bytes() + loose > pruning.cap.saturating_mul(2) {
                    fs::write(&mark, "").map_err(at(&mark))?;
                }
            }
            return Ok(None);
        }
        Err(e) => return Err(at(&path)(e.into())),
    }
    let pruned = cut(pruning)?;
    if !pruning.dry_run {
        measure::remove(&mark)?;
    }
    Ok(Some(pruned))
}

/// What is in the cache, and the bytes of what nothing in it needs.
fn weigh(pruning: &Pruning<'_>) -> Result<(measure::Found, u64), CacheError> {
    let found = measure::measure(pruning)?;
    let roots: Vec<Digest> = pruning
        .running
        .iter()
        .copied()
        .chain(found.layers())
        .collect();
    let loose = pruning.store.gc(&roots, true)?.bytes;
    Ok((found, loose))
}

/// For holders of the lock.
fn cut(pruning: &Pruning<'_>) -> Result<Pruned, CacheError> {
    let (found, loose) = weigh(pruning)?;
    let held = found.bytes();
    let mut pruned = Pruned {
        before: held + loose,
        kept: held + loose,
        ..Pruned::default()
    };
    if pruned.before <= pruning.cap {
        return Ok(pruned);
    }
    let now = SystemTime::now();
    let entries: Vec<Entry> = found.entries.iter().map(|(_, entry)| *entry).collect();
    let going = choose(&entries, pruning.cap, now);
    pruned.entries = going.len();
    let gone: u64 = going.iter().map(|index| entries[*index].bytes).sum();
    pruned.kept = held - gone;
    if pruning.dry_run {
        return Ok(pruned);
    }
    let kept = found.remove(pruning.store, &going)?;
    let roots: Vec<Digest> = pruning.running.iter().copied().chain(kept).collect();
    pruned.store = Some(pruning.store.gc(&roots, false)?);
    Ok(pruned)
}

/// The layers that results of instructions are kept in: roots for `kiln gc`.
pub fn layers(pruning: &Pruning<'_>) -> Result<Vec<Digest>, CacheError> {
    Ok(measure::measure(pruning)?.layers().collect())
}

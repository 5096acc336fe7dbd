//! A scanned context as something to copy from: contents go into the store when they are
//! asked for, and only if they changed since they were last hashed.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_model::Digest;
use kiln_store::{Batch, PutError, Store};

use super::ignore::Patterns;
use super::stat_cache::{Stamp, StatCache};
use super::{Context, ContextError, Entry, EntryKind};
use crate::files::{FilesError, Inode, Kind, Meta, Names, Shape, Source, shown};

/// Files read at the same time; a bound on memory.
const MAX_THREADS: usize = 4;
/// Files that are not worth a thread of their own.
const FEW: usize = 64;

/// A context with its memory of digests.
pub struct ContextSource {
    context: Context,
    cache: Mutex<StatCache>,
    store: Arc<Store>,
    /// Nanoseconds since the epoch, when the build began.
    now: i128,
    /// Files whose content was read.
    read: AtomicUsize,
}

impl ContextSource {
    /// `cache`: the builder's cache folder; `now`: nanoseconds since the epoch.
    pub fn new(context: Context, cache: &Path, store: Arc<Store>, now: i128) -> Self {
        let cache = StatCache::load(cache, context.folder());
        Self::with(context, cache, store, now)
    }

    /// The same of a folder that is scanned meanwhile.
    pub fn scan(
        folder: &Path,
        patterns: &Patterns,
        cache: &Path,
        store: Arc<Store>,
        now: i128,
    ) -> Result<Self, ContextError> {
        let (context, cache) = std::thread::scope(|scope| {
            let cache = scope.spawn(|| StatCache::load(cache, folder));
            let context = Context::scan(folder, patterns);
            let cache = cache.join();
            (context, cache.unwrap_or_else(|panic| resume_unwind(panic)))
        });
        Ok(Self::with(context?, cache, store, now))
    }

    fn with(context: Context, cache: StatCache, store: Arc<Store>, now: i128) -> Self {
        Self {
            context,
            cache: Mutex::new(cache),
            store,
            now,
            read: AtomicUsize::new(0),
        }
    }

    /// How many files' contents were read so far.
    pub fn files_read(&self) -> usize {
        self.read.load(Ordering::Relaxed)
    }

    /// Writes what was learned. It is a cache: a failure is told, and costs time only.
    pub fn save(&self) -> std::io::Result<()> {
        let there = |path: &[u8]| self.context.entry(&crate::files::names(path)).is_some();
        self.remembered().save(there)
    }

    fn remembered(&self) -> MutexGuard<'_, StatCache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The object may still wait for its name in the batch. `stored`: what is remembered
    /// must be in the store as well.
    fn content(
        &self,
        path: &[Vec<u8>],
        stamp: &Stamp,
        stored: bool,
        batch: &mut Batch<'_>,
    ) -> Result<(Digest, u64), FilesError> {
        let key = path.join(&b'/');
        let known = self.remembered().get(&key, stamp);
        if let Some(digest) = known
            && (!stored || self.store.object_size(&digest).ok().flatten() == Some(stamp.size()))
        {
            return Ok((digest, stamp.size()));
        }
        let fail = |cause: Box<dyn std::error::Error + Send + Sync>| FilesError::Read {
            path: shown(path),
            cause,
        };
        let mut file = fs::OpenOptions::new()
            .read(true)
            // It was a plain file when the folder was scanned; it must still be one.
            .custom_flags(
                (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits() as i32,
            )
            .open(self.context.host_path(path))
            .map_err(|e| fail(Box::new(e)))?;
        self.read.fetch_add(1, Ordering::Relaxed);
        let meta = file.metadata().map_err(|e| fail(Box::new(e)))?;
        if !meta.is_file() {
            return Err(fail("it is no plain file any more".into()));
        }
        let put = batch.put(&mut file, meta.len());
        let (digest, size) = put.map_err(|e| fail(Box::new(e)))?;
        let after = file.metadata().map_err(|e| fail(Box::new(e)))?;
        if Stamp::of(&after) == *stamp {
            self.remembered().put(key, *stamp, digest, self.now);
        }
        Ok((digest, size))
    }

    fn described(
        &self,
        path: &[Vec<u8>],
        stored: bool,
        batch: &mut Batch<'_>,
    ) -> Result<(Meta, Shape), FilesError> {
        let entry = self
            .context
            .entry(path)
            .ok_or_else(|| FilesError::NotFound(shown(path)))?;
        // Owner and times are this machine's, not the project's.
        let meta = Meta {
            mode: entry.mode,
            ..Meta::default()
        };
        let shape = match &entry.kind {
            EntryKind::Folder(_) => Shape::Folder,
            EntryKind::File { stamp, .. } => {
                let (digest, size) = self.content(path, stamp, stored, batch)?;
                Shape::File { digest, size }
            }
            EntryKind::Link(target) => Shape::Link(target.clone()),
            EntryKind::Fifo => Shape::Fifo,
            EntryKind::Device => return Err(FilesError::Device(shown(path))),
        };
        Ok((meta, shape))
    }
}

fn unkept(path: &[Vec<u8>], cause: PutError) -> FilesError {
    FilesError::Read {
        path: shown(path),
        cause: Box::new(cause),
    }
}

impl Source for ContextSource {
    fn kind(&self, path: &[Vec<u8>]) -> Option<Kind> {
        Some(match &self.context.entry(path)?.kind {
            EntryKind::Folder(_) => Kind::Folder,
            EntryKind::File { .. } => Kind::File,
            EntryKind::Link(target) => Kind::Link(target.clone()),
            EntryKind::Fifo | EntryKind::Device => Kind::Other,
        })
    }

    fn list(&self, path: &[Vec<u8>]) -> Vec<(Vec<u8>, bool)> {
        let folder = |entry: &Entry| matches!(entry.kind, EntryKind::Folder(_));
        match self.context.entry(path).map(|e| &e.kind) {
            Some(EntryKind::Folder(entries)) => entries
                .iter()
                .map(|(name, entry)| (name.clone(), folder(entry)))
                .collect(),
            _ => Vec::new(),
        }
    }

    fn inode(&self, path: &[Vec<u8>]) -> Option<Inode> {
        match &self.context.entry(path)?.kind {
            EntryKind::File {
                stamp,
                linked: true,
                ..
            } => Some(stamp.inode()),
            _ => None,
        }
    }

    fn entry(&self, path: &[Vec<u8>]) -> Result<(Meta, Shape), FilesError> {
        let mut batch = self.store.batch();
        let found = self.described(path, true, &mut batch)?;
        batch.finish().map_err(|e| unkept(path, e.into()))?;
        Ok(found)
    }

    fn entries(&self, paths: &[Names]) -> Result<Vec<(Meta, Shape)>, FilesError> {
        self.all(paths, true)
    }
}

/// A context whose files are what they are remembered to be, wherever their content is: it
/// may have left the store. Enough for finding out whether anything has changed.
pub struct Remembered<'a>(pub &'a ContextSource);

impl Source for Remembered<'_> {
    fn kind(&self, path: &[Vec<u8>]) -> Option<Kind> {
        self.0.kind(path)
    }

    fn list(&self, path: &[Vec<u8>]) -> Vec<(Vec<u8>, bool)> {
        self.0.list(path)
    }

    fn inode(&self, path: &[Vec<u8>]) -> Option<Inode> {
        self.0.inode(path)
    }

    fn entry(&self, path: &[Vec<u8>]) -> Result<(Meta, Shape), FilesError> {
        self.0.entry(path)
    }

    fn entries(&self, paths: &[Names]) -> Result<Vec<(Meta, Shape)>, FilesError> {
        self.0.all(paths, false)
    }
}

impl ContextSource {
    /// Several at a time: reading and keeping many small files is waiting, mostly.
    fn all(&self, paths: &[Names], stored: bool) -> Result<Vec<(Meta, Shape)>, FilesError> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = processors.min(MAX_THREADS).min(paths.len().div_ceil(FEW));
        let mut found: Vec<Option<Result<(Meta, Shape), FilesError>>> = Vec::new();
        found.resize_with(paths.len(), || None);
        let work = Mutex::new(paths.chunks(FEW).zip(found.chunks_mut(FEW)));
        let next = || work.lock().unwrap_or_else(PoisonError::into_inner).next();
        let take = || {
            let mut batch = self.store.batch();
            while let Some((paths, found)) = next() {
                for (path, found) in paths.iter().zip(found) {
                    *found = Some(self.described(path, stored, &mut batch));
                }
            }
            batch.finish()
        };
        let named = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(take)).collect();
            let own = take();
            let joined = others.into_iter().map(|other| other.join());
            let mut named = joined.map(|named| named.unwrap_or_else(|panic| resume_unwind(panic)));
            own.and(named.find(Result::is_err).unwrap_or(Ok(())))
        });
        named.map_err(|e| unkept(&[], e.into()))?;
        found.into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const FILES: usize = 10_000;
    const SECOND: i128 = 1_000_000_000;

    /// Takes every file of a context, as a COPY does; gives how many were read.
    fn take(context: &Path, root: &Path, store: &Arc<Store>, later: i128) -> usize {
        let scanned = Context::scan(context, &Patterns::default()).unwrap();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let now = now.as_nanos() as i128 + later;
        let source = ContextSource::new(scanned, root, store.clone(), now);
        for folder in source.names(&[]) {
            for name in source.names(std::slice::from_ref(&folder)) {
                source.entry(&[folder.clone(), name]).unwrap();
            }
        }
        source.save().unwrap();
        source.files_read()
    }

    #[test]
    fn what_is_no_plain_file_any_more_is_neither_waited_for_nor_taken() {
        let (context, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = Arc::new(Store::open(root.path()).unwrap());
        let path = context.path().join("f");
        fs::write(&path, "x").unwrap();
        let scanned = Context::scan(context.path(), &Patterns::default()).unwrap();
        let source = ContextSource::new(scanned, root.path(), store, 0);
        fs::remove_file(&path).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, 0o644.into(), 0).unwrap();
        let told = source.entry(&[b"f".to_vec()]).unwrap_err();
        let cause = std::error::Error::source(&told).unwrap().to_string();
        assert_eq!(cause, "it is no plain file any more");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(
            source.entry(&[b"f".to_vec()]).is_err(),
            "no link is followed"
        );
    }

    #[test]
    fn of_ten_thousand_files_only_the_one_that_changed_is_read_again() {
        let (context, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = Arc::new(Store::open(root.path()).unwrap());
        let path = |n: usize| context.path().join(format!("{}/{n}", n / 100));
        for n in 0..FILES {
            fs::create_dir_all(path(n).parent().unwrap()).unwrap();
            fs::write(path(n), format!("{n:05}")).unwrap();
        }
        let take = |later| take(context.path(), root.path(), &store, later);
        // Just written, they may change again unseen: nothing is remembered of them.
        assert_eq!(take(-10 * SECOND), FILES);
        assert_eq!(take(10 * SECOND), FILES);
        assert_eq!(take(10 * SECOND), 0);
        // Of the same size, with its old time put back: the time of that can't be.
        let settled = fs::metadata(path(4711)).unwrap().modified().unwrap();
        fs::write(path(4711), "other").unwrap();
        let file = fs::File::options().write(true).open(path(4711)).unwrap();
        file.set_modified(settled).unwrap();
        assert_eq!(take(20 * SECOND), 1);
        assert_eq!(take(20 * SECOND), 0);
        // Another file in its place is another inode.
        fs::write(path(1), "new").unwrap();
        fs::rename(path(1), path(2)).unwrap();
        assert_eq!(take(30 * SECOND), 1);
        // What has left the store is read again.
        fs::remove_file(store.object_path(&Digest::of("00003"))).unwrap();
        assert_eq!(take(30 * SECOND), 1);
    }
}

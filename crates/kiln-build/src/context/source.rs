//! A scanned context as something to copy from: contents go into the store when they are
//! asked for, and only if they changed since they were last hashed.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_model::Digest;
use kiln_store::Store;

use super::stat_cache::{Stamp, StatCache};
use super::{Context, EntryKind};
use crate::files::{FilesError, Kind, Meta, Shape, Source, shown};

/// A context with its memory of digests.
pub struct ContextSource {
    context: Context,
    cache: Mutex<StatCache>,
    store: Arc<Store>,
    /// Nanoseconds since the epoch, when the build began.
    now: i128,
}

impl ContextSource {
    /// `cache`: the builder's cache folder; `now`: nanoseconds since the epoch.
    pub fn new(context: Context, cache: &Path, store: Arc<Store>, now: i128) -> Self {
        let cache = Mutex::new(StatCache::load(cache, context.folder()));
        Self {
            context,
            cache,
            store,
            now,
        }
    }

    /// Writes what was learned. It is a cache: a failure is told, and costs time only.
    pub fn save(&self) -> std::io::Result<()> {
        self.remembered().save(|path| {
            let names = crate::files::names(path.as_bytes());
            path.starts_with('\0') || self.context.entry(&names).is_some()
        })
    }

    fn remembered(&self) -> MutexGuard<'_, StatCache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn content(&self, path: &[Vec<u8>], stamp: &Stamp) -> Result<(Digest, u64), FilesError> {
        let key = path.join(&b'/');
        let known = self.remembered().get(&key, stamp);
        if let Some(digest) = known
            && self.store.object_path(&digest).is_file()
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
        let meta = file.metadata().map_err(|e| fail(Box::new(e)))?;
        if !meta.is_file() {
            return Err(fail("it is no plain file any more".into()));
        }
        let (digest, size) = self
            .store
            .put_object(&mut file)
            .map_err(|e| fail(Box::new(e)))?;
        let after = file.metadata().map_err(|e| fail(Box::new(e)))?;
        if Stamp::of(&after) == *stamp {
            self.remembered().put(&key, *stamp, digest, self.now);
        }
        Ok((digest, size))
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

    fn names(&self, path: &[Vec<u8>]) -> Vec<Vec<u8>> {
        match self.context.entry(path).map(|e| &e.kind) {
            Some(EntryKind::Folder(entries)) => entries.keys().cloned().collect(),
            _ => Vec::new(),
        }
    }

    fn entry(&self, path: &[Vec<u8>]) -> Result<(Meta, Shape), FilesError> {
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
                let (digest, size) = self.content(path, stamp)?;
                Shape::File { digest, size }
            }
            EntryKind::Link(target) => Shape::Link(target.clone()),
            EntryKind::Fifo => Shape::Fifo,
            EntryKind::Device => return Err(FilesError::Device(shown(path))),
        };
        Ok((meta, shape))
    }
}

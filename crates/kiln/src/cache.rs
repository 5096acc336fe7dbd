//! The build cache's size: kept to its cap, cut on request.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_build::cache::{self, CacheError, Pruned, Pruning};
use kiln_model::{Digest, Progress, ProgressEvent};
use kiln_store::{GcError, Store};
use tokio::task::JoinHandle;

use crate::context::Context;
use crate::failure::{Failure, Kind, machine};
use crate::progress::human_bytes;
use crate::{ops, output};

pub fn folder(context: &Context) -> PathBuf {
    context.root.join("cache")
}

/// Cuts the cache to its cap. `None`: a build or a collection is under way, and the next
/// one does it.
pub fn keep(
    context: &Context,
    store: &Store,
    running: &[Digest],
    dry_run: bool,
) -> Result<Option<Pruned>, Failure> {
    keep_below(
        &folder(context),
        context.cache_size,
        store,
        running,
        dry_run,
    )
}

fn keep_below(
    cache: &Path,
    cap: Option<u64>,
    store: &Store,
    running: &[Digest],
    dry_run: bool,
) -> Result<Option<Pruned>, Failure> {
    std::fs::create_dir_all(cache).map_err(machine)?;
    let cap = match cap {
        Some(cap) => cap,
        None => cache::default_cap(cache).map_err(failed)?,
    };
    prune(&Pruning {
        store,
        cache,
        running,
        cap,
        dry_run,
    })
}

/// How often it is tried to cut a cache that others use.
const LOOK: Duration = Duration::from_millis(100);

type Work = JoinHandle<Result<Option<Pruned>, Failure>>;

/// Keeps the cache to its cap beside other work: an image is tested meanwhile, and the next
/// build waits for it.
pub struct Keeper {
    store: Arc<Store>,
    cache: PathBuf,
    cap: Option<u64>,
    progress: Arc<dyn Progress>,
    under_way: Mutex<Option<Work>>,
}

impl Keeper {
    pub fn new(context: &Context, store: Arc<Store>, progress: Arc<dyn Progress>) -> Self {
        Self {
            store,
            cache: folder(context),
            cap: context.cache_size,
            progress,
            under_way: Mutex::default(),
        }
    }

    /// Begins once more, after the last time has ended.
    pub async fn begin(&self, running: Vec<Digest>) -> Result<(), Failure> {
        self.end().await?;
        let (store, cache, cap) = (self.store.clone(), self.cache.clone(), self.cap);
        let work = move || keep_below(&cache, cap, &store, &running, false);
        *self.slot() = Some(tokio::task::spawn_blocking(work));
        Ok(())
    }

    /// Before a build: where overlapping builds have filled the cache far beyond its cap, it
    /// waits until they have ended and the cache is cut.
    pub async fn make_room(&self, running: Vec<Digest>) -> Result<(), Failure> {
        self.end().await?;
        if cache::is_overfull(&self.cache) {
            self.progress.event(ProgressEvent::Warning {
                task: "cache".into(),
                text: "the build cache is at twice its size; it is cut when the builds that \
                       are under way have ended, and then this one begins"
                    .into(),
            });
        }
        while cache::is_overfull(&self.cache) {
            self.begin(running.clone()).await?;
            self.end().await?;
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Waits for what is under way, and tells what was cut.
    pub async fn end(&self) -> Result<(), Failure> {
        let Some(work) = self.slot().take() else {
            return Ok(());
        };
        let pruned = work.await.map_err(machine)??;
        if let Some(pruned) = pruned.filter(|pruned| pruned.before > pruned.kept) {
            self.progress.event(ProgressEvent::Warning {
                task: "cache".into(),
                text: told(&pruned),
            });
        }
        Ok(())
    }

    fn slot(&self) -> MutexGuard<'_, Option<Work>> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn prune(pruning: &Pruning<'_>) -> Result<Option<Pruned>, Failure> {
    match cache::prune(pruning) {
        Err(CacheError::Gc(GcError::Busy)) => Ok(None),
        other => other.map_err(failed),
    }
}

/// Roots of what the cache keeps in the store.
pub fn layers(context: &Context, store: &Store) -> Result<Vec<Digest>, Failure> {
    let cache = folder(context);
    let pruning = Pruning {
        store,
        cache: &cache,
        running: &[],
        cap: 0,
        dry_run: true,
    };
    cache::layers(&pruning).map_err(failed)
}

fn failed(error: CacheError) -> Failure {
    Failure::with_causes(Kind::Machine, &error)
}

/// `kiln build --prune`.
pub fn empty(context: &Context) -> Result<(), Failure> {
    let store = context.store()?;
    let cache = folder(context);
    std::fs::create_dir_all(&cache).map_err(machine)?;
    ops::sweep(context)?;
    let pruned = prune(&Pruning {
        store: &store,
        cache: &cache,
        running: &ops::running_images(context)?,
        cap: context.cache_size.unwrap_or(0),
        dry_run: false,
    })?;
    let busy = || {
        Failure::new(
            Kind::Conflict,
            "a build or a garbage collection is under way",
        )
    };
    let pruned = pruned.ok_or_else(busy)?;
    let bytes = pruned.before - pruned.kept;
    context.record("prune", "cache", &[("bytes", bytes.to_string())])?;
    if context.json {
        return output::json(&pruned);
    }
    outln!("{}", told(&pruned));
    Ok(())
}

/// In a line.
pub fn told(pruned: &Pruned) -> String {
    let removed = human_bytes(pruned.before - pruned.kept);
    let kept = human_bytes(pruned.kept);
    format!(
        "build cache: {} entries and {removed} removed, {kept} kept",
        pruned.entries
    )
}

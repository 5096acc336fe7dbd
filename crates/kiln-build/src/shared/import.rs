//! Taking results from caches of others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_model::{Digest, Progress, ProgressEvent};
use kiln_oci::layer::{LayerReadError, LayerReader, Limits, Whiteouts};
use kiln_oci::manifest::Descriptor;
use kiln_oci::registry::Client;
use kiln_oci::{BlobRead, BlobWrite};
use kiln_store::Store;
use tokio::runtime::Handle;

use super::document::{self, DocumentError};
use super::{Place, TakeError};
use crate::exec::layer::LayerRef;
use crate::exec::state::Made;

/// Why something can't be taken from a cache.
#[derive(Debug, thiserror::Error)]
enum ImportError {
    #[error(transparent)]
    Take(#[from] TakeError),
    #[error(transparent)]
    Document(#[from] DocumentError),
    #[error("its manifest does not have the layer {0}, which it says a result is in")]
    NoLayer(Digest),
    #[error("the layer {digest} can't be used: {source}")]
    Layer {
        digest: Digest,
        #[source]
        source: LayerReadError,
    },
}

/// The caches that a build takes from, in their order.
pub struct Import {
    client: Arc<Client>,
    /// Results are taken by threads that are not the runtime's own.
    handle: Handle,
    store: Arc<Store>,
    progress: Arc<dyn Progress>,
    task: String,
    caches: Vec<Cache>,
}

struct Cache {
    place: Place,
    steps: BTreeMap<Digest, Made>,
    /// Of the manifest: their sizes.
    layers: BTreeMap<Digest, Descriptor>,
    /// It has failed: it is not asked again.
    broken: AtomicBool,
}

impl Import {
    /// Asks each cache what it has. One that can't be used is told and left out.
    pub async fn open(
        client: &Arc<Client>,
        store: &Arc<Store>,
        progress: &Arc<dyn Progress>,
        task: String,
        places: Vec<Place>,
    ) -> Self {
        let mut import = Self {
            client: client.clone(),
            handle: Handle::current(),
            store: store.clone(),
            progress: progress.clone(),
            task,
            caches: Vec::new(),
        };
        for place in places {
            match Cache::open(client, place.clone()).await {
                Ok(cache) => import.caches.push(cache),
                Err(cause) => import.tell(&place, &cause),
            }
        }
        import
    }

    fn tell(&self, place: &Place, cause: &ImportError) {
        self.progress.event(ProgressEvent::Warning {
            task: self.task.clone(),
            text: format!("nothing more is taken from the cache {place}: {cause}"),
        });
    }

    /// The result of the first cache that has one, with its layers in the store, and the
    /// cache's name.
    pub fn get(&self, key: &Digest) -> Option<(Made, String)> {
        for cache in &self.caches {
            let Some(made) = cache.steps.get(key) else {
                continue;
            };
            if cache.broken.load(Ordering::Relaxed) {
                continue;
            }
            match made.layers.iter().try_for_each(|l| self.take(cache, l)) {
                Ok(()) => return Some((made.clone(), cache.place.to_string())),
                Err(cause) if !cache.broken.swap(true, Ordering::Relaxed) => {
                    self.tell(&cache.place, &cause);
                }
                Err(_) => {}
            }
        }
        None
    }

    /// Sees to it that a layer is in the store and is what the cache says.
    fn take(&self, cache: &Cache, layer: &LayerRef) -> Result<(), ImportError> {
        let digest = layer.digest;
        let known = cache.layers.get(&digest);
        let known = known.filter(|known| known.size == layer.size);
        let known = known.ok_or(ImportError::NoLayer(digest))?;
        let blobs: Arc<dyn BlobWrite> = self.store.clone();
        if !blobs.contains(&digest).unwrap_or(false) {
            let fetch = cache.place.fetch(&self.client, known, blobs);
            self.handle.block_on(fetch)?;
        }
        let fail = |source| ImportError::Layer { digest, source };
        let blob = BlobRead::open(&*self.store, &digest);
        let blob = blob.map_err(|e| fail(LayerReadError::Io(e)))?;
        let blob = blob.ok_or(ImportError::NoLayer(digest))?;
        LayerReader::new(blob, Limits::IMAGE, Whiteouts::Interpret)
            .and_then(|reader| reader.finish(Some(&layer.diff_id)))
            .map(drop)
            .map_err(fail)
    }
}

impl Cache {
    async fn open(client: &Client, place: Place) -> Result<Self, ImportError> {
        let (manifest, config) = place.artifact(client).await?;
        let layers = manifest.layers.into_iter();
        Ok(Self {
            place,
            steps: document::read(&config)?,
            layers: layers.map(|layer| (layer.digest, layer)).collect(),
            broken: AtomicBool::new(false),
        })
    }
}

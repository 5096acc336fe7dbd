//! A stage's files between two steps: known by a key before they are known as a tree.
//!
//! A key says how the files came to be: base image, then each step with everything it
//! read. Trees are loaded or made only where a step really has to be carried out, so
//! that a build in which nothing changed touches no tree at all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use kiln_model::instance::TreePaths;
use kiln_model::{Digest, Hasher, Millis};
use kiln_oci::blob::BlobWrite;
use kiln_store::Store;
use kiln_store::tree::Tree;
use serde::{Deserialize, Serialize};

use super::ExecError;
use super::layer::LayerRef;
use crate::cache;
use crate::secrets::Finding;

/// Another one also where other secrets are looked for: what was found is part of a result.
const FORMAT: u32 = 5;

/// Files known by their key.
pub struct Files {
    pub key: Digest,
    recipe: Recipe,
    tree: OnceLock<Arc<Tree>>,
    written: OnceLock<Digest>,
    /// The tree is what the layers make, to the last detail.
    exact: bool,
}

enum Recipe {
    Empty,
    /// A tree of the store.
    Written(Digest),
    /// Some layers more than these.
    Layers {
        below: Arc<Files>,
        blobs: Vec<Digest>,
        /// Of all layers, down to the first.
        chain: Digest,
    },
    /// Given at birth.
    Given,
}

impl Files {
    fn new(key: Digest, recipe: Recipe) -> Arc<Self> {
        Arc::new(Self {
            key,
            recipe,
            tree: OnceLock::new(),
            written: OnceLock::new(),
            exact: true,
        })
    }

    pub fn empty() -> Arc<Self> {
        Self::new(Digest::of("kiln: no files"), Recipe::Empty)
    }

    /// An image's: `manifest` is the key.
    pub fn image(manifest: Digest, tree: Digest) -> Arc<Self> {
        Self::new(manifest, Recipe::Written(tree))
    }

    pub fn layers(key: Digest, below: Arc<Files>, blobs: Vec<Digest>, chain: Digest) -> Arc<Self> {
        let recipe = Recipe::Layers {
            below,
            blobs,
            chain,
        };
        Self::new(key, recipe)
    }

    /// `exact`: the tree is what layers make of one that is; `written`: its digest, if it is
    /// in the store.
    pub fn given(key: Digest, tree: Tree, exact: bool, written: Option<Digest>) -> Arc<Self> {
        Arc::new(Self {
            key,
            recipe: Recipe::Given,
            tree: OnceLock::from(Arc::new(tree)),
            written: written.map(OnceLock::from).unwrap_or_default(),
            exact,
        })
    }

    pub fn is_exact(&self) -> bool {
        self.exact
    }

    /// The tree, if it is at hand and what the layers make, and its digest if it is in the
    /// store.
    pub fn exact_tree(&self) -> Option<(Arc<Tree>, Option<Digest>)> {
        let tree = self.tree.get().filter(|_| self.exact)?;
        Some((tree.clone(), self.written.get().copied()))
    }

    pub fn tree(&self, store: &Store) -> Result<Arc<Tree>, ExecError> {
        if let Some(tree) = self.tree.get() {
            return Ok(tree.clone());
        }
        let tree = match &self.recipe {
            Recipe::Empty | Recipe::Given => Tree::new(),
            Recipe::Written(digest) => store.load_tree(digest).map_err(ExecError::store)?,
            Recipe::Layers {
                below,
                blobs,
                chain,
            } => match store.known_chain(chain).map_err(ExecError::store)? {
                Some((digest, tree)) => {
                    self.written.get_or_init(|| digest);
                    tree
                }
                None => {
                    let mut tree = (*below.tree(store)?).clone();
                    for blob in blobs {
                        let next = store.layer_tree(&tree, blob, None);
                        tree = next.map_err(ExecError::store)?;
                    }
                    tree
                }
            },
        };
        Ok(self.tree.get_or_init(|| Arc::new(tree)).clone())
    }

    /// The tree as something that can be mounted.
    pub fn mountable(&self, store: &Store) -> Result<TreePaths, ExecError> {
        let digest = match (&self.recipe, self.written.get()) {
            (Recipe::Written(digest), _) => *digest,
            (_, Some(digest)) => *digest,
            _ => {
                let digest = store
                    .write_tree(&*self.tree(store)?)
                    .map_err(ExecError::store)?;
                *self.written.get_or_init(|| digest)
            }
        };
        Ok(store.tree_paths(&digest))
    }
}

/// Builds a step's key.
pub struct Key(Hasher);

impl Key {
    /// `what` tells kinds of steps apart.
    pub fn new(what: &str, before: &Digest) -> Self {
        let mut key = Self(Hasher::new());
        key.field(b"kiln step 2")
            .field(what.as_bytes())
            .field(before.as_bytes());
        key
    }

    pub fn field(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    pub fn debug(&mut self, value: &impl std::fmt::Debug) -> &mut Self {
        self.field(format!("{value:?}").as_bytes())
    }

    pub fn hasher(&mut self) -> &mut Hasher {
        &mut self.0
    }

    pub fn finish(self) -> Digest {
        self.0.finish()
    }
}

/// What came of a step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Made {
    /// None: it changed nothing.
    pub layers: Vec<LayerRef>,
    /// What is in the layers that may not be in an image.
    pub findings: Vec<Finding>,
    pub took: Millis,
}

/// What is remembered of a step.
#[derive(Serialize, Deserialize)]
struct Record {
    format: u32,
    made: Made,
}

/// What a file of the cache says; `None`: nothing that this kiln understands.
pub(crate) fn remembered(path: &Path) -> Option<Made> {
    let bytes = fs::read(path).ok()?;
    let record: Record = serde_json::from_slice(&bytes).ok()?;
    (record.format == FORMAT).then_some(record.made)
}

/// The steps' results: `cache/steps/<key>.json`. A result whose layer has left the store
/// counts as unknown.
pub struct StepCache {
    folder: PathBuf,
}

impl StepCache {
    /// Below the builder's cache folder.
    pub const FOLDER: &str = "steps";

    pub fn new(cache: &Path) -> Self {
        Self {
            folder: cache.join(Self::FOLDER),
        }
    }

    fn path(&self, key: &Digest) -> PathBuf {
        self.folder.join(format!("{}.json", key.hex()))
    }

    /// `None`: unknown.
    pub fn get(&self, key: &Digest, store: &Store) -> Option<Made> {
        let path = self.path(key);
        let made = remembered(&path)?;
        let there = |layer: &LayerRef| store.contains(&layer.digest).unwrap_or(false);
        let known = made.layers.iter().all(there);
        if known {
            cache::used(&path);
        }
        known.then_some(made)
    }

    pub fn put(&self, key: &Digest, made: Made) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let record = Record {
            format: FORMAT,
            made,
        };
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        io::Write::write_all(&mut file, &serde_json::to_vec(&record)?)?;
        file.persist(self.path(key)).map_err(|e| e.error)?;
        Ok(())
    }
}

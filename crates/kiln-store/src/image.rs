//! Images: a manifest, its blobs, and the tree that its layers make.
//!
//! # Formats
//! - `images/<manifest's sha256>.json`: a [`Record`], version 1. Written last and
//!   durably: where it is, everything it names was there.
//! - `chains/<chain id's hex>`: the digest of the tree that the layers up to this one
//!   make (image-spec v1.1, config.md, "Layer ChainID"). A cache: may be missing or point
//!   at nothing.

use kiln_model::{Digest, ImageConfig};
use kiln_oci::blob::{ReadSmallError, read_small};
use kiln_oci::manifest::{
    ConfigDocument, ConfigError, Document, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, Manifest,
    ManifestError, parse, parse_config,
};
use serde::{Deserialize, Serialize};

use crate::journal;
use crate::layer::LayerError;
use crate::layout::{PathError, Shelf, read_file};
use crate::store::Store;
use crate::tree::Tree;
use crate::trees::WriteTreeError;

/// One layer of an image, base first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayer {
    /// The blob.
    pub digest: Digest,
    /// Its content without compression.
    pub diff_id: Digest,
    /// The blob's bytes.
    pub size: u64,
}

/// An image that is wholly in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    pub manifest: Digest,
    pub config: ImageConfig,
    pub config_digest: Digest,
    pub tree: Digest,
    pub layers: Vec<ImageLayer>,
    /// Bytes of manifest, configuration and layers together.
    pub size: u64,
    /// RFC 3339, as the configuration says it.
    pub created: Option<String>,
    /// A blob that says which packages it consists of, once somebody has looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packages: Option<Digest>,
}

impl Image {
    /// Manifest, configuration, layers, and what is known of its packages.
    pub fn blobs(&self) -> impl Iterator<Item = Digest> {
        let own = [self.manifest, self.config_digest];
        let layers = self.layers.iter().map(|l| l.digest);
        own.into_iter().chain(layers).chain(self.packages)
    }
}

/// What the layers of an image that was just built make.
#[derive(Clone, Copy)]
pub enum BuiltTree<'t> {
    New(&'t Tree),
    /// In the store, under a lease of the caller's.
    Written(Digest),
}

/// One line of a list of images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    pub manifest: Digest,
    pub tree: Digest,
    pub platform: String,
    /// As [`Image::size`].
    pub size: u64,
    pub layers: usize,
    pub created: Option<String>,
}

/// What `images/…json` holds.
#[derive(Serialize, Deserialize)]
pub(crate) struct Record {
    format: u32,
    image: Image,
}

const RECORD_FORMAT: u32 = 1;

/// Why an image's record could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("the record of image {manifest} is damaged: {source}; run `kiln fsck --repair`")]
    Damaged {
        manifest: Digest,
        #[source]
        source: serde_json::Error,
    },
    #[error(
        "the record of image {manifest} has format {found}, this kiln knows {RECORD_FORMAT}: use a newer kiln"
    )]
    Format { manifest: Digest, found: u32 },
}

/// Why an image could not be added.
#[derive(Debug, thiserror::Error)]
pub enum AddImageError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(transparent)]
    Blob(#[from] ReadSmallError),
    #[error("blob {digest} is no image manifest: {source}")]
    Manifest {
        digest: Digest,
        #[source]
        source: ManifestError,
    },
    #[error(
        "{digest} is an index of several platforms' images ({platforms}): choose one of its manifests"
    )]
    Index { digest: Digest, platforms: String },
    #[error("the configuration {digest} can't be used: {source}")]
    Config {
        digest: Digest,
        #[source]
        source: ConfigError,
    },
    #[error("image {manifest} has {layers} layers, but its configuration knows {diff_ids}")]
    LayerCount {
        manifest: Digest,
        layers: usize,
        diff_ids: usize,
    },
    #[error("blob {digest} of image {manifest} is not in the store")]
    MissingBlob { manifest: Digest, digest: Digest },
    #[error("blob {digest} has {found} bytes, but the manifest says {expected}")]
    BlobSize {
        digest: Digest,
        expected: u64,
        found: u64,
    },
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error(transparent)]
    Tree(#[from] WriteTreeError),
    #[error("the record of image {manifest} could not be made: {source}")]
    Record {
        manifest: Digest,
        #[source]
        source: serde_json::Error,
    },
}

impl Store {
    /// Makes an image of a manifest whose blobs are all in the store: verifies them,
    /// applies the layers (from the longest run of them already known), writes the tree
    /// and records the image durably. Adding it again only looks that all is there.
    pub fn add_image(&self, manifest: &Digest) -> Result<Image, AddImageError> {
        self.add(manifest, None)
    }

    /// The same of an image whose layers were written from a tree, which saves reading
    /// them again, and whose packages have been looked for. The caller vouches for it that
    /// the layers make exactly this tree.
    pub fn add_built_image(
        &self,
        manifest: &Digest,
        tree: BuiltTree<'_>,
        packages: Digest,
    ) -> Result<Image, AddImageError> {
        self.add(manifest, Some((tree, packages)))
    }

    fn add(
        &self,
        manifest: &Digest,
        built: Option<(BuiltTree<'_>, Digest)>,
    ) -> Result<Image, AddImageError> {
        let _lease = self.lease()?;
        let bytes = read_small(self, manifest, MAX_MANIFEST_BYTES)?;
        let parsed = parse_manifest(manifest, &bytes)?;
        self.keep_blobs(manifest, &parsed)?;
        if let Ok(Some(image)) = self.image(manifest)
            && self.reuse(Shelf::Trees, &image.tree, None)?.is_some()
            && self.reuse(Shelf::Images, manifest, None)?.is_some()
        {
            return Ok(image);
        }
        let config = self.read_config(manifest, &parsed)?;
        let tree = match built {
            Some((BuiltTree::New(tree), _)) => self.keep_chain(tree, &config.diff_ids)?,
            Some((BuiltTree::Written(digest), _)) => digest,
            None => self.build_tree(&parsed, &config.diff_ids)?,
        };
        let layers =
            (parsed.layers.iter().zip(&config.diff_ids)).map(|(layer, diff_id)| ImageLayer {
                digest: layer.digest,
                diff_id: *diff_id,
                size: layer.size,
            });
        let layers: Vec<ImageLayer> = layers.collect();
        let image = Image {
            manifest: *manifest,
            config: config.config,
            config_digest: parsed.config.digest,
            tree,
            size: layers.iter().map(|layer| layer.size).sum::<u64>()
                + parsed.config.size
                + bytes.len() as u64,
            layers,
            created: config.created,
            packages: built.map(|(_, packages)| packages),
        };
        self.record(&image)?;
        Ok(image)
    }

    /// Records which blob of the store says what packages `image` consists of.
    pub fn attach_packages(&self, image: &Image, blob: Digest) -> Result<Image, AddImageError> {
        let image = Image {
            packages: Some(blob),
            ..image.clone()
        };
        self.record(&image)?;
        Ok(image)
    }

    /// A recorded image; `None`: there is none of this manifest.
    pub fn image(&self, manifest: &Digest) -> Result<Option<Image>, ImageError> {
        let Some(bytes) = read_file(&self.layout.path(Shelf::Images, manifest))? else {
            return Ok(None);
        };
        let damaged = |source| ImageError::Damaged {
            manifest: *manifest,
            source,
        };
        let record: Record = serde_json::from_slice(&bytes).map_err(damaged)?;
        if record.format != RECORD_FORMAT {
            return Err(ImageError::Format {
                manifest: *manifest,
                found: record.format,
            });
        }
        Ok(Some(record.image))
    }

    /// Every recorded image, by its manifest's digest.
    pub fn images(&self) -> Result<Vec<ImageSummary>, ImageError> {
        let mut images = Vec::new();
        for (manifest, _) in self.layout.list(Shelf::Images)? {
            if let Some(image) = self.image(&manifest)? {
                images.push(ImageSummary {
                    manifest,
                    tree: image.tree,
                    platform: image.config.platform,
                    size: image.size,
                    layers: image.layers.len(),
                    created: image.created,
                });
            }
        }
        Ok(images)
    }

    /// Looks that every blob is there with the right size, and keeps it under the
    /// leases of now.
    fn keep_blobs(&self, manifest: &Digest, parsed: &Manifest) -> Result<(), AddImageError> {
        self.reuse(Shelf::Blobs, manifest, None)?;
        for blob in std::iter::once(&parsed.config).chain(&parsed.layers) {
            let digest = blob.digest;
            match self.reuse(Shelf::Blobs, &digest, None)? {
                Some(found) if found == blob.size => {}
                Some(found) => {
                    return Err(AddImageError::BlobSize {
                        digest,
                        expected: blob.size,
                        found,
                    });
                }
                None => {
                    return Err(AddImageError::MissingBlob {
                        manifest: *manifest,
                        digest,
                    });
                }
            }
        }
        Ok(())
    }

    fn read_config(
        &self,
        manifest: &Digest,
        parsed: &Manifest,
    ) -> Result<ConfigDocument, AddImageError> {
        let digest = parsed.config.digest;
        let bytes = read_small(self, &digest, MAX_CONFIG_BYTES)?;
        let config =
            parse_config(&bytes).map_err(|source| AddImageError::Config { digest, source })?;
        if config.diff_ids.len() != parsed.layers.len() {
            return Err(AddImageError::LayerCount {
                manifest: *manifest,
                layers: parsed.layers.len(),
                diff_ids: config.diff_ids.len(),
            });
        }
        Ok(config)
    }

    fn build_tree(&self, parsed: &Manifest, diff_ids: &[Digest]) -> Result<Digest, AddImageError> {
        let chains = chain_ids(diff_ids);
        let mut done = 0;
        let mut tree = Tree::new();
        for (index, chain) in chains.iter().enumerate().rev() {
            if let Some((digest, known)) = self.known_chain(chain)? {
                if index + 1 == chains.len() {
                    return Ok(digest);
                }
                (done, tree) = (index + 1, known);
                break;
            }
        }
        for (layer, diff_id) in parsed.layers.iter().zip(diff_ids).skip(done) {
            tree = self.layer_tree(&tree, &layer.digest, Some(diff_id))?;
        }
        self.keep_chain(&tree, diff_ids)
    }

    /// Writes the tree that these layers make, and remembers that they do.
    fn keep_chain(&self, tree: &Tree, diff_ids: &[Digest]) -> Result<Digest, AddImageError> {
        let Some(chain) = chain_id(diff_ids) else {
            return Ok(self.write_tree(tree)?);
        };
        if let Some(digest) = self.chain(&chain)?
            && self.check_objects(tree).is_ok()
        {
            return Ok(digest);
        }
        let digest = self.write_tree(tree)?;
        self.remember_chain(&chain, &digest)?;
        Ok(digest)
    }

    /// Remembers what tree the layers of a chain make. The caller vouches for it.
    pub fn remember_chain(&self, chain: &Digest, tree: &Digest) -> Result<(), PathError> {
        if self.chain(chain)? == Some(*tree) {
            return Ok(());
        }
        let text = format!("{tree}\n");
        self.replace(&self.layout.chain(chain), text.as_bytes())
    }

    /// The tree of a chain, if it is known, whole, and has all its objects.
    pub fn known_chain(&self, chain: &Digest) -> Result<Option<(Digest, Tree)>, PathError> {
        let Some(digest) = self.chain(chain)? else {
            return Ok(None);
        };
        let Ok(tree) = self.load_tree(&digest) else {
            return Ok(None);
        };
        Ok(self.check_objects(&tree).is_ok().then_some((digest, tree)))
    }

    /// What a chain's tree is called, if there is one.
    fn chain(&self, chain: &Digest) -> Result<Option<Digest>, PathError> {
        let Some(bytes) = read_file(&self.layout.chain(chain))? else {
            return Ok(None);
        };
        let digest = (std::str::from_utf8(&bytes).ok()).and_then(|text| text.trim().parse().ok());
        let Some(digest) = digest else {
            return Ok(None);
        };
        let there = self.reuse(Shelf::Trees, &digest, None)?.is_some();
        Ok(there.then_some(digest))
    }

    fn record(&self, image: &Image) -> Result<(), AddImageError> {
        let record = Record {
            format: RECORD_FORMAT,
            image: image.clone(),
        };
        let bytes = serde_json::to_vec(&record).map_err(|source| AddImageError::Record {
            manifest: image.manifest,
            source,
        })?;
        // The record is a promise: first everything it names.
        self.sync()?;
        let _lock = self.layout.publishing()?;
        journal::note(&self.layout, Shelf::Images, &image.manifest)?;
        let path = self.layout.path(Shelf::Images, &image.manifest);
        Ok(self.replace(&path, &bytes)?)
    }
}

fn parse_manifest(digest: &Digest, bytes: &[u8]) -> Result<Manifest, AddImageError> {
    let refuse = |source| AddImageError::Manifest {
        digest: *digest,
        source,
    };
    match parse(bytes, None).map_err(refuse)? {
        Document::Manifest(manifest) => {
            manifest.check_runnable().map_err(refuse)?;
            Ok(*manifest)
        }
        Document::Index(index) => Err(AddImageError::Index {
            digest: *digest,
            platforms: index.platforms(),
        }),
    }
}

/// Of all layers together, base first; `None`: there are none (image-spec v1.1, config.md,
/// "Layer ChainID").
pub fn chain_id(diff_ids: &[Digest]) -> Option<Digest> {
    chain_ids(diff_ids).pop()
}

/// One for every layer.
fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chains: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        chains.push(match chains.last() {
            None => *diff_id,
            Some(below) => Digest::of(format!("{below} {diff_id}")),
        });
    }
    chains
}

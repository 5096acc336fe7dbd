//! Images: a manifest whose layers have become one tree.

use std::io;

use kiln_model::{Digest, ImageConfig};
use kiln_oci::manifest::{self, Document, Manifest};
use serde::{Deserialize, Serialize};

use crate::tree::Tree;
use crate::{Store, StoreError, content};

/// An image that can be mounted; the record in `images/`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    pub manifest: Digest,
    pub config_digest: Digest,
    pub config: ImageConfig,
    pub tree: Digest,
    /// Base first.
    pub layers: Vec<ImageLayer>,
    /// Manifest, configuration and layers as transferred, in bytes.
    pub size: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayer {
    pub digest: Digest,
    pub diff_id: Digest,
    /// Compressed, in bytes.
    pub size: u64,
}

impl Store {
    /// Makes an image of a manifest whose blobs are all here. Done before: returns what
    /// there is. Everything is on disk when it returns.
    pub fn add_image(&self, manifest: &Digest) -> Result<Image, StoreError> {
        if let Some(image) = self.image(manifest)? {
            return Ok(image);
        }
        let bad = |cause: String| StoreError::BadImage {
            manifest: *manifest,
            cause,
        };
        let bytes = self
            .read_blob(manifest, manifest::MAX_MANIFEST_BYTES)?
            .ok_or(StoreError::Missing {
                what: "the manifest",
                digest: *manifest,
            })?;
        let parsed = match manifest::parse(&bytes, None).map_err(|e| bad(e.to_string()))? {
            Document::Manifest(manifest) => manifest,
            _ => return Err(bad("it is an index; choose one of its manifests".into())),
        };
        parsed.check_runnable().map_err(|e| bad(e.to_string()))?;
        let document = self.config_of(&parsed, &bad)?;
        if document.diff_ids.len() != parsed.layers.len() {
            return Err(bad(format!(
                "its configuration names {} layers, its manifest {}",
                document.diff_ids.len(),
                parsed.layers.len()
            )));
        }
        let layers: Vec<ImageLayer> = parsed
            .layers
            .iter()
            .zip(&document.diff_ids)
            .map(|(l, diff_id)| ImageLayer {
                digest: l.digest,
                diff_id: *diff_id,
                size: l.size,
            })
            .collect();
        let tree = self.stack(&layers)?;
        let image = Image {
            manifest: *manifest,
            config_digest: parsed.config.digest,
            config: document.config,
            tree,
            size: bytes.len() as u64
                + parsed.config.size
                + layers.iter().map(|l| l.size).sum::<u64>(),
            layers,
        };
        self.sync()?;
        self.record(&image)?;
        Ok(image)
    }

    /// As [`add_image`](Self::add_image) for one that was built here and whose tree is
    /// known: the layers are not read again.
    pub fn add_built_image(&self, image: &Image) -> Result<(), StoreError> {
        self.sync()?;
        self.record(image)
    }

    fn config_of(
        &self,
        parsed: &Manifest,
        bad: &dyn Fn(String) -> StoreError,
    ) -> Result<manifest::ConfigDocument, StoreError> {
        let digest = parsed.config.digest;
        let bytes =
            self.read_blob(&digest, manifest::MAX_CONFIG_BYTES)?
                .ok_or(StoreError::Missing {
                    what: "the image configuration",
                    digest,
                })?;
        manifest::parse_config(&bytes).map_err(|e| bad(e.to_string()))
    }

    fn record(&self, image: &Image) -> Result<(), StoreError> {
        let path = self
            .folder
            .join("images")
            .join(format!("{}.json", image.manifest.hex()));
        let text =
            serde_json::to_vec(image).map_err(|e| StoreError::io(&path)(io::Error::other(e)))?;
        content::place(&self.folder, &path, &text).map_err(StoreError::io(&path))
    }

    /// The tree of a stack of layers; each prefix is remembered by its chain id
    /// (image-spec v1.1, config.md, "Layer ChainID").
    fn stack(&self, layers: &[ImageLayer]) -> Result<Digest, StoreError> {
        let mut chain: Option<Digest> = None;
        let chains: Vec<Digest> = layers
            .iter()
            .map(|layer| {
                let id = match chain {
                    None => layer.diff_id,
                    Some(below) => Digest::of(format!("{below} {}", layer.diff_id)),
                };
                chain = Some(id);
                id
            })
            .collect();
        let mut known = None;
        for (n, id) in chains.iter().enumerate().rev() {
            if let Some(tree) = self.chain_tree(id)? {
                known = Some((n + 1, tree));
                break;
            }
        }
        let (start, mut digest) = match known {
            Some((n, digest)) if n == layers.len() => return Ok(digest),
            Some((n, digest)) => (n, Some(digest)),
            None => (0, None),
        };
        let mut tree = match &digest {
            Some(digest) => self.load_tree(digest)?,
            None => Tree::new(),
        };
        for (layer, chain) in layers.iter().zip(&chains).skip(start) {
            tree = self.apply_layer(&tree, &layer.digest, Some(&layer.diff_id))?;
            let written = self.write_tree(&tree)?;
            self.remember_chain(chain, &written)?;
            digest = Some(written);
        }
        match digest {
            Some(digest) => Ok(digest),
            None => self.write_tree(&tree),
        }
    }

    fn chain_tree(&self, chain: &Digest) -> Result<Option<Digest>, StoreError> {
        let path = self.folder.join("layers").join(chain.hex());
        match std::fs::read_to_string(&path) {
            // A tree that is gone, or a damaged line, only means doing the work again.
            Ok(text) => Ok(text
                .trim()
                .parse()
                .ok()
                .filter(|d: &Digest| self.tree_path(d).exists())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(StoreError::io(&path)(e)),
        }
    }

    fn remember_chain(&self, chain: &Digest, tree: &Digest) -> Result<(), StoreError> {
        let path = self.folder.join("layers").join(chain.hex());
        content::place(&self.folder, &path, tree.to_string().as_bytes())
            .map_err(StoreError::io(&path))
    }

    /// The image of a manifest, if it was added.
    pub fn image(&self, manifest: &Digest) -> Result<Option<Image>, StoreError> {
        let path = self
            .folder
            .join("images")
            .join(format!("{}.json", manifest.hex()));
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(StoreError::io(&path)(e)),
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| StoreError::Damaged {
                what: "the image record",
                digest: *manifest,
                cause: e.to_string(),
            })
    }

    /// All images, by manifest digest.
    pub fn images(&self) -> Result<Vec<Image>, StoreError> {
        let folder = self.folder.join("images");
        let mut manifests = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(StoreError::io(&folder))? {
            let name = entry.map_err(StoreError::io(&folder))?.file_name();
            let hex = name.to_string_lossy();
            if let Some(digest) = hex
                .strip_suffix(".json")
                .and_then(|h| Digest::from_hex(h).ok())
            {
                manifests.push(digest);
            }
        }
        manifests.sort();
        let mut images = Vec::new();
        for manifest in manifests {
            images.extend(self.image(&manifest)?);
        }
        Ok(images)
    }
}

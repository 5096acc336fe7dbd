//! Images of the store as a build needs them, and the image it makes.

use std::io::Read;
use std::sync::Arc;

use kiln_model::Digest;
use kiln_oci::blob::{BlobRead, BlobWrite};
use kiln_oci::manifest::{
    ConfigDocument, Descriptor, Manifest, media_type, parse_config, write_config,
};
use kiln_store::{BuiltTree, Store, Tree};

use super::{BuildError, Builder};
use crate::containerfile::{self, Instruction, Span};
use crate::exec::layer::LayerRef;
use crate::exec::state::Files;
use crate::packages;

/// A manifest or configuration is read up to this many bytes.
const MAX_DOCUMENT: u64 = 8 << 20;

/// What an image of the store brings into a build.
pub(super) struct Image {
    pub files: Arc<Files>,
    pub layers: Vec<LayerRef>,
    pub document: ConfigDocument,
}

impl Builder {
    /// The ONBUILD instructions of an image; `span`: the FROM that has them run.
    pub(super) fn triggers(
        &self,
        name: &str,
        manifest: &Digest,
        span: Span,
    ) -> Result<Vec<Instruction>, BuildError> {
        let mut all = Vec::new();
        for text in self.image(name, manifest)?.document.on_build {
            let parsed = containerfile::parse_trigger(&text, span);
            all.extend(parsed.map_err(|errors| BuildError::OnBuild {
                image: name.to_owned(),
                text,
                errors,
            })?);
        }
        Ok(all)
    }

    pub(super) fn image(&self, name: &str, manifest: &Digest) -> Result<Image, BuildError> {
        read(&self.store, name, manifest)
    }

    /// Puts an image together; `tree`: what its layers make, where that is at hand, and its
    /// digest where it is in the store.
    pub(super) fn keep(
        &self,
        (document, layers): (ConfigDocument, Vec<LayerRef>),
        tree: Option<(Arc<Tree>, Option<Digest>)>,
    ) -> Result<Digest, Box<dyn std::error::Error + Send + Sync>> {
        let config = write_config(&document);
        let (digest, size) = self.store.write(None, &mut config.as_slice())?;
        let mut descriptors = Vec::new();
        for layer in &layers {
            let media_type = self.layer_type(layer)?;
            descriptors.push(Descriptor::new(media_type, layer.digest, layer.size));
        }
        let config = Descriptor::new(media_type::OCI_CONFIG, digest, size);
        let manifest = Manifest::new(config, descriptors).to_bytes();
        let (digest, _) = self.store.write(None, &mut manifest.as_slice())?;
        match tree {
            Some((tree, written)) => {
                let packages = packages::write(&self.store, &tree)?;
                let built = match written {
                    Some(written) => BuiltTree::Written(written),
                    None => BuiltTree::New(&tree),
                };
                self.store.add_built_image(&digest, built, packages)?;
            }
            None => drop(self.store.add_image(&digest)?),
        }
        Ok(digest)
    }

    /// By the blob's first bytes: a base's layers may be compressed otherwise.
    fn layer_type(
        &self,
        layer: &LayerRef,
    ) -> Result<&'static str, Box<dyn std::error::Error + Send + Sync>> {
        let blob = BlobRead::open(&*self.store, &layer.digest)?;
        let blob = blob.ok_or_else(|| format!("the layer {} is not in the store", layer.digest))?;
        let mut first = Vec::new();
        blob.take(6).read_to_end(&mut first)?;
        Ok(match kiln_oci::layer::Compression::sniff(&first) {
            kiln_oci::layer::Compression::Gzip => media_type::OCI_LAYER_GZIP,
            kiln_oci::layer::Compression::Zstd => media_type::OCI_LAYER_ZSTD,
            _ => media_type::OCI_LAYER,
        })
    }
}

/// The image of a store; `name`: for people.
pub(super) fn read(store: &Store, name: &str, manifest: &Digest) -> Result<Image, BuildError> {
    let fail = |cause: Box<dyn std::error::Error + Send + Sync>| BuildError::Keep {
        name: name.to_owned(),
        cause,
    };
    let found = store.image(manifest).map_err(|e| fail(Box::new(e)))?;
    let image = found.ok_or_else(|| BuildError::Unresolved {
        image: name.to_owned(),
    })?;
    let mut bytes = Vec::new();
    let config = BlobRead::open(store, &image.config_digest);
    let config = config.map_err(|e| fail(Box::new(e)))?;
    let config = config.ok_or_else(|| fail("its configuration is not in the store".into()))?;
    config
        .take(MAX_DOCUMENT)
        .read_to_end(&mut bytes)
        .map_err(|e| fail(Box::new(e)))?;
    let document = parse_config(&bytes).map_err(|e| fail(Box::new(e)))?;
    let layers = image.layers.iter().map(|layer| LayerRef {
        digest: layer.digest,
        size: layer.size,
        diff_id: layer.diff_id,
    });
    Ok(Image {
        files: Files::image(*manifest, image.tree),
        layers: layers.collect(),
        document,
    })
}

//! What `docker save` wrote before it wrote OCI layouts, and podman's docker-archive.

use std::io::{Cursor, Read};

use kiln_model::Digest;
use serde::Deserialize;

use super::{ArchiveError, Importer, same_name};
use crate::blob::Expected;
use crate::layer::Compression;
use crate::manifest::{
    Descriptor, MAX_CONFIG_BYTES, MAX_LAYERS, MAX_MANIFEST_BYTES, Manifest, check_image,
    media_type, parse_config,
};

/// One image of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl SavedImage {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }

    fn layers(&self) -> &[String] {
        self.layers.as_deref().unwrap_or_default()
    }
}

pub(super) fn import(importer: &Importer<'_>) -> Result<Digest, ArchiveError> {
    let bytes = importer
        .opened
        .read_small("manifest.json", MAX_MANIFEST_BYTES)?;
    let images: Vec<SavedImage> =
        serde_json::from_slice(&bytes).map_err(|e| importer.opened.unusable("manifest.json", e))?;
    let image = choose(importer, &images)?;
    if image.layers().len() > MAX_LAYERS {
        let problem = format!("it lists more than {MAX_LAYERS} layers");
        return Err(importer.opened.unusable("manifest.json", problem));
    }
    let config = importer
        .opened
        .read_small(&image.config, MAX_CONFIG_BYTES)?;
    let manifest = make_manifest(importer, image, &config)?;
    check_image(&manifest, &config, importer.what.platform)
        .map_err(|source| importer.image_error(source))?;
    let taken = |member: &str, content: &[u8]| {
        let content: &mut dyn Read = &mut &content[..];
        let opened = &importer.opened;
        opened.write((member, content), None, importer.blobs)
    };
    taken(&image.config, &config)?;
    let (digest, _) = taken("manifest.json", &manifest.to_bytes())?;
    Ok(digest)
}

fn choose<'i>(
    importer: &Importer<'_>,
    images: &'i [SavedImage],
) -> Result<&'i SavedImage, ArchiveError> {
    let tags = || -> Vec<String> { images.iter().flat_map(SavedImage::tags).cloned().collect() };
    match (importer.what.name, images) {
        (_, []) => Err(importer
            .opened
            .unusable("manifest.json", "it lists no image")),
        (Some(name), _) => images
            .iter()
            .find(|image| image.tags().iter().any(|tag| same_name(tag, name)))
            .ok_or_else(|| importer.opened.no_such_name(name, &tags())),
        (None, [only]) => Ok(only),
        (None, _) => Err(importer.opened.ambiguous(&tags())),
    }
}

/// Takes the layers in, and makes the manifest that the archive lacks.
fn make_manifest(
    importer: &Importer<'_>,
    image: &SavedImage,
    config: &[u8],
) -> Result<Manifest, ArchiveError> {
    let parsed = parse_config(config).map_err(|source| importer.image_error(source.into()))?;
    let mut layers = Vec::with_capacity(image.layers().len());
    for (at, member) in image.layers().iter().enumerate() {
        layers.push(take_layer(importer, member, parsed.diff_ids.get(at))?);
    }
    let config = Descriptor::new(
        media_type::OCI_CONFIG,
        Digest::of(config),
        config.len() as u64,
    );
    Ok(Manifest::new(config, layers))
}

/// Uncompressed layers are verified here; compressed ones when they are read.
fn take_layer(
    importer: &Importer<'_>,
    member: &str,
    diff_id: Option<&Digest>,
) -> Result<Descriptor, ArchiveError> {
    let (mut content, size) = importer.opened.open(member)?;
    let mut first = Vec::new();
    content
        .by_ref()
        .take(6)
        .read_to_end(&mut first)
        .map_err(|source| ArchiveError::Member {
            path: importer.what.path.into(),
            member: member.into(),
            source,
        })?;
    let compression = Compression::sniff(&first);
    let media_type = match compression {
        Compression::None => media_type::OCI_LAYER,
        Compression::Gzip => media_type::OCI_LAYER_GZIP,
        Compression::Zstd => media_type::OCI_LAYER_ZSTD,
        Compression::Xz => {
            return Err(importer
                .opened
                .unusable(member, "layers compressed with xz are not supported"));
        }
    };
    let expected = diff_id
        .filter(|_| compression == Compression::None)
        .map(|digest| Expected {
            digest: *digest,
            size,
        });
    let mut whole = Cursor::new(first).chain(content);
    let (digest, size) = importer
        .opened
        .write((member, &mut whole), expected, importer.blobs)?;
    Ok(Descriptor::new(media_type, digest, size))
}

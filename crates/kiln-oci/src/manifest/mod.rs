//! Manifests, indexes, descriptors and image configurations: parse with bounds, write
//! with stable bytes (OCI image-spec v1.1; Docker's "image manifest version 2,
//! schema 2" has the same shape under other media types).

mod config;
mod image;
pub mod media_type;

use std::collections::BTreeMap;

use kiln_model::Digest;
use serde::{Deserialize, Serialize};

pub use config::{ConfigDocument, ConfigError, History, parse_config, timestamp, write_config};
pub use image::{ImageError, check_image};

use crate::platform::Platform;

/// Longest manifest or index taken, in bytes: what every registry must accept
/// (distribution-spec v1.1, "Pushing Manifests").
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Longest image configuration taken, in bytes. Docker's own limit is 4 MiB.
pub const MAX_CONFIG_BYTES: u64 = 8 << 20;
/// Most layers of one image. Docker's own limit is 127.
pub const MAX_LAYERS: usize = 1000;
/// Most entries of one index.
pub const MAX_INDEX_ENTRIES: usize = 1000;

/// Points at a blob (descriptor.md). Unknown fields are dropped, so a parsed
/// descriptor must never be written back in place of its original.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

impl Descriptor {
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.into(),
            digest,
            size,
            artifact_type: None,
            annotations: BTreeMap::new(),
            platform: None,
        }
    }
}

/// One image for one platform (manifest.md).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    pub config: Descriptor,
    /// Base first.
    pub layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

/// Images of several platforms under one digest (image-index.md).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    pub manifests: Vec<Descriptor>,
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

/// What a manifest's bytes turn out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    Manifest(Box<Manifest>),
    Index(Index),
}

impl Document {
    /// The manifest of an artifact whose configuration is of this media type.
    pub fn artifact(self, media_type: &str) -> Result<Manifest, ManifestError> {
        let found = match self {
            Self::Manifest(manifest) if manifest.config.media_type == media_type => {
                return Ok(*manifest);
            }
            Self::Manifest(manifest) => manifest.config.media_type,
            Self::Index(index) => index.media_type.unwrap_or_default(),
        };
        Err(ManifestError::OtherArtifact {
            wanted: media_type.into(),
            found,
        })
    }
}

/// Why bytes are not a manifest or index that kiln can use.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("it is {size} bytes long; manifests may have {MAX_MANIFEST_BYTES}")]
    TooLarge { size: u64 },
    #[error("it is not a manifest: {0}")]
    Json(#[from] serde_json::Error),
    #[error(
        "it is in Docker's schema 1, which carries no verifiable layers; push the image again with a Docker of 2017 or later"
    )]
    Schema1,
    #[error("its schemaVersion is {found}, not 2")]
    SchemaVersion { found: u64 },
    /// Readers could disagree about what it is (CVE-2021-41190).
    #[error("it has both `layers` and `manifests`, so it is ambiguous; it is refused")]
    Ambiguous,
    #[error("it has neither `layers` nor `manifests`; its media type is `{media_type}`")]
    Neither { media_type: String },
    #[error("it says it is `{media_type}`, but its content is {content}")]
    MediaTypeMismatch {
        media_type: String,
        content: &'static str,
    },
    #[error("it has {found} {what}, more than the {limit} that kiln takes")]
    TooMany {
        what: &'static str,
        found: usize,
        limit: usize,
    },
    #[error("it is `{found}`, not `{wanted}`")]
    OtherArtifact { wanted: String, found: String },
    #[error(
        "its {what} has media type `{media_type}`, which kiln does not support; this is not a runnable container image"
    )]
    Unsupported {
        what: &'static str,
        media_type: String,
    },
}

/// Parses the bytes of a manifest or index.
///
/// `content_type` is what the transport called them, if it said; a document that
/// calls itself otherwise is refused.
pub fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Document, ManifestError> {
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(ManifestError::TooLarge {
            size: bytes.len() as u64,
        });
    }
    let shape: Shape = serde_json::from_slice(bytes)?;
    match shape.schema_version {
        2 => {}
        1 => return Err(ManifestError::Schema1),
        found => return Err(ManifestError::SchemaVersion { found }),
    }
    let document = match (shape.layers.is_some(), shape.manifests.is_some()) {
        (true, true) => return Err(ManifestError::Ambiguous),
        (true, false) => Document::Manifest(Box::new(serde_json::from_slice(bytes)?)),
        (false, true) => Document::Index(serde_json::from_slice(bytes)?),
        (false, false) => {
            return Err(ManifestError::Neither {
                media_type: shape.media_type.unwrap_or_default(),
            });
        }
    };
    let content_type =
        content_type.filter(|t| media_type::is_manifest(t) || media_type::is_index(t));
    for said in [shape.media_type.as_deref(), content_type]
        .into_iter()
        .flatten()
    {
        check_media_type(said, &document)?;
    }
    check_counts(&document)?;
    Ok(document)
}

/// The parts that tell a manifest from an index, without their content.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: u64,
    media_type: Option<String>,
    layers: Option<serde::de::IgnoredAny>,
    manifests: Option<serde::de::IgnoredAny>,
}

fn check_media_type(said: &str, document: &Document) -> Result<(), ManifestError> {
    let (agrees, content) = match document {
        Document::Manifest(_) => (media_type::is_manifest(said), "an image manifest"),
        Document::Index(_) => (media_type::is_index(said), "an image index"),
    };
    if agrees {
        return Ok(());
    }
    Err(ManifestError::MediaTypeMismatch {
        media_type: said.into(),
        content,
    })
}

fn check_counts(document: &Document) -> Result<(), ManifestError> {
    let (what, found, limit) = match document {
        Document::Manifest(m) => ("layers", m.layers.len(), MAX_LAYERS),
        Document::Index(i) => ("entries", i.manifests.len(), MAX_INDEX_ENTRIES),
    };
    if found > limit {
        return Err(ManifestError::TooMany { what, found, limit });
    }
    Ok(())
}

impl Manifest {
    /// An OCI image manifest over `config` and `layers` (base first).
    pub fn new(config: Descriptor, layers: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: Some(media_type::OCI_MANIFEST.into()),
            artifact_type: None,
            config,
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        }
    }

    /// Refuses what is not a container image: Helm charts, WASM modules, signatures,
    /// encrypted layers.
    pub fn check_runnable(&self) -> Result<(), ManifestError> {
        if !media_type::is_config(&self.config.media_type) {
            return Err(ManifestError::Unsupported {
                what: "configuration",
                media_type: self.config.media_type.clone(),
            });
        }
        match self
            .layers
            .iter()
            .find(|l| !media_type::is_layer(&l.media_type))
        {
            None => Ok(()),
            Some(layer) => Err(ManifestError::Unsupported {
                what: "layer",
                media_type: layer.media_type.clone(),
            }),
        }
    }

    /// Compact JSON, fields in the specification's order: equal values, equal bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_json(self)
    }
}

impl Index {
    pub fn new(manifests: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: Some(media_type::OCI_INDEX.into()),
            manifests,
            annotations: BTreeMap::new(),
        }
    }

    /// The entry that suits `platform` best; the first of equals. Entries that say no
    /// platform are never chosen by it, nor are attestations.
    pub fn select(&self, platform: &Platform) -> Option<&Descriptor> {
        let mut best: Option<(u32, &Descriptor)> = None;
        for entry in &self.manifests {
            if entry.annotations.contains_key("vnd.docker.reference.type") {
                continue;
            }
            let fitness = entry.platform.as_ref().and_then(|p| p.fitness(platform));
            if let Some(fitness) = fitness
                && best.is_none_or(|(most, _)| fitness > most)
            {
                best = Some((fitness, entry));
            }
        }
        best.map(|(_, entry)| entry)
    }

    /// The platforms it has images for, for messages: `linux/amd64, linux/arm64`.
    pub fn platforms(&self) -> String {
        let mut names: Vec<String> = self
            .manifests
            .iter()
            .filter_map(|d| d.platform.as_ref())
            .map(Platform::to_string)
            .filter(|name| !name.starts_with("unknown/"))
            .collect();
        names.dedup();
        names.join(", ")
    }

    /// Compact JSON, fields in the specification's order: equal values, equal bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_json(self)
    }
}

/// JSON of a value that has only text keys and derived `Serialize`.
fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    #[allow(
        clippy::expect_used,
        reason = "serialising to memory fails only for non-text map keys, which these types lack"
    )]
    serde_json::to_vec(value).expect("plain data")
}

/// Go writes absent lists and maps as `null`.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests;

//! Whether a manifest and its configuration make an image that can run here.

use super::{ConfigDocument, ConfigError, Manifest, ManifestError, parse_config};
use crate::platform::Platform;

/// Why a manifest and its configuration are no image for this machine.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("its configuration can't be used: {0}")]
    Config(#[from] ConfigError),
    #[error(
        "its manifest has {manifest} layers and its configuration {config}; they don't belong together"
    )]
    LayerCount { manifest: usize, config: usize },
    #[error("it is made for {found}, and this machine needs {wanted}")]
    Platform { found: String, wanted: String },
}

/// Parses the configuration and checks that it belongs to the manifest and runs on
/// `platform`.
pub fn check_image(
    manifest: &Manifest,
    config: &[u8],
    platform: &Platform,
) -> Result<ConfigDocument, ImageError> {
    manifest.check_runnable()?;
    let document = parse_config(config)?;
    if document.diff_ids.len() != manifest.layers.len() {
        return Err(ImageError::LayerCount {
            manifest: manifest.layers.len(),
            config: document.diff_ids.len(),
        });
    }
    let found: Option<Platform> = document.config.platform.parse().ok();
    match found.and_then(|found| found.fitness(platform)) {
        Some(_) => Ok(document),
        None => Err(ImageError::Platform {
            found: document.config.platform,
            wanted: platform.to_string(),
        }),
    }
}

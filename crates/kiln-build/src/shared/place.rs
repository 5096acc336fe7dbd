//! Where a cache is: a registry, or a folder. Everything else about caches is the same.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_model::{Digest, Progress};
use kiln_oci::archive::{self, ArchiveError, Layout};
use kiln_oci::manifest::{Descriptor, Manifest};
use kiln_oci::reference::ReferenceError;
use kiln_oci::registry::{Client, RegistryError};
use kiln_oci::{BlobRead, BlobWrite, Reference};
use kiln_store::Store;

use super::document::{MAX_BYTES, MEDIA_TYPE};

/// The name of what a folder has where nothing is said: BuildKit's.
const TAG: &str = "latest";

/// A cache's place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Registry(Reference),
    /// An OCI layout, and the artifact's name in it.
    Folder {
        path: PathBuf,
        tag: String,
    },
}

/// Why nothing can be taken from a place.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Folder(#[from] ArchiveError),
}

/// Why nothing can be put into a place.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Folder(#[from] archive::ExportError),
    #[error("the thread that wrote it was lost")]
    Lost,
}

impl Place {
    pub(super) fn registry(name: &str) -> Result<Self, ReferenceError> {
        let reference = name.parse::<Reference>()?;
        Ok(Self::Registry(reference.with_default_tag()))
    }

    pub(super) fn folder(path: &str, tag: Option<String>) -> Self {
        Self::Folder {
            path: path.into(),
            tag: tag.unwrap_or_else(|| TAG.to_owned()),
        }
    }

    /// The manifest and configuration of the cache that is there.
    pub(super) async fn artifact(&self, client: &Client) -> Result<(Manifest, Vec<u8>), TakeError> {
        match self {
            Self::Registry(reference) => {
                Ok(client.artifact(reference, MEDIA_TYPE, MAX_BYTES).await?)
            }
            Self::Folder { path, tag } => {
                Ok(Layout::new(path).artifact(tag, MEDIA_TYPE, MAX_BYTES)?)
            }
        }
    }

    pub(super) async fn fetch(
        &self,
        client: &Client,
        blob: &Descriptor,
        blobs: Arc<dyn BlobWrite>,
    ) -> Result<(), TakeError> {
        match self {
            Self::Registry(reference) => Ok(client.fetch_blob(reference, blob, blobs).await?),
            Self::Folder { path, .. } => Ok(Layout::new(path).fetch(blob, &*blobs)?),
        }
    }

    /// Puts a manifest of the store there, with all that it names.
    pub(super) async fn put(
        &self,
        client: &Client,
        manifest: Digest,
        store: &Arc<Store>,
        progress: &dyn Progress,
    ) -> Result<(), PutError> {
        match self {
            Self::Registry(reference) => {
                let blobs: Arc<dyn BlobRead> = store.clone();
                client.push(&manifest, blobs, reference, progress).await?;
                Ok(())
            }
            Self::Folder { path, tag } => {
                let (layout, tag, store) = (Layout::new(path), tag.clone(), store.clone());
                let written = move || layout.put(&tag, &manifest, &*store);
                let written = tokio::task::spawn_blocking(written).await;
                Ok(written.map_err(|_| PutError::Lost)??)
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => f.write_str(&reference.familiar()),
            Self::Folder { path, tag } if tag == TAG => write!(f, "{}", path.display()),
            Self::Folder { path, tag } => write!(f, "{} ({tag})", path.display()),
        }
    }
}

/// The same entry of `cache_from` or `cache_to`, with a folder's relative path counted from
/// `base`. What can't be read stays, and is refused where it is used.
pub fn rooted(entry: &str, base: &Path) -> String {
    if super::kind(entry) != Some("local") {
        return entry.to_owned();
    }
    let rooted = |part: &str| match part.split_once('=') {
        Some((key, path)) if matches!(key.trim(), "src" | "dest") => {
            format!("{key}={}", base.join(path.trim()).display())
        }
        _ => part.to_owned(),
    };
    let parts: Vec<String> = entry.split(',').map(rooted).collect();
    parts.join(",")
}

//! Artifacts: manifests with a configuration of somebody's own (image-spec v1.1,
//! manifest.md, "Guidelines for Artifact Usage"). What their layers are is the caller's
//! business, who takes them one by one.

use std::sync::Arc;

use kiln_model::Digest;

use super::session::Session;
use super::{Action, Client, Problem, RegistryError};
use crate::blob::BlobWrite;
use crate::manifest::{Descriptor, Manifest};
use crate::reference::Reference;

impl Client {
    /// An artifact's manifest and configuration, verified. The configuration must be of
    /// this media type and have at most `limit` bytes.
    pub async fn artifact(
        &self,
        reference: &Reference,
        media_type: &str,
        limit: u64,
    ) -> Result<(Manifest, Vec<u8>), RegistryError> {
        let session = Session::open(self, reference, Action::Pull).await?;
        let expected = reference.digest().copied();
        let (_, digest, document) = session.manifest(&reference.selector(), expected).await?;
        let manifest = document
            .artifact(media_type)
            .map_err(|source| session.fail(Problem::Manifest { digest, source }))?;
        let config = session.small_blob(&manifest.config.digest, limit).await?;
        Ok((manifest, config))
    }

    /// Streams one blob of a repository into `blobs`, if it is what the descriptor says.
    pub async fn fetch_blob(
        &self,
        reference: &Reference,
        blob: &Descriptor,
        blobs: Arc<dyn BlobWrite>,
    ) -> Result<(), RegistryError> {
        let session = Session::open(self, reference, Action::Pull).await?;
        session.fetch(blob, blobs, &|_| {}).await
    }
}

impl Session<'_> {
    /// A blob that is held in memory.
    pub(super) async fn small_blob(
        &self,
        expected: &Digest,
        limit: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let expected = *expected;
        let url = self.url(&format!("blobs/{expected}"))?;
        let make = || self.client.http.get(url.clone());
        let what = format!("configuration {expected}");
        let (_, bytes) = self.small(&what, &make, limit).await?;
        let found = Digest::of(&bytes);
        match found == expected {
            true => Ok(bytes),
            false => Err(self.fail(Problem::WrongDigest { expected, found })),
        }
    }
}

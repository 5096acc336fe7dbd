//! Giving results to others.

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln_model::{Digest, Progress};
use kiln_oci::registry::Client;
use kiln_oci::{BlobWrite, BlobWriteError};
use kiln_store::Store;

use super::document::{self, DocumentError, MAX_BYTES};
use super::{PutError, Results, Target};
use crate::exec::state::Made;
use crate::secrets::Allowed;

/// Why results were not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("the results of all instructions take {0} bytes to list, more than {MAX_BYTES}")]
    TooLong(usize),
    #[error(transparent)]
    Document(#[from] DocumentError),
    #[error(transparent)]
    Store(#[from] BlobWriteError),
    #[error(transparent)]
    Put(#[from] PutError),
}

/// What an export came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exported {
    pub manifest: Digest,
    /// Results that it has.
    pub steps: usize,
    /// Results in which secrets were found: they are not in it.
    pub withheld: usize,
}

impl Target {
    /// Exports what these builds have used and made. The caller holds a lease, so that the
    /// layers are still there.
    pub async fn export(
        &self,
        client: &Client,
        store: &Arc<Store>,
        progress: &dyn Progress,
        builds: &[(Arc<Results>, Arc<Allowed>)],
    ) -> Result<Exported, ExportError> {
        let mut steps: BTreeMap<Digest, Made> = BTreeMap::new();
        let mut withheld = 0;
        for (results, allowed) in builds {
            for (key, made) in results.steps(self.least) {
                let secret =
                    |found: &crate::secrets::Finding| !found.made_anew && !allowed.allows(found);
                match made.findings.iter().any(secret) {
                    true => withheld += 1,
                    false => drop(steps.insert(key, made)),
                }
            }
        }
        let layers = document::layers(&mut steps);
        let count = steps.len();
        let config = document::write(steps)?;
        if config.len() as u64 > MAX_BYTES {
            return Err(ExportError::TooLong(config.len()));
        }
        let manifest = document::manifest(&config, layers).to_bytes();
        store.write(None, &mut config.as_slice())?;
        let (digest, _) = store.write(None, &mut manifest.as_slice())?;
        self.place.put(client, digest, store, progress).await?;
        Ok(Exported {
            manifest: digest,
            steps: count,
            withheld,
        })
    }
}

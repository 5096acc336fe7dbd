//! Takes away what builds and tests that were killed have left: running commands and
//! programs, their folders, and the networks of their processes.

use std::path::Path;

use kiln_runtime::Runtime;
use kiln_runtime::net::root_tag;

use super::{ExecError, scratch, work};
use crate::held::{self, Held};
use crate::{debian, network, test};

/// Before the six letters and digits of a cache that is used once.
pub(crate) const VERIFY_PREFIX: &str = "verify-";

/// Ends and removes what is left of processes that are gone. Where nothing is, it costs
/// one look into a folder.
pub fn sweep(cache: &Path, runtime: &Runtime) -> Result<(), ExecError> {
    let scratch = scratch(cache)?;
    let prefixes = [
        work::PREFIX,
        debian::sandbox::PREFIX,
        test::PREFIX,
        network::FOLDER_PREFIX,
        VERIFY_PREFIX,
    ];
    let left = held::abandoned(&scratch, &prefixes);
    let (networks, works): (Vec<_>, Vec<_>) = left
        .map_err(|cause| ExecError::Scratch {
            path: scratch,
            cause,
        })?
        .into_iter()
        .partition(|folder| folder.name().starts_with(network::FOLDER_PREFIX));
    // Commands first: they have a place in the networks.
    for folder in works.into_iter().chain(networks) {
        if let Err(cause) = remove(&folder, runtime) {
            // The next one tries again.
            folder.leave();
            return Err(cause);
        }
    }
    Ok(())
}

fn remove(folder: &Held, runtime: &Runtime) -> Result<(), ExecError> {
    let name = folder.name();
    tracing::info!(name, "what a killed build left is taken away");
    if name.starts_with(VERIFY_PREFIX) {
        return sweep(folder.path(), runtime);
    }
    if name.starts_with(network::FOLDER_PREFIX) {
        let removed = network::remove(&root_tag(runtime.root()), folder);
        return removed.map_err(ExecError::network);
    }
    let id = work::instance(folder).map_err(|cause| ExecError::Scratch {
        path: folder.path().to_owned(),
        cause,
    })?;
    runtime.remove(&id).map_err(ExecError::Left)
}

//! Whether a build gives the same image once more: nothing comes from the cache, another
//! folder is worked in, commands have one processor, and the stages take turns, the later
//! ones first.
//!
//! What the sandbox fixes for every RUN (host name, umask, environment) is the same on every
//! machine and is not varied. The clock can't be set for one command alone: it is only later.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kiln_model::Digest;

use super::differences::{self, Difference, Side, compare};
use super::{BuildError, Builder, Prepared};
use crate::exec::{Conditions, VERIFY_PREFIX};
use crate::graph::Wanted;
use crate::held::Held;

/// The second build begins in another second: times have that resolution.
const LATER: Duration = Duration::from_millis(1100);

impl Builder {
    /// Builds again what `first` came of, and compares; empty: bit for bit the same.
    pub async fn verify(
        &self,
        prepared: Prepared,
        images: BTreeMap<Wanted, Digest>,
        first: Digest,
    ) -> Result<Vec<Difference>, BuildError> {
        let builder = self.clone();
        let verify = move || builder.build_again(&prepared, &images, &first);
        tokio::task::spawn_blocking(verify)
            .await
            .map_err(|_| BuildError::Lost)?
    }

    /// The same, on the caller's thread.
    pub fn build_again(
        &self,
        prepared: &Prepared,
        images: &BTreeMap<Wanted, Digest>,
        first: &Digest,
    ) -> Result<Vec<Difference>, BuildError> {
        let name = &prepared.request.name;
        let keep = |cause: Box<dyn std::error::Error + Send + Sync>| BuildError::Keep {
            name: name.clone(),
            cause,
        };
        let _lease = self.store.lease().map_err(|e| keep(Box::new(e)))?;
        let scratch = crate::exec::scratch(&self.cache).map_err(|e| keep(Box::new(e)))?;
        let folder = Held::new(&scratch, VERIFY_PREFIX).map_err(|e| keep(Box::new(e)))?;
        let elsewhere = Builder {
            cache: folder.path().to_owned(),
            ..self.clone()
        };
        std::thread::sleep(LATER);
        let (second, other) =
            elsewhere.carry_out_under(prepared, images, None, Conditions::Other)?;
        if second == *first {
            return Ok(Vec::new());
        }
        // Stage by stage, so that it is told where it began. The first build's are cached.
        let (_, usual) = self.carry_out_under(prepared, images, None, Conditions::Usual)?;
        let side = |image| Side {
            store: &self.store,
            image,
        };
        let (mut found, mut told) = (Vec::new(), BTreeSet::new());
        for ((stage, one), (_, two)) in usual.iter().zip(&other) {
            let compared = compare(&side(one), &side(two), stage);
            for one in compared.map_err(|cause| keep(Box::new(cause)))? {
                // What is built on a stage has that one's layers, too.
                if told.insert((one.instruction.clone(), one.path.clone())) {
                    found.push(one);
                }
            }
        }
        if found.is_empty() {
            found.push(differences::of_configuration());
        }
        Ok(found)
    }
}

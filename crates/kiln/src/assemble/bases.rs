//! Bases that a first build needs, composed several at a time: packages' scripts use one
//! processor only, and services are built one after the other.

use std::collections::BTreeSet;

use kiln_build::build::prepare;
use kiln_build::graph::Wanted;
use kiln_build::lock::Lock;
use kiln_model::ServiceName;
use kiln_model::spec::{ImageSource, Service};

use super::{Assembler, Over, build_failure};
use crate::failure::Failure;

impl Assembler<'_> {
    /// Composes what is not there yet, if it is more than one.
    pub(super) async fn bases(&self, lock: &mut Lock, over: &Over<'_>) -> Result<(), Failure> {
        let host = kiln_oci::host_platform();
        let missing = |name: &&String| !self.resolver.is_composed(name, &host, lock);
        let missing: BTreeSet<&String> = self.spec().bases.keys().filter(missing).collect();
        if missing.len() < 2 {
            return Ok(());
        }
        let mut wanted = BTreeSet::new();
        for (name, service) in &self.spec().services {
            if !over.bases.contains_key(name) {
                let images = self.images_named(name, service, lock);
                wanted.extend(
                    images
                        .into_iter()
                        .filter(|w| missing.contains(&w.reference)),
                );
            }
        }
        if wanted.len() < 2 {
            return Ok(());
        }
        let composed = self.resolver.compose(wanted, lock).await;
        composed.map_err(build_failure)
    }

    /// What a service is built on, as far as that can be told: why it can't be is told when
    /// its turn comes.
    fn images_named(&self, name: &ServiceName, service: &Service, lock: &Lock) -> BTreeSet<Wanted> {
        let Ok(platform) = self.platform_here(name, service) else {
            return BTreeSet::new();
        };
        match &service.image {
            ImageSource::Reference(reference) => BTreeSet::from([Wanted {
                reference: reference.clone(),
                platform,
            }]),
            ImageSource::Build { build, .. } => {
                let request = self.build_request(name.as_str(), build, &platform, lock);
                let prepared = request.ok().and_then(|request| prepare(request).ok());
                let images = prepared.and_then(|prepared| prepared.images().ok());
                images.unwrap_or_default()
            }
        }
    }
}

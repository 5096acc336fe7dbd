//! Which platforms a service's image is for, and images that are for several: they are built
//! one after the other, and an OCI index has them all. What is not for this machine is built,
//! and not tested.

use std::collections::BTreeMap;

use kiln_build::build::runs_here;
use kiln_build::graph;
use kiln_build::lock::Lock;
use kiln_model::spec::{ImageSource, Service};
use kiln_model::{Digest, ServiceName};
use kiln_oci::manifest::{Descriptor, Index, media_type};
use kiln_oci::{BlobRead, BlobWrite};
use serde::Serialize;

use super::{Assembler, input};
use crate::failure::{Failure, Kind, machine};

/// What a service's build came to.
#[derive(Serialize)]
pub struct Built {
    /// What `image` says, or PROJECT-SERVICE.
    pub name: String,
    /// `image` says it: a registry can be told by it.
    pub named: bool,
    /// Of the image, or of the index of several.
    pub digest: Digest,
    pub platforms: BTreeMap<String, Digest>,
}

impl Assembler<'_> {
    /// The platforms that a build is for: those asked for, or else what the file says.
    pub(super) fn platforms_of(
        &self,
        name: &ServiceName,
        service: &Service,
        asked: &[String],
    ) -> Result<Vec<String>, Failure> {
        let ImageSource::Build { build, .. } = &service.image else {
            return Ok(Vec::new());
        };
        let own = service.platform.iter().cloned().collect();
        let said = match (asked, build.platforms.as_slice()) {
            ([], []) => own,
            ([], said) => said.to_vec(),
            (asked, _) => asked.to_vec(),
        };
        let normal = |text: &String| {
            graph::platform(text).map_err(|cause| input(format!("services.{name}: {cause}")))
        };
        let mut platforms = said.iter().map(normal).collect::<Result<Vec<_>, _>>()?;
        if platforms.is_empty() {
            platforms.push(kiln_oci::host_platform());
        }
        platforms.sort();
        platforms.dedup();
        Ok(platforms)
    }

    /// The platform that a service's instances on this machine are of.
    pub(super) fn platform_here(
        &self,
        name: &ServiceName,
        service: &Service,
    ) -> Result<String, Failure> {
        let host = kiln_oci::host_platform();
        let wanted = match &service.platform {
            Some(said) => graph::platform(said)
                .map_err(|cause| input(format!("services.{name}.platform: {cause}")))?,
            None => host.clone(),
        };
        if !runs_here(&wanted) {
            let what = format!(
                "services.{name}.platform: {wanted} does not run on this machine, which is {host}"
            );
            return Err(input(what).hint(
                "`kiln build --platform` builds for others; to run it here, install an emulator \
                 (Debian: qemu-user-static)",
            ));
        }
        let ImageSource::Build { build, .. } = &service.image else {
            return Ok(wanted);
        };
        let built_for = self.platforms_of(name, service, &[])?;
        if build.platforms.is_empty() || built_for.contains(&wanted) {
            return Ok(wanted);
        }
        let what = format!(
            "services.{name}.build.platforms has {}, and not {wanted}, which is what would run \
             here",
            built_for.join(", ")
        );
        Err(input(what).hint("add it, or only build (`kiln build --platform`)"))
    }

    pub(super) fn image_name(&self, name: &ServiceName, service: &Service) -> String {
        match &service.image {
            ImageSource::Reference(reference) => reference.clone(),
            ImageSource::Build { tag: Some(tag), .. } => tag.clone(),
            ImageSource::Build { .. } => format!("{}-{name}", self.spec().project),
        }
    }

    /// Every image that is built, for the platforms `asked` for or said in the file; the lock
    /// is written when it has learned something.
    pub async fn images(&self, asked: &[String]) -> Result<BTreeMap<ServiceName, Built>, Failure> {
        let lock_path = self.spec().folder.join("kiln.lock");
        let mut lock = Lock::load(&lock_path).map_err(input)?;
        let result = self.every_image(asked, &mut lock).await;
        let kept = self.keeper.end().await;
        lock.save(&lock_path).map_err(input)?;
        let images = result?;
        kept?;
        Ok(images)
    }

    async fn every_image(
        &self,
        asked: &[String],
        lock: &mut Lock,
    ) -> Result<BTreeMap<ServiceName, Built>, Failure> {
        let mut built = BTreeMap::new();
        for (name, service) in &self.spec().services {
            let ImageSource::Build { tag, .. } = &service.image else {
                continue;
            };
            let mut platforms = BTreeMap::new();
            for platform in self.platforms_of(name, service, asked)? {
                let digest = self.image_of(name, service, &platform, lock).await?;
                self.recorded(&digest)?;
                platforms.insert(platform, digest);
            }
            let one = Built {
                name: self.image_name(name, service),
                named: tag.is_some(),
                digest: self.index(&platforms)?,
                platforms,
            };
            built.insert(name.clone(), one);
        }
        self.export().await?;
        Ok(built)
    }

    /// An image that was found or built, with the record of its packages.
    pub(super) fn recorded(&self, digest: &Digest) -> Result<kiln_store::Image, Failure> {
        kiln_build::packages::attach(&self.store, digest).map_err(machine)
    }

    /// The image itself where there is one, else an index of them, in the store.
    fn index(&self, platforms: &BTreeMap<String, Digest>) -> Result<Digest, Failure> {
        if let Some(only) = platforms.values().next().filter(|_| platforms.len() == 1) {
            return Ok(*only);
        }
        let mut entries = Vec::new();
        for (platform, digest) in platforms {
            let size = BlobRead::size(&*self.store, digest).map_err(machine)?;
            let size = size.ok_or_else(|| machine(format!("the image {digest} left the store")))?;
            let mut entry = Descriptor::new(media_type::OCI_MANIFEST, *digest, size);
            entry.platform = Some(platform.parse().map_err(machine)?);
            entries.push(entry);
        }
        let index = Index::new(entries).to_bytes();
        let (digest, _) = self
            .store
            .write(None, &mut index.as_slice())
            .map_err(machine)?;
        Ok(digest)
    }

    /// Every service can be started here, so that all is tested as by `up`.
    pub fn tests_here(&self, built: &BTreeMap<ServiceName, Built>) -> bool {
        let services = &mut self.spec().services.iter();
        services.all(|(name, service)| match self.platform_here(name, service) {
            Ok(platform) => built
                .get(name)
                .is_none_or(|built| built.platforms.contains_key(&platform)),
            Err(_) => false,
        })
    }

    /// Puts what was built into registries, each image under what `image` says.
    pub async fn push(&self, built: &BTreeMap<ServiceName, Built>) -> Result<(), Failure> {
        for (service, image) in built {
            if !image.named {
                let what = format!("services.{service} has no `image`: where is it pushed to?");
                return Err(input(what).hint("say it as `image: registry/name:tag`"));
            }
            let reference: kiln_oci::Reference = image
                .name
                .parse()
                .map_err(|cause| input(format!("services.{service}.image: {cause}")))?;
            let reference = reference.with_default_tag();
            let blobs: std::sync::Arc<dyn BlobRead> = self.store.clone();
            let pushed =
                self.resolver
                    .registry
                    .push(&image.digest, blobs, &reference, &*self.progress);
            pushed
                .await
                .map_err(|error| Failure::with_causes(Kind::Build, &error))?;
        }
        Ok(())
    }
}

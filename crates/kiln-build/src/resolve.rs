//! Finds the image that a reference stands for, and brings it into the store: a Debian
//! base of the project, an OCI layout or archive on disk, or a registry's image. What
//! the lock pins is what is taken; what it does not know yet it learns.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::available_parallelism;

use futures_util::{StreamExt, stream};
use kiln_model::spec::DebianBase;
use kiln_model::{Digest, Progress, ProgressEvent};
use kiln_oci::archive::{ArchiveError, Import, import};
use kiln_oci::reference::{Reference, ReferenceError};
use kiln_oci::registry::{self, RegistryError};
use kiln_oci::{BlobWrite, Platform};
use kiln_store::{AddImageError, RefError, Store};

use crate::build::{Foreign, runs_here};
use crate::cache;
use crate::containerfile::Span;
use crate::debian::{self, Asked, DebianContext, DebianError};
use crate::exec::ExecError;
use crate::graph::{self, Wanted};
use crate::lock::Lock;
use crate::secrets::{self, Allowed, Finding, Located, Refused};

/// Bases composed at the same time; a bound on memory.
const MAX_AT_ONCE: usize = 4;

/// Why an image could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    #[error(transparent)]
    Debian(#[from] DebianError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Image(#[from] AddImageError),
    #[error(transparent)]
    Ref(#[from] RefError),
    #[error("`{reference}` is neither a base of this project nor an image reference: {source}")]
    Reference {
        reference: String,
        source: ReferenceError,
    },
    #[error("`{reference}` is not in the store, and its pull_policy is `never`")]
    NotHere { reference: String },
    #[error("cannot look through the base `{name}`")]
    Scan {
        name: String,
        #[source]
        source: Box<ExecError>,
    },
    #[error("{0}")]
    Secrets(Refused),
    #[error("{0}")]
    Foreign(Foreign),
    #[error(transparent)]
    Platform(#[from] graph::UnknownPlatform),
    #[error("Debian has no packages for {platform}, so there is no base `{name}` for it")]
    NoArchitecture { name: String, platform: String },
    #[error("reading the archive ended early")]
    Ended,
}

/// Where images come from, for one project.
pub struct Resolver {
    pub store: Arc<Store>,
    pub debian: DebianContext,
    pub registry: Arc<registry::Client>,
    /// Where nothing else is said: this host's.
    pub platform: Platform,
    pub bases: BTreeMap<String, DebianBase>,
    /// `x-kiln.debian.mirror`.
    pub mirror: Option<String>,
    /// Relative paths of `oci:` and `docker-archive:` count from here.
    pub folder: PathBuf,
    pub progress: Arc<dyn Progress>,
    /// What may be in a base although it looks like a secret; learns.
    pub allowed: Arc<Allowed>,
}

impl Resolver {
    /// The manifest that `reference` stands for on this host; its image is in the store then.
    /// `never`: the network is not asked for it (pull_policy).
    pub async fn resolve(
        &self,
        reference: &str,
        never: bool,
        lock: &mut Lock,
    ) -> Result<Digest, ResolveError> {
        let platform = self.platform.to_string();
        self.resolve_for(reference, &platform, never, lock).await
    }

    /// The same for a platform, in its normal form.
    pub async fn resolve_for(
        &self,
        reference: &str,
        platform: &str,
        never: bool,
        lock: &mut Lock,
    ) -> Result<Digest, ResolveError> {
        let wanted: Platform = platform
            .parse()
            .map_err(|_| graph::UnknownPlatform(platform.to_owned()))?;
        let manifest = match self.bases.get(reference) {
            Some(base) => self.base(reference, base, platform, lock).await?,
            None => match on_disk(reference) {
                Some(path) => self.archive(path, &wanted).await?,
                None => self.pull(reference, &wanted, never, lock).await?,
            },
        };
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || store.add_image(&manifest))
            .await
            .map_err(|_| ResolveError::Ended)??;
        Ok(manifest)
    }

    /// Whether a base of this project is there as `lock` has it.
    pub fn is_composed(&self, name: &str, platform: &str, lock: &Lock) -> bool {
        let asked = self
            .bases
            .get(name)
            .map(|base| self.debian(name, base, platform));
        matches!(asked, Some(Ok((debian, asked))) if debian::is_composed(&debian, &asked, lock))
    }

    /// Composes bases of this project, several at a time.
    pub async fn compose(
        &self,
        wanted: BTreeSet<Wanted>,
        lock: &mut Lock,
    ) -> Result<(), ResolveError> {
        // One after the other: they are all looked for in the same lists.
        for Wanted {
            reference,
            platform,
        } in &wanted
        {
            if let Some(base) = self.bases.get(reference) {
                let (debian, asked) = self.debian(reference, base, platform)?;
                debian::lock(&debian, &asked, lock).await?;
            }
        }
        let at_once = available_parallelism()
            .map_or(1, usize::from)
            .min(MAX_AT_ONCE);
        let composed = stream::iter(wanted).map(|one| {
            let mut locked = lock.clone();
            async move {
                let Wanted {
                    reference,
                    platform,
                } = one;
                let composed = self.resolve_for(&reference, &platform, false, &mut locked);
                composed.await.map(drop)
            }
        });
        let composed: Vec<_> = composed.buffered(at_once).collect().await;
        composed.into_iter().collect()
    }

    /// What composing a base for a platform needs.
    fn debian<'a>(
        &'a self,
        name: &'a str,
        base: &'a DebianBase,
        platform: &str,
    ) -> Result<(DebianContext, Asked<'a>), ResolveError> {
        if !base.distroless && !runs_here(platform) {
            return Err(ResolveError::Foreign(Foreign {
                what: format!("base `{name}`: its packages' scripts"),
                platform: platform.to_owned(),
            }));
        }
        let arch = debian::architecture(platform);
        let arch = arch.ok_or_else(|| ResolveError::NoArchitecture {
            name: name.to_owned(),
            platform: platform.to_owned(),
        })?;
        let mut debian = self.debian.clone();
        debian.machine.arch = arch.to_owned();
        let asked = Asked {
            name,
            base,
            mirror: self.mirror.as_deref(),
        };
        Ok((debian, asked))
    }

    async fn base(
        &self,
        name: &str,
        base: &DebianBase,
        platform: &str,
        lock: &mut Lock,
    ) -> Result<Digest, ResolveError> {
        let (debian, asked) = self.debian(name, base, platform)?;
        let composed = debian::compose(&debian, &asked, lock).await?;
        let manifest = composed.image.manifest;
        self.judge(name, &manifest).await?;
        let name = format!("cache/debian/{}", composed.key);
        self.store.set_ref(&name, &manifest)?;
        cache::used_ref(&self.debian.cache, &name);
        Ok(manifest)
    }

    /// Packages' scripts may have made what is secret, or of this machine.
    async fn judge(&self, name: &str, manifest: &Digest) -> Result<(), ResolveError> {
        let (store, cache) = (self.store.clone(), self.debian.cache.clone());
        let manifest = *manifest;
        let found = tokio::task::spawn_blocking(move || {
            store.add_image(&manifest)?;
            Ok(secrets::in_image(&store, &cache, &manifest))
        });
        let found = found.await.map_err(|_| ResolveError::Ended)?;
        let found = found.map_err(|e: AddImageError| ResolveError::Image(e))?;
        let found = found.map_err(|source| ResolveError::Scan {
            name: name.to_owned(),
            source: Box::new(source),
        })?;
        let machine_id = |finding: &Finding| finding.place == "/etc/machine-id";
        for anew in found.iter().filter(|f| f.made_anew && !machine_id(f)) {
            self.progress.event(ProgressEvent::Warning {
                task: format!("base {name}"),
                text: anew.told_anew(),
            });
        }
        let refused = |finding: &Finding| !finding.made_anew && !self.allowed.allows(finding);
        let findings: Vec<Located> = found
            .into_iter()
            .filter(refused)
            .map(|finding| Located {
                finding,
                span: Span::default(),
                instruction: "its packages".into(),
            })
            .collect();
        match findings.is_empty() {
            true => Ok(()),
            false => Err(ResolveError::Secrets(Refused {
                file: format!("base `{name}`"),
                findings,
            })),
        }
    }

    async fn archive(&self, path: &str, platform: &Platform) -> Result<Digest, ResolveError> {
        let path = self.folder.join(path);
        let (store, platform) = (self.store.clone(), platform.clone());
        let scratch = self.debian.cache.clone();
        tokio::task::spawn_blocking(move || {
            let what = Import {
                path: &path,
                name: None,
                platform: &platform,
                scratch: &scratch,
            };
            import(&what, &*store)
        })
        .await
        .map_err(|_| ResolveError::Ended)?
        .map_err(ResolveError::from)
    }

    async fn pull(
        &self,
        text: &str,
        platform: &Platform,
        never: bool,
        lock: &mut Lock,
    ) -> Result<Digest, ResolveError> {
        let reference: Reference = text.parse().map_err(|source| ResolveError::Reference {
            reference: text.to_owned(),
            source,
        })?;
        let reference = reference.with_default_tag();
        let canonical = reference.to_string();
        let pinned = reference
            .digest()
            .or_else(|| lock.images.get(&canonical))
            .copied();
        if let Some(pin) = pinned
            && let Some(manifest) = self.known(&pin, platform)
        {
            cache::used_ref(&self.debian.cache, &pulled(&pin, platform));
            return Ok(manifest);
        }
        if never {
            return Err(ResolveError::NotHere {
                reference: canonical,
            });
        }
        let pin = match pinned {
            Some(pin) => pin,
            None => self.registry.resolve(&reference, platform).await?.pin(),
        };
        let blobs: Arc<dyn BlobWrite> = self.store.clone();
        let manifest = self
            .registry
            .pull(
                &reference.with_digest(pin),
                platform,
                blobs,
                &*self.progress,
            )
            .await?;
        let name = pulled(&pin, platform);
        self.store.set_ref(&name, &manifest)?;
        cache::used_ref(&self.debian.cache, &name);
        lock.images.insert(canonical, pin);
        Ok(manifest)
    }

    /// The manifest for a platform that a pin was found to mean before.
    fn known(&self, pin: &Digest, platform: &Platform) -> Option<Digest> {
        let manifest = self.store.get_ref(&pulled(pin, platform)).ok()??;
        self.store
            .image(&manifest)
            .ok()?
            .map(|image| image.manifest)
    }
}

fn pulled(pin: &Digest, platform: &Platform) -> String {
    let platform = platform.to_string().replace('/', "-");
    format!("cache/pulled/{platform}-{}", pin.hex())
}

/// `oci:<folder or tar>` and `docker-archive:<tar>`.
fn on_disk(reference: &str) -> Option<&str> {
    ["oci:", "docker-archive:"]
        .iter()
        .find_map(|scheme| reference.strip_prefix(scheme))
}

//! From a project to a release: images found or built, each tested in isolation, every
//! file it shows read and kept. Nothing that runs is touched here.

mod bases;
mod caller;
mod contents;
mod export;
mod platforms;
mod prove;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kiln_build::build::{BuildError, BuildRequest, Builder, Difference, Prepared, Synced, prepare};
use kiln_build::debian::{self, DebianContext};
use kiln_build::graph::Wanted;
use kiln_build::lock::Lock;
use kiln_build::network::record::{Kept, Recordings};
use kiln_build::network::{Network, host_resolver};
use kiln_build::resolve::{ResolveError, Resolver};
use kiln_build::secrets::{self, Allowed};
use kiln_build::test::{TestRequest, Tester, Verdict};
use kiln_compose::Loaded;
use kiln_model::instance::Scratch;
use kiln_model::progress::Finish;
use kiln_model::release::{ReleasedImage, ReleasedService};
use kiln_model::spec::{
    FileVersion, ImageSource, MountSource, Protocol, PullPolicy, Service, Spec,
};
use kiln_model::{Digest, EnvironmentName, Progress, ProgressEvent, Release, ServiceName};
use kiln_oci::registry;
use kiln_store::{Image, Store};

use crate::cache::Keeper;
use crate::context::{Context, now};
use crate::failure::{Failure, Kind, machine};
use crate::junit::Suite;
use crate::ops;
use caller::{agents, credentials, epoch};
use export::Outgoing;
pub use export::Shares;

/// Scratch without a stated size: 64 MiB.
const SCRATCH_SIZE: u64 = 64 << 20;

pub struct Assembler<'a> {
    context: &'a Context,
    loaded: &'a Loaded,
    store: Arc<Store>,
    progress: Arc<dyn Progress>,
    cancel: Arc<AtomicBool>,
    resolver: Resolver,
    builder: Builder,
    tester: Tester,
    keeper: Keeper,
    /// `x-kiln.allow_secrets`.
    allowed: Arc<Allowed>,
    /// Images that were there before: building them again is no news.
    had: BTreeSet<Digest>,
    /// What RUNs fetch is fetched and recorded anew.
    live: bool,
    /// How each image did in its test.
    suites: Mutex<Vec<Suite>>,
    /// Caches of others, beside those of the project.
    shares: Shares,
    /// What builds are to give to others; learns.
    outgoing: Mutex<Outgoing>,
}

/// What `kiln watch` and whole-stack tests have beside the project, by service; nothing for
/// everyone else.
#[derive(Default)]
pub struct Over<'w> {
    /// Images that are not found or built again.
    pub bases: BTreeMap<ServiceName, Digest>,
    /// Files that are put over the image.
    pub synced: BTreeMap<ServiceName, Vec<Synced<'w>>>,
    /// What is known of services that are not tested here.
    pub proven: BTreeMap<ServiceName, Verdict>,
}

/// A release, and each service's image before anything was put over it.
pub struct Assembled {
    pub release: Release,
    pub bases: BTreeMap<ServiceName, Digest>,
}

/// Everything of a service but its place in a release.
struct Found {
    image: Image,
    verdict: Verdict,
}

/// The services of a release, and their images before anything was put over them.
type Services = (
    BTreeMap<ServiceName, ReleasedService>,
    BTreeMap<ServiceName, Digest>,
);

/// A service whose image is there, to be tested.
struct Candidate<'a> {
    name: ServiceName,
    service: &'a Service,
    image: Image,
    files: BTreeMap<String, FileVersion>,
    mounted_images: BTreeMap<String, Digest>,
    request: TestRequest,
}

impl<'a> Assembler<'a> {
    pub fn new(
        context: &'a Context,
        loaded: &'a Loaded,
        progress: Arc<dyn Progress>,
        cancel: Arc<AtomicBool>,
    ) -> Result<Self, Failure> {
        let store = context.store()?;
        let runtime = context.runtime()?;
        let cache = context.root.join("cache");
        std::fs::create_dir_all(&cache).map_err(machine)?;
        let platform = kiln_oci::host_platform();
        let arch = debian::architecture(&platform)
            .ok_or_else(|| machine(format!("Debian has no architecture for {platform}")))?;
        let registry = registry::Client::new(registry::Options {
            credentials: credentials(),
            ..registry::Options::default()
        });
        let registry = Arc::new(registry.map_err(machine)?);
        let debian = DebianContext {
            blobs: store.clone(),
            run_scripts: debian::sandbox::runner(runtime.clone(), cancel.clone()),
            cache: cache.clone(),
            client: kiln_build::http_client().map_err(machine)?,
            progress: progress.clone(),
            epoch: epoch()?,
            machine: debian::Machine {
                root: "/".into(),
                now: now().0 / 1000,
                arch: arch.to_owned(),
            },
        };
        let allowed = Allowed::new(&loaded.spec.allow_secrets);
        let allowed = Arc::new(allowed.map_err(|cause| {
            Failure::new(Kind::Input, format!("x-kiln.allow_secrets: {cause}"))
        })?);
        let resolver = Resolver {
            store: store.clone(),
            debian,
            registry: registry.clone(),
            platform: platform.parse().map_err(machine)?,
            bases: loaded.spec.bases.clone(),
            mirror: loaded.spec.debian_mirror.clone(),
            folder: loaded.spec.folder.clone(),
            progress: progress.clone(),
            allowed: allowed.clone(),
        };
        let builder = Builder {
            store: store.clone(),
            runtime: runtime.clone(),
            progress: progress.clone(),
            network: Arc::new(Network::new(&context.root, &cache, host_resolver())),
            fetches: Builder::fetches(&cache),
            registry,
            cache: cache.clone(),
        };
        let tester = Tester {
            store: store.clone(),
            runtime: runtime.clone(),
            cache,
        };
        let had = store
            .images()
            .map_err(machine)?
            .into_iter()
            .map(|i| i.manifest)
            .collect();
        let keeper = Keeper::new(context, store.clone(), progress.clone());
        Ok(Self {
            had,
            keeper,
            live: false,
            suites: Mutex::default(),
            shares: Shares::default(),
            outgoing: Mutex::default(),
            allowed,
            context,
            loaded,
            store,
            progress,
            cancel,
            resolver,
            builder,
            tester,
        })
    }

    pub fn live(mut self, live: bool) -> Self {
        self.live = live;
        self
    }

    /// How each image did in its test, also where that failed.
    pub fn suites(&self) -> Vec<Suite> {
        let suites = self.suites.lock().unwrap_or_else(PoisonError::into_inner);
        suites.clone()
    }

    pub fn shares(mut self, shares: Shares) -> Self {
        self.shares = shares;
        self
    }

    fn spec(&self) -> &Spec {
        &self.loaded.spec
    }

    /// The whole release. `kiln.lock` is written when it has learned something.
    pub async fn release(
        &self,
        environment: &EnvironmentName,
        over: &Over<'_>,
    ) -> Result<Assembled, Failure> {
        let lock_path = self.spec().folder.join("kiln.lock");
        let mut lock = Lock::load(&lock_path).map_err(input)?;
        let result = self.services(&mut lock, over).await;
        let kept = self.keeper.end().await;
        // What was learned is kept even if something later failed.
        lock.save(&lock_path).map_err(input)?;
        let (services, bases) = result?;
        kept?;
        let release = Release {
            format: Release::FORMAT,
            environment: environment.clone(),
            project: self.spec().project.clone(),
            services,
            networks: self.spec().networks.clone(),
            volumes: self.spec().volumes.clone(),
        };
        Ok(Assembled { release, bases })
    }

    /// Builds every image that is built, and each once more in other conditions; gives what
    /// differs. `kiln.lock` is written when it has learned something.
    pub async fn verify(&self) -> Result<BTreeMap<ServiceName, Vec<Difference>>, Failure> {
        let lock_path = self.spec().folder.join("kiln.lock");
        let mut lock = Lock::load(&lock_path).map_err(input)?;
        let mut found = BTreeMap::new();
        for (name, service) in &self.spec().services {
            let ImageSource::Build { build, .. } = &service.image else {
                continue;
            };
            let platform = kiln_oci::host_platform();
            let first = self.image_of(name, service, &platform, &mut lock).await;
            lock.save(&lock_path).map_err(input)?;
            let first = first?;
            let mut again = self.build_request(name.as_str(), build, &platform, &lock)?;
            again.name = format!("{name} again");
            // What the first has just recorded.
            again.live = false;
            let mut prepared = prepare(again).map_err(build_error)?;
            let images = self.images_of(&mut prepared, &mut lock).await?;
            let verified = self.builder.verify(prepared, images, first).await;
            found.insert(name.clone(), verified.map_err(build_error)?);
        }
        self.keeper.end().await?;
        Ok(found)
    }

    /// A digest of what is at these paths, whenever it was written.
    pub fn digest_of(&self, parts: &[Synced<'_>]) -> Result<Digest, Failure> {
        self.builder.digest_of(parts).map_err(input)
    }

    /// Writes the lock alone.
    pub async fn lock(&self, update: bool) -> Result<bool, Failure> {
        let lock_path = self.spec().folder.join("kiln.lock");
        let mut lock = Lock::load(&lock_path).map_err(input)?;
        if update {
            lock.update();
        }
        let platform = kiln_oci::host_platform();
        let bases = self.spec().bases.keys().map(|name| Wanted {
            reference: name.clone(),
            platform: platform.clone(),
        });
        let composed = self.resolver.compose(bases.collect(), &mut lock).await;
        composed.map_err(build_failure)?;
        for (name, service) in &self.spec().services {
            match &service.image {
                ImageSource::Reference(reference) => {
                    self.resolver
                        .resolve(reference, false, &mut lock)
                        .await
                        .map_err(build_failure)?;
                }
                ImageSource::Build { build, .. } => {
                    for platform in self.platforms_of(name, service, &[])? {
                        let request = self.build_request(name.as_str(), build, &platform, &lock)?;
                        let mut prepared = prepare(request).map_err(build_error)?;
                        self.images_of(&mut prepared, &mut lock).await?;
                    }
                }
            }
        }
        lock.save(&lock_path).map_err(input)
    }

    async fn services(&self, lock: &mut Lock, over: &Over<'_>) -> Result<Services, Failure> {
        self.bases(lock, over).await?;
        let mut images: BTreeMap<ServiceName, Image> = BTreeMap::new();
        let mut bases = BTreeMap::new();
        for (name, service) in &self.spec().services {
            let base = match over.bases.get(name) {
                Some(base) => *base,
                None => {
                    let platform = self.platform_here(name, service)?;
                    self.image_of(name, service, &platform, lock).await?
                }
            };
            bases.insert(name.clone(), base);
            let digest = self.synced(name, base, over)?;
            images.insert(name.clone(), self.recorded(&digest)?);
        }
        self.export().await?;
        // Images that are not built again tell nothing of what is in them.
        if over.bases.is_empty() {
            self.tell_unused();
        }
        let mut candidates = Vec::new();
        for (name, image) in images {
            let Some(service) = self.spec().services.get(&name) else {
                continue;
            };
            let files = self.files(service)?;
            candidates.push(Candidate {
                mounted_images: self.mounted_images(service, lock).await?,
                request: self.test_request(&name, service, &image, &files)?,
                name,
                service,
                image,
                files,
            });
        }
        let verdicts = self.test_all(&candidates, &over.proven)?;
        let released = candidates.into_iter().zip(verdicts).map(|(c, verdict)| {
            let found = Found {
                image: c.image,
                verdict,
            };
            let one = self.released(&c.name, c.service, found, c.files, c.mounted_images);
            (c.name, one)
        });
        Ok((released.collect(), bases))
    }

    fn tell_unused(&self) {
        for pattern in self.allowed.used().1 {
            self.progress.event(ProgressEvent::Warning {
                task: "x-kiln.allow_secrets".into(),
                text: format!("`{pattern}` has no effect: nothing secret was found there"),
            });
        }
    }

    /// The image with what is put over it.
    fn synced(&self, name: &ServiceName, base: Digest, over: &Over<'_>) -> Result<Digest, Failure> {
        let Some(parts) = over.synced.get(name).filter(|parts| !parts.is_empty()) else {
            return Ok(base);
        };
        let synced = self.builder.sync(name.as_str(), &base, parts, epoch()?);
        let digest = synced.map_err(build_error)?;
        if digest != base {
            let subject = format!("{}/{name}", self.spec().project);
            let details = [("base", base.to_string()), ("digest", digest.to_string())];
            self.context.record("sync", &subject, &details)?;
        }
        Ok(digest)
    }

    async fn image_of(
        &self,
        name: &ServiceName,
        service: &Service,
        platform: &str,
        lock: &mut Lock,
    ) -> Result<Digest, Failure> {
        let build = match &service.image {
            ImageSource::Reference(reference) => {
                let never = service.pull_policy == PullPolicy::Never;
                return self
                    .resolver
                    .resolve_for(reference, platform, never, lock)
                    .await
                    .map_err(build_failure);
            }
            ImageSource::Build { build, .. } => build,
        };
        let request = self.build_request(name.as_str(), build, platform, lock)?;
        let (pins, recordings) = (request.pins.clone(), request.recordings.clone());
        self.to_export(&request)?;
        let mut prepared = prepare(request).map_err(build_error)?;
        let images = self.images_of(&mut prepared, lock).await?;
        let running = ops::running_images(self.context)?;
        self.keeper.make_room(running).await?;
        let began = Instant::now();
        let task = format!("build {name}");
        self.progress.event(ProgressEvent::Started {
            task: task.clone(),
            detail: String::new(),
        });
        let built = self.builder.build(prepared, images).await;
        // What was fetched is pinned even if a later step failed.
        let pins = pins.lock().unwrap_or_else(PoisonError::into_inner).clone();
        lock.remote.urls.extend(pins.urls);
        lock.remote.git.extend(pins.git);
        let whole = built.is_ok().then_some(platform);
        let recorded = recordings.settled(whole);
        let not_recorded: usize = recorded.values().map(|one| one.direct.len()).sum();
        match recorded.is_empty() {
            true => lock.network.remove(name.as_str()),
            false => lock.network.insert(name.to_string(), recorded),
        };
        let how = match &built {
            Ok(_) => Finish::Done,
            Err(error) => Finish::Failed {
                cause: error.to_string(),
            },
        };
        self.progress.event(ProgressEvent::Finished {
            task,
            how,
            took: began.elapsed().into(),
        });
        if !built.as_ref().is_ok_and(|digest| self.had.contains(digest)) {
            // A failed build has filled the cache, too.
            self.keeper
                .begin(ops::running_images(self.context)?)
                .await?;
        }
        let digest = built.map_err(build_error)?;
        if !self.had.contains(&digest) {
            let subject = format!("{}/{name}", self.spec().project);
            let mut details = vec![("digest", digest.to_string())];
            if not_recorded > 0 {
                details.push(("not_hermetic", format!("{not_recorded}, see kiln.lock")));
            }
            let (allowed, _) = self.allowed.used();
            if !allowed.is_empty() {
                details.push(("allow_secrets", allowed.join(" ")));
            }
            self.context.record("build", &subject, &details)?;
        }
        Ok(digest)
    }

    /// Every image that a build needs, also what the ONBUILD of others needs.
    async fn images_of(
        &self,
        prepared: &mut Prepared,
        lock: &mut Lock,
    ) -> Result<BTreeMap<Wanted, Digest>, Failure> {
        let mut images = BTreeMap::new();
        loop {
            let missing = self.builder.missing(prepared, &images);
            let missing = missing.map_err(build_error)?;
            if missing.is_empty() {
                return Ok(images);
            }
            for wanted in missing {
                let (reference, platform) = (&wanted.reference, &wanted.platform);
                let digest = self.resolver.resolve_for(reference, platform, false, lock);
                let digest = digest.await.map_err(build_failure)?;
                images.insert(wanted, digest);
            }
        }
    }

    fn build_request(
        &self,
        name: &str,
        build: &kiln_model::spec::Build,
        platform: &str,
        lock: &Lock,
    ) -> Result<BuildRequest, Failure> {
        let mut secrets = BTreeMap::new();
        for (id, key) in &build.secrets {
            secrets.insert(id.clone(), self.secret_value(key)?.to_vec());
        }
        let lock_path = self.spec().folder.join("kiln.lock");
        let recordings = Recordings::new(lock.network.get(name).cloned().unwrap_or_default());
        let mut build = self.shares.added_to(build.clone(), &self.spec().folder);
        build.time_limit = self.context.run_timeout;
        build.ulimits.extend(self.context.ulimits.clone());
        build.args.extend(self.context.build_args.clone());
        build.no_cache |= self.context.no_cache;
        Ok(BuildRequest {
            ssh: agents(&build.ssh)?,
            build,
            name: name.to_owned(),
            platform: platform.to_owned(),
            secrets,
            epoch: epoch()?,
            pins: Arc::new(Mutex::new(lock.remote.clone())),
            recordings: Arc::new(recordings.keeping(Kept::beside(&lock_path))),
            live: self.live,
            allowed: self.allowed.clone(),
            results: Arc::default(),
            cancel: self.cancel.clone(),
        })
    }

    async fn mounted_images(
        &self,
        service: &Service,
        lock: &mut Lock,
    ) -> Result<BTreeMap<String, Digest>, Failure> {
        let mut found = BTreeMap::new();
        for mount in &service.mounts {
            if let MountSource::Image { reference, .. } = &mount.source {
                let digest = self
                    .resolver
                    .resolve(reference, false, lock)
                    .await
                    .map_err(build_failure)?;
                found.insert(reference.clone(), digest);
            }
        }
        Ok(found)
    }

    fn released(
        &self,
        name: &ServiceName,
        service: &Service,
        found: Found,
        files: BTreeMap<String, FileVersion>,
        mounted_images: BTreeMap<String, Digest>,
    ) -> ReleasedService {
        let image_name = self.image_name(name, service);
        let mut service = service.clone();
        // How it was built is the builder's business: the digest says what came of it,
        // and the same from another folder is the same.
        service.image = ImageSource::Reference(image_name.clone());
        let mut listens = found.verdict.listens.clone();
        let stated = service.expose.iter().chain(&found.image.config.exposed);
        listens.extend(
            stated
                .filter(|p| p.protocol == Protocol::Tcp)
                .map(|p| p.port),
        );
        listens.sort_unstable();
        listens.dedup();
        let scratch = scratch(&service, found.verdict.scratch);
        ReleasedService {
            image: ReleasedImage {
                name: image_name,
                digest: found.image.manifest,
                tree: found.image.tree,
                config: found.image.config,
            },
            scratch,
            listens,
            files,
            mounted_images,
            service,
        }
    }
}

/// What is learned, with what the file states; nothing below a mount of the file's.
fn scratch(service: &Service, learned: Vec<Scratch>) -> Vec<Scratch> {
    let mut all: BTreeMap<String, Scratch> = BTreeMap::new();
    if !service.security.read_only {
        all.extend(learned.into_iter().map(|s| (s.path.clone(), s)));
    }
    for stated in &service.kiln.scratch {
        let size = stated.size.unwrap_or(SCRATCH_SIZE);
        let one = Scratch {
            path: stated.path.clone(),
            size,
            exec: stated.exec,
        };
        all.insert(stated.path.clone(), one);
    }
    let mounted = |path: &str| {
        service
            .mounts
            .iter()
            .any(|m| Path::new(path).starts_with(&m.target))
    };
    all.into_values().filter(|s| !mounted(&s.path)).collect()
}

fn input(error: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Input, error.to_string())
}

fn build_failure(error: ResolveError) -> Failure {
    let failure = Failure::with_causes(Kind::Build, &error);
    match error {
        ResolveError::Secrets(_) => failure.hint(secrets::HINT),
        _ => failure,
    }
}

fn build_error(error: BuildError) -> Failure {
    let failure = Failure::with_causes(Kind::Build, &error);
    match error {
        BuildError::Secrets(_) => failure.hint(secrets::HINT),
        _ => failure,
    }
}

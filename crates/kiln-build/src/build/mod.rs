//! A whole build: the Containerfile is read, what it needs from outside is found, its
//! stages are carried out, and the target becomes an image in the store.

mod check;
mod declared;
mod differences;
mod foreign;
mod image;
mod stages;
mod sync;
mod verify;
mod why;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use kiln_model::spec::Build;
use kiln_model::{Digest, Progress, ProgressEvent};
use kiln_oci::registry::Client;
use kiln_runtime::Runtime;
use kiln_store::Store;

use crate::cache;
use crate::containerfile::{self, Containerfile, Kind, ParseErrors, Span, mount};
use crate::context::source::ContextSource;
use crate::context::{self, ContextError};
use crate::evaluate::EvaluateError;
use crate::exec::{Conditions, ExecError, StepError};
use crate::graph::{self, Ask, Graph, GraphError, Origin, Triggers, Wanted};
use crate::lint::BadDirective;
use crate::network::Network;
use crate::network::record::{self, Recordings};
use crate::remote::Pins;
use crate::secrets::{Allowed, Refused};
use crate::shared::{self, Import, Place, PlaceError, Results, Target};
pub use check::{Checked, check};
pub use differences::{Difference, differences};
pub use foreign::{Foreign, runs_here};
use image::Image;
use stages::Run;
pub use sync::Synced;

/// What carries builds out.
#[derive(Clone)]
pub struct Builder {
    pub store: Arc<Store>,
    pub runtime: Arc<Runtime>,
    pub progress: Arc<dyn Progress>,
    /// `KILN_ROOT/cache`, on the store's disk.
    pub cache: PathBuf,
    /// What RUN is connected to.
    pub network: Arc<Network>,
    /// What RUNs fetched, by digest: [`Builder::fetches`] of the cache, unless stated.
    pub fetches: PathBuf,
    /// Where results of others' builds are taken from.
    pub registry: Arc<Client>,
}

/// One build, with all that comes from outside already found.
#[derive(Clone)]
pub struct BuildRequest {
    pub build: Build,
    /// For people: the service's name.
    pub name: String,
    /// What is built for: `linux/amd64`; as [`graph::platform`] has it.
    pub platform: String,
    /// Secret contents by the id `RUN --mount=type=secret` uses.
    pub secrets: BTreeMap<String, Vec<u8>>,
    /// SOURCE_DATE_EPOCH in seconds; 0 where none is set.
    pub epoch: i64,
    /// Sockets of ssh agents by the id `RUN --mount=type=ssh` uses.
    pub ssh: BTreeMap<String, PathBuf>,
    /// What ADD takes from elsewhere is pinned to; learns.
    pub pins: Arc<Mutex<Pins>>,
    /// What RUNs fetched, as the lock has it for this image; learns.
    pub recordings: Arc<Recordings>,
    /// Everything that RUNs fetch is fetched, and recorded anew.
    pub live: bool,
    /// What may be in the image although it looks like a secret; learns.
    pub allowed: Arc<Allowed>,
    /// What instructions came to; learns.
    pub results: Arc<Results>,
    /// Setting it ends the build.
    pub cancel: Arc<AtomicBool>,
}

/// Why a build failed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("can't read {path}")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("there is neither a Containerfile nor a Dockerfile in {0}")]
    NoFile(PathBuf),
    #[error("{file}:\n{errors}")]
    Parse { file: String, errors: ParseErrors },
    #[error("{file}: {cause}")]
    Graph { file: String, cause: GraphError },
    #[error("{file}: {cause}")]
    Evaluate { file: String, cause: EvaluateError },
    #[error(transparent)]
    Step(Box<StepError>),
    #[error("{0}")]
    Secrets(Refused),
    #[error(transparent)]
    Context(#[from] ContextError),
    #[error("{file}: {span}")]
    Base {
        file: String,
        span: Span,
        #[source]
        cause: ExecError,
    },
    #[error("the image {image} has an ONBUILD instruction that can't be read: {text}: {errors}")]
    OnBuild {
        image: String,
        text: String,
        errors: ParseErrors,
    },
    #[error("{file}: {cause}")]
    Directive { file: String, cause: BadDirective },
    #[error("the file's `# check=error=true` stops the build:\n{}", check::shown(.0))]
    Findings(Checked),
    #[error("the image {image} was not found before the build")]
    Unresolved { image: String },
    #[error("{0}")]
    Foreign(foreign::Foreign),
    #[error("build.{key}: {cause}")]
    Cache {
        key: &'static str,
        cause: PlaceError,
    },
    #[error("build.network: `{0}` is neither `none`, `host` nor `default`")]
    Network(String),
    #[error("build.extra_hosts: `{0}` is not an address")]
    Host(String),
    #[error("can't put the watched files over the image of {name}")]
    Sync {
        name: String,
        #[source]
        cause: ExecError,
    },
    #[error("can't keep the image {name}")]
    Keep {
        name: String,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the build's thread was lost")]
    Lost,
}

/// A Containerfile that was read and understood, and what it needs from outside.
pub struct Prepared {
    request: BuildRequest,
    file: Containerfile,
    /// For people.
    file_name: String,
    /// For its own ignore file.
    file_path: Option<PathBuf>,
    graph: Graph,
}

impl Prepared {
    /// The references of all images that stages build on or copy from, as far as they are
    /// known: see [`Builder::missing`].
    pub fn images(&self) -> Result<BTreeSet<Wanted>, BuildError> {
        let mut images = BTreeSet::new();
        let mut add = |origin: Origin, platform: &str| {
            let reference = match origin {
                Origin::Image(name) => Some(name),
                Origin::Named(name) => {
                    image_context(&self.request.build.additional_contexts[&name])
                }
                Origin::Scratch | Origin::Stage(_) => None,
            };
            images.extend(reference.map(|reference| Wanted {
                reference,
                platform: platform.to_owned(),
            }));
        };
        let fail = |cause| BuildError::Graph {
            file: self.file_name.clone(),
            cause,
        };
        let contexts = self.contexts();
        let ask = self.ask(&contexts);
        for needed in &self.graph.stages {
            add(needed.base.clone(), &needed.platform);
            let own = &self.file.stages[needed.index].instructions;
            for instruction in needed.triggers.iter().chain(own) {
                for text in graph::froms(instruction) {
                    let from = graph::from(&self.file, &ask, needed.index, &text, instruction.span);
                    add(from.map_err(fail)?, &needed.platform);
                }
            }
        }
        Ok(images)
    }

    fn contexts(&self) -> Vec<&str> {
        let contexts = self.request.build.additional_contexts.keys();
        contexts.map(String::as_str).collect()
    }

    fn ask<'a>(&'a self, contexts: &'a [&'a str]) -> Ask<'a> {
        Ask {
            args: &self.request.build.args,
            target: self.request.build.target.as_deref(),
            platform: &self.request.platform,
            host: host(),
            contexts,
        }
    }
}

/// `docker-image://ref`, `oci-layout://folder` or `oci:folder`; else a folder.
fn image_context(value: &str) -> Option<String> {
    if let Some(reference) = value.strip_prefix("docker-image://") {
        return Some(reference.to_owned());
    }
    if let Some(folder) = value.strip_prefix("oci-layout://") {
        return Some(format!("oci:{folder}"));
    }
    let archive = ["oci:", "docker-archive:"]
        .iter()
        .any(|s| value.starts_with(s));
    archive.then(|| value.to_owned())
}

/// Reads a request's Containerfile and finds out what is built.
pub fn prepare(request: BuildRequest) -> Result<Prepared, BuildError> {
    supported(&request)?;
    let (file_name, file_path, file) = read(&request.build)?;
    let contexts: Vec<&str> = request
        .build
        .additional_contexts
        .keys()
        .map(String::as_str)
        .collect();
    let ask = Ask {
        args: &request.build.args,
        target: request.build.target.as_deref(),
        platform: &request.platform,
        host: host(),
        contexts: &contexts,
    };
    let graph =
        graph::resolve(&file, &ask, &Triggers::new()).map_err(|cause| BuildError::Graph {
            file: file_name.clone(),
            cause,
        })?;
    Ok(Prepared {
        request,
        file,
        file_name,
        file_path,
        graph,
    })
}

fn supported(request: &BuildRequest) -> Result<(), BuildError> {
    let build = &request.build;
    sources(build)?;
    targets(build)?;
    Ok(())
}

/// The caches that a build takes results from.
fn sources(build: &Build) -> Result<Vec<Place>, BuildError> {
    let key = "cache_from";
    let read = |text: &String| shared::source(text);
    let all: Result<_, _> = build.cache_from.iter().map(read).collect();
    all.map_err(|cause| BuildError::Cache { key, cause })
}

/// Where a build's results are to be exported to.
pub fn targets(build: &Build) -> Result<Vec<Target>, BuildError> {
    let key = "cache_to";
    let read = |text: &String| shared::target(text);
    let all: Result<_, _> = build.cache_to.iter().map(read).collect();
    all.map_err(|cause| BuildError::Cache { key, cause })
}

/// Its name for people, where it is, and what it says.
fn read(build: &Build) -> Result<(String, Option<PathBuf>, Containerfile), BuildError> {
    if let Some(image) = &build.declared {
        return Ok((
            image.place.file.clone(),
            None,
            declared::containerfile(image),
        ));
    }
    let (file_name, file_path, text) = read_file(build)?;
    let file = containerfile::parse(&text).map_err(|errors| BuildError::Parse {
        file: file_name.clone(),
        errors,
    })?;
    check::enforce(build, &file_name, &file)?;
    Ok((file_name, file_path, file))
}

fn read_file(build: &Build) -> Result<(String, Option<PathBuf>, Vec<u8>), BuildError> {
    if let Some(text) = &build.inline {
        return Ok(("dockerfile_inline".into(), None, text.clone().into_bytes()));
    }
    let names = ["Containerfile", "Dockerfile"].map(|name| build.context.join(name));
    let path = match &build.containerfile {
        Some(path) => path.clone(),
        None => match names.into_iter().find(|path| path.exists()) {
            Some(path) => path,
            None => return Err(BuildError::NoFile(build.context.clone())),
        },
    };
    let read = |cause| BuildError::Read {
        path: path.clone(),
        cause,
    };
    let mut bytes = Vec::new();
    context::open_plain(&path)
        // One byte more than allowed: the parser tells that it is too long.
        .and_then(|file| {
            file.take(containerfile::MAX_FILE as u64 + 1)
                .read_to_end(&mut bytes)
        })
        .map_err(read)?;
    Ok((path.display().to_string(), Some(path), bytes))
}

fn save(context: &ContextSource) {
    if let Err(cause) = context.save() {
        tracing::debug!(%cause, "the context's digests were not remembered");
    }
}

impl Builder {
    /// Where a cache folder has what RUNs fetched.
    pub fn fetches(cache: &Path) -> PathBuf {
        cache.join(record::FOLDER)
    }

    /// The images that must still be brought into the store before the build. ONBUILD
    /// instructions of those that are there may need more: ask until there are none.
    pub fn missing(
        &self,
        prepared: &mut Prepared,
        images: &BTreeMap<Wanted, Digest>,
    ) -> Result<BTreeSet<Wanted>, BuildError> {
        let mut triggers = Triggers::new();
        for needed in &prepared.graph.stages {
            let span = prepared.file.stages[needed.index].span;
            let (name, reference) = match &needed.base {
                Origin::Image(name) => (name, Some(name.clone())),
                Origin::Named(name) => (
                    name,
                    image_context(&prepared.request.build.additional_contexts[name]),
                ),
                _ => continue,
            };
            let of = |reference: &str| Wanted {
                reference: reference.to_owned(),
                platform: needed.platform.clone(),
            };
            let manifest = reference.and_then(|reference| images.get(&of(&reference)));
            if let Some(manifest) = manifest {
                triggers.insert(of(name), self.triggers(name, manifest, span)?);
            }
        }
        let contexts = prepared.contexts();
        let ask = prepared.ask(&contexts);
        let graph = graph::resolve(&prepared.file, &ask, &triggers);
        let graph = graph.map_err(|cause| BuildError::Graph {
            file: prepared.file_name.clone(),
            cause,
        })?;
        prepared.graph = graph;
        let mut wanted = prepared.images()?;
        wanted.retain(|reference| !images.contains_key(reference));
        Ok(wanted)
    }

    /// Carries a build out; `images`: the manifest of each of [`Prepared::images`]. The
    /// image is in the store then, pinned by no ref.
    pub async fn build(
        &self,
        prepared: Prepared,
        images: BTreeMap<Wanted, Digest>,
    ) -> Result<Digest, BuildError> {
        let builder = self.clone();
        let import = self.import(&prepared.request).await?;
        let work =
            move || builder.carry_out_under(&prepared, &images, import.as_ref(), Conditions::Usual);
        let built = tokio::task::spawn_blocking(work)
            .await
            .map_err(|_| BuildError::Lost)?;
        let built = built.map(|(digest, _)| digest);
        // The trees of large images are gone: their memory is somebody else's now.
        kiln_runtime::trim_heap();
        built
    }

    async fn import(&self, request: &BuildRequest) -> Result<Option<Import>, BuildError> {
        let sources = sources(&request.build)?;
        if sources.is_empty() {
            return Ok(None);
        }
        let task = format!("build {}", request.name);
        let (client, store) = (&self.registry, &self.store);
        Ok(Some(
            Import::open(client, store, &self.progress, task, sources).await,
        ))
    }

    /// The same without caches of others, on the caller's thread.
    pub fn carry_out(
        &self,
        prepared: &Prepared,
        images: &BTreeMap<Wanted, Digest>,
    ) -> Result<Digest, BuildError> {
        let (digest, _) = self.carry_out_under(prepared, images, None, Conditions::Usual)?;
        Ok(digest)
    }

    /// Also gives every stage that the target needs: its name for people, and what came of it.
    fn carry_out_under(
        &self,
        prepared: &Prepared,
        images: &BTreeMap<Wanted, Digest>,
        import: Option<&Import>,
        conditions: Conditions,
    ) -> Result<(Digest, Vec<(String, Image)>), BuildError> {
        foreign::check(prepared)?;
        let keep = |cause: Box<dyn std::error::Error + Send + Sync>| BuildError::Keep {
            name: prepared.request.name.clone(),
            cause,
        };
        let _lease = self.store.lease().map_err(|e| keep(Box::new(e)))?;
        let _in_use = cache::in_use(&self.cache).map_err(|e| keep(Box::new(e)))?;
        for warning in &prepared.file.warnings {
            self.progress.event(ProgressEvent::Warning {
                task: format!("build {}", prepared.request.name),
                text: format!("{}: {warning}", prepared.file_name),
            });
        }
        let context = self.context(prepared)?;
        let run = Run::new(self, prepared, images, context.as_ref(), import, conditions)?;
        let (stages, (document, tree)) = run.carry_out()?;
        let digest = std::thread::scope(|scope| {
            // It goes when it is saved: of many files it takes much memory.
            let saving = context.map(|context| scope.spawn(move || save(&context)));
            let digest = self.keep(document, tree).map_err(keep);
            if let Some(panic) = saving.and_then(|saving| saving.join().err()) {
                resume_unwind(panic);
            }
            digest
        })?;
        Ok((digest, stages))
    }

    /// Scanned only if anything is taken from it.
    fn context(&self, prepared: &Prepared) -> Result<Option<ContextSource>, BuildError> {
        let build = &prepared.request.build;
        let wanted = prepared.graph.stages.iter().any(|needed| {
            let own = &prepared.file.stages[needed.index].instructions;
            let mut instructions = needed.triggers.iter().chain(own);
            instructions.any(|i| match &i.kind {
                Kind::Copy(copy) => copy.from.is_none(),
                Kind::Add(_) => true,
                Kind::Run(run) => run.mounts.iter().any(|m| mount::from(m).is_none()),
                _ => false,
            })
        });
        if !wanted {
            return Ok(None);
        }
        let patterns = context::read_ignore(&build.context, prepared.file_path.as_deref())?;
        self.source(&build.context, &patterns).map(Some)
    }

    fn source(
        &self,
        folder: &Path,
        patterns: &context::ignore::Patterns,
    ) -> Result<ContextSource, BuildError> {
        let (cache, store) = (&self.cache, self.store.clone());
        Ok(ContextSource::scan(
            folder,
            patterns,
            cache,
            store,
            now_nanos(),
        )?)
    }
}

/// This machine's platform.
fn host() -> &'static str {
    static HOST: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    HOST.get_or_init(kiln_oci::host_platform)
}

/// Nanoseconds since the epoch: only for telling how settled a file is.
pub(crate) fn now_nanos() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |s| i128::try_from(s.as_nanos()).unwrap_or(i128::MAX))
}

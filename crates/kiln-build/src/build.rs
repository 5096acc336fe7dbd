//! A whole build: the Containerfile is read, what it needs from outside is found, its
//! stages are carried out, and the target becomes an image in the store.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{SystemTime, UNIX_EPOCH};

use kiln_model::instance::{InstanceNetwork, Resolver};
use kiln_model::spec::Build;
use kiln_model::{Digest, Progress, ProgressEvent};
use kiln_oci::blob::{BlobRead, BlobWrite};
use kiln_oci::manifest::{
    ConfigDocument, Descriptor, History, Manifest, media_type, parse_config, timestamp,
    write_config,
};
use kiln_runtime::Runtime;
use kiln_store::Store;

use crate::containerfile::{self, Containerfile, Kind, ParseErrors, Span, mount};
use crate::context::source::ContextSource;
use crate::context::{self, Context, ContextError};
use crate::evaluate::{self, Action, EvaluateError, Start};
use crate::exec::layer::LayerRef;
use crate::exec::state::Files;
use crate::exec::{Building, ExecError, Site, StepError, Taken};
use crate::graph::{self, Ask, Graph, GraphError, Origin};

/// A manifest or configuration is read up to this many bytes.
const MAX_DOCUMENT: u64 = 8 << 20;

/// What carries builds out.
#[derive(Clone)]
pub struct Builder {
    pub store: Arc<Store>,
    pub runtime: Arc<Runtime>,
    pub progress: Arc<dyn Progress>,
    /// `KILN_ROOT/cache`, on the store's disk.
    pub cache: PathBuf,
}

/// One build, with all that comes from outside already found.
#[derive(Clone)]
pub struct BuildRequest {
    pub build: Build,
    /// For people: the service's name.
    pub name: String,
    /// This host's: `linux/amd64`.
    pub platform: String,
    /// Secret contents by the id `RUN --mount=type=secret` uses.
    pub secrets: BTreeMap<String, Vec<u8>>,
    /// What RUN is connected to, where neither file nor request says otherwise.
    pub network: InstanceNetwork,
    pub resolver: Option<Resolver>,
    /// SOURCE_DATE_EPOCH in seconds; 0 where none is set.
    pub epoch: i64,
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
    #[error(transparent)]
    Context(#[from] ContextError),
    #[error("{file}: {span}")]
    Base {
        file: String,
        span: Span,
        #[source]
        cause: ExecError,
    },
    #[error("the image {image} has ONBUILD instructions ({first} …), which are not supported yet")]
    OnBuild { image: String, first: String },
    #[error("the image {image} was not found before the build")]
    Unresolved { image: String },
    #[error("building for {0} is not supported yet, only for this machine's platform")]
    Platforms(String),
    #[error("build.{0} is not supported yet")]
    Unsupported(&'static str),
    #[error("build.network: `{0}` is neither `none`, `host` nor `default`")]
    Network(String),
    #[error("build.extra_hosts: `{0}` is not an address")]
    Host(String),
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
    /// The references of all images that stages build on or copy from: they must be in
    /// the store before [`Builder::carry_out`].
    pub fn images(&self) -> Result<BTreeSet<String>, BuildError> {
        let mut images = BTreeSet::new();
        let mut add = |origin: Origin| match origin {
            Origin::Image(name) => {
                images.insert(name);
            }
            Origin::Named(name) => {
                let value = &self.request.build.additional_contexts[&name];
                if let Some(reference) = image_context(value) {
                    images.insert(reference);
                }
            }
            Origin::Scratch | Origin::Stage(_) => {}
        };
        let fail = |cause| BuildError::Graph {
            file: self.file_name.clone(),
            cause,
        };
        let contexts = self.contexts();
        let ask = self.ask(&contexts);
        for needed in &self.graph.stages {
            add(needed.base.clone());
            for instruction in &self.file.stages[needed.index].instructions {
                let texts: Vec<String> = match &instruction.kind {
                    Kind::Copy(copy) => copy.from.iter().cloned().collect(),
                    Kind::Run(run) => run.mounts.iter().filter_map(|m| mount::from(m)).collect(),
                    _ => Vec::new(),
                };
                for text in texts {
                    let from = graph::from(&self.file, &ask, needed.index, &text, instruction.span);
                    add(from.map_err(fail)?);
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
    check(&request)?;
    let (file_name, file_path, text) = read_file(&request.build)?;
    let file = containerfile::parse(&text).map_err(|errors| BuildError::Parse {
        file: file_name.clone(),
        errors,
    })?;
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
        contexts: &contexts,
    };
    let graph = graph::resolve(&file, &ask).map_err(|cause| BuildError::Graph {
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

fn check(request: &BuildRequest) -> Result<(), BuildError> {
    let build = &request.build;
    let other = build.platforms.iter().find(|p| **p != request.platform);
    if let Some(other) = other {
        return Err(BuildError::Platforms(other.clone()));
    }
    if !build.ssh.is_empty() {
        return Err(BuildError::Unsupported("ssh"));
    }
    if !build.cache_from.is_empty() {
        return Err(BuildError::Unsupported("cache_from"));
    }
    if !build.cache_to.is_empty() {
        return Err(BuildError::Unsupported("cache_to"));
    }
    Ok(())
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
    fs::File::open(&path)
        // One byte more than allowed: the parser tells that it is too long.
        .and_then(|file| {
            file.take(containerfile::MAX_FILE as u64 + 1)
                .read_to_end(&mut bytes)
        })
        .map_err(read)?;
    Ok((path.display().to_string(), Some(path), bytes))
}

/// What an image of the store brings into a build.
struct Image {
    files: Arc<Files>,
    layers: Vec<LayerRef>,
    document: ConfigDocument,
}

impl Builder {
    /// Carries a build out; `images`: the manifest of each of [`Prepared::images`]. The
    /// image is in the store then, pinned by no ref.
    pub async fn build(
        &self,
        prepared: Prepared,
        images: BTreeMap<String, Digest>,
    ) -> Result<Digest, BuildError> {
        let builder = self.clone();
        tokio::task::spawn_blocking(move || builder.carry_out(&prepared, &images))
            .await
            .map_err(|_| BuildError::Lost)?
    }

    /// The same, on the caller's thread.
    pub fn carry_out(
        &self,
        prepared: &Prepared,
        images: &BTreeMap<String, Digest>,
    ) -> Result<Digest, BuildError> {
        let keep = |cause: Box<dyn std::error::Error + Send + Sync>| BuildError::Keep {
            name: prepared.request.name.clone(),
            cause,
        };
        let _lease = self.store.lease().map_err(|e| keep(Box::new(e)))?;
        for warning in &prepared.file.warnings {
            self.progress.event(ProgressEvent::Warning {
                task: format!("build {}", prepared.request.name),
                text: format!("{}: {warning}", prepared.file_name),
            });
        }
        let context = self.context(prepared)?;
        let run = Run::new(self, prepared, images, context.as_ref())?;
        let document = run.stages()?;
        if let Some(context) = &context
            && let Err(cause) = context.save()
        {
            tracing::debug!(%cause, "the context's digests were not remembered");
        }
        self.keep(document).map_err(keep)
    }

    /// Scanned only if anything is taken from it.
    fn context(&self, prepared: &Prepared) -> Result<Option<ContextSource>, BuildError> {
        let build = &prepared.request.build;
        let wanted = prepared.graph.stages.iter().any(|needed| {
            let instructions = &prepared.file.stages[needed.index].instructions;
            instructions.iter().any(|i| match &i.kind {
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
        let context = Context::scan(folder, patterns)?;
        Ok(ContextSource::new(
            context,
            &self.cache,
            self.store.clone(),
            now_nanos(),
        ))
    }

    fn image(&self, name: &str, manifest: &Digest) -> Result<Image, BuildError> {
        let fail = |cause: Box<dyn std::error::Error + Send + Sync>| BuildError::Keep {
            name: name.to_owned(),
            cause,
        };
        let found = self.store.image(manifest).map_err(|e| fail(Box::new(e)))?;
        let image = found.ok_or_else(|| BuildError::Unresolved {
            image: name.to_owned(),
        })?;
        let mut bytes = Vec::new();
        let config = BlobRead::open(&*self.store, &image.config_digest);
        let config = config.map_err(|e| fail(Box::new(e)))?;
        let config = config.ok_or_else(|| fail("its configuration is not in the store".into()))?;
        config
            .take(MAX_DOCUMENT)
            .read_to_end(&mut bytes)
            .map_err(|e| fail(Box::new(e)))?;
        let document = parse_config(&bytes).map_err(|e| fail(Box::new(e)))?;
        if let Some(first) = document.on_build.first() {
            return Err(BuildError::OnBuild {
                image: name.to_owned(),
                first: first.clone(),
            });
        }
        let layers = image.layers.iter().map(|layer| LayerRef {
            digest: layer.digest,
            size: layer.size,
            diff_id: layer.diff_id,
        });
        Ok(Image {
            files: Files::image(*manifest, image.tree),
            layers: layers.collect(),
            document,
        })
    }

    fn keep(
        &self,
        (document, layers): (ConfigDocument, Vec<LayerRef>),
    ) -> Result<Digest, Box<dyn std::error::Error + Send + Sync>> {
        let config = write_config(&document);
        let (digest, size) = self.store.write(None, &mut config.as_slice())?;
        let mut descriptors = Vec::new();
        for layer in &layers {
            let media_type = self.layer_type(layer)?;
            descriptors.push(Descriptor::new(media_type, layer.digest, layer.size));
        }
        let config = Descriptor::new(media_type::OCI_CONFIG, digest, size);
        let manifest = Manifest::new(config, descriptors).to_bytes();
        let (digest, _) = self.store.write(None, &mut manifest.as_slice())?;
        self.store.add_image(&digest)?;
        Ok(digest)
    }

    /// By the blob's first bytes: a base's layers may be compressed otherwise.
    fn layer_type(
        &self,
        layer: &LayerRef,
    ) -> Result<&'static str, Box<dyn std::error::Error + Send + Sync>> {
        let blob = BlobRead::open(&*self.store, &layer.digest)?;
        let blob = blob.ok_or_else(|| format!("the layer {} is not in the store", layer.digest))?;
        let mut first = Vec::new();
        blob.take(6).read_to_end(&mut first)?;
        Ok(match kiln_oci::layer::Compression::sniff(&first) {
            kiln_oci::layer::Compression::Gzip => media_type::OCI_LAYER_GZIP,
            kiln_oci::layer::Compression::Zstd => media_type::OCI_LAYER_ZSTD,
            _ => media_type::OCI_LAYER,
        })
    }
}

/// Nanoseconds since the epoch: only for telling how settled a file is.
fn now_nanos() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |s| i128::try_from(s.as_nanos()).unwrap_or(i128::MAX))
}

/// A build while it runs.
struct Run<'a> {
    builder: &'a Builder,
    prepared: &'a Prepared,
    images: &'a BTreeMap<String, Digest>,
    site: Site<'a>,
    folders: BTreeMap<String, std::rc::Rc<ContextSource>>,
}

/// A stage that is done.
struct Built {
    building: Building,
    document: ConfigDocument,
    args: BTreeMap<String, String>,
}

impl<'a> Run<'a> {
    fn new(
        builder: &'a Builder,
        prepared: &'a Prepared,
        images: &'a BTreeMap<String, Digest>,
        context: Option<&'a ContextSource>,
    ) -> Result<Self, BuildError> {
        let request = &prepared.request;
        let mut folders = BTreeMap::new();
        for (name, value) in &request.build.additional_contexts {
            if image_context(value).is_none() {
                let folder = PathBuf::from(value);
                let patterns = context::read_ignore(&folder, None)?;
                let source = builder.source(&folder, &patterns)?;
                folders.insert(name.clone(), std::rc::Rc::new(source));
            }
        }
        let site = Site {
            store: builder.store.clone(),
            runtime: builder.runtime.clone(),
            progress: builder.progress.clone(),
            cache: builder.cache.clone(),
            task: format!("build {}", request.name),
            file: prepared.file_name.clone(),
            epoch: request.epoch,
            no_cache: request.build.no_cache,
            network: match request.build.network.as_str() {
                "" | "default" => request.network.clone(),
                "none" => InstanceNetwork::Isolated,
                "host" => InstanceNetwork::Host,
                other => return Err(BuildError::Network(other.to_owned())),
            },
            resolver: request.resolver.clone(),
            hosts: hosts(&request.build)?,
            shm_size: request.build.shm_size,
            secrets: &request.secrets,
            cancel: &request.cancel,
            context,
        };
        Ok(Self {
            builder,
            prepared,
            images,
            site,
            folders,
        })
    }

    fn stages(&self) -> Result<(ConfigDocument, Vec<LayerRef>), BuildError> {
        let stages = &self.prepared.graph.stages;
        let mut built: BTreeMap<usize, Built> = BTreeMap::new();
        let mut last = None;
        for needed in stages {
            let stage = self.stage(needed, &built)?;
            last = Some(needed.index);
            built.insert(needed.index, stage);
        }
        let target = last.and_then(|index| built.remove(&index));
        let target = target.ok_or(BuildError::Lost)?;
        let mut document = target.document;
        let labels = self.prepared.request.build.labels.clone();
        document.config.labels.extend(labels);
        document.created = Some(timestamp(self.site.epoch));
        document.diff_ids = target.building.layers.iter().map(|l| l.diff_id).collect();
        document.config.platform = self.prepared.request.platform.clone();
        Ok((document, target.building.layers))
    }

    /// What a stage begins with.
    fn base(
        &self,
        needed: &graph::Needed,
        built: &BTreeMap<usize, Built>,
    ) -> Result<Built, BuildError> {
        let of_image = |name: &str| -> Result<Built, BuildError> {
            let image = self.image(name)?;
            Ok(Built {
                building: Building {
                    files: image.files,
                    layers: image.layers,
                },
                document: image.document,
                args: BTreeMap::new(),
            })
        };
        match &needed.base {
            Origin::Image(name) => of_image(name),
            Origin::Named(name) => {
                match image_context(&self.prepared.request.build.additional_contexts[name]) {
                    Some(reference) => of_image(&reference),
                    None => Err(self.unsupported(needed, "FROM a folder given as a named context")),
                }
            }
            Origin::Scratch => Ok(Built {
                building: Building {
                    files: Files::empty(),
                    layers: Vec::new(),
                },
                document: ConfigDocument::default(),
                args: BTreeMap::new(),
            }),
            Origin::Stage(index) => {
                let stage = built.get(index).ok_or(BuildError::Lost)?;
                Ok(Built {
                    building: Building {
                        files: stage.building.files.clone(),
                        layers: stage.building.layers.clone(),
                    },
                    document: stage.document.clone(),
                    args: stage.args.clone(),
                })
            }
        }
    }

    fn unsupported(&self, needed: &graph::Needed, what: &str) -> BuildError {
        BuildError::Base {
            file: self.prepared.file_name.clone(),
            span: self.prepared.file.stages[needed.index].span,
            cause: ExecError::Unsupported(what.to_owned()),
        }
    }

    fn image(&self, name: &str) -> Result<Image, BuildError> {
        let manifest = self
            .images
            .get(name)
            .ok_or_else(|| BuildError::Unresolved {
                image: name.to_owned(),
            })?;
        self.builder.image(name, manifest)
    }

    fn stage(
        &self,
        needed: &graph::Needed,
        built: &BTreeMap<usize, Built>,
    ) -> Result<Built, BuildError> {
        let Built {
            mut building,
            mut document,
            args,
        } = self.base(needed, built)?;
        let request = &self.prepared.request;
        let start = Start {
            config: document.config,
            author: document.author,
            args,
            given: &request.build.args,
            globals: &self.prepared.graph.globals,
        };
        let evaluated = evaluate::evaluate(&self.prepared.file, needed.index, start);
        let evaluated = evaluated.map_err(|cause| BuildError::Evaluate {
            file: self.prepared.file_name.clone(),
            cause,
        })?;
        let total = evaluated
            .steps
            .iter()
            .filter(|s| s.action != Action::None)
            .count();
        let mut number = 0;
        for step in &evaluated.steps {
            let mut layer = None;
            if step.action != Action::None {
                number += 1;
                let find = |text: &str, span: Span| self.find(needed.index, text, span, built);
                let done = self.site.step(&mut building, step, (number, total), &find);
                let done = done.map_err(BuildError::Step)?;
                layer = done.layer;
            }
            document.history.push(History {
                created: Some(timestamp(request.epoch)),
                created_by: Some(step.history.clone()),
                comment: None,
                author: None,
                empty_layer: layer.is_none(),
            });
        }
        document.config = evaluated.config;
        document.author = evaluated.author;
        Ok(Built {
            building,
            document,
            args: evaluated.args,
        })
    }

    /// Where a `--from` leads.
    fn find(
        &self,
        index: usize,
        text: &str,
        span: Span,
        built: &BTreeMap<usize, Built>,
    ) -> Result<Taken, ExecError> {
        let contexts = self.prepared.contexts();
        let ask = self.prepared.ask(&contexts);
        let origin =
            graph::from(&self.prepared.file, &ask, index, text, span).map_err(ExecError::store)?;
        let of_image = |name: &str| match self.image(name) {
            Ok(image) => Ok(Taken::Files(image.files)),
            Err(cause) => Err(ExecError::store(cause)),
        };
        match origin {
            Origin::Scratch => Ok(Taken::Files(Files::empty())),
            Origin::Stage(index) => match built.get(&index) {
                Some(stage) => Ok(Taken::Files(stage.building.files.clone())),
                None => Err(ExecError::store(BuildError::Lost)),
            },
            Origin::Named(name) => match self.folders.get(&name) {
                Some(folder) => Ok(Taken::Folder(folder.clone())),
                None => of_image(
                    &image_context(&self.prepared.request.build.additional_contexts[&name])
                        .unwrap_or_default(),
                ),
            },
            Origin::Image(name) => of_image(&name),
        }
    }
}

fn hosts(build: &Build) -> Result<Vec<(IpAddr, String)>, BuildError> {
    build
        .extra_hosts
        .iter()
        .map(|(name, address)| {
            let address = address.trim_matches(['[', ']']);
            match address.parse() {
                Ok(address) => Ok((address, name.clone())),
                Err(_) => Err(BuildError::Host(address.to_owned())),
            }
        })
        .collect()
}

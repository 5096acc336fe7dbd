//! Carrying out the stages: each as soon as what it takes from is there, several at once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use kiln_model::secrets::Finder;
use kiln_model::spec::Build;
use kiln_model::{Digest, ImageConfig, ProgressEvent};
use kiln_oci::manifest::{ConfigDocument, History, timestamp};
use kiln_store::Tree;

use super::image::Image;
use super::{BuildError, Builder, Prepared, image_context};
use crate::containerfile::{RunNetwork, Span};
use crate::context;
use crate::context::source::ContextSource;
use crate::evaluate::{self, Action, CopyAction, Start, Step, Taking};
use crate::exec::layer::LayerRef;
use crate::exec::state::Files;
use crate::exec::{Building, Conditions, ExecError, Place, Site, Taken};
use crate::graph::{self, Needed, Origin, Wanted};
use crate::secrets::{self, Given, Located, Refused};
use crate::shared::Import;

/// Stages that are built at the same time; a bound, as each may run a compiler.
const MAX_AT_ONCE: usize = 8;

/// The configuration and layers of what was built; the tree where it is at hand, and its
/// digest where it is in the store.
type Target = (
    (ConfigDocument, Vec<LayerRef>),
    Option<(Arc<Tree>, Option<Digest>)>,
);

/// A build while it runs.
pub(super) struct Run<'a> {
    builder: &'a Builder,
    prepared: &'a Prepared,
    images: &'a BTreeMap<Wanted, Digest>,
    site: Site<'a>,
    folders: BTreeMap<String, Arc<ContextSource>>,
    /// By their place in the file.
    built: Vec<OnceLock<Built>>,
    finder: Finder,
}

/// Stages that are still to be built.
struct Todo {
    /// Positions in the graph, in the file's order.
    waiting: Vec<usize>,
    running: usize,
    failed: Option<BuildError>,
}

/// A stage that is done.
struct Built {
    building: Building,
    document: ConfigDocument,
    args: BTreeMap<String, String>,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        builder: &'a Builder,
        prepared: &'a Prepared,
        images: &'a BTreeMap<Wanted, Digest>,
        context: Option<&'a ContextSource>,
        import: Option<&'a Import>,
        conditions: Conditions,
    ) -> Result<Self, BuildError> {
        let request = &prepared.request;
        let mut folders = BTreeMap::new();
        for (name, value) in &request.build.additional_contexts {
            if image_context(value).is_none() {
                let folder = PathBuf::from(value);
                let patterns = context::read_ignore(&folder, None)?;
                let source = builder.source(&folder, &patterns)?;
                folders.insert(name.clone(), Arc::new(source));
            }
        }
        let site = Site {
            store: builder.store.clone(),
            runtime: builder.runtime.clone(),
            progress: builder.progress.clone(),
            cache: builder.cache.clone(),
            task: format!("build {}", request.name),
            file: prepared.file_name.clone(),
            target: request.platform.clone(),
            build: Digest::of(format!(
                "{}\n{}\n{}",
                request.name,
                prepared.file_name,
                request.build.context.display()
            )),
            epoch: request.epoch,
            no_cache: request.build.no_cache || conditions == Conditions::Other,
            conditions,
            network: match request.build.network.as_str() {
                "" | "default" => RunNetwork::Default,
                "none" => RunNetwork::None,
                "host" => RunNetwork::Host,
                other => return Err(BuildError::Network(other.to_owned())),
            },
            networks: builder.network.clone(),
            hosts: hosts(&request.build)?,
            shm_size: request.build.shm_size,
            ulimits: &request.build.ulimits,
            time_limit: request.build.time_limit,
            secrets: &request.secrets,
            given: Given::new(&request.secrets),
            pins: request.pins.clone(),
            recordings: request.recordings.clone(),
            live: request.live,
            bodies: builder.fetches.clone(),
            ssh: &request.ssh,
            cancel: &request.cancel,
            context,
            results: request.results.clone(),
            import,
        };
        Ok(Self {
            builder,
            prepared,
            images,
            site,
            folders,
            built: prepared
                .file
                .stages
                .iter()
                .map(|_| OnceLock::new())
                .collect(),
            finder: Finder::default(),
        })
    }

    /// Every stage with its name for people, in their order, and the target.
    pub(super) fn carry_out(mut self) -> Result<(Vec<(String, Image)>, Target), BuildError> {
        self.all()?;
        let last = self.prepared.graph.stages.last().ok_or(BuildError::Lost)?;
        let mut stages = Vec::new();
        let mut findings = Vec::new();
        for needed in &self.prepared.graph.stages {
            let built = self.built[needed.index].take().ok_or(BuildError::Lost)?;
            let image = Image {
                files: built.building.files,
                layers: built.building.layers,
                document: built.document,
            };
            stages.push((self.stage_name(needed.index), image));
            findings = built.building.findings;
        }
        self.judge(findings)?;
        let (_, target) = stages.last().ok_or(BuildError::Lost)?;
        let mut document = target.document.clone();
        let labels = self.prepared.request.build.labels.clone();
        document.config.labels.extend(labels);
        document.created = Some(timestamp(self.site.epoch));
        document.diff_ids = target.layers.iter().map(|l| l.diff_id).collect();
        document.config.platform.clone_from(&last.platform);
        let layers = target.layers.iter().map(|l| l.digest);
        self.site.results.image(layers);
        let tree = target.files.exact_tree();
        let target = ((document, target.layers.clone()), tree);
        Ok((stages, target))
    }

    /// Refuses an image with secrets in it, and says what each instance gets of its own.
    fn judge(&self, mut findings: Vec<Located>) -> Result<(), BuildError> {
        let request = &self.prepared.request;
        let labels = secrets::in_labels(&self.finder, &request.build.labels);
        findings.extend(labels.into_iter().map(|finding| Located {
            finding,
            span: Span::default(),
            instruction: "build.labels".into(),
        }));
        let tell = |text| {
            self.builder.progress.event(ProgressEvent::Warning {
                task: self.site.task.clone(),
                text,
            });
        };
        let mut told = BTreeSet::new();
        findings.retain(|found| {
            let finding = &found.finding;
            let text = match (finding.made_anew, request.allowed.allows(finding)) {
                (true, _) => finding.told_anew(),
                (false, true) => finding.told_allowed(),
                (false, false) => return true,
            };
            if told.insert(text.clone()) {
                tell(text);
            }
            false
        });
        match findings.is_empty() {
            true => Ok(()),
            false => Err(BuildError::Secrets(Refused {
                file: self.prepared.file_name.clone(),
                findings,
            })),
        }
    }

    /// Builds every needed stage. After a failure no other one is begun, and those that
    /// run come to their end.
    fn all(&self) -> Result<(), BuildError> {
        let stages = &self.prepared.graph.stages;
        let takes = stages
            .iter()
            .map(|needed| self.takes(needed))
            .collect::<Result<Vec<_>, _>>()?;
        let todo = Mutex::new(Todo {
            waiting: (0..stages.len()).collect(),
            running: 0,
            failed: None,
        });
        let changed = Condvar::new();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = match self.site.conditions {
            Conditions::Usual => stages.len().min(processors.clamp(2, MAX_AT_ONCE)),
            Conditions::Other => 1,
        };
        std::thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(|| self.work(&takes, &todo, &changed));
            }
            self.work(&takes, &todo, &changed);
        });
        let todo = todo.into_inner().unwrap_or_else(PoisonError::into_inner);
        match todo.failed {
            Some(error) => Err(error),
            None if todo.waiting.is_empty() => Ok(()),
            None => Err(BuildError::Lost),
        }
    }

    /// One worker: takes the first stage that can be built, until there is none.
    fn work(&self, takes: &[BTreeSet<usize>], todo: &Mutex<Todo>, changed: &Condvar) {
        let stages = &self.prepared.graph.stages;
        let mut state = todo.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.waiting.is_empty() || state.failed.is_some() {
                return;
            }
            let ready = |position: &usize| {
                let mut takes = takes[*position].iter();
                takes.all(|index| self.built[*index].get().is_some())
            };
            let next = match self.site.conditions {
                Conditions::Usual => state.waiting.iter().position(ready),
                Conditions::Other => state.waiting.iter().rposition(ready),
            };
            let Some(at) = next else {
                if state.running == 0 {
                    return;
                }
                state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let needed = &stages[state.waiting.remove(at)];
            state.running += 1;
            drop(state);
            let result = self.stage(needed);
            state = todo.lock().unwrap_or_else(PoisonError::into_inner);
            state.running -= 1;
            match result {
                Ok(built) => {
                    let _ = self.built[needed.index].set(built);
                }
                Err(error) => {
                    state.failed.get_or_insert(error);
                }
            }
            changed.notify_all();
        }
    }

    /// The stages that one takes from.
    fn takes(&self, needed: &Needed) -> Result<BTreeSet<usize>, BuildError> {
        let contexts = self.prepared.contexts();
        let ask = self.prepared.ask(&contexts);
        let file = &self.prepared.file;
        let mut takes = BTreeSet::new();
        let mut add = |origin: &Origin| {
            if let Origin::Stage(index) = origin {
                takes.insert(*index);
            }
        };
        add(&needed.base);
        let own = &file.stages[needed.index].instructions;
        for instruction in needed.triggers.iter().chain(own) {
            for text in graph::froms(instruction) {
                let from = graph::from(file, &ask, needed.index, &text, instruction.span);
                add(&from.map_err(|cause| BuildError::Graph {
                    file: self.prepared.file_name.clone(),
                    cause,
                })?);
            }
        }
        Ok(takes)
    }

    /// What a stage begins with.
    fn base(&self, needed: &Needed) -> Result<Built, BuildError> {
        let of_image = |name: &str| -> Result<Built, BuildError> {
            let image = self.image(name, &needed.platform)?;
            Ok(Built {
                building: Building {
                    files: image.files,
                    layers: image.layers,
                    findings: Vec::new(),
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
                    None => self.folder(needed, name),
                }
            }
            Origin::Scratch => Ok(nothing()),
            Origin::Stage(index) => {
                let stage = self.built[*index].get().ok_or(BuildError::Lost)?;
                Ok(Built {
                    building: Building {
                        files: stage.building.files.clone(),
                        layers: stage.building.layers.clone(),
                        findings: stage.building.findings.clone(),
                    },
                    document: stage.document.clone(),
                    args: stage.args.clone(),
                })
            }
        }
    }

    /// FROM a named context that is a folder: its files are the root.
    fn folder(&self, needed: &Needed, name: &str) -> Result<Built, BuildError> {
        let stage = &self.prepared.file.stages[needed.index];
        let action = CopyAction {
            unpack: false,
            from: Some(name.to_owned()),
            sources: vec![Taking::Path("/".into())],
            destination: "/".into(),
            chown: None,
            chmod: None,
            exclude: Vec::new(),
            parents: false,
            link: false,
        };
        let step = Step {
            span: stage.span,
            text: stage.text.clone(),
            action: Action::Copy(action),
            history: stage.text.clone(),
        };
        let mut built = nothing();
        self.step(&mut built, needed, &step, [0; 3])?;
        Ok(built)
    }

    /// Carries out one step and adds it to the history. The numbers are those of [`Place`].
    fn step(
        &self,
        built: &mut Built,
        needed: &Needed,
        step: &Step,
        [number, total, twin]: [usize; 3],
    ) -> Result<(), BuildError> {
        let mut layers = 0;
        if step.action != Action::None {
            let find = |text: &str, span: Span| self.find(needed, text, span);
            let stage = self.stage_name(needed.index);
            let own = &self.prepared.file.stages[needed.index];
            let place = Place {
                stage: &stage,
                home: own.name.as_deref().unwrap_or(&own.base),
                platform: &needed.platform,
                number,
                total,
                twin,
            };
            let done = self.site.step(&mut built.building, step, &place, &find);
            layers = done.map_err(BuildError::Step)?.layers;
        }
        let said = secrets::in_instruction(&self.finder, &step.history);
        built.building.find(step, said);
        // Engines want an entry for every layer.
        built
            .document
            .history
            .extend((0..layers.max(1)).map(|part| History {
                created: Some(timestamp(self.prepared.request.epoch)),
                created_by: Some(step.history.clone()),
                comment: (layers > 1).then(|| format!("part {} of {layers}", part + 1)),
                author: None,
                empty_layer: layers == 0,
            }));
        Ok(())
    }

    /// For progress: empty where there is only one stage.
    fn stage_name(&self, index: usize) -> String {
        match (
            self.prepared.graph.stages.len(),
            &self.prepared.file.stages[index].name,
        ) {
            (1, _) => String::new(),
            (_, Some(name)) => format!("{name} "),
            (_, None) => format!("stage-{index} "),
        }
    }

    fn image(&self, name: &str, platform: &str) -> Result<Image, BuildError> {
        let wanted = Wanted {
            reference: name.to_owned(),
            platform: platform.to_owned(),
        };
        let manifest = self.images.get(&wanted);
        let manifest = manifest.ok_or_else(|| BuildError::Unresolved {
            image: name.to_owned(),
        })?;
        self.builder.image(name, manifest)
    }

    fn stage(&self, needed: &Needed) -> Result<Built, BuildError> {
        let mut built = self.base(needed)?;
        let start = Start {
            config: std::mem::take(&mut built.document.config),
            author: built.document.author.take(),
            args: std::mem::take(&mut built.args),
            given: &self.prepared.request.build.args,
            globals: &self.prepared.graph.globals,
            triggers: &needed.triggers,
        };
        let evaluated = evaluate::evaluate(&self.prepared.file, needed.index, start);
        let evaluated = evaluated.map_err(|cause| BuildError::Evaluate {
            file: self.prepared.file_name.clone(),
            cause,
        })?;
        let works = |step: &&Step| step.action != Action::None;
        let total = evaluated.steps.iter().filter(works).count();
        let mut number = 0;
        for (index, step) in evaluated.steps.iter().enumerate() {
            number += usize::from(works(&step));
            let earlier = &evaluated.steps[..index];
            let twins = earlier.iter().filter(|other| other.text == step.text);
            self.step(&mut built, needed, step, [number, total, twins.count()])?;
        }
        built.document.config = evaluated.config;
        built.document.author = evaluated.author;
        // The base's triggers have been carried out.
        built.document.on_build = evaluated.on_build;
        built.args = evaluated.args;
        Ok(built)
    }

    /// Where a `--from` leads.
    fn find(&self, needed: &Needed, text: &str, span: Span) -> Result<Taken, ExecError> {
        let contexts = self.prepared.contexts();
        let ask = self.prepared.ask(&contexts);
        let origin = graph::from(&self.prepared.file, &ask, needed.index, text, span)
            .map_err(ExecError::store)?;
        let of_image = |name: &str| match self.image(name, &needed.platform) {
            Ok(image) => Ok(Taken::Files(image.files)),
            Err(cause) => Err(ExecError::store(cause)),
        };
        match origin {
            Origin::Scratch => Ok(Taken::Files(Files::empty())),
            Origin::Stage(index) => match self.built[index].get() {
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

/// FROM scratch.
fn nothing() -> Built {
    Built {
        building: Building {
            files: Files::empty(),
            layers: Vec::new(),
            findings: Vec::new(),
        },
        document: ConfigDocument {
            config: ImageConfig {
                working_dir: "/".into(),
                ..ImageConfig::default()
            },
            ..ConfigDocument::default()
        },
        args: BTreeMap::new(),
    }
}

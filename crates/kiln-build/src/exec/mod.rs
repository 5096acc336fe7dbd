//! Carrying out a stage's steps: copying, running in the sandbox, layers and their cache.
//!
//! Invariants: a step changes files only through the tree it ends with; the same inputs
//! give the same layers, whatever the folder, the time and the machine; nothing of a
//! failed step stays.

mod agent;
mod apt;
mod databases;
mod declared;
mod fetches;
pub mod layer;
mod mounts;
mod npm;
mod reason;
mod run;
pub mod state;
mod steps;
mod sweep;
mod unfold;
mod upper;
mod variables;
mod work;

use std::collections::BTreeMap;
use std::io;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kiln_model::instance::ExitStatus;
use kiln_model::progress::Finish;
use kiln_model::{Digest, Millis, Progress, ProgressEvent};
use kiln_runtime::{Runtime, StartError};
use kiln_store::{Store, Tree, chain_id};

use crate::containerfile::{RunNetwork, Span};
use crate::context::source::ContextSource;
use crate::copy::CopyError;
use crate::copy::accounts::AccountError;
use crate::copy::archive::ArchiveError;
use crate::copy::owner::OwnerError;
use crate::evaluate::{Action, Step};
use crate::files::FilesError;
use crate::network::record::Recordings;
use crate::network::{Network, NetworkError, RecordError};
use crate::secrets::{self, Finding, Given, Located, Look};
use crate::shared::{Import, Results};
use fetches::Taped;
use layer::{Delta, LayerError, LayerRef, Part};
use reason::{Inputs, Reasons};
use state::{Files, Key, Made, StepCache};
pub(crate) use sweep::VERIFY_PREFIX;
pub use sweep::sweep;

/// How many of a failed command's last lines are told.
pub const TOLD_LINES: usize = 30;

/// Bytes of files from which on reading their layers again takes longer than keeping the tree.
const MUCH: u64 = 4 << 20;

/// Changed files of which layers and the tree are not made at the same time: it takes as much
/// memory as all else.
const MANY: usize = 50_000;

/// Layers made at the same time; a bound on memory.
const MAX_LAYER_THREADS: usize = 4;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error("{path}")]
    Archive {
        path: String,
        #[source]
        cause: ArchiveError,
    },
    #[error(transparent)]
    Remote(#[from] crate::remote::RemoteError),
    #[error(transparent)]
    Context(#[from] crate::context::ContextError),
    /// `at`: where an entry is declared, and its path.
    #[error("{at}")]
    Declared {
        at: String,
        #[source]
        cause: Box<ExecError>,
    },
    #[error(transparent)]
    Account(#[from] Box<AccountError>),
    #[error(transparent)]
    Owner(#[from] OwnerError),
    #[error(transparent)]
    Exclude(#[from] crate::context::glob::BadPattern),
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error(transparent)]
    Upper(#[from] upper::UpperError),
    #[error("the command {status}{}", last_lines(.lines))]
    Command {
        status: ExitStatus,
        lines: Vec<String>,
        /// Set where the disk was full when it ended.
        #[source]
        cause: Option<io::Error>,
    },
    #[error("the command has not ended within {limit}, the most that a RUN may take (--run-timeout){}", last_lines(.lines))]
    TooLong { limit: Millis, lines: Vec<String> },
    #[error("there is no network for the command")]
    Network(#[source] Box<NetworkError>),
    #[error("what the command fetched")]
    Record(#[source] Box<RecordError>),
    #[error("what a killed build left can't be taken away")]
    Left(#[source] kiln_runtime::RuntimeError),
    #[error("the sandbox can't be started")]
    Sandbox(#[source] StartError),
    #[error("the secret `{0}` is required but was not given to the build")]
    Secret(String),
    #[error("the secret `{0}` is not text, so it can't be given as a variable")]
    SecretText(String),
    #[error("the ssh agent `{0}` is required but was not given to the build (build.ssh)")]
    Ssh(String),
    #[error("{0} is not supported yet")]
    Unsupported(String),
    #[error("can't use {path}")]
    Scratch {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("the store failed")]
    Store(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the file content {0} is not in the store any more")]
    Lost(Digest),
    #[error("there is no build context for this build")]
    NoContext,
    #[error("cancelled")]
    Cancelled,
}

impl ExecError {
    pub(crate) fn network(cause: NetworkError) -> Self {
        Self::Network(Box::new(cause))
    }

    pub(crate) fn store(cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Store(Box::new(cause))
    }

    /// Without a command's output, which was told while it ran.
    fn brief(&self) -> String {
        match self {
            Self::Command { status, .. } => format!("the command {status}"),
            other => other.to_string(),
        }
    }
}

fn last_lines(lines: &[String]) -> String {
    if lines.is_empty() {
        return "; it printed nothing".into();
    }
    format!("; its last output:\n  {}", lines.join("\n  "))
}

/// A failed step with its place.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {span}: {text}")]
pub struct StepError {
    pub file: String,
    pub span: Span,
    pub text: String,
    #[source]
    pub cause: ExecError,
}

/// What all steps of a build share.
pub struct Site<'a> {
    pub store: Arc<Store>,
    pub runtime: Arc<Runtime>,
    pub progress: Arc<dyn Progress>,
    /// The builder's cache folder.
    pub cache: PathBuf,
    /// `build <name>`.
    pub task: String,
    /// The Containerfile's name, for people.
    pub file: String,
    /// The platform that the whole is built for.
    pub target: String,
    /// Tells builds apart whose instructions are the same.
    pub build: Digest,
    /// SOURCE_DATE_EPOCH: seconds.
    pub epoch: i64,
    pub no_cache: bool,
    pub conditions: Conditions,
    /// Where RUN doesn't say it.
    pub network: RunNetwork,
    pub networks: Arc<Network>,
    pub hosts: Vec<(std::net::IpAddr, String)>,
    pub shm_size: Option<u64>,
    pub ulimits: &'a BTreeMap<String, (i64, i64)>,
    /// The most time that one RUN may take.
    pub time_limit: Option<Millis>,
    /// By id.
    pub secrets: &'a BTreeMap<String, Vec<u8>>,
    /// The same, to be looked for in layers.
    pub given: Given,
    /// What remote sources are pinned to; learns.
    pub pins: Arc<std::sync::Mutex<crate::remote::Pins>>,
    /// What RUNs fetched; learns.
    pub recordings: Arc<Recordings>,
    /// What is recorded is fetched anew.
    pub live: bool,
    /// The folder of what was recorded.
    pub bodies: PathBuf,
    /// Sockets of ssh agents, by id.
    pub ssh: &'a BTreeMap<String, PathBuf>,
    pub cancel: &'a AtomicBool,
    pub context: Option<&'a ContextSource>,
    /// What steps came to; learns.
    pub results: Arc<Results>,
    /// Caches of others.
    pub import: Option<&'a Import>,
}

/// What an image must not depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Conditions {
    #[default]
    Usual,
    /// Another order and one processor.
    Other,
}

/// Where an instruction's `--from` leads, found out beforehand.
pub type Find<'a> = dyn Fn(&str, Span) -> Result<Taken, ExecError> + 'a;

/// Files to take from.
#[derive(Clone)]
pub enum Taken {
    Files(Arc<Files>),
    /// A named context that is a folder.
    Folder(Arc<ContextSource>),
}

/// A stage while it is built.
pub struct Building {
    pub files: Arc<Files>,
    pub layers: Vec<LayerRef>,
    /// What its instructions have brought that may not be in an image.
    pub findings: Vec<Located>,
}

/// Where a step stands.
pub struct Place<'a> {
    /// For people, with a blank after it; empty where there is one stage only.
    pub stage: &'a str,
    /// The stage as the file names it, or what it is built from.
    pub home: &'a str,
    /// What the stage is built for.
    pub platform: &'a str,
    /// Among the stage's steps, and of how many.
    pub number: usize,
    pub total: usize,
    /// How many of the stage's earlier instructions read the same.
    pub twin: usize,
}

/// What one step came to.
pub struct Done {
    /// How many it added.
    pub layers: usize,
    pub cached: bool,
}

/// What people are told of a step.
struct Told<'a> {
    task: &'a str,
    step: &'a Step,
    place: &'a Place<'a>,
    reasons: Reasons,
}

/// What carrying out a step came to.
struct Carried {
    tree: Tree,
    /// What the result depends on and was not known before.
    fetched: Option<Digest>,
}

impl From<Tree> for Carried {
    fn from(tree: Tree) -> Self {
        Self {
            tree,
            fetched: None,
        }
    }
}

/// What an instruction has changed, in the store.
struct Written {
    layers: Vec<LayerRef>,
    findings: Vec<Finding>,
    /// See [`Files::given`].
    exact: bool,
    /// Of the whole tree, where there was much of it.
    tree_digest: Option<Digest>,
}

impl Site<'_> {
    /// Carries out one step, or finds that it was carried out before.
    pub fn step(
        &self,
        building: &mut Building,
        step: &Step,
        place: &Place<'_>,
        find: &Find<'_>,
    ) -> Result<Done, Box<StepError>> {
        let (stage, number, total) = (place.stage, place.number, place.total);
        let task = format!("{}: {stage}{number}/{total}", self.task);
        self.progress.event(ProgressEvent::Started {
            task: task.clone(),
            detail: step.text.clone(),
        });
        let begun = Instant::now();
        let told = Told {
            task: &task,
            step,
            place,
            reasons: Reasons::new(&self.cache, &self.build, step, place),
        };
        let result = self.carry_out(building, step, &told, find);
        let how = match &result {
            Ok(done) if done.cached => Finish::Cached,
            Ok(_) => Finish::Done,
            Err(cause) => Finish::Failed {
                cause: cause.brief(),
            },
        };
        self.progress.event(ProgressEvent::Finished {
            task,
            how,
            took: Millis::from(begun.elapsed()),
        });
        result.map_err(|cause| {
            Box::new(StepError {
                file: self.file.clone(),
                span: step.span,
                text: step.text.clone(),
                cause,
            })
        })
    }

    fn carry_out(
        &self,
        building: &mut Building,
        step: &Step,
        told: &Told<'_>,
        find: &Find<'_>,
    ) -> Result<Done, ExecError> {
        let before = building.files.key;
        if self.cancel.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(ExecError::Cancelled);
        }
        match &step.action {
            Action::None => Ok(Done {
                layers: 0,
                cached: false,
            }),
            Action::Folder { path, user } => {
                let mut key = Key::new("folder", &before);
                key.field(path.as_bytes()).field(user.as_bytes());
                key.field(&self.epoch.to_le_bytes());
                let inputs = || self.folder_inputs(&before, path, user);
                self.cached(building, key.finish(), told, inputs, |files| {
                    self.folder(files, path, user).map(Carried::from)
                })
            }
            Action::Copy(copy) => {
                let mut picked = self.pick(copy, step.span, find, false)?;
                let mut key = self.copy_key(&before, copy, &picked);
                let known = StepCache::new(&self.cache).get(&key, &self.store);
                if (self.no_cache || known.is_none()) && !self.stored(&picked)? {
                    picked = self.pick(copy, step.span, find, true)?;
                    key = self.copy_key(&before, copy, &picked);
                }
                // Of many files it takes much memory: nobody has it once they are placed.
                let picked = Rc::new(picked);
                let known = picked.clone();
                let inputs = move || self.copy_inputs(&before, copy, &known);
                self.cached(building, key, told, inputs, move |files| {
                    self.place(files, copy, &picked).map(Carried::from)
                })
            }
            Action::Declared(declared) => {
                let picked = self.pick_declared(declared)?;
                let key = self.declared_key(&before, declared, &picked);
                let inputs = || self.declared_inputs(&before, declared, &picked);
                self.cached(building, key, told, inputs, |files| {
                    self.declared(files, declared, &picked).map(Carried::from)
                })
            }
            Action::Run(run) => {
                let mounts = self.mounts(run, step.span, find)?;
                let key = self.run_key(&before, run, &mounts);
                let taped = self.taped(run, step, told.place);
                let inputs = || self.run_inputs(&before, run, &mounts);
                self.taped_run(building, key, told, taped.as_ref(), inputs, |files| {
                    self.run(files, (run, &key), &mounts, taped.as_ref(), told)
                })
            }
        }
    }

    /// Uses the remembered result of a key, or makes and remembers it.
    fn cached(
        &self,
        building: &mut Building,
        key: Digest,
        told: &Told<'_>,
        inputs: impl FnOnce() -> Inputs,
        make: impl FnOnce(&Files) -> Result<Carried, ExecError>,
    ) -> Result<Done, ExecError> {
        self.taped_run(building, key, told, None, inputs, make)
    }

    /// The same for what may fetch something: that is part of the key, so that a result is
    /// never taken for one that was made of something else.
    fn taped_run(
        &self,
        building: &mut Building,
        of: Digest,
        told: &Told<'_>,
        taped: Option<&Taped>,
        inputs: impl FnOnce() -> Inputs,
        make: impl FnOnce(&Files) -> Result<Carried, ExecError>,
    ) -> Result<Done, ExecError> {
        let steps = StepCache::new(&self.cache);
        let known = taped.and_then(Taped::digest);
        let key = fetches::key(&of, known);
        let anew = self.anew(taped);
        let made = match self.no_cache || anew {
            true => None,
            false => self.known(&steps, &key, told.task)?,
        };
        if let Some(made) = made {
            self.results.add(key, &made);
            building.advance(key, made.clone(), None, told.step);
            return Ok(Done {
                layers: made.layers.len(),
                cached: true,
            });
        }
        let mut inputs = inputs();
        inputs.fetched(known.as_ref());
        self.progress.event(ProgressEvent::Explained {
            task: told.task.to_owned(),
            why: match (self.no_cache, anew) {
                (true, _) => "no_cache asks for it".into(),
                (false, true) => "what it fetches is recorded anew".into(),
                (false, false) => told.reasons.why(&key, &inputs),
            },
        });
        let begun = Instant::now();
        let before = building.files.tree(&self.store)?;
        let Carried { tree, fetched } = make(&building.files)?;
        let key = fetches::key(&of, fetched);
        inputs.fetched(fetched.as_ref());
        let marks = taped.map(|_| self.marks()).unwrap_or_default();
        let Written {
            layers,
            findings,
            exact,
            tree_digest,
        } = self.write(building, &before, &tree, &marks)?;
        let made = Made {
            layers,
            findings: secrets::judged(findings, &tree, &self.store),
            took: begun.elapsed().into(),
        };
        // What holds a secret of the build's is kept for no later one: `gc` takes it.
        if !made.findings.iter().any(Finding::is_given) {
            if let Some(tree) = &tree_digest {
                self.remember_tree(building.layers.iter().chain(&made.layers), tree)?;
            }
            self.remember(&steps, &key, made.clone())?;
        }
        self.results.add(key, &made);
        if let Err(cause) = told.reasons.remember(key, inputs) {
            tracing::debug!(%cause, "an instruction's inputs were not remembered");
        }
        let done = Done {
            layers: made.layers.len(),
            cached: false,
        };
        let files = Files::given(key, tree, exact, tree_digest);
        building.advance(key, made, Some(files), told.step);
        Ok(done)
    }

    /// Makes the layers of what an instruction has changed, and a large tree beside them.
    fn write(
        &self,
        building: &Building,
        before: &Tree,
        tree: &Tree,
        marks: &[Vec<u8>],
    ) -> Result<Written, ExecError> {
        let delta = Delta::between(before, tree);
        let exact = building.files.is_exact() && delta.is_exact();
        let large = exact && delta.bytes() >= MUCH;
        let layers = || self.layers(&delta, building.layers.len(), marks);
        let write = || large.then(|| self.store.write_tree(tree)).transpose();
        let (layers, written) = match delta.len() <= MANY {
            true => std::thread::scope(|scope| {
                let layers = scope.spawn(layers);
                // By this thread, which has made the tree: what it has freed is its own.
                let written = write();
                let layers = layers.join().unwrap_or_else(|e| resume_unwind(e));
                (layers, written)
            }),
            false => {
                let layers = layers();
                drop(delta);
                (layers, write())
            }
        };
        let (layers, findings) = layers?;
        Ok(Written {
            layers,
            findings,
            exact,
            tree_digest: written.map_err(ExecError::store)?,
        })
    }

    /// Remembers what layers make: reading the last of them again takes long.
    fn remember_tree<'l>(
        &self,
        layers: impl Iterator<Item = &'l LayerRef>,
        tree: &Digest,
    ) -> Result<(), ExecError> {
        let all: Vec<Digest> = layers.map(|layer| layer.diff_id).collect();
        match chain_id(&all) {
            Some(chain) => self.store.remember_chain(&chain, tree),
            None => Ok(()),
        }
        .map_err(ExecError::store)
    }

    /// What the cache has, or a cache of others.
    fn known(
        &self,
        steps: &StepCache,
        key: &Digest,
        task: &str,
    ) -> Result<Option<Made>, ExecError> {
        if let Some(made) = steps.get(key, &self.store) {
            return Ok(Some(made));
        }
        let Some((made, from)) = self.import.and_then(|import| import.get(key)) else {
            return Ok(None);
        };
        self.remember(steps, key, made.clone())?;
        let task = task.to_owned();
        self.progress.event(ProgressEvent::Taken { task, from });
        Ok(Some(made))
    }

    /// Writes what has changed, several layers at a time, and looks for what may not be in
    /// them. A layer of a part that is as it was in an earlier build is there already.
    fn layers(
        &self,
        delta: &Delta<'_>,
        below: usize,
        marks: &[Vec<u8>],
    ) -> Result<(Vec<LayerRef>, Vec<Finding>), ExecError> {
        let parts = delta.parts(below);
        if parts.len() > 1 {
            // The disk is idle meanwhile, and what it has does not have to be waited for.
            let store = self.store.clone();
            std::thread::spawn(move || store.sync());
        }
        let mut made: Vec<Option<Result<Made, ExecError>>> = Vec::new();
        made.resize_with(parts.len(), || None);
        let known = self.given.is_empty() && marks.is_empty() && !self.no_cache;
        let remember = parts.len() > 1 && known;
        let work = Mutex::new(parts.iter().zip(&mut made));
        let next = || work.lock().unwrap_or_else(PoisonError::into_inner).next();
        let run = || {
            while let Some((part, made)) = next() {
                *made = Some(self.layer(part, marks, remember));
            }
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 1..processors.min(MAX_LAYER_THREADS).min(parts.len()) {
                scope.spawn(run);
            }
            run();
        });
        let (mut layers, mut findings) = (Vec::new(), Vec::new());
        for one in made.into_iter().flatten() {
            let one = one?;
            layers.extend(one.layers);
            findings.extend(one.findings);
        }
        Ok((layers, findings))
    }

    fn layer(&self, part: &Part<'_>, marks: &[Vec<u8>], remember: bool) -> Result<Made, ExecError> {
        let steps = StepCache::new(&self.cache);
        let key = remember.then(|| part.key());
        if let Some(made) = key.and_then(|key| steps.get(&key, &self.store)) {
            return Ok(made);
        }
        let begun = Instant::now();
        let look = Look::new(&self.given, marks);
        let (layer, findings) = part.write(&self.store, Some(&look))?;
        let made = Made {
            layers: vec![layer],
            findings,
            took: begun.elapsed().into(),
        };
        if let Some(key) = key {
            self.remember(&steps, &key, made.clone())?;
        }
        Ok(made)
    }

    fn remember(&self, steps: &StepCache, key: &Digest, made: Made) -> Result<(), ExecError> {
        steps.put(key, made).map_err(|cause| ExecError::Scratch {
            path: self.cache.join(StepCache::FOLDER),
            cause,
        })
    }

    /// A folder for temporary files, on the store's disk.
    pub(crate) fn scratch(&self) -> Result<PathBuf, ExecError> {
        scratch(&self.cache)
    }
}

pub(crate) fn scratch(cache: &std::path::Path) -> Result<PathBuf, ExecError> {
    let path = cache.join("run");
    match std::fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(cause) => Err(ExecError::Scratch { path, cause }),
    }
}

impl Building {
    fn advance(&mut self, key: Digest, made: Made, files: Option<Arc<Files>>, step: &Step) {
        let blobs: Vec<Digest> = made.layers.iter().map(|layer| layer.digest).collect();
        self.layers.extend(made.layers);
        let all: Vec<Digest> = self.layers.iter().map(|layer| layer.diff_id).collect();
        self.files = match (files, chain_id(&all)) {
            (Some(files), _) => files,
            (None, Some(chain)) if !blobs.is_empty() => {
                Files::layers(key, self.files.clone(), blobs, chain)
            }
            // Nothing changed, but what comes next may still depend on it.
            (None, _) => self.files.clone(),
        };
        self.find(step, made.findings);
    }

    /// Remembers what an instruction has brought.
    pub(crate) fn find(&mut self, step: &Step, findings: Vec<secrets::Finding>) {
        let instruction = step.history.split(' ').next().unwrap_or_default();
        self.findings
            .extend(findings.into_iter().map(|finding| Located {
                finding,
                span: step.span,
                instruction: instruction.to_owned(),
            }));
    }
}

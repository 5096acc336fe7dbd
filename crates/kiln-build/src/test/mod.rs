//! An image's proof before a release: it runs as its service would, without outside
//! network, over a throw-away layer; it must start and stay up (a job: end well), pass its
//! healthcheck and its `x-kiln.test` checks. What it wrote meanwhile is its write set.
//!
//! A service that needs its peers can't always stay up alone. With `peers`, ending early
//! or staying unhealthy is [`Outcome::Inconclusive`] and stops nothing: the replacement
//! proves it later, beside what serves. Checks under `x-kiln.test` are promises about the
//! image alone, so a failed one is a failure all the same.
//!
//! Files of tests that others' tools have formats for are carried out as they are
//! ([`structure`]).
//!
//! # Format
//! Verdicts are remembered by image and request: `cache/tests/<the request's digest>.json`,
//! a [`Record`], version 4.

mod check;
mod goss;
pub mod learn;
mod matching;
mod observe;
mod sheet;
mod structure;
mod write_set;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use kiln_model::instance::{
    InstanceLimits, InstanceMount, InstanceNetwork, InstanceSecurity, Purpose, Root, Scratch,
    SharedNamespaces,
};
use kiln_model::spec::{Check, Healthcheck, Hook, Logging};
use kiln_model::suite::{Goss, Suite};
use kiln_model::{Digest, InstanceId, InstanceSpec, Millis};
use kiln_runtime::Runtime;
use kiln_store::Store;
use serde::{Deserialize, Serialize};

use crate::cache;
use crate::held::Held;

use self::observe::Running;
use self::sheet::Sheet;
pub use self::sheet::{Case, CaseResult, Failed};
use self::structure::Subject;

const FORMAT: u32 = 4;

/// Before the six letters and digits that a test's folder and instance are named by.
pub(crate) const PREFIX: &str = "test-";

/// How often a test looks.
const LOOK: Duration = Duration::from_millis(20);

/// A program's output, or a file, is looked through up to this many bytes.
const MAX_TEXT_BYTES: u64 = 16 << 20;

/// How many of the last log lines are kept.
pub const LOG_LINES: usize = 50;

/// What is tested, and how it would run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TestRequest {
    pub name: String,
    /// The manifest, in the store.
    pub image: Digest,
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub cwd: String,
    pub user: String,
    pub group_add: Vec<String>,
    pub stop_signal: String,
    /// How long it may take to end.
    pub stop_grace: Millis,
    /// A small init is the first process.
    pub init: bool,
    /// Configs, secrets, and something in place of each volume.
    pub mounts: Vec<InstanceMount>,
    /// The image's VOLUMEs.
    pub volumes: Vec<String>,
    pub security: InstanceSecurity,
    pub limits: InstanceLimits,
    pub healthcheck: Option<Healthcheck>,
    /// For healthchecks in shell form; empty: `/bin/sh -c`.
    pub shell: Vec<String>,
    pub checks: Vec<Check>,
    /// What the files among the checks say, by digest.
    pub suites: BTreeMap<Digest, Suite>,
    /// Run in it once it has started.
    pub post_start: Vec<Hook>,
    /// A job: it must end with code 0.
    pub completes: bool,
    /// It has services beside it that it may need.
    pub peers: bool,
    /// Names that must resolve for it to start at all (its peers'); nobody answers there.
    pub hosts: Vec<(std::net::IpAddr, String)>,
    /// How long it must stay up if it listens nowhere (a job: may take).
    pub settle: Millis,
}

/// How it went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    #[default]
    Passed,
    /// It can't tell without its peers; why.
    Inconclusive(String),
}

/// A test that stops nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub outcome: Outcome,
    /// The write set, with what is always scratch.
    pub scratch: Vec<Scratch>,
    /// TCP ports it listened on.
    pub listens: Vec<u16>,
    /// What people should know.
    pub warnings: Vec<String>,
    /// Everything that was checked.
    pub cases: Vec<Case>,
    /// Its last output.
    pub log: Vec<String>,
}

impl Verdict {
    /// Of what was tested elsewhere.
    pub fn known(scratch: Vec<Scratch>, listens: Vec<u16>) -> Self {
        Self {
            scratch,
            listens,
            ..Self::default()
        }
    }
}

/// A test that stops the release.
#[derive(Debug, thiserror::Error)]
pub enum TestFailure {
    #[error("{0}")]
    Failed(Box<Failed>),
    #[error("{name}: the test can't be carried out")]
    Machine {
        name: String,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("cancelled")]
    Cancelled,
}

#[derive(Serialize, Deserialize)]
struct Record {
    format: u32,
    /// The image's manifest.
    image: Digest,
    /// As in the file's name: of what was asked of it.
    request: Digest,
    verdict: Verdict,
}

impl TestRequest {
    /// The digest by which its verdict is remembered.
    pub fn digest(&self) -> Result<Digest, serde_json::Error> {
        Digest::of_json(self)
    }

    /// Whether anything is asked of the running program.
    fn asks_what_runs(&self) -> bool {
        self.running_checks().next().is_some() || self.goss().next().is_some()
    }

    /// The files of goss among the checks, by their names.
    fn goss(&self) -> impl Iterator<Item = (&str, &Goss)> {
        self.checks.iter().filter_map(|check| match check {
            Check::Suite { path, digest, .. } => match self.suites.get(digest) {
                Some(Suite::Goss(goss)) => Some((path.as_str(), goss)),
                _ => None,
            },
            _ => None,
        })
    }

    /// The checks of something that runs, each with its case's name.
    fn running_checks(&self) -> impl Iterator<Item = (String, &Check)> {
        let checks = self.checks.iter().enumerate();
        checks
            .filter(|(_, check)| !matches!(check, Check::Suite { .. }))
            .map(|(at, check)| {
                (
                    format!("x-kiln.test[{at}] ({})", check::shown(check)),
                    check,
                )
            })
    }
}

/// What carries tests out.
#[derive(Clone)]
pub struct Tester {
    pub store: Arc<Store>,
    pub runtime: Arc<Runtime>,
    /// `KILN_ROOT/cache`.
    pub cache: PathBuf,
}

impl Tester {
    /// Tests an image, unless the same was tested before.
    pub fn test_image(
        &self,
        request: &TestRequest,
        cancel: &AtomicBool,
    ) -> Result<Verdict, TestFailure> {
        if let Some(verdict) = self.known(request) {
            return Ok(verdict);
        }
        let verdict = self.run(request, cancel)?;
        if let Err(cause) = self.remember(request, &verdict) {
            tracing::debug!(%cause, "the verdict was not remembered");
        }
        Ok(verdict)
    }

    /// The verdict of an earlier test of exactly this.
    pub fn known(&self, request: &TestRequest) -> Option<Verdict> {
        let path = record(&self.cache, &request.digest().ok()?);
        let verdict = read(&path)?;
        cache::used(&path);
        Some(verdict)
    }

    fn remember(&self, request: &TestRequest, verdict: &Verdict) -> std::io::Result<()> {
        let digest = request.digest()?;
        let path = record(&self.cache, &digest);
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let record = Record {
            format: FORMAT,
            image: request.image,
            request: digest,
            verdict: verdict.clone(),
        };
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&serde_json::to_vec(&record)?)?;
        file.persist(path).map_err(|e| e.error)?;
        Ok(())
    }

    fn run(&self, request: &TestRequest, cancel: &AtomicBool) -> Result<Verdict, TestFailure> {
        let machine = |cause: Box<dyn std::error::Error + Send + Sync>| TestFailure::Machine {
            name: request.name.clone(),
            cause,
        };
        let image = self
            .store
            .image(&request.image)
            .map_err(|e| machine(Box::new(e)))?;
        let image = image
            .ok_or_else(|| machine(format!("{} is not in the store", request.image).into()))?;
        let tree = self
            .store
            .load_tree(&image.tree)
            .map_err(|e| machine(Box::new(e)))?;
        let mut sheet = Sheet::new();
        let subject = Subject {
            tester: self,
            request,
            image: &image,
            tree: &tree,
            cancel,
        };
        subject.check_files(&mut sheet)?;
        let always: Vec<&str> = learn::ALWAYS
            .into_iter()
            .filter(|path| write_set::is_folder(&tree, path) || write_set::is_missing(&tree, path))
            .collect();
        let work =
            work(&self.cache.join("run"), &tree, &always).map_err(|e| machine(Box::new(e)))?;
        let spec = self
            .spec(request, &image.tree, work.path())
            .map_err(|e| machine(Box::new(e)))?;
        let result = match self.runtime.start(&spec) {
            Ok(_) => {
                let running = Running {
                    tester: self,
                    request,
                    id: &spec.id,
                    cancel,
                };
                running.observe(&mut sheet)
            }
            Err(cause) => Err(machine(Box::new(cause))),
        };
        // Ends the program as a release would, so that what it writes at its end is seen;
        // one that the signal can't reach has nothing to say.
        let log = self.log(&spec.id);
        if result.is_ok() && self.runtime.heeds(&spec.id, &request.stop_signal) {
            let _ = self
                .runtime
                .stop(&spec.id, &request.stop_signal, request.stop_grace);
        }
        let removed = self.runtime.remove(&spec.id);
        let (outcome, listens) = result?;
        removed.map_err(|e| machine(Box::new(e)))?;
        if sheet.has_failed() {
            return Err(TestFailure::Failed(Box::new(Failed {
                name: request.name.clone(),
                cases: sheet.into_cases(),
                log,
            })));
        }
        let writes =
            write_set::read(&work.path().join("upper"), &tree).map_err(|e| machine(Box::new(e)))?;
        let mounted: Vec<String> = request.mounts.iter().map(|m| m.target.clone()).collect();
        let inconclusive = matches!(outcome, Outcome::Inconclusive(_));
        let likely: &[&str] = if inconclusive { &learn::LIKELY } else { &[] };
        let likely = likely.iter().filter(|p| write_set::is_folder(&tree, p));
        let always: Vec<String> = always
            .iter()
            .chain(likely)
            .map(|p| (*p).to_owned())
            .collect();
        let volumes: Vec<String> = request
            .volumes
            .iter()
            .filter(|p| write_set::is_folder(&tree, p))
            .cloned()
            .collect();
        let learned = learn::learn(&writes, &volumes, &mounted, &always);
        Ok(Verdict {
            scratch: learned.scratch,
            listens,
            warnings: warnings(&learned.uncovered, &outcome),
            outcome,
            cases: sheet.into_cases(),
            log,
        })
    }

    fn spec(
        &self,
        request: &TestRequest,
        tree: &Digest,
        work: &Path,
    ) -> Result<InstanceSpec, kiln_model::IdError> {
        let name = work
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(InstanceSpec {
            format: InstanceSpec::FORMAT,
            id: InstanceId::new(name)?,
            purpose: Purpose::Test,
            argv: request.argv.clone(),
            env: request.env.clone(),
            cwd: request.cwd.clone(),
            user: request.user.clone(),
            group_add: request.group_add.clone(),
            hostname: "kiln-test".into(),
            domainname: None,
            root: Root::Layered {
                tree: Some(self.store.tree_paths(tree)),
                upper: work.join("upper"),
                work: work.join("work"),
            },
            mounts: request.mounts.clone(),
            network: InstanceNetwork::Isolated,
            resolver: None,
            hosts: request.hosts.clone(),
            namespaces: SharedNamespaces::default(),
            security: request.security.clone(),
            limits: request.limits.clone(),
            stop_signal: request.stop_signal.clone(),
            stop_grace: request.stop_grace,
            init: request.init,
            tty: false,
            stdin_open: false,
            logging: Logging::default(),
        })
    }

    fn log(&self, id: &InstanceId) -> Vec<String> {
        let mut lines = std::collections::VecDeque::new();
        let mut reader = self.runtime.log(id);
        while let Ok(Some(record)) = reader.next_record() {
            if lines.len() == LOG_LINES {
                lines.pop_front();
            }
            lines.push_back(record.text);
        }
        lines.into()
    }
}

fn look_again() {
    std::thread::sleep(LOOK);
}

/// The program's writable layer, gone with the test, with those folders of `always` in it
/// that the image lacks.
fn work(scratch: &Path, tree: &kiln_store::tree::Tree, always: &[&str]) -> std::io::Result<Held> {
    fs::create_dir_all(scratch)?;
    let folder = Held::new(scratch, PREFIX)?;
    for name in ["upper", "work"] {
        let path = folder.path().join(name);
        fs::DirBuilder::new().mode(0o755).create(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    for missing in always.iter().filter(|p| write_set::is_missing(tree, p)) {
        write_set::make(&folder.path().join("upper"), tree, missing)?;
    }
    Ok(folder)
}

fn warnings(uncovered: &[String], outcome: &Outcome) -> Vec<String> {
    const TOLD: usize = 10;
    let mut warnings = Vec::new();
    if let Outcome::Inconclusive(why) = outcome {
        warnings.push(format!(
            "inconclusive: {why}; what it writes is not known, so {} are scratch",
            learn::LIKELY.join(", ")
        ));
    }
    if uncovered.is_empty() {
        return warnings;
    }
    let more = uncovered.len().saturating_sub(TOLD);
    let mut text = uncovered[..uncovered.len().min(TOLD)].join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    warnings.push(format!(
        "it wrote where a release is read-only: {text}; if it needs that, say x-kiln.scratch or x-kiln.root: scratch"
    ));
    warnings
}

/// The verdict of the test with this request, while the cache has it.
pub fn remembered(cache: &Path, request: &Digest) -> Option<Verdict> {
    read(&record(cache, request))
}

fn record(cache: &Path, request: &Digest) -> PathBuf {
    cache.join("tests").join(format!("{}.json", request.hex()))
}

fn read(path: &Path) -> Option<Verdict> {
    let record: Record = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (record.format == FORMAT).then_some(record.verdict)
}

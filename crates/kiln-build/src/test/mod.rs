//! An image's proof before a release: it runs as its service would, without outside
//! network, over a throw-away layer; it must start and stay up (a job: end well), pass its
//! healthcheck and its `x-kiln.test` checks. What it wrote meanwhile is its write set.
//!
//! A service that needs its peers can't always stay up alone. With `peers`, ending early
//! or staying unhealthy is [`Outcome::Inconclusive`] and stops nothing: the replacement
//! proves it later, beside what serves. Checks under `x-kiln.test` are promises about the
//! image alone, so a failed one is a failure all the same.
//!
//! Verdicts are remembered by image and request: `cache/tests/<digest>.json`.

mod check;
pub mod learn;
mod write_set;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kiln_model::instance::{
    ExitStatus, InstanceLimits, InstanceMount, InstanceNetwork, InstanceSecurity, ObservedState,
    Purpose, Root, Scratch, SharedNamespaces,
};
use kiln_model::spec::{Check, HealthTest, Healthcheck, Hook, Logging};
use kiln_model::{Digest, InstanceId, InstanceSpec, Millis};
use kiln_runtime::Runtime;
use kiln_store::Store;
use serde::{Deserialize, Serialize};

use crate::cache;
use crate::held::Held;

const FORMAT: u32 = 3;

/// Before the six letters and digits that a test's folder and instance are named by.
pub(crate) const PREFIX: &str = "test-";

/// How often a test looks.
const LOOK: Duration = Duration::from_millis(20);

/// How long a service must stay up once it listens.
const LISTENING: Duration = Duration::from_millis(300);

/// How many of the last log lines are kept.
pub const LOG_LINES: usize = 50;

/// How long checks are retried: a program may listen late.
const CHECK_LIMIT: Duration = Duration::from_secs(20);

/// How long a `post_start` hook may take alone.
const HOOK_LIMIT: Millis = Millis(120_000);

/// A healthcheck's start period and retries are waited for, but never longer.
const HEALTH_LIMIT: Duration = Duration::from_secs(120);

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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Passed,
    /// It can't tell without its peers; why.
    Inconclusive(String),
}

/// A test that stops nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub outcome: Outcome,
    /// The write set, with what is always scratch.
    pub scratch: Vec<Scratch>,
    /// TCP ports it listened on.
    pub listens: Vec<u16>,
    /// What people should know.
    pub warnings: Vec<String>,
    /// Its last output.
    pub log: Vec<String>,
}

/// A test that stops the release.
#[derive(Debug, thiserror::Error)]
pub enum TestFailure {
    #[error("{name}: the program {status} in its isolated test{}", shown(.log))]
    Ended {
        name: String,
        status: ExitStatus,
        log: Vec<String>,
    },
    #[error("{name}: the job was still running after {limit}{}", shown(.log))]
    Endless {
        name: String,
        limit: Millis,
        log: Vec<String>,
    },
    #[error("{name}: the healthcheck kept failing: {cause}{}", shown(.log))]
    Unhealthy {
        name: String,
        cause: String,
        log: Vec<String>,
    },
    #[error("{name}: post_start: {cause}{}", shown(.log))]
    Hook {
        name: String,
        cause: String,
        log: Vec<String>,
    },
    #[error("{name}: x-kiln.test[{index}] ({what}): {cause}{}", shown(.log))]
    Check {
        name: String,
        index: usize,
        what: String,
        cause: String,
        log: Vec<String>,
    },
    #[error("{name}: the test can't be carried out")]
    Machine {
        name: String,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("cancelled")]
    Cancelled,
}

fn shown(log: &[String]) -> String {
    match log.is_empty() {
        true => "; it printed nothing".into(),
        false => format!("; its last output:\n  {}", log.join("\n  ")),
    }
}

#[derive(Serialize, Deserialize)]
struct Record {
    format: u32,
    verdict: Verdict,
}

/// What carries tests out.
#[derive(Clone)]
pub struct Tester {
    pub store: Arc<Store>,
    pub runtime: Arc<Runtime>,
    /// `KILN_ROOT/cache`.
    pub cache: PathBuf,
}

/// Why waiting ended.
enum End {
    Settled,
    Exited(ExitStatus),
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
        let path = self.remembered(request);
        let verdict = self.run(request, cancel)?;
        if let Some(path) = path
            && let Err(cause) = remember(&path, &verdict)
        {
            tracing::debug!(%cause, "the verdict was not remembered");
        }
        Ok(verdict)
    }

    /// The verdict of an earlier test of exactly this.
    pub fn known(&self, request: &TestRequest) -> Option<Verdict> {
        let path = self.remembered(request)?;
        let verdict = read(&path)?;
        cache::used(&path);
        Some(verdict)
    }

    fn remembered(&self, request: &TestRequest) -> Option<PathBuf> {
        let key = Digest::of_json(request).ok()?;
        Some(self.cache.join("tests").join(format!("{}.json", key.hex())))
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
            Ok(_) => self.observe(request, &spec.id, cancel),
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
        let (outcome, listens) = result.map_err(|failure| failure.with_log(log.clone()))?;
        removed.map_err(|e| machine(Box::new(e)))?;
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

    fn observe(
        &self,
        request: &TestRequest,
        id: &InstanceId,
        cancel: &AtomicBool,
    ) -> Result<(Outcome, Vec<u16>), TestFailure> {
        let name = || request.name.clone();
        let inconclusive = |why: String| Ok((Outcome::Inconclusive(why), Vec::new()));
        if let Some(cause) = self.run_hooks(request, id)? {
            return inconclusive(format!("post_start fails alone: {cause}"));
        }
        match (self.settle(request, id, cancel)?, request.completes) {
            (End::Exited(status), true) if status.success() => {
                return Ok((Outcome::Passed, Vec::new()));
            }
            (End::Exited(status), _) => {
                // Checks need something that runs: without it they have failed.
                if request.peers && request.checks.is_empty() {
                    return inconclusive(format!("the program {status} alone"));
                }
                return Err(TestFailure::Ended {
                    name: name(),
                    status,
                    log: Vec::new(),
                });
            }
            (End::Settled, true) if request.peers => {
                return inconclusive(format!(
                    "the job was still running after {}",
                    request.settle
                ));
            }
            (End::Settled, true) => {
                return Err(TestFailure::Endless {
                    name: name(),
                    limit: request.settle,
                    log: Vec::new(),
                });
            }
            (End::Settled, false) => {}
        }
        let mut outcome = Outcome::Passed;
        if let Some(health) = &request.healthcheck
            && let Err(cause) = self.healthy(request, id, health, cancel)?
        {
            if !request.peers {
                return Err(TestFailure::Unhealthy {
                    name: name(),
                    cause,
                    log: Vec::new(),
                });
            }
            outcome = Outcome::Inconclusive(format!("the healthcheck fails alone: {cause}"));
        }
        for (index, wanted) in request.checks.iter().enumerate() {
            let limit = Instant::now() + CHECK_LIMIT;
            self.until(limit, cancel, || check::run(&self.runtime, id, wanted))?
                .map_err(|cause| TestFailure::Check {
                    name: name(),
                    index,
                    what: check::shown(wanted),
                    cause,
                    log: Vec::new(),
                })?;
        }
        Ok((outcome, self.runtime.listening(id).unwrap_or_default()))
    }

    /// The cause, where a hook that fails alone says nothing yet.
    fn run_hooks(
        &self,
        request: &TestRequest,
        id: &InstanceId,
    ) -> Result<Option<String>, TestFailure> {
        for hook in &request.post_start {
            match check::hook(&self.runtime, id, hook, HOOK_LIMIT) {
                Ok(()) => {}
                Err(cause) if request.peers => return Ok(Some(cause)),
                Err(cause) => {
                    return Err(TestFailure::Hook {
                        name: request.name.clone(),
                        cause,
                        log: Vec::new(),
                    });
                }
            }
        }
        Ok(None)
    }

    /// Waits until the program ends, or has stayed up for its time. One that listens is
    /// done with its start: it has [`LISTENING`] to show what it writes then.
    fn settle(
        &self,
        request: &TestRequest,
        id: &InstanceId,
        cancel: &AtomicBool,
    ) -> Result<End, TestFailure> {
        let mut end = Instant::now() + Duration::from(request.settle);
        let mut listens = request.completes;
        loop {
            if cancel.load(Ordering::Relaxed) {
                return Err(TestFailure::Cancelled);
            }
            match self.runtime.observe(id).map(|o| o.state) {
                Some(ObservedState::Exited { status, .. }) => return Ok(End::Exited(status)),
                Some(ObservedState::Dead) | None => return Ok(End::Exited(ExitStatus::Unknown)),
                Some(ObservedState::Starting | ObservedState::Running { .. }) => {}
            }
            if !listens && self.runtime.listening(id).is_ok_and(|p| !p.is_empty()) {
                listens = true;
                end = end.min(Instant::now() + LISTENING);
            }
            if Instant::now() >= end {
                return Ok(End::Settled);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Tries until it succeeds, or until `limit`.
    fn until(
        &self,
        limit: Instant,
        cancel: &AtomicBool,
        mut attempt: impl FnMut() -> Result<(), String>,
    ) -> Result<Result<(), String>, TestFailure> {
        let mut wait = LOOK;
        loop {
            let result = attempt();
            if result.is_ok() || Instant::now() >= limit {
                return Ok(result);
            }
            if cancel.load(Ordering::Relaxed) {
                return Err(TestFailure::Cancelled);
            }
            std::thread::sleep(wait);
            wait = (wait * 2).min(Duration::from_secs(1));
        }
    }

    fn healthy(
        &self,
        request: &TestRequest,
        id: &InstanceId,
        health: &Healthcheck,
        cancel: &AtomicBool,
    ) -> Result<Result<(), String>, TestFailure> {
        let command = match &health.test {
            None => return Ok(Ok(())),
            Some(HealthTest::Exec(argv)) => argv.clone(),
            Some(HealthTest::Shell(text)) => {
                let default = || vec!["/bin/sh".to_owned(), "-c".to_owned()];
                let mut argv = if request.shell.is_empty() {
                    default()
                } else {
                    request.shell.clone()
                };
                argv.push(text.clone());
                argv
            }
        };
        let second = Millis::from_secs(1);
        let interval = health.interval.unwrap_or(Millis::from_secs(30));
        let retries = u64::from(health.retries.unwrap_or(3)).max(1);
        let patience = health
            .start_period
            .unwrap_or_default()
            .saturating_add(Millis(interval.0.saturating_mul(retries)))
            .saturating_add(second);
        let limit = Instant::now() + Duration::from(patience).min(HEALTH_LIMIT);
        let timeout = health.timeout.unwrap_or(Millis::from_secs(30));
        self.until(limit, cancel, || {
            check::command(&self.runtime, id, &command, 0, None, timeout)
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

impl TestFailure {
    fn with_log(mut self, lines: Vec<String>) -> Self {
        match &mut self {
            Self::Ended { log, .. }
            | Self::Endless { log, .. }
            | Self::Unhealthy { log, .. }
            | Self::Hook { log, .. }
            | Self::Check { log, .. } => *log = lines,
            Self::Machine { .. } | Self::Cancelled => {}
        }
        self
    }
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

fn read(path: &Path) -> Option<Verdict> {
    let record: Record = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (record.format == FORMAT).then_some(record.verdict)
}

fn remember(path: &Path, verdict: &Verdict) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let record = Record {
        format: FORMAT,
        verdict: verdict.clone(),
    };
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&serde_json::to_vec(&record)?)?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

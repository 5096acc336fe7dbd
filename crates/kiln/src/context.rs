//! What every command needs: the root, the daemon's client, who is asking, and how to
//! print.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_daemon::api::client::Client;
use kiln_model::{EnvironmentName, Millis};
use kiln_runtime::{Runtime, RuntimeConfig};
use kiln_store::Store;
use kiln_trust::{AuditLog, AuditSink, Fact};

use crate::cli::{self, AtArgs, Cli, ProjectArgs, ReadArgs};
use crate::failure::{Failure, Kind, machine};
use crate::progress::{Form, Shown};
use crate::project;

/// How long a new daemon may take to answer: longer than it gives a new proxy.
const DAEMON_START_LIMIT: Duration = Duration::from_secs(15);

pub struct Context {
    pub root: PathBuf,
    /// `--cache-size`.
    pub cache_size: Option<u64>,
    /// `--run-timeout`.
    pub run_timeout: Option<Millis>,
    /// `kiln build --ulimit`.
    pub ulimits: BTreeMap<String, (i64, i64)>,
    /// `kiln build --build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `kiln build --no-cache`.
    pub no_cache: bool,
    pub json: bool,
    pub shown: Shown,
    pub client: Client,
}

impl Context {
    pub fn new(cli: &Cli) -> Result<Self, Failure> {
        let root = std::path::absolute(&cli.root).map_err(machine)?;
        let build = match &cli.command {
            cli::Command::Build(args) => Some(args),
            _ => None,
        };
        Ok(Self {
            client: Client::new(&root),
            root,
            cache_size: cli.cache_size,
            run_timeout: cli.run_timeout,
            ulimits: build.iter().flat_map(|b| b.ulimit.clone()).collect(),
            build_args: build
                .iter()
                .flat_map(|b| b.build_arg.clone())
                .filter_map(|(name, value)| Some((name, value?)))
                .collect(),
            no_cache: build.is_some_and(|b| b.no_cache),
            json: cli.json,
            shown: shown(cli),
        })
    }

    /// Most of what kiln does needs root: namespaces, mounts, networks.
    pub fn need_root(&self) -> Result<(), Failure> {
        if rustix::process::geteuid().is_root() {
            return Ok(());
        }
        Err(Failure::new(Kind::Machine, "kiln must run as root here")
            .hint("namespaces, mounts and networks need it; try `sudo kiln …`"))
    }

    /// Makes the root folder; says so when it can't.
    pub fn make_root(&self) -> Result<(), Failure> {
        std::fs::create_dir_all(self.root.join("run")).map_err(|e| {
            Failure::new(Kind::Machine, format!("{}: {e}", self.root.display()))
                .hint("choose another folder with --root or KILN_ROOT")
        })
    }

    pub fn store(&self) -> Result<Arc<Store>, Failure> {
        Store::open(&self.root).map(Arc::new).map_err(machine)
    }

    pub fn runtime(&self) -> Result<Arc<Runtime>, Failure> {
        let shim = this_program(&["shim"])?;
        Runtime::open(RuntimeConfig {
            root: self.root.clone(),
            shim,
        })
        .map(Arc::new)
        .map_err(machine)
    }

    pub fn audit(&self) -> Result<AuditLog, Failure> {
        AuditLog::open(&self.root).map_err(machine)
    }

    /// Writes an audit entry. Nothing of consequence happens unrecorded: an error stops.
    pub fn record(
        &self,
        action: &str,
        subject: &str,
        details: &[(&str, String)],
    ) -> Result<(), Failure> {
        let fact = Fact {
            time: now(),
            actor: who(),
            action: action.to_owned(),
            subject: subject.to_owned(),
            details: details
                .iter()
                .map(|(k, v)| ((*k).to_owned(), v.clone()))
                .collect(),
        };
        self.audit()?.record(fact).map(drop).map_err(machine)
    }

    /// Starts the daemon unless one answers.
    pub async fn need_daemon(&self) -> Result<(), Failure> {
        if let Ok(daemon) = self.client.daemon().await {
            if !runs_this_program(daemon.pid) {
                errln!(
                    "note: the daemon (pid {}) runs another kiln than this one; `kiln daemon \
                     restart` puts this one in its place, and no connection is closed",
                    daemon.pid
                );
            }
            return Ok(());
        }
        self.need_root()?;
        self.make_root()?;
        let log_path = self.root.join("run/daemon.log");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(machine)?;
        let command = this_program(&["--root"])?;
        let (program, arguments) = command
            .split_first()
            .ok_or_else(|| machine("this program's own path is not known"))?;
        let mut child = Command::new(program)
            .args(arguments)
            .arg(&self.root)
            .args(["daemon", "run"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .current_dir("/")
            .spawn()
            .map_err(|e| machine(format!("the daemon could not be started: {e}")))?;
        let deadline = std::time::Instant::now() + DAEMON_START_LIMIT;
        loop {
            if self.client.daemon().await.is_ok() {
                return Ok(());
            }
            let ended = child.try_wait().ok().flatten();
            if ended.is_some() || std::time::Instant::now() > deadline {
                let said = last_lines(&log_path, 5);
                return Err(machine(format!("the daemon did not start:\n{said}"))
                    .hint(format!("see {}", log_path.display())));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The environment a command is about: as stated, or that of the project.
    pub fn environment(&self, args: &ProjectArgs) -> Result<EnvironmentName, Failure> {
        let stated = args.environment.clone();
        let name = match stated {
            Some(name) => name,
            None => project::load(args)?.spec.project.to_string(),
        };
        name.parse()
            .map_err(|e| Failure::new(Kind::Input, format!("{e}")))
    }

    /// As [`Context::environment`], for commands without a project's arguments.
    pub async fn environment_at(&self, args: &AtArgs) -> Result<EnvironmentName, Failure> {
        if let Some(name) = &args.environment {
            return name
                .parse()
                .map_err(|e| Failure::new(Kind::Input, format!("{e}")));
        }
        let known = self.client.daemon().await?.environments;
        if let [only] = known.as_slice() {
            return Ok(only.clone());
        }
        let here = project::load(&ProjectArgs::here()).ok();
        here.and_then(|loaded| loaded.spec.project.as_str().parse().ok())
            .ok_or_else(|| {
                Failure::new(Kind::Input, "which environment?").hint("name it with --environment")
            })
    }
}

/// Events are for whoever reads results as JSON, unless progress is asked for otherwise.
fn shown(asked_for: &Cli) -> Shown {
    let asked = match &asked_for.command {
        cli::Command::Build(args) => Shown {
            form: args.progress,
            explain: args.explain,
        },
        _ => Shown::default(),
    };
    match (asked_for.json, asked.form) {
        (true, Form::Auto) => Shown {
            form: Form::Json,
            ..asked
        },
        _ => asked,
    }
}

impl ProjectArgs {
    /// The project in the present folder.
    pub fn here() -> Self {
        Self {
            read: ReadArgs {
                project: ".".into(),
                ..ReadArgs::default()
            },
            environment: None,
        }
    }
}

/// Runs this very program with other words.
pub fn this_program(words: &[&str]) -> Result<Vec<OsString>, Failure> {
    let exe = std::env::current_exe()
        .map_err(|e| machine(format!("this program's own path is not known: {e}")))?;
    Ok(std::iter::once(exe.into_os_string())
        .chain(words.iter().map(OsString::from))
        .collect())
}

/// Whether a process runs this very program; told apart only by who may look.
pub fn runs_this_program(pid: u32) -> bool {
    kiln_daemon::runs(pid, Path::new("/proc/self/exe"))
}

/// The login name of whoever asks: behind sudo, who called it.
pub fn who() -> String {
    ["SUDO_USER", "LOGNAME", "USER"]
        .iter()
        .find_map(|key| std::env::var(key).ok().filter(|v| !v.is_empty()))
        .unwrap_or_else(|| format!("uid {}", rustix::process::getuid().as_raw()))
}

/// Milliseconds since the epoch.
pub fn now() -> Millis {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map(Millis::from)
        .unwrap_or_default()
}

fn last_lines(path: &Path, count: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

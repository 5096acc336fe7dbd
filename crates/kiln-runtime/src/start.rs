//! Starting an instance: its folder, its network, its shim.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kiln_model::instance::{ExitStatus, InstanceNetwork, Interface, ObservedState, Root};
use kiln_model::{InstanceId, InstanceSpec, Millis};

use crate::lock::Turn;
use crate::log::Stream;
use crate::net;
use crate::paths::InstancePaths;
use crate::runtime::{Runtime, RuntimeError};
use crate::shim::Handshake;
use crate::shim_io::wait_readable;
use crate::status::{Phase, Status, write_atomically};

/// A start takes some 30 ms; a machine that is busy beyond all measure gets this long.
const START_WAIT: Duration = Duration::from_secs(60);
/// The shim's one line: an id and a time, or a cause.
const MAX_HANDSHAKE: u64 = 256 << 10;
/// How often [`Runtime::run_to_end`] looks for new output and for a cancellation.
const LOOK: Duration = Duration::from_millis(10);

/// A running program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// In the host's pid namespace.
    pub pid: u32,
    /// Milliseconds since the epoch.
    pub since: Millis,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("instance {id}: {what}")]
    Invalid { id: InstanceId, what: String },
    #[error("instance {id} has ended already ({status}); ids are not used twice")]
    Ended { id: InstanceId, status: ExitStatus },
    #[error("instance {0} is there already, and is made differently")]
    Different(InstanceId),
    #[error("cannot prepare {path}: {source}")]
    Prepare { path: String, source: io::Error },
    #[error("cannot make the network of instance {id}: {cause}")]
    Network { id: InstanceId, cause: String },
    #[error("cannot start the shim {program}: {source}")]
    Shim { program: String, source: io::Error },
    #[error("instance {id} could not be started: {cause}")]
    Failed { id: InstanceId, cause: String },
    #[error(transparent)]
    CleanUp(#[from] RuntimeError),
    #[error("cancelled")]
    Cancelled,
    #[error("it has not ended within {0}")]
    TooLong(Millis),
}

impl Runtime {
    /// Starts an instance and returns when its program has been executed. The same
    /// spec again is no error as long as it runs.
    pub fn start(&self, spec: &InstanceSpec) -> Result<Started, StartError> {
        check(spec)?;
        let paths = self.paths(&spec.id);
        let prepare = |path: &std::path::Path| {
            let path = path.display().to_string();
            move |source| StartError::Prepare { path, source }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(paths.dir())
            .map_err(prepare(paths.dir()))?;
        let turn = Turn::take(&paths.turn()).map_err(prepare(&paths.turn()))?;
        if let Some(started) = self.started_before(spec)? {
            return Ok(started);
        }
        let text = serde_json::to_vec(spec).map_err(io::Error::from);
        text.and_then(|text| write_atomically(&paths.spec(), &text))
            .map_err(prepare(&paths.spec()))?;
        // Seen only under the shim's own mounts; libcontainer wants the path to exist.
        fs::create_dir_all(paths.rootfs()).map_err(prepare(&paths.rootfs()))?;
        self.make_network(spec, &paths)?;
        self.spawn_shim(spec, &paths, &turn)
    }

    /// What an earlier call for this id has left.
    fn started_before(&self, spec: &InstanceSpec) -> Result<Option<Started>, StartError> {
        let id = || spec.id.clone();
        // The turn is ours, so nobody is starting it: `Starting` is a lone shim's last moment.
        match self.observe(&spec.id).map(|o| o.state) {
            Some(ObservedState::Running { pid, since }) => {
                if self.spec(&spec.id).as_ref() != Some(spec) {
                    return Err(StartError::Different(id()));
                }
                Ok(Some(Started { pid, since }))
            }
            Some(ObservedState::Exited { status, .. }) => {
                Err(StartError::Ended { id: id(), status })
            }
            Some(ObservedState::Starting | ObservedState::Dead) | None => {
                self.clean_up(&spec.id, false)?;
                Ok(None)
            }
        }
    }

    fn make_network(&self, spec: &InstanceSpec, paths: &InstancePaths) -> Result<(), StartError> {
        let fail = |cause: &dyn std::fmt::Display| StartError::Network {
            id: spec.id.clone(),
            cause: cause.to_string(),
        };
        let interfaces: &[Interface] = match &spec.network {
            InstanceNetwork::Isolated => &[],
            InstanceNetwork::Bridged(interfaces) => interfaces,
            InstanceNetwork::Host | InstanceNetwork::Join(_) => return Ok(()),
        };
        net::create_netns(&paths.netns()).map_err(|e| fail(&e))?;
        for interface in interfaces {
            net::attach(&paths.netns(), interface).map_err(|e| fail(&e))?;
        }
        Ok(())
    }

    fn spawn_shim(
        &self,
        spec: &InstanceSpec,
        paths: &InstancePaths,
        turn: &Turn,
    ) -> Result<Started, StartError> {
        let argv = &self.config.shim;
        let program = argv.first().cloned().unwrap_or_default();
        let fail = |source| StartError::Shim {
            program: program.to_string_lossy().into_owned(),
            source,
        };
        let shim_log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(paths.shim_log())
            .map_err(fail)?;
        let mut child = Command::new(&program)
            .args(argv.iter().skip(1))
            .arg("run")
            .arg(paths.dir())
            .env_clear()
            .current_dir("/")
            .stdin(turn.share().map_err(fail)?)
            .stdout(Stdio::piped())
            .stderr(shim_log)
            .spawn()
            .map_err(fail)?;
        let answer = child.stdout.take();
        // It forks and ends at once.
        child.wait().map_err(fail)?;
        let line = answer
            .map_or_else(|| Ok(String::new()), read_line)
            .map_err(fail)?;
        match serde_json::from_str(&line) {
            Ok(Handshake::Started { pid, since }) => Ok(Started { pid, since }),
            Ok(Handshake::Failed { cause }) => Err(StartError::Failed {
                id: spec.id.clone(),
                cause,
            }),
            Err(_) => Err(StartError::Failed {
                id: spec.id.clone(),
                cause: self.silent_shim(paths),
            }),
        }
    }

    /// What can be said when the shim ended without a word.
    fn silent_shim(&self, paths: &InstancePaths) -> String {
        if let Some(Status {
            phase: Phase::Exited {
                cause: Some(cause), ..
            },
            ..
        }) = Status::read(&paths.status())
        {
            return cause;
        }
        let said = crate::log::text_tail(&paths.shim_log(), 2000).unwrap_or_default();
        match said.trim() {
            "" => "its shim ended without saying why (killed?)".into(),
            said => format!("its shim ended: {said}"),
        }
    }

    /// Starts an instance, passes its output on line by line, waits for its end and
    /// removes it. Setting `cancel` kills it.
    pub fn run_to_end(
        &self,
        spec: &InstanceSpec,
        on_line: &mut dyn FnMut(Stream, &str),
        cancel: &AtomicBool,
    ) -> Result<ExitStatus, StartError> {
        self.run_within(None, spec, on_line, cancel)
    }

    /// The same; what runs longer than `limit` is killed.
    pub fn run_within(
        &self,
        limit: Option<Millis>,
        spec: &InstanceSpec,
        on_line: &mut dyn FnMut(Stream, &str),
        cancel: &AtomicBool,
    ) -> Result<ExitStatus, StartError> {
        if cancel.load(Ordering::Relaxed) {
            return Err(StartError::Cancelled);
        }
        let result = self
            .start(spec)
            .and_then(|_| self.follow(limit, &spec.id, on_line, cancel));
        let removed = self.remove(&spec.id);
        let status = result?;
        removed?;
        Ok(status)
    }

    fn follow(
        &self,
        limit: Option<Millis>,
        id: &InstanceId,
        on_line: &mut dyn FnMut(Stream, &str),
        cancel: &AtomicBool,
    ) -> Result<ExitStatus, StartError> {
        let begun = Instant::now();
        let mut reader = self.log(id);
        let shim = self.exit_fd(id).ok();
        loop {
            let ended = shim
                .as_ref()
                .is_none_or(|shim| wait_readable(shim.as_fd(), Some(LOOK)));
            while let Some(record) = reader.next_record().map_err(|source| RuntimeError::Read {
                path: self.paths(id).log().display().to_string(),
                source,
            })? {
                on_line(record.stream, &record.text);
            }
            if ended {
                return Ok(self.wait(id)?);
            }
            if cancel.load(Ordering::Relaxed) {
                return Err(StartError::Cancelled);
            }
            if let Some(limit) = limit.filter(|limit| begun.elapsed() > (*limit).into()) {
                return Err(StartError::TooLong(limit));
            }
        }
    }
}

fn read_line(pipe: impl Read + AsFd) -> io::Result<String> {
    if !wait_readable(pipe.as_fd(), Some(START_WAIT)) {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer within {} s", START_WAIT.as_secs()),
        ));
    }
    let mut line = String::new();
    BufReader::new(pipe.take(MAX_HANDSHAKE)).read_line(&mut line)?;
    Ok(line)
}

/// What can be seen to be wrong before anything is made.
fn check(spec: &InstanceSpec) -> Result<(), StartError> {
    let invalid = |what: String| {
        Err(StartError::Invalid {
            id: spec.id.clone(),
            what,
        })
    };
    if spec.format != InstanceSpec::FORMAT {
        return invalid(format!("format {} is not known to this kiln", spec.format));
    }
    if spec.argv.is_empty() {
        return invalid("there is no program to run (no command, no entrypoint)".into());
    }
    let mut paths: Vec<&str> = vec![&spec.cwd];
    paths.extend(spec.mounts.iter().map(|m| m.target.as_str()));
    if let Root::Sealed { scratch, .. } = &spec.root {
        paths.extend(scratch.iter().map(|s| s.path.as_str()));
    }
    for path in paths {
        let normal = path.starts_with('/') && !path.split('/').any(|part| part == "..");
        if !normal || path.contains('\0') {
            return invalid(format!("`{path}` is not an absolute path without `..`"));
        }
    }
    if spec
        .mounts
        .iter()
        .any(|m| m.target.trim_matches('/').is_empty())
    {
        return invalid("nothing can be mounted over `/`".into());
    }
    if spec.env.keys().any(|k| k.is_empty() || k.contains('=')) {
        return invalid("a variable's name is empty or holds `=`".into());
    }
    File::open("/proc/self/ns/mnt")
        .map(drop)
        .or_else(|e| invalid(format!("/proc is needed: {e}")))
}

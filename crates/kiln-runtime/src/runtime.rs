//! [`Runtime`]: finding instances, signalling and waiting for them.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_model::instance::{ExitStatus, Observed, ObservedState};
use kiln_model::{InstanceId, InstanceSpec, Millis};

use crate::lock::{self, Turn};
use crate::paths::InstancePaths;
use crate::shim_io::wait_readable;
use crate::signal::SignalError;
use crate::status::{Phase, Status, boot_id};
use crate::{process, signal, sys};

/// After SIGKILL, everything of an instance has ended within moments; a shim that
/// still isn't gone then is stuck itself and is killed.
const KILL_WAIT: Duration = Duration::from_secs(10);

/// Where instances are kept, and how the shim is started.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// KILN_ROOT.
    pub root: PathBuf,
    /// The argument vector that re-executes this program as a shim:
    /// `["/usr/bin/kiln", "shim"]`.
    pub shim: Vec<OsString>,
}

/// Instances below one KILN_ROOT. Cheap to make; several processes may have one.
#[derive(Clone, Debug)]
pub struct Runtime {
    pub(crate) config: RuntimeConfig,
}

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("cannot prepare {path}: {source}")]
    Prepare { path: String, source: io::Error },
    #[error("there is no instance {0}")]
    Unknown(InstanceId),
    #[error("instance {0} is not running")]
    NotRunning(InstanceId),
    #[error(transparent)]
    Signal(#[from] SignalError),
    #[error("cannot signal instance {id}: {source}")]
    Send { id: InstanceId, source: io::Error },
    #[error("cannot read {path}: {source}")]
    Read { path: String, source: io::Error },
    #[error("instance {id} cannot be removed entirely: {what}: {source}")]
    Remove {
        id: InstanceId,
        what: String,
        source: io::Error,
    },
}

impl Runtime {
    /// Makes `<root>/instances` if it is missing.
    pub fn open(config: RuntimeConfig) -> Result<Self, RuntimeError> {
        use std::os::unix::fs::DirBuilderExt;
        let path = config.root.join("instances");
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|source| RuntimeError::Prepare {
                path: path.display().to_string(),
                source,
            })?;
        Ok(Self { config })
    }

    /// KILN_ROOT.
    pub fn root(&self) -> &Path {
        &self.config.root
    }

    pub(crate) fn paths(&self, id: &InstanceId) -> InstancePaths {
        InstancePaths::new(&self.config.root, id)
    }

    /// Every instance that has a folder, by id.
    pub fn list(&self) -> Vec<Observed> {
        let mut ids: Vec<InstanceId> = std::fs::read_dir(self.config.root.join("instances"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| InstanceId::new(entry.file_name().to_str()?).ok())
            .collect();
        ids.sort();
        ids.iter().filter_map(|id| self.observe(id)).collect()
    }

    /// `None`: there is no such instance.
    pub fn observe(&self, id: &InstanceId) -> Option<Observed> {
        let paths = self.paths(id);
        if !paths.dir().is_dir() {
            return None;
        }
        // In the order in which one takes over from the other, so that none is missed: a
        // shim holds the lock before the turn ends, and writes its last status before it
        // lets go of the lock.
        let turn = lock::turn_taken(&paths.turn());
        let alive = lock::holder(&paths.lock()).is_some();
        let status = Status::read(&paths.status()).filter(|s| s.boot == boot_id());
        let state = match status.as_ref().map(|s| &s.phase) {
            Some(Phase::Exited { status, at, .. }) => ObservedState::Exited {
                status: *status,
                at: *at,
            },
            // Without a shim it is about to end, and has not before its last moment.
            Some(Phase::Running { pid, since, .. }) if alive || self.first_process(id).is_ok() => {
                ObservedState::Running {
                    pid: *pid,
                    since: *since,
                }
            }
            Some(Phase::Running { since, .. }) => ObservedState::Exited {
                status: ExitStatus::Unknown,
                at: *since,
            },
            Some(Phase::Starting) | None if alive || turn => ObservedState::Starting,
            Some(Phase::Starting) | None => ObservedState::Dead,
        };
        Some(Observed {
            id: id.clone(),
            state,
            warnings: status.map(|s| s.warnings).unwrap_or_default(),
        })
    }

    /// What the instance was started with.
    pub fn spec(&self, id: &InstanceId) -> Option<InstanceSpec> {
        serde_json::from_slice(&std::fs::read(self.paths(id).spec()).ok()?).ok()
    }

    /// The instance's first process, opened so that no other can be meant.
    pub(crate) fn first_process(&self, id: &InstanceId) -> Result<(u32, OwnedFd), RuntimeError> {
        let paths = self.paths(id);
        if !paths.dir().is_dir() {
            return Err(RuntimeError::Unknown(id.clone()));
        }
        let gone = || RuntimeError::NotRunning(id.clone());
        let Some(Status {
            phase: Phase::Running { pid, ticks, .. },
            boot,
            ..
        }) = Status::read(&paths.status())
        else {
            return Err(gone());
        };
        let fd = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap_or(0))
            .and_then(|p| rustix::process::pidfd_open(p, rustix::process::PidfdFlags::empty()).ok())
            .ok_or_else(gone)?;
        // Asked for after opening: the number belongs to the opened process.
        if boot != boot_id() || process::start_ticks(pid) != Some(ticks) {
            return Err(gone());
        }
        Ok((pid, fd))
    }

    /// Sends a signal (by name or number) to the instance's first process.
    pub fn signal(&self, id: &InstanceId, name: &str) -> Result<(), RuntimeError> {
        let number = signal::parse(name)?;
        let (_, fd) = self.first_process(id)?;
        sys::signal_pidfd(fd.as_fd(), number).map_err(|source| RuntimeError::Send {
            id: id.clone(),
            source,
        })
    }

    /// Whether a signal (by name or number) does anything to the instance's first process:
    /// the kernel drops what that has no handler for (pid_namespaces(7)), but for SIGKILL.
    /// One that waits for its signals has them blocked. In doubt: yes.
    pub fn heeds(&self, id: &InstanceId, name: &str) -> bool {
        let (Ok(number), Ok((pid, _process))) = (signal::parse(name), self.first_process(id))
        else {
            return true;
        };
        number == libc::SIGKILL || process::takes(pid, number) != Some(false)
    }

    /// Asks it to end with `signal`; after `grace`, kills all of its processes. One that is
    /// being started gets there first, if anybody still sees to that.
    pub fn stop(
        &self,
        id: &InstanceId,
        name: &str,
        grace: Millis,
    ) -> Result<ExitStatus, RuntimeError> {
        self.settle(id)?;
        match self.signal(id, name) {
            Ok(()) => {}
            Err(RuntimeError::NotRunning(_)) => return self.wait(id),
            Err(e) => return Err(e),
        }
        if let Ok(shim) = self.exit_fd(id)
            && !wait_readable(shim.as_fd(), Some(grace.into()))
        {
            let _ = self.signal(id, "KILL");
            if !wait_readable(shim.as_fd(), Some(KILL_WAIT)) {
                let _ = sys::signal_pidfd(shim.as_fd(), libc::SIGKILL);
            }
        }
        self.wait(id)
    }

    /// Waits for a start that is under way. What is half-started after that has lost its
    /// starter: it is ended.
    fn settle(&self, id: &InstanceId) -> Result<(), RuntimeError> {
        let half = || {
            let state = self.observe(id).map(|o| o.state);
            matches!(state, Some(ObservedState::Starting | ObservedState::Dead))
        };
        if !half() {
            return Ok(());
        }
        let path = self.paths(id).turn();
        let _turn = Turn::take(&path).map_err(|source| RuntimeError::Prepare {
            path: path.display().to_string(),
            source,
        })?;
        match half() {
            true => self.clean_up(id, false),
            false => Ok(()),
        }
    }

    /// Waits for the instance's end (without bound: instances run for years).
    pub fn wait(&self, id: &InstanceId) -> Result<ExitStatus, RuntimeError> {
        if let Ok(shim) = self.exit_fd(id) {
            wait_readable(shim.as_fd(), None);
        }
        if let Ok((_, first)) = self.first_process(id) {
            wait_readable(first.as_fd(), None);
        }
        match self.observe(id).map(|o| o.state) {
            None => Err(RuntimeError::Unknown(id.clone())),
            Some(ObservedState::Exited { status, .. }) => Ok(status),
            Some(_) => Err(RuntimeError::NotRunning(id.clone())),
        }
    }

    /// A pidfd of the shim: readable once the instance and all its traces but the
    /// folder, the log and the network namespace are gone.
    pub fn exit_fd(&self, id: &InstanceId) -> Result<OwnedFd, RuntimeError> {
        lock::holder_fd(&self.paths(id).lock()).ok_or_else(|| RuntimeError::NotRunning(id.clone()))
    }

    /// The log's files, oldest first (format: [`crate::log`]).
    pub fn log_files(&self, id: &InstanceId) -> Vec<PathBuf> {
        crate::log::files(&self.paths(id).log())
    }

    /// Reads the log from its beginning, and follows it.
    pub fn log(&self, id: &InstanceId) -> crate::log::Reader {
        crate::log::Reader::new(&self.paths(id).log())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Its shim was killed, and the kernel has not got round to killing it.
    #[test]
    fn what_outlives_its_shim_runs_until_its_end() {
        let root = tempfile::tempdir().unwrap();
        let config = RuntimeConfig {
            root: root.path().to_owned(),
            shim: vec![],
        };
        let runtime = Runtime::open(config).unwrap();
        let id = InstanceId::new("left").unwrap();
        let paths = runtime.paths(&id);
        std::fs::create_dir(paths.dir()).unwrap();
        let mut first = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let since = crate::status::now();
        let running = Phase::Running {
            pid: first.id(),
            ticks: process::start_ticks(first.id()).unwrap(),
            since,
        };
        Status::new(running, &[]).write(&paths.status()).unwrap();
        let state = || runtime.observe(&id).unwrap().state;
        let pid = first.id();
        assert_eq!(state(), ObservedState::Running { pid, since });
        let waiting = std::thread::spawn({
            let (runtime, id) = (runtime.clone(), id.clone());
            move || runtime.wait(&id)
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        first.kill().unwrap();
        first.wait().unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), ExitStatus::Unknown);
        assert!(matches!(state(), ObservedState::Exited { .. }));
    }
}

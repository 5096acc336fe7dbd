//! RUN: a command in a sandbox over the stage's files, and what it wrote.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use kiln_model::instance::{
    InstanceLimits, InstanceMount, InstanceMountSource, InstanceSecurity, Purpose, Root,
    SharedNamespaces, TreePaths,
};
use kiln_model::spec::Logging;
use kiln_model::{Digest, InstanceSpec, Millis, ProgressEvent};
use kiln_runtime::StartError;

use super::fetches::{self, Taped};
use super::mounts::{Mounted, Shown};
use super::state::{Files, Key};
use super::upper::{self, Times, Traces};
use super::variables::Variables;
use super::work::Work;
use super::{Carried, Conditions, ExecError, Site, TOLD_LINES, Told, sweep};
use crate::containerfile::RunNetwork;
use crate::evaluate::RunAction;
use crate::network::Connection;
use crate::network::record::{Mask, Recording, Session};
use crate::rootfs::Rootfs;

/// SOURCE_DATE_EPOCH within a RUN is never earlier than this (1980-01-01): zip files, and
/// so Python's packages, know no earlier time.
const EARLIEST_EPOCH: i64 = 315_532_800;

/// The first one, which every machine has.
const ONE_PROCESSOR: &str = "0";

/// A RUN that takes longer hangs: the longest jobs of public build services end at this.
const TIME_LIMIT: Millis = Millis(6 * 3600 * 1000);
/// More processes and threads at once than any build tool makes, and so few that a RUN that
/// does nothing but make them leaves the machine with numbers for others.
const MAX_PROCESSES: i64 = 16_384;
/// This part of the machine's memory a RUN may not have.
const SPARED_MEMORY: u64 = 16;
/// When memory runs out all the same, RUNs end first (proc(5): -1000 to 1000).
const OOM_SCORE: i32 = 500;

impl Site<'_> {
    pub(super) fn run_key(&self, before: &Digest, run: &RunAction, mounts: &[Mounted]) -> Digest {
        let mut key = Key::new("run", before);
        key.debug(&run.argv)
            .debug(&run.env)
            .debug(&(&run.cwd, &run.user, self.network_of(run), &run.script))
            .debug(&(self.epoch, &self.hosts));
        // As with BuildKit: a program may do other things with other limits.
        if !self.ulimits.is_empty() {
            key.debug(&self.ulimits);
        }
        for mounted in mounts {
            key.debug(&mounted.mount);
            match &mounted.files {
                None => {}
                Some((Shown::Stage(files), path)) => {
                    key.field(files.key.as_bytes()).field(path.as_bytes());
                }
                Some((Shown::Made { key: made, .. }, _)) => {
                    key.field(made.as_bytes());
                }
            }
        }
        key.finish()
    }

    pub(super) fn run(
        &self,
        files: &Files,
        (run, key): (&RunAction, &Digest),
        mounts: &[Mounted],
        taped: Option<&Taped>,
        told: &Told<'_>,
    ) -> Result<Carried, ExecError> {
        let task = told.task;
        sweep(&self.cache, &self.runtime)?;
        let before = self.rootfs(files)?;
        let mut work = Work::new(&self.scratch()?)?;
        let below = match before.tree.is_empty() {
            true => None,
            false => Some(files.mountable(&self.store)?),
        };
        let apt = self.apt(&before, &mut work, told.place.platform)?;
        let session = self.session(taped, run, &before, apt.mirrors, task);
        let connection = self.connect(run, &session, task)?;
        let mut spec = self.spec(run, &before, &work, below, &connection)?;
        for mounted in mounts {
            self.mount(mounted, &mut spec, &mut work)?;
        }
        if let Some((name, text)) = &run.script {
            let path = work.file("script", text.as_bytes(), 0o755)?;
            spec.mounts.push(InstanceMount {
                source: InstanceMountSource::File {
                    path,
                    uid: 0,
                    gid: 0,
                    mode: 0o755,
                    secret: false,
                },
                target: format!("/dev/pipes/{name}"),
                read_only: true,
                exec: true,
                dev: false,
            });
        }
        spec.mounts.extend(apt.mounts);
        let variables = match &connection.proxy {
            Some(proxy) => self.furnish(proxy, taped, run, &before, &mut spec, &mut work)?,
            None => Variables::default(),
        };
        let mut made = Vec::new();
        let fixed = ["/dev", "/proc", "/sys"].map(str::to_owned);
        let targets = spec.mounts.iter().map(|m| m.target.clone()).chain(fixed);
        for target in targets {
            made.extend(Self::missing(&before, &target)?);
        }
        let begun = now();
        let followed = self.follow(&spec, task);
        // That something could not be given to the command is why it failed.
        let recording = self.recorded(&session, &connection)?;
        followed?;
        let times = Times {
            begun,
            ended: now(),
            epoch: self.epoch,
        };
        let mut tree = before.tree.clone();
        made.sort();
        made.dedup();
        let traces = Traces {
            made: &made,
            variables: &variables,
        };
        upper::take(&mut tree, &work.upper(), &self.store, times, traces)?;
        let of = fetches::key(key, recording.digest());
        let made = self.databases(&before.tree, &mut tree, (&of, taped), task)?;
        let fetched = self.learn(taped, Recording { made, ..recording });
        Ok(Carried { tree, fetched })
    }

    fn connect(
        &self,
        run: &RunAction,
        session: &Arc<Session>,
        task: &str,
    ) -> Result<Connection, ExecError> {
        let mut warn = |text| {
            self.progress.event(ProgressEvent::Warning {
                task: task.to_owned(),
                text,
            });
        };
        let connection = self
            .networks
            .connect(self.network_of(run), session, &mut warn);
        connection.map_err(ExecError::network)
    }

    /// The build's, where the instruction leaves it open.
    pub(super) fn network_of(&self, run: &RunAction) -> RunNetwork {
        match run.network {
            RunNetwork::Default => self.network,
            stated => stated,
        }
    }

    /// Runs the sandbox to its end; a failure carries the last lines.
    fn follow(&self, spec: &InstanceSpec, task: &str) -> Result<(), ExecError> {
        let mut last = VecDeque::new();
        let mask = Mask::new(self.secrets.values().map(Vec::as_slice));
        let mut on_line = |_, line: &str| {
            let line = mask.text(line);
            if last.len() == TOLD_LINES {
                last.pop_front();
            }
            last.push_back(line.clone());
            self.progress.event(ProgressEvent::Output {
                task: task.to_owned(),
                line,
            });
        };
        let limit = Some(self.time_limit.unwrap_or(TIME_LIMIT));
        let ran = self
            .runtime
            .run_within(limit, spec, &mut on_line, self.cancel);
        let status = match ran {
            Ok(status) => status,
            Err(StartError::TooLong(limit)) => {
                return Err(ExecError::TooLong {
                    limit,
                    lines: last.into(),
                });
            }
            Err(StartError::Cancelled) => return Err(ExecError::Cancelled),
            Err(cause) => return Err(ExecError::Sandbox(cause)),
        };
        match status.success() {
            true => Ok(()),
            false => Err(ExecError::Command {
                status,
                lines: last.into(),
                cause: full_disk(&self.cache),
            }),
        }
    }

    fn spec(
        &self,
        run: &RunAction,
        before: &Rootfs,
        work: &Work,
        tree: Option<TreePaths>,
        connection: &Connection,
    ) -> Result<InstanceSpec, ExecError> {
        let mut env = run.env.clone();
        env.extend(run.proxies.clone());
        let user = if run.user.is_empty() { "0" } else { &run.user };
        if !env.contains_key("HOME") {
            let home = self.account(before, user, false)?.home;
            let home = home.unwrap_or_else(|| if user == "0" { "/root" } else { "/" }.into());
            env.insert("HOME".into(), home);
        }
        let epoch = self.epoch.max(EARLIEST_EPOCH).to_string();
        env.entry("SOURCE_DATE_EPOCH".into()).or_insert(epoch);
        Ok(InstanceSpec {
            format: InstanceSpec::FORMAT,
            id: work.id.clone(),
            purpose: Purpose::Build,
            argv: run.argv.clone(),
            env,
            cwd: run.cwd.clone(),
            user: user.to_owned(),
            group_add: Vec::new(),
            hostname: "kiln-build".into(),
            domainname: None,
            root: Root::Layered {
                tree,
                upper: work.upper(),
                work: work.work(),
            },
            mounts: Vec::new(),
            network: connection.network.clone(),
            resolver: connection.resolver.clone(),
            hosts: self.hosts.clone(),
            namespaces: SharedNamespaces::default(),
            security: InstanceSecurity {
                // su, sudo and ping work in a RUN, as they do with docker.
                no_new_privileges: false,
                ..InstanceSecurity::default()
            },
            limits: InstanceLimits {
                shm_size: self.shm_size,
                ulimits: self.ulimits.clone(),
                pids: Some(MAX_PROCESSES),
                memory: memory(),
                oom_score_adj: Some(OOM_SCORE),
                cpuset: (self.conditions == Conditions::Other).then(|| ONE_PROCESSOR.into()),
                ..InstanceLimits::default()
            },
            stop_signal: "SIGKILL".into(),
            stop_grace: Millis(0),
            init: false,
            tty: false,
            stdin_open: false,
            logging: Logging::default(),
        })
    }
}

/// Seconds since the epoch: only for telling which times a step itself made.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |s| i64::try_from(s.as_secs()).unwrap_or(i64::MAX))
}

/// What a RUN may have of this machine's memory, in bytes.
fn memory() -> Option<u64> {
    let info = rustix::system::sysinfo();
    let all = info.totalram.checked_mul(u64::from(info.mem_unit))?;
    Some(all - all / SPARED_MEMORY)
}

/// A program that found the disk full may not even have been able to say so.
fn full_disk(path: &Path) -> Option<std::io::Error> {
    const AS_GOOD_AS_FULL: u64 = 64 << 10;
    let space = rustix::fs::statvfs(path).ok()?;
    (space.f_bavail.saturating_mul(space.f_frsize) < AS_GOOD_AS_FULL)
        .then(|| rustix::io::Errno::NOSPC.into())
}

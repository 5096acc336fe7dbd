//! RUN: a command in a sandbox over the stage's files, and what it wrote.

use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use kiln_model::instance::{
    InstanceLimits, InstanceMount, InstanceMountSource, InstanceNetwork, InstanceSecurity, Purpose,
    Root, SharedNamespaces, TreePaths,
};
use kiln_model::spec::Logging;
use kiln_model::{Digest, InstanceId, InstanceSpec, Millis, ProgressEvent};
use kiln_runtime::StartError;
use kiln_store::tree::Tree;

use super::state::{Files, Key};
use super::upper::{self, Times};
use super::{ExecError, Find, Site, TOLD_LINES, Taken};
use crate::containerfile::mount::{Mount, MountKind, Sharing};
use crate::containerfile::{RunNetwork, Span};
use crate::context::ignore::Patterns;
use crate::copy::{self, Changes};
use crate::evaluate::RunAction;
use crate::files::{self, Shape, Source};
use crate::rootfs::Rootfs;

/// SOURCE_DATE_EPOCH within a RUN is never earlier than this (1980-01-01): zip files, and
/// so Python's packages, know no earlier time.
const EARLIEST_EPOCH: i64 = 315_532_800;

/// A mount with the files it shows.
pub(super) struct Mounted {
    mount: Mount,
    /// bind: what is shown, and the path in it.
    files: Option<(Shown, String)>,
}

/// The files of a bind mount: a tree that exists, or one made of context files.
pub(super) enum Shown {
    Stage(std::sync::Arc<Files>),
    Made { tree: Tree, key: Digest },
}

impl Site<'_> {
    /// Finds what the mounts of a RUN show.
    pub(super) fn mounts(
        &self,
        run: &RunAction,
        span: Span,
        find: &Find<'_>,
    ) -> Result<Vec<Mounted>, ExecError> {
        let mut all = Vec::new();
        for mount in &run.mounts {
            let files = match mount.kind {
                MountKind::Bind => Some(self.bound(mount, span, find)?),
                MountKind::Cache if mount.from.is_some() => {
                    return Err(ExecError::Unsupported(
                        "RUN --mount=type=cache with from".into(),
                    ));
                }
                _ => None,
            };
            all.push(Mounted {
                mount: mount.clone(),
                files,
            });
        }
        Ok(all)
    }

    fn bound(
        &self,
        mount: &Mount,
        span: Span,
        find: &Find<'_>,
    ) -> Result<(Shown, String), ExecError> {
        if !mount.read_only {
            return Err(ExecError::Unsupported(
                "RUN --mount=type=bind with readwrite".into(),
            ));
        }
        let taken = match &mount.from {
            Some(from) => find(from, span)?,
            None => {
                return self.of_context(self.context.ok_or(ExecError::NoContext)?, &mount.source);
            }
        };
        match taken {
            Taken::Files(files) => Ok((Shown::Stage(files), mount.source.clone())),
            Taken::Folder(context) => self.of_context(&context, &mount.source),
        }
    }

    /// Context files as a tree of their own: the program sees no ignored file, and the
    /// host's folder isn't shown to it.
    fn of_context(
        &self,
        context: &crate::context::source::ContextSource,
        source: &str,
    ) -> Result<(Shown, String), ExecError> {
        let picked = copy::pick(context, source, &Patterns::default(), false)?;
        let mut key = Key::new("bind", &Digest::of(source));
        let mut target = Rootfs {
            tree: Tree::new(),
            store: self.store.clone(),
        };
        let changes = Changes {
            owner: Some(Default::default()),
            mode: None,
            mtime: Some(self.epoch),
            made: self.epoch,
        };
        for picked in &picked {
            picked.hash_into(key.hasher());
            copy::place(&mut target, picked, "/bound", &changes)?;
        }
        let made = Shown::Made {
            tree: target.tree,
            key: key.finish(),
        };
        Ok((made, "/bound".into()))
    }

    pub(super) fn run_key(&self, before: &Digest, run: &RunAction, mounts: &[Mounted]) -> Digest {
        let mut key = Key::new("run", before);
        key.debug(&run.argv)
            .debug(&run.env)
            .debug(&(&run.cwd, &run.user, run.network, &run.script))
            .debug(&(self.epoch, &self.hosts));
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
        run: &RunAction,
        mounts: &[Mounted],
        task: &str,
    ) -> Result<Tree, ExecError> {
        let before = self.rootfs(files)?;
        let mut work = Work::new(&self.scratch()?)?;
        let below = match before.tree.is_empty() {
            true => None,
            false => Some(files.mountable(&self.store)?),
        };
        let mut spec = self.spec(run, &before, &work, below)?;
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
        let mut made = Vec::new();
        let fixed = ["/dev", "/proc", "/sys"].map(str::to_owned);
        let targets = spec.mounts.iter().map(|m| m.target.clone()).chain(fixed);
        for target in targets {
            made.extend(Self::missing(&before, &target)?);
        }
        let begun = now();
        self.follow(&spec, task)?;
        let times = Times {
            begun,
            ended: now(),
            epoch: self.epoch,
        };
        let mut tree = before.tree;
        made.sort();
        made.dedup();
        upper::take(&mut tree, &work.upper(), &self.store, times, &made)?;
        Ok(tree)
    }

    /// Runs the sandbox to its end; a failure carries the last lines.
    fn follow(&self, spec: &InstanceSpec, task: &str) -> Result<(), ExecError> {
        let mut last = VecDeque::new();
        let mut on_line = |_, line: &str| {
            if last.len() == TOLD_LINES {
                last.pop_front();
            }
            last.push_back(line.to_owned());
            self.progress.event(ProgressEvent::Output {
                task: task.to_owned(),
                line: line.to_owned(),
            });
        };
        let status = match self.runtime.run_to_end(spec, &mut on_line, self.cancel) {
            Ok(status) => status,
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
            network: match run.network {
                RunNetwork::None => InstanceNetwork::Isolated,
                RunNetwork::Host => InstanceNetwork::Host,
                RunNetwork::Default => self.network.clone(),
            },
            resolver: self.resolver.clone(),
            hosts: self.hosts.clone(),
            namespaces: SharedNamespaces::default(),
            security: InstanceSecurity {
                // su, sudo and ping work in a RUN, as they do with docker.
                no_new_privileges: false,
                ..InstanceSecurity::default()
            },
            limits: InstanceLimits {
                shm_size: self.shm_size,
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

    fn mount(
        &self,
        mounted: &Mounted,
        spec: &mut InstanceSpec,
        work: &mut Work,
    ) -> Result<(), ExecError> {
        let mount = &mounted.mount;
        let source = match mount.kind {
            MountKind::Bind => {
                let Some((taken, path)) = &mounted.files else {
                    return Ok(());
                };
                let names = files::names(path.as_bytes());
                if let Some(source) = self.one_file(taken, &names)? {
                    spec.mounts.push(InstanceMount {
                        source,
                        target: mount.target.clone(),
                        read_only: true,
                        exec: true,
                        dev: false,
                    });
                    return Ok(());
                }
                let tree = match taken {
                    Shown::Stage(files) => files.mountable(&self.store)?,
                    Shown::Made { tree, key } => {
                        Files::given(*key, tree.clone()).mountable(&self.store)?
                    }
                };
                InstanceMountSource::Tree {
                    tree,
                    subpath: match names.is_empty() {
                        true => None,
                        false => Some(String::from_utf8_lossy(&names.join(&b'/')).into_owned()),
                    },
                }
            }
            MountKind::Tmpfs => InstanceMountSource::Tmpfs {
                size: mount.size,
                mode: None,
                uid: None,
                gid: None,
            },
            MountKind::Cache => InstanceMountSource::Bind {
                path: self.cache_mount(mount, work)?,
                recursive: false,
                propagation: None,
            },
            MountKind::Secret => return self.secret(mount, spec, work),
            MountKind::Ssh => {
                return Err(ExecError::Unsupported("RUN --mount=type=ssh".into()));
            }
        };
        spec.mounts.push(InstanceMount {
            source,
            target: mount.target.clone(),
            read_only: mount.read_only,
            exec: true,
            dev: false,
        });
        Ok(())
    }

    /// A bind mount of one file, not of a folder.
    fn one_file(
        &self,
        shown: &Shown,
        names: &[Vec<u8>],
    ) -> Result<Option<InstanceMountSource>, ExecError> {
        let rootfs = match shown {
            Shown::Stage(files) => self.rootfs(files)?,
            Shown::Made { tree, .. } => Rootfs {
                tree: tree.clone(),
                store: self.store.clone(),
            },
        };
        let real = files::resolve(&rootfs, names, true)?;
        let (meta, shape) = rootfs.entry(&real)?;
        Ok(match shape {
            Shape::File { digest, .. } => Some(InstanceMountSource::File {
                path: self.store.object_path(&digest),
                uid: meta.uid,
                gid: meta.gid,
                mode: meta.mode,
                secret: false,
            }),
            _ => None,
        })
    }

    /// A cache's folder: kept between builds, never part of an image.
    fn cache_mount(&self, mount: &Mount, work: &mut Work) -> Result<PathBuf, ExecError> {
        let id = mount.id.as_deref().unwrap_or(&mount.target);
        let path = match mount.sharing {
            Sharing::Private => work.folder("private")?,
            _ => self.cache_folder(&["mounts", &Digest::of(id).hex()])?,
        };
        let fail = |cause| ExecError::Scratch {
            path: path.clone(),
            cause,
        };
        let folder = fs::File::open(&path).map_err(fail)?;
        let mode = mount.mode.unwrap_or(0o755);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(fail)?;
        std::os::unix::fs::chown(
            &path,
            Some(mount.uid.unwrap_or(0)),
            Some(mount.gid.unwrap_or(0)),
        )
        .map_err(fail)?;
        if mount.sharing == Sharing::Locked {
            rustix::fs::flock(&folder, rustix::fs::FlockOperation::LockExclusive)
                .map_err(|e| fail(e.into()))?;
            work.locks.push(folder);
        }
        Ok(path)
    }

    fn secret(
        &self,
        mount: &Mount,
        spec: &mut InstanceSpec,
        work: &mut Work,
    ) -> Result<(), ExecError> {
        let last = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
        let id = match (&mount.id, mount.source.as_str()) {
            (Some(id), _) => id.clone(),
            (None, "") => last(&mount.target),
            (None, source) => last(source),
        };
        let Some(content) = self.secrets.get(&id) else {
            return match mount.required {
                true => Err(ExecError::Secret(id)),
                false => Ok(()),
            };
        };
        if let Some(name) = &mount.env {
            let name = if name.is_empty() { &id } else { name };
            let text = String::from_utf8(content.clone());
            let text = text.map_err(|_| ExecError::SecretText(id.clone()))?;
            spec.env.insert(name.clone(), text);
            if mount.target.is_empty() {
                return Ok(());
            }
        }
        let path = work.file(&format!("secret-{}", spec.mounts.len()), content, 0o600)?;
        spec.mounts.push(InstanceMount {
            source: InstanceMountSource::File {
                path,
                uid: mount.uid.unwrap_or(0),
                gid: mount.gid.unwrap_or(0),
                mode: mount.mode.unwrap_or(0o400),
                secret: true,
            },
            target: match mount.target.as_str() {
                "" => format!("/run/secrets/{id}"),
                target => target.to_owned(),
            },
            read_only: true,
            exec: false,
            dev: false,
        });
        Ok(())
    }
}

/// Seconds since the epoch: only for telling which times a step itself made.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |s| i64::try_from(s.as_secs()).unwrap_or(i64::MAX))
}

/// A RUN's folders on disk; gone with it.
struct Work {
    folder: tempfile::TempDir,
    id: InstanceId,
    locks: Vec<fs::File>,
}

impl Work {
    fn new(scratch: &Path) -> Result<Self, ExecError> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |cause| ExecError::Scratch { path, cause }
        };
        let folder = tempfile::Builder::new()
            .prefix("build-")
            .tempdir_in(scratch)
            .map_err(fail(scratch))?;
        let name = folder
            .path()
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let id =
            InstanceId::new(name).map_err(|e| fail(folder.path())(std::io::Error::other(e)))?;
        let work = Self {
            folder,
            id,
            locks: Vec::new(),
        };
        // The upper folder's own mode is the mode of `/` in the sandbox.
        for path in [work.upper(), work.work()] {
            fs::DirBuilder::new()
                .mode(0o755)
                .create(&path)
                .map_err(fail(&path))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(fail(&path))?;
        }
        Ok(work)
    }

    fn upper(&self) -> PathBuf {
        self.folder.path().join("upper")
    }

    fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    fn folder(&self, name: &str) -> Result<PathBuf, ExecError> {
        let path = self.folder.path().join(name);
        match fs::create_dir_all(&path) {
            Ok(()) => Ok(path),
            Err(cause) => Err(ExecError::Scratch { path, cause }),
        }
    }

    fn file(&self, name: &str, content: &[u8], mode: u32) -> Result<PathBuf, ExecError> {
        let path = self.folder.path().join(name);
        let written = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path)
            .and_then(|mut file| file.write_all(content));
        match written {
            Ok(()) => Ok(path),
            Err(cause) => Err(ExecError::Scratch { path, cause }),
        }
    }
}

/// A program that found the disk full may not even have been able to say so.
fn full_disk(path: &Path) -> Option<std::io::Error> {
    const AS_GOOD_AS_FULL: u64 = 64 << 10;
    let space = rustix::fs::statvfs(path).ok()?;
    (space.f_bavail.saturating_mul(space.f_frsize) < AS_GOOD_AS_FULL)
        .then(|| rustix::io::Errno::NOSPC.into())
}

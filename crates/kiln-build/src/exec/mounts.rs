//! What `RUN --mount` shows: files of stages and contexts, caches, secrets, agents.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kiln_model::instance::{InstanceMount, InstanceMountSource};
use kiln_model::{Digest, InstanceSpec};
use kiln_store::tree::Tree;

use super::agent::Agent;
use super::state::{Files, Key};
use super::unfold::unfold;
use super::work::Work;
use super::{ExecError, Find, Site, Taken};
use crate::cache;
use crate::containerfile::Span;
use crate::containerfile::mount::{Mount, MountKind, Sharing};
use crate::context::ignore::Patterns;
use crate::copy::{self, Changes, Item};
use crate::evaluate::RunAction;
use crate::files::{self, Meta, Shape, Source, Target};
use crate::rootfs::Rootfs;

/// A mount with the files it shows.
pub(super) struct Mounted {
    pub mount: Mount,
    /// bind, and cache with `from`: what is shown, and the path in it.
    pub files: Option<(Shown, String)>,
}

/// The files of a bind mount: a tree that exists, or one made of context files.
pub(super) enum Shown {
    Stage(std::sync::Arc<Files>),
    Made { tree: Tree, key: Digest },
}

impl Shown {
    pub(super) fn key(&self) -> Digest {
        match self {
            Shown::Stage(files) => files.key,
            Shown::Made { key, .. } => *key,
        }
    }
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
                MountKind::Cache if mount.from.is_some() => Some(self.bound(mount, span, find)?),
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
            // Of a folder only the content was copied; the context's own has no mode.
            if let Some(Item {
                meta,
                shape: Shape::Folder,
                ..
            }) = picked.items.first()
                && !files::names(source.as_bytes()).is_empty()
            {
                let meta = changes.apply(meta.clone(), &Shape::Folder);
                target.put(&[b"bound".to_vec()], meta, Shape::Folder)?;
            }
        }
        let made = Shown::Made {
            tree: target.tree,
            key: key.finish(),
        };
        Ok((made, "/bound".into()))
    }

    /// Adds a mount to what the step is started with.
    pub(super) fn mount(
        &self,
        mounted: &Mounted,
        spec: &mut InstanceSpec,
        work: &mut Work,
    ) -> Result<(), ExecError> {
        let mount = &mounted.mount;
        let source = match mount.kind {
            MountKind::Bind => match &mounted.files {
                None => return Ok(()),
                Some((shown, path)) if mount.read_only => self.shown(shown, path)?,
                Some((shown, path)) => InstanceMountSource::Bind {
                    path: self.writable(shown, path, &work.folder(&numbered("bind", spec))?)?,
                    recursive: false,
                    propagation: None,
                },
            },
            MountKind::Tmpfs => InstanceMountSource::Tmpfs {
                size: mount.size,
                mode: None,
                uid: None,
                gid: None,
            },
            MountKind::Cache => InstanceMountSource::Bind {
                path: self.cache_mount(mounted, work)?,
                recursive: false,
                propagation: None,
            },
            MountKind::Secret => return self.secret(mount, spec, work),
            MountKind::Ssh => return self.ssh(mount, spec, work),
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

    /// Something to look at only: a mounted tree, or one file of it.
    fn shown(&self, shown: &Shown, path: &str) -> Result<InstanceMountSource, ExecError> {
        let names = files::names(path.as_bytes());
        if let Some(source) = self.one_file(shown, &names)? {
            return Ok(source);
        }
        let tree = match shown {
            Shown::Stage(files) => files.mountable(&self.store)?,
            Shown::Made { tree, key } => {
                Files::given(*key, tree.clone(), false, None).mountable(&self.store)?
            }
        };
        Ok(InstanceMountSource::Tree {
            tree,
            subpath: match names.is_empty() {
                true => None,
                false => Some(String::from_utf8_lossy(&names.join(&b'/')).into_owned()),
            },
        })
    }

    /// A copy that may be written to, in `folder`.
    fn writable(&self, shown: &Shown, path: &str, folder: &Path) -> Result<PathBuf, ExecError> {
        let rootfs = self.rootfs_of(shown)?;
        let names = files::names(path.as_bytes());
        let real = files::resolve(&rootfs, &names, true)?;
        let (_, shape) = rootfs.entry(&real)?;
        let copy = folder.join("copy");
        if shape == Shape::Folder {
            fs::create_dir(&copy).map_err(|cause| ExecError::Scratch {
                path: copy.clone(),
                cause,
            })?;
        }
        unfold(&rootfs.tree, &real.join(&b'/'), &self.store, &copy)?;
        Ok(copy)
    }

    fn rootfs_of(&self, shown: &Shown) -> Result<Rootfs, ExecError> {
        match shown {
            Shown::Stage(files) => self.rootfs(files),
            Shown::Made { tree, .. } => Ok(Rootfs {
                tree: tree.clone(),
                store: self.store.clone(),
            }),
        }
    }

    /// A bind mount of one file, not of a folder.
    fn one_file(
        &self,
        shown: &Shown,
        names: &[Vec<u8>],
    ) -> Result<Option<InstanceMountSource>, ExecError> {
        let rootfs = self.rootfs_of(shown)?;
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
    fn cache_mount(&self, mounted: &Mounted, work: &mut Work) -> Result<PathBuf, ExecError> {
        let mount = &mounted.mount;
        let id = mount.id.as_deref().unwrap_or(&mount.target);
        // What it begins with is part of which cache it is.
        let mut begins = id.to_owned();
        if let Some((shown, path)) = &mounted.files {
            begins.push_str(&format!("\n{}\n{path}", shown.key()));
        }
        let own = (mount.mode, mount.uid, mount.gid);
        if own != (None, None, None) {
            begins.push_str(&format!("\n{own:?}"));
        }
        let name = Digest::of(begins).hex();
        let path = match mount.sharing {
            Sharing::Private => work.folder(&format!("private-{name}"))?,
            _ => {
                let path = self.cache_folder(&["mounts", &name])?;
                cache::used(&path);
                path
            }
        };
        let fail = |cause| ExecError::Scratch {
            path: path.clone(),
            cause,
        };
        let folder = fs::File::open(&path).map_err(fail)?;
        if fs::read_dir(&path).map_err(fail)?.next().is_none() {
            let own = self.seed(mounted, &path)?;
            let (uid, gid) = (mount.uid.unwrap_or(own.uid), mount.gid.unwrap_or(own.gid));
            std::os::unix::fs::chown(&path, Some(uid), Some(gid)).map_err(fail)?;
            let mode = fs::Permissions::from_mode(mount.mode.unwrap_or(own.mode));
            fs::set_permissions(&path, mode).map_err(fail)?;
        }
        if mount.sharing == Sharing::Locked {
            rustix::fs::flock(&folder, rustix::fs::FlockOperation::LockExclusive)
                .map_err(|e| fail(e.into()))?;
            work.locks.push(folder);
        }
        Ok(path)
    }

    /// Fills an empty cache with what it begins with; gives what its folder is to be like.
    fn seed(&self, mounted: &Mounted, path: &Path) -> Result<Meta, ExecError> {
        let Some((shown, from)) = &mounted.files else {
            return Ok(Meta {
                mode: 0o755,
                ..Meta::default()
            });
        };
        let rootfs = self.rootfs_of(shown)?;
        let real = files::resolve(&rootfs, &files::names(from.as_bytes()), true)?;
        unfold(&rootfs.tree, &real.join(&b'/'), &self.store, path)?;
        Ok(rootfs.entry(&real)?.0)
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
        let variable = mount.env.as_ref();
        let variable = variable.map(|name| if name.is_empty() { &id } else { name });
        let Some(content) = self.secrets.get(&id) else {
            if mount.required {
                return Err(ExecError::Secret(id));
            }
            // As docker has it: a variable is there, though empty.
            if let Some(name) = variable {
                spec.env.insert(name.clone(), String::new());
            }
            return Ok(());
        };
        if let Some(name) = variable {
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

    /// An agent's socket. Without an agent the step goes on without it, though it is told
    /// where it would be, unless it is required: as docker has it.
    fn ssh(
        &self,
        mount: &Mount,
        spec: &mut InstanceSpec,
        work: &mut Work,
    ) -> Result<(), ExecError> {
        let id = mount.id.as_deref().unwrap_or("default");
        let target = match mount.target.as_str() {
            "" => format!("/run/buildkit/ssh_agent.{}", work.agents.len()),
            target => target.to_owned(),
        };
        spec.env
            .entry("SSH_AUTH_SOCK".into())
            .or_insert_with(|| target.clone());
        let Some(agent) = self.ssh.get(id) else {
            return match mount.required {
                true => Err(ExecError::Ssh(id.to_owned())),
                false => Ok(()),
            };
        };
        let folder = work.folder(&numbered("ssh", spec))?;
        let owner = (mount.uid.unwrap_or(0), mount.gid.unwrap_or(0));
        let mode = mount.mode.unwrap_or(0o600);
        let agent = Agent::start(&folder, "agent", agent.clone(), mode, owner);
        let agent = agent.map_err(|cause| ExecError::Scratch {
            path: folder,
            cause,
        })?;
        spec.mounts.push(InstanceMount {
            source: InstanceMountSource::Bind {
                path: agent.path.clone(),
                recursive: false,
                propagation: None,
            },
            target,
            read_only: true,
            exec: false,
            dev: false,
        });
        work.agents.push(agent);
        Ok(())
    }
}

/// A name for a folder that no other mount of the step has.
fn numbered(what: &str, spec: &InstanceSpec) -> String {
    format!("{what}-{}", spec.mounts.len())
}

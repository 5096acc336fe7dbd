//! COPY, ADD and WORKDIR.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use kiln_model::Digest;
use kiln_store::tree::{Kind, Node, Tree};

use super::state::{Files, Key};
use super::{ExecError, Find, Site, Taken};
use crate::containerfile::Span;
use crate::context::Context;
use crate::context::ignore::Patterns;
use crate::context::source::{ContextSource, Remembered};
use crate::copy::archive;
use crate::copy::owner::{self, MAX_ACCOUNTS, Owner};
use crate::copy::{self, Changes, Item, Picked};
use crate::evaluate::{CopyAction, Taking};
use crate::files::{self, Meta, Names, Shape, Source};
use crate::remote::{Fetched, Remote, Remotes};
use crate::rootfs::{self, Rootfs};

/// Mode of a file that comes from a URL, as docker has it.
const FETCHED_MODE: u32 = 0o600;
/// Mode of a heredoc's file, as docker has it.
const INLINE_MODE: u32 = 0o644;

impl Site<'_> {
    /// Whether the content of all that was picked is in the store.
    pub(super) fn stored(&self, picked: &[Picked]) -> Result<bool, ExecError> {
        let items = picked.iter().flat_map(|picked| &picked.items);
        let files = items.filter_map(|item| match item.shape {
            Shape::File { digest, size } => Some((digest, size)),
            _ => None,
        });
        let missing = self.store.missing_object(files);
        Ok(missing.map_err(ExecError::store)?.is_none())
    }

    /// Finds what a COPY or ADD names. Unless it is to be `stored`, the content of a
    /// context's files may have left the store; else what has is read again.
    pub(super) fn pick(
        &self,
        action: &CopyAction,
        span: Span,
        find: &Find<'_>,
        stored: bool,
    ) -> Result<Vec<Picked>, ExecError> {
        let within = |context: &ContextSource, pattern: &str, exclude: &Patterns| match stored {
            true => copy::pick(context, pattern, exclude, action.parents),
            false => copy::pick(&Remembered(context), pattern, exclude, action.parents),
        };
        let exclude = Patterns::new(action.exclude.iter().map(String::as_str))?;
        let taken = match &action.from {
            Some(from) => Some(find(from, span)?),
            None => None,
        };
        let mut all = Vec::new();
        for named in &action.sources {
            match named {
                Taking::Inline { name, content } => all.push(self.inline(name, content)?),
                Taking::Remote(remote) => all.extend(self.remote(remote, action)?),
                Taking::Path(pattern) => {
                    all.extend(match &taken {
                        None => {
                            let context = self.context.ok_or(ExecError::NoContext)?;
                            within(context, pattern, &exclude)?
                        }
                        Some(Taken::Folder(context)) => within(context, pattern, &exclude)?,
                        Some(Taken::Files(files)) => {
                            let rootfs = self.rootfs(files)?;
                            copy::pick(&rootfs, pattern, &exclude, action.parents)?
                        }
                    });
                }
            }
        }
        Ok(all)
    }

    pub(super) fn rootfs(&self, files: &Files) -> Result<Rootfs, ExecError> {
        Ok(Rootfs {
            tree: (*files.tree(&self.store)?).clone(),
            store: self.store.clone(),
        })
    }

    fn inline(&self, name: &str, content: &str) -> Result<Picked, ExecError> {
        let put = self.store.put_object(&mut content.as_bytes());
        let (digest, size) = put.map_err(ExecError::store)?;
        Ok(one_file(name, INLINE_MODE, digest, size))
    }

    /// Fetches what an ADD names elsewhere.
    fn remote(&self, remote: &Remote, action: &CopyAction) -> Result<Vec<Picked>, ExecError> {
        match self.remotes().fetch(remote)? {
            Fetched::File { name, digest, size } => {
                Ok(vec![one_file(&name, FETCHED_MODE, digest, size)])
            }
            Fetched::Folder { path, keep_git_dir } => {
                let git = (!keep_git_dir).then_some(".git");
                let exclude = action.exclude.iter().map(String::as_str).chain(git);
                let exclude = Patterns::new(exclude)?;
                let context = Context::scan(&path, &Patterns::default())?;
                let context = ContextSource::new(context, &self.cache, self.store.clone(), 0);
                Ok(copy::pick(&context, "/", &exclude, false)?)
            }
        }
    }

    fn remotes(&self) -> Remotes<'_> {
        Remotes {
            store: &self.store,
            cache: &self.cache,
            pins: &self.pins,
            cancel: self.cancel,
        }
    }

    /// Says whether files come from another stage or image: their times are kept.
    fn foreign(action: &CopyAction) -> bool {
        action.from.is_some()
    }

    pub(super) fn copy_key(
        &self,
        before: &Digest,
        action: &CopyAction,
        picked: &[Picked],
    ) -> Digest {
        let mut key = Key::new("copy", before);
        key.field(action.destination.as_bytes())
            .debug(&action.chown)
            .debug(&action.chmod)
            .debug(&(
                action.unpack,
                action.link,
                Self::foreign(action),
                self.epoch,
                picked.len(),
            ));
        for picked in picked {
            picked.hash_into(key.hasher());
        }
        key.finish()
    }

    pub(super) fn place(
        &self,
        files: &Files,
        action: &CopyAction,
        picked: &[Picked],
    ) -> Result<Tree, ExecError> {
        let mut target = self.rootfs(files)?;
        let owner = match &action.chown {
            Some(text) => Some(self.account(&target, text, true)?.owner),
            None => None,
        };
        // What comes from the host belongs to root and has no time of its own; what comes
        // from another stage or image keeps both.
        let changes = Changes {
            owner: match Self::foreign(action) {
                true => owner,
                false => owner.or(Some(Owner::default())),
            },
            mode: action.chmod.clone(),
            mtime: (!Self::foreign(action)).then_some(self.epoch),
            made: self.epoch,
        };
        let mut layer = Rootfs {
            tree: Tree::new(),
            store: self.store.clone(),
        };
        let into = if action.link { &mut layer } else { &mut target };
        for picked in picked {
            if action.unpack && self.unpack(into, action, picked, owner)? {
                continue;
            }
            copy::place(into, picked, &action.destination, &changes)?;
        }
        if action.link {
            let made = rootfs::node(changes.made(), Kind::Dir);
            lay_over(&mut target.tree, &layer.tree, &made)?;
        }
        Ok(target.tree)
    }

    pub(super) fn account(
        &self,
        target: &Rootfs,
        text: &str,
        same_group: bool,
    ) -> Result<owner::Account, ExecError> {
        let passwd = target.text("/etc/passwd", MAX_ACCOUNTS)?;
        let group = target.text("/etc/group", MAX_ACCOUNTS)?;
        Ok(owner::lookup(text, &passwd, &group, same_group)?)
    }

    /// Unpacks a file that is an archive; false: it is none.
    fn unpack(
        &self,
        target: &mut Rootfs,
        action: &CopyAction,
        picked: &Picked,
        owner: Option<Owner>,
    ) -> Result<bool, ExecError> {
        let [
            Item {
                shape: Shape::File { digest, .. },
                ..
            },
        ] = picked.items.as_slice()
        else {
            return Ok(false);
        };
        let content = self.store.open_object(digest).map_err(ExecError::store)?;
        let content = content.ok_or(ExecError::Lost(*digest))?;
        let mut sink = |reader: &mut dyn io::Read, size| {
            let put = self.store.put_object_of(reader, size);
            put.map_err(io::Error::other)
        };
        let entries = archive::read(content, &mut sink).map_err(|cause| ExecError::Archive {
            path: String::from_utf8_lossy(&picked.name).into_owned(),
            cause,
        })?;
        let Some(mut entries) = entries else {
            return Ok(false);
        };
        if self.epoch > 0 {
            for entry in &mut entries {
                entry.meta.mtime = entry.meta.mtime.min(self.epoch);
            }
        }
        let changes = Changes {
            owner,
            mode: None,
            mtime: None,
            made: self.epoch,
        };
        archive::place(target, &entries, &action.destination, &changes)?;
        Ok(true)
    }

    /// WORKDIR: the folder, made with its parents if it is missing.
    pub(super) fn folder(&self, files: &Files, path: &str, user: &str) -> Result<Tree, ExecError> {
        let mut target = self.rootfs(files)?;
        let owner = match user {
            "" => Owner::default(),
            user => self.account(&target, user, true)?.owner,
        };
        let meta = Meta {
            mode: 0o755,
            uid: owner.uid,
            gid: owner.gid,
            mtime: self.epoch,
            ..Meta::default()
        };
        copy::make_folders(&mut target, &files::names(path.as_bytes()), &meta)?;
        Ok(target.tree)
    }

    /// The parts of a path that aren't in the files: mount points that must be made.
    pub(super) fn missing(target: &Rootfs, path: &str) -> Result<Vec<Vec<u8>>, ExecError> {
        let names = files::names(path.as_bytes());
        let mut missing = Vec::new();
        for depth in 1..=names.len() {
            let real = files::resolve(target, &names[..depth], true)?;
            if target.kind(&real).is_none() {
                missing.push(real.join(&b'/'));
            }
        }
        Ok(missing)
    }

    /// A folder of the cache, made if it is missing.
    pub(super) fn cache_folder(&self, parts: &[&str]) -> Result<std::path::PathBuf, ExecError> {
        let mut path = self.cache.clone();
        path.extend(parts);
        fs::create_dir_all(&path).map_err(|cause| ExecError::Scratch {
            path: path.clone(),
            cause,
        })?;
        Ok(path)
    }
}

fn one_file(name: &str, mode: u32, digest: Digest, size: u64) -> Picked {
    Picked {
        name: name.as_bytes().to_vec(),
        items: vec![Item {
            path: Names::new(),
            meta: Meta {
                mode,
                ..Meta::default()
            },
            shape: Shape::File { digest, size },
        }],
        parents: false,
    }
}

/// `--link`: what was copied is a layer that knows nothing of those below. A folder that is
/// there stays as it is where another was only `made` on the way; anything else that is in
/// the way gives way.
fn lay_over(tree: &mut Tree, layer: &Tree, made: &Node) -> Result<(), ExecError> {
    let mut first = BTreeMap::new();
    for item in layer.walk() {
        let (path, node) = (&item.path, item.node);
        let there = tree.get(path.as_slice()).map(Node::is_dir);
        match (there, node.is_dir()) {
            (Some(true), true) if node == made || path.is_empty() => continue,
            (Some(true), true) => {}
            (Some(_), _) => {
                tree.remove(path.as_slice()).map_err(ExecError::store)?;
            }
            (None, _) => {}
        }
        if node.is_dir() || item.links == 1 {
            tree.insert(path.as_slice(), node.clone())
                .map_err(ExecError::store)?;
            continue;
        }
        match first.get(&item.inode) {
            Some(first) => tree.link(path, first),
            None => tree.insert(path, node.clone()),
        }
        .map_err(ExecError::store)?;
        first.entry(item.inode).or_insert(item.path);
    }
    Ok(())
}

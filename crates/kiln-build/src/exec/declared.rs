//! What `x-kiln.image` puts over its base: accounts first, so that owners may be named by
//! them, then folders, files and links. All of it is one step.

use kiln_model::Digest;
use kiln_model::spec::{DeclaredContent, DeclaredEntry};
use kiln_store::tree::Tree;

use super::reason::Inputs;
use super::state::{Files, Key};
use super::{ExecError, Site};
use crate::build::now_nanos;
use crate::containerfile::Declared;
use crate::context::source::ContextSource;
use crate::context::{self, Context};
use crate::copy::accounts::Accounts;
use crate::copy::owner::{MAX_ACCOUNTS, Owner};
use crate::copy::{self, FOLDER_MODE, Item, Picked};
use crate::files::{self, FilesError, Meta, Names, Shape, Source as _, Target as _};
use crate::rootfs::Rootfs;

const FILE_MODE: u32 = 0o644;
const LINK_MODE: u32 = 0o777;
/// Of passwd, group and their shadows, where they are made.
const ACCOUNT_MODE: u32 = 0o644;

/// What entries are to be made of; `None`: a folder or link, which says it all itself.
pub(super) type PickedEntries = Vec<Option<Picked>>;

impl Site<'_> {
    /// Finds what the entries name on the host.
    pub(super) fn pick_declared(&self, declared: &Declared) -> Result<PickedEntries, ExecError> {
        let pick = |entry: &DeclaredEntry| match &entry.what {
            DeclaredContent::Folder | DeclaredContent::Link(_) => Ok(None),
            DeclaredContent::Text(text) => {
                let put = self.store.put_object(&mut text.as_bytes());
                let (digest, size) = put.map_err(ExecError::store)?;
                Ok(Some(one_file(digest, size)))
            }
            DeclaredContent::Copy(path) => self.pick_host(path).map(Some),
        };
        let place = |entry: &DeclaredEntry| pick(entry).map_err(|cause| at(entry, cause));
        declared.entries.iter().map(place).collect()
    }

    fn pick_host(&self, path: &std::path::Path) -> Result<Picked, ExecError> {
        let found = Context::look(path, &context::is_own, false)?;
        let found = found.ok_or_else(|| FilesError::NotFound(path.display().to_string()))?;
        let source = ContextSource::new(found, &self.cache, self.store.clone(), now_nanos());
        let picked = copy::pick(&source, "/", &Default::default(), false)?;
        if let Err(cause) = source.save() {
            tracing::debug!(%cause, "the digests of declared files were not remembered");
        }
        let name = path.file_name().unwrap_or_default();
        let name = std::os::unix::ffi::OsStrExt::as_bytes(name).to_vec();
        // The path itself names one thing, no pattern.
        let one = picked.into_iter().next();
        one.map(|one| Picked { name, ..one })
            .ok_or_else(|| FilesError::NotFound(path.display().to_string()).into())
    }

    pub(super) fn declared_key(
        &self,
        before: &Digest,
        declared: &Declared,
        picked: &PickedEntries,
    ) -> Digest {
        let mut key = Key::new("declared", before);
        key.field(&self.epoch.to_le_bytes());
        for (name, part) in parts(declared, picked) {
            key.field(name.as_bytes()).field(part.as_bytes());
        }
        key.finish()
    }

    pub(super) fn declared_inputs(
        &self,
        before: &Digest,
        declared: &Declared,
        picked: &PickedEntries,
    ) -> Inputs {
        Inputs::of_parts(before, self.epoch, parts(declared, picked))
    }

    pub(super) fn declared(
        &self,
        files: &Files,
        declared: &Declared,
        picked: &PickedEntries,
    ) -> Result<Tree, ExecError> {
        let mut target = self.rootfs(files)?;
        self.accounts(&mut target, declared)?;
        for (entry, picked) in declared.entries.iter().zip(picked) {
            self.put_entry(&mut target, entry, picked.as_ref())
                .map_err(|cause| at(entry, cause))?;
        }
        Ok(target.tree)
    }

    fn accounts(&self, target: &mut Rootfs, declared: &Declared) -> Result<(), ExecError> {
        if declared.groups.is_empty() && declared.users.is_empty() {
            return Ok(());
        }
        const PATHS: [&str; 4] = ["/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow"];
        let [passwd, group, shadow, gshadow] = PATHS;
        let if_there = |path: &str| -> Result<Option<String>, FilesError> {
            let bytes = target.read(&files::names(path.as_bytes()), MAX_ACCOUNTS)?;
            Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
        };
        let mut accounts = Accounts {
            passwd: if_there(passwd)?.unwrap_or_default(),
            group: if_there(group)?.unwrap_or_default(),
            shadow: if_there(shadow)?,
            gshadow: if_there(gshadow)?,
        };
        let before = accounts.clone();
        for group in &declared.groups {
            accounts.add_group(group).map_err(Box::new)?;
        }
        for user in &declared.users {
            accounts.add_user(user).map_err(Box::new)?;
        }
        let texts = |of: Accounts| [Some(of.passwd), Some(of.group), of.shadow, of.gshadow];
        let changed = PATHS
            .into_iter()
            .zip(texts(accounts).into_iter().zip(texts(before)));
        for (path, (new, old)) in changed {
            if let Some(text) = new.filter(|new| old.as_ref() != Some(new)) {
                self.account_file(target, path, &text)?;
            }
        }
        Ok(())
    }

    fn account_file(&self, target: &mut Rootfs, path: &str, text: &str) -> Result<(), ExecError> {
        let put = self.store.put_object(&mut text.as_bytes());
        let (digest, size) = put.map_err(ExecError::store)?;
        let real = files::resolve(target, &files::names(path.as_bytes()), true)?;
        let (_, parents) = real.split_last().unwrap_or((&NOTHING, &[]));
        copy::make_folders(target, parents, &self.meta(FOLDER_MODE))?;
        let meta = match target.kind(&real) {
            Some(_) => Meta {
                mtime: self.epoch,
                ..target.entry(&real)?.0
            },
            None => self.meta(ACCOUNT_MODE),
        };
        Ok(copy::put(
            target,
            &real,
            meta,
            Shape::File { digest, size },
        )?)
    }

    fn meta(&self, mode: u32) -> Meta {
        Meta {
            mode,
            mtime: self.epoch,
            ..Meta::default()
        }
    }

    fn put_entry(
        &self,
        target: &mut Rootfs,
        entry: &DeclaredEntry,
        picked: Option<&Picked>,
    ) -> Result<(), ExecError> {
        let owner = match &entry.owner {
            Some(text) => Some(self.account(target, text, true)?.owner),
            None => None,
        };
        let mut named = files::names(entry.path.as_bytes());
        match (&entry.what, picked) {
            (DeclaredContent::Folder, _) => self.put_folder(target, &named, entry.mode, owner),
            (DeclaredContent::Link(leads), _) => {
                let meta = owned(self.meta(LINK_MODE), owner);
                let real = self.parents_of(target, &named)?;
                let link = Shape::Link(leads.as_bytes().to_vec());
                Ok(copy::put(target, &real, meta, link)?)
            }
            (_, None) => Ok(()),
            (_, Some(picked)) => {
                let root = picked.items.first().map(|item| &item.shape);
                if root == Some(&Shape::Folder) {
                    return self.put_below(target, &named, entry, picked, owner);
                }
                if entry.path.ends_with('/') {
                    named.push(picked.name.clone());
                }
                let real = self.parents_of(target, &named)?;
                for item in &picked.items {
                    let meta = self.changed(item, entry.mode, owner);
                    copy::put(target, &real, meta, item.shape.clone())?;
                }
                Ok(())
            }
        }
    }

    /// A folder that is there keeps what is not said of it.
    fn put_folder(
        &self,
        target: &mut Rootfs,
        named: &Names,
        mode: Option<u32>,
        owner: Option<Owner>,
    ) -> Result<(), ExecError> {
        let (_, parents) = named.split_last().unwrap_or((&NOTHING, &[]));
        copy::make_folders(target, parents, &self.meta(FOLDER_MODE))?;
        let real = files::resolve(target, named, true)?;
        let there = target.kind(&real).is_some();
        if there && mode.is_none() && owner.is_none() {
            // Only that it is no folder would be wrong.
            return Ok(copy::make_folders(target, &real, &Meta::default())?);
        }
        let mut meta = match there {
            true => target.entry(&real)?.0,
            false => self.meta(FOLDER_MODE),
        };
        meta.mode = mode.unwrap_or(meta.mode);
        Ok(copy::put(target, &real, owned(meta, owner), Shape::Folder)?)
    }

    /// What is in a folder of the host, below a folder of the image.
    fn put_below(
        &self,
        target: &mut Rootfs,
        named: &Names,
        entry: &DeclaredEntry,
        picked: &Picked,
        owner: Option<Owner>,
    ) -> Result<(), ExecError> {
        for item in &picked.items {
            let meta = self.changed(item, entry.mode, owner);
            if !item.path.is_empty() {
                let path = [named.as_slice(), &item.path].concat();
                let real = self.parents_of(target, &path)?;
                copy::put(target, &real, meta, item.shape.clone())?;
                continue;
            }
            let (_, parents) = named.split_last().unwrap_or((&NOTHING, &[]));
            copy::make_folders(target, parents, &self.meta(FOLDER_MODE))?;
            // One that is there stays as it is.
            copy::make_folders(target, named, &meta)?;
        }
        Ok(())
    }

    fn changed(&self, item: &Item, mode: Option<u32>, owner: Option<Owner>) -> Meta {
        let mut meta = owned(item.meta.clone(), owner);
        meta.mtime = self.epoch;
        meta.mode = match (mode, &item.shape) {
            (None, _) | (_, Shape::Link(_)) => meta.mode,
            (Some(mode), Shape::Folder) => enterable(mode),
            (Some(mode), _) => mode,
        };
        meta
    }

    /// Where a path leads whose last name is going to be put anew; its folders are made.
    fn parents_of(&self, target: &mut Rootfs, path: &[Vec<u8>]) -> Result<Names, ExecError> {
        let Some((name, parents)) = path.split_last() else {
            return Err(FilesError::IsAFolder("/".into()).into());
        };
        copy::make_folders(target, parents, &self.meta(FOLDER_MODE))?;
        let mut real = files::resolve(target, parents, true)?;
        real.push(name.clone());
        Ok(real)
    }
}

const NOTHING: Vec<u8> = Vec::new();

fn owned(meta: Meta, owner: Option<Owner>) -> Meta {
    match owner {
        Some(Owner { uid, gid }) => Meta { uid, gid, ..meta },
        None => meta,
    }
}

/// A folder's mode for files of this one: who may read may enter.
fn enterable(mode: u32) -> u32 {
    mode & 0o777 | (mode & 0o444) >> 2
}

fn at(entry: &DeclaredEntry, cause: ExecError) -> ExecError {
    ExecError::Declared {
        at: format!("{}: {}", entry.place, entry.path),
        cause: Box::new(cause),
    }
}

fn one_file(digest: Digest, size: u64) -> Picked {
    Picked {
        name: Vec::new(),
        items: vec![Item {
            path: Names::new(),
            meta: Meta {
                mode: FILE_MODE,
                ..Meta::default()
            },
            shape: Shape::File { digest, size },
        }],
        parents: false,
    }
}

/// What the result depends on, by name for people; places don't count.
fn parts(declared: &Declared, picked: &PickedEntries) -> Vec<(String, String)> {
    let mut parts = Vec::new();
    for group in &declared.groups {
        parts.push((format!("the group {}", group.name), group.gid.to_string()));
    }
    for user in &declared.users {
        let said = (
            &user.uid,
            &user.group,
            &user.groups,
            &user.home,
            &user.shell,
        );
        parts.push((format!("the user {}", user.name), format!("{said:?}")));
    }
    for (entry, picked) in declared.entries.iter().zip(picked) {
        let what = match (&entry.what, picked) {
            (_, Some(picked)) => {
                let mut hasher = kiln_model::Hasher::new();
                picked.hash_into(&mut hasher);
                hasher.finish().to_string()
            }
            (what, None) => format!("{what:?}"),
        };
        let said = (&entry.owner, entry.mode, what);
        parts.push((entry.path.clone(), format!("{said:?}")));
    }
    parts
}

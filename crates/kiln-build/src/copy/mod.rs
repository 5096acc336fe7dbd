//! COPY and ADD of files: which entries of a source are meant, and where they land in a
//! stage, as docker has it (a folder's content is copied, not the folder; links in the
//! source's own path are followed, others copied; parents are made).
//!
//! Invariants: [`pick`] only reads, so that its result can serve as a cache key before
//! anything is changed; [`place`] follows no link out of the target.

pub mod accounts;
pub mod archive;
pub mod mode;
pub mod owner;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use kiln_model::Hasher;

use crate::context::glob::{BadPattern, Glob};
use crate::context::ignore::{Patterns, Seen, clean};
use crate::files::{self, FilesError, Inode, Kind, Meta, Names, Shape, Source, Target, shown};
use mode::ModeChange;
use owner::Owner;

/// The mode of folders that are made on the way.
pub(crate) const FOLDER_MODE: u32 = 0o755;

/// Why files can't be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(transparent)]
    Pattern(#[from] BadPattern),
    #[error("the entry {entry} of the archive leads to {to}, out of the destination")]
    Outside { entry: String, to: String },
}

/// One entry that was picked, with its path below what was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub path: Names,
    pub meta: Meta,
    pub shape: Shape,
}

/// One source that a pattern named: a file, or a folder with what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picked {
    /// The last name of the path that was named.
    pub name: Vec<u8>,
    /// The first has an empty path; folders stand before what is in them.
    pub items: Vec<Item>,
    /// `--parents`: paths count from the destination.
    pub parents: bool,
}

impl Picked {
    pub fn hash_into(&self, hasher: &mut Hasher) {
        hasher.update(&[u8::from(self.parents)]);
        hasher.update(&(self.items.len() as u64).to_le_bytes());
        hasher.update(&(self.name.len() as u64).to_le_bytes());
        hasher.update(&self.name);
        for item in &self.items {
            files::hash_entry(hasher, &item.path, &item.meta, &item.shape);
        }
    }
}

/// Finds what a source path or pattern names.
pub fn pick(
    source: &(impl Source + ?Sized),
    pattern: &str,
    exclude: &Patterns,
    parents: bool,
) -> Result<Vec<Picked>, CopyError> {
    if parents {
        return pick_parents(source, pattern, exclude).map(|picked| vec![picked]);
    }
    let paths = if has_wildcards(pattern) {
        matching(source, pattern)?
    } else {
        vec![files::names(pattern.as_bytes())]
    };
    let mut all = Vec::new();
    for path in paths {
        let real = files::resolve(source, &path, true)?;
        let Some(kind) = source.kind(&real) else {
            return Err(FilesError::NotFound(shown(&path)).into());
        };
        let walk = Walk {
            source,
            root: &real,
            include: None,
            exclude,
        };
        all.push(Picked {
            name: path.last().cloned().unwrap_or_default(),
            items: walk.items(kind == Kind::Folder)?,
            parents: false,
        });
    }
    Ok(all)
}

/// `--parents`: the path below the last `/./` is kept.
fn pick_parents(
    source: &(impl Source + ?Sized),
    pattern: &str,
    exclude: &Patterns,
) -> Result<Picked, CopyError> {
    let (pivot, pattern) = pattern.split_once("/./").unwrap_or(("", pattern));
    let root = files::resolve(source, &files::names(pivot.as_bytes()), true)?;
    if source.kind(&root) != Some(Kind::Folder) {
        return Err(FilesError::NotFound(shown(&root)).into());
    }
    let wanted = clean(&format!("/{pattern}"));
    let wanted = wanted.trim_start_matches('/');
    if !has_wildcards(wanted) {
        let mut path = root.clone();
        path.extend(files::names(wanted.as_bytes()));
        if source.kind(&path).is_none() {
            return Err(FilesError::NotFound(shown(&path)).into());
        }
    }
    let everything = if wanted.is_empty() { "**" } else { wanted };
    let include = Patterns::new([everything])?;
    let walk = Walk {
        source,
        root: &root,
        include: Some(&include),
        exclude,
    };
    Ok(Picked {
        name: Vec::new(),
        items: walk.items(true)?,
        parents: true,
    })
}

struct Walk<'a, S: ?Sized> {
    source: &'a S,
    root: &'a [Vec<u8>],
    include: Option<&'a Patterns>,
    exclude: &'a Patterns,
}

#[derive(Clone, Default)]
struct Position {
    include: Seen,
    exclude: Seen,
    out: bool,
    text: String,
}

impl<S: Source + ?Sized> Walk<'_, S> {
    /// The root and, of a folder, what is in it.
    fn items(&self, folder: bool) -> Result<Vec<Item>, CopyError> {
        let mut found = vec![self.root.to_vec()];
        if folder {
            self.folder(&mut self.root.to_vec(), Position::default(), &mut found);
        }
        let entries = self.source.entries(&found)?;
        let mut first: BTreeMap<Inode, Names> = BTreeMap::new();
        let items = found.into_iter().zip(entries);
        let items = items.map(|(mut path, (meta, shape))| {
            let inode = self.source.inode(&path);
            path.drain(..self.root.len());
            let shape = match inode {
                None => shape,
                Some(inode) => match first.entry(inode) {
                    Entry::Occupied(first) => Shape::Same(first.get().clone()),
                    Entry::Vacant(none) => {
                        none.insert(path.clone());
                        shape
                    }
                },
            };
            Item { path, meta, shape }
        });
        Ok(items.collect())
    }

    /// Adds the paths below the folder `path` that are meant.
    fn folder(&self, path: &mut Names, at: Position, found: &mut Vec<Names>) {
        for (name, folder) in self.source.list(path) {
            let (keep, next) = self.asked(&name, &at);
            let out = !keep && (!folder || !self.looks_into(&next));
            if out {
                continue;
            }
            let before = found.len();
            path.push(name);
            found.push(path.clone());
            if folder {
                self.folder(path, next, found);
                // A folder that is only on the way is there for what is in it.
                if !keep && found.len() == before + 1 {
                    found.pop();
                }
            }
            path.pop();
        }
    }

    /// Whether an entry is meant, and where its own entries stand.
    fn asked(&self, name: &[u8], at: &Position) -> (bool, Position) {
        if self.include.is_none() && self.exclude.is_empty() {
            return (true, Position::default());
        }
        let name = String::from_utf8_lossy(name);
        let text = match at.text.as_str() {
            "" => name.into_owned(),
            parent => format!("{parent}/{name}"),
        };
        let (out, exclude) = self.exclude.leave_out(&text, &at.exclude);
        let (wanted, include) = match self.include {
            Some(patterns) => patterns.leave_out(&text, &at.include),
            None => (true, Seen::default()),
        };
        let next = Position {
            include,
            exclude,
            out,
            text,
        };
        (wanted && !out, next)
    }

    /// Whether something in a folder that is not meant itself may be.
    fn looks_into(&self, at: &Position) -> bool {
        !at.out || self.exclude.takes_back()
    }
}

fn has_wildcards(pattern: &str) -> bool {
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        match c {
            '*' | '?' | '[' => return true,
            '\\' => {
                chars.next();
            }
            _ => {}
        }
    }
    false
}

/// All paths that match: the names before the first wildcard are taken as they are, what
/// matches is not looked into.
fn matching(source: &(impl Source + ?Sized), pattern: &str) -> Result<Vec<Names>, CopyError> {
    let cleaned = clean(&format!("/{pattern}"));
    let parts: Vec<&str> = cleaned[1..].split('/').collect();
    let fixed = parts.iter().take_while(|p| !has_wildcards(p)).count();
    let base: Names = parts[..fixed]
        .iter()
        .map(|p| p.as_bytes().to_vec())
        .collect();
    let globs = parts[fixed..]
        .iter()
        .map(|p| Glob::path(p))
        .collect::<Result<Vec<_>, _>>()?;
    let mut found = vec![files::resolve(source, &base, true)?];
    for (depth, glob) in globs.iter().enumerate() {
        let last = depth + 1 == globs.len();
        let mut next = Vec::new();
        for folder in &found {
            for name in source.names(folder) {
                if glob.matches(&String::from_utf8_lossy(&name)) {
                    let path = [folder.as_slice(), &[name]].concat();
                    if last || source.kind(&path) == Some(Kind::Folder) {
                        next.push(path);
                    }
                }
            }
        }
        found = next;
    }
    Ok(found)
}

/// How picked entries are changed on their way.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Of everything that is copied or made; `None`: root for a context, else kept.
    pub owner: Option<Owner>,
    pub mode: Option<ModeChange>,
    /// Every copied entry's time; `None`: kept. Folders that are made have `made`.
    pub mtime: Option<i64>,
    /// Seconds since the epoch.
    pub made: i64,
}

impl Changes {
    pub(crate) fn apply(&self, mut meta: Meta, shape: &Shape) -> Meta {
        if let Some(owner) = self.owner {
            (meta.uid, meta.gid) = (owner.uid, owner.gid);
        }
        if let (Some(change), false) = (&self.mode, matches!(shape, Shape::Link(_))) {
            meta.mode = change.apply(meta.mode, *shape == Shape::Folder);
        }
        if let Some(mtime) = self.mtime {
            meta.mtime = mtime;
        }
        meta
    }

    /// Of folders that are made on the way.
    pub(crate) fn made(&self) -> Meta {
        let owner = self.owner.unwrap_or_default();
        Meta {
            mode: match &self.mode {
                // As mkdir(2) makes them under the builder's umask.
                Some(ModeChange::Set(mode)) => *mode & FOLDER_MODE,
                _ => FOLDER_MODE,
            },
            uid: owner.uid,
            gid: owner.gid,
            mtime: self.made,
            xattrs: Default::default(),
        }
    }
}

/// Puts what was picked at `destination`: absolute, a trailing `/` says it is a folder.
pub fn place(
    target: &mut (impl Target + ?Sized),
    picked: &Picked,
    destination: &str,
    changes: &Changes,
) -> Result<(), CopyError> {
    let Some(root) = picked.items.first() else {
        return Ok(());
    };
    let named = files::names(destination.as_bytes());
    if destination.ends_with('/') || picked.parents {
        make_folders(target, &named, &changes.made())?;
    }
    let mut at = files::resolve(target, &named, true)?;
    let there = target.kind(&at);
    let folder = root.shape == Shape::Folder;
    if !folder && there == Some(Kind::Folder) {
        at.push(picked.name.clone());
    }
    let parents = if folder {
        at.len()
    } else {
        at.len().saturating_sub(1)
    };
    make_folders(target, &at[..parents], &changes.made())?;
    if folder && target.kind(&at) != Some(Kind::Folder) {
        return Err(FilesError::NotAFolder(shown(&at)).into());
    }
    for item in &picked.items {
        // The folder itself is the destination: only what is in it is copied.
        if item.path.is_empty() && folder {
            continue;
        }
        let path = [at.as_slice(), &item.path].concat();
        let meta = changes.apply(item.meta.clone(), &item.shape);
        put(target, &path, meta, below(&at, &item.shape))?;
    }
    Ok(())
}

/// What was taken, where what it names is below `at`.
fn below(at: &[Vec<u8>], shape: &Shape) -> Shape {
    match shape {
        Shape::Same(first) => Shape::Same([at, first].concat()),
        other => other.clone(),
    }
}

/// Puts one entry in place of another, but never a file over a folder or the reverse.
pub(crate) fn put(
    target: &mut (impl Target + ?Sized),
    path: &[Vec<u8>],
    meta: Meta,
    shape: Shape,
) -> Result<(), FilesError> {
    match (target.kind(path), &shape) {
        (Some(Kind::Folder), Shape::Folder) | (None, _) => {}
        (Some(Kind::Folder), _) => return Err(FilesError::IsAFolder(shown(path))),
        (Some(_), Shape::Folder) => return Err(FilesError::NotAFolder(shown(path))),
        _ => {}
    }
    target.put(path, meta, shape)
}

/// Makes the folders of a path that are missing, following links on the way.
pub(crate) fn make_folders(
    target: &mut (impl Target + ?Sized),
    path: &[Vec<u8>],
    meta: &Meta,
) -> Result<(), FilesError> {
    for depth in 1..=path.len() {
        let real = files::resolve(target, &path[..depth], true)?;
        match target.kind(&real) {
            Some(Kind::Folder) => {}
            None => {
                let meta = inherited(target, &real, meta.clone())?;
                target.put(&real, meta, Shape::Folder)?;
            }
            Some(_) => return Err(FilesError::NotAFolder(shown(&real))),
        }
    }
    Ok(())
}

/// As mkdir(2) has it: a folder below one with setgid has that too, and its group where it
/// isn't given to somebody.
fn inherited(
    target: &(impl Target + ?Sized),
    path: &[Vec<u8>],
    mut meta: Meta,
) -> Result<Meta, FilesError> {
    const SETGID: u32 = 0o2000;
    let (parent, _) = target.entry(&path[..path.len().saturating_sub(1)])?;
    if parent.mode & SETGID != 0 {
        meta.mode |= SETGID;
        if (meta.uid, meta.gid) == (0, 0) {
            meta.gid = parent.gid;
        }
    }
    Ok(meta)
}

#[cfg(test)]
pub(crate) mod tests;

//! The words COPY, ADD and RUN share about files, whatever holds them: a context on the
//! host, an image's tree, a stage that is being built.
//!
//! Invariants: paths are lists of names, never with `.`, `..` or empty ones; links are
//! resolved within one [`Source`] and can't lead out of it.

use std::collections::BTreeMap;

use kiln_model::{Digest, Hasher};

/// Links followed on the way to one file; more is taken for a loop (as in Linux).
const MAX_LINKS: usize = 40;

/// A path below a root, as its names.
pub type Names = Vec<Vec<u8>>;

/// Device and number: what tells files of a [`Source`] apart.
pub type Inode = (u64, u64);

/// What an entry is besides its metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    Folder,
    /// Content by digest; its size in bytes.
    File {
        digest: Digest,
        size: u64,
    },
    Link(Vec<u8>),
    Fifo,
    Device {
        block: bool,
        rdev: u64,
    },
    Socket,
    /// Another name (hard link) of what is at this path, counted from the root of what is
    /// copied, or for a [`Target`] from its own. Only of what is taken together: no
    /// [`Source`] has it of a single entry.
    Same(Names),
}

/// Owner, permissions and times of an entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What can be asked without reading content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Folder,
    File,
    Link(Vec<u8>),
    Other,
}

/// Something files are copied from.
pub trait Source {
    /// What is at this path; links are not followed. The empty path is the root.
    fn kind(&self, path: &[Vec<u8>]) -> Option<Kind>;
    /// The names in a folder, in byte order, and whether each is a folder's.
    fn list(&self, path: &[Vec<u8>]) -> Vec<(Vec<u8>, bool)>;
    /// The names alone.
    fn names(&self, path: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let listed = self.list(path).into_iter();
        listed.map(|(name, _)| name).collect()
    }
    /// The same for all names of one file; `None`: it has no other name.
    fn inode(&self, _path: &[Vec<u8>]) -> Option<Inode> {
        None
    }
    /// Everything about an entry; reads a file's content if its digest isn't known.
    fn entry(&self, path: &[Vec<u8>]) -> Result<(Meta, Shape), FilesError>;
    /// The same of many, in their order.
    fn entries(&self, paths: &[Names]) -> Result<Vec<(Meta, Shape)>, FilesError> {
        paths.iter().map(|path| self.entry(path)).collect()
    }
}

/// Something files are copied into.
pub trait Target: Source {
    /// Puts an entry into an existing folder in place of what is there, if anything; a
    /// folder over a folder changes its metadata only. Of [`Shape::Same`], `meta` means
    /// nothing.
    fn put(&mut self, path: &[Vec<u8>], meta: Meta, shape: Shape) -> Result<(), FilesError>;
    /// The content of a small file, links followed; `None` if there is none.
    fn read(&self, path: &[Vec<u8>], limit: u64) -> Result<Option<Vec<u8>>, FilesError>;
}

/// Why files can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("can't read {path}")]
    Read {
        path: String,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("can't write {path}")]
    Write {
        path: String,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{0} is a device, which can't be copied from a build context")]
    Device(String),
    #[error("{0}: not found")]
    NotFound(String),
    #[error("{0} is not a folder")]
    NotAFolder(String),
    #[error("{0} is a folder, a file can't take its place")]
    IsAFolder(String),
    #[error("{0}: more than {MAX_LINKS} links follow each other")]
    Loop(String),
}

/// For people: `/a/b`.
pub fn shown(path: &[Vec<u8>]) -> String {
    if path.is_empty() {
        return "/".into();
    }
    path.iter().fold(String::new(), |mut text, name| {
        text.push('/');
        text.push_str(&String::from_utf8_lossy(name));
        text
    })
}

/// Splits a path at `/` and takes `.` and `..` away, never above the root.
pub fn names(path: &[u8]) -> Names {
    let mut names = Names::new();
    for name in path.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop();
            }
            name => names.push(name.to_vec()),
        }
    }
    names
}

/// Follows the links on the way to `path`, within the source; the last name's link too if
/// `last`. What doesn't exist is taken as it stands.
pub fn resolve(
    source: &(impl Source + ?Sized),
    path: &[Vec<u8>],
    last: bool,
) -> Result<Names, FilesError> {
    resolve_below(source, &[], path, last)
}

/// The same of a path below the folder `base`, which is the root to what is in it: absolute
/// links lead there. With `..` links still lead out of it.
pub fn resolve_below(
    source: &(impl Source + ?Sized),
    base: &[Vec<u8>],
    path: &[Vec<u8>],
    last: bool,
) -> Result<Names, FilesError> {
    let mut todo: Names = path.iter().rev().cloned().collect();
    let mut done = base.to_vec();
    let mut links = 0;
    while let Some(name) = todo.pop() {
        match name.as_slice() {
            b"" | b"." => continue,
            b".." => {
                done.pop();
                continue;
            }
            _ => done.push(name),
        }
        if todo.is_empty() && !last {
            break;
        }
        if let Some(Kind::Link(target)) = source.kind(&done) {
            links += 1;
            if links > MAX_LINKS {
                return Err(FilesError::Loop(shown(path)));
            }
            if target.starts_with(b"/") {
                done = base.to_vec();
            } else {
                done.pop();
            }
            todo.extend(target.rsplit(|b| *b == b'/').map(<[u8]>::to_vec));
        }
    }
    Ok(done)
}

/// Adds an entry to a digest, without doubt where one part ends.
pub fn hash_entry(hasher: &mut Hasher, path: &[Vec<u8>], meta: &Meta, shape: &Shape) {
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(&path.join(&b'/'));
    for number in [
        u64::from(meta.mode),
        u64::from(meta.uid),
        u64::from(meta.gid),
        meta.mtime as u64,
        meta.xattrs.len() as u64,
    ] {
        field(&number.to_le_bytes());
    }
    for (name, value) in &meta.xattrs {
        field(name);
        field(value);
    }
    match shape {
        Shape::Folder => field(b"folder"),
        Shape::File { digest, .. } => {
            field(b"file");
            field(digest.as_bytes());
        }
        Shape::Link(target) => {
            field(b"link");
            field(target);
        }
        Shape::Same(first) => {
            field(b"same");
            field(&first.join(&b'/'));
        }
        Shape::Fifo => field(b"fifo"),
        Shape::Socket => field(b"socket"),
        Shape::Device { block, rdev } => {
            field(if *block { b"block" } else { b"char" });
            field(&rdev.to_le_bytes());
        }
    }
}

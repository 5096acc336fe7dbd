//! The build context: a folder of the host seen through its ignore file, read with as
//! few file reads as possible.
//!
//! Invariants: nothing outside the folder is ever read (links are followed within it
//! only, by [`crate::copy`]); a file's content is read once and hashed only if its size,
//! times or inode changed since the last build ([`stat_cache`]).
//!
//! What must not enter: knowledge of instructions.

pub mod changes;
pub mod glob;
pub mod ignore;
mod scan;
pub mod source;
pub mod stat_cache;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ignore::{MAX_IGNORE_FILE, Patterns, Seen};
use scan::Scan;
use stat_cache::Stamp;

/// A context's greatest number of entries.
pub const MAX_ENTRIES: usize = 2_000_000;

/// A context's greatest depth: it bounds the stack.
pub const MAX_DEPTH: usize = 256;

/// Why a context can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    #[error("can't read {path} of the build context")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("the build context {0} is not a folder")]
    NotAFolder(PathBuf),
    #[error("{path}: {cause}")]
    Ignore {
        path: PathBuf,
        cause: glob::BadPattern,
    },
    #[error("{0} has more than {MAX_IGNORE_FILE} bytes")]
    IgnoreTooLong(PathBuf),
    #[error(
        "the build context {0} has more than {MAX_ENTRIES} entries; ignore what is not needed in .dockerignore"
    )]
    TooMany(PathBuf),
    #[error("{0}: more than {MAX_DEPTH} folders within each other")]
    TooDeep(PathBuf),
}

/// One entry of a context folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    pub kind: EntryKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    Folder(BTreeMap<Vec<u8>, Entry>),
    File {
        size: u64,
        stamp: Stamp,
        /// It has other names (hard links), here or elsewhere.
        linked: bool,
    },
    Link(Vec<u8>),
    Fifo,
    /// A device: can't be copied.
    Device,
}

/// A scanned folder: metadata only, no content read yet.
#[derive(Clone, Debug)]
pub struct Context {
    folder: PathBuf,
    root: Entry,
}

impl Context {
    /// Scans `folder` without what `patterns` leave out.
    pub fn scan(folder: &Path, patterns: &Patterns) -> Result<Self, ContextError> {
        let read = |cause| ContextError::Read {
            path: folder.to_owned(),
            cause,
        };
        let meta = fs::metadata(folder).map_err(read)?;
        if !meta.is_dir() {
            return Err(ContextError::NotAFolder(folder.to_owned()));
        }
        let leave_out = |path: &str, parent: &Seen| patterns.leave_out(path, parent);
        let scan = Scan::new(folder, &leave_out, patterns.takes_back());
        Ok(Self {
            folder: folder.to_owned(),
            root: Entry {
                mode: meta.mode() & 0o7777,
                kind: EntryKind::Folder(scan.folder()?),
            },
        })
    }

    pub fn root(&self) -> &Entry {
        &self.root
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The entry at the path of these names; links are not followed.
    pub fn entry(&self, path: &[Vec<u8>]) -> Option<&Entry> {
        path.iter()
            .try_fold(&self.root, |entry, name| match &entry.kind {
                EntryKind::Folder(entries) => entries.get(name),
                _ => None,
            })
    }

    /// Where the entry lies on the host.
    pub fn host_path(&self, path: &[Vec<u8>]) -> PathBuf {
        let mut host = self.folder.clone();
        host.extend(path.iter().map(|name| OsStr::from_bytes(name)));
        host
    }
}

/// What kiln itself writes beside compose.yaml: a build that took it in would be another one
/// the next time. An ignore file may take it back.
const OWN: &str = "**/kiln.lock\n**/kiln.lock.d\n";

/// The same, where no ignore file is asked: is it what kiln itself writes?
pub(crate) fn is_own(path: &str) -> bool {
    let own = |name| matches!(name, "kiln.lock" | "kiln.lock.d");
    path.split('/').any(own)
}

/// Opens what a build reads as a whole. Whoever wrote the context may have put a fifo there,
/// which would be waited for without end.
pub(crate) fn open_plain(path: &Path) -> io::Result<fs::File> {
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no plain file")),
    }
}

/// Reads the ignore file that goes with a Containerfile: `<file>.dockerignore` beside it
/// wins over `.dockerignore` in the context; the podman names are known too.
pub fn read_ignore(folder: &Path, containerfile: Option<&Path>) -> Result<Patterns, ContextError> {
    let beside = containerfile.into_iter().flat_map(|file| {
        ["dockerignore", "containerignore"].map(|end| {
            let mut name = file.as_os_str().to_owned();
            name.push(".");
            name.push(end);
            PathBuf::from(name)
        })
    });
    let within = [".dockerignore", ".containerignore"].map(|name| folder.join(name));
    for path in beside.chain(within) {
        let read = |cause| ContextError::Read {
            path: path.clone(),
            cause,
        };
        let file = match open_plain(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            file => file.map_err(read)?,
        };
        let mut text = Vec::new();
        let bounded = &mut file.take(MAX_IGNORE_FILE + 1);
        bounded.read_to_end(&mut text).map_err(read)?;
        if text.len() as u64 > MAX_IGNORE_FILE {
            return Err(ContextError::IgnoreTooLong(path));
        }
        let text = String::from_utf8_lossy(&text);
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        return Patterns::parse_file(&format!("{OWN}{text}"))
            .map_err(|cause| ContextError::Ignore { path, cause });
    }
    let own = Patterns::parse_file(OWN);
    own.map_err(|cause| ContextError::Ignore {
        path: folder.to_owned(),
        cause,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn paths(entry: &Entry, at: &str, out: &mut Vec<String>) {
        if let EntryKind::Folder(entries) = &entry.kind {
            for (name, entry) in entries {
                let path = format!("{at}/{}", String::from_utf8_lossy(name));
                out.push(path.clone());
                paths(entry, &path, out);
            }
        }
    }

    #[test]
    fn a_fifo_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".dockerignore");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            0o644.into(),
            0,
        )
        .unwrap();
        let told = read_ignore(folder.path(), None).err().unwrap();
        assert!(matches!(told, ContextError::Read { .. }), "{told}");
        fs::remove_file(&path).unwrap();
        let file = fs::File::create(&path).unwrap();
        file.set_len(MAX_IGNORE_FILE + 1).unwrap();
        let told = read_ignore(folder.path(), None).err().unwrap();
        assert!(matches!(told, ContextError::IgnoreTooLong(_)), "{told}");
    }

    #[test]
    fn what_is_ignored_is_not_seen_except_when_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let own = ["kiln.lock", "b/kiln.lock", "kiln.lock.d/aa"];
        for path in ["a/x", "a/deep/keep", "b/y", "c.log"].iter().chain(&own) {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        std::os::unix::fs::symlink("../../etc", folder.path().join("b/out")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("sock")).unwrap();
        // Without any ignore file, too.
        let patterns = read_ignore(folder.path(), None).unwrap();
        let context = Context::scan(folder.path(), &patterns).unwrap();
        let mut found = Vec::new();
        paths(context.root(), "", &mut found);
        assert!(found.contains(&"/c.log".to_owned()));
        assert!(
            !found.iter().any(|path| path.contains("kiln.lock")),
            "{found:?}"
        );

        fs::write(
            folder.path().join(".dockerignore"),
            "a\n!a/deep\n*.log\n.dockerignore",
        )
        .unwrap();
        let patterns = read_ignore(folder.path(), None).unwrap();
        let context = Context::scan(folder.path(), &patterns).unwrap();
        let mut found = Vec::new();
        paths(context.root(), "", &mut found);
        assert_eq!(
            found,
            ["/a", "/a/deep", "/a/deep/keep", "/b", "/b/out", "/b/y"]
        );

        let file = folder.path().join("web.Containerfile");
        fs::write(
            folder.path().join("web.Containerfile.dockerignore"),
            "b\n*ignore\n!kiln.lock\n",
        )
        .unwrap();
        let patterns = read_ignore(folder.path(), Some(&file)).unwrap();
        let context = Context::scan(folder.path(), &patterns).unwrap();
        let mut found = Vec::new();
        paths(context.root(), "", &mut found);
        assert!(found.contains(&"/c.log".to_owned()) && !found.contains(&"/b".to_owned()));
        assert!(found.contains(&"/kiln.lock".to_owned()), "who wants it");
    }
}

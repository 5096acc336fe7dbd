//! Files that are not yet in their place.
//!
//! They have no name until they get the right one, so that a crash leaves nothing of them:
//! `O_TMPFILE` of open(2). They are made in the objects' folders in turn, which lie apart
//! ([`lay_apart`](crate::lay_apart)). Where the file system has no nameless files, and for what replaces
//! another, they are in a folder of this handle's own.
//!
//! Invariant: a name is only given to a complete file, and never taken from another one of
//! the right size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, openat, renameat_with};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::layout::{PathError, at, entries, locked, remove_file, try_lock};
use crate::store::{PutError, Store, allocated, copy, file_size, open};

/// Nobody may change content; root may read it all.
pub(crate) const READ_ONLY: u32 = 0o444;

/// What a handle makes its files with.
#[derive(Debug, Default)]
pub(crate) struct Making {
    /// Made when it is needed.
    session: Mutex<Option<Session>>,
    counter: AtomicU64,
    /// The file system has no files without a name.
    named: AtomicBool,
}

/// This handle's own folder for unfinished files. The lock on it says that somebody
/// still works there; a dead process's folder is removed by `gc`.
#[derive(Debug)]
struct Session {
    folder: TempDir,
    _lock: File,
}

/// A file not yet in its place, while it is written.
pub(crate) struct Unfinished {
    pub(crate) file: File,
    /// `None`: it has no name.
    path: Option<OwnName>,
}

/// The same when it is written.
pub(crate) enum Waiting {
    /// It has no name, or others that will not be used: see [`Batch::adopt`].
    ///
    /// [`Batch::adopt`]: crate::Batch::adopt
    Nameless(File),
    /// It is closed.
    Named(OwnName),
}

/// A name in the session's folder; removed when dropped there.
pub(crate) struct OwnName {
    path: PathBuf,
    /// It has got its place.
    moved: bool,
}

impl Unfinished {
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), PathError> {
        let written = self.file.write_all(bytes);
        written.map_err(at("write", self.path()))
    }

    /// For errors.
    pub(crate) fn path(&self) -> &Path {
        let own = self.path.as_ref();
        own.map_or(Path::new("a file of the store"), |own| &own.path)
    }

    pub(crate) fn written(self) -> Waiting {
        match self.path {
            None => Waiting::Nameless(self.file),
            Some(own) => Waiting::Named(own),
        }
    }
}

impl Drop for OwnName {
    fn drop(&mut self) {
        if !self.moved {
            // Where that fails, gc removes it with its session.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl OwnName {
    /// Takes the place of what is there.
    fn replace(mut self, path: &Path) -> Result<(), PathError> {
        fs::rename(&self.path, path).map_err(at("write", path))?;
        self.moved = true;
        Ok(())
    }
}

impl Store {
    /// A new file.
    pub(crate) fn unfinished(&self) -> Result<Unfinished, PathError> {
        if self.making.named.load(Ordering::Relaxed) {
            return self.named();
        }
        let turn = self.making.counter.fetch_add(1, Ordering::Relaxed) as u8;
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let folder = format!("{turn:02x}");
        let objects = self.layout.objects()?;
        match openat(objects, &folder, flags, Mode::from_raw_mode(READ_ONLY)) {
            Ok(file) => Ok(Unfinished {
                file: file.into(),
                path: None,
            }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                self.making.named.store(true, Ordering::Relaxed);
                self.named()
            }
            Err(error) => {
                let path = self.layout.sub("objects").join(folder);
                Err(at("make a file in", &path)(error.into()))
            }
        }
    }

    /// A new file in this handle's own folder.
    fn named(&self) -> Result<Unfinished, PathError> {
        let path = self.own_name()?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(READ_ONLY)
            .open(&path)
            .map_err(at("make", &path))?;
        let moved = false;
        let path = Some(OwnName { path, moved });
        Ok(Unfinished { file, path })
    }

    fn own_name(&self) -> Result<PathBuf, PathError> {
        let number = self.making.counter.fetch_add(1, Ordering::Relaxed);
        Ok(self.session_folder()?.join(number.to_string()))
    }

    /// Gives a finished file a place where nothing of its size is yet.
    pub(crate) fn put_in_place(
        &self,
        waiting: Waiting,
        path: &Path,
        size: u64,
    ) -> Result<(), PathError> {
        let placed = match &waiting {
            Waiting::Nameless(file) => link(file, path),
            Waiting::Named(own) => renameat_with(CWD, &own.path, CWD, path, RenameFlags::NOREPLACE),
        };
        match (placed, waiting) {
            (Ok(()), Waiting::Nameless(_)) => Ok(()),
            (Ok(()), Waiting::Named(mut own)) => {
                own.moved = true;
                Ok(())
            }
            (Err(Errno::EXIST), _) if file_size(path)? == Some(size) => Ok(()),
            // A file of another size is what a power cut left: replaced.
            (Err(Errno::EXIST), Waiting::Nameless(file)) => {
                let own = self.own_name()?;
                link(&file, &own).map_err(|error| at("write", &own)(error.into()))?;
                let moved = false;
                OwnName { path: own, moved }.replace(path)
            }
            (Err(Errno::XDEV), Waiting::Nameless(mut file)) => {
                let read = |error| at("copy into", path)(error);
                file.rewind().map_err(read)?;
                let mut copied = self.unfinished()?;
                match copy(&mut file, &mut copied) {
                    Ok(_) => self.put_in_place(copied.written(), path, size),
                    Err(PutError::Source(error)) => Err(read(error)),
                    Err(PutError::Store(error)) => Err(error),
                }
            }
            // Not every file system knows of NOREPLACE.
            (Err(Errno::EXIST | Errno::INVAL), Waiting::Named(own)) => own.replace(path),
            (Err(error), _) => Err(at("write", path)(error.into())),
        }
    }

    /// Replaces a small file atomically and durably. For records, which promise that
    /// what they name is there.
    pub(crate) fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), PathError> {
        let mut unfinished = self.named()?;
        unfinished.write(bytes)?;
        let synced = unfinished.file.sync_all();
        synced.map_err(at("write", unfinished.path()))?;
        if let Some(own) = unfinished.path {
            own.replace(path)?;
        }
        let folder = path.parent().unwrap_or(&self.layout.root);
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(at("sync", folder))
    }

    fn session_folder(&self) -> Result<PathBuf, PathError> {
        let mut session = locked(&self.making.session);
        if let Some(session) = &*session {
            return Ok(session.folder.path().into());
        }
        let tmp = self.layout.sub("tmp");
        // So that gc does not take it before it is locked.
        let _lock = self.layout.publishing()?;
        let folder = TempDir::with_prefix_in("session-", &tmp).map_err(at("write into", &tmp))?;
        let lock = File::open(folder.path()).map_err(at("open", folder.path()))?;
        try_lock(&lock).map_err(at("lock", folder.path()))?;
        let path = folder.path().into();
        *session = Some(Session {
            folder,
            _lock: lock,
        });
        Ok(path)
    }

    /// Removes the unfinished files of processes that are gone. Needs the lock for
    /// removing.
    pub(crate) fn clean_sessions(&self) -> Result<u64, PathError> {
        let mut bytes = 0;
        for (_, folder) in entries(&self.layout.sub("tmp"))? {
            bytes += clean_session(&folder)?;
        }
        Ok(bytes)
    }
}

/// Removes a session's folder if its owner is gone; says how many bytes.
fn clean_session(folder: &Path) -> Result<u64, PathError> {
    let Some(lock) = open(folder)? else {
        return Ok(0);
    };
    if !try_lock(&lock).map_err(at("lock", folder))? {
        return Ok(0);
    }
    let files = match entries(folder) {
        Ok(files) => files,
        // Its owner has just removed it.
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut bytes = 0;
    for (_, path) in files {
        bytes += allocated(&path)?.unwrap_or(0);
        remove_file(&path)?;
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove", folder)(error)),
        _ => Ok(bytes),
    }
}

/// open(2), `O_TMPFILE`: how a file without a name gets one.
fn link(file: &File, path: &Path) -> Result<(), Errno> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::layout::Shelf;

    /// A store, with files that have no name before they have the right one, or that have.
    fn store(root: &Path, named: bool) -> Store {
        let store = Store::open(root).unwrap();
        store.making.named.store(named, Ordering::Relaxed);
        store
    }

    fn files_in(folder: &Path) -> usize {
        let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
        let each = entries.map(|entry| match entry.path().is_dir() {
            true => files_in(&entry.path()),
            false => 1,
        });
        each.sum()
    }

    #[test]
    fn an_unfinished_file_has_no_name_unless_the_disk_knows_no_such_files() {
        for (named, names) in [(false, 0), (true, 1)] {
            let root = tempfile::tempdir().unwrap();
            let store = store(root.path(), named);
            let mut unfinished = store.unfinished().unwrap();
            unfinished.write(b"x").unwrap();
            assert_eq!(files_in(&root.path().join("store/tmp")), names);
            assert_eq!(files_in(&root.path().join("store/objects")), 0);
            drop(unfinished);
            assert_eq!(files_in(&root.path().join("store/tmp")), 0);
        }
    }

    #[test]
    fn content_of_the_right_size_stays_and_what_a_power_cut_left_is_replaced() {
        for named in [false, true] {
            let root = tempfile::tempdir().unwrap();
            let store = store(root.path(), named);
            let digest = kiln_model::Digest::of("content");
            let path = store.layout.path(Shelf::Objects, &digest);
            for (before, after) in [("", "content"), ("ontentc", "ontentc")] {
                fs::write(&path, before).unwrap();
                let mut unfinished = store.unfinished().unwrap();
                unfinished.write(b"content").unwrap();
                let written = unfinished.written();
                store.put_in_place(written, &path, 7).unwrap();
                assert_eq!(fs::read(&path).unwrap(), after.as_bytes());
                assert_eq!(files_in(&root.path().join("store/tmp")), 0);
                fs::remove_file(&path).unwrap();
            }
        }
    }
}

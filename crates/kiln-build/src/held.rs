//! Folders below `cache/run` that a living process holds, for what a RUN leaves outside of
//! its own process: an instance, a bridge. The lock on a folder goes with the process,
//! however it ends; whoever finds a folder unlocked takes away what it stands for.
//!
//! What holds thousands of files for a short while is made in one of some folders in turn that
//! lie apart ([`kiln_store::lay_apart`]), so that each does not wait for what the one before
//! has removed.

use std::fs::{self, DirEntry, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_store::lay_apart;
use rustix::fs::{FlockOperation, flock};

/// How many lie apart: as long as an inode rests there are not more RUNs.
const APART: usize = 16;
/// Before the number of one of them.
const APART_PREFIX: &str = "apart-";
/// Whose turn it is.
static TURN: AtomicUsize = AtomicUsize::new(0);

/// Such a folder; removed when dropped.
pub struct Held {
    path: PathBuf,
    _lock: File,
}

impl Held {
    /// A new folder, named `prefix` and six letters and digits.
    pub fn new(scratch: &Path, prefix: &str) -> io::Result<Self> {
        Self::within(scratch, scratch, prefix)
    }

    /// The same for thousands of files.
    pub fn apart(scratch: &Path, prefix: &str) -> io::Result<Self> {
        let name = |turn: usize| format!("{APART_PREFIX}{}", turn % APART);
        let first = scratch.join(name(0));
        if !first.exists() {
            lay_apart(scratch);
            // The first is there when all are.
            for turn in (0..APART).rev() {
                fs::create_dir_all(scratch.join(name(turn)))?;
            }
        }
        // Other processes begin elsewhere.
        let turn = TURN.fetch_add(1, Ordering::Relaxed);
        let turn = turn.wrapping_add(std::process::id() as usize);
        Self::within(scratch, &scratch.join(name(turn)), prefix)
    }

    fn within(scratch: &Path, folder: &Path, prefix: &str) -> io::Result<Self> {
        // So that it is found either not at all or locked.
        let making = File::open(scratch)?;
        flock(&making, FlockOperation::LockShared)?;
        let path = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(folder)?
            .keep();
        let lock = File::open(&path)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { path, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets go of it without removing it.
    pub fn leave(mut self) {
        self.path = PathBuf::new();
    }

    pub fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        if let Err(cause) = fs::remove_dir_all(&self.path) {
            let path = self.path.display();
            tracing::warn!(%path, %cause, "a build's folder can't be removed");
        }
    }
}

/// The folders with one of these prefixes whose processes are gone: the caller's now.
pub fn abandoned(scratch: &Path, prefixes: &[&str]) -> io::Result<Vec<Held>> {
    let making = File::open(scratch)?;
    flock(&making, FlockOperation::LockExclusive)?;
    let mut found = Vec::new();
    let mut entries = fs::read_dir(scratch)?.collect::<io::Result<Vec<_>>>()?;
    let is_apart = |entry: &DirEntry| {
        let name = entry.file_name();
        name.as_encoded_bytes().starts_with(APART_PREFIX.as_bytes())
    };
    let apart: Vec<PathBuf> = entries
        .iter()
        .filter(|entry| is_apart(entry))
        .map(DirEntry::path)
        .collect();
    for folder in apart {
        entries.extend(fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?);
    }
    for entry in entries {
        let name = entry.file_name();
        let ours = prefixes
            .iter()
            .any(|p| name.as_encoded_bytes().starts_with(p.as_bytes()));
        if !ours || !entry.file_type()?.is_dir() {
            continue;
        }
        // Its holder may be removing it right now.
        let Ok(lock) = File::open(entry.path()) else {
            continue;
        };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let path = entry.path();
            found.push(Held { path, _lock: lock });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_apart_takes_turns_and_is_found_when_it_is_abandoned() {
        let scratch = tempfile::tempdir().unwrap();
        let held = [0; 3].map(|_| Held::apart(scratch.path(), "x-").unwrap());
        let folders = held.each_ref().map(|one| one.path().parent().unwrap());
        assert!(folders[0] != folders[1] && folders[1] != folders[2]);
        assert!(folders.iter().all(|f| f.parent() == Some(scratch.path())));
        assert!(abandoned(scratch.path(), &["x-"]).unwrap().is_empty());
        flock(&held[1]._lock, FlockOperation::Unlock).unwrap();
        let found = abandoned(scratch.path(), &["x-"]).unwrap();
        let paths: Vec<&Path> = found.iter().map(Held::path).collect();
        assert_eq!(paths, [held[1].path()]);
    }

    #[test]
    fn only_what_nobody_holds_is_abandoned() {
        let scratch = tempfile::tempdir().unwrap();
        let living = Held::new(scratch.path(), "x-").unwrap();
        let dead = Held::new(scratch.path(), "x-").unwrap();
        // As after a SIGKILL: the folder stays, the lock does not.
        let path = dead.path().to_owned();
        flock(&dead._lock, FlockOperation::Unlock).unwrap();
        std::mem::forget(dead);
        fs::create_dir(scratch.path().join("other")).unwrap();
        let found = abandoned(scratch.path(), &["y-", "x-"]).unwrap();
        let paths: Vec<&Path> = found.iter().map(Held::path).collect();
        assert_eq!(paths, [path.as_path()]);
        found.into_iter().for_each(Held::leave);
        let found = abandoned(scratch.path(), &["x-"]).unwrap();
        assert_eq!(found.len(), 1, "what is left is found again");
        drop(found);
        assert!(!path.exists() && living.path().exists());
        drop(living);
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    }
}

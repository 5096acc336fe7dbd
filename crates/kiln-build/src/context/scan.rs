//! Going through a context's folders: several at a time, as it is system calls, mostly.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::ignore::Seen;
use super::stat_cache::Stamp;
use super::{ContextError, Entry, EntryKind, MAX_DEPTH, MAX_ENTRIES};

/// Folders that are gone through at the same time.
const MAX_THREADS: usize = 4;

/// Says whether an entry is left out, from its relative path and what the same question
/// about its folder gave.
type LeaveOut<'a> = dyn Fn(&str, &Seen) -> (bool, Seen) + Sync + 'a;

type Entries = BTreeMap<Vec<u8>, Entry>;

/// See the module.
pub(super) struct Scan<'a> {
    root: &'a Path,
    leave_out: &'a LeaveOut<'a>,
    /// Folders that are left out are looked into all the same.
    deep: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Folders that were found, each after the one it is in.
    folders: Vec<Folder>,
    /// Those that are still to be gone through.
    todo: Vec<Todo>,
    running: usize,
    entries: usize,
    failed: Option<ContextError>,
}

struct Folder {
    parent: usize,
    name: Vec<u8>,
    mode: u32,
    /// It is there for what is in it, if that is anything.
    out: bool,
    entries: Entries,
}

struct Todo {
    /// Its place among the folders.
    at: usize,
    depth: usize,
    host: PathBuf,
    /// Relative to the root.
    path: String,
    seen: Seen,
}

/// A folder within another, and what is to be done about it.
struct Within {
    folder: Folder,
    todo: Todo,
}

impl<'a> Scan<'a> {
    pub(super) fn new(root: &'a Path, leave_out: &'a LeaveOut<'a>, deep: bool) -> Self {
        Self {
            root,
            leave_out,
            deep,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// What is in the root.
    pub(super) fn folder(self) -> Result<Entries, ContextError> {
        let root = Within {
            folder: Folder {
                parent: 0,
                name: Vec::new(),
                mode: 0,
                out: false,
                entries: Entries::new(),
            },
            todo: Todo {
                at: 0,
                depth: 0,
                host: self.root.to_owned(),
                path: String::new(),
                seen: Seen::default(),
            },
        };
        self.state().add(vec![root]);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 1..processors.min(MAX_THREADS) {
                scope.spawn(|| self.work());
            }
            self.work();
        });
        let state = self.state.into_inner();
        let state = state.unwrap_or_else(PoisonError::into_inner);
        match state.failed {
            Some(error) => Err(error),
            None => Ok(assembled(state.folders)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One thread: takes folders until there are none.
    fn work(&self) {
        let mut state = self.state();
        loop {
            if state.failed.is_some() {
                return;
            }
            let Some(todo) = state.todo.pop() else {
                if state.running == 0 {
                    return;
                }
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.running += 1;
            drop(state);
            let found = self.list(&todo);
            state = self.state();
            state.running -= 1;
            match found {
                Ok((entries, within)) => {
                    state.entries += entries.len() + within.len();
                    state.folders[todo.at].entries = entries;
                    state.add(within);
                    if state.entries > MAX_ENTRIES {
                        state.failed = Some(ContextError::TooMany(self.root.to_owned()));
                    }
                }
                Err(error) => state.failed = Some(error),
            }
            self.changed.notify_all();
        }
    }

    /// What is in one folder; folders for themselves.
    fn list(&self, folder: &Todo) -> Result<(Entries, Vec<Within>), ContextError> {
        if folder.depth > MAX_DEPTH {
            return Err(ContextError::TooDeep(folder.host.clone()));
        }
        let fail = |path: &Path, cause| ContextError::Read {
            path: path.to_owned(),
            cause,
        };
        let (mut entries, mut within) = (Entries::new(), Vec::new());
        for item in fs::read_dir(&folder.host).map_err(|e| fail(&folder.host, e))? {
            let item = item.map_err(|e| fail(&folder.host, e))?;
            let name = item.file_name();
            let shown = name.to_string_lossy();
            let path = match folder.path.as_str() {
                "" => shown.into_owned(),
                parent => [parent, "/", &shown].concat(),
            };
            let (out, seen) = (self.leave_out)(&path, &folder.seen);
            if out && !self.deep {
                continue;
            }
            let meta = match item.metadata() {
                Ok(meta) => meta,
                // It went away since the folder was listed.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(fail(&item.path(), e)),
            };
            let name = name.as_bytes().to_vec();
            if meta.is_dir() {
                within.push(Within {
                    folder: Folder {
                        parent: folder.at,
                        name,
                        mode: meta.mode() & 0o7777,
                        out,
                        entries: Entries::new(),
                    },
                    todo: Todo {
                        at: 0,
                        depth: folder.depth + 1,
                        host: item.path(),
                        path,
                        seen,
                    },
                });
            } else if !out && let Some(entry) = leaf(&|| item.path(), &meta)? {
                entries.insert(name, entry);
            }
        }
        Ok((entries, within))
    }
}

impl State {
    fn add(&mut self, found: Vec<Within>) {
        for Within { folder, mut todo } in found {
            todo.at = self.folders.len();
            self.folders.push(folder);
            self.todo.push(todo);
        }
    }
}

/// Puts every folder into the one it is in, the last first; gives what is in the root.
fn assembled(mut folders: Vec<Folder>) -> Entries {
    while let Some(folder) = folders.pop() {
        let Some(parent) = folders.get_mut(folder.parent) else {
            return folder.entries;
        };
        if folder.out && folder.entries.is_empty() {
            continue;
        }
        let entry = Entry {
            mode: folder.mode,
            kind: EntryKind::Folder(folder.entries),
        };
        parent.entries.insert(folder.name, entry);
    }
    Entries::new()
}

/// What is no folder; `None`: it means nothing in a context.
pub(super) fn leaf(
    host: &dyn Fn() -> PathBuf,
    meta: &fs::Metadata,
) -> Result<Option<Entry>, ContextError> {
    let kind = meta.file_type();
    let kind = if kind.is_file() {
        EntryKind::File {
            size: meta.len(),
            stamp: Stamp::of(meta),
            linked: meta.nlink() > 1,
        }
    } else if kind.is_symlink() {
        let host = host();
        let target = fs::read_link(&host);
        let target = target.map_err(|cause| ContextError::Read { path: host, cause })?;
        EntryKind::Link(target.as_os_str().as_bytes().to_vec())
    } else if kind.is_fifo() {
        EntryKind::Fifo
    } else if kind.is_socket() {
        // As docker does: a socket means nothing without its process.
        return Ok(None);
    } else {
        EntryKind::Device
    };
    Ok(Some(Entry {
        mode: meta.mode() & 0o7777,
        kind,
    }))
}

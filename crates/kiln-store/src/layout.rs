//! Where everything lies under the store's folder, and the lock and session files that
//! let many processes share it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kiln_model::Digest;
use rustix::fs::{AtFlags, FlockOperation, IFlags, flock, ioctl_getflags, ioctl_setflags, statat};

/// Version of the folder as a whole; see the crate's documentation.
pub(crate) const FORMAT: &str = "kiln-store 1\n";
/// Longest wait for another process's publishing or collecting.
const LOCK_WAIT: Duration = Duration::from_secs(60);
const LOCK_POLL: Duration = Duration::from_millis(2);

/// A failed operation on one path.
#[derive(Debug, thiserror::Error)]
#[error("could not {action} {}: {source}", path.display())]
pub struct PathError {
    pub action: &'static str,
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

/// For `map_err`.
pub(crate) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PathError {
    move |source| PathError {
        action,
        path: path.into(),
        source,
    }
}

/// What is addressed by content. The letter names it in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Shelf {
    Objects,
    Blobs,
    Trees,
    Images,
}

impl Shelf {
    pub(crate) const ALL: [Shelf; 4] = [Self::Objects, Self::Blobs, Self::Trees, Self::Images];

    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Objects => "objects",
            Self::Blobs => "blobs",
            Self::Trees => "trees",
            Self::Images => "images",
        }
    }

    pub(crate) fn letter(self) -> u8 {
        match self {
            Self::Objects => b'o',
            Self::Blobs => b'b',
            Self::Trees => b't',
            Self::Images => b'i',
        }
    }

    /// Ending of the file names; `None`: spread over 256 folders instead.
    fn ending(self) -> Option<&'static str> {
        match self {
            Self::Objects | Self::Blobs => None,
            Self::Trees => Some("erofs"),
            Self::Images => Some("json"),
        }
    }
}

/// The store's folder, and the files in it that are kept open because every
/// publication needs them.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) root: PathBuf,
    /// Handles of `lock` that nobody holds. One for each concurrent holder, because a
    /// lock belongs to the handle.
    idle_locks: Mutex<Vec<File>>,
    journal: OnceLock<File>,
    /// The objects' folder: thousands of them are looked at, each by a short way.
    objects: OnceLock<File>,
}

/// The store's lock, while held.
pub(crate) struct Held<'a> {
    layout: &'a Layout,
    file: Option<File>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let Some(file) = self.file.take() else {
            return;
        };
        // A handle that can't be unlocked is closed, which unlocks it.
        if flock(&file, FlockOperation::Unlock).is_ok() {
            locked(&self.layout.idle_locks).push(file);
        }
    }
}

impl Layout {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self {
            root,
            idle_locks: Mutex::new(Vec::new()),
            journal: OnceLock::new(),
            objects: OnceLock::new(),
        }
    }

    /// An object's size; `None`: it is not there.
    pub(crate) fn object_size(&self, digest: &Digest) -> Result<Option<u64>, PathError> {
        let mut name = digest.hex();
        name.insert(2, '/');
        match statat(self.objects()?, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat.st_size.cast_unsigned())),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(at("look at", &self.path(Shelf::Objects, digest))(
                error.into(),
            )),
        }
    }

    pub(crate) fn objects(&self) -> Result<&File, PathError> {
        if let Some(folder) = self.objects.get() {
            return Ok(folder);
        }
        let path = self.folder(Shelf::Objects);
        let folder = File::open(&path).map_err(at("open", &path))?;
        Ok(self.objects.get_or_init(|| folder))
    }

    /// The journal, for appending.
    pub(crate) fn journal(&self) -> Result<&File, PathError> {
        if let Some(journal) = self.journal.get() {
            return Ok(journal);
        }
        let path = self.sub("journal");
        let journal = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(at("open", &path))?;
        Ok(self.journal.get_or_init(|| journal))
    }

    pub(crate) fn folder(&self, shelf: Shelf) -> PathBuf {
        self.root.join(shelf.folder())
    }

    pub(crate) fn path(&self, shelf: Shelf, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        match shelf.ending() {
            None => self.folder(shelf).join(&hex[..2]).join(&hex[2..]),
            Some(ending) => self.folder(shelf).join(format!("{hex}.{ending}")),
        }
    }

    pub(crate) fn chain(&self, chain: &Digest) -> PathBuf {
        self.root.join("chains").join(chain.hex())
    }

    pub(crate) fn reference(&self, name: &str) -> PathBuf {
        self.root.join("refs").join(Digest::of(name).hex())
    }

    pub(crate) fn sub(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Every folder there must be.
    fn folders(&self) -> Vec<PathBuf> {
        let mut folders: Vec<PathBuf> = ["chains", "refs", "leases", "tmp", "quarantine"]
            .iter()
            .map(|name| self.sub(name))
            .collect();
        for shelf in Shelf::ALL {
            let folder = self.folder(shelf);
            folders.push(folder.clone());
            if shelf.ending().is_none() {
                folders.extend((0..=255u8).map(|n| folder.join(format!("{n:02x}"))));
            }
        }
        folders
    }

    /// Makes what is missing. Many processes may do so at once.
    pub(crate) fn create(&self) -> Result<(), PathError> {
        let mut builder = DirBuilder::new();
        // Images may hold what only root may read.
        builder.recursive(true).mode(0o700);
        for folder in self.folders() {
            builder.create(&folder).map_err(at("make", &folder))?;
            if folder == self.folder(Shelf::Objects) {
                lay_apart(&folder);
            }
        }
        Ok(())
    }

    /// Every digest on `shelf`, with its file. Files of other names are passed over.
    pub(crate) fn list(&self, shelf: Shelf) -> Result<Vec<(Digest, PathBuf)>, PathError> {
        let folder = self.folder(shelf);
        let mut found = Vec::new();
        match shelf.ending() {
            Some(ending) => {
                for (name, path) in entries(&folder)? {
                    let hex = name.strip_suffix(ending).and_then(|n| n.strip_suffix('.'));
                    if let Some(digest) = hex.and_then(|hex| Digest::from_hex(hex).ok()) {
                        found.push((digest, path));
                    }
                }
            }
            None => {
                for n in 0..=255u8 {
                    let two = format!("{n:02x}");
                    for (name, path) in entries(&folder.join(&two))? {
                        if let Ok(digest) = Digest::from_hex(&[two.as_str(), &name].concat()) {
                            found.push((digest, path));
                        }
                    }
                }
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Held by whoever puts something in its place: many at once, but none while
    /// something is taken away.
    pub(crate) fn publishing(&self) -> Result<Held<'_>, PathError> {
        self.lock(FlockOperation::NonBlockingLockShared)
    }

    /// Held by whoever takes something away.
    pub(crate) fn removing(&self) -> Result<Held<'_>, PathError> {
        self.lock(FlockOperation::NonBlockingLockExclusive)
    }

    fn lock(&self, how: FlockOperation) -> Result<Held<'_>, PathError> {
        let path = self.sub("lock");
        let idle = locked(&self.idle_locks).pop();
        let file = match idle {
            Some(file) => file,
            None => open_lock(&path)?,
        };
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            match flock(&file, how) {
                Ok(()) => {
                    return Ok(Held {
                        layout: self,
                        file: Some(file),
                    });
                }
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(LOCK_POLL);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(at("lock", &path)(error.into())),
            }
        }
    }
}

/// Asks the file system to lay the folders in this one apart from each other: `T` of
/// chattr(1). ext4 gives an inode out again only some minutes after it was freed, and until
/// then each new file beside them looks through all of them. A wish: other file systems
/// know nothing of it.
pub fn lay_apart(folder: &Path) {
    let _ = File::open(folder).map(|folder| {
        let flags = ioctl_getflags(&folder)?;
        ioctl_setflags(&folder, flags | IFlags::TOPDIR)
    });
}

/// What a panicking thread left in these is still good.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens a file that only serves for locking.
pub(crate) fn open_lock(path: &Path) -> Result<File, PathError> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(at("open", path))
}

/// Takes `file`'s lock if nobody has it.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The names in `folder`; names that are not UTF-8 are none of kiln's.
pub(crate) fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, PathError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(at("list", folder))? {
        let entry = entry.map_err(at("list", folder))?;
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

/// Removes a file; `false`: it was gone already.
pub(crate) fn remove_file(path: &Path) -> Result<bool, PathError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(at("remove", path)(error)),
    }
}

/// The content of a file that may not be there.
pub(crate) fn read_file(path: &Path) -> Result<Option<Vec<u8>>, PathError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("read", path)(error)),
    }
}

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_model::{Digest, Hasher};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::TempDir;

use crate::journal;
use crate::layout::{
    FORMAT, Layout, PathError, Shelf, at, entries, locked, read_file, remove_file, try_lock,
};

/// Bytes copied at a time.
const PIECE: usize = 128 << 10;
/// Bytes that content is thought to have of which nobody has said it: most files are small.
const LIKELY: u64 = 8 << 10;

/// The store in one folder; see the crate. Any number of processes, and of these in one
/// process, may use a folder at once.
#[derive(Debug)]
pub struct Store {
    pub(crate) layout: Layout,
    /// Made at the first write.
    session: Mutex<Option<Session>>,
    counter: AtomicU64,
}

/// This handle's own folder for unfinished files. The lock on it says that somebody
/// still works there; a dead process's folder is removed by `gc`.
#[derive(Debug)]
struct Session {
    folder: TempDir,
    _lock: File,
}

/// Why the store can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(
        "{} is a store of another kind (`{found}`): use the kiln that made it, or a newer one",
        path.display()
    )]
    Format { path: PathBuf, found: String },
}

/// Why content could not be taken in; nothing of it is kept.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// Reading the source failed, not the store.
    #[error("the content could not be read: {0}")]
    Source(#[source] io::Error),
    #[error(transparent)]
    Store(#[from] PathError),
}

/// A file not yet in its place, while it is written.
pub(crate) struct Unfinished {
    pub(crate) file: File,
    pub(crate) at: Waiting,
}

/// The same when it is written and closed; removed when dropped there.
pub(crate) struct Waiting {
    pub(crate) path: PathBuf,
    /// It has got its place.
    moved: bool,
}

impl Unfinished {
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), PathError> {
        let Self { file, at: waiting } = self;
        file.write_all(bytes).map_err(at("write", &waiting.path))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if !self.moved {
            // Where that fails, gc removes it with its session.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Store {
    /// Opens the store in `<root>/store`, and makes it if there is none.
    pub fn open(root: &Path) -> Result<Self, OpenError> {
        let layout = Layout::new(root.join("store"));
        let version = layout.sub("version");
        match read_file(&version)? {
            Some(found) if found == FORMAT.as_bytes() => {}
            Some(found) => {
                return Err(OpenError::Format {
                    path: layout.root,
                    found: String::from_utf8_lossy(&found).trim().into(),
                });
            }
            None => {
                layout.create()?;
                let store = Self::on(layout);
                store.replace(&version, FORMAT.as_bytes())?;
                return Ok(store);
            }
        }
        Ok(Self::on(layout))
    }

    fn on(layout: Layout) -> Self {
        Self {
            layout,
            session: Mutex::new(None),
            counter: AtomicU64::new(0),
        }
    }

    /// The store's folder.
    pub fn path(&self) -> &Path {
        &self.layout.root
    }

    /// Takes file content in: its digest and size in bytes. Not yet durable: see
    /// [`Store::sync`]. Many at a time: [`Store::batch`].
    pub fn put_object(&self, content: &mut dyn Read) -> Result<(Digest, u64), PutError> {
        self.put_object_of(content, LIKELY)
    }

    /// The same of content that is thought to have so many bytes: see [`Batch::put`].
    pub fn put_object_of(
        &self,
        content: &mut dyn Read,
        likely: u64,
    ) -> Result<(Digest, u64), PutError> {
        let mut batch = self.batch();
        let put = batch.put(content, likely)?;
        batch.finish()?;
        Ok(put)
    }

    /// Whether the disk has room for so many bytes.
    pub(crate) fn have_room(&self, size: u64) -> Result<(), PathError> {
        let root = &self.layout.root;
        let space = rustix::fs::statvfs(root).map_err(|e| at("look at", root)(e.into()))?;
        let room = space.f_bavail.saturating_mul(space.f_frsize);
        if size <= room {
            return Ok(());
        }
        let what = format!("it would take {size} bytes, and there is room for {room}");
        Err(at("write to", root)(io::Error::new(
            io::ErrorKind::StorageFull,
            what,
        )))
    }

    /// Where an object's file is, whether it is there or not.
    pub fn object_path(&self, digest: &Digest) -> PathBuf {
        self.layout.path(Shelf::Objects, digest)
    }

    /// The file that holds a blob, whether it is there or not.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.layout.path(Shelf::Blobs, digest)
    }

    /// An object's size in bytes; `None`: there is no such object.
    pub fn object_size(&self, digest: &Digest) -> Result<Option<u64>, PathError> {
        self.layout.object_size(digest)
    }

    /// An object's content; `None`: there is no such object.
    pub fn open_object(&self, digest: &Digest) -> Result<Option<File>, PathError> {
        open(&self.object_path(digest))
    }

    /// Makes everything written so far durable (one `syncfs`).
    pub fn sync(&self) -> Result<(), PathError> {
        let root = &self.layout.root;
        let folder = File::open(root).map_err(at("open", root))?;
        rustix::fs::syncfs(&folder).map_err(|error| at("sync", root)(error.into()))
    }

    /// Puts bytes of a known digest in their place, if they are not there yet.
    pub(crate) fn put_bytes(
        &self,
        shelf: Shelf,
        digest: &Digest,
        bytes: &[u8],
    ) -> Result<(), PathError> {
        if self
            .reuse(shelf, digest, Some(bytes.len() as u64))?
            .is_some()
        {
            return Ok(());
        }
        let mut unfinished = self.unfinished()?;
        unfinished.write(bytes)?;
        self.publish(shelf, digest, bytes.len() as u64, unfinished)
    }

    /// If it is there, and of this size if that is given, keeps it from being collected
    /// under the leases of now, and says its size.
    pub(crate) fn reuse(
        &self,
        shelf: Shelf,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Option<u64>, PathError> {
        let size_of = || match shelf {
            Shelf::Objects => self.layout.object_size(digest),
            _ => file_size(&self.layout.path(shelf, digest)),
        };
        if size_of()?.is_none() {
            return Ok(None);
        }
        let _lock = self.layout.publishing()?;
        let found = size_of()?.filter(|found| size.is_none_or(|size| size == *found));
        if found.is_some() {
            journal::note(&self.layout, shelf, digest)?;
        }
        Ok(found)
    }

    /// Gives a finished file its place and name, atomically.
    pub(crate) fn publish(
        &self,
        shelf: Shelf,
        digest: &Digest,
        size: u64,
        unfinished: Unfinished,
    ) -> Result<(), PathError> {
        self.publish_all(shelf, vec![(*digest, size, unfinished.at)])
    }

    /// The same of several, under one lock.
    pub(crate) fn publish_all(
        &self,
        shelf: Shelf,
        finished: Vec<(Digest, u64, Waiting)>,
    ) -> Result<(), PathError> {
        if finished.is_empty() {
            return Ok(());
        }
        let _lock = self.layout.publishing()?;
        let digests = finished.iter().map(|(digest, ..)| digest);
        journal::note_all(&self.layout, shelf, digests)?;
        for (digest, size, waiting) in finished {
            put_in_place(waiting, &self.layout.path(shelf, &digest), size)?;
        }
        Ok(())
    }

    /// Replaces a small file atomically and durably. For records, which promise that
    /// what they name is there.
    pub(crate) fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), PathError> {
        let mut unfinished = self.unfinished()?;
        unfinished.write(bytes)?;
        let Unfinished { file, at: mut tmp } = unfinished;
        file.sync_all().map_err(at("write", &tmp.path))?;
        fs::rename(&tmp.path, path).map_err(at("write", path))?;
        tmp.moved = true;
        let folder = path.parent().unwrap_or(&self.layout.root);
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(at("sync", folder))
    }

    /// A new file in this handle's own folder.
    pub(crate) fn unfinished(&self) -> Result<Unfinished, PathError> {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let path = self.session_folder()?.join(number.to_string());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            // Nobody may change content; root may read it all.
            .mode(0o444)
            .open(&path)
            .map_err(at("make", &path))?;
        let moved = false;
        let at = Waiting { path, moved };
        Ok(Unfinished { file, at })
    }

    fn session_folder(&self) -> Result<PathBuf, PathError> {
        let mut session = locked(&self.session);
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

/// Copies everything, hashing it.
pub(crate) fn copy(
    source: &mut dyn Read,
    unfinished: &mut Unfinished,
) -> Result<(Digest, u64), PutError> {
    let mut hasher = Hasher::new();
    let mut size = 0;
    let mut piece = vec![0; PIECE];
    loop {
        let n = match source.read(&mut piece) {
            Ok(0) => return Ok((hasher.finish(), size)),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(PutError::Source(error)),
        };
        hasher.update(&piece[..n]);
        unfinished.write(&piece[..n])?;
        size += n as u64;
    }
}

fn put_in_place(mut waiting: Waiting, path: &Path, size: u64) -> Result<(), PathError> {
    match renameat_with(CWD, &waiting.path, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => {
            waiting.moved = true;
            return Ok(());
        }
        // A file of another size is what a power cut left: replaced.
        Err(rustix::io::Errno::EXIST) if file_size(path)? == Some(size) => return Ok(()),
        Err(rustix::io::Errno::EXIST | rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(at("write", path)(error.into())),
    }
    fs::rename(&waiting.path, path).map_err(at("write", path))?;
    waiting.moved = true;
    Ok(())
}

/// A file's size; `None`: it is not there.
pub(crate) fn file_size(path: &Path) -> Result<Option<u64>, PathError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("look at", path)(error)),
    }
}

/// Bytes that a file takes on disk; `None`: it is not there.
pub(crate) fn allocated(path: &Path) -> Result<Option<u64>, PathError> {
    match fs::symlink_metadata(path) {
        // Linux counts blocks of 512 bytes, whatever the file system's.
        Ok(metadata) => Ok(Some(metadata.blocks() * 512)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("look at", path)(error)),
    }
}

/// A file's content; `None`: it is not there.
pub(crate) fn open(path: &Path) -> Result<Option<File>, PathError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("open", path)(error)),
    }
}

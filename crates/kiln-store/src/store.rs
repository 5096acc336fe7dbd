use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_model::{Digest, Hasher};

use crate::journal;
use crate::layout::{FORMAT, Layout, PathError, Shelf, at, read_file};
use crate::unfinished::{Making, Unfinished, Waiting};

/// Bytes copied at a time.
pub(crate) const PIECE: usize = 128 << 10;
/// Bytes that content is thought to have of which nobody has said it: most files are small.
const LIKELY: u64 = 8 << 10;

/// The store in one folder; see the crate. Any number of processes, and of these in one
/// process, may use a folder at once.
#[derive(Debug)]
pub struct Store {
    pub(crate) layout: Layout,
    pub(crate) making: Making,
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
            making: Making::default(),
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
        self.publish_all(shelf, vec![(*digest, size, unfinished.written())])
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
            self.put_in_place(waiting, &self.layout.path(shelf, &digest), size)?;
        }
        Ok(())
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

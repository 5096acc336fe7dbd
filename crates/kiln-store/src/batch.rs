//! Objects that are taken in together: written one by one, and named some at a time, under
//! one lock and with one write to the journal.
//!
//! Invariant: [`Batch::finish`] has given all of them their names; of a batch that is
//! dropped nothing unfinished is left.

use std::fs::{File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

use kiln_model::{Digest, Hasher};
use rustix::fs::{flistxattr, flistxattr_query, fremovexattr};
use rustix::io::Errno;

use crate::layout::{PathError, Shelf};
use crate::store::{PIECE, PutError, Store, copy};
use crate::unfinished::{READ_ONLY, Waiting};

/// Content up to this size is looked up by its digest before any file is made.
const SMALL: usize = 1 << 20;
/// Most objects that wait for their names: each is an open file.
const MOST: usize = 16;

/// See the module.
pub struct Batch<'s> {
    store: &'s Store,
    waiting: Vec<(Digest, u64, Waiting)>,
    /// Of the content that is read.
    buffer: Vec<u8>,
}

impl Store {
    /// Begins a batch. Nobody waits for it: it holds the lock only while it gives names.
    pub fn batch(&self) -> Batch<'_> {
        Batch {
            store: self,
            waiting: Vec::new(),
            buffer: Vec::new(),
        }
    }
}

impl Batch<'_> {
    /// Takes file content in: its digest and size in bytes. `likely`: the size that it is
    /// thought to have, which saves reading it in small pieces, and is refused where the disk
    /// has no room for it: of a file with holes, reading would only show that in the end.
    pub fn put(&mut self, content: &mut dyn Read, likely: u64) -> Result<(Digest, u64), PutError> {
        // One byte more, to see that it ends there.
        let room = usize::try_from(likely).unwrap_or(SMALL).saturating_add(1);
        let mut length = 0;
        self.buffer.resize(room.min(SMALL), 0);
        loop {
            length += fill(content, &mut self.buffer[length..]).map_err(PutError::Source)?;
            if length < self.buffer.len() {
                return Ok(self.small(length)?);
            }
            if length == SMALL {
                self.store.have_room(likely)?;
                return self.large(content);
            }
            self.buffer.resize((length * 2).min(SMALL), 0);
        }
    }

    /// Takes a file over that nobody writes any more: its content becomes an object without
    /// being copied, and the file one more name of it. Of its owner, permissions and
    /// extended attributes nothing is left. Its digest and size in bytes.
    ///
    /// What is on another disk is copied. A file with holes is refused where the disk has no
    /// room for it without them, because whoever unpacks the image makes it whole.
    pub fn adopt(&mut self, mut file: File) -> Result<(Digest, u64), PutError> {
        let stat = file.metadata().map_err(PutError::Source)?;
        let holes = stat.len().saturating_sub(stat.blocks() * 512);
        self.store.have_room(holes)?;
        let (digest, size) = hash(&mut file).map_err(PutError::Source)?;
        let known = self.store.reuse(Shelf::Objects, &digest, Some(size))?;
        if known.is_none() {
            own(&file).map_err(PutError::Source)?;
            self.wait(digest, size, Waiting::Nameless(file))?;
        }
        Ok((digest, size))
    }

    fn small(&mut self, length: usize) -> Result<(Digest, u64), PathError> {
        let (store, content) = (self.store, &self.buffer[..length]);
        let (digest, size) = (Digest::of(content), length as u64);
        if store.reuse(Shelf::Objects, &digest, Some(size))?.is_none() {
            let mut unfinished = store.unfinished()?;
            unfinished.write(content)?;
            self.wait(digest, size, unfinished.written())?;
        }
        Ok((digest, size))
    }

    /// What follows the full buffer is not held in memory.
    fn large(&mut self, rest: &mut dyn Read) -> Result<(Digest, u64), PutError> {
        let mut unfinished = self.store.unfinished()?;
        let mut whole = self.buffer.as_slice().chain(rest);
        let (digest, size) = copy(&mut whole, &mut unfinished)?;
        self.wait(digest, size, unfinished.written())?;
        Ok((digest, size))
    }

    fn wait(&mut self, digest: Digest, size: u64, finished: Waiting) -> Result<(), PathError> {
        self.waiting.push((digest, size, finished));
        match self.waiting.len() {
            MOST => self.name(),
            _ => Ok(()),
        }
    }

    fn name(&mut self) -> Result<(), PathError> {
        let finished = std::mem::take(&mut self.waiting);
        self.store.publish_all(Shelf::Objects, finished)
    }

    /// Gives the rest their names.
    pub fn finish(mut self) -> Result<(), PathError> {
        self.name()
    }
}

/// Digest and size of what follows in a file.
fn hash(file: &mut File) -> io::Result<(Digest, u64)> {
    let mut hasher = Hasher::new();
    let mut piece = vec![0; PIECE];
    let mut size = 0;
    loop {
        match fill(file, &mut piece)? {
            0 => return Ok((hasher.finish(), size)),
            length => {
                hasher.update(&piece[..length]);
                size += length as u64;
            }
        }
    }
}

/// Makes a file as the store's are.
fn own(file: &File) -> io::Result<()> {
    let length = match flistxattr_query(file) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    if length > 0 {
        let mut names = vec![0; length];
        flistxattr(file, names.as_mut_slice())?;
        // Every file has a label where there are any: it is not the image's.
        let others = names.split(|b| *b == 0).filter(|name| !name.is_empty());
        for name in others.filter(|name| *name != b"security.selinux") {
            fremovexattr(file, name)?;
        }
    }
    fchown(file, Some(0), Some(0))?;
    file.set_permissions(Permissions::from_mode(READ_ONLY))
}

/// Reads until the buffer is full or the source ends; says how much.
fn fill(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match source.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(n) => length += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use super::*;

    #[test]
    fn what_the_disk_has_no_room_for_is_refused_unread() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * SMALL as u64).unwrap();
        let mut content = file.try_clone().unwrap();
        let refused = store.put_object_of(&mut content, 1 << 60).unwrap_err();
        let told = format!(
            "it would take {} bytes, and there is room for ",
            1_u64 << 60
        );
        assert!(refused.to_string().contains(&told), "{refused}");
        let read = std::io::Seek::stream_position(&mut content).unwrap();
        assert!(read <= SMALL as u64, "{read} bytes");
    }

    #[test]
    fn content_of_any_size_is_whole_whatever_size_was_thought_likely() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        for size in [0, 1, 2, 100, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL] {
            let content: Vec<u8> = (0..size).map(|n| (n / 7) as u8).collect();
            for likely in [0, 1, size, size / 2, size + 9, 9 * SMALL] {
                let mut batch = store.batch();
                let put = batch.put(&mut content.as_slice(), likely as u64).unwrap();
                assert_eq!(put, (Digest::of(&content), size as u64));
                batch.finish().unwrap();
            }
            let path = store.object_path(&Digest::of(&content));
            assert_eq!(std::fs::read(path).unwrap(), content);
        }
    }

    /// A file as a program leaves it.
    fn left(folder: &Path, content: &[u8]) -> File {
        let path = folder.join("left");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o6755)).unwrap();
        File::open(path).unwrap()
    }

    fn adopted(store: &Store, file: File) -> Digest {
        let mut batch = store.batch();
        let (digest, _) = batch.adopt(file).unwrap();
        batch.finish().unwrap();
        digest
    }

    #[test]
    fn what_is_taken_over_is_the_same_file_with_nothing_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let file = left(root.path(), b"content");
        let none = rustix::fs::XattrFlags::empty();
        let marked = rustix::fs::fsetxattr(&file, "trusted.overlay.origin", b"x", none);
        let root_user = rustix::process::geteuid().is_root();
        match marked.is_ok() && root_user {
            true => fchown(&file, Some(7), Some(7)).unwrap(),
            false => crate::testing::skip("needs root and extended attributes"),
        }
        let inode = file.metadata().unwrap().ino();
        let digest = adopted(&store, file);
        assert_eq!(digest, Digest::of("content"));
        let object = File::open(store.object_path(&digest)).unwrap();
        let stat = object.metadata().unwrap();
        assert_eq!((stat.ino(), stat.mode() & 0o7777), (inode, 0o444));
        if root_user {
            assert_eq!((stat.uid(), stat.gid()), (0, 0));
        }
        let mut names = [0; 1 << 10];
        let length = flistxattr(&object, names.as_mut_slice()).unwrap();
        let text = String::from_utf8_lossy(&names[..length]);
        assert!(!text.contains("overlay"), "{text}");
    }

    #[test]
    fn what_is_in_the_store_already_is_not_taken_over() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let (known, _) = store.put_object(&mut &b"content"[..]).unwrap();
        let own = std::fs::metadata(store.object_path(&known)).unwrap().ino();
        let file = left(root.path(), b"content");
        assert_eq!(adopted(&store, file), known);
        let stat = std::fs::metadata(store.object_path(&known)).unwrap();
        assert_eq!((stat.ino(), stat.nlink()), (own, 1));
        let stat = std::fs::metadata(root.path().join("left")).unwrap();
        assert_eq!(stat.mode() & 0o7777, 0o6755, "it was not touched");
    }

    #[test]
    fn what_is_on_another_disk_is_copied() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let other = match tempfile::tempdir_in("/dev/shm") {
            Ok(other) => other,
            Err(_) => return crate::testing::skip("there is no /dev/shm"),
        };
        let content = vec![7; 3 * PIECE + 1];
        let digest = adopted(&store, left(other.path(), &content));
        let path = store.object_path(&digest);
        assert!(std::fs::read(&path).unwrap() == content);
        let stat = std::fs::metadata(path).unwrap();
        assert_eq!((stat.nlink(), stat.mode() & 0o7777), (1, 0o444));
    }

    #[test]
    fn holes_that_the_disk_has_no_room_for_are_refused_unread() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let file = left(root.path(), b"");
        let path = root.path().join("left");
        let written = File::options().write(true).open(path).unwrap();
        written.set_len(1 << 43).unwrap();
        let refused = store.batch().adopt(file).unwrap_err().to_string();
        let told = format!("it would take {} bytes", 1_u64 << 43);
        assert!(refused.contains(&told), "{refused}");
    }

    #[test]
    fn a_batch_is_in_the_store_as_a_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let texts = ["one", "two", "one"];
        let there = || {
            let paths = texts.map(|text| store.object_path(&Digest::of(text)));
            paths.iter().filter(|path| path.exists()).count()
        };
        for keep in [false, true] {
            let mut batch = store.batch();
            for text in texts {
                batch.put(&mut text.as_bytes(), 3).unwrap();
            }
            assert_eq!(there(), 0);
            match keep {
                true => batch.finish().unwrap(),
                false => drop(batch),
            }
        }
        assert_eq!(there(), 3);
        let left = walk(&root.path().join("store/tmp"));
        assert_eq!(left, 0, "unfinished files are left");
    }

    fn walk(folder: &std::path::Path) -> usize {
        let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
        let each = entries.map(|entry| match entry.path().is_dir() {
            true => walk(&entry.path()),
            false => 1,
        });
        each.sum()
    }
}

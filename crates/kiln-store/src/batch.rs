//! Objects that are taken in together: written one by one, and named some at a time, under
//! one lock and with one write to the journal.
//!
//! Invariant: [`Batch::finish`] has given all of them their names; of a batch that is
//! dropped nothing unfinished is left.

use std::io::{self, Read};

use kiln_model::Digest;

use crate::layout::{PathError, Shelf};
use crate::store::{PutError, Store, Waiting, copy};

/// Content up to this size is looked up by its digest before any file is made.
const SMALL: usize = 1 << 20;
/// Most objects that wait for their names: they share the lock for some milliseconds.
const MOST: usize = 64;

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

    fn small(&mut self, length: usize) -> Result<(Digest, u64), PathError> {
        let (store, content) = (self.store, &self.buffer[..length]);
        let (digest, size) = (Digest::of(content), length as u64);
        if store.reuse(Shelf::Objects, &digest, Some(size))?.is_none() {
            let mut unfinished = store.unfinished()?;
            unfinished.write(content)?;
            self.wait(digest, size, unfinished.at)?;
        }
        Ok((digest, size))
    }

    /// What follows the full buffer is not held in memory.
    fn large(&mut self, rest: &mut dyn Read) -> Result<(Digest, u64), PutError> {
        let mut unfinished = self.store.unfinished()?;
        let mut whole = self.buffer.as_slice().chain(rest);
        let (digest, size) = copy(&mut whole, &mut unfinished)?;
        self.wait(digest, size, unfinished.at)?;
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

//! Garbage collection: what no root needs is removed.
//!
//! Roots are the refs, the caller's extra roots, and whatever the journal says was
//! written or found again since the earliest living lease began. `gc` holds a lease of
//! its own, so that what is written while it runs is a root as well.
//!
//! Marking goes on while others write. Removing is done under the removing lock, in
//! batches, and each batch first marks what has become a root since; so at the moment
//! something is removed, nothing protects it. Records and what they name directly go in
//! the first batch, objects after: a ref can't be set to something half removed, because
//! setting it looks for its target under the same lock.

use std::collections::HashSet;
use std::fs::File;
use std::path::PathBuf;

use kiln_model::Digest;
use kiln_oci::manifest::{Document, MAX_MANIFEST_BYTES, parse};
use serde::Serialize;

use crate::image::ImageError;
use crate::journal;
use crate::layout::{PathError, Shelf, at, entries, open_lock, read_file, remove_file, try_lock};
use crate::lease::living;
use crate::refs::RefError;
use crate::store::{Store, allocated, file_size};
use crate::tree::Kind;
use crate::trees::LoadTreeError;

/// Objects removed while the lock is held once; keeps others' waits to milliseconds.
const BATCH: usize = 512;

/// What `gc` removed, or would have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    pub dry_run: bool,
    pub objects: u64,
    pub blobs: u64,
    pub trees: u64,
    pub images: u64,
    /// Bytes on disk of all these, and of unfinished files of dead processes.
    pub bytes: u64,
    /// Refs and extra roots that point at nothing.
    pub dangling: Vec<String>,
}

/// Why `gc` stopped. What it had removed by then was garbage.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(
        "another garbage collection, or a check (fsck), is running; try again when it has ended"
    )]
    Busy,
    #[error(transparent)]
    Ref(#[from] RefError),
    /// What it needs is unknown, so nothing may be removed.
    #[error("what must be kept can't be told, so nothing was removed: {0}")]
    Image(#[from] ImageError),
    #[error("what must be kept can't be told, so nothing was removed: {0}")]
    Tree(#[from] LoadTreeError),
}

/// What must stay.
#[derive(Default)]
struct Marks {
    objects: HashSet<Digest>,
    blobs: HashSet<Digest>,
    trees: HashSet<Digest>,
    images: HashSet<Digest>,
    /// Blobs whose children are marked. Not the same as being marked: an image may name
    /// another's manifest as its layer.
    looked_into: HashSet<Digest>,
    /// How far the journal has been read.
    journal: u64,
    refs: HashSet<(String, Digest)>,
    dangling: Vec<String>,
}

impl Marks {
    fn on(&mut self, shelf: Shelf) -> &mut HashSet<Digest> {
        match shelf {
            Shelf::Objects => &mut self.objects,
            Shelf::Blobs => &mut self.blobs,
            Shelf::Trees => &mut self.trees,
            Shelf::Images => &mut self.images,
        }
    }
}

/// What some roots need, to tell what others need beyond it.
#[derive(Default)]
pub struct Needs(Marks);

impl Store {
    /// Bytes on disk that `roots` (as for [`Self::gc`]; those that are not there weigh
    /// nothing) need beyond what was weighed before.
    pub fn weigh(&self, needs: &mut Needs, roots: &[Digest]) -> Result<u64, GcError> {
        let mut marks = Marks::default();
        for root in roots {
            self.mark(root, &mut marks)?;
        }
        let mut bytes = 0;
        for shelf in Shelf::ALL {
            let known = needs.0.on(shelf);
            for digest in marks.on(shelf).drain() {
                if known.insert(digest) {
                    bytes += allocated(&self.layout.path(shelf, &digest))?.unwrap_or(0);
                }
            }
        }
        Ok(bytes)
    }

    /// Removes everything that neither a ref, nor an extra root (digests of manifests,
    /// trees, blobs: those of running instances), nor a living lease protects. With
    /// `dry_run`, only counts.
    pub fn gc(&self, extra_roots: &[Digest], dry_run: bool) -> Result<GcReport, GcError> {
        let _only = self.collecting()?.ok_or(GcError::Busy)?;
        let _lease = self.lease()?;
        let (mut marks, complete) = self.begin()?;
        for root in extra_roots {
            if !self.mark(root, &mut marks)? {
                marks.dangling.push(root.to_string());
            }
        }
        self.mark_new(&mut marks, complete)?;
        let mut report = GcReport {
            dry_run,
            ..GcReport::default()
        };
        self.remove_named(&mut marks, &mut report)?;
        self.remove_objects(&mut marks, &mut report)?;
        report.dangling = marks.dangling;
        Ok(report)
    }

    /// `None`: somebody else collects, or checks.
    pub(crate) fn collecting(&self) -> Result<Option<File>, PathError> {
        let path = self.layout.sub("gc.lock");
        let file = open_lock(&path)?;
        Ok(try_lock(&file).map_err(at("lock", &path))?.then_some(file))
    }

    /// Marks that begin where the earliest lease does, and the place in the journal up
    /// to which what it says has happened. (What comes in is noted just *before* it gets
    /// its name; but both are done under the publishing lock, and here nobody has it.)
    fn begin(&self) -> Result<(Marks, u64), PathError> {
        let _lock = self.layout.removing()?;
        let marks = Marks {
            journal: living(&self.layout)?.since,
            ..Marks::default()
        };
        Ok((marks, journal::end(&self.layout)?))
    }

    /// Marks refs, and journal records up to byte `complete`, that were not marked
    /// before. Past a record whose content has no name yet nothing may be marked: it
    /// would count as done, and what the content needs would never be.
    fn mark_new(&self, marks: &mut Marks, complete: u64) -> Result<(), GcError> {
        for (name, digest) in self.refs("")? {
            let entry = (name, digest);
            if marks.refs.contains(&entry) {
                continue;
            }
            if !self.mark(&digest, marks)? {
                marks.dangling.push(entry.0.clone());
            }
            marks.refs.insert(entry);
        }
        let records = journal::between(&self.layout, marks.journal, complete)?;
        marks.journal = complete;
        for (shelf, digest) in records {
            match shelf {
                Shelf::Objects => drop(marks.objects.insert(digest)),
                Shelf::Trees => drop(self.mark_tree(&digest, marks)?),
                Shelf::Blobs | Shelf::Images => drop(self.mark(&digest, marks)?),
            }
        }
        Ok(())
    }

    /// Marks what `digest` names and all it needs; `false`: there is nothing.
    fn mark(&self, digest: &Digest, marks: &mut Marks) -> Result<bool, GcError> {
        let tree = self.mark_tree(digest, marks)?;
        let mut todo = vec![*digest];
        let mut found = false;
        while let Some(digest) = todo.pop() {
            if let Some(image) = self.image(&digest)? {
                found = true;
                marks.images.insert(digest);
                self.mark_tree(&image.tree, marks)?;
                marks.blobs.extend(image.blobs());
            }
            let path = self.layout.path(Shelf::Blobs, &digest);
            let Some(size) = file_size(&path)? else {
                continue;
            };
            found = true;
            marks.blobs.insert(digest);
            if !marks.looked_into.insert(digest) || size > MAX_MANIFEST_BYTES {
                continue;
            }
            let bytes = read_file(&path)?.unwrap_or_default();
            match parse(&bytes, None) {
                Ok(Document::Manifest(manifest)) => {
                    marks.blobs.insert(manifest.config.digest);
                    marks.blobs.extend(manifest.layers.iter().map(|l| l.digest));
                }
                Ok(Document::Index(index)) => {
                    todo.extend(index.manifests.iter().map(|entry| entry.digest));
                }
                Err(_) => {}
            }
        }
        Ok(tree || found)
    }

    fn mark_tree(&self, digest: &Digest, marks: &mut Marks) -> Result<bool, GcError> {
        if marks.trees.contains(digest) {
            return Ok(true);
        }
        let tree = match self.load_tree(digest) {
            Ok(tree) => tree,
            Err(LoadTreeError::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        marks.trees.insert(*digest);
        for item in tree.walk() {
            if let Kind::File { digest, .. } = item.node.kind {
                marks.objects.insert(digest);
            }
        }
        Ok(true)
    }

    /// [`Self::mark_new`] of everything; for holders of the removing lock.
    fn mark_all_new(&self, marks: &mut Marks) -> Result<(), GcError> {
        let complete = journal::end(&self.layout)?;
        self.mark_new(marks, complete)
    }

    /// The first batch: records, trees and blobs.
    fn remove_named(&self, marks: &mut Marks, report: &mut GcReport) -> Result<(), GcError> {
        let _lock = self.layout.removing()?;
        self.mark_all_new(marks)?;
        for shelf in [Shelf::Images, Shelf::Trees, Shelf::Blobs] {
            let garbage = self.garbage(shelf, marks)?;
            remove(shelf, garbage, report)?;
        }
        if report.dry_run {
            return Ok(());
        }
        for (_, path) in entries(&self.layout.sub("chains"))? {
            let text = read_file(&path)?.unwrap_or_default();
            let tree = std::str::from_utf8(&text).ok();
            let tree = tree.and_then(|text| text.trim().parse::<Digest>().ok());
            if tree.is_none_or(|tree| !marks.trees.contains(&tree)) {
                remove_file(&path)?;
            }
        }
        report.bytes += self.clean_sessions()?;
        Ok(())
    }

    fn remove_objects(&self, marks: &mut Marks, report: &mut GcReport) -> Result<(), GcError> {
        let mut garbage = self.garbage(Shelf::Objects, marks)?;
        loop {
            let _lock = self.layout.removing()?;
            self.mark_all_new(marks)?;
            let rest = garbage.split_off(garbage.len().min(BATCH));
            garbage.retain(|(digest, _)| !marks.objects.contains(digest));
            remove(Shelf::Objects, garbage, report)?;
            if rest.is_empty() {
                return self.shorten_journal(report);
            }
            garbage = rest;
        }
    }

    fn garbage(
        &self,
        shelf: Shelf,
        marks: &mut Marks,
    ) -> Result<Vec<(Digest, PathBuf)>, PathError> {
        let mut all = self.layout.list(shelf)?;
        let keep = marks.on(shelf);
        all.retain(|(digest, _)| !keep.contains(digest));
        Ok(all)
    }

    /// Empties the journal if the only living lease is `gc`'s own.
    fn shorten_journal(&self, report: &GcReport) -> Result<(), GcError> {
        if !report.dry_run && living(&self.layout)?.count <= 1 {
            journal::clear(&self.layout)?;
        }
        Ok(())
    }
}

/// Removes the files unless it is a dry run, and counts them.
fn remove(
    shelf: Shelf,
    garbage: Vec<(Digest, PathBuf)>,
    report: &mut GcReport,
) -> Result<(), PathError> {
    for (_, path) in garbage {
        let Some(size) = allocated(&path)? else {
            continue;
        };
        if !report.dry_run && !remove_file(&path)? {
            continue;
        }
        report.bytes += size;
        let count = match shelf {
            Shelf::Objects => &mut report.objects,
            Shelf::Blobs => &mut report.blobs,
            Shelf::Trees => &mut report.trees,
            Shelf::Images => &mut report.images,
        };
        *count += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What happens between two batches, made to happen.
    #[test]
    fn what_becomes_a_root_between_batches_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let put = |content: &str| store.put_object(&mut content.as_bytes()).unwrap().0;
        let (found_again, garbage) = (put("found again"), put("garbage"));
        let (mut marks, complete) = store.begin().unwrap();
        let mut report = GcReport::default();
        store.mark_new(&mut marks, complete).unwrap();
        store.remove_named(&mut marks, &mut report).unwrap();
        put("found again");
        store.remove_objects(&mut marks, &mut report).unwrap();
        assert!(store.open_object(&found_again).unwrap().is_some());
        assert!(store.open_object(&garbage).unwrap().is_none());
    }
    /// Marking goes on while something is noted but not yet there.
    #[test]
    fn what_is_noted_too_early_is_not_taken_for_done() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let _lease = store.lease().unwrap();
        let mut tree = crate::Tree::new();
        let digest = Digest::of("content");
        let kind = Kind::File { digest, size: 7 };
        let node = crate::tree::Node::plain(0o644, kind);
        tree.insert("file", node).unwrap();
        let (mut marks, complete) = store.begin().unwrap();
        // Publishing a tree, stopped in the middle. (Its object was there before the
        // lease, and is noted by nobody.)
        let image = crate::erofs::write(&tree).unwrap();
        let name = Digest::of(&image);
        journal::note(&store.layout, Shelf::Trees, &name).unwrap();
        store.mark_new(&mut marks, complete).unwrap();
        std::fs::write(store.object_path(&digest), "content").unwrap();
        std::fs::write(store.layout.path(Shelf::Trees, &name), image).unwrap();
        let mut report = GcReport::default();
        store.remove_named(&mut marks, &mut report).unwrap();
        store.remove_objects(&mut marks, &mut report).unwrap();
        assert_eq!((report.trees, report.objects), (0, 0));
        assert_eq!(store.load_tree(&name).unwrap(), tree);
    }
}

//! Databases that a RUN has made or written to. PostgreSQL and MariaDB give each a number by
//! clock and chance, and write times into its tables: no two are the same, also where a
//! package's installation makes an empty one. So what a RUN has left of one is recorded as what
//! it fetched is, and the same build is given it again.
//!
//! Recorded is all below the database's folder, as a layer, beside `kiln.lock`
//! ([`crate::network::record::Kept`]); the lock names it with the digest of everything that it
//! was made of. Where that is another, or the layer is not there, the new one is recorded.

use std::collections::BTreeMap;

use kiln_model::{Digest, ProgressEvent};
use kiln_oci::blob::{BlobRead, BlobWrite, Expected};
use kiln_store::tree::Tree;

use super::fetches::Taped;
use super::layer::Delta;
use super::{ExecError, Site};
use crate::files::{names, shown};
use crate::network::record::{Kept, Made};
use crate::secrets::Look;

/// The file that such a folder is known by, and another name that must be in it.
const KNOWN: [(&[u8], &[u8]); 2] = [
    (b"/global/pg_control", b"/PG_VERSION"),
    (b"/ibdata1", b"/mysql"),
];
/// What the recorded layer calls the database's folder.
const INSIDE: &[u8] = b"database";

impl Site<'_> {
    /// Puts what was recorded in the place of each database that has changed since `before`, or
    /// records it; gives what the lock is to say, by path. `of`: all that the RUN's result
    /// depends on.
    pub(super) fn databases(
        &self,
        before: &Tree,
        tree: &mut Tree,
        (of, taped): (&Digest, Option<&Taped>),
        task: &str,
    ) -> Result<BTreeMap<String, Made>, ExecError> {
        let mut all = BTreeMap::new();
        for root in roots(tree) {
            let now = part(tree, &root)?;
            if part(before, &root).is_ok_and(|earlier| Delta::between(&earlier, &now).is_empty()) {
                continue;
            }
            let path = shown(&names(&root));
            let (made, text) = self.settle(&path, &now, (of, taped))?;
            if let Some(made) = made {
                self.give(&made, tree, &root)?;
                all.insert(path.clone(), made);
            }
            self.progress.event(ProgressEvent::Warning {
                task: task.to_owned(),
                text: format!("{path}, a database, is {text}"),
            });
        }
        Ok(all)
    }

    /// What the lock is to say of a database and where that is, if anywhere; and in words.
    fn settle(
        &self,
        path: &str,
        now: &Tree,
        (of, taped): (&Digest, Option<&Taped>),
    ) -> Result<(Option<Made>, &'static str), ExecError> {
        let (Some(taped), Some(kept)) = (taped, self.recordings.kept()) else {
            return Ok((None, "another one each time it is made: it is not recorded"));
        };
        let known = taped.made(path).filter(|made| made.of == *of && !self.live);
        if let Some(made) = known
            && kept.open(&made.sha256).map_err(ExecError::store)?.is_some()
        {
            let text = "the one that kiln.lock names, and not made again";
            return Ok((Some(made.clone()), text));
        }
        let Some(sha256) = self.record(now, kept)? else {
            let text = "another one each time it is made; it is too large to be recorded, or \
                        has a secret in it";
            return Ok((None, text));
        };
        if known.is_some() {
            let text = "another one than kiln.lock names, as that one is not in kiln.lock.d: this \
                        one is recorded";
            return Ok((Some(Made { of: *of, sha256 }), text));
        }
        let text = "another one each time it is made, so it is recorded beside kiln.lock, in \
                    kiln.lock.d: later builds have this one";
        Ok((Some(Made { of: *of, sha256 }), text))
    }

    /// Puts what is recorded in the place of what is there.
    fn give(&self, made: &Made, tree: &mut Tree, root: &[u8]) -> Result<(), ExecError> {
        let kept = self.recordings.kept();
        let opened = kept.map(|kept| kept.open(&made.sha256)).transpose();
        let opened = opened.map_err(ExecError::store)?.flatten();
        let (mut file, size) = opened.ok_or(ExecError::Lost(made.sha256))?;
        let expected = Expected {
            digest: made.sha256,
            size,
        };
        let written = self.store.write(Some(expected), &mut file);
        written.map_err(ExecError::store)?;
        let recorded = self.store.layer_tree(&Tree::new(), &made.sha256, None);
        let recorded = recorded.map_err(ExecError::store)?;
        tree.remove(root).map_err(ExecError::store)?;
        copy_into(&recorded, INSIDE, tree, root)
    }

    /// `None`: it may not be recorded.
    fn record(&self, now: &Tree, kept: &Kept) -> Result<Option<Digest>, ExecError> {
        let mut alone = Tree::new();
        copy_into(now, b"", &mut alone, INSIDE)?;
        let nothing = Tree::new();
        let delta = Delta::between(&nothing, &alone);
        let Some(part) = delta.whole() else {
            return Ok(None);
        };
        let look = Look::new(&self.given, &[]);
        let (layer, found) = part.write(&self.store, Some(&look))?;
        if !found.is_empty() || layer.size > Kept::LARGEST {
            return Ok(None);
        }
        let blob = BlobRead::open(&*self.store, &layer.digest).map_err(ExecError::store)?;
        let mut blob = blob.ok_or(ExecError::Lost(layer.digest))?;
        kept.put(&layer.digest, &mut blob)
            .map_err(ExecError::store)?;
        Ok(Some(layer.digest))
    }
}

/// The folders of databases.
fn roots(tree: &Tree) -> Vec<Vec<u8>> {
    let mut roots = Vec::new();
    for item in tree.walk() {
        for (file, beside) in KNOWN {
            if let Some(root) = item.path.strip_suffix(file)
                && tree.get([root, beside].concat()).is_some()
            {
                roots.push(root.to_vec());
            }
        }
    }
    roots
}

/// What is at and below a folder, as a tree of its own.
fn part(tree: &Tree, root: &[u8]) -> Result<Tree, ExecError> {
    let mut part = Tree::new();
    copy_into(tree, root, &mut part, b"")?;
    Ok(part)
}

/// Copies what is at and below `from` of one tree to `to` of another.
fn copy_into(source: &Tree, from: &[u8], target: &mut Tree, to: &[u8]) -> Result<(), ExecError> {
    for item in source.walk_from(from).map_err(ExecError::store)? {
        let rest = item.path.get(from.len()..).unwrap_or_default();
        let rest = rest.strip_prefix(b"/").unwrap_or(rest);
        let parts: Vec<&[u8]> = [to, rest].into_iter().filter(|p| !p.is_empty()).collect();
        let path = parts.join(&b'/');
        target
            .insert(path, item.node.clone())
            .map_err(ExecError::store)?;
    }
    Ok(())
}

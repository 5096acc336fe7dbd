//! What changed between two trees, as layers.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Read};

use kiln_model::Digest;
use kiln_oci::layer::{Entry, EntryKind, LayerWriteError, LayerWriter};
use kiln_store::tree::{Change, ChangeKind, InodeId, Kind, Metadata, Node, Tree, diff};
use kiln_store::{PathError, Store};
use serde::{Deserialize, Serialize};

use super::state::Key;
use crate::secrets::{self, Finding, Look};

/// A layer that is in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    pub digest: Digest,
    /// Bytes, compressed.
    pub size: u64,
    pub diff_id: Digest,
}

/// Why a layer can't be made.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error(transparent)]
    Write(#[from] LayerWriteError),
    #[error("the content of {path} is not in the store")]
    Content {
        path: String,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(transparent)]
    Store(#[from] PathError),
}

/// Bytes of files that are worth a layer of their own.
const PART_BYTES: u64 = 8 << 20;
/// Most layers of one instruction.
const MOST_PARTS: u64 = 16;
/// Docker mounts at most 125 layers; others of a build want some, too.
const MOST_LAYERS: usize = 100;

/// What one tree has and another hasn't, as layers: one, or where there is much of it
/// several of about the same size. A file that changes then changes the layer it is in, not
/// all that came with it, and layers are made at the same time.
pub struct Delta<'t> {
    after: &'t Tree,
    changes: Vec<Change<'t>>,
    /// Paths with other names (hard links): a number they share, and how many they are.
    links: BTreeMap<Vec<u8>, (InodeId, u32)>,
}

/// What becomes one layer; in the order of a walk, never empty.
pub struct Part<'d> {
    delta: &'d Delta<'d>,
    pub changes: Vec<&'d Change<'d>>,
}

impl<'t> Delta<'t> {
    pub fn between(before: &'t Tree, after: &'t Tree) -> Self {
        let links = after
            .walk()
            .filter(|item| item.links > 1 && !item.node.is_dir())
            .map(|item| (item.path, (item.inode, item.links)))
            .collect();
        Self {
            after,
            changes: diff(before, after),
            links,
        }
    }

    /// Its layers make exactly the later tree of the earlier one: it has no sockets and no
    /// parts of seconds, which layers can't hold, and no new names of files that are in
    /// lower layers, which become files of their own.
    pub fn is_exact(&self) -> bool {
        let mut names: BTreeMap<InodeId, (u32, u32)> = BTreeMap::new();
        for change in &self.changes {
            let holds = |node: &Node| node.kind != Kind::Socket && node.meta.mtime.nanos == 0;
            if !node_of(change).is_none_or(holds) {
                return false;
            }
            if let Some((inode, links)) = self.links.get(&change.path) {
                names.entry(*inode).or_insert((0, *links)).0 += 1;
            }
        }
        names.values().all(|(here, links)| here == links)
    }

    /// Of the files that are written.
    pub fn bytes(&self) -> u64 {
        self.changes.iter().filter_map(file_size).sum()
    }

    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Nothing changed.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// As one layer; `None`: nothing changed.
    pub fn whole(&self) -> Option<Part<'_>> {
        (!self.is_empty()).then(|| Part {
            delta: self,
            changes: self.changes.iter().collect(),
        })
    }

    /// The layers it makes over `below` others; follows from the trees alone.
    pub fn parts(&self, below: usize) -> Vec<Part<'_>> {
        let total = self.bytes();
        let count = parts_for(total, MOST_LAYERS.saturating_sub(below));
        if count == 1 {
            return self.whole().into_iter().collect();
        }
        let mut folders: HashMap<&[u8], u64> = HashMap::new();
        for change in &self.changes {
            *folders.entry(folder(&change.path)).or_default() += file_size(change).unwrap_or(0);
        }
        let mut parts: Vec<Vec<&Change<'_>>> = vec![Vec::new(); count];
        for change in &self.changes {
            let apart = file_size(change).is_some() && !self.links.contains_key(&change.path);
            // A folder's files stay together, unless they are most of all there is.
            let folder = folder(&change.path);
            let large = folders.get(folder).copied().unwrap_or(0) > total / count as u64;
            let name = if large { &change.path } else { folder };
            let index = match apart {
                true => usize::from(Digest::of(name).as_bytes()[0]) % count,
                false => 0,
            };
            parts[index].push(change);
        }
        let parts = parts.into_iter().filter(|changes| !changes.is_empty());
        parts
            .map(|changes| Part {
                delta: self,
                changes,
            })
            .collect()
    }
}

/// A power of two, so that few changes of the size change all parts.
fn parts_for(bytes: u64, room: usize) -> usize {
    let count = (bytes / PART_BYTES).next_power_of_two().min(MOST_PARTS) as usize;
    match count {
        // Fewer are not worth it.
        0..4 => 1,
        count if count > room => 1,
        count => count,
    }
}

fn node_of<'t>(change: &Change<'t>) -> Option<&'t Node> {
    match &change.kind {
        ChangeKind::Added(node) | ChangeKind::Modified { after: node, .. } => Some(node),
        ChangeKind::Removed(_) => None,
    }
}

/// Bytes of a file that is written; `None`: it is none, or takes a folder's place.
fn file_size(change: &Change<'_>) -> Option<u64> {
    if let ChangeKind::Modified { before, .. } = &change.kind
        && before.is_dir()
    {
        return None;
    }
    match node_of(change)?.kind {
        Kind::File { size, .. } => Some(size),
        _ => None,
    }
}

fn folder(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|b| *b == b'/').unwrap_or(0);
    &path[..end]
}

impl Part<'_> {
    /// Says the layer's whole content, before it is made.
    pub fn key(&self) -> Digest {
        let mut key = Key::new("layer", &Digest::of(""));
        let mut linked: BTreeMap<InodeId, &[u8]> = BTreeMap::new();
        let mut above = None;
        for change in &self.changes {
            key.field(&change.path);
            let folder = folder(&change.path);
            // Most changes are in the folder that the one before is in.
            if above.replace(folder) != Some(folder) {
                for (path, node) in self.folders_above(&change.path) {
                    hash_node(key.field(path), node);
                }
            }
            match node_of(change) {
                Some(node) => hash_node(&mut key, node),
                None => drop(key.field(b"removed")),
            }
            if let Some((inode, _)) = self.delta.links.get(&change.path) {
                key.field(linked.entry(*inode).or_insert(&change.path));
            }
        }
        key.finish()
    }

    /// The folders on the way to a path, without the root.
    fn folders_above<'p>(&self, path: &'p [u8]) -> impl Iterator<Item = (&'p [u8], &Node)> {
        let ends = path.iter().enumerate().filter(|(_, b)| **b == b'/');
        ends.map(|(end, _)| &path[..end])
            .filter_map(|path| Some((path, self.delta.after.get(path)?)))
    }

    /// Writes the layer into the store, and looks through what is new in it while it is
    /// read: content is read once.
    ///
    /// The folders above what it holds are in it: engines make those that are missing as
    /// they like.
    pub fn write(
        &self,
        store: &Store,
        look: Option<&Look<'_>>,
    ) -> Result<(LayerRef, Vec<Finding>), LayerError> {
        let mut layer = Writing {
            writer: LayerWriter::new(store.new_blob()?, None)?,
            store,
            links: &self.delta.links,
            linked: BTreeMap::new(),
            folders: HashSet::new(),
            look,
            found: Vec::new(),
            content: Vec::new(),
        };
        let mut gone: Option<&[u8]> = None;
        for change in &self.changes {
            let path = change.path.as_slice();
            let is_gone = |folder: &[u8]| path.len() > folder.len() && is_below(path, folder);
            match &change.kind {
                // What lay in a folder that is gone, or is something else now, goes with it.
                ChangeKind::Removed(_) if gone.is_some_and(is_gone) => continue,
                ChangeKind::Removed(_) => gone = Some(path),
                ChangeKind::Modified { before, after, .. }
                    if before.is_dir() && !after.is_dir() =>
                {
                    gone = Some(path);
                }
                _ => {}
            }
            for (path, node) in self.folders_above(path) {
                layer.add(path, node, false)?;
            }
            match node_of(change) {
                Some(node) => layer.add(path, node, secrets::is_new(change))?,
                None => layer.writer.whiteout(path)?,
            }
        }
        let (written, blob) = layer.writer.finish()?;
        blob.keep(&written.digest, written.size)?;
        let made = LayerRef {
            digest: written.digest,
            size: written.size,
            diff_id: written.diff_id,
        };
        Ok((made, layer.found))
    }
}

fn is_below(path: &[u8], folder: &[u8]) -> bool {
    path.starts_with(folder) && path.get(folder.len()) == Some(&b'/')
}

fn hash_node(key: &mut Key, node: &Node) {
    let Metadata {
        mode,
        uid,
        gid,
        mtime,
        xattrs,
    } = &node.meta;
    for number in [mode, uid, gid, &mtime.nanos] {
        key.field(&number.to_le_bytes());
    }
    key.field(&mtime.seconds.to_le_bytes());
    if !xattrs.is_empty() {
        key.debug(xattrs);
    }
    match &node.kind {
        Kind::File { digest, size } => {
            key.field(digest.as_bytes()).field(&size.to_le_bytes());
        }
        other => drop(key.debug(other)),
    }
}

/// A layer while it is written.
struct Writing<'a, W: io::Write> {
    writer: LayerWriter<W>,
    store: &'a Store,
    links: &'a BTreeMap<Vec<u8>, (InodeId, u32)>,
    /// The first name of each that has several.
    linked: BTreeMap<InodeId, Vec<u8>>,
    folders: HashSet<Vec<u8>>,
    look: Option<&'a Look<'a>>,
    found: Vec<Finding>,
    /// The beginning of the file at hand.
    content: Vec<u8>,
}

impl<W: io::Write> Writing<'_, W> {
    /// `new`: its content is, and is looked through.
    fn add(&mut self, path: &[u8], node: &Node, new: bool) -> Result<(), LayerError> {
        if node.is_dir() && !self.folders.insert(path.to_vec()) {
            return Ok(());
        }
        // A layer can't hold a socket; it means nothing without its process.
        let Some(mut kind) = entry_kind(node) else {
            return Ok(());
        };
        if let Some((inode, _)) = self.links.get(path) {
            match self.linked.get(inode) {
                Some(first) => {
                    kind = EntryKind::Hardlink {
                        target: first.clone(),
                    };
                }
                None => {
                    self.linked.insert(*inode, path.to_vec());
                }
            }
        }
        let entry = Entry {
            path: path.to_vec(),
            mode: node.meta.mode,
            uid: node.meta.uid,
            gid: node.meta.gid,
            mtime: node.meta.mtime.seconds,
            xattrs: node.meta.xattrs.clone(),
            kind,
        };
        let look = self.look.filter(|_| new);
        let written = matches!(entry.kind, EntryKind::File { .. });
        let Kind::File { digest, size } = &node.kind else {
            return Ok(self.writer.entry(&entry, &mut io::empty())?);
        };
        // Another name of a file is another place where something may be.
        let mut rest = match *size > 0 && (written || look.is_some()) {
            true => self.read(path, digest, *size)?,
            false => {
                self.content.clear();
                Box::new(io::empty())
            }
        };
        if let Some(look) = look {
            self.found.extend(look.at(path, *size, &self.content));
        }
        let mut content = self.content.as_slice().chain(&mut rest);
        Ok(self.writer.entry(&entry, &mut content)?)
    }

    /// Reads as much of a file as is looked through, and gives what follows.
    fn read(
        &mut self,
        path: &[u8],
        digest: &Digest,
        size: u64,
    ) -> Result<Box<dyn Read>, LayerError> {
        let fail = |cause: Box<dyn std::error::Error + Send + Sync>| LayerError::Content {
            path: String::from_utf8_lossy(path).into_owned(),
            cause,
        };
        let object = self.store.open_object(digest);
        let object = object.map_err(|e| fail(Box::new(e)))?;
        let mut object = object.ok_or_else(|| fail(digest.to_string().into()))?;
        let first = size.min(secrets::LOOKED_INTO);
        self.content.resize(usize::try_from(first).unwrap_or(0), 0);
        let read = object.read_exact(&mut self.content);
        read.map_err(|e| fail(Box::new(e)))?;
        Ok(Box::new(object))
    }
}

fn entry_kind(node: &Node) -> Option<EntryKind> {
    Some(match &node.kind {
        Kind::Dir => EntryKind::Dir,
        Kind::File { size, .. } => EntryKind::File { size: *size },
        Kind::Symlink { target } => EntryKind::Symlink {
            target: target.clone(),
        },
        Kind::Char { major, minor } => EntryKind::Char {
            major: *major,
            minor: *minor,
        },
        Kind::Block { major, minor } => EntryKind::Block {
            major: *major,
            minor: *minor,
        },
        Kind::Fifo => EntryKind::Fifo,
        Kind::Socket => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The key of what comes into a folder of this mode below one that is as it was.
    fn key(mode: u32, files: &[&str]) -> Digest {
        let mut before = Tree::new();
        before.insert("a", Node::dir(0o755)).unwrap();
        before.insert("a/b", Node::dir(mode)).unwrap();
        let mut after = before.clone();
        for name in files {
            let kind = Kind::File {
                digest: Digest::of(name),
                size: 1,
            };
            after
                .insert(format!("a/b/{name}"), Node::plain(0o644, kind))
                .unwrap();
        }
        let delta = Delta::between(&before, &after);
        delta.whole().unwrap().key()
    }

    #[test]
    fn a_layers_key_says_all_that_is_in_it_and_the_folders_above() {
        assert_eq!(key(0o755, &["x", "y"]), key(0o755, &["x", "y"]));
        let others = [
            key(0o700, &["x", "y"]),
            key(0o755, &["x"]),
            key(0o755, &["x", "z"]),
        ];
        for other in others {
            assert_ne!(key(0o755, &["x", "y"]), other);
        }
    }
}

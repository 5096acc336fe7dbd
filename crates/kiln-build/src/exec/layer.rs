//! What changed between two trees, as a layer.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek};
use std::path::Path;

use kiln_model::Digest;
use kiln_oci::blob::{BlobWrite, BlobWriteError, Expected};
use kiln_oci::layer::{Entry, EntryKind, LayerWriteError, LayerWriter};
use kiln_store::Store;
use kiln_store::tree::{ChangeKind, Kind, Node, Tree, diff};
use serde::{Deserialize, Serialize};

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
    #[error("can't write a layer below {folder}")]
    Scratch {
        folder: String,
        #[source]
        cause: io::Error,
    },
    #[error(transparent)]
    Write(#[from] LayerWriteError),
    #[error("the content of {path} is not in the store")]
    Content {
        path: String,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(transparent)]
    Blob(#[from] BlobWriteError),
}

/// Writes what `after` has and `before` hasn't; `None`: nothing changed. `scratch` is a
/// folder for a temporary file.
pub fn write(
    before: &Tree,
    after: &Tree,
    store: &Store,
    scratch: &Path,
) -> Result<Option<LayerRef>, LayerError> {
    let changes = diff(before, after);
    if changes.is_empty() {
        return Ok(None);
    }
    let fail = |cause| LayerError::Scratch {
        folder: scratch.display().to_string(),
        cause,
    };
    let file = tempfile::tempfile_in(scratch).map_err(fail)?;
    let mut writer = LayerWriter::new(file, None)?;
    let names = first_names(after);
    let mut written = BTreeMap::new();
    let mut gone: Option<Vec<u8>> = None;
    for change in changes {
        let path = change.path;
        match change.kind {
            ChangeKind::Removed(_) => {
                // What lay in a folder that is gone, or is something else now, goes with it.
                let below = |folder: &Vec<u8>| {
                    path.len() > folder.len()
                        && path.starts_with(folder)
                        && path[folder.len()] == b'/'
                };
                if !gone.as_ref().is_some_and(below) {
                    writer.whiteout(&path)?;
                    gone = Some(path);
                }
            }
            ChangeKind::Added(node) => {
                add(&mut writer, store, &path, &node, &names, &mut written)?;
            }
            ChangeKind::Modified { before, after, .. } => {
                if before.is_dir() && !after.is_dir() {
                    gone = Some(path.clone());
                }
                add(&mut writer, store, &path, &after, &names, &mut written)?;
            }
        }
    }
    let (layer, mut file) = writer.finish()?;
    file.rewind().map_err(fail)?;
    let expected = Expected {
        digest: layer.digest,
        size: layer.size,
    };
    if !store.contains(&layer.digest).unwrap_or(false) {
        store.write(Some(expected), &mut file)?;
    }
    Ok(Some(LayerRef {
        digest: layer.digest,
        size: layer.size,
        diff_id: layer.diff_id,
    }))
}

/// For every path with other names (hard links): a number they share.
fn first_names(tree: &Tree) -> BTreeMap<Vec<u8>, kiln_store::tree::InodeId> {
    tree.walk()
        .filter(|item| item.links > 1 && !item.node.is_dir())
        .map(|item| (item.path, item.inode))
        .collect()
}

fn add<W: io::Write>(
    writer: &mut LayerWriter<W>,
    store: &Store,
    path: &[u8],
    node: &Node,
    names: &BTreeMap<Vec<u8>, kiln_store::tree::InodeId>,
    written: &mut BTreeMap<kiln_store::tree::InodeId, Vec<u8>>,
) -> Result<(), LayerError> {
    let mut kind = match &node.kind {
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
        // A layer can't hold a socket; it means nothing without its process.
        Kind::Socket => return Ok(()),
    };
    if let Some(inode) = names.get(path) {
        match written.get(inode) {
            Some(first) => {
                kind = EntryKind::Hardlink {
                    target: first.clone(),
                };
            }
            None => {
                written.insert(*inode, path.to_vec());
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
    let mut content: Box<dyn Read> = match (&entry.kind, &node.kind) {
        (EntryKind::File { .. }, Kind::File { digest, .. }) => {
            let fail = |cause: Box<dyn std::error::Error + Send + Sync>| LayerError::Content {
                path: String::from_utf8_lossy(path).into_owned(),
                cause,
            };
            let object = store.open_object(digest).map_err(|e| fail(Box::new(e)))?;
            let object = object.ok_or_else(|| fail(digest.to_string().into()))?;
            Box::new(object)
        }
        _ => Box::new(io::empty()),
    };
    writer.entry(&entry, &mut content)?;
    Ok(())
}

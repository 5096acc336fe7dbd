//! Puts layers on trees (image-spec v1.1, layer.md).

use std::io::Read;

use kiln_model::Digest;
use kiln_oci::layer::{Entry, EntryKind, LayerItem, LayerReader, Limits, Whiteouts};

use crate::tree::{Kind, LayerChange, MAX_METADATA_BYTES, Metadata, Mtime, Node, Tree};
use crate::{Store, StoreError};

impl Store {
    /// What `layer` makes of `base`. Contents become objects. The layer's uncompressed
    /// digest must be `diff_id`, if that is given.
    pub fn apply_layer(
        &self,
        base: &Tree,
        layer: &Digest,
        diff_id: Option<&Digest>,
    ) -> Result<Tree, StoreError> {
        let path = self.blob_path(layer);
        let blob = std::fs::File::open(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => StoreError::Missing {
                what: "the layer",
                digest: *layer,
            },
            _ => StoreError::io(&path)(e),
        })?;
        let bad = |cause: String| StoreError::BadLayer {
            layer: *layer,
            cause,
        };
        let mut reader = LayerReader::new(blob, Limits::IMAGE, Whiteouts::Interpret)
            .map_err(|e| bad(e.to_string()))?;
        let mut changes = Vec::new();
        let mut metadata = 0;
        while let Some(item) = reader.next_entry().map_err(|e| bad(e.to_string()))? {
            let change = match item {
                LayerItem::Whiteout { path } => LayerChange::Whiteout { path },
                LayerItem::OpaqueDir { path } => LayerChange::Opaque { path },
                LayerItem::Entry(entry) => {
                    let content = match entry.kind {
                        EntryKind::File { size } if size > 0 => {
                            self.put_object(&mut reader.by_ref().take(size))?
                        }
                        _ => (Digest::of(b""), 0),
                    };
                    change(entry, content)
                }
            };
            metadata += change.cost();
            if metadata > MAX_METADATA_BYTES {
                return Err(bad(format!(
                    "it has more than {MAX_METADATA_BYTES} bytes of metadata"
                )));
            }
            changes.push(change);
        }
        reader.finish(diff_id).map_err(|e| bad(e.to_string()))?;
        let mut tree = base.clone();
        tree.apply(changes).map_err(|e| bad(e.to_string()))?;
        Ok(tree)
    }
}

fn change(entry: Entry, (digest, size): (Digest, u64)) -> LayerChange {
    let kind = match entry.kind {
        EntryKind::Hardlink { target } => {
            return LayerChange::Link {
                path: entry.path,
                target,
            };
        }
        EntryKind::Dir => Kind::Dir,
        EntryKind::File { .. } => Kind::File { digest, size },
        EntryKind::Symlink { target } => Kind::Symlink { target },
        EntryKind::Char { major, minor } => Kind::Char { major, minor },
        EntryKind::Block { major, minor } => Kind::Block { major, minor },
        EntryKind::Fifo => Kind::Fifo,
    };
    let meta = Metadata {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: Mtime::seconds(entry.mtime),
        xattrs: entry.xattrs,
    };
    LayerChange::Node {
        path: entry.path,
        node: Node { meta, kind },
    }
}

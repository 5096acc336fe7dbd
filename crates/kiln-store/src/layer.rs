//! Layers into trees: content becomes objects, the rest [`LayerChange`]s.

use kiln_model::Digest;
use kiln_oci::BlobRead;
use kiln_oci::layer::{
    Entry, EntryKind, LayerItem, LayerReadError, LayerReader, Limits, Whiteouts,
};

use crate::batch::Batch;
use crate::layout::PathError;
use crate::store::{PutError, Store};
use crate::tree::{
    Kind, LayerChange, MAX_METADATA_BYTES, Metadata, Mtime, Node, Tree, TreeEditError,
};

/// Why a layer could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("layer {digest} is not in the store")]
    Missing { digest: Digest },
    #[error("layer {digest} could not be opened: {source}")]
    Open {
        digest: Digest,
        #[source]
        source: std::io::Error,
    },
    #[error("layer {digest} can't be used: {source}")]
    Read {
        digest: Digest,
        #[source]
        source: ChangesError,
    },
    #[error("layer {digest} can't be applied: {source}")]
    Apply {
        digest: Digest,
        #[source]
        source: TreeEditError,
    },
}

/// Why an archive could not be taken into the store.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    #[error(transparent)]
    Read(#[from] LayerReadError),
    #[error(transparent)]
    Store(#[from] PathError),
    #[error("its names, links and attributes take more than {MAX_METADATA_BYTES} bytes")]
    TooMuchMetadata,
}

impl Store {
    /// The tree that a layer blob makes of `base`. If `diff_id` is given, the layer's
    /// uncompressed content must have that digest.
    pub fn layer_tree(
        &self,
        base: &Tree,
        layer: &Digest,
        diff_id: Option<&Digest>,
    ) -> Result<Tree, LayerError> {
        let digest = *layer;
        let blob = BlobRead::open(self, layer)
            .map_err(|source| LayerError::Open { digest, source })?
            .ok_or(LayerError::Missing { digest })?;
        let changes = LayerReader::new(blob, Limits::IMAGE, Whiteouts::Interpret)
            .map_err(ChangesError::from)
            .and_then(|reader| self.import_changes(reader, diff_id))
            .map_err(|source| LayerError::Read { digest, source })?;
        let mut tree = base.clone();
        tree.apply(changes)
            .map_err(|source| LayerError::Apply { digest, source })?;
        Ok(tree)
    }

    /// Reads an archive to its end: the files' content becomes objects, and all that it
    /// says is given in order. For `ADD archive.tar` as well as for layers.
    pub fn import_changes(
        &self,
        mut reader: LayerReader<'_>,
        diff_id: Option<&Digest>,
    ) -> Result<Vec<LayerChange>, ChangesError> {
        let mut changes = Vec::new();
        let mut metadata = 0;
        let mut batch = self.batch();
        while let Some(item) = reader.next_entry()? {
            let change = match item {
                LayerItem::Whiteout { path } => LayerChange::Whiteout { path },
                LayerItem::OpaqueDir { path } => LayerChange::Opaque { path },
                LayerItem::Entry(entry) => import_entry(&mut batch, entry, &mut reader)?,
            };
            metadata += change.cost();
            if metadata > MAX_METADATA_BYTES {
                return Err(ChangesError::TooMuchMetadata);
            }
            changes.push(change);
        }
        reader.finish(diff_id)?;
        batch.finish()?;
        Ok(changes)
    }
}

fn import_entry(
    batch: &mut Batch<'_>,
    entry: Entry,
    reader: &mut LayerReader<'_>,
) -> Result<LayerChange, ChangesError> {
    let kind = match entry.kind {
        EntryKind::Hardlink { target } => {
            return Ok(LayerChange::Link {
                path: entry.path,
                target,
            });
        }
        EntryKind::File { size } => {
            let (digest, size) = batch.put(reader, size).map_err(unwrap)?;
            Kind::File { digest, size }
        }
        EntryKind::Dir => Kind::Dir,
        EntryKind::Symlink { target } => Kind::Symlink { target },
        EntryKind::Char { major, minor } => Kind::Char { major, minor },
        EntryKind::Block { major, minor } => Kind::Block { major, minor },
        EntryKind::Fifo => Kind::Fifo,
    };
    Ok(LayerChange::Node {
        path: entry.path,
        node: Node {
            meta: Metadata {
                mode: entry.mode,
                uid: entry.uid,
                gid: entry.gid,
                mtime: Mtime::seconds(entry.mtime),
                xattrs: entry.xattrs,
            },
            kind,
        },
    })
}

/// The reader hands its own error through `io::Error`.
fn unwrap(error: PutError) -> ChangesError {
    match error {
        PutError::Store(error) => error.into(),
        PutError::Source(error) => match error.downcast::<LayerReadError>() {
            Ok(error) => error.into(),
            Err(error) => LayerReadError::Io(error).into(),
        },
    }
}

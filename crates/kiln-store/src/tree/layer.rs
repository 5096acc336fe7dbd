use super::edit::is_linux_xattr;
use super::{Kind, Node, Tree, TreeEditError};

/// What one layer says about the tree below it (OCI image-spec v1.1, layer.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerChange {
    /// This is there now.
    Node { path: Vec<u8>, node: Node },
    /// This is another name of `target`.
    Link { path: Vec<u8>, target: Vec<u8> },
    /// What lower layers have at `path` is gone.
    Whiteout { path: Vec<u8> },
    /// What lower layers have in the directory `path` is gone.
    Opaque { path: Vec<u8> },
}

impl LayerChange {
    /// Bytes of metadata it holds; to bound a list of them.
    pub(crate) fn cost(&self) -> usize {
        match self {
            Self::Whiteout { path } | Self::Opaque { path } => path.len(),
            Self::Link { path, target } => path.len() + target.len(),
            Self::Node { path, node } => {
                let xattrs = node.meta.xattrs.iter();
                let target = match &node.kind {
                    Kind::Symlink { target } => target.len(),
                    _ => 0,
                };
                path.len() + target + xattrs.map(|(k, v)| k.len() + v.len()).sum::<usize>()
            }
        }
    }
}

impl Tree {
    /// Applies one layer, as container engines on overlayfs show it:
    /// - deletions first, whatever their place in the layer: they are about lower layers;
    /// - then the entries in order; of two with one path, the later counts;
    /// - a parent that is a symbolic link is followed inside the tree; a directory entry
    ///   *at* a symbolic link replaces it;
    /// - a character device 0:0 is a deletion;
    /// - extended attributes that Linux can't hold (those of macOS) are left out.
    ///
    /// On an error the tree is half changed: throw it away.
    pub fn apply(&mut self, layer: Vec<LayerChange>) -> Result<(), TreeEditError> {
        for change in &layer {
            match change {
                LayerChange::Whiteout { path } => {
                    self.remove(path)?;
                }
                LayerChange::Opaque { path } => self.clear(path)?,
                LayerChange::Node { .. } | LayerChange::Link { .. } => {}
            }
        }
        for change in layer {
            match change {
                LayerChange::Whiteout { .. } | LayerChange::Opaque { .. } => {}
                LayerChange::Link { path, target } => self.link(path, target)?,
                LayerChange::Node { path, node } if is_whiteout(&node.kind) => {
                    self.remove(path)?;
                }
                LayerChange::Node { path, mut node } => {
                    node.meta.xattrs.retain(|name, _| is_linux_xattr(name));
                    self.insert(path, node)?;
                }
            }
        }
        Ok(())
    }
}

fn is_whiteout(kind: &Kind) -> bool {
    matches!(kind, Kind::Char { major: 0, minor: 0 })
}

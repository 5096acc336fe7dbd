//! A stage's files: an image tree of the store, as something to copy from and into.

use std::io::Read;
use std::sync::Arc;

use kiln_store::Store;
use kiln_store::tree::{Kind as NodeKind, Metadata, Mtime, Node, Tree};

use crate::files::{FilesError, Inode, Kind, Meta, Shape, Source, Target, resolve, shown};

/// A tree and where its files' contents are.
#[derive(Clone)]
pub struct Rootfs {
    pub tree: Tree,
    pub store: Arc<Store>,
}

impl Rootfs {
    /// A small text file's content, links followed; empty if there is none.
    pub fn text(&self, path: &str, limit: u64) -> Result<String, FilesError> {
        let names = crate::files::names(path.as_bytes());
        let bytes = self.read(&names, limit)?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn joined(path: &[Vec<u8>]) -> Vec<u8> {
    path.join(&b'/')
}

pub(crate) fn meta(node: &Node) -> Meta {
    Meta {
        mode: node.meta.mode,
        uid: node.meta.uid,
        gid: node.meta.gid,
        mtime: node.meta.mtime.seconds,
        xattrs: node.meta.xattrs.clone(),
    }
}

fn shape(node: &Node) -> Shape {
    let device = |block, major: u32, minor: u32| Shape::Device {
        block,
        rdev: rustix::fs::makedev(major, minor),
    };
    match &node.kind {
        NodeKind::Dir => Shape::Folder,
        NodeKind::File { digest, size } => Shape::File {
            digest: *digest,
            size: *size,
        },
        NodeKind::Symlink { target } => Shape::Link(target.clone()),
        NodeKind::Char { major, minor } => device(false, *major, *minor),
        NodeKind::Block { major, minor } => device(true, *major, *minor),
        NodeKind::Fifo => Shape::Fifo,
        NodeKind::Socket => Shape::Socket,
    }
}

/// As the tree keeps it.
pub(crate) fn node(meta: Meta, kind: NodeKind) -> Node {
    Node {
        meta: Metadata {
            mode: meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            mtime: Mtime::seconds(meta.mtime),
            xattrs: meta.xattrs,
        },
        kind,
    }
}

/// A device's kind by its number (`st_rdev`).
pub(crate) fn device(block: bool, rdev: u64) -> NodeKind {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    match block {
        true => NodeKind::Block { major, minor },
        false => NodeKind::Char { major, minor },
    }
}

impl Source for Rootfs {
    fn kind(&self, path: &[Vec<u8>]) -> Option<Kind> {
        Some(match &self.tree.get(joined(path))?.kind {
            NodeKind::Dir => Kind::Folder,
            NodeKind::File { .. } => Kind::File,
            NodeKind::Symlink { target } => Kind::Link(target.clone()),
            _ => Kind::Other,
        })
    }

    fn list(&self, path: &[Vec<u8>]) -> Vec<(Vec<u8>, bool)> {
        match self.tree.children(joined(path)) {
            Ok(children) => children
                .map(|(name, node)| (name.to_vec(), node.is_dir()))
                .collect(),
            Err(_) => Vec::new(),
        }
    }

    fn inode(&self, path: &[Vec<u8>]) -> Option<Inode> {
        let id = self.tree.other_names(joined(path))?;
        Some((0, id.number()))
    }

    fn entry(&self, path: &[Vec<u8>]) -> Result<(Meta, Shape), FilesError> {
        let node = self.tree.get(joined(path));
        let node = node.ok_or_else(|| FilesError::NotFound(shown(path)))?;
        Ok((meta(node), shape(node)))
    }
}

impl Target for Rootfs {
    fn put(&mut self, path: &[Vec<u8>], meta: Meta, shape: Shape) -> Result<(), FilesError> {
        let fail = |cause| FilesError::Write {
            path: shown(path),
            cause: Box::new(cause),
        };
        let kind = match shape {
            Shape::Same(first) => {
                return self.tree.link(joined(path), joined(&first)).map_err(fail);
            }
            Shape::Folder => NodeKind::Dir,
            Shape::File { digest, size } => NodeKind::File { digest, size },
            Shape::Link(target) => NodeKind::Symlink { target },
            Shape::Fifo => NodeKind::Fifo,
            Shape::Socket => NodeKind::Socket,
            Shape::Device { block, rdev } => device(block, rdev),
        };
        self.tree
            .insert(joined(path), node(meta, kind))
            .map_err(fail)
    }

    fn read(&self, path: &[Vec<u8>], limit: u64) -> Result<Option<Vec<u8>>, FilesError> {
        let real = resolve(self, path, true)?;
        let Some(NodeKind::File { digest, size }) = self.tree.get(joined(&real)).map(|n| &n.kind)
        else {
            return Ok(None);
        };
        let fail = |cause: Box<dyn std::error::Error + Send + Sync>| FilesError::Read {
            path: shown(path),
            cause,
        };
        if *size > limit {
            return Err(fail(format!("it has more than {limit} bytes").into()));
        }
        let mut bytes = Vec::new();
        let object = self
            .store
            .open_object(digest)
            .map_err(|e| fail(Box::new(e)))?;
        object
            .ok_or_else(|| fail("its content is not in the store".into()))?
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(|e| fail(Box::new(e)))?;
        Ok(Some(bytes))
    }
}

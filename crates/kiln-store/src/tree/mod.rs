//! An image's files as one tree in memory: what [`crate::erofs`] writes and reads, what
//! layers are applied to, and what `kiln diff` compares.
//!
//! Nothing in here touches a file system. Paths are bytes; a lookup goes component by
//! component through the model, follows symbolic links inside it, and treats `..` at
//! the root as the root, so that no archive can lead outside. Content is only named
//! (digest and size); the store keeps it as an object.
//!
//! Invariants:
//! - The root is a directory and always there.
//! - Every name is 1 to [`MAX_NAME_BYTES`] bytes without `/` and NUL, and is not `.` or
//!   `..`; every path is at most [`MAX_PATH_BYTES`] long and [`MAX_DEPTH`] deep.
//! - Only what is not a directory has more than one name.
//! - There are at most [`MAX_ENTRIES`] names and [`MAX_METADATA_BYTES`] of metadata.

mod diff;
mod edit;
mod layer;
mod lookup;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use kiln_model::Digest;

pub use diff::{Aspect, Change, ChangeKind, diff};
pub use edit::TreeEditError;
pub use layer::LayerChange;
pub use lookup::{LookupError, Walk, WalkItem};

/// Longest name, in bytes (Linux NAME_MAX).
pub const MAX_NAME_BYTES: usize = 255;
/// Longest path, and longest symbolic link's target, in bytes (Linux PATH_MAX less NUL).
pub const MAX_PATH_BYTES: usize = 4095;
/// Most components of a path: what fits in [`MAX_PATH_BYTES`] with one byte each.
pub const MAX_DEPTH: usize = 2048;
/// Most names in one tree. The largest images in use have under one million.
pub const MAX_ENTRIES: usize = 4_000_000;
/// Most bytes of names, link targets and extended attributes in one tree.
pub const MAX_METADATA_BYTES: usize = 512 << 20;
/// Most symbolic links followed in one lookup (as Linux does).
pub const MAX_LINK_HOPS: usize = 40;
/// Longest value of an extended attribute that an image can hold, in bytes.
pub const MAX_XATTR_VALUE_BYTES: usize = 65535;
/// Most bytes of one file's extended attributes, names and values together.
pub const MAX_XATTRS_BYTES: usize = 128 << 10;
/// Largest file, in bytes: one chunk of EROFS's largest chunk size.
pub const MAX_FILE_BYTES: u64 = 8 << 40;
/// Device numbers end here (Linux: 12 bits major, 20 bits minor).
pub const MAX_DEVICE: (u32, u32) = (0xfff, 0xf_ffff);

/// Seconds since the Unix epoch and nanoseconds (under 1,000,000,000).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mtime {
    pub seconds: i64,
    pub nanos: u32,
}

impl Mtime {
    pub const fn seconds(seconds: i64) -> Self {
        Self { seconds, nanos: 0 }
    }
}

/// What every kind of node has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits with setuid, setgid and sticky: at most 0o7777.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Mtime,
    /// By full name (`security.capability`).
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Dir,
    /// Content is the object `digest`, `size` bytes long.
    File {
        digest: Digest,
        size: u64,
    },
    /// The target is kept as written; it may lead anywhere.
    Symlink {
        target: Vec<u8>,
    },
    /// Never 0:0, which is overlayfs's deletion mark.
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
}

/// One file system object; several names may stand for it (hard links).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub meta: Metadata,
    pub kind: Kind,
}

impl Node {
    /// A directory with nothing special about it.
    pub fn dir(mode: u32) -> Self {
        Self::plain(mode, Kind::Dir)
    }

    /// A node owned by root, of time 0 and without extended attributes.
    pub fn plain(mode: u32, kind: Kind) -> Self {
        let meta = Metadata {
            mode,
            ..Metadata::default()
        };
        Self { meta, kind }
    }

    pub fn is_dir(&self) -> bool {
        self.kind == Kind::Dir
    }
}

/// Names that share one of these are hard links of each other. Only meaningful within
/// one tree, and until it is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(u32);

impl InodeId {
    /// For telling inodes apart where the type is not known.
    pub fn number(self) -> u64 {
        self.0.into()
    }

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Inode {
    pub(crate) node: Node,
    /// Ordered by name bytes; empty unless a directory.
    pub(crate) children: BTreeMap<Box<[u8]>, InodeId>,
    /// Number of names; 0: a free slot.
    pub(crate) links: u32,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Tree {
    /// The first is the root.
    inodes: Vec<Inode>,
    free: Vec<InodeId>,
    entries: usize,
    metadata_bytes: usize,
}

pub(crate) const ROOT: InodeId = InodeId(0);

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// An empty root directory, mode 0755, time 0.
    pub fn new() -> Self {
        let root = Inode {
            node: Node::dir(0o755),
            children: BTreeMap::new(),
            links: 1,
        };
        Self {
            inodes: vec![root],
            free: Vec::new(),
            entries: 0,
            metadata_bytes: 0,
        }
    }

    /// Names in the tree, the root not counted.
    pub fn len(&self) -> usize {
        self.entries
    }

    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// The root directory's node.
    pub fn root(&self) -> &Node {
        &self.inode(ROOT).node
    }

    pub(crate) fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.index()]
    }

    /// Every node once, however many names it has, in no order.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = &Node> {
        let used = self.inodes.iter().filter(|inode| inode.links > 0);
        used.map(|inode| &inode.node)
    }

    pub(crate) fn inode_slots(&self) -> usize {
        self.inodes.len()
    }
}

/// Equal when every path has an equal node and the same names are linked together.
impl PartialEq for Tree {
    fn eq(&self, other: &Self) -> bool {
        if self.entries != other.entries {
            return false;
        }
        let mut linked: BTreeMap<InodeId, InodeId> = BTreeMap::new();
        self.walk().zip(other.walk()).all(|(a, b)| {
            a.path == b.path
                && a.node == b.node
                && a.links == b.links
                && *linked.entry(a.inode).or_insert(b.inode) == b.inode
        })
    }
}

impl Eq for Tree {}

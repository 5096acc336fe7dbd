//! What the image holds, before where: inodes in their order, directories cut into
//! blocks, attributes encoded.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::LazyLock;

use kiln_model::Digest;

use super::{
    BLOCK, COMPACT, DIRENT, EXTENDED, MAX_TAIL, XATTR_ENTRY, XATTR_ESCAPED, XATTR_HEADER,
    XATTR_METACOPY, XATTR_OPAQUE, XATTR_OVERLAY, XATTR_PREFIXES, XATTR_REDIRECT, encode_device,
    is_fan_out,
};
use crate::tree::{Inode, Kind, Metadata, Mtime, Node, ROOT, Tree};

/// The names of the object folders, `00` to `ff`.
static FAN_OUT: [[u8; 2]; 256] = {
    let digits = *b"0123456789abcdef";
    let mut names = [[0; 2]; 256];
    let mut i = 0;
    while i < 256 {
        names[i] = [digits[i / 16], digits[i % 16]];
        i += 1;
    }
    names
};

static WHITEOUT: Node = Node {
    meta: Metadata {
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: Mtime::seconds(0),
        xattrs: BTreeMap::new(),
    },
    kind: Kind::Char { major: 0, minor: 0 },
};

/// Bytes of what a file with content has, if nothing else: nearly every inode of an image.
static XATTRS_OF_A_FILE: LazyLock<usize> = LazyLock::new(|| {
    let kind = Kind::File {
        digest: Digest::of(""),
        size: 1,
    };
    encode_xattrs(&Node::plain(0, kind), false).len()
});

/// One inode of the image.
pub(super) struct Planned<'a> {
    pub(super) node: &'a Node,
    pub(super) links: u32,
    pub(super) compact: bool,
    /// Bytes of [`Planned::xattrs`]: of all inodes they would take as much memory as the image.
    xattrs: usize,
    opaque: bool,
    pub(super) data: Data<'a>,
    /// Number of the directory that holds it; the root's is its own.
    parent: usize,
}

pub(super) enum Data<'a> {
    None,
    /// A hole of this many bytes; the content is an object.
    Hole(u64),
    Device(u32),
    Link(&'a [u8]),
    Dir(Directory<'a>),
}

/// A directory's entries, block by block.
#[derive(Default)]
pub(super) struct Directory<'a> {
    pub(super) blocks: Vec<Vec<DirEntry<'a>>>,
    /// Bytes in use of the last block.
    last: usize,
}

pub(super) struct DirEntry<'a> {
    pub(super) name: &'a [u8],
    /// Number in the plan.
    pub(super) inode: usize,
}

impl Planned<'_> {
    /// Bytes before its data: the inode and its attributes.
    pub(super) fn head(&self) -> usize {
        self.inode_size() + self.xattrs
    }

    /// The attributes' bytes as they follow the inode; empty if there are none.
    pub(super) fn xattrs(&self) -> Vec<u8> {
        match self.xattrs {
            0 => Vec::new(),
            _ => encode_xattrs(self.node, self.opaque),
        }
    }

    pub(super) fn inode_size(&self) -> usize {
        if self.compact { COMPACT } else { EXTENDED }
    }

    /// Size of its data as `stat` shows it.
    pub(super) fn size(&self) -> u64 {
        match &self.data {
            Data::None | Data::Device(_) => 0,
            Data::Hole(size) => *size,
            Data::Link(target) => target.len() as u64,
            Data::Dir(dir) => (dir.blocks.len().saturating_sub(1) * BLOCK + dir.last) as u64,
        }
    }

    /// Bytes of its data that lie right behind it, in the same block.
    pub(super) fn tail(&self) -> usize {
        match &self.data {
            Data::Link(target) if target.len() <= MAX_TAIL => target.len(),
            Data::Dir(dir) if dir.last <= MAX_TAIL => dir.last,
            _ => 0,
        }
    }

    /// Its data in blocks of their own.
    pub(super) fn blocks(&self) -> usize {
        let whole = match &self.data {
            Data::Link(_) => 1,
            Data::Dir(dir) => dir.blocks.len(),
            Data::None | Data::Hole(_) | Data::Device(_) => return 0,
        };
        whole - usize::from(self.tail() > 0)
    }
}

/// The most frequent mtime; of equals the earliest.
pub(super) fn epoch(tree: &Tree) -> Mtime {
    let mut counts: BTreeMap<Mtime, u64> = BTreeMap::new();
    for node in tree.nodes() {
        *counts.entry(node.meta.mtime).or_default() += 1;
    }
    let mut best = (Mtime::default(), 0);
    for (mtime, count) in counts {
        if count > best.1 {
            best = (mtime, count);
        }
    }
    best.0
}

/// Every inode once, in the image's order.
pub(super) fn plan(tree: &Tree, epoch: Mtime) -> Vec<Planned<'_>> {
    let root = tree.inode(ROOT);
    let marks: Vec<&[u8]> = (FAN_OUT.iter().map(<[u8; 2]>::as_slice))
        .filter(|name| !root.children.contains_key(*name))
        .collect();
    let mut plan = vec![planned(root, 0, false)];
    if !marks.is_empty() {
        let data = Data::Device(0);
        plan.push(Planned {
            node: &WHITEOUT,
            links: u32::try_from(marks.len()).unwrap_or(u32::MAX),
            compact: false,
            xattrs: 0,
            opaque: false,
            data,
            parent: 0,
        });
    }
    let mut numbers: Vec<Option<usize>> = vec![None; tree.inode_slots()];
    let mut queue = VecDeque::from([(ROOT, 0)]);
    while let Some((id, here)) = queue.pop_front() {
        let mut entries = Vec::with_capacity(tree.inode(id).children.len() + 2);
        let mut folders = 0;
        for (name, child) in &tree.inode(id).children {
            let inode = tree.inode(*child);
            let number = match numbers[child.index()] {
                Some(number) => number,
                None => {
                    let opaque = here == 0 && is_fan_out(name) && inode.node.is_dir();
                    plan.push(planned(inode, here, opaque));
                    plan.len() - 1
                }
            };
            numbers[child.index()] = Some(number);
            if inode.node.is_dir() {
                folders += 1;
                queue.push_back((*child, number));
            }
            entries.push(DirEntry {
                name,
                inode: number,
            });
        }
        if here == 0 {
            entries.extend(marks.iter().map(|name| DirEntry { name, inode: 1 }));
        }
        plan[here].links = folders + 2;
        plan[here].data = Data::Dir(directory(entries, here, plan[here].parent));
    }
    for inode in &mut plan {
        inode.compact = is_compact(inode, epoch);
    }
    plan
}

fn planned(inode: &Inode, parent: usize, opaque: bool) -> Planned<'_> {
    let data = match &inode.node.kind {
        Kind::File { size: 0, .. } | Kind::Fifo | Kind::Socket => Data::None,
        Kind::File { size, .. } => Data::Hole(*size),
        Kind::Symlink { target } => Data::Link(target),
        Kind::Char { major, minor } | Kind::Block { major, minor } => {
            Data::Device(encode_device(*major, *minor))
        }
        Kind::Dir => Data::Dir(Directory::default()),
    };
    Planned {
        node: &inode.node,
        links: inode.links,
        compact: false,
        xattrs: xattrs_len(&inode.node, opaque),
        opaque,
        data,
        parent,
    }
}

fn is_compact(inode: &Planned<'_>, epoch: Mtime) -> bool {
    let meta = &inode.node.meta;
    meta.mtime == epoch
        && meta.uid <= 0xffff
        && meta.gid <= 0xffff
        && inode.links <= 0xffff
        && inode.size() <= u64::from(u32::MAX)
}

/// Sorts the entries and fills blocks with them, one after the other.
fn directory<'a>(mut entries: Vec<DirEntry<'a>>, here: usize, parent: usize) -> Directory<'a> {
    entries.push(DirEntry {
        name: b".",
        inode: here,
    });
    entries.push(DirEntry {
        name: b"..",
        inode: parent,
    });
    entries.sort_unstable_by_key(|entry| entry.name);
    let mut dir = Directory::default();
    let mut block = Vec::new();
    for entry in entries {
        let size = DIRENT + entry.name.len();
        if dir.last + size > BLOCK {
            dir.blocks.push(std::mem::take(&mut block));
            dir.last = 0;
        }
        dir.last += size;
        block.push(entry);
    }
    dir.blocks.push(block);
    dir
}

/// Bytes of [`encode_xattrs`].
fn xattrs_len(node: &Node, opaque: bool) -> usize {
    match &node.kind {
        _ if opaque || !node.meta.xattrs.is_empty() => encode_xattrs(node, opaque).len(),
        Kind::File { size, .. } if *size > 0 => *XATTRS_OF_A_FILE,
        _ => 0,
    }
}

fn encode_xattrs(node: &Node, opaque: bool) -> Vec<u8> {
    let mut all: Vec<(Cow<'_, [u8]>, &[u8])> = Vec::new();
    for (name, value) in &node.meta.xattrs {
        let name = match name.strip_prefix(XATTR_OVERLAY) {
            Some(rest) => Cow::Owned([XATTR_ESCAPED, rest].concat()),
            None => Cow::Borrowed(name.as_slice()),
        };
        all.push((name, value));
    }
    let redirect = match &node.kind {
        Kind::File { digest, size } if *size > 0 => object_redirect(digest),
        _ => String::new(),
    };
    if !redirect.is_empty() {
        all.push((XATTR_METACOPY.into(), b""));
        all.push((XATTR_REDIRECT.into(), redirect.as_bytes()));
    }
    if opaque {
        all.push((XATTR_OPAQUE.into(), b"y"));
    }
    if all.is_empty() {
        return Vec::new();
    }
    all.sort_unstable();
    // Header: no name filter, nothing shared.
    let mut bytes = vec![0; XATTR_HEADER];
    for (name, value) in all {
        let (index, suffix) = split_xattr_name(&name);
        // The tree's limits keep both lengths in range.
        bytes.push(u8::try_from(suffix.len()).unwrap_or(u8::MAX));
        bytes.push(index);
        bytes.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend_from_slice(suffix);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(XATTR_ENTRY), 0);
    }
    bytes
}

fn split_xattr_name(name: &[u8]) -> (u8, &[u8]) {
    for (index, prefix) in XATTR_PREFIXES {
        if let Some(suffix) = name.strip_prefix(prefix) {
            return (index, suffix);
        }
    }
    (0, name)
}

/// Where overlayfs finds an object, from the objects folder.
fn object_redirect(digest: &Digest) -> String {
    let mut path = String::with_capacity(66);
    let hex = digest.hex();
    for part in ["/", &hex[..2], "/", &hex[2..]] {
        path.push_str(part);
    }
    path
}

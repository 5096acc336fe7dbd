use std::collections::{HashMap, VecDeque};

use kiln_model::Digest;

use super::{
    BLOCK, CHUNK_BASED, COMPACT, DIRENT, EXTENDED, FEATURE_INCOMPAT_CHUNKED, FLAT_INLINE,
    FLAT_PLAIN, FORMAT, MAGIC, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG,
    S_IFSOCK, SLOT, SUPERBLOCK, SUPERBLOCK_MAGIC, XATTR_ENTRY, XATTR_ESCAPED, XATTR_HEADER,
    XATTR_METACOPY, XATTR_OPAQUE, XATTR_OVERLAY, XATTR_PREFIXES, XATTR_REDIRECT, decode_device,
    is_fan_out,
};
use crate::tree::{Kind, MAX_ENTRIES, MAX_PATH_BYTES, Metadata, Mtime, Node, Tree, TreeEditError};

/// Why bytes are no tree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ErofsReadError {
    #[error("it is no image tree of kiln")]
    NotATree,
    #[error(
        "it has format {found}; this kiln knows {FORMAT}: use the kiln that wrote it, or a newer one"
    )]
    Format { found: u32 },
    #[error("it is damaged: at byte {offset}, {problem}")]
    Damaged {
        offset: usize,
        problem: &'static str,
    },
    #[error("it holds what no tree may: {0}")]
    Tree(#[from] TreeEditError),
}

/// The tree of a metadata image that [`super::write`] made. Bytes from elsewhere are
/// refused or give some tree, but never more work than their length allows.
pub fn read(image: &[u8]) -> Result<Tree, ErofsReadError> {
    let image = Image(image);
    if image.0.get(..MAGIC.len()) != Some(MAGIC) {
        return Err(ErofsReadError::NotATree);
    }
    let found = image.u32(MAGIC.len())?;
    if found != FORMAT {
        return Err(ErofsReadError::Format { found });
    }
    if image.u32(SUPERBLOCK)? != SUPERBLOCK_MAGIC
        || image.u32(SUPERBLOCK + 80)? != FEATURE_INCOMPAT_CHUNKED
    {
        return Err(damaged(SUPERBLOCK, "there is no superblock of kiln's"));
    }
    let epoch = Mtime {
        seconds: image.u64(SUPERBLOCK + 24)?.cast_signed(),
        nanos: image.u32(SUPERBLOCK + 32)?,
    };
    let root = u64::from(image.u16(SUPERBLOCK + 14)?);
    Reader {
        image,
        epoch,
        tree: Tree::new(),
        seen: HashMap::new(),
        entries: 0,
    }
    .read(root)
}

fn damaged(offset: usize, problem: &'static str) -> ErofsReadError {
    ErofsReadError::Damaged { offset, problem }
}

#[derive(Clone, Copy)]
struct Image<'a>(&'a [u8]);

impl<'a> Image<'a> {
    fn bytes(self, offset: usize, length: usize) -> Result<&'a [u8], ErofsReadError> {
        offset
            .checked_add(length)
            .and_then(|end| self.0.get(offset..end))
            .ok_or_else(|| damaged(offset, "something lies beyond its end"))
    }

    fn array<const N: usize>(self, offset: usize) -> Result<[u8; N], ErofsReadError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(offset, N)?);
        Ok(array)
    }

    fn u16(self, offset: usize) -> Result<u16, ErofsReadError> {
        self.array(offset).map(u16::from_le_bytes)
    }

    fn u32(self, offset: usize) -> Result<u32, ErofsReadError> {
        self.array(offset).map(u32::from_le_bytes)
    }

    fn u64(self, offset: usize) -> Result<u64, ErofsReadError> {
        self.array(offset).map(u64::from_le_bytes)
    }
}

/// An extended attribute.
struct Xattr<'a> {
    prefix: &'static [u8],
    suffix: &'a [u8],
    value: &'a [u8],
}

impl Xattr<'_> {
    fn is(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix) == Some(self.suffix)
    }
}

/// One inode's fields.
struct RawInode<'a> {
    offset: usize,
    layout: u16,
    mode: u32,
    links: u32,
    uid: u32,
    gid: u32,
    mtime: Mtime,
    size: u64,
    union: u32,
    xattrs: Vec<Xattr<'a>>,
    /// Where its tail is.
    tail: usize,
}

struct Reader<'a> {
    image: Image<'a>,
    epoch: Mtime,
    tree: Tree,
    /// The first path of every directory, and of what has several names.
    seen: HashMap<u64, Vec<u8>>,
    entries: usize,
}

impl<'a> Reader<'a> {
    fn read(mut self, root: u64) -> Result<Tree, ErofsReadError> {
        let raw = self.inode(root)?;
        if raw.mode & S_IFMT != S_IFDIR {
            return Err(damaged(raw.offset, "the root is not a directory"));
        }
        self.seen.insert(root, Vec::new());
        let mut queue = VecDeque::from([(Vec::new(), raw)]);
        while let Some((path, raw)) = queue.pop_front() {
            for (name, number) in self.dir_entries(&raw)? {
                if name == b"." || name == b".." {
                    continue;
                }
                if name.contains(&b'/') {
                    return Err(damaged(raw.offset, "a name has a slash"));
                }
                let child = [&path[..], b"/", name].concat();
                if let Some(first) = self.seen.get(&number) {
                    self.tree.link(&child, first)?;
                    continue;
                }
                let inode = self.inode(number)?;
                if path.is_empty() && is_fan_out(name) && is_whiteout(&inode) {
                    continue;
                }
                let folder = inode.mode & S_IFMT == S_IFDIR;
                if folder || inode.links != 1 {
                    self.seen.insert(number, child.clone());
                }
                if folder {
                    queue.push_back((child, inode));
                } else {
                    let node = self.node(inode)?;
                    self.tree.insert(&child, node)?;
                }
            }
            let node = self.node(raw)?;
            self.tree.insert(&path, node)?;
        }
        Ok(self.tree)
    }

    fn inode(&self, number: u64) -> Result<RawInode<'a>, ErofsReadError> {
        let offset = usize::try_from(number)
            .ok()
            .and_then(|number| number.checked_mul(SLOT))
            .ok_or_else(|| damaged(SUPERBLOCK, "an inode's number is too large"))?;
        let image = self.image;
        let format = image.u16(offset)?;
        let extended = format & 1 == 1;
        let head = if extended { EXTENDED } else { COMPACT };
        image.bytes(offset, head)?;
        let (xattrs, xattr_bytes) = self.xattrs(offset + head, image.u16(offset + 2)?)?;
        let mut raw = RawInode {
            offset,
            layout: format >> 1,
            mode: u32::from(image.u16(offset + 4)?),
            links: u32::from(image.u16(offset + 6)?),
            uid: u32::from(image.u16(offset + 24)?),
            gid: u32::from(image.u16(offset + 26)?),
            mtime: self.epoch,
            size: u64::from(image.u32(offset + 8)?),
            union: image.u32(offset + 16)?,
            xattrs,
            tail: offset + head + xattr_bytes,
        };
        if extended {
            raw.size = image.u64(offset + 8)?;
            raw.uid = image.u32(offset + 24)?;
            raw.gid = image.u32(offset + 28)?;
            raw.mtime = Mtime {
                seconds: image.u64(offset + 32)?.cast_signed(),
                nanos: image.u32(offset + 40)?,
            };
            raw.links = image.u32(offset + 44)?;
        }
        Ok(raw)
    }

    /// The attributes at `offset`, and how many bytes they take.
    fn xattrs(&self, offset: usize, count: u16) -> Result<(Vec<Xattr<'a>>, usize), ErofsReadError> {
        let mut found = Vec::new();
        if count == 0 {
            return Ok((found, 0));
        }
        let length = XATTR_HEADER + (usize::from(count) - 1) * XATTR_ENTRY;
        let bytes = Image(self.image.bytes(offset, length)?);
        if bytes.0[4] != 0 {
            return Err(damaged(
                offset,
                "it shares attributes, which kiln never does",
            ));
        }
        let mut at = XATTR_HEADER;
        while at < length {
            let [name_length, index] = bytes.array(at)?;
            let value_length = usize::from(bytes.u16(at + 2)?);
            let suffix = bytes.bytes(at + XATTR_ENTRY, usize::from(name_length))?;
            let value = bytes.bytes(at + XATTR_ENTRY + suffix.len(), value_length)?;
            let (_, prefix) = XATTR_PREFIXES
                .iter()
                .find(|(i, _)| *i == index)
                .ok_or_else(|| damaged(offset + at, "an attribute has an unknown prefix"))?;
            found.push(Xattr {
                prefix,
                suffix,
                value,
            });
            at += (XATTR_ENTRY + suffix.len() + value_length).next_multiple_of(XATTR_ENTRY);
        }
        Ok((found, length))
    }

    /// The data of a directory or link, in pieces of at most one block.
    fn data(&self, raw: &RawInode<'_>) -> Result<Vec<&'a [u8]>, ErofsReadError> {
        let wrong = |problem| damaged(raw.offset, problem);
        let size = usize::try_from(raw.size).map_err(|_| wrong("its size is too large"))?;
        if size == 0 || size > self.image.0.len() {
            return Err(wrong("its size is 0 or more than the whole image"));
        }
        let (blocks, tail) = match raw.layout {
            FLAT_PLAIN => (size.div_ceil(BLOCK), 0),
            FLAT_INLINE => ((size - 1) / BLOCK, size - (size - 1) / BLOCK * BLOCK),
            _ => return Err(wrong("its data is laid out in a way kiln does not use")),
        };
        let mut pieces = Vec::with_capacity(blocks + 1);
        for block in 0..blocks {
            let at = (raw.union as usize + block)
                .checked_mul(BLOCK)
                .ok_or_else(|| wrong("its block's number is too large"))?;
            let length = BLOCK.min(size - block * BLOCK);
            pieces.push(self.image.bytes(at, length)?);
        }
        if tail > 0 {
            pieces.push(self.image.bytes(raw.tail, tail)?);
        }
        Ok(pieces)
    }

    fn dir_entries(&mut self, raw: &RawInode<'_>) -> Result<Vec<(&'a [u8], u64)>, ErofsReadError> {
        let mut entries = Vec::new();
        for block in self.data(raw)? {
            let block = Image(block);
            let names_at = usize::from(block.u16(8)?);
            let count = names_at / DIRENT;
            // Bounds the work even where blocks are shared by many directories.
            self.entries += count;
            if count == 0 || names_at % DIRENT != 0 || self.entries > 2 * MAX_ENTRIES {
                return Err(damaged(raw.offset, "a directory's entries are no entries"));
            }
            for index in 0..count {
                let start = usize::from(block.u16(index * DIRENT + 8)?);
                let end = match index + 1 < count {
                    true => usize::from(block.u16((index + 1) * DIRENT + 8)?),
                    false => block.0.len(),
                };
                let name = (block.0.get(start..end))
                    .ok_or_else(|| damaged(raw.offset, "a name lies outside its block"))?;
                let name = name.split(|b| *b == 0).next().unwrap_or_default();
                entries.push((name, block.u64(index * DIRENT)?));
            }
        }
        Ok(entries)
    }

    fn node(&self, raw: RawInode<'_>) -> Result<Node, ErofsReadError> {
        let wrong = |problem| damaged(raw.offset, problem);
        let (major, minor) = decode_device(raw.union);
        let kind = match raw.mode & S_IFMT {
            S_IFDIR => Kind::Dir,
            S_IFREG if raw.size == 0 => Kind::File {
                digest: Digest::of(b""),
                size: 0,
            },
            S_IFREG if raw.layout == CHUNK_BASED => Kind::File {
                digest: (raw.xattrs.iter().find(|xattr| xattr.is(XATTR_REDIRECT)))
                    .and_then(|xattr| object_digest(xattr.value))
                    .ok_or_else(|| wrong("a file names no object"))?,
                size: raw.size,
            },
            S_IFREG => {
                return Err(wrong(
                    "a file has content of its own, which kiln never writes",
                ));
            }
            S_IFLNK if raw.size > MAX_PATH_BYTES as u64 => {
                return Err(wrong("a symbolic link is longer than a path may be"));
            }
            S_IFLNK => Kind::Symlink {
                target: self.data(&raw)?.concat(),
            },
            S_IFCHR => Kind::Char { major, minor },
            S_IFBLK => Kind::Block { major, minor },
            S_IFIFO => Kind::Fifo,
            S_IFSOCK => Kind::Socket,
            _ => return Err(wrong("its file type is none")),
        };
        let own = [XATTR_METACOPY, XATTR_REDIRECT, XATTR_OPAQUE];
        let others = raw.xattrs.iter();
        let others = others.filter(|xattr| !own.iter().any(|name| xattr.is(name)));
        let xattrs = others.map(|xattr| {
            let name = [xattr.prefix, xattr.suffix].concat();
            let name = match name.strip_prefix(XATTR_ESCAPED) {
                Some(rest) => [XATTR_OVERLAY, rest].concat(),
                None => name,
            };
            (name, xattr.value.to_vec())
        });
        Ok(Node {
            meta: Metadata {
                mode: raw.mode & !S_IFMT,
                uid: raw.uid,
                gid: raw.gid,
                mtime: raw.mtime,
                xattrs: xattrs.collect(),
            },
            kind,
        })
    }
}

fn is_whiteout(raw: &RawInode<'_>) -> bool {
    raw.mode & S_IFMT == S_IFCHR && raw.union == 0
}

/// The inverse of the writer's `/ab/cdef…`.
fn object_digest(redirect: &[u8]) -> Option<Digest> {
    let [b'/', a, b, b'/', rest @ ..] = redirect else {
        return None;
    };
    let mut digits = [0; 64];
    digits[..2].copy_from_slice(&[*a, *b]);
    digits.get_mut(2..)?.copy_from_slice(rest.get(..62)?);
    let whole = (rest.len() == 62).then_some(digits)?;
    Digest::from_hex(std::str::from_utf8(&whole).ok()?).ok()
}

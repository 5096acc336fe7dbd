use super::plan::{Data, DirEntry, Planned, epoch, plan};
use super::{
    BLOCK, CHUNK_BASED, CHUNK_BITS, DIRENT, FEATURE_COMPAT_MTIME, FEATURE_INCOMPAT_CHUNKED,
    FIRST_INODE, FLAT_INLINE, FLAT_PLAIN, FORMAT, MAGIC, NULL_CHUNK, S_IFBLK, S_IFCHR, S_IFDIR,
    S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK, SLOT, SUPERBLOCK, SUPERBLOCK_MAGIC, XATTR_ENTRY,
    XATTR_HEADER,
};
use crate::tree::{Kind, Mtime, Tree};

/// Why a tree has no metadata image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ErofsWriteError {
    #[error("the image's metadata takes {blocks} blocks of 4 KiB, more than EROFS can number")]
    TooLarge { blocks: usize },
}

/// Where an inode lies.
struct Place {
    /// In bytes.
    offset: usize,
    /// Its first block, if it has blocks.
    block: usize,
}

/// The metadata image of `tree`, as [the module](super) says.
pub fn write(tree: &Tree) -> Result<Vec<u8>, ErofsWriteError> {
    let epoch = epoch(tree);
    let plan = plan(tree, epoch);
    let (places, blocks) = place(&plan);
    let block_count = u32::try_from(blocks).map_err(|_| ErofsWriteError::TooLarge { blocks })?;
    let mut image = vec![0; blocks * BLOCK];
    superblock(&mut image, plan.len() as u64, block_count, epoch);
    for (number, inode) in plan.iter().enumerate() {
        write_inode(&mut image, inode, &places[number], number);
        write_data(&mut image, inode, &places[number], &plan, &places);
    }
    Ok(image)
}

/// Where everything lies, and the blocks of the whole image.
fn place(plan: &[Planned<'_>]) -> (Vec<Place>, usize) {
    let mut places = Vec::with_capacity(plan.len());
    let mut end = FIRST_INODE;
    for inode in plan {
        let mut offset = end.next_multiple_of(SLOT);
        while (offset + inode.head()) % BLOCK + inode.tail() > BLOCK {
            offset += SLOT;
        }
        places.push(Place { offset, block: 0 });
        end = offset + inode.head() + inode.tail();
        if matches!(inode.data, Data::Hole(_)) {
            end += size_of::<u32>();
        }
    }
    let mut block = end.div_ceil(BLOCK);
    for (place, inode) in places.iter_mut().zip(plan) {
        place.block = block;
        block += inode.blocks();
    }
    (places, block)
}

/// Little-endian fields, one after the other.
struct Fields<'a> {
    image: &'a mut [u8],
    at: usize,
}

impl Fields<'_> {
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.image[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
        self
    }

    fn u8(&mut self, value: u8) -> &mut Self {
        self.put(&[value])
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    fn skip(&mut self, bytes: usize) -> &mut Self {
        self.at += bytes;
        self
    }
}

fn superblock(image: &mut [u8], inodes: u64, blocks: u32, epoch: Mtime) {
    let mut fields = Fields { image, at: 0 };
    fields.put(MAGIC).u32(FORMAT);
    fields.at = SUPERBLOCK;
    fields
        .u32(SUPERBLOCK_MAGIC)
        .u32(0) // checksum
        .u32(FEATURE_COMPAT_MTIME)
        .u8(12) // log2 of the block size
        .u8(0)
        .u16((FIRST_INODE / SLOT) as u16) // root
        .u64(inodes)
        .u64(epoch.seconds.cast_unsigned())
        .u32(epoch.nanos)
        .u32(blocks)
        .u32(0) // first block of inodes
        .u32(0) // first block of shared attributes
        .skip(16 + 16) // uuid, volume name
        .u32(FEATURE_INCOMPAT_CHUNKED);
}

fn write_inode(image: &mut [u8], inode: &Planned<'_>, place: &Place, number: usize) {
    let (layout, union) = match &inode.data {
        Data::None => (FLAT_PLAIN, 0),
        Data::Hole(_) => (CHUNK_BASED, CHUNK_BITS),
        Data::Device(device) => (FLAT_PLAIN, *device),
        // `write` has checked that block numbers fit.
        Data::Link(_) | Data::Dir(_) => {
            let layout = match inode.tail() {
                0 => FLAT_PLAIN,
                _ => FLAT_INLINE,
            };
            let block = match inode.blocks() {
                0 => 0,
                _ => place.block as u32,
            };
            (layout, block)
        }
    };
    let xattrs = inode.xattrs();
    let xattr_count = match xattrs.len() {
        0 => 0,
        bytes => 1 + (bytes - XATTR_HEADER) / XATTR_ENTRY,
    };
    let meta = &inode.node.meta;
    let mode = (file_type(&inode.node.kind) | meta.mode) as u16;
    let format = layout << 1 | u16::from(!inode.compact);
    let mut fields = Fields {
        image,
        at: place.offset,
    };
    fields.u16(format).u16(xattr_count as u16).u16(mode);
    if inode.compact {
        fields
            .u16(inode.links as u16)
            .u32(inode.size() as u32)
            .u32(0)
            .u32(union)
            .u32(number as u32 + 1)
            .u16(meta.uid as u16)
            .u16(meta.gid as u16)
            .u32(0);
    } else {
        fields
            .u16(0)
            .u64(inode.size())
            .u32(union)
            .u32(number as u32 + 1)
            .u32(meta.uid)
            .u32(meta.gid)
            .u64(meta.mtime.seconds.cast_unsigned())
            .u32(meta.mtime.nanos)
            .u32(inode.links)
            .skip(16);
    }
    fields.put(&xattrs);
}

fn write_data(
    image: &mut [u8],
    inode: &Planned<'_>,
    place: &Place,
    plan: &[Planned<'_>],
    places: &[Place],
) {
    let tail_at = place.offset + inode.head();
    let at = |index: usize| {
        if index < inode.blocks() {
            (place.block + index) * BLOCK
        } else {
            tail_at
        }
    };
    match &inode.data {
        Data::None | Data::Device(_) => {}
        Data::Hole(_) => {
            Fields { image, at: tail_at }.u32(NULL_CHUNK);
        }
        Data::Link(target) => {
            Fields { image, at: at(0) }.put(target);
        }
        Data::Dir(dir) => {
            for (index, block) in dir.blocks.iter().enumerate() {
                write_dir_block(image, at(index), block, plan, places);
            }
        }
    }
}

fn write_dir_block(
    image: &mut [u8],
    at: usize,
    entries: &[DirEntry<'_>],
    plan: &[Planned<'_>],
    places: &[Place],
) {
    let mut fields = Fields { image, at };
    let mut name_at = entries.len() * DIRENT;
    for entry in entries {
        fields
            .u64((places[entry.inode].offset / SLOT) as u64)
            .u16(name_at as u16)
            .u8(dirent_type(&plan[entry.inode].node.kind))
            .u8(0);
        name_at += entry.name.len();
    }
    for entry in entries {
        fields.put(entry.name);
    }
}

fn file_type(kind: &Kind) -> u32 {
    match kind {
        Kind::Dir => S_IFDIR,
        Kind::File { .. } => S_IFREG,
        Kind::Symlink { .. } => S_IFLNK,
        Kind::Char { .. } => S_IFCHR,
        Kind::Block { .. } => S_IFBLK,
        Kind::Fifo => S_IFIFO,
        Kind::Socket => S_IFSOCK,
    }
}

/// Linux's `FT_*`.
fn dirent_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File { .. } => 1,
        Kind::Dir => 2,
        Kind::Char { .. } => 3,
        Kind::Block { .. } => 4,
        Kind::Fifo => 5,
        Kind::Socket => 6,
        Kind::Symlink { .. } => 7,
    }
}

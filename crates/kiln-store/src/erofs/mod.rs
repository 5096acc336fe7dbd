//! The metadata image of a tree: an EROFS file system without compression and without
//! content, made so that overlayfs finds the content in the objects folder (the layout
//! that composefs uses). Written and read by kiln itself, so that the same tree gives
//! the same bytes on every machine.
//!
//! # Format, version 1
//! EROFS as in Linux `fs/erofs/erofs_fs.h` (mounts on 5.16 and later), little endian,
//! 4096-byte blocks:
//! - 0: `KILNTREE`, then the version as u32, then zeros. EROFS leaves these first 1024
//!   bytes to others.
//! - 1024: the superblock. Feature flags: `MTIME`, `CHUNKED_FILE`. No checksum, uuid or
//!   volume name: the image is named by its sha256. `build_time` is the tree's most
//!   frequent mtime (the earliest of equals).
//! - 1152: the inodes, each at a multiple of 32 bytes: the root, the deletion marks'
//!   (below), then breadth first, siblings in name order. Compact (32 bytes) where owner,
//!   size and links fit and the mtime is `build_time`; else extended (64 bytes). Extended
//!   attributes follow inline, in the order of their full names, never shared. Then: a
//!   directory's or symbolic link's tail of at most [`MAX_TAIL`] bytes, moved so that it
//!   lies within one block.
//! - From the next block: full blocks of directories, and longer tails, in the order of
//!   their inodes.
//!
//! A file with content is a hole of its size (one null chunk of 8 TiB), with
//! `trusted.overlay.metacopy` (empty; a digest for fs-verity may come later) and
//! `trusted.overlay.redirect` = `/ab/cdef…`, its object. An empty file has neither.
//! `trusted.overlay.*` of the image itself is written as `trusted.overlay.overlay.*`,
//! which overlayfs shows under its own name (Linux 6.7 and later; before, not at all).
//!
//! The root also has 256 names `00` to `ff` that are overlayfs deletion marks, all one
//! inode: before Linux 6.5 there are no data-only layers, and without these marks the
//! object folders would show. Where the image has such a name itself it keeps it, with
//! `trusted.overlay.opaque` if it is a directory.

mod plan;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use reader::{ErofsReadError, read};
pub use writer::{ErofsWriteError, write};

/// First bytes of every image.
const MAGIC: &[u8; 8] = b"KILNTREE";
/// The version of the format that this module describes.
pub const FORMAT: u32 = 1;

const BLOCK: usize = 4096;
const SUPERBLOCK: usize = 1024;
const SUPERBLOCK_MAGIC: u32 = 0xe0f5_e1e2;
const FIRST_INODE: usize = SUPERBLOCK + 128;
/// Inode numbers count these from the image's start.
const SLOT: usize = 32;
const FEATURE_COMPAT_MTIME: u32 = 2;
const FEATURE_INCOMPAT_CHUNKED: u32 = 4;
const COMPACT: usize = 32;
const EXTENDED: usize = 64;
const XATTR_HEADER: usize = 12;
const XATTR_ENTRY: usize = 4;
const DIRENT: usize = 12;
/// Longest tail kept beside its inode; longer ones get a block, for less waste.
pub const MAX_TAIL: usize = 2048;
/// log2 of a chunk's blocks: the largest that the format has, 8 TiB a chunk.
const CHUNK_BITS: u32 = 31;
const NULL_CHUNK: u32 = u32::MAX;

/// `i_format`'s data layouts.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const CHUNK_BASED: u16 = 4;

/// File types in modes.
const S_IFMT: u32 = 0o170_000;
const S_IFIFO: u32 = 0o010_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFSOCK: u32 = 0o140_000;

/// Attribute name prefixes by their index.
const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

const XATTR_METACOPY: &[u8] = b"trusted.overlay.metacopy";
const XATTR_REDIRECT: &[u8] = b"trusted.overlay.redirect";
const XATTR_OPAQUE: &[u8] = b"trusted.overlay.opaque";
const XATTR_OVERLAY: &[u8] = b"trusted.overlay.";
const XATTR_ESCAPED: &[u8] = b"trusted.overlay.overlay.";

/// Is `name` that of an object folder?
fn is_fan_out(name: &[u8]) -> bool {
    let digit = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
    name.len() == 2 && name.iter().all(digit)
}

/// Linux's 32-bit device number (`new_encode_dev`), which EROFS keeps.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn decode_device(device: u32) -> (u32, u32) {
    (
        (device >> 8) & 0xfff,
        (device & 0xff) | ((device >> 12) & 0xf_ff00),
    )
}

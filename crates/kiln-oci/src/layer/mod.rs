//! Layers: tar streams of file system entries (image-spec v1.1, layer.md).
//!
//! [`LayerWriter`] makes the bytes of a layer from entries, the same ones each time;
//! [`LayerReader`] takes bytes from anywhere and gives validated entries. Neither
//! touches a file system.
//!
//! # What a written layer looks like
//! POSIX ustar headers, in the caller's order. Owners are numbers only. A PAX header
//! comes before an entry exactly when ustar cannot say it: names over 100 bytes,
//! extended attributes (`SCHILY.xattr.*`), ids over 2097151, sizes of 8 GiB and more,
//! times before 1970. Two zero blocks end it. It is compressed as one zstd frame at
//! level 2 by one thread, with zstd's content checksum, fed in pieces of 128 KiB.
//! zstd's output may change with its version: the golden test in this module tells.
//!
//! # What a reader takes
//! ustar, GNU and PAX tar, uncompressed, gzip, zstd or xz. Sparse files, multi-volume
//! archives and entry types of other systems are refused by name. Repeated paths are
//! passed on in order: as in tar, the later one counts.

mod compression;
mod path;
mod pax;
mod reader;
pub(crate) mod ustar;
mod writer;

use std::collections::BTreeMap;

pub use compression::{Compression, decompress};
pub use path::PathProblem;
pub use reader::{LayerReadError, LayerReader, Limits, Whiteouts};
pub use writer::{LayerWriteError, LayerWriter, WrittenLayer};

/// Longest path, and longest symbolic link target, in bytes (Linux PATH_MAX).
pub const MAX_PATH_BYTES: usize = 4095;
/// Longest component of a path, in bytes (Linux NAME_MAX).
pub const MAX_NAME_BYTES: usize = 255;
/// Longest extended attribute's value, in bytes (Linux XATTR_SIZE_MAX).
pub const MAX_XATTR_BYTES: usize = 65536;

/// One thing in a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the root, components divided by one `/`, without `.` and `..`, no
    /// slash at either end. Empty: the root itself. Not always UTF-8.
    pub path: Vec<u8>,
    pub kind: EntryKind,
    /// Permission bits with setuid, setgid and sticky: at most 0o7777.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the Unix epoch; fractions are dropped downwards.
    pub mtime: i64,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    Dir,
    /// `size` bytes of content follow.
    File {
        size: u64,
    },
    /// The target is kept as it is written: it may be absolute and lead anywhere.
    Symlink {
        target: Vec<u8>,
    },
    /// Another name for the entry at `target`, a path like [`Entry::path`].
    Hardlink {
        target: Vec<u8>,
    },
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// What a layer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerItem {
    Entry(Entry),
    /// What lower layers have at `path` is gone. It says nothing about this layer's
    /// own entries, whatever their order.
    Whiteout {
        path: Vec<u8>,
    },
    /// Whatever lower layers have inside the folder `path` is gone.
    OpaqueDir {
        path: Vec<u8>,
    },
}

#[cfg(test)]
mod tests;

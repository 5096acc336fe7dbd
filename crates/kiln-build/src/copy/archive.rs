//! ADD of local archives: tar, alone or within gzip, bzip2, xz or zstd, is unpacked.
//!
//! Invariants: no entry leads out of the destination, whatever its name or its links
//! say; memory holds names and metadata only, content streams into the sink.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read};

use kiln_model::Digest;

use super::{Changes, CopyError, Item};
use crate::files::{self, FilesError, Meta, Names, Shape, Target, shown};

/// An archive's greatest number of entries.
pub const MAX_ENTRIES: usize = 2_000_000;

/// What an archive may hold when unpacked, in bytes.
pub const MAX_UNPACKED: u64 = 64 << 30;

/// Contents are padded to a multiple of it.
const BLOCK: u64 = 512;

/// The longest name or link target, in bytes.
const MAX_PATH: usize = 4096;

/// What may stand between two entries' contents, in bytes: headers with long names and
/// extended attributes (64 KiB each in Linux), which are read into memory.
const MAX_HEADERS: u64 = 1 << 20;

/// Names, links and attributes of all entries together, in bytes.
const MAX_METADATA: usize = 128 << 20;

const SPARSE: &str = "it has a file with holes as POSIX's format has them; tar without --sparse, \
     or with --format=gnu, writes it whole";

/// Why an archive can't be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("the archive can't be read")]
    Read(#[source] io::Error),
    #[error("the entry `{0}` leads out of the archive's folder")]
    Escape(String),
    #[error("the entry `{0}` is of a kind that can't be unpacked")]
    Kind(String),
    #[error("the entry `{0}` has a name or link longer than {MAX_PATH} bytes")]
    LongName(String),
    #[error("the archive has more than {MAX_ENTRIES} entries")]
    TooMany,
    #[error("the archive's content is larger than {MAX_UNPACKED} bytes")]
    TooLarge,
    #[error(
        "the archive's names and extended attributes are larger than {MAX_METADATA} bytes together"
    )]
    TooMuchMetadata,
}

/// Keeps a file's content, of so many bytes.
pub type Sink<'a> = dyn FnMut(&mut dyn Read, u64) -> io::Result<(Digest, u64)> + 'a;

/// Reads an archive's entries; `None`: it is no archive.
pub fn read(content: impl Read, sink: &mut Sink<'_>) -> Result<Option<Vec<Item>>, ArchiveError> {
    let mut content = BufReader::with_capacity(64 << 10, content);
    let start = content.fill_buf().map_err(ArchiveError::Read)?;
    match start {
        [0x1f, 0x8b, ..] => entries(flate2::bufread::MultiGzDecoder::new(content), sink),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            entries(xz2::bufread::XzDecoder::new_multi_decoder(content), sink)
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = zstd::Decoder::with_buffer(content).map_err(ArchiveError::Read)?;
            entries(decoder, sink)
        }
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => {
            entries(bzip2::bufread::MultiBzDecoder::new(content), sink)
        }
        _ => entries(content, sink),
    }
}

fn entries(content: impl Read, sink: &mut Sink<'_>) -> Result<Option<Vec<Item>>, ArchiveError> {
    let left = Cell::new(MAX_HEADERS);
    let mut archive = tar::Archive::new(Metered {
        content,
        left: &left,
    });
    let mut reading = Reading::default();
    let entries = archive.entries().map_err(ArchiveError::Read)?;
    for entry in entries {
        let mut entry = match entry {
            Ok(entry) => {
                // Its content, padded, and the headers after it.
                let content = entry.size().saturating_add(BLOCK);
                left.set(content.saturating_add(MAX_HEADERS));
                entry
            }
            // What doesn't begin like a tar is a file like any other.
            Err(_) if reading.items.is_empty() && !reading.begun => return Ok(None),
            Err(e) => return Err(ArchiveError::Read(e)),
        };
        reading.begun = true;
        reading.entry(&mut entry, sink)?;
    }
    Ok(reading.begun.then_some(reading.items))
}

/// Gives so many bytes at most: the tar reader keeps headers of any length in memory.
struct Metered<'a, R> {
    content: R,
    left: &'a Cell<u64>,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 {
            let told = format!("an entry has more than {MAX_HEADERS} bytes of headers");
            return Err(io::Error::other(told));
        }
        let room = out.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.content.read(&mut out[..room])?;
        self.left.set(left - count as u64);
        Ok(count)
    }
}

#[derive(Default)]
struct Reading {
    items: Vec<Item>,
    begun: bool,
    entries: usize,
    metadata: usize,
    total: u64,
}

impl Reading {
    fn entry(
        &mut self,
        entry: &mut tar::Entry<'_, impl Read>,
        sink: &mut Sink<'_>,
    ) -> Result<(), ArchiveError> {
        let name = entry.path_bytes().into_owned();
        let path = inside(&name)?;
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(ArchiveError::TooMany);
        }
        self.total = self.total.saturating_add(entry.size());
        if self.total > MAX_UNPACKED {
            return Err(ArchiveError::TooLarge);
        }
        let told = || String::from_utf8_lossy(&name).into_owned();
        let link = entry
            .link_name_bytes()
            .map(|l| l.into_owned())
            .unwrap_or_default();
        if link.len() > MAX_PATH {
            return Err(ArchiveError::LongName(told()));
        }
        let meta = meta(entry).map_err(ArchiveError::Read)?;
        let attributes = meta
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len());
        self.metadata += name.len() + link.len() + attributes.sum::<usize>();
        if self.metadata > MAX_METADATA {
            return Err(ArchiveError::TooMuchMetadata);
        }
        let kind = entry.header().entry_type();
        let shape = if kind.is_dir() {
            Shape::Folder
        } else if kind.is_symlink() {
            Shape::Link(link)
        } else if kind.is_hard_link() {
            Shape::Same(inside(&link)?)
        } else if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() {
            let size = entry.size();
            let (digest, size) = sink(entry, size).map_err(ArchiveError::Read)?;
            Shape::File { digest, size }
        } else if kind.is_fifo() {
            Shape::Fifo
        } else if kind.is_character_special() || kind.is_block_special() {
            let header = entry.header();
            let number = |n: io::Result<Option<u32>>| n.map(Option::unwrap_or_default);
            let major = number(header.device_major()).map_err(ArchiveError::Read)?;
            let minor = number(header.device_minor()).map_err(ArchiveError::Read)?;
            Shape::Device {
                block: kind.is_block_special(),
                rdev: rustix::fs::makedev(major, minor),
            }
        } else if kind.is_pax_global_extensions() {
            return Ok(());
        } else {
            return Err(ArchiveError::Kind(told()));
        };
        if path.is_empty() {
            // The archive's own root: the destination stays as it is.
            return Ok(());
        }
        self.items.push(Item { path, meta, shape });
        Ok(())
    }
}

/// An entry's path; one that climbs above the archive's root is refused.
fn inside(name: &[u8]) -> Result<Names, ArchiveError> {
    let told = || String::from_utf8_lossy(name).into_owned();
    if name.len() > MAX_PATH {
        return Err(ArchiveError::LongName(told()));
    }
    let mut depth = 0_i64;
    for part in name.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => depth -= 1,
            _ => depth += 1,
        }
        if depth < 0 {
            return Err(ArchiveError::Escape(told()));
        }
    }
    Ok(files::names(name))
}

fn meta(entry: &mut tar::Entry<'_, impl Read>) -> io::Result<Meta> {
    let mut xattrs = BTreeMap::new();
    let mut mtime = None;
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            let key = extension.key_bytes();
            if key.starts_with(b"GNU.sparse.") {
                // What stands there is a list of pieces, and the name is another.
                return Err(io::Error::other(SPARSE));
            }
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                xattrs.insert(name.to_vec(), extension.value_bytes().to_vec());
            } else if key == b"mtime" {
                let text = extension.value().unwrap_or_default();
                mtime = text.split('.').next().and_then(|secs| secs.parse().ok());
            }
        }
    }
    let header = entry.header();
    let raw = header.as_old();
    let number = |n, raw| said(n, raw).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    Ok(Meta {
        mode: said(header.mode(), &raw.mode)? & 0o7777,
        uid: number(header.uid(), &raw.uid)?,
        gid: number(header.gid(), &raw.gid)?,
        mtime: match mtime {
            Some(mtime) => mtime,
            None => i64::try_from(said(header.mtime(), &raw.mtime)?).unwrap_or(i64::MAX),
        },
        xattrs,
    })
}

/// A number, of which an empty field is 0: npm's packages have neither owner nor group.
fn said<N: Default>(number: io::Result<N>, raw: &[u8]) -> io::Result<N> {
    match raw.iter().all(|b| matches!(b, 0 | b' ')) {
        true => Ok(N::default()),
        false => number,
    }
}

/// Puts an archive's entries below `destination`, in place of what is there.
pub fn place(
    target: &mut (impl Target + ?Sized),
    items: &[Item],
    destination: &str,
    changes: &Changes,
) -> Result<(), CopyError> {
    let named = files::names(destination.as_bytes());
    super::make_folders(target, &named, &changes.made())?;
    let base = files::resolve(target, &named, true)?;
    // What the archive has no entry for is nobody's, as it is where docker unpacks.
    let between = Meta {
        mode: super::FOLDER_MODE,
        mtime: changes.made,
        ..Meta::default()
    };
    for item in items {
        let Some((name, parents)) = item.path.split_last() else {
            continue;
        };
        let mut path = within(target, &base, parents, true)?;
        super::make_folders(target, &path, &between)?;
        path.push(name.clone());
        let meta = changes.apply(item.meta.clone(), &item.shape);
        let mut shape = item.shape.clone();
        if let Shape::Same(first) = &item.shape {
            // Of a file before it in the archive, or of one that is there already.
            let first = within(target, &base, first, false)?;
            match target.kind(&first) {
                None => return Err(FilesError::NotFound(shown(&first)).into()),
                Some(files::Kind::Folder) => {
                    return Err(FilesError::IsAFolder(shown(&first)).into());
                }
                Some(_) => shape = Shape::Same(first),
            }
        }
        target.put(&path, meta, shape)?;
    }
    Ok(())
}

/// Where an entry's path leads: links on the way are followed, absolute ones from the
/// archive's folder on, but lead out of it no more than names do.
fn within(
    target: &(impl Target + ?Sized),
    base: &[Vec<u8>],
    path: &[Vec<u8>],
    last: bool,
) -> Result<Names, CopyError> {
    let real = files::resolve_below(target, base, path, last)?;
    match real.starts_with(base) {
        true => Ok(real),
        false => Err(CopyError::Outside {
            entry: shown(path),
            to: shown(&real),
        }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What comes of an archive's only entry after what was read before.
    fn next(mut before: Reading, name: &str, xattr: &[u8]) -> Result<usize, ArchiveError> {
        let mut builder = tar::Builder::new(Vec::new());
        let pair = [("SCHILY.xattr.user.x", xattr), ("path", name.as_bytes())];
        builder.append_pax_extensions(pair).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_size(1);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, &b"x"[..]).unwrap();
        let bytes = builder.into_inner().unwrap();
        let mut sink = |_: &mut dyn Read, size| Ok((Digest::of("x"), size));
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
        before.entry(&mut entry, &mut sink)?;
        Ok(before.items.len())
    }

    #[test]
    fn all_entries_together_are_bounded_in_number_length_and_what_is_said_of_them() {
        let read = |entries, metadata, total| Reading {
            entries,
            metadata,
            total,
            ..Reading::default()
        };
        let least = read(MAX_ENTRIES - 1, MAX_METADATA - 100, MAX_UNPACKED - 1);
        assert!(matches!(next(least, "a", b"v"), Ok(1)));
        let many = read(MAX_ENTRIES, 0, 0);
        assert!(matches!(next(many, "a", b"v"), Err(ArchiveError::TooMany)));
        let much = read(0, MAX_METADATA - 100, 0);
        let refused = next(much, "a", &[b'v'; 100]);
        assert!(matches!(refused, Err(ArchiveError::TooMuchMetadata)));
        let large = read(0, 0, MAX_UNPACKED);
        assert!(matches!(
            next(large, "a", b"v"),
            Err(ArchiveError::TooLarge)
        ));
        let long = "n/".repeat(MAX_PATH / 2) + "n";
        let refused = next(Reading::default(), &long, b"v");
        assert!(matches!(refused, Err(ArchiveError::LongName(_))));
        assert!(matches!(next(Reading::default(), &long[2..], b"v"), Ok(1)));
    }
}

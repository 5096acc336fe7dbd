//! Remembers the digests of a context's files by what `stat` says of them, so that a
//! build reads only what changed.
//!
//! # Format
//! One file a context folder, `cache/context/<digest of its path>`, version 2, numbers in
//! little endian: `KILNSTAT`, the version (u32), then for every file, in the order of their
//! paths, the length of its path (u32), its path, size (u64), mtime and ctime (i128
//! nanoseconds), inode and device (u64), and its content's sha256; at the end the sha256 of
//! all that. Every build reads it as a whole, which must take less time than looking at the
//! files does. It is only a cache: anything unreadable counts as empty.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_model::{Digest, Hasher};

use crate::files::Inode;

const MAGIC: &[u8; 12] = b"KILNSTAT\x02\0\0\0";

/// A file changed this shortly before it was hashed may change again within the same
/// tick of the file system's clock, unseen: it is not remembered. Nanoseconds.
const TOO_FRESH: i128 = 1_000_000_000;

/// What tells a file's states apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    size: u64,
    mtime: i128,
    ctime: i128,
    inode: u64,
    device: u64,
}

impl Stamp {
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn inode(&self) -> Inode {
        (self.device, self.inode)
    }

    pub fn of(meta: &fs::Metadata) -> Self {
        let nanos = |secs: i64, nanos: i64| i128::from(secs) * 1_000_000_000 + i128::from(nanos);
        Self {
            size: meta.len(),
            mtime: nanos(meta.mtime(), meta.mtime_nsec()),
            ctime: nanos(meta.ctime(), meta.ctime_nsec()),
            inode: meta.ino(),
            device: meta.dev(),
        }
    }
}

/// The remembered digests of one context folder.
pub struct StatCache {
    path: PathBuf,
    files: BTreeMap<Vec<u8>, (Stamp, Digest)>,
    changed: bool,
}

impl StatCache {
    /// Reads what is remembered of `folder` below `cache`.
    pub fn load(cache: &Path, folder: &Path) -> Self {
        let name = Digest::of(folder.as_os_str().as_bytes()).hex();
        let path = cache.join("context").join(name);
        let known = fs::read(&path).ok().and_then(|bytes| read(&bytes));
        Self {
            path,
            files: known.unwrap_or_default(),
            changed: false,
        }
    }

    /// The digest of the file's content, if it is still as it was.
    pub fn get(&self, path: &[u8], stamp: &Stamp) -> Option<Digest> {
        let (known, digest) = self.files.get(path)?;
        (known == stamp).then_some(*digest)
    }

    /// Remembers a digest; `now` in nanoseconds since the epoch.
    pub fn put(&mut self, path: Vec<u8>, stamp: Stamp, digest: Digest, now: i128) {
        if now - stamp.ctime.max(stamp.mtime) < TOO_FRESH {
            return;
        }
        self.files.insert(path, (stamp, digest));
        self.changed = true;
    }

    /// Writes it if anything is new, without what `exists` denies.
    pub fn save(&mut self, exists: impl Fn(&[u8]) -> bool) -> io::Result<()> {
        if !self.changed {
            return Ok(());
        }
        self.files.retain(|path, _| exists(path));
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        // Of many files it is long: it is not held in memory as a whole.
        let mut file = Hashed {
            file: BufWriter::new(tempfile::NamedTempFile::new_in(folder)?),
            hasher: Hasher::new(),
        };
        write(&mut file, &self.files)?;
        let Hashed { mut file, hasher } = file;
        file.write_all(hasher.finish().as_bytes())?;
        let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.persist(&self.path).map_err(|e| e.error)?;
        self.changed = false;
        Ok(())
    }
}

/// Writes and hashes.
struct Hashed<W> {
    file: W,
    hasher: Hasher,
}

impl<W: Write> Hashed<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.file.write_all(bytes)
    }
}

fn write<W: Write>(
    file: &mut Hashed<W>,
    files: &BTreeMap<Vec<u8>, (Stamp, Digest)>,
) -> io::Result<()> {
    file.put(MAGIC)?;
    for (path, (stamp, digest)) in files {
        let length = u32::try_from(path.len()).map_err(io::Error::other)?;
        file.put(&length.to_le_bytes())?;
        file.put(path)?;
        file.put(&stamp.size.to_le_bytes())?;
        file.put(&stamp.mtime.to_le_bytes())?;
        file.put(&stamp.ctime.to_le_bytes())?;
        file.put(&stamp.inode.to_le_bytes())?;
        file.put(&stamp.device.to_le_bytes())?;
        file.put(digest.as_bytes())?;
    }
    Ok(())
}

/// `None`: it is nothing that [`write`] wrote.
fn read(bytes: &[u8]) -> Option<BTreeMap<Vec<u8>, (Stamp, Digest)>> {
    let (content, sum) = bytes.split_last_chunk::<32>()?;
    if Digest::of(content).as_bytes() != sum {
        return None;
    }
    let mut rest = content.strip_prefix(MAGIC)?;
    let mut files = Vec::new();
    while !rest.is_empty() {
        let length = u32::from_le_bytes(take(&mut rest)?);
        let (path, after) = rest.split_at_checked(usize::try_from(length).ok()?)?;
        rest = after;
        let stamp = Stamp {
            size: u64::from_le_bytes(take(&mut rest)?),
            mtime: i128::from_le_bytes(take(&mut rest)?),
            ctime: i128::from_le_bytes(take(&mut rest)?),
            inode: u64::from_le_bytes(take(&mut rest)?),
            device: u64::from_le_bytes(take(&mut rest)?),
        };
        let digest = Digest::from_bytes(take(&mut rest)?);
        files.push((path.to_vec(), (stamp, digest)));
    }
    Some(files.into_iter().collect())
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_unchanged_and_settled_files_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        fs::write(&file, "one").unwrap();
        let stamp = Stamp::of(&fs::metadata(&file).unwrap());
        let digest = Digest::of("one");
        let mut cache = StatCache::load(folder.path(), Path::new("/ctx"));
        cache.put(b"fresh".to_vec(), stamp, digest, stamp.ctime + 1);
        cache.put(b"f".to_vec(), stamp, digest, stamp.ctime + TOO_FRESH);
        cache.put(
            b"\xff/gone".to_vec(),
            stamp,
            digest,
            stamp.ctime + TOO_FRESH,
        );
        cache.put(
            b"\xff/kept".to_vec(),
            stamp,
            digest,
            stamp.ctime + TOO_FRESH,
        );
        cache.save(|path| path != b"\xff/gone").unwrap();
        let cache = StatCache::load(folder.path(), Path::new("/ctx"));
        assert_eq!(cache.get(b"f", &stamp), Some(digest));
        assert_eq!(cache.get(b"\xff/kept", &stamp), Some(digest));
        assert_eq!(cache.get(b"\xff/gone", &stamp), None);
        assert_eq!(cache.get(b"fresh", &stamp), None);
        fs::write(&file, "two").unwrap();
        let changed = Stamp::of(&fs::metadata(&file).unwrap());
        assert_eq!(cache.get(b"f", &changed), None);
        let other = StatCache::load(folder.path(), Path::new("/other"));
        assert_eq!(other.get(b"f", &stamp), None);
    }
    #[test]
    fn what_is_damaged_counts_as_empty() {
        let folder = tempfile::tempdir().unwrap();
        let stamp = Stamp::of(&fs::metadata(folder.path()).unwrap());
        let mut cache = StatCache::load(folder.path(), Path::new("/ctx"));
        for name in ["a", "bc"] {
            let digest = Digest::of(name);
            cache.put(name.into(), stamp, digest, stamp.ctime + TOO_FRESH);
        }
        cache.save(|_| true).unwrap();
        let load = || StatCache::load(folder.path(), Path::new("/ctx"));
        assert_eq!(load().get(b"bc", &stamp), Some(Digest::of("bc")));
        let good = fs::read(&cache.path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&cache.path, &bad).unwrap();
            assert!(load().files.is_empty(), "changed at {at}");
            fs::write(&cache.path, &good[..at]).unwrap();
            assert!(load().files.is_empty(), "cut at {at}");
        }
        fs::write(&cache.path, &good).unwrap();
        assert_eq!(load().files.len(), 2);
    }
}

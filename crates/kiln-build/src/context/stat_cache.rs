//! Remembers the digests of a context's files by what `stat` says of them, so that a
//! build reads only what changed.
//!
//! On disk: one JSON file a context folder, `cache/context/<digest of its path>.json`,
//! `{"format":1,"files":{"<path>":[size,mtime,ctime,inode,device,"<digest>"]}}`, times in
//! nanoseconds. It is only a cache: anything unreadable counts as empty.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_model::Digest;
use serde::{Deserialize, Serialize};

use crate::files::Inode;

const FORMAT: u32 = 1;

/// A file changed this shortly before it was hashed may change again within the same
/// tick of the file system's clock, unseen: it is not remembered. Nanoseconds.
const TOO_FRESH: i128 = 1_000_000_000;

/// What tells a file's states apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

#[derive(Default, Serialize, Deserialize)]
struct Document {
    format: u32,
    files: BTreeMap<String, (Stamp, Digest)>,
}

/// The remembered digests of one context folder.
pub struct StatCache {
    path: PathBuf,
    files: BTreeMap<String, (Stamp, Digest)>,
    changed: bool,
}

impl StatCache {
    /// Reads what is remembered of `folder` below `cache`.
    pub fn load(cache: &Path, folder: &Path) -> Self {
        let name = Digest::of(folder.as_os_str().as_bytes()).hex();
        let path = cache.join("context").join(format!("{name}.json"));
        let document = fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Document>(&bytes).ok())
            .filter(|document| document.format == FORMAT)
            .unwrap_or_default();
        Self {
            path,
            files: document.files,
            changed: false,
        }
    }

    /// The digest of the file's content, if it is still as it was.
    pub fn get(&self, path: &[u8], stamp: &Stamp) -> Option<Digest> {
        let (known, digest) = self.files.get(&key(path))?;
        (known == stamp).then_some(*digest)
    }

    /// Remembers a digest; `now` in nanoseconds since the epoch.
    pub fn put(&mut self, path: &[u8], stamp: Stamp, digest: Digest, now: i128) {
        if now - stamp.ctime.max(stamp.mtime) < TOO_FRESH {
            return;
        }
        self.files.insert(key(path), (stamp, digest));
        self.changed = true;
    }

    /// Forgets what `exists` denies and writes the rest, if anything is new.
    pub fn save(&mut self, exists: impl Fn(&str) -> bool) -> io::Result<()> {
        let before = self.files.len();
        self.files.retain(|path, _| exists(path));
        if !self.changed && self.files.len() == before {
            return Ok(());
        }
        let document = Document {
            format: FORMAT,
            files: std::mem::take(&mut self.files),
        };
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let file = tempfile::NamedTempFile::new_in(folder)?;
        // Of many files it is long: it is not held in memory as a whole.
        let mut writer = BufWriter::new(file);
        let written = serde_json::to_writer(&mut writer, &document);
        self.files = document.files;
        written?;
        let file = writer
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.persist(&self.path).map_err(|e| e.error)?;
        self.changed = false;
        Ok(())
    }
}

/// Paths that are not UTF-8 are told apart by their hex form.
pub fn key(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(text) => text.to_owned(),
        Err(_) => format!("\0{}", hex::encode(path)),
    }
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
        cache.put(b"fresh", stamp, digest, stamp.ctime + 1);
        cache.put(b"f", stamp, digest, stamp.ctime + TOO_FRESH);
        cache.save(|_| true).unwrap();
        let cache = StatCache::load(folder.path(), Path::new("/ctx"));
        assert_eq!(cache.get(b"f", &stamp), Some(digest));
        assert_eq!(cache.get(b"fresh", &stamp), None);
        fs::write(&file, "two").unwrap();
        let changed = Stamp::of(&fs::metadata(&file).unwrap());
        assert_eq!(cache.get(b"f", &changed), None);
        let other = StatCache::load(folder.path(), Path::new("/other"));
        assert_eq!(other.get(b"f", &stamp), None);
    }
}

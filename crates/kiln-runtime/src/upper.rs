//! What a writable overlay layer says has changed
//! (overlayfs: whiteouts, opaque folders).

use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Deeper trees can't be named by one path anyway (PATH_MAX).
const MAX_DEPTH: usize = 2048;
/// Only one letter is looked for.
const XATTR_BYTES: usize = 16;

/// One entry of a writable layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Relative to the layer, without a leading `/`.
    pub path: PathBuf,
    pub kind: ChangeKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// Made, or changed: owner, mode, or what is below it. With `opaque`, nothing of
    /// the lower layers' folder is seen any more.
    Dir { opaque: bool },
    /// Made or changed: any other kind of file, whole.
    File,
    /// Not there any more.
    Deleted,
}

#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    #[error("cannot scan {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{0}: nested deeper than {MAX_DEPTH} folders")]
    TooDeep(PathBuf),
    #[error("{0}: a layer with metadata-only or redirected entries is not one of kiln's")]
    Foreign(PathBuf),
}

/// All entries of an overlay's upper folder, parents before children, siblings by
/// name. The overlay must be one that kiln mounts for writing (no metacopy, no
/// redirects) and not be mounted any more.
pub fn scan_upper(upper: &Path) -> Result<Vec<Change>, ScanError> {
    let mut changes = Vec::new();
    let mut todo = vec![(PathBuf::new(), 0)];
    while let Some((dir, depth)) = todo.pop() {
        if depth > MAX_DEPTH {
            return Err(ScanError::TooDeep(dir));
        }
        let mut below = Vec::new();
        for name in names(&upper.join(&dir))? {
            let path = dir.join(name);
            let change = look(upper, &path)?;
            if matches!(change.kind, ChangeKind::Dir { .. }) {
                below.push((path, depth + 1));
            }
            changes.push(change);
        }
        todo.extend(below);
    }
    changes.sort_by(|a, b| {
        a.path
            .as_os_str()
            .as_bytes()
            .cmp(b.path.as_os_str().as_bytes())
    });
    changes.sort_by(|a, b| components(&a.path).cmp(components(&b.path)));
    Ok(changes)
}

fn components(path: &Path) -> impl Iterator<Item = &[u8]> {
    path.iter().map(OsStr::as_bytes)
}

fn names(dir: &Path) -> Result<Vec<OsString>, ScanError> {
    let fail = |source| ScanError::Read {
        path: dir.to_owned(),
        source,
    };
    fs::read_dir(dir)
        .map_err(fail)?
        .map(|entry| entry.map(|e| e.file_name()).map_err(fail))
        .collect()
}

fn look(upper: &Path, path: &Path) -> Result<Change, ScanError> {
    let full = upper.join(path);
    let fail = |source| ScanError::Read {
        path: full.clone(),
        source,
    };
    let meta = fs::symlink_metadata(&full).map_err(fail)?;
    let attribute = |name: &str| has_attribute(&full, name).map_err(fail);
    let kind = if is_whiteout(&meta) {
        ChangeKind::Deleted
    } else if meta.is_dir() {
        if attribute("trusted.overlay.redirect")?.is_some() {
            return Err(ScanError::Foreign(full));
        }
        ChangeKind::Dir {
            opaque: attribute("trusted.overlay.opaque")?.as_deref() == Some(b"y"),
        }
    } else {
        let regular = meta.is_file();
        if regular && attribute("trusted.overlay.metacopy")?.is_some() {
            return Err(ScanError::Foreign(full));
        }
        // A file with this attribute, empty, in a folder marked `x`: a whiteout too.
        if regular && meta.len() == 0 && attribute("trusted.overlay.whiteout")?.is_some() {
            ChangeKind::Deleted
        } else {
            ChangeKind::File
        }
    };
    Ok(Change {
        path: path.to_owned(),
        kind,
    })
}

/// A character device 0:0.
fn is_whiteout(meta: &Metadata) -> bool {
    meta.file_type().is_char_device() && meta.rdev() == 0
}

fn has_attribute(path: &Path, name: &str) -> io::Result<Option<Vec<u8>>> {
    let mut value = [0; XATTR_BYTES];
    match rustix::fs::lgetxattr(path, name, &mut value) {
        Ok(length) => Ok(Some(value.get(..length).unwrap_or_default().to_vec())),
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(None),
        // Longer than anything looked for: it is there.
        Err(rustix::io::Errno::RANGE) => Ok(Some(Vec::new())),
        Err(e) => Err(e.into()),
    }
}

//! What an upper folder says was written, told as paths of the image.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use kiln_runtime::{ChangeKind, ScanError, scan_upper};
use kiln_store::tree::Tree;

use super::learn::Write;

/// Whether the image has a folder (no link) there.
pub fn is_folder(tree: &Tree, path: &str) -> bool {
    let path = path.trim_matches('/');
    path.is_empty() || tree.get(path).is_some_and(|node| node.is_dir())
}

/// Whether the image has nothing there, and no link on the way.
pub fn is_missing(tree: &Tree, path: &str) -> bool {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let above = folder.is_empty() || is_folder(tree, folder) || is_missing(tree, folder);
    above && tree.get(path.trim_matches('/')).is_none()
}

/// Makes a folder that the image lacks, as the runtime would. Those on the way that the
/// image has look as they do there.
pub fn make(upper: &Path, tree: &Tree, path: &str) -> io::Result<()> {
    let mut done = String::new();
    for name in path.trim_matches('/').split('/') {
        done = format!("{done}/{name}");
        let at = upper.join(done.trim_start_matches('/'));
        match fs::create_dir(&at) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            other => other?,
        }
        let (mode, uid, gid) = match tree.get(done.trim_start_matches('/')) {
            Some(node) => (node.meta.mode, node.meta.uid, node.meta.gid),
            None if matches!(path, "/tmp" | "/var/tmp") && done == path => (0o1777, 0, 0),
            None => (0o755, 0, 0),
        };
        std::os::unix::fs::chown(&at, Some(uid), Some(gid))?;
        fs::set_permissions(&at, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// The writes in `upper` over `tree`. A folder that is only on the way is none; one whose
/// owner or mode changed was written itself.
pub fn read(upper: &Path, tree: &Tree) -> Result<Vec<Write>, ScanError> {
    let mut writes = Vec::new();
    for change in scan_upper(upper)? {
        let path = format!("/{}", change.path.to_string_lossy());
        let stat = fs::symlink_metadata(upper.join(&change.path)).ok();
        let known = tree.get(path.trim_start_matches('/'));
        let size = match change.kind {
            ChangeKind::File => stat.as_ref().map_or(0, |s| s.blocks() * 512),
            ChangeKind::Dir { .. } | ChangeKind::Deleted => 0,
        };
        let same = match (&change.kind, known, &stat) {
            (ChangeKind::Dir { opaque: false }, Some(node), Some(stat)) if node.is_dir() => {
                let now = (stat.mode() & 0o7777, stat.uid(), stat.gid());
                if now != (node.meta.mode, node.meta.uid, node.meta.gid) {
                    writes.push(Write {
                        folder: path.clone(),
                        path: path.clone(),
                        size,
                    });
                }
                true
            }
            _ => false,
        };
        if same {
            continue;
        }
        let folder = nearest(tree, &path);
        writes.push(Write { path, folder, size });
    }
    Ok(writes)
}

/// The nearest folder above `path` that the image has.
fn nearest(tree: &Tree, path: &str) -> String {
    let mut at = path;
    while let Some((parent, _)) = at.rsplit_once('/') {
        if parent.is_empty() {
            break;
        }
        if is_folder(tree, parent) {
            return parent.to_owned();
        }
        at = parent;
    }
    "/".into()
}

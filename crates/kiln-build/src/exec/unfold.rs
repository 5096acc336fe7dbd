//! A tree written out as files: for mounts that a RUN may write to. What it writes there
//! is thrown away, or stays in a cache; it never is part of an image.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::Path;

use kiln_store::Store;
use kiln_store::tree::{Kind, Tree};

use super::ExecError;

/// Writes what is at `below` of the tree into the existing, empty `folder`.
pub(super) fn unfold(
    tree: &Tree,
    below: &[u8],
    store: &Store,
    folder: &Path,
) -> Result<(), ExecError> {
    let (root, _) = tree.resolve(below).map_err(ExecError::store)?;
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |cause| ExecError::Scratch { path, cause }
    };
    let walk = tree.walk_from(&root).map_err(ExecError::store)?;
    let mut times = Vec::new();
    for item in walk {
        let rest = item.path.get(root.len()..).unwrap_or_default();
        let rest = rest.strip_prefix(b"/").unwrap_or(rest);
        // A single file stands where the folder would.
        let path = match rest.is_empty() {
            true => folder.to_owned(),
            false => folder.join(std::ffi::OsStr::from_bytes(rest)),
        };
        let meta = &item.node.meta;
        let (uid, gid) = (Some(meta.uid), Some(meta.gid));
        match &item.node.kind {
            Kind::Dir => {
                if !rest.is_empty() {
                    fs::create_dir(&path).map_err(fail(&path))?;
                }
                chown(&path, uid, gid).map_err(fail(&path))?;
                times.push((path, meta.mode));
            }
            Kind::File { digest, .. } => {
                let content = store.open_object(digest).map_err(ExecError::store)?;
                let mut content = content.ok_or(ExecError::Lost(*digest))?;
                let mut file = fs::File::create_new(&path).map_err(fail(&path))?;
                io::copy(&mut content, &mut file).map_err(fail(&path))?;
                chown(&path, uid, gid).map_err(fail(&path))?;
                let mode = fs::Permissions::from_mode(meta.mode & 0o7777);
                fs::set_permissions(&path, mode).map_err(fail(&path))?;
            }
            Kind::Symlink { target } => {
                symlink(std::ffi::OsStr::from_bytes(target), &path).map_err(fail(&path))?;
                lchown(&path, uid, gid).map_err(fail(&path))?;
            }
            _ => {
                return Err(ExecError::Unsupported(format!(
                    "a writable mount of the device or pipe {}",
                    crate::files::shown(&crate::files::names(&item.path))
                )));
            }
        }
    }
    // A folder that may not be written to is filled first.
    for (path, mode) in times {
        let mode = fs::Permissions::from_mode(mode & 0o7777);
        fs::set_permissions(&path, mode).map_err(fail(&path))?;
    }
    Ok(())
}

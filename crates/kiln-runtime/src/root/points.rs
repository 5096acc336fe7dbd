//! Mount points the image lacks. A read-only root can't be given new folders, so
//! they are made in an extra lower layer on top of the image's tree; folders that
//! exist in the image are repeated there with the image's own owner, mode and time,
//! since in a merged folder the topmost layer's are seen.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use super::inside::{self, Resolved};

/// A place something will be mounted on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    pub target: String,
    pub is_dir: bool,
}

/// Why a mount point can't be made.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    #[error("cannot look up the mount target {target} in the image: {source}")]
    Lookup { target: String, source: io::Error },
    #[error(
        "the mount target {target} is a {found} in the image, but what is mounted is a {wanted}"
    )]
    Kind {
        target: String,
        found: &'static str,
        wanted: &'static str,
    },
    #[error("cannot make the mount point {target}: {source}")]
    Make { target: String, source: io::Error },
}

fn kind(is_dir: bool) -> &'static str {
    if is_dir { "folder" } else { "file" }
}

/// Makes the missing ones of `points` below `layer`; `view` shows the image. Gives
/// whether there were any.
pub fn make(view: &Path, layer: &Path, points: &[Point]) -> Result<bool, PointError> {
    let mut any = false;
    for point in points {
        let resolved =
            inside::resolve(view, &point.target).map_err(|source| PointError::Lookup {
                target: point.target.clone(),
                source,
            })?;
        if resolved.exists() {
            let found = fs::symlink_metadata(view.join(&resolved.existing))
                .map_err(|source| PointError::Lookup {
                    target: point.target.clone(),
                    source,
                })?
                .is_dir();
            if found != point.is_dir {
                return Err(PointError::Kind {
                    target: point.target.clone(),
                    found: kind(found),
                    wanted: kind(point.is_dir),
                });
            }
            continue;
        }
        any = true;
        make_one(view, layer, &resolved, point.is_dir)
            .and_then(|()| match point.target.as_str() {
                "/tmp" | "/var/tmp" => {
                    let everyones = Permissions::from_mode(0o1777);
                    fs::set_permissions(layer.join(resolved.path()), everyones)
                }
                _ => Ok(()),
            })
            .map_err(|source| PointError::Make {
                target: point.target.clone(),
                source,
            })?;
    }
    if any {
        copy_attributes(view, layer).map_err(|source| PointError::Make {
            target: "/".into(),
            source,
        })?;
    }
    Ok(any)
}

fn make_one(view: &Path, layer: &Path, resolved: &Resolved, is_dir: bool) -> io::Result<()> {
    let mut done = PathBuf::new();
    for name in resolved.existing.iter() {
        done.push(name);
        make_dir(&layer.join(&done))?;
    }
    let last = resolved.missing.len() - 1;
    for (n, name) in resolved.missing.iter().enumerate() {
        done.push(name);
        let path = layer.join(&done);
        if n < last || is_dir {
            make_dir(&path)?;
        } else {
            fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            fs::set_permissions(&path, Permissions::from_mode(0o644))?;
        }
    }
    // Times last: making an entry changes its folder's.
    let mut existing = resolved.existing.clone();
    while !existing.as_os_str().is_empty() {
        copy_attributes(&view.join(&existing), &layer.join(&existing))?;
        existing.pop();
    }
    Ok(())
}

fn make_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(0o755)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
}

/// Gives folder `to` the owner, mode and time of `from` (which may be a
/// descriptor's path below `/proc`).
pub fn copy_attributes(from: &Path, to: &Path) -> io::Result<()> {
    let meta = fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(to, Permissions::from_mode(meta.mode() & 0o7777))?;
    let time = Timespec {
        tv_sec: meta.mtime(),
        tv_nsec: meta.mtime_nsec(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

//! Paths inside a layer: normal form, or a reason to refuse them.

use std::borrow::Cow;

use super::{MAX_NAME_BYTES, MAX_PATH_BYTES};

/// Why a path may not be in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathProblem {
    #[error("it is empty")]
    Empty,
    #[error("it has a `..` component, which could lead out of the image")]
    Parent,
    #[error("it holds a NUL byte")]
    Nul,
    #[error("it is longer than {MAX_PATH_BYTES} bytes")]
    TooLong,
    #[error("one of its components is longer than {MAX_NAME_BYTES} bytes")]
    NameTooLong,
    #[error("it is not in normal form (relative, no `.`, no doubled or trailing slash)")]
    NotNormal,
    #[error("names that begin with `.wh.` mark deletions in a layer and can't be files")]
    Reserved,
}

/// The normal form of `path`: leading slashes and `.` components go; `..` is refused.
/// A deletion mark may be longer than a name by its `.wh.`.
pub(super) fn normalise(path: &[u8]) -> Result<Vec<u8>, PathProblem> {
    if path.contains(&0) {
        return Err(PathProblem::Nul);
    }
    let mut normal = Vec::with_capacity(path.len());
    for component in path.split(|b| *b == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err(PathProblem::Parent),
            _ => {}
        }
        let name = component.strip_prefix(b".wh.").unwrap_or(component);
        if name.len() > MAX_NAME_BYTES {
            return Err(PathProblem::NameTooLong);
        }
        if !normal.is_empty() {
            normal.push(b'/');
        }
        normal.extend_from_slice(component);
    }
    if normal.len() > MAX_PATH_BYTES {
        return Err(PathProblem::TooLong);
    }
    Ok(normal)
}

/// Refuses what [`normalise`] would refuse or change, and reserved names.
pub(super) fn check_normal(path: &[u8]) -> Result<(), PathProblem> {
    if normalise(path)? != path {
        return Err(PathProblem::NotNormal);
    }
    if path
        .split(|b| *b == b'/')
        .any(|name| name.starts_with(b".wh."))
    {
        return Err(PathProblem::Reserved);
    }
    Ok(())
}

/// Refuses names too long for a file.
pub(super) fn check_names(path: &[u8]) -> Result<(), PathProblem> {
    match path
        .split(|b| *b == b'/')
        .any(|name| name.len() > MAX_NAME_BYTES)
    {
        true => Err(PathProblem::NameTooLong),
        false => Ok(()),
    }
}

/// Folder and last component of a path in normal form.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

pub(super) fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    match folder {
        b"" => name.to_vec(),
        _ => [folder, b"/", name].concat(),
    }
}

/// For messages.
pub(super) fn shown(path: &[u8]) -> Cow<'_, str> {
    const LONGEST: usize = 200;
    if path.len() <= LONGEST {
        return String::from_utf8_lossy(path);
    }
    Cow::Owned(format!("{}…", String::from_utf8_lossy(&path[..LONGEST])))
}

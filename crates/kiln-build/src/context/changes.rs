//! What is at a path now, and how it differs from what was there before: what watching
//! for changes rests on, so that it depends on no event being told once and in order.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::ignore::Seen;
use super::scan::{Scan, leaf};
use super::{Context, ContextError, Entry, EntryKind};
use crate::files::Names;

impl Context {
    /// Looks at `path`: a folder as a context is scanned, or a single file, which is then
    /// the context's root. `None`: there is nothing. `leave_out` is asked for each relative
    /// path; what lies in a folder that is left out is left out, too, unless `deep`.
    pub fn look(
        path: &Path,
        leave_out: &(dyn Fn(&str) -> bool + Sync),
        deep: bool,
    ) -> Result<Option<Self>, ContextError> {
        let read = |cause| ContextError::Read {
            path: path.to_owned(),
            cause,
        };
        // Links on the way to it are followed; those within it are what they are.
        let found = path
            .canonicalize()
            .and_then(|real| fs::metadata(&real).map(|meta| (real, meta)));
        let (path, meta) = match found {
            Ok(found) => found,
            Err(e) if is_gone(&e) => return Ok(None),
            Err(e) => return Err(read(e)),
        };
        let leave_out = |path: &str, _: &Seen| (leave_out(path), Seen::default());
        let found = match meta.is_dir() {
            true => Scan::new(&path, &leave_out, deep).folder().map(|entries| {
                Some(Entry {
                    mode: meta.mode() & 0o7777,
                    kind: EntryKind::Folder(entries),
                })
            }),
            false => leaf(&|| path.clone(), &meta),
        };
        let root = match found {
            Err(ContextError::Read { cause, .. }) if is_gone(&cause) => return Ok(None),
            other => other?,
        };
        Ok(root.map(|root| Self { folder: path, root }))
    }

    /// Every folder of it on the host.
    pub fn folders(&self) -> Vec<PathBuf> {
        let mut names = BTreeSet::new();
        every(&self.root, &mut Names::new(), &mut names, true);
        names.iter().map(|path| self.host_path(path)).collect()
    }

    /// The paths of all its entries, itself included.
    pub fn paths(&self) -> BTreeSet<Names> {
        let mut names = BTreeSet::new();
        every(&self.root, &mut Names::new(), &mut names, false);
        names
    }
}

/// The paths of all that came, went or changed; folders with what is in them.
pub fn changes(before: Option<&Context>, after: Option<&Context>) -> BTreeSet<Names> {
    let mut out = BTreeSet::new();
    differ(
        before.map(Context::root),
        after.map(Context::root),
        &mut Names::new(),
        &mut out,
    );
    out
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn every(entry: &Entry, at: &mut Names, out: &mut BTreeSet<Names>, folders: bool) {
    let EntryKind::Folder(entries) = &entry.kind else {
        if !folders {
            out.insert(at.clone());
        }
        return;
    };
    out.insert(at.clone());
    for (name, entry) in entries {
        at.push(name.clone());
        every(entry, at, out, folders);
        at.pop();
    }
}

fn differ(
    before: Option<&Entry>,
    after: Option<&Entry>,
    at: &mut Names,
    out: &mut BTreeSet<Names>,
) {
    let same = match (before, after) {
        (Some(before), Some(after)) => {
            let kind = match (&before.kind, &after.kind) {
                (EntryKind::Folder(_), EntryKind::Folder(_)) => true,
                (before, after) => before == after,
            };
            kind && before.mode == after.mode
        }
        (before, after) => before.is_none() && after.is_none(),
    };
    if !same {
        out.insert(at.clone());
    }
    let within = |entry: Option<&Entry>| match entry.map(|e| &e.kind) {
        Some(EntryKind::Folder(entries)) => entries.keys().cloned().collect(),
        _ => BTreeSet::new(),
    };
    for name in &within(before) | &within(after) {
        at.push(name.clone());
        differ(inner(before, &name), inner(after, &name), at, out);
        at.pop();
    }
}

fn inner<'e>(entry: Option<&'e Entry>, name: &[u8]) -> Option<&'e Entry> {
    match &entry?.kind {
        EntryKind::Folder(entries) => entries.get(name),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn look(path: &Path) -> Option<Context> {
        Context::look(path, &|path| path.ends_with(".tmp") || path == "out", false).unwrap()
    }

    fn shown(paths: &BTreeSet<Names>) -> Vec<String> {
        paths.iter().map(|p| crate::files::shown(p)).collect()
    }

    #[test]
    fn what_came_went_and_changed_is_told_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["same/x", "gone/y", "changed", "turns", "out/z", "a.tmp"] {
            fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            fs::write(path(name), "1").unwrap();
        }
        let before = look(folder.path());
        assert_eq!(shown(&changes(before.as_ref(), before.as_ref())).len(), 0);
        fs::remove_dir_all(path("gone")).unwrap();
        fs::write(path("changed"), "22").unwrap();
        fs::remove_file(path("turns")).unwrap();
        fs::create_dir(path("turns")).unwrap();
        fs::write(path("turns/new"), "1").unwrap();
        fs::write(path("a.tmp"), "22").unwrap();
        fs::write(path("out/z"), "22").unwrap();
        let after = look(folder.path());
        assert_eq!(
            shown(&changes(before.as_ref(), after.as_ref())),
            ["/changed", "/gone", "/gone/y", "/turns", "/turns/new"]
        );
        let folders = after.unwrap().folders();
        assert_eq!(
            folders,
            [folder.path().to_owned(), path("same"), path("turns")]
        );
    }

    #[test]
    fn a_single_file_is_looked_at_like_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("package.json");
        assert!(look(&file).is_none() && look(&file.join("below")).is_none());
        fs::write(&file, "1").unwrap();
        let there = look(&file);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("package.json", &link).unwrap();
        assert_eq!(changes(look(&link).as_ref(), there.as_ref()).len(), 0);
        assert_eq!(shown(&changes(None, there.as_ref())), ["/"]);
        assert!(look(&file.join("below")).is_none());
        assert!(there.as_ref().unwrap().folders().is_empty());
        assert_eq!(there.unwrap().paths().len(), 1);
    }
}

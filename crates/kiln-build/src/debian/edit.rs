//! Small edits inside a root folder after packages or their scripts have written
//! there: as in [`super::root`], no path can lead out of the folder.

use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Files read back whole (status, shadow) are smaller.
const MAX_READ_BYTES: u64 = 256 << 20;

/// A root folder, opened.
pub struct Edit {
    folder: OwnedFd,
}

impl Edit {
    pub fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
        Ok(Self { folder })
    }

    fn at(&self, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let path = match path.trim_matches('/') {
            "" => ".",
            path => path,
        };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC;
        Ok(rustix::fs::openat2(
            &self.folder,
            path,
            flags,
            Mode::empty(),
            resolve,
        )?)
    }

    fn parent(&self, path: &str) -> io::Result<(OwnedFd, String)> {
        let path = path.trim_matches('/');
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((
            self.at(parent, OFlags::PATH | OFlags::DIRECTORY)?,
            name.into(),
        ))
    }

    /// Makes a folder and those above it; what is there stays as it is.
    pub fn folder(&self, path: &str, mode: u32) -> io::Result<()> {
        let path = path.trim_matches('/');
        for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let mode = if at == path.len() { mode } else { 0o755 };
            let (parent, name) = self.parent(&path[..at])?;
            match rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(mode)) {
                Ok(()) => rustix::fs::chmodat(
                    &parent,
                    &name,
                    Mode::from_raw_mode(mode),
                    AtFlags::empty(),
                )?,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes a file anew, root's; its folder must be there.
    pub fn put(&self, path: &str, content: impl AsRef<[u8]>, mode: u32) -> io::Result<()> {
        self.remove(path)?;
        let (parent, name) = self.parent(path)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&parent, &name, flags, Mode::from_raw_mode(0o600))?;
        let mut file = std::fs::File::from(fd);
        file.write_all(content.as_ref())?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
        Ok(())
    }

    /// Writes new content into a file that keeps its owner and mode.
    pub fn overwrite(&self, path: &str, content: &[u8]) -> io::Result<()> {
        let fd = self.at(path, OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW)?;
        std::fs::File::from(fd).write_all(content)
    }

    /// As [`Edit::put`], if there is nothing at `path` yet.
    pub fn put_if_missing(&self, path: &str, content: &str, mode: u32) -> io::Result<()> {
        match self.exists(path)? {
            true => Ok(()),
            false => self.put(path, content, mode),
        }
    }

    /// Whether there is anything at `path`, be it a link to nowhere.
    pub fn exists(&self, path: &str) -> io::Result<bool> {
        match self.at(path, OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(error) if absent(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A file's content; `None`: there is no such file.
    pub fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        let fd = match self.at(path, OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(error) if absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let file = std::fs::File::from(fd);
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        let mut content = Vec::new();
        file.take(MAX_READ_BYTES).read_to_end(&mut content)?;
        Ok(Some(content))
    }

    /// Names in a folder, sorted; none if it is not there.
    pub fn names(&self, path: &str) -> io::Result<Vec<String>> {
        let fd = match self.at(path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(fd) => fd,
            Err(error) if absent(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names: Vec<String> = entries(&fd)?.into_iter().map(|(name, _)| name).collect();
        names.sort();
        Ok(names)
    }

    /// Removes a file or a whole folder; nothing there is fine.
    pub fn remove(&self, path: &str) -> io::Result<()> {
        match self.parent(path) {
            Ok((parent, name)) => remove_at(&parent, &name),
            Err(error) if absent(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes what is in a folder, and leaves the folder.
    pub fn empty(&self, path: &str) -> io::Result<()> {
        for name in self.names(path)? {
            self.remove(&format!("{path}/{name}"))?;
        }
        Ok(())
    }
}

fn absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    ) || error.raw_os_error() == Some(Errno::LOOP.raw_os_error())
}

fn entries(folder: &OwnedFd) -> io::Result<Vec<(String, FileType)>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            found.push((name, entry.file_type()));
        }
    }
    Ok(found)
}

fn remove_at(parent: &OwnedFd, name: &str) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    for (child, _) in entries(&folder)? {
        remove_at(&folder, &child)?;
    }
    Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn edits_stay_inside_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("kept"), "x").unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("var")).unwrap();
        let edit = Edit::open(root.path()).unwrap();
        assert!(edit.put("var/evil", "x", 0o644).is_err());
        edit.remove("/var/kept").unwrap();
        edit.empty("/var").unwrap();
        assert!(edit.read("var/kept").unwrap().is_none());
        assert!(outside.path().join("kept").exists() && !outside.path().join("evil").exists());
        edit.remove("/var").unwrap();
        assert!(outside.path().join("kept").exists() && !edit.exists("/var").unwrap());
    }

    #[test]
    fn folders_files_and_removal() {
        let root = tempfile::tempdir().unwrap();
        let edit = Edit::open(root.path()).unwrap();
        edit.folder("a/b/c", 0o700).unwrap();
        edit.put("/a/b/c/f", "one", 0o640).unwrap();
        edit.put_if_missing("/a/b/c/f", "two", 0o640).unwrap();
        edit.overwrite("/a/b/c/f", b"3").unwrap();
        assert_eq!(edit.read("a/b/c/f").unwrap().unwrap(), b"3");
        assert_eq!(edit.names("/a/b").unwrap(), ["c"]);
        edit.empty("/a").unwrap();
        assert_eq!(edit.names("/a").unwrap(), [""; 0]);
        edit.remove("/nothing/here").unwrap();
    }
}

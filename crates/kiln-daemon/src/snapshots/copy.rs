//! A folder's content as it is: owners, modes, times, extended attributes, links, holes.
//! Where the file system can, a file's blocks are shared (reflink) instead of copied.
//!
//! Instances may write to what is copied: no link is followed, and everything is opened
//! relative to its folder, so nothing outside of it can be read.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid,
    XattrFlags, chownat, fchmod, fgetxattr, flistxattr, fsetxattr, fstat, futimens, ioctl_ficlone,
    linkat, mkdirat, mknodat, openat, readlinkat, seek, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

/// Deeper trees are refused: each level takes a descriptor and a stack frame.
const DEPTH: usize = 200;
/// Linux's own bounds (xattr(7)).
const XATTR_LIST: usize = 64 << 10;
const XATTR_VALUE: usize = 64 << 10;

/// Copies what `from` has into `to`, which is empty. Returns the sum of the files' sizes in
/// bytes. What is removed meanwhile may be missing.
///
/// # Errors
/// What can't be read or written, with its name; deeper than 200 levels.
pub(super) fn content(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<u64> {
    let mut copy = Copy {
        links: HashMap::new(),
        root: to,
        bytes: 0,
        path: Vec::new(),
    };
    copy.folder(from, to)
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", copy.place())))?;
    Ok(copy.bytes)
}

struct Copy<'a> {
    /// Where a file with several names was put first, below the root.
    links: HashMap<(u64, u64), CString>,
    root: BorrowedFd<'a>,
    bytes: u64,
    path: Vec<CString>,
}

impl Copy<'_> {
    fn place(&self) -> String {
        let names = self.path.iter().map(|n| n.to_string_lossy());
        format!("/{}", names.collect::<Vec<_>>().join("/"))
    }

    fn below_root(&self) -> io::Result<CString> {
        let bytes = self.path.iter().map(|n| n.as_bytes()).collect::<Vec<_>>();
        Ok(CString::new(bytes.join(&b'/'))?)
    }

    fn folder(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
        if self.path.len() > DEPTH {
            return Err(io::Error::other("folders are nested too deeply"));
        }
        for entry in Dir::read_from(from)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.path.push(name.to_owned());
            match self.entry(from, to, name) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
            self.path.pop();
        }
        // Last: filling it has moved its times.
        attributes(from, to, &fstat(from)?)
    }

    fn entry(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            let source = open(from, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
            mkdirat(to, name, Mode::RWXU)?;
            let target = open(to, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
            return self.folder(source.as_fd(), target.as_fd());
        }
        let several = stat.st_nlink > 1;
        let identity = (stat.st_dev, stat.st_ino);
        if let Some(first) = self.links.get(&identity).filter(|_| several) {
            return Ok(linkat(self.root, first, to, name, AtFlags::empty())?);
        }
        match kind {
            FileType::RegularFile => self.bytes += file(from, to, name)?,
            FileType::Symlink => symlinkat(readlinkat(from, name, Vec::new())?, to, name)?,
            // Its program makes it anew.
            FileType::Socket => return Ok(()),
            _ => mknodat(to, name, kind, Mode::RUSR, stat.st_rdev)?,
        }
        if kind != FileType::RegularFile {
            let (uid, gid) = owner(&stat);
            chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
            if kind != FileType::Symlink {
                rustix::fs::chmodat(to, name, mode(&stat), AtFlags::empty())?;
            }
            utimensat(to, name, &times(&stat), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if several {
            self.links.insert(identity, self.below_root()?);
        }
        Ok(())
    }
}

fn open(folder: BorrowedFd<'_>, name: &CStr, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?)
}

/// Returns its size in bytes.
fn file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> io::Result<u64> {
    // It may have become a pipe by now, which must not be waited for.
    let source = open(from, name, OFlags::RDONLY | OFlags::NONBLOCK)?;
    let stat = fstat(&source)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("it has become something else meanwhile"));
    }
    let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let target = openat(to, name, create, Mode::RUSR | Mode::WUSR)?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    match ioctl_ficlone(&target, &source) {
        Ok(()) => {}
        Err(Errno::NOTSUP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
            let (mut source, mut target) = (File::from(source.try_clone()?), File::from(target));
            data(&mut source, &mut target, size)?;
            attributes(source.as_fd(), target.as_fd(), &stat)?;
            return Ok(size);
        }
        Err(e) => return Err(e.into()),
    }
    attributes(source.as_fd(), target.as_fd(), &stat)?;
    Ok(size)
}

/// What is data is copied, and holes stay holes.
fn data(source: &mut File, target: &mut File, size: u64) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        let begin = match seek(&*source, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = seek(&*source, SeekFrom::Hole(begin))?.min(size);
        if end <= begin {
            break;
        }
        seek(&*source, SeekFrom::Start(begin))?;
        seek(&*target, SeekFrom::Start(begin))?;
        io::copy(&mut io::Read::take(&mut *source, end - begin), target)?;
        at = end;
    }
    target.set_len(size)
}

fn owner(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

fn times(stat: &Stat) -> Timestamps {
    let time = |tv_sec, nanos: u64| Timespec {
        tv_sec,
        tv_nsec: i64::try_from(nanos).unwrap_or(0),
    };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}

fn attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = owner(stat);
    rustix::fs::fchown(to, uid, gid)?;
    xattrs(from, to)?;
    // After the owner, whose change takes set-id bits away.
    fchmod(to, mode(stat))?;
    Ok(futimens(to, &times(stat))?)
}

fn xattrs(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut list = vec![0u8; XATTR_LIST];
    let length = match flistxattr(from, &mut list[..]) {
        Err(Errno::NOTSUP) => return Ok(()),
        length => length?,
    };
    let names = list.get(..length).unwrap_or_default();
    let mut value = vec![0u8; XATTR_VALUE];
    for name in names.split_inclusive(|b| *b == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        let length = fgetxattr(from, name, &mut value[..])?;
        let value = value.get(..length).unwrap_or_default();
        fsetxattr(to, name, value, XattrFlags::empty())?;
    }
    Ok(())
}

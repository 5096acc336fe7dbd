//! Writes packages' files into a root folder. Every path is resolved inside the
//! folder by the kernel (`openat2`, `RESOLVE_IN_ROOT`), so no symlink a package
//! brings can lead out of it. Several threads write different packages at once.
//!
//! The root is a merged one: `/bin`, `/sbin`, `/lib*` are links into `/usr`, as
//! debootstrap makes them. Nothing is synced to disk: a half-made root is thrown away.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid,
};
use rustix::io::Errno;

/// Folders whose content is in `/usr`.
const MERGED: [&str; 6] = ["bin", "sbin", "lib", "lib32", "lib64", "libx32"];
/// Open folders kept per writer.
const MAX_OPEN: usize = 64;
/// Entries in one package; the largest have 100,000.
const MAX_ENTRIES: usize = 4_000_000;

/// What goes wrong with one package's content.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error("cannot write {path} of package {package} into the new root")]
    Write {
        package: String,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("package {package} holds an unsafe or unknown entry: {path}")]
    Unsafe { package: String, path: PathBuf },
    #[error(
        "packages {first} and {second} both hold {path}, and neither says that it replaces the other"
    )]
    Both {
        first: String,
        second: String,
        path: PathBuf,
    },
    #[error("cannot unpack package {package}")]
    Read {
        package: String,
        #[source]
        source: io::Error,
    },
}

/// The root under construction, shared by all writers.
pub struct Root {
    folder: OwnedFd,
    /// Who holds which file (merged path).
    owners: Mutex<HashMap<PathBuf, Arc<Holder>>>,
    /// Folders' properties by whoever comes first in order.
    folders: Mutex<HashMap<PathBuf, (usize, Properties)>>,
}

/// A package, as far as writing its files needs to know.
#[derive(Debug)]
pub struct Holder {
    /// Position that settles whose properties a shared folder gets; smaller wins.
    pub order: usize,
    pub name: String,
    /// Names in `Replaces`.
    pub replaces: Vec<String>,
    /// Absolute paths of configuration files.
    pub conffiles: Vec<String>,
    pub conffile_place: ConffilePlace,
}

/// Where configuration files are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConffilePlace {
    /// At their own path: nobody is going to configure the package.
    Own,
    /// With `.dpkg-new` behind, where dpkg looks when it configures.
    New,
    /// Both: scripts of others need them before dpkg gets there.
    Both,
}

#[derive(Clone, Copy, Debug)]
struct Properties {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
}

impl Root {
    /// Starts a root in the empty folder `path`.
    pub fn create(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        rustix::fs::mkdirat(&folder, "usr", Mode::from_raw_mode(0o755))?;
        let root = Self {
            folder,
            owners: Mutex::default(),
            folders: Mutex::default(),
        };
        for name in ["bin", "sbin", "lib"] {
            root.merge(name)?;
        }
        Ok(root)
    }

    /// Makes `/name` a link to `/usr/name`.
    fn merge(&self, name: &str) -> io::Result<()> {
        let inside = format!("usr/{name}");
        for outcome in [
            rustix::fs::mkdirat(&self.folder, &inside, Mode::from_raw_mode(0o755)),
            rustix::fs::symlinkat(&inside, &self.folder, name),
        ] {
            match outcome {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Gives every folder the properties of the first package that has it. Call it
    /// once, when all packages are written.
    pub fn finish(&self) -> Result<(), RootError> {
        let folders =
            std::mem::take(&mut *self.folders.lock().unwrap_or_else(PoisonError::into_inner));
        let mut folders: Vec<_> = folders.into_iter().collect();
        folders.sort_by(|a, b| b.0.cmp(&a.0));
        let mut writer = Writer::new(self);
        for (path, (_, properties)) in folders {
            let done = writer.folder(&path).and_then(|fd| {
                // Through the path: the descriptor is O_PATH, and the folder itself no link.
                properties.apply(&fd, Path::new("."))
            });
            done.map_err(|source| RootError::Write {
                package: "(all)".into(),
                path,
                source,
            })?;
        }
        Ok(())
    }

    /// Settles who holds `path`: whether `new` may write it.
    fn claim(&self, path: &Path, new: &Arc<Holder>) -> Result<bool, RootError> {
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(old) = owners.get(path) else {
            owners.insert(path.into(), new.clone());
            return Ok(true);
        };
        let over = |a: &Holder, b: &Holder| a.replaces.contains(&b.name);
        if old.name == new.name {
            return Ok(true);
        }
        // Where both replace each other, the name settles it: threads come in any order.
        match (over(new, old), over(old, new)) {
            (true, true) if old.name > new.name => Ok(false),
            (true, _) => {
                owners.insert(path.into(), new.clone());
                Ok(true)
            }
            (false, true) => Ok(false),
            (false, false) => Err(RootError::Both {
                first: old.name.clone(),
                second: new.name.clone(),
                path: Path::new("/").join(path),
            }),
        }
    }
}

impl Properties {
    fn apply(self, parent: &OwnedFd, name: &Path) -> io::Result<()> {
        self.own(parent, name)?;
        rustix::fs::chmodat(
            parent,
            name,
            Mode::from_raw_mode(self.mode),
            AtFlags::empty(),
        )?;
        self.date(parent, name)
    }

    fn own(self, parent: &OwnedFd, name: &Path) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        rustix::fs::chownat(
            parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        Ok(())
    }

    fn date(self, parent: &OwnedFd, name: &Path) -> io::Result<()> {
        let time = Timespec {
            tv_sec: self.mtime,
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }
}

/// One thread's way of writing into the root.
pub struct Writer<'r> {
    root: &'r Root,
    open: HashMap<PathBuf, Arc<OwnedFd>>,
    /// Of [`MERGED`], those whose link is known to be there.
    linked: HashSet<&'static str>,
}

impl<'r> Writer<'r> {
    pub fn new(root: &'r Root) -> Self {
        Self {
            root,
            open: HashMap::new(),
            linked: HashSet::new(),
        }
    }

    /// Writes all of one package; times later than `epoch` (seconds) become `epoch`.
    /// Returns the paths dpkg would list, in the package's order.
    pub fn package(
        &mut self,
        holder: Holder,
        data: &mut tar::Archive<Box<dyn Read>>,
        epoch: i64,
    ) -> Result<Vec<String>, RootError> {
        let holder = Arc::new(holder);
        let read = |source| RootError::Read {
            package: holder.name.clone(),
            source,
        };
        let mut list = Vec::new();
        for entry in data.entries().map_err(read)? {
            let mut entry = entry.map_err(read)?;
            let raw = entry.path_bytes().into_owned();
            let refuse = || RootError::Unsafe {
                package: holder.name.clone(),
                path: String::from_utf8_lossy(&raw).into_owned().into(),
            };
            let path = relative(&raw).ok_or_else(refuse)?;
            list.push(Path::new("/").join(&path).to_string_lossy().into_owned());
            if list.len() > MAX_ENTRIES {
                return Err(refuse());
            }
            self.entry(&holder, &mut entry, &path, epoch)?;
        }
        if let Some(first) = list.first_mut().filter(|first| *first == "/") {
            *first = "/.".into();
        }
        Ok(list)
    }

    fn entry(
        &mut self,
        holder: &Arc<Holder>,
        entry: &mut tar::Entry<Box<dyn Read>>,
        path: &Path,
        epoch: i64,
    ) -> Result<(), RootError> {
        let fail = |source| RootError::Write {
            package: holder.name.clone(),
            path: Path::new("/").join(path),
            source,
        };
        let refuse = || RootError::Unsafe {
            package: holder.name.clone(),
            path: path.into(),
        };
        let merged = merged(path);
        if let Some(name) = merged_name(path).filter(|name| !self.linked.contains(name)) {
            self.root.merge(name).map_err(fail)?;
            self.linked.insert(name);
        }
        let header = entry.header();
        let properties = properties(header, epoch).map_err(fail)?;
        let kind = header.entry_type();
        if kind.is_dir() {
            return self.directory(holder, &merged, properties).map_err(fail);
        }
        let Some(name) = path.file_name() else {
            return Err(refuse());
        };
        // The links that make the root merged are there already.
        if kind.is_symlink() && path.components().count() == 1 && merged_name(path).is_some() {
            return Ok(());
        }
        if !self.root.claim(&merged, holder)? {
            return Ok(());
        }
        let own_name = PathBuf::from(name);
        let absolute = Path::new("/").join(path);
        let conffile = holder.conffile_place != ConffilePlace::Own
            && holder.conffiles.iter().any(|c| Path::new(c) == absolute);
        let mut name = own_name.clone();
        if conffile {
            name.as_mut_os_string().push(".dpkg-new");
        }
        let parent = self
            .folder(merged.parent().unwrap_or(Path::new("")))
            .map_err(fail)?;
        clear(&parent, &name).map_err(fail)?;
        let made = match kind {
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                regular(&parent, &name, entry, properties)
            }
            tar::EntryType::Symlink => {
                let target = entry.link_name_bytes().ok_or_else(refuse)?;
                symlink(&parent, &name, &target, properties)
            }
            tar::EntryType::Link => {
                let target = entry
                    .link_name_bytes()
                    .and_then(|t| relative(&t))
                    .ok_or_else(refuse)?;
                self.hard_link(&parent, &name, &target)
            }
            tar::EntryType::Fifo | tar::EntryType::Char | tar::EntryType::Block => {
                node(&parent, &name, entry.header(), properties)
            }
            _ => return Err(refuse()),
        };
        made.map_err(fail)?;
        if conffile && kind.is_file() && holder.conffile_place == ConffilePlace::Both {
            clear(&parent, &own_name)
                .and_then(|()| copy(&parent, &name, &own_name, properties))
                .map_err(fail)?;
        }
        Ok(())
    }

    fn directory(
        &mut self,
        holder: &Holder,
        path: &Path,
        properties: Properties,
    ) -> io::Result<()> {
        self.folder(path)?;
        let mut folders = self
            .root
            .folders
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let entry = folders
            .entry(path.into())
            .or_insert((holder.order, properties));
        if holder.order < entry.0 {
            *entry = (holder.order, properties);
        }
        Ok(())
    }

    fn hard_link(&mut self, parent: &OwnedFd, name: &Path, target: &Path) -> io::Result<()> {
        let target = merged(target);
        let (Some(folder), Some(file)) = (target.parent(), target.file_name()) else {
            return Err(io::Error::other("a hard link to nothing"));
        };
        let folder = self.folder(folder)?;
        rustix::fs::linkat(&*folder, file, parent, name, AtFlags::empty())?;
        Ok(())
    }

    /// The folder at `path`, made where it is missing. Symlinks on the way are
    /// followed inside the root.
    fn folder(&mut self, path: &Path) -> io::Result<Arc<OwnedFd>> {
        if let Some(fd) = self.open.get(path) {
            return Ok(fd.clone());
        }
        let fd = match self.root.open_folder(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && path != Path::new("") => {
                let parent = self.folder(path.parent().unwrap_or(Path::new("")))?;
                let name = path.file_name().unwrap_or_default();
                match rustix::fs::mkdirat(&*parent, name, Mode::from_raw_mode(0o755)) {
                    // Another thread was quicker, or the name is a link to a folder that
                    // is still to come.
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                self.root.open_folder(path)?
            }
            other => other?,
        };
        if self.open.len() >= MAX_OPEN {
            self.open.clear();
        }
        let fd = Arc::new(fd);
        self.open.insert(path.into(), fd.clone());
        Ok(fd)
    }
}

impl Root {
    fn open_folder(&self, path: &Path) -> io::Result<OwnedFd> {
        let path = if path == Path::new("") {
            Path::new(".")
        } else {
            path
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rustix::fs::openat2(
            &self.folder,
            path,
            flags,
            Mode::empty(),
            resolve,
        )?)
    }
}

/// `./usr/bin/x` → `usr/bin/x`; `None` where a part leads up.
fn relative(raw: &[u8]) -> Option<PathBuf> {
    let raw = std::os::unix::ffi::OsStrExt::from_bytes(raw);
    let mut path = PathBuf::new();
    for part in Path::new::<std::ffi::OsStr>(raw).components() {
        match part {
            std::path::Component::Normal(part) => path.push(part),
            std::path::Component::CurDir | std::path::Component::RootDir => {}
            _ => return None,
        }
    }
    Some(path)
}

/// `bin/x` → `usr/bin/x`.
fn merged(path: &Path) -> PathBuf {
    match merged_name(path) {
        Some(_) => Path::new("usr").join(path),
        None => path.into(),
    }
}

/// The merged folder that `path` is in, or is.
fn merged_name(path: &Path) -> Option<&'static str> {
    let first = path.components().next()?.as_os_str();
    MERGED.into_iter().find(|name| *name == first)
}

fn properties(header: &tar::Header, epoch: i64) -> io::Result<Properties> {
    let id = |id: u64| u32::try_from(id).map_err(io::Error::other);
    Ok(Properties {
        mode: header.mode()? & 0o7777,
        uid: id(header.uid()?)?,
        gid: id(header.gid()?)?,
        mtime: i64::try_from(header.mtime()?)
            .unwrap_or(i64::MAX)
            .min(epoch),
    })
}

/// Makes room for a file that replaces another package's.
fn clear(parent: &OwnedFd, name: &Path) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        // An empty folder gives way to a link, as with dpkg.
        Err(Errno::ISDIR) => Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?),
        Err(error) => Err(error.into()),
    }
}

fn regular(
    parent: &OwnedFd,
    name: &Path,
    content: &mut dyn Read,
    properties: Properties,
) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))?;
    let mut file = std::fs::File::from(fd);
    io::copy(content, &mut file)?;
    let (uid, gid) = (Uid::from_raw(properties.uid), Gid::from_raw(properties.gid));
    rustix::fs::fchown(&file, Some(uid), Some(gid))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(properties.mode))?;
    properties.date(parent, name)
}

fn copy(parent: &OwnedFd, from: &Path, to: &Path, properties: Properties) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(parent, from, flags, Mode::empty())?;
    regular(parent, to, &mut std::fs::File::from(fd), properties)
}

fn symlink(parent: &OwnedFd, name: &Path, target: &[u8], properties: Properties) -> io::Result<()> {
    rustix::fs::symlinkat(target, parent, name)?;
    properties.own(parent, name)?;
    properties.date(parent, name)
}

fn node(
    parent: &OwnedFd,
    name: &Path,
    header: &tar::Header,
    properties: Properties,
) -> io::Result<()> {
    let kind = match header.entry_type() {
        tar::EntryType::Fifo => FileType::Fifo,
        tar::EntryType::Char => FileType::CharacterDevice,
        _ => FileType::BlockDevice,
    };
    let (major, minor) = (
        header.device_major()?.unwrap_or(0),
        header.device_minor()?.unwrap_or(0),
    );
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(
        parent.as_fd(),
        name,
        kind,
        Mode::from_raw_mode(0o600),
        device,
    )?;
    properties.apply(parent, name)
}

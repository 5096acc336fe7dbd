//! What a RUN has written into its overlay's upper folder, taken into the stage's tree:
//! without the traces of the sandbox, of this machine and of the time it ran at. Files that
//! tell one machine from another ([`kiln_model::identity`]) are taken in empty.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Seek};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kiln_model::{Digest, identity};
use kiln_runtime::{Change, ChangeKind, ScanError, scan_upper};
use kiln_store::tree::{Kind, Tree, TreeEditError};
use kiln_store::{Batch, PathError, PutError, Store};

use super::npm;
use super::variables::{self, Variables};
use crate::files::Meta;
use crate::keystore;
use crate::rootfs::{device, node};

const MACHINE_ID: &[u8] = b"etc/machine-id";
const DBUS_ID: &[u8] = b"var/lib/dbus/machine-id";

/// Longest list of extended attribute names, and longest value, in bytes (Linux).
const XATTR_BYTES: usize = 64 << 10;

/// Why a RUN's changes can't be taken in.
#[derive(Debug, thiserror::Error)]
pub enum UpperError {
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error("can't read {path}, which the command wrote")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("can't keep {path}, which the command wrote")]
    Keep {
        path: PathBuf,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(transparent)]
    Tree(#[from] TreeEditError),
    #[error(transparent)]
    Store(#[from] PathError),
}

/// When a step ran and what times become. Seconds since the epoch.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub begun: i64,
    pub ended: i64,
    /// SOURCE_DATE_EPOCH.
    pub epoch: i64,
}

impl Times {
    /// A time the step itself made becomes the epoch; one that was set on purpose (by tar,
    /// dpkg, touch -d) is kept, but never later than an epoch that was asked for.
    fn settle(&self, mtime: i64) -> i64 {
        if (self.begun..=self.ended).contains(&mtime) {
            return self.epoch;
        }
        match self.epoch {
            0 => mtime,
            epoch => mtime.min(epoch),
        }
    }
}

/// What a RUN's files are freed of.
#[derive(Clone, Copy)]
pub struct Traces<'a> {
    /// Paths that were not in the tree and are mount points of the sandbox.
    pub made: &'a [Vec<u8>],
    /// Variables that were set for the recording proxy alone.
    pub variables: &'a Variables,
}

/// Takes the changes in `upper` into `tree`.
pub fn take(
    tree: &mut Tree,
    upper: &Path,
    store: &Store,
    times: Times,
    traces: Traces<'_>,
) -> Result<(), UpperError> {
    let mut links: BTreeMap<(u64, u64), Vec<u8>> = BTreeMap::new();
    let mut machine_id = false;
    let mut batch = store.batch();
    for Change { path, kind } in scan_upper(upper)? {
        let name = path.as_os_str().as_bytes();
        machine_id |= name == DBUS_ID && kind == ChangeKind::File;
        if is_sandbox(name) || (kind != ChangeKind::Deleted && is_trace(name)) {
            continue;
        }
        match kind {
            ChangeKind::Deleted => {
                tree.remove(name)?;
                continue;
            }
            ChangeKind::Dir { opaque: true } => tree.clear(name)?,
            ChangeKind::Dir { opaque: false } | ChangeKind::File => {}
        }
        let full = upper.join(&path);
        let read = |cause| UpperError::Read {
            path: path.clone(),
            cause,
        };
        let stat = fs::symlink_metadata(&full).map_err(read)?;
        let inode = (stat.dev(), stat.ino());
        if !stat.is_dir() && stat.nlink() > 1 {
            if let Some(first) = links.get(&inode) {
                tree.link(name, first)?;
                continue;
            }
            links.insert(inode, name.to_vec());
        }
        let identity = identity::at(name).is_some() && stat.is_file();
        if identity && is_empty_file(tree, name, &stat) {
            // It was made for this RUN alone.
            continue;
        }
        // First: a file that the store takes over has none of these any more.
        let meta = Meta {
            mode: stat.mode() & 0o7777,
            uid: stat.uid(),
            gid: stat.gid(),
            mtime: times.settle(stat.mtime()),
            xattrs: xattrs(&full).map_err(read)?,
        };
        let kind = match identity {
            true => keep(&[], &mut batch, &path)?,
            false => kind_of(&full, &stat, &mut batch, &path, (traces.variables, times))?,
        };
        tree.insert(name, node(meta, kind))?;
    }
    if machine_id && tree.get(MACHINE_ID).is_none() {
        // dbus then takes the machine's, which each instance has one of its own of.
        let meta = Meta {
            mode: 0o444,
            mtime: times.epoch,
            ..Meta::default()
        };
        let empty = keep(&[], &mut batch, Path::new("etc/machine-id"))?;
        tree.insert(MACHINE_ID, node(meta, empty))?;
    }
    batch.finish()?;
    sweep(tree, traces.made)
}

/// Removes mount points that are only there because something was mounted on them.
fn sweep(tree: &mut Tree, made: &[Vec<u8>]) -> Result<(), UpperError> {
    for path in made.iter().rev() {
        let empty = match tree.get(path) {
            None => false,
            Some(node) if node.is_dir() => tree
                .children(path)
                .is_ok_and(|mut children| children.next().is_none()),
            Some(node) => matches!(node.kind, Kind::File { size: 0, .. }),
        };
        if empty {
            tree.remove(path)?;
        }
    }
    Ok(())
}

fn kind_of(
    full: &Path,
    stat: &fs::Metadata,
    batch: &mut Batch<'_>,
    path: &Path,
    (variables, times): (&Variables, Times),
) -> Result<Kind, UpperError> {
    let read = |cause| UpperError::Read {
        path: path.to_owned(),
        cause,
    };
    let kind = stat.file_type();
    Ok(if kind.is_dir() {
        Kind::Dir
    } else if kind.is_symlink() {
        let target = fs::read_link(full).map_err(read)?;
        Kind::Symlink {
            target: target.into_os_string().into_vec(),
        }
    } else if kind.is_fifo() {
        Kind::Fifo
    } else if kind.is_socket() {
        Kind::Socket
    } else if kind.is_char_device() || kind.is_block_device() {
        device(kind.is_block_device(), stat.rdev())
    } else {
        let mut file = fs::File::open(full).map_err(read)?;
        let name = path.as_os_str().as_bytes();
        let mut first = [0; keystore::MAGIC.len()];
        if stat.len() > variables::LONGEST {
            file.read_exact(&mut first).map_err(read)?;
            file.rewind().map_err(read)?;
        }
        let store_of_keys = first == keystore::MAGIC && stat.len() <= keystore::LARGEST;
        if stat.len() <= variables::LONGEST || store_of_keys {
            let mut content = Vec::new();
            file.read_to_end(&mut content).map_err(read)?;
            let own = content.clone();
            if stat.len() <= variables::LONGEST {
                content = variables.taken_out_of(content);
                content = npm::settled(name, content, times.epoch);
            }
            content = keystore::settled(content, |time| times.settle(time));
            if content != own {
                return keep(&content, batch, path);
            }
            file.rewind().map_err(read)?;
        }
        kept(batch.adopt(file), path)?
    })
}

fn keep(content: &[u8], batch: &mut Batch<'_>, path: &Path) -> Result<Kind, UpperError> {
    let length = content.len() as u64;
    kept(batch.put(&mut &content[..], length), path)
}

fn kept(put: Result<(Digest, u64), PutError>, path: &Path) -> Result<Kind, UpperError> {
    let (digest, size) = put.map_err(|cause| UpperError::Keep {
        path: path.to_owned(),
        cause: Box::new(cause),
    })?;
    Ok(Kind::File { digest, size })
}

/// Is this in the tree an empty file of the same owner and mode?
fn is_empty_file(tree: &Tree, path: &[u8], stat: &fs::Metadata) -> bool {
    tree.get(path).is_some_and(|node| {
        let own = (node.meta.mode, node.meta.uid, node.meta.gid);
        matches!(node.kind, Kind::File { size: 0, .. })
            && own == (stat.mode() & 0o7777, stat.uid(), stat.gid())
    })
}

/// An entry's extended attributes; the overlay's own are no part of the image.
fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut found = BTreeMap::new();
    // Most have none.
    match rustix::fs::llistxattr_query(path) {
        Ok(0) | Err(rustix::io::Errno::OPNOTSUPP) => return Ok(found),
        other => other?,
    };
    let mut names = vec![0_u8; XATTR_BYTES];
    let length = rustix::fs::llistxattr(path, names.as_mut_slice())?;
    let mut value = vec![0_u8; XATTR_BYTES];
    for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        if name.starts_with(b"trusted.") || name == b"security.selinux" {
            continue;
        }
        match rustix::fs::lgetxattr(path, name, value.as_mut_slice()) {
            Ok(length) => {
                found.insert(name.to_vec(), value[..length].to_vec());
            }
            Err(rustix::io::Errno::NODATA) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(found)
}

/// What the runtime puts into every sandbox.
fn is_sandbox(path: &[u8]) -> bool {
    let within = [&b"dev/"[..], b"proc/", b"sys/"];
    let files = [
        &b"etc/resolv.conf"[..],
        b"etc/hosts",
        b"etc/hostname",
        b".dockerenv",
    ];
    within.iter().any(|folder| path.starts_with(folder)) || files.contains(&path)
}

/// What Debian's tools leave behind and differs each time: it stays as it was before.
fn is_trace(path: &[u8]) -> bool {
    const FILES: [&[u8]; 21] = [
        b"var/log/dpkg.log",
        b"var/log/alternatives.log",
        b"var/log/bootstrap.log",
        b"var/log/fontconfig.log",
        b"var/log/lastlog",
        b"var/log/faillog",
        b"var/cache/ldconfig/aux-cache",
        b"var/cache/apt/pkgcache.bin",
        b"var/cache/apt/srcpkgcache.bin",
        b"var/cache/debconf/config.dat-old",
        b"var/cache/debconf/passwords.dat-old",
        b"var/cache/debconf/templates.dat-old",
        b"var/lib/dpkg/available-old",
        b"var/lib/dpkg/diversions-old",
        b"var/lib/dpkg/status-old",
        b"var/lib/dpkg/statoverride-old",
        b"var/lib/dpkg/lock",
        b"var/lib/dpkg/lock-frontend",
        DBUS_ID,
        b"var/lib/systemd/random-seed",
        b"etc/.pwd.lock",
    ];
    const BACKUPS: [&[u8]; 6] = [
        b"etc/passwd-",
        b"etc/group-",
        b"etc/shadow-",
        b"etc/gshadow-",
        b"etc/subuid-",
        b"etc/subgid-",
    ];
    const NPM_LOGS: &[u8] = b".npm/_logs/";
    let npm = path.windows(NPM_LOGS.len()).any(|part| part == NPM_LOGS);
    npm || FILES.contains(&path) || BACKUPS.contains(&path) || path.starts_with(b"var/log/apt/")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn taken(upper: &Path, store: &Store, times: Times) -> Tree {
        let traces = Traces {
            made: &[],
            variables: &Variables::default(),
        };
        let mut tree = Tree::new();
        take(&mut tree, upper, store, times, traces).unwrap();
        tree
    }

    #[test]
    fn times_in_stores_of_certificates_become_the_epoch_whatever_their_length() {
        const CERTIFICATE: u32 = 2;
        let (upper, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = Store::open(root.path()).unwrap();
        let long = vec![7; variables::LONGEST as usize];
        let made = |certificate: &[u8], first| {
            crate::keystore::tests::store_of(CERTIFICATE, [first, 5_000_000], certificate)
        };
        for (name, certificate) in [("short", &b"der"[..]), ("long", &long)] {
            fs::write(upper.path().join(name), made(certificate, 1_005_000)).unwrap();
        }
        let times = Times {
            begun: 1000,
            ended: 1010,
            epoch: 500,
        };
        let tree = taken(upper.path(), &store, times);
        for (name, certificate) in [("short", &b"der"[..]), ("long", &long)] {
            let found = match tree.get(name).unwrap().kind {
                Kind::File { digest, .. } => fs::read(store.object_path(&digest)).unwrap(),
                _ => Vec::new(),
            };
            // Later than an epoch that was asked for is as late as that.
            let expected =
                crate::keystore::tests::store_of(CERTIFICATE, [500_000, 500_000], certificate);
            assert!(found == expected, "{name}");
        }
    }

    #[test]
    fn attributes_are_the_images_but_for_those_of_the_overlay() {
        let (upper, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = Store::open(root.path()).unwrap();
        let none = rustix::fs::XattrFlags::empty();
        for (name, own) in [("with", true), ("without", false)] {
            let path = upper.path().join(name);
            fs::write(&path, name).unwrap();
            for (attribute, set) in [("user.own", own), ("trusted.overlay.origin", true)] {
                if set {
                    rustix::fs::setxattr(&path, attribute, b"value", none).unwrap();
                }
            }
        }
        let times = Times {
            begun: 0,
            ended: 0,
            epoch: 0,
        };
        let tree = taken(upper.path(), &store, times);
        let of = |name: &str| &tree.get(name).unwrap().meta.xattrs;
        let own = BTreeMap::from([(b"user.own".to_vec(), b"value".to_vec())]);
        assert_eq!((of("with"), of("without")), (&own, &BTreeMap::new()));
    }

    #[test]
    fn times_of_the_step_become_the_epoch_and_others_stay() {
        let times = |epoch| Times {
            begun: 1000,
            ended: 1010,
            epoch,
        };
        for (epoch, mtime, expected) in [
            (0, 1000, 0),
            (0, 1010, 0),
            (0, 999, 999),
            (0, 5000, 5000),
            (500, 1005, 500),
            (500, 999, 500),
            (500, 3, 3),
        ] {
            assert_eq!(times(epoch).settle(mtime), expected, "{epoch} {mtime}");
        }
    }
}

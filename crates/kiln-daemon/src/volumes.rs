//! Named volumes: folders that outlive instances and releases,
//! `<root>/volumes/<name>/data`. A new one gets what the image has at the place it is
//! mounted at, with its owners and modes, as in Docker. One in memory (`driver_opts: {type:
//! tmpfs}`) is a tmpfs on that folder, as long as an instance has it.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use kiln_model::VolumeName;
use kiln_model::instance::InstanceMountSource;
use kiln_runtime::memory::{self, Memory};
use kiln_store::Store;
use kiln_store::tree::{Kind, Node};
use rustix::fs::{AtFlags, CWD, Mode, Timespec, Timestamps, chmod, utimensat};

use crate::instance_spec::VolumeUse;
use crate::shared::Shared;

/// Held for reading while volumes are got ready and until the instance that has them is
/// known, and for writing while those that nobody has are let go.
pub static TURN: RwLock<()> = RwLock::new(());

/// Where a volume's content is.
pub fn data_folder(root: &Path, name: &VolumeName) -> PathBuf {
    root.join("volumes").join(name.as_str()).join("data")
}

/// Makes sure that the volumes are there. One that was begun and not finished (a crash)
/// is begun anew: it appears whole or not at all.
pub fn prepare(shared: &Shared, volumes: &[VolumeUse]) -> Result<(), String> {
    for volume in volumes {
        let data = data_folder(&shared.root, &volume.name);
        let there = match &volume.memory {
            None => data.is_dir(),
            Some(_) => memory::is_mounted(&data).map_err(|e| format!("{}: {e}", data.display()))?,
        };
        if there {
            continue;
        }
        if volume.external {
            return Err(format!(
                "the external volume `{}` is not there; make the folder {}",
                volume.name,
                data.display()
            ));
        }
        make(&shared.store, volume, &data).map_err(|e| format!("volume `{}`: {e}", volume.name))?;
    }
    Ok(())
}

fn make(store: &Store, volume: &VolumeUse, data: &Path) -> Result<(), String> {
    let text = |e: io::Error| e.to_string();
    let folder = data.parent().ok_or("it has no folder")?;
    fs::create_dir_all(folder).map_err(text)?;
    if let Some(options) = &volume.memory {
        let fresh = Memory::new(options).map_err(|e| format!("its tmpfs: {e}"))?;
        fill(store, volume, &fresh.path())?;
        fs::create_dir_all(data).map_err(text)?;
        return fresh.put_on(data).map_err(text);
    }
    let fresh = folder.join("new");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).map_err(text)?;
    }
    fs::create_dir(&fresh).map_err(text)?;
    fill(store, volume, &fresh)?;
    rustix::fs::syncfs(fs::File::open(&fresh).map_err(text)?).map_err(|e| e.to_string())?;
    fs::rename(&fresh, data).map_err(text)
}

/// Gives a new volume what the image has where it is mounted.
fn fill(store: &Store, volume: &VolumeUse, fresh: &Path) -> Result<(), String> {
    let text = |e: io::Error| e.to_string();
    let tree = store.load_tree(&volume.tree).map_err(|e| e.to_string())?;
    let place = volume.target.trim_start_matches('/');
    if let Ok((found, node)) = tree.resolve(place)
        && node.is_dir()
    {
        let items: Vec<_> = match volume.nocopy {
            true => Vec::new(),
            false => tree
                .walk_from(&found)
                .map_err(|e| e.to_string())?
                .skip(1)
                .collect(),
        };
        for item in &items {
            let below = item.path.get(found.len()..).unwrap_or_default();
            let below = below.strip_prefix(b"/").unwrap_or(below);
            let path = fresh.join(std::ffi::OsStr::from_bytes(below));
            copy(store, &path, item.node).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        // Folders last: filling them moved their times.
        for item in items.iter().rev().filter(|i| i.node.is_dir()) {
            let below = item.path.get(found.len()..).unwrap_or_default();
            let below = below.strip_prefix(b"/").unwrap_or(below);
            attributes(&fresh.join(std::ffi::OsStr::from_bytes(below)), item.node).map_err(text)?;
        }
        // What the file says of a tmpfs counts for more.
        let stated = volume.memory.as_ref();
        if stated.is_none_or(|options| options.iter().all(|(key, _)| key == "size")) {
            attributes(fresh, node).map_err(text)?;
        }
    }
    Ok(())
}

/// Lets go of volumes in memory that no instance has any more.
pub fn let_go(shared: &Shared) -> io::Result<()> {
    let _turn = TURN.write().unwrap_or_else(PoisonError::into_inner);
    let volumes = match fs::read_dir(shared.root.join("volumes")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    let used: Vec<PathBuf> = shared
        .runtime
        .list()
        .iter()
        .filter_map(|instance| shared.runtime.spec(&instance.id))
        .flat_map(|spec| spec.mounts)
        .filter_map(|mount| match mount.source {
            InstanceMountSource::Bind { path, .. } | InstanceMountSource::Volume { path, .. } => {
                Some(path)
            }
            _ => None,
        })
        .collect();
    for entry in volumes {
        let data = entry?.path().join("data");
        if !used.iter().any(|path| path.starts_with(&data)) && memory::is_mounted(&data)? {
            memory::let_go(&data)?;
        }
    }
    Ok(())
}

/// Everything below `fresh` was made by us just now in this order, parents first, so no
/// link of the image's can lead out of it.
fn copy(store: &Store, path: &Path, node: &Node) -> io::Result<()> {
    match &node.kind {
        Kind::Dir => return fs::create_dir(path),
        Kind::File { digest, size } => {
            let mut file = fs::OpenOptions::new()
                .create_new(true)
                .write(true)
                .mode(0o600)
                .open(path)?;
            if *size > 0 {
                let mut source = store
                    .open_object(digest)
                    .map_err(io::Error::other)?
                    .ok_or_else(|| io::Error::other(format!("{digest} is not in the store")))?;
                io::copy(&mut source, &mut file)?;
            }
        }
        Kind::Symlink { target } => symlink(std::ffi::OsStr::from_bytes(target), path)?,
        // Devices, pipes and sockets are not content.
        Kind::Char { .. } | Kind::Block { .. } | Kind::Fifo | Kind::Socket => return Ok(()),
    }
    attributes(path, node)
}

fn attributes(path: &Path, node: &Node) -> io::Result<()> {
    lchown(path, Some(node.meta.uid), Some(node.meta.gid))?;
    if !matches!(node.kind, Kind::Symlink { .. }) {
        chmod(path, Mode::from_raw_mode(node.meta.mode))?;
    }
    let time = Timespec {
        tv_sec: node.meta.mtime.seconds,
        tv_nsec: i64::from(node.meta.mtime.nanos),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

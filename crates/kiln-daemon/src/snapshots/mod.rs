//! Snapshots of named volumes (`x-kiln.snapshot`): copies made before a release's job or
//! handed-over service first touches them, so that there is a way back for data as well.
//!
//! `<root>/volumes/<name>/snapshots/<number>/` has `data/` and `about.json` (format 1). A
//! snapshot appears whole or not at all; the newest [`KEPT`] of a volume stay. Restoring one
//! loses nothing: what the volume had becomes a snapshot itself.

mod copy;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use kiln_model::instance::InstanceMountSource;
use kiln_model::{EnvironmentName, Millis, ReleaseNumber, ServiceName, VolumeName};
use kiln_runtime::Runtime;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::volumes::{TURN, data_folder};

const FORMAT: u32 = 1;
/// Of one volume; older ones make room.
pub const KEPT: usize = 5;
/// Where one is made.
const FRESH: &str = ".fresh";

/// Asks for a copy of a volume before a service's new instance may write to it.
#[derive(Clone, Debug)]
pub struct Wish {
    pub volume: VolumeName,
    pub environment: EnvironmentName,
    pub service: ServiceName,
    pub release: ReleaseNumber,
    /// When the rollout began: one snapshot is enough for all of it.
    pub rollout: Millis,
}

/// A snapshot, as `kiln snapshots` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    pub format: u32,
    #[schema(value_type = String)]
    pub volume: VolumeName,
    /// Counts the volume's snapshots.
    pub number: u32,
    /// Milliseconds since the epoch.
    #[schema(value_type = u64)]
    pub taken: Millis,
    /// Sum of its files' sizes; `None`: it was never looked at.
    pub bytes: Option<u64>,
    pub why: Why,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Why {
    /// Before a release's first instance of `service` could write to it.
    Release {
        #[schema(value_type = String)]
        environment: EnvironmentName,
        #[schema(value_type = String)]
        service: ServiceName,
        #[schema(value_type = u64)]
        release: ReleaseNumber,
        #[schema(value_type = u64)]
        rollout: Millis,
    },
    /// Another snapshot was put in its place.
    Replaced { by: u32 },
}

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("there is no snapshot {number} of the volume `{volume}`")]
    Unknown { volume: VolumeName, number: u32 },
    #[error("the volume `{volume}` is in use by {by}")]
    InUse { volume: VolumeName, by: String },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Io { path, source }
}

fn folder(root: &Path, volume: &VolumeName) -> PathBuf {
    data_folder(root, volume).with_file_name("snapshots")
}

/// Takes the snapshot, unless the volume is still to be made or this rollout has one.
///
/// # Errors
/// The copy can't be made; then nothing of it is left.
pub fn take(root: &Path, wish: &Wish, now: Millis) -> Result<Option<Snapshot>, SnapshotError> {
    if !data_folder(root, &wish.volume).is_dir() {
        return Ok(None);
    }
    let folder = folder(root, &wish.volume);
    let _turn = turn(&folder)?;
    let known = of(root, &wish.volume)?;
    let mine = |why: &Why| {
        matches!(why, Why::Release { environment, rollout, .. }
            if *environment == wish.environment && *rollout == wish.rollout)
    };
    if known.iter().any(|s| mine(&s.why)) {
        return Ok(None);
    }
    let why = Why::Release {
        environment: wish.environment.clone(),
        service: wish.service.clone(),
        release: wish.release,
        rollout: wish.rollout,
    };
    let source = data_folder(root, &wish.volume);
    let snapshot = make(root, &wish.volume, &source, &known, why, now)?;
    let surplus = (known.len() + 1).saturating_sub(KEPT);
    for old in known.iter().take(surplus) {
        let path = folder.join(old.number.to_string());
        fs::remove_dir_all(&path).map_err(at(&path))?;
    }
    Ok(Some(snapshot))
}

/// All snapshots of all volumes, by volume and number.
///
/// # Errors
/// A folder or a snapshot's description can't be read.
pub fn all(root: &Path) -> Result<Vec<Snapshot>, SnapshotError> {
    let volumes = root.join("volumes");
    let entries = match fs::read_dir(&volumes) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(at(&volumes))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(at(&volumes))?.file_name();
        if let Some(volume) = name.to_str().and_then(|n| n.parse().ok()) {
            found.extend(of(root, &volume)?);
        }
    }
    found.sort_by(|a, b| (&a.volume, a.number).cmp(&(&b.volume, b.number)));
    Ok(found)
}

/// Puts a snapshot's content in the volume's place, in one step. Returns the snapshot that
/// what was there has become.
///
/// # Errors
/// It is not there, an instance has the volume, or it can't be copied: then nothing is
/// changed.
pub fn restore(
    root: &Path,
    runtime: &Runtime,
    volume: &VolumeName,
    number: u32,
    now: Millis,
) -> Result<Snapshot, SnapshotError> {
    let folder = folder(root, volume);
    let source = folder.join(number.to_string()).join("data");
    if !source.is_dir() {
        let volume = volume.clone();
        return Err(SnapshotError::Unknown { volume, number });
    }
    let _turn = turn(&folder)?;
    let known = of(root, volume)?;
    let data = data_folder(root, volume);
    let _none_starts = TURN.write().unwrap_or_else(PoisonError::into_inner);
    let users = users(runtime, &data);
    if !users.is_empty() {
        let (volume, by) = (volume.clone(), users.join(", "));
        return Err(SnapshotError::InUse { volume, by });
    }
    let why = Why::Replaced { by: number };
    let copied = make(root, volume, &source, &known, why, now)?;
    let copy = folder.join(copied.number.to_string()).join("data");
    renameat_with(CWD, &copy, CWD, &data, RenameFlags::EXCHANGE)
        .map_err(|e| at(&data)(e.into()))?;
    Ok(copied)
}

/// # Errors
/// It is not there, or can't be removed.
pub fn remove(root: &Path, volume: &VolumeName, number: u32) -> Result<(), SnapshotError> {
    let folder = folder(root, volume);
    let path = folder.join(number.to_string());
    if !path.is_dir() {
        let volume = volume.clone();
        return Err(SnapshotError::Unknown { volume, number });
    }
    let _turn = turn(&folder)?;
    fs::remove_dir_all(&path).map_err(at(&path))
}

/// Instances that have the volume.
fn users(runtime: &Runtime, data: &Path) -> Vec<String> {
    let uses = |path: &Path| path.starts_with(data);
    let ids = runtime.list().into_iter().map(|instance| instance.id);
    ids.filter(|id| {
        let mounts = runtime.spec(id).map(|spec| spec.mounts).unwrap_or_default();
        mounts.iter().any(|mount| match &mount.source {
            InstanceMountSource::Bind { path, .. } | InstanceMountSource::Volume { path, .. } => {
                uses(path)
            }
            _ => false,
        })
    })
    .map(|id| id.to_string())
    .collect()
}

/// One at a time may change a volume's snapshots; what a killed daemon has begun is gone.
fn turn(folder: &Path) -> Result<File, SnapshotError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(at(folder))?;
    let turn = File::open(folder).map_err(at(folder))?;
    flock(&turn, FlockOperation::LockExclusive).map_err(|e| at(folder)(e.into()))?;
    let fresh = folder.join(FRESH);
    match fs::remove_dir_all(&fresh) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at(&fresh)(e)),
        _ => Ok(turn),
    }
}

/// A volume's snapshots, oldest first.
fn of(root: &Path, volume: &VolumeName) -> Result<Vec<Snapshot>, SnapshotError> {
    let folder = folder(root, volume);
    let entries = match fs::read_dir(&folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(at(&folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(at(&folder))?;
        if entry.file_name() == FRESH {
            continue;
        }
        let path = entry.path().join("about.json");
        let text = fs::read(&path).map_err(at(&path))?;
        let about = serde_json::from_slice::<Snapshot>(&text);
        found.push(about.map_err(|e| at(&path)(e.into()))?);
    }
    found.sort_by_key(|s| s.number);
    Ok(found)
}

/// The turn is the caller's.
fn make(
    root: &Path,
    volume: &VolumeName,
    source: &Path,
    known: &[Snapshot],
    why: Why,
    now: Millis,
) -> Result<Snapshot, SnapshotError> {
    let folder = folder(root, volume);
    let fresh = folder.join(FRESH);
    let number = known.last().map_or(1, |s| s.number + 1);
    let made = fill(&fresh, source).and_then(|bytes| {
        let snapshot = Snapshot {
            format: FORMAT,
            volume: volume.clone(),
            number,
            taken: now,
            // After a restore it is the other content that stays here.
            bytes: matches!(why, Why::Release { .. }).then_some(bytes),
            why,
        };
        fs::write(fresh.join("about.json"), serde_json::to_vec(&snapshot)?)?;
        rustix::fs::syncfs(File::open(&fresh)?)?;
        fs::rename(&fresh, folder.join(number.to_string()))?;
        Ok(snapshot)
    });
    made.map_err(|source| {
        // The cause is told; what is left is taken away by the next one at the latest.
        let _ = fs::remove_dir_all(&fresh);
        at(&folder)(source)
    })
}

fn fill(fresh: &Path, source: &Path) -> io::Result<u64> {
    let data = fresh.join("data");
    fs::create_dir(fresh)?;
    fs::create_dir(&data)?;
    let (from, to) = (File::open(source)?, File::open(&data)?);
    copy::content(from.as_fd(), to.as_fd())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn wish(rollout: u64) -> Wish {
        Wish {
            volume: "data".parse().unwrap(),
            environment: "shop".parse().unwrap(),
            service: "migrate".parse().unwrap(),
            release: ReleaseNumber(rollout),
            rollout: Millis(rollout),
        }
    }

    struct Machine {
        root: tempfile::TempDir,
        runtime: Runtime,
        data: PathBuf,
    }

    impl Machine {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let config = kiln_runtime::RuntimeConfig {
                root: root.path().to_owned(),
                shim: vec![],
            };
            let runtime = Runtime::open(config).unwrap();
            let data = data_folder(root.path(), &wish(1).volume);
            fs::create_dir_all(&data).unwrap();
            Self {
                root,
                runtime,
                data,
            }
        }

        fn take(&self, rollout: u64) -> Option<u32> {
            let taken = take(self.root.path(), &wish(rollout), Millis(7)).unwrap();
            taken.map(|s| s.number)
        }

        fn snapshot(&self, number: u32) -> PathBuf {
            let folder = folder(self.root.path(), &wish(1).volume);
            folder.join(number.to_string()).join("data")
        }

        fn restore(&self, number: u32) -> Result<Snapshot, SnapshotError> {
            let volume = wish(1).volume;
            restore(self.root.path(), &self.runtime, &volume, number, Millis(8))
        }

        fn numbers(&self) -> Vec<u32> {
            let all = all(self.root.path()).unwrap();
            all.iter().map(|s| s.number).collect()
        }
    }

    #[test]
    fn a_rollout_takes_one_and_the_newest_stay() {
        let m = Machine::new();
        fs::remove_dir(&m.data).unwrap();
        assert_eq!(m.take(1), None, "of nothing");
        fs::create_dir(&m.data).unwrap();
        fs::write(m.data.join("a"), "one").unwrap();
        assert_eq!((m.take(1), m.take(1)), (Some(1), None));
        for n in 2..=7 {
            fs::write(m.data.join("a"), n.to_string()).unwrap();
            assert_eq!(m.take(u64::from(n)), Some(n));
        }
        assert_eq!(m.numbers(), [3, 4, 5, 6, 7]);
        assert_eq!(fs::read_to_string(m.snapshot(5).join("a")).unwrap(), "5");
        remove(m.root.path(), &wish(1).volume, 5).unwrap();
        assert_eq!(m.numbers(), [3, 4, 6, 7]);
        let again = remove(m.root.path(), &wish(1).volume, 5);
        assert!(matches!(again, Err(SnapshotError::Unknown { .. })));
    }

    #[test]
    fn restoring_loses_nothing() {
        let m = Machine::new();
        fs::write(m.data.join("a"), "old").unwrap();
        m.take(1);
        fs::write(m.data.join("a"), "new").unwrap();
        let before = m.restore(1).unwrap();
        assert_eq!((before.number, before.bytes), (2, None));
        assert_eq!(fs::read_to_string(m.data.join("a")).unwrap(), "old");
        assert_eq!(fs::read_to_string(m.snapshot(2).join("a")).unwrap(), "new");
        assert_eq!(fs::read_to_string(m.snapshot(1).join("a")).unwrap(), "old");
        assert!(matches!(m.restore(9), Err(SnapshotError::Unknown { .. })));
    }

    #[test]
    fn what_a_killed_daemon_has_begun_is_begun_anew() {
        let m = Machine::new();
        fs::write(m.data.join("a"), "whole").unwrap();
        let fresh = folder(m.root.path(), &wish(1).volume).join(FRESH);
        fs::create_dir_all(fresh.join("data")).unwrap();
        fs::write(fresh.join("data/a"), "ha").unwrap();
        assert_eq!(m.numbers(), [0; 0]);
        assert_eq!(m.take(1), Some(1));
        assert_eq!(
            fs::read_to_string(m.snapshot(1).join("a")).unwrap(),
            "whole"
        );
    }

    #[test]
    fn everything_is_as_it_was() {
        let m = Machine::new();
        let at = |name: &str| m.data.join(name);
        fs::create_dir(at("sub")).unwrap();
        fs::write(at("sub/file"), "text").unwrap();
        fs::set_permissions(at("sub/file"), PermissionsExt::from_mode(0o4750)).unwrap();
        fs::hard_link(at("sub/file"), at("other-name")).unwrap();
        symlink("/etc/passwd", at("link")).unwrap();
        rustix::fs::mknodat(
            CWD,
            at("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let sparse = File::create(at("sparse")).unwrap();
        sparse.set_len(64 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (64 << 20) - 3).unwrap();
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(at("sub"), "user.note", b"kept", flags).unwrap();
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        File::open(at("sub")).unwrap().set_modified(old).unwrap();
        m.take(1);
        let copy = |name: &str| m.snapshot(1).join(name);
        let (file, other) = (copy("sub/file"), copy("other-name"));
        let (file, other) = (file.metadata().unwrap(), other.metadata().unwrap());
        assert_eq!((file.ino(), file.mode() & 0o7777), (other.ino(), 0o4750));
        let link = fs::read_link(copy("link")).unwrap();
        assert_eq!(link, Path::new("/etc/passwd"));
        let pipe = copy("pipe").symlink_metadata().unwrap();
        assert_eq!(pipe.mode() & 0o170000, 0o010000);
        let sparse = copy("sparse").metadata().unwrap();
        assert!(sparse.len() == 64 << 20 && sparse.blocks() < 1000);
        let text = fs::read(copy("sparse")).unwrap();
        assert!(text.ends_with(b"\0end"));
        let mut value = [0u8; 8];
        let n = rustix::fs::getxattr(copy("sub"), "user.note", &mut value[..]).unwrap();
        assert_eq!(&value[..n], b"kept");
        assert_eq!(copy("sub").metadata().unwrap().modified().unwrap(), old);
    }
}

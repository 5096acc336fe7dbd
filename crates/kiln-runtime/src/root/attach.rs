//! The mounts below the root: scratch, volumes, files, tmpfs, other images' trees.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use kiln_model::InstanceSpec;
use kiln_model::instance::{InstanceMount, InstanceMountSource, Root, Scratch, TreePaths};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags};

use super::tree::{self, Abilities, Overlay};
use super::{Late, RootError, Stage, Step, inside, is_late, stage_error};
use crate::sys::{self, MountAttributes};

/// Configs and secrets are copied into memory: a bigger file is a volume's business.
const MAX_FILE: u64 = 64 << 20;

const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
/// What kiln puts in a place of its own.
pub(super) const READ_ONLY_FILE: u64 = RDONLY | NOSUID | NODEV | NOEXEC;

pub(super) struct Attacher<'a> {
    pub spec: &'a InstanceSpec,
    pub stage: &'a Stage,
    pub data_only: bool,
    pub late: Vec<Late>,
    pub count: u32,
}

impl Attacher<'_> {
    pub fn attach(&mut self, step: &Step<'_>) -> Result<(), RootError> {
        match step {
            Step::Scratch(scratch) => self.scratch(scratch),
            Step::Mount(mount) => self.mount(mount),
            Step::Etc { target, text } => {
                let path = self.next_file();
                fs::write(&path, text).map_err(stage_error(&path))?;
                fs::set_permissions(&path, Permissions::from_mode(0o644))
                    .map_err(stage_error(&path))?;
                self.bind(&path, target, false, READ_ONLY_FILE, None)
            }
        }
    }

    pub(super) fn next_file(&mut self) -> PathBuf {
        self.count += 1;
        self.stage.path(&format!("files/{}", self.count))
    }

    fn mount(&mut self, mount: &InstanceMount) -> Result<(), RootError> {
        let mut attributes = NOSUID;
        if !mount.dev {
            attributes |= NODEV;
        }
        if mount.read_only {
            attributes |= RDONLY;
        } else if !mount.exec {
            attributes |= NOEXEC;
        }
        match &mount.source {
            InstanceMountSource::Bind {
                path,
                recursive,
                propagation,
            } => {
                let propagation = propagation.as_deref();
                self.bind(path, &mount.target, *recursive, attributes, propagation)
            }
            InstanceMountSource::Volume { path, subpath } => {
                self.part_of_volume(path, subpath, &mount.target, attributes)
            }
            InstanceMountSource::File {
                path,
                uid,
                gid,
                mode,
                secret: _,
            } => {
                let copy = self.copy(path, &mount.target)?;
                chown(&copy, Some(*uid), Some(*gid)).map_err(stage_error(&copy))?;
                fs::set_permissions(&copy, Permissions::from_mode(*mode & 0o7777))
                    .map_err(stage_error(&copy))?;
                let attributes = match mount.exec {
                    true => READ_ONLY_FILE & !NOEXEC,
                    false => READ_ONLY_FILE,
                };
                self.bind(&copy, &mount.target, false, attributes, None)
            }
            InstanceMountSource::Tmpfs {
                size,
                mode,
                uid,
                gid,
            } => {
                let mut options = vec![format!("mode={:o}", mode.unwrap_or(0o1777))];
                options.extend(size.map(|n| format!("size={n}")));
                options.extend(uid.map(|n| format!("uid={n}")));
                options.extend(gid.map(|n| format!("gid={n}")));
                self.tmpfs(&mount.target, options, attributes)
            }
            InstanceMountSource::Tree { tree, subpath } => {
                let view = self.mount_tree(tree, &mount.target)?;
                let path = match subpath {
                    Some(subpath) => {
                        let fail = |source| RootError::Content {
                            path: format!("{subpath} of the image"),
                            target: mount.target.clone(),
                            source,
                        };
                        let resolved = inside::resolve(&view, subpath).map_err(fail)?;
                        if !resolved.exists() {
                            return Err(fail(io::ErrorKind::NotFound.into()));
                        }
                        view.join(resolved.existing)
                    }
                    None => view,
                };
                self.bind(&path, &mount.target, false, NOSUID | NODEV | RDONLY, None)
            }
        }
    }

    fn part_of_volume(
        &mut self,
        volume: &Path,
        subpath: &str,
        target: &str,
        attributes: u64,
    ) -> Result<(), RootError> {
        let found = inside::open_path(volume, subpath).map_err(|source| RootError::Content {
            path: format!("{subpath} of the volume {}", volume.display()),
            target: target.to_owned(),
            source,
        })?;
        let at = PathBuf::from(tree::fd_path(&found));
        self.bind(&at, target, false, attributes, None)
    }

    fn copy(&mut self, from: &Path, target: &str) -> Result<PathBuf, RootError> {
        let fail = |source| RootError::Content {
            path: from.display().to_string(),
            target: target.to_owned(),
            source,
        };
        let to = self.next_file();
        let source = File::open(from).map_err(fail)?;
        let mut copy = File::create_new(&to).map_err(stage_error(&to))?;
        let length = io::copy(&mut source.take(MAX_FILE + 1), &mut copy).map_err(fail)?;
        if length > MAX_FILE {
            return Err(fail(io::Error::other(
                "longer than 64 MiB; mount it as a volume",
            )));
        }
        Ok(to)
    }

    fn mount_tree(&mut self, tree: &TreePaths, target: &str) -> Result<PathBuf, RootError> {
        self.count += 1;
        let metadata = self.stage.make(&format!("tree-{}", self.count))?;
        let empty = self.stage.make(&format!("empty-{}", self.count))?;
        let view = self.stage.make(&format!("view-{}", self.count))?;
        tree::mount_metadata(tree, &metadata, Abilities::default().file_backed)?;
        super::points::copy_attributes(&metadata, &empty).map_err(stage_error(&empty))?;
        let (metadata, empty) = (tree::open_dir(&metadata)?, tree::open_dir(&empty)?);
        let objects = tree::open_dir(&tree.objects)?;
        Overlay {
            what: target,
            lower: &[&empty, &metadata],
            objects: Some(&objects),
            upper: None,
            flags: MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID,
        }
        .mount(&view.display().to_string(), self.data_only)?;
        Ok(view)
    }

    pub(super) fn bind(
        &mut self,
        source: &Path,
        target: &str,
        recursive: bool,
        attributes: u64,
        propagation: Option<&str>,
    ) -> Result<(), RootError> {
        let propagation = match propagation {
            None | Some("" | "rprivate" | "private") => libc::MS_PRIVATE,
            Some("rslave" | "slave") => libc::MS_SLAVE,
            Some(other) => return Err(RootError::Propagation(other.to_owned())),
        };
        let attributes = MountAttributes {
            set: attributes,
            propagation,
            ..MountAttributes::default()
        };
        let fail = |source_error| RootError::Attach {
            what: source.display().to_string(),
            target: target.to_owned(),
            source: source_error,
        };
        let is_dir = fs::metadata(source).map_err(fail)?.is_dir();
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let clone = rustix::mount::open_tree(CWD, source, flags).map_err(|e| fail(e.into()))?;
        sys::set_mount_attributes(clone.as_fd(), recursive, &attributes).map_err(fail)?;
        if is_late(target) {
            let staged = self.stage_point(is_dir)?;
            move_to(&clone, &staged.display().to_string()).map_err(fail)?;
            self.late.push(Late {
                source: Some(staged),
                target: target.to_owned(),
                options: late_options("rbind", attributes.set),
            });
            return Ok(());
        }
        let at = self.target(target, is_dir)?;
        move_to(&clone, &tree::fd_path(&at)).map_err(fail)
    }

    fn stage_point(&mut self, is_dir: bool) -> Result<PathBuf, RootError> {
        self.count += 1;
        let name = format!("late-{}", self.count);
        if is_dir {
            return self.stage.make(&name);
        }
        let path = self.stage.path(&name);
        File::create_new(&path).map_err(stage_error(&path))?;
        Ok(path)
    }

    /// Opens the place to mount on, and makes it where a writable mount allows it.
    fn target(&self, target: &str, is_dir: bool) -> Result<OwnedFd, RootError> {
        let root = self.stage.root();
        let fail = |source| {
            RootError::Point(super::PointError::Make {
                target: target.to_owned(),
                source,
            })
        };
        let resolved = inside::resolve(&root, target).map_err(fail)?;
        if !resolved.exists() {
            let path = root.join(resolved.path());
            if is_dir {
                fs::create_dir_all(&path).map_err(fail)?;
            } else {
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent).map_err(fail)?;
                }
                File::create(&path).map_err(fail)?;
            }
        }
        inside::open_path(&root, target).map_err(fail)
    }

    fn tmpfs(
        &mut self,
        target: &str,
        mut options: Vec<String>,
        attributes: u64,
    ) -> Result<(), RootError> {
        if is_late(target) {
            options.extend(late_options("", attributes));
            self.late.push(Late {
                source: None,
                target: target.to_owned(),
                options,
            });
            return Ok(());
        }
        let at = self.target(target, true)?;
        self.mount_tmpfs(&tree::fd_path(&at), target, &options.join(","), attributes)
    }

    fn mount_tmpfs(
        &self,
        at: &str,
        target: &str,
        options: &str,
        attributes: u64,
    ) -> Result<(), RootError> {
        let fail = |source| RootError::Attach {
            what: "tmpfs".into(),
            target: target.to_owned(),
            source,
        };
        let options = CString::new(options).map_err(|e| fail(io::Error::other(e)))?;
        rustix::mount::mount(
            "tmpfs",
            at,
            "tmpfs",
            mount_flags(attributes),
            Some(options.as_c_str()),
        )
        .map_err(|e| fail(e.into()))
    }

    /// A bounded tmpfs; over a folder of the image that isn't empty, the upper layer
    /// of an overlay.
    fn scratch(&mut self, scratch: &Scratch) -> Result<(), RootError> {
        let target = scratch.path.as_str();
        if is_late(target) {
            // `/dev/shm` is a tmpfs anyway.
            if target == "/dev/shm" {
                return Ok(());
            }
            return Err(RootError::ScratchTarget(scratch.path.clone()));
        }
        let mut attributes = NOSUID | NODEV;
        if !scratch.exec {
            attributes |= NOEXEC;
        }
        let at = self.target(target, true)?;
        let at_path = tree::fd_path(&at);
        let folder = PathBuf::from(&at_path);
        let meta = fs::metadata(&folder).map_err(stage_error(&folder))?;
        let empty = fs::read_dir(&folder)
            .map_err(stage_error(&folder))?
            .next()
            .is_none();
        let tree = match &self.spec.root {
            Root::Sealed { tree, .. } => tree,
            _ => return Err(RootError::ScratchTarget(scratch.path.clone())),
        };
        if empty {
            let mode = scratch_mode(target, meta.mode() & 0o7777, self.made_by_us(target)?);
            let options = format!(
                "size={},mode={mode:o},uid={},gid={}",
                scratch.size,
                meta.uid(),
                meta.gid()
            );
            return self.mount_tmpfs(&at_path, target, &options, attributes);
        }
        self.scratch_overlay(scratch, tree, &at, attributes)
    }

    /// Whether the image itself lacks this folder.
    fn made_by_us(&self, target: &str) -> Result<bool, RootError> {
        let tree = self.stage.path("tree");
        let resolved = inside::resolve(&tree, target).map_err(stage_error(&tree))?;
        Ok(!resolved.exists())
    }

    fn scratch_overlay(
        &mut self,
        scratch: &Scratch,
        tree: &TreePaths,
        at: &OwnedFd,
        attributes: u64,
    ) -> Result<(), RootError> {
        self.count += 1;
        let dir = self.stage.make(&format!("scratch-{}", self.count))?;
        let options = format!("size={},mode=0700", scratch.size);
        self.mount_tmpfs(
            &dir.display().to_string(),
            &scratch.path,
            &options,
            NOSUID | NODEV,
        )?;
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        for path in [&upper, &work] {
            fs::create_dir(path).map_err(stage_error(path))?;
        }
        let shown = PathBuf::from(tree::fd_path(at));
        super::points::copy_attributes(&shown, &upper).map_err(stage_error(&upper))?;
        let (upper, work) = (tree::open_dir(&upper)?, tree::open_dir(&work)?);
        let flags = mount_flags(attributes);
        let at_path = tree::fd_path(at);
        if !self.data_only || self.made_by_us(&scratch.path)? {
            // The folder as the root shows it: one overlay on top of another.
            Overlay {
                what: &scratch.path,
                lower: &[at],
                objects: None,
                upper: Some((&upper, &work)),
                flags,
            }
            .mount(&at_path, false)?;
            return Ok(());
        }
        let metadata = inside::open_path(&self.stage.path("tree"), &scratch.path)
            .map_err(stage_error(&dir))?;
        let points = inside::open_path(&self.stage.path("points"), &scratch.path);
        let objects = tree::open_dir(&tree.objects)?;
        let mut lower = Vec::new();
        // Only a folder that has mount points below it is repeated there.
        lower.extend(points.as_ref().ok());
        lower.push(&metadata);
        Overlay {
            what: &scratch.path,
            lower: &lower,
            objects: Some(&objects),
            upper: Some((&upper, &work)),
            flags,
        }
        .mount(&at_path, true)?;
        Ok(())
    }
}

/// A folder that the image has keeps its mode; `/tmp` and its kind are everyone's.
fn scratch_mode(target: &str, mode: u32, made: bool) -> u32 {
    match target {
        "/tmp" | "/var/tmp" if made => 0o1777,
        _ => mode,
    }
}

fn move_to(mount: &OwnedFd, at: &str) -> io::Result<()> {
    rustix::mount::move_mount(
        mount,
        "",
        CWD,
        at,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS,
    )?;
    Ok(())
}

fn mount_flags(attributes: u64) -> MountFlags {
    let mut flags = MountFlags::empty();
    for (attribute, flag) in [
        (RDONLY, MountFlags::RDONLY),
        (NOSUID, MountFlags::NOSUID),
        (NODEV, MountFlags::NODEV),
        (NOEXEC, MountFlags::NOEXEC),
    ] {
        if attributes & attribute != 0 {
            flags |= flag;
        }
    }
    flags
}

fn late_options(first: &str, attributes: u64) -> Vec<String> {
    let mut options: Vec<String> = Vec::new();
    if !first.is_empty() {
        options.push(first.to_owned());
    }
    for (attribute, name) in [
        (RDONLY, "ro"),
        (NOSUID, "nosuid"),
        (NODEV, "nodev"),
        (NOEXEC, "noexec"),
    ] {
        if attributes & attribute != 0 {
            options.push(name.to_owned());
        }
    }
    options
}

//! An instance's root file system, put together in the shim's own mount namespace,
//! so that nothing of it is left when the shim and the instance are gone.
//!
//! Everything but `/proc`, `/sys` and `/dev` is mounted here; what has to lie
//! inside those is handed to libcontainer as [`Late`] mounts.

pub mod inside;
pub mod points;
pub mod share;
pub mod tree;

mod attach;
mod identity;

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kiln_model::InstanceSpec;
use kiln_model::instance::{InstanceMountSource, Root, Scratch, TreePaths};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::files;
use crate::paths::InstancePaths;
use points::{Point, PointError};
use tree::{Abilities, MountError, Overlay};

/// Mounted by libcontainer after `/dev` and its kind: a bind of `source`, or a tmpfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Late {
    pub source: Option<PathBuf>,
    pub target: String,
    pub options: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Point(#[from] PointError),
    #[error("cannot prepare {path}: {source}")]
    Stage { path: String, source: io::Error },
    #[error("cannot mount {what} on {target}: {source}")]
    Attach {
        what: String,
        target: String,
        source: io::Error,
    },
    #[error("{path} cannot be read for {target}: {source}")]
    Content {
        path: String,
        target: String,
        source: io::Error,
    },
    #[error(
        "the mount propagation `{0}` is not supported: an instance's mounts never reach the host (use private, rprivate, slave or rslave)"
    )]
    Propagation(String),
    #[error("`{0}` cannot be scratch: it is one of the kernel's own file systems")]
    ScratchTarget(String),
    #[error("the working directory {path} cannot be made: {source}")]
    WorkingDirectory { path: String, source: io::Error },
}

fn stage_error(path: &Path) -> impl FnOnce(io::Error) -> RootError + '_ {
    move |source| RootError::Stage {
        path: path.display().to_string(),
        source,
    }
}

/// Whether libcontainer mounts something over this path's beginning.
fn is_late(target: &str) -> bool {
    ["/dev", "/proc", "/sys"]
        .iter()
        .any(|p| target == *p || target.strip_prefix(p).is_some_and(|r| r.starts_with('/')))
}

/// Builds the root of `spec` at `paths.rootfs()`. The calling process must be in a
/// mount namespace of its own (see [`private_namespace`]).
pub fn assemble(
    spec: &InstanceSpec,
    paths: &InstancePaths,
    abilities: Abilities,
) -> Result<Vec<Late>, RootError> {
    let stage = Stage::new(paths.stage())?;
    let plan = Plan::new(spec);
    let data_only = mount_root(spec, paths, &stage, &plan.points(spec), abilities)?;
    make_working_directory(spec, &stage.root())?;
    let mut builder = attach::Attacher {
        spec,
        stage: &stage,
        data_only,
        late: Vec::new(),
        count: 0,
    };
    for step in &plan.steps {
        builder.attach(step)?;
    }
    builder.identities()?;
    Ok(builder.late)
}

/// Leaves the host's mount namespace; later mounts of the host are still seen.
pub fn private_namespace() -> io::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )?;
    Ok(())
}

/// The tmpfs that holds mount points, generated files, and secrets.
pub struct Stage {
    dir: PathBuf,
}

impl Stage {
    fn new(dir: PathBuf) -> Result<Self, RootError> {
        let mount = |options: &std::ffi::CStr| {
            rustix::mount::mount(
                "tmpfs",
                &dir,
                "tmpfs",
                MountFlags::NOSUID | MountFlags::NODEV,
                Some(options),
            )
        };
        // Secrets shall not reach a swap device; kernels before 6.4 can't promise it.
        mount(c"mode=0700,noswap")
            .or_else(|_| mount(c"mode=0700"))
            .map_err(|e| stage_error(&dir)(e.into()))?;
        let stage = Self { dir };
        for name in ["root", "points", "files", "tree", "lower"] {
            stage.make(name)?;
        }
        Ok(stage)
    }

    /// Makes (and gives) a folder in it.
    fn make(&self, name: &str) -> Result<PathBuf, RootError> {
        let path = self.dir.join(name);
        fs::create_dir(&path).map_err(stage_error(&path))?;
        fs::set_permissions(&path, Permissions::from_mode(0o755)).map_err(stage_error(&path))?;
        Ok(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn root(&self) -> PathBuf {
        self.path("root")
    }
}

/// One mount below the root.
enum Step<'a> {
    Scratch(&'a Scratch),
    Mount(&'a kiln_model::instance::InstanceMount),
    Etc { target: &'static str, text: String },
}

impl Step<'_> {
    fn target(&self) -> &str {
        match self {
            Step::Scratch(scratch) => &scratch.path,
            Step::Mount(mount) => &mount.target,
            Step::Etc { target, .. } => target,
        }
    }

    fn is_dir(&self) -> bool {
        match self {
            Step::Scratch(_) => true,
            Step::Etc { .. } => false,
            Step::Mount(mount) => match &mount.source {
                InstanceMountSource::Bind { path, .. } => path.is_dir(),
                InstanceMountSource::Volume { path, subpath } => {
                    let resolved = inside::resolve(path, subpath);
                    resolved.is_ok_and(|r| path.join(r.path()).is_dir())
                }
                InstanceMountSource::File { .. } => false,
                InstanceMountSource::Tmpfs { .. } => true,
                InstanceMountSource::Tree { .. } => true,
            },
        }
    }
}

/// All mounts below the root, parents before children.
struct Plan<'a> {
    steps: Vec<Step<'a>>,
}

impl<'a> Plan<'a> {
    fn new(spec: &'a InstanceSpec) -> Self {
        let mut steps: Vec<Step<'a>> = spec.mounts.iter().map(Step::Mount).collect();
        let taken = |steps: &[Step<'_>], target: &str| steps.iter().any(|s| s.target() == target);
        if let Root::Sealed { scratch, .. } = &spec.root {
            let free: Vec<_> = scratch.iter().filter(|s| !taken(&steps, &s.path)).collect();
            steps.extend(free.into_iter().map(Step::Scratch));
        }
        for (target, text) in [
            ("/etc/resolv.conf", files::resolv_conf(spec)),
            ("/etc/hosts", files::hosts(spec)),
            ("/etc/hostname", files::hostname(spec)),
        ] {
            if !taken(&steps, target) {
                steps.push(Step::Etc { target, text });
            }
        }
        steps.sort_by_key(|step| Path::new(step.target()).components().count());
        Self { steps }
    }

    /// The mount points that must be in the root itself; what lies below another
    /// mount is made there.
    fn points(&self, spec: &InstanceSpec) -> Vec<Point> {
        let below = |target: &str| {
            let target = Path::new(target);
            self.steps
                .iter()
                .any(|s| Path::new(s.target()) != target && target.starts_with(s.target()))
        };
        let mut points: Vec<Point> = ["/proc", "/sys", "/dev"]
            .map(|target| Point {
                target: target.into(),
                is_dir: true,
            })
            .into();
        if let Root::Unsealed { .. } = spec.root {
            // Programs count on them; where the root is sealed they are scratch.
            let missing = ["/run", "/tmp", "/var/tmp"]
                .into_iter()
                .filter(|p| !below(p));
            points.extend(missing.map(|target| Point {
                target: target.into(),
                is_dir: true,
            }));
        }
        if !matches!(spec.root, Root::Layered { .. }) && !is_late(&spec.cwd) && !below(&spec.cwd) {
            points.push(Point {
                target: spec.cwd.clone(),
                is_dir: true,
            });
        }
        points.extend(
            self.steps
                .iter()
                .filter(|s| !is_late(s.target()) && !below(s.target()))
                .map(|s| Point {
                    target: s.target().to_owned(),
                    is_dir: s.is_dir(),
                }),
        );
        points
    }
}

fn make_working_directory(spec: &InstanceSpec, root: &Path) -> Result<(), RootError> {
    if !matches!(spec.root, Root::Layered { .. }) {
        return Ok(());
    }
    let fail = |source| RootError::WorkingDirectory {
        path: spec.cwd.clone(),
        source,
    };
    let resolved = inside::resolve(root, &spec.cwd).map_err(fail)?;
    fs::create_dir_all(root.join(resolved.path())).map_err(fail)
}

/// Mounts the image (and its writable layer) at the stage's `root`; gives whether
/// data-only layers are in use.
fn mount_root(
    spec: &InstanceSpec,
    paths: &InstancePaths,
    stage: &Stage,
    points: &[Point],
    abilities: Abilities,
) -> Result<bool, RootError> {
    let root = stage.root().display().to_string();
    let nodev = if spec.security.privileged {
        MountFlags::empty()
    } else {
        MountFlags::NODEV
    };
    let (tree, upper, work) = match &spec.root {
        Root::Sealed { tree, .. } => {
            mount_metadata(tree, stage, abilities)?;
            points::make(&stage.path("tree"), &stage.path("points"), points)?;
            return lower_overlay(tree, stage, &root, nodev, abilities);
        }
        Root::Unsealed { tree } => (Some(tree), paths.upper(), paths.work()),
        Root::Layered { tree, upper, work } => (tree.as_ref(), upper.clone(), work.clone()),
    };
    for dir in [&upper, &work] {
        fs::create_dir_all(dir).map_err(stage_error(dir))?;
    }
    if tree.is_some() && matches!(spec.root, Root::Unsealed { .. }) {
        fs::set_permissions(&upper, Permissions::from_mode(0o755)).map_err(stage_error(&upper))?;
    }
    let writable = Writable {
        stage,
        tree,
        upper: &upper,
        work: &work,
        points,
        flags: nodev,
    };
    match writable.mount(&root, abilities) {
        // Two overlays deep, an EROFS on a plain file may be one level too many.
        Err(RootError::Mount(MountError::Overlay { source, .. }))
            if tree.is_some()
                && abilities.file_backed
                && source.raw_os_error() == Some(libc::EINVAL) =>
        {
            writable.unmount()?;
            let on_loop = Abilities {
                file_backed: false,
                ..abilities
            };
            writable.mount(&root, on_loop)
        }
        other => other,
    }
}

/// A root that is written to: an overlay over the read-only view of the image, so
/// that the upper folder holds whole files and plain folders only.
struct Writable<'a> {
    stage: &'a Stage,
    tree: Option<&'a TreePaths>,
    upper: &'a Path,
    work: &'a Path,
    points: &'a [Point],
    flags: MountFlags,
}

impl Writable<'_> {
    fn mount(&self, root: &str, abilities: Abilities) -> Result<bool, RootError> {
        let (stage, lower) = (self.stage, self.stage.path("lower"));
        let mut data_only = abilities.data_only;
        let below = match self.tree {
            Some(tree) => {
                mount_metadata(tree, stage, abilities)?;
                points_over_upper(stage, Some(tree), self.upper, self.points, abilities)?;
                let at = lower.display().to_string();
                data_only = lower_overlay(tree, stage, &at, self.flags, abilities)?;
                lower
            }
            None => {
                points_over_upper(stage, None, self.upper, self.points, abilities)?;
                stage.path("points")
            }
        };
        let below = tree::open_dir(&below)?;
        let (upper, work) = (tree::open_dir(self.upper)?, tree::open_dir(self.work)?);
        Overlay {
            what: "the root",
            lower: &[&below],
            objects: None,
            upper: Some((&upper, &work)),
            flags: self.flags,
        }
        .mount(root, false)?;
        Ok(data_only)
    }

    /// Back to where [`Writable::mount`] began.
    fn unmount(&self) -> Result<(), RootError> {
        for name in ["lower", "tree"] {
            let _ = rustix::mount::unmount(self.stage.path(name), UnmountFlags::DETACH);
        }
        let points = self.stage.path("points");
        fs::remove_dir_all(&points).map_err(stage_error(&points))?;
        self.stage.make("points").map(drop)
    }
}

fn mount_metadata(tree: &TreePaths, stage: &Stage, abilities: Abilities) -> Result<(), RootError> {
    Ok(tree::mount_metadata(
        tree,
        &stage.path("tree"),
        abilities.file_backed,
    )?)
}

/// The read-only view: mount points over the tree over its objects.
fn lower_overlay(
    tree: &TreePaths,
    stage: &Stage,
    at: &str,
    flags: MountFlags,
    abilities: Abilities,
) -> Result<bool, RootError> {
    let points = tree::open_dir(&stage.path("points"))?;
    let metadata = tree::open_dir(&stage.path("tree"))?;
    let objects = tree::open_dir(&tree.objects)?;
    points::copy_attributes(&stage.path("tree"), &stage.path("points"))
        .map_err(stage_error(&stage.path("points")))?;
    Ok(Overlay {
        what: "the image",
        lower: &[&points, &metadata],
        objects: Some(&objects),
        upper: None,
        flags: flags | MountFlags::RDONLY,
    }
    .mount(at, abilities.data_only)?)
}

/// Makes the points that neither the tree nor the writable layer has.
fn points_over_upper(
    stage: &Stage,
    tree: Option<&TreePaths>,
    upper: &Path,
    points: &[Point],
    abilities: Abilities,
) -> Result<(), RootError> {
    let view = stage.path("lower");
    let (above, empty) = (
        tree::open_dir(upper)?,
        tree::open_dir(&stage.path("points"))?,
    );
    let below = tree
        .map(|_| tree::open_dir(&stage.path("tree")))
        .transpose()?;
    // Without its content the kernel won't even look a file of the tree up.
    let objects = tree.map(|tree| tree::open_dir(&tree.objects)).transpose()?;
    let mut lower = vec![&above];
    lower.extend(below.as_ref());
    lower.push(&empty);
    Overlay {
        what: "a look at the writable layer",
        lower: &lower,
        objects: objects.as_ref(),
        upper: None,
        flags: MountFlags::RDONLY,
    }
    .mount(&view.display().to_string(), abilities.data_only)?;
    // Written to only after the look: a layer of a mounted overlay may not change.
    let scratch = stage.make("points-new")?;
    let made = points::make(&view, &scratch, points);
    rustix::mount::unmount(&view, UnmountFlags::DETACH)
        .map_err(|e| stage_error(&view)(e.into()))?;
    made?;
    let target = stage.path("points");
    fs::remove_dir(&target)
        .and_then(|()| fs::rename(&scratch, &target))
        .map_err(stage_error(&target))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn spec(tree: &TreePaths) -> InstanceSpec {
        serde_json::from_value(serde_json::json!({
            "format": 1, "id": "i", "purpose": "test", "argv": ["/x"], "env": {}, "cwd": "/made/here",
            "user": "", "group_add": [], "hostname": "h", "domainname": null,
            "root": { "sealed": { "tree": tree, "scratch": [
                { "path": "/sub", "size": 1048576, "exec": false },
                { "path": "/new/tmp", "size": 1048576, "exec": true },
            ] } },
            "mounts": [
                { "source": { "type": "tree", "tree": tree, "subpath": "sub" },
                  "target": "/other", "read_only": true, "exec": false, "dev": false },
                { "source": { "type": "bind", "path": "/proc/sys", "recursive": false, "propagation": null },
                  "target": "/dev/bound", "read_only": true, "exec": false, "dev": false },
            ],
            "network": "isolated", "resolver": null, "hosts": [], "namespaces": {},
            "security": kiln_model::instance::InstanceSecurity::default(), "limits": {},
            "stop_signal": "TERM", "stop_grace": 1, "init": false, "tty": false, "stdin_open": false,
            "logging": kiln_model::spec::Logging::default(),
        }))
        .unwrap()
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().flatten();
        let mut names: Vec<String> = entries
            .map(|e| e.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn looks_right(root: &Path, late: &[Late]) {
        assert_eq!(
            names(root),
            [
                "dev", "etc", "made", "new", "other", "proc", "sub", "sys", "top"
            ]
        );
        assert_eq!(
            names(&root.join("etc")),
            ["hostname", "hosts", "resolv.conf"]
        );
        // The objects' folders show nowhere.
        assert_eq!(names(&root.join("sub")), ["file"]);
        assert_eq!(names(&root.join("other")), ["file"]);
        for path in ["sub/file", "other/file", "top"] {
            assert_eq!(fs::read_to_string(root.join(path)).unwrap(), "the content");
        }
        for path in ["sub/file", "sub/new", "new/tmp/x"] {
            fs::write(root.join(path), "changed").unwrap();
            assert_eq!(fs::read_to_string(root.join(path)).unwrap(), "changed");
        }
        for path in ["top", "x", "other/file", "new/x", "etc/hosts"] {
            let error = fs::write(root.join(path), "x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{path}");
        }
        assert_eq!(late.len(), 1);
        assert_eq!(
            (
                late[0].target.as_str(),
                late[0].options.contains(&"ro".into())
            ),
            ("/dev/bound", true)
        );
        assert!(late[0].source.as_ref().unwrap().join("kernel").exists());
    }

    #[test]
    fn a_sealed_root_is_the_same_on_new_and_old_kernels() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("KILN_TEST_STRICT").is_none(), "needs root");
            eprintln!("SKIPPED: needs root");
            return;
        }
        let new = crate::seccomp::kernel_version() >= (6, 12);
        for (n, modern) in [true, false].into_iter().filter(|m| new || !m).enumerate() {
            let dir = std::env::temp_dir().join(format!("kiln-root-{}-{n}", std::process::id()));
            let paths = InstancePaths::from_dir(dir.join("instance"));
            fs::create_dir_all(paths.stage()).unwrap();
            let tree = tree::tests::composefs(&dir);
            std::thread::spawn(move || {
                private_namespace().unwrap();
                let abilities = Abilities {
                    file_backed: modern,
                    data_only: modern,
                };
                let late = assemble(&spec(&tree), &paths, abilities).unwrap();
                looks_right(&paths.rootfs(), &late);
            })
            .join()
            .unwrap_or_else(|_| panic!("modern: {modern}"));
            fs::remove_dir_all(&dir).unwrap();
        }
    }
}

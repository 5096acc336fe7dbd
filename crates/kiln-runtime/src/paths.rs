//! Where an instance keeps what, below `<KILN_ROOT>/instances/<id>` (mode 0700).

use std::path::{Path, PathBuf};

use kiln_model::InstanceId;

/// The file names inside one instance's folder.
#[derive(Clone, Debug)]
pub struct InstancePaths {
    dir: PathBuf,
}

impl InstancePaths {
    pub fn new(root: &Path, id: &InstanceId) -> Self {
        Self {
            dir: root.join("instances").join(id.as_str()),
        }
    }

    pub fn from_dir(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The [`InstanceSpec`](kiln_model::InstanceSpec), written before anything else.
    pub fn spec(&self) -> PathBuf {
        self.dir.join("spec.json")
    }

    /// Written by the shim: see [`crate::status`].
    pub fn status(&self) -> PathBuf {
        self.dir.join("status.json")
    }

    /// Locked by the shim as long as it lives.
    pub fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// Locked by whoever starts or removes the instance.
    pub fn turn(&self) -> PathBuf {
        self.dir.join("turn")
    }

    /// The current log file; older ones are `log.1`, `log.2`, …
    pub fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// What the shim itself has to say when something is wrong.
    pub fn shim_log(&self) -> PathBuf {
        self.dir.join("shim.log")
    }

    /// The bound network namespace.
    pub fn netns(&self) -> PathBuf {
        self.dir.join("netns")
    }

    /// libcontainer's bundle: `config.json`.
    pub fn bundle(&self) -> PathBuf {
        self.dir.join("bundle")
    }

    /// libcontainer's own state.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// A tmpfs in the shim's mount namespace: mount points, generated files, secrets.
    pub fn stage(&self) -> PathBuf {
        self.dir.join("stage")
    }

    /// The root as the instance sees it, in the shim's mount namespace.
    pub fn rootfs(&self) -> PathBuf {
        self.stage().join("root")
    }

    /// An unsealed instance's writable layer.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    pub fn work(&self) -> PathBuf {
        self.dir.join("work")
    }
}

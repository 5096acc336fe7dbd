//! A RUN's folders on disk.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kiln_model::InstanceId;

use super::ExecError;
use super::agent::Agent;
use crate::held::Held;

/// Before the six letters and digits that a RUN's folder and instance are named by.
pub(super) const PREFIX: &str = "build-";

/// A RUN's folders on disk; gone with it.
pub(super) struct Work {
    folder: Held,
    pub id: InstanceId,
    /// Caches that nobody else may use until the step has ended.
    pub locks: Vec<fs::File>,
    pub agents: Vec<Agent>,
}

impl Work {
    pub fn new(scratch: &Path) -> Result<Self, ExecError> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |cause| ExecError::Scratch { path, cause }
        };
        let folder = Held::apart(scratch, PREFIX).map_err(fail(scratch))?;
        let id = instance(&folder).map_err(fail(folder.path()))?;
        let work = Self {
            folder,
            id,
            locks: Vec::new(),
            agents: Vec::new(),
        };
        // The upper folder's own mode is the mode of `/` in the sandbox.
        for path in [work.upper(), work.work()] {
            fs::DirBuilder::new()
                .mode(0o755)
                .create(&path)
                .map_err(fail(&path))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(fail(&path))?;
        }
        Ok(work)
    }

    pub fn upper(&self) -> PathBuf {
        self.folder.path().join("upper")
    }

    pub fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    pub fn folder(&self, name: &str) -> Result<PathBuf, ExecError> {
        let path = self.folder.path().join(name);
        match fs::create_dir_all(&path) {
            Ok(()) => Ok(path),
            Err(cause) => Err(ExecError::Scratch { path, cause }),
        }
    }

    pub fn file(&self, name: &str, content: &[u8], mode: u32) -> Result<PathBuf, ExecError> {
        let path = self.folder.path().join(name);
        let written = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path)
            .and_then(|mut file| file.write_all(content));
        match written {
            Ok(()) => Ok(path),
            Err(cause) => Err(ExecError::Scratch { path, cause }),
        }
    }
}

/// The instance that a RUN's folder belongs to.
pub(super) fn instance(folder: &Held) -> io::Result<InstanceId> {
    InstanceId::new(folder.name()).map_err(io::Error::other)
}

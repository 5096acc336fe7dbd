//! What a RUN has made that is another each time, beside the lock file that names it:
//! `kiln.lock.d/<sha256>`, each an OCI layer. Unlike the bodies of responses it can't be had
//! again from anywhere, so it is part of the project as the lock is, and not of the cache.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kiln_model::Digest;
use serde::{Deserialize, Serialize};

use super::bodies::Bodies;
use crate::lock::bare_hex;

/// Who may read the project may read this.
const READABLE: u32 = 0o644;

/// One thing that a RUN has made, as the lock has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Made {
    /// Of everything that the RUN's result depends on: with another, it is made anew.
    #[serde(with = "bare_hex")]
    pub of: Digest,
    /// Of the layer.
    #[serde(with = "bare_hex")]
    pub sha256: Digest,
}

/// The folder.
#[derive(Clone, Debug)]
pub struct Kept {
    folder: PathBuf,
    files: Bodies,
}

impl Kept {
    /// Bytes, compressed: people commit it. An empty PostgreSQL or MariaDB has 1 to 4 MiB.
    pub const LARGEST: u64 = 16 << 20;
    /// Of this lock file.
    pub fn beside(lock: &Path) -> Self {
        let mut folder = lock.as_os_str().to_owned();
        folder.push(".d");
        let folder = PathBuf::from(folder);
        let files = Bodies::new(&folder);
        Self { folder, files }
    }

    /// The file and its size in bytes; `None`: it is not there, or not what its name says.
    pub(crate) fn open(&self, digest: &Digest) -> io::Result<Option<(File, u64)>> {
        let Some(file) = self.files.open(digest)? else {
            return Ok(None);
        };
        let size = file.metadata()?.len();
        Ok(Some((file, size)))
    }

    pub(crate) fn put(&self, digest: &Digest, content: &mut dyn Read) -> io::Result<()> {
        let mut file = self.files.begin()?;
        io::copy(content, &mut file)?;
        self.files.keep(file, digest)?;
        let path = self.folder.join(digest.hex());
        fs::set_permissions(path, fs::Permissions::from_mode(READABLE))
    }

    /// Takes away what is not wanted any more; the folder, too, when nothing is left.
    pub fn sweep(&self, wanted: &BTreeSet<Digest>) -> io::Result<()> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        let mut left = 0;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let digest = Digest::from_hex(&name.to_string_lossy());
            match digest.is_ok_and(|digest| !wanted.contains(&digest)) {
                true => fs::remove_file(entry.path())?,
                false => left += 1,
            }
        }
        match left {
            0 => fs::remove_dir(&self.folder),
            _ => Ok(()),
        }
    }
}

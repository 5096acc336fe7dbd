//! Where the image has an empty file for what tells one machine from another
//! ([`kiln_model::identity`]), the instance gets its own.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use kiln_model::identity::{Identity, PLACES};
use kiln_model::instance::{Purpose, Root};

use super::attach::{Attacher, READ_ONLY_FILE};
use super::{RootError, inside, stage_error};
use crate::identity::Maker;

impl Attacher<'_> {
    /// Fills the image's empty files of identity. Those of a mount are the user's.
    pub fn identities(&mut self) -> Result<(), RootError> {
        let mut maker = Maker::new(&self.spec.hostname);
        for (place, identity) in PLACES {
            let target = format!("/{place}");
            // What a build makes must not depend on who it is made by.
            let building = self.spec.purpose == Purpose::Build;
            if (building && identity == Identity::MachineId) || self.is_mounted(&target) {
                continue;
            }
            let root = self.stage.root();
            let resolved = inside::resolve(&root, &target).map_err(stage_error(&root))?;
            if !resolved.exists() {
                continue;
            }
            let path = root.join(resolved.path());
            let meta = fs::symlink_metadata(&path).map_err(stage_error(&path))?;
            if !meta.is_file() || meta.len() > 0 {
                continue;
            }
            let Some(content) = maker.make(identity).map_err(stage_error(&path))? else {
                continue;
            };
            // Where a program may change or remove it, it is an ordinary file; a test looks
            // at what was written to the root, and a sealed one can't be.
            let own = match self.spec.root {
                Root::Unsealed { .. } => true,
                Root::Layered { .. } => building,
                Root::Sealed { .. } => false,
            };
            if own {
                fill(&path, &content).map_err(stage_error(&path))?;
                continue;
            }
            let copy = self.next_file();
            fs::write(&copy, &content).map_err(stage_error(&copy))?;
            chown(&copy, Some(meta.uid()), Some(meta.gid())).map_err(stage_error(&copy))?;
            let mode = fs::Permissions::from_mode(meta.mode() & 0o7777);
            fs::set_permissions(&copy, mode).map_err(stage_error(&copy))?;
            self.bind(&copy, &target, false, READ_ONLY_FILE, None)?;
        }
        Ok(())
    }

    fn is_mounted(&self, target: &str) -> bool {
        let target = Path::new(target);
        let mut mounts = self.spec.mounts.iter();
        mounts.any(|mount| target.starts_with(&mount.target))
    }
}

/// Its owner and mode stay.
fn fill(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    file.write_all(content)
}

//! Leases: while one lives, `gc` keeps what was written since it was taken.
//!
//! # Format
//! `leases/<random>`: the journal's length when it was taken, in decimal digits. The
//! file is locked (flock) by its living owner; one that is not is a dead process's.

use std::io::Write;

use tempfile::{Builder, NamedTempFile};

use crate::journal;
use crate::layout::{Layout, PathError, at, entries, read_file, remove_file, try_lock};
use crate::store::Store;

/// Protects, while it lives, all that is written to the store (by anyone) after it was
/// taken, and all that was found to be there already. Take it before an import, and set
/// the ref before it is dropped. It ends with its process at the latest.
#[derive(Debug)]
pub struct Lease {
    /// Removed when dropped.
    _file: NamedTempFile,
}

impl Store {
    /// Takes a lease.
    pub fn lease(&self) -> Result<Lease, PathError> {
        let folder = self.layout.sub("leases");
        // So that gc sees it either not at all or locked and written.
        let _lock = self.layout.publishing()?;
        let mut file = Builder::new()
            .prefix("")
            .tempfile_in(&folder)
            .map_err(at("write into", &folder))?;
        try_lock(file.as_file()).map_err(at("lock", file.path()))?;
        let start = journal::end(&self.layout)?;
        file.write_all(start.to_string().as_bytes())
            .map_err(at("write", &folder))?;
        Ok(Lease { _file: file })
    }
}

/// Leases as `gc` sees them.
pub(crate) struct Living {
    /// Where the earliest begins in the journal.
    pub(crate) since: u64,
    pub(crate) count: usize,
}

/// The living leases; the dead ones' files are removed. The caller holds the removing
/// lock, so that none is seen half made.
pub(crate) fn living(layout: &Layout) -> Result<Living, PathError> {
    let mut living = Living {
        since: journal::end(layout)?,
        count: 0,
    };
    for (_, path) in entries(&layout.sub("leases"))? {
        let Some(file) = crate::store::open(&path)? else {
            continue;
        };
        if try_lock(&file).map_err(at("lock", &path))? {
            remove_file(&path)?;
            continue;
        }
        let text = read_file(&path)?.unwrap_or_default();
        let since = (std::str::from_utf8(&text).ok()).and_then(|text| text.parse().ok());
        living.count += 1;
        // Unreadable: protects everything there is.
        living.since = living.since.min(since.unwrap_or(0));
    }
    Ok(living)
}

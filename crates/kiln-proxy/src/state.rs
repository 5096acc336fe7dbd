//! The state file: what the proxy was told last, so that it serves again by itself after
//! a restart.
//!
//! Format, version 1: one JSON object
//! `{"version": 1, "catch_all": port, "tables": [RoutingTable, …]}`. It is replaced as a
//! whole (written beside, synced, renamed), so that a crash leaves the old or the new one.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use kiln_model::RoutingTable;
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    version: u32,
    /// The catch-all's port, to be taken again.
    pub(crate) catch_all: u16,
    pub(crate) tables: Vec<RoutingTable>,
}

impl State {
    pub(crate) fn new(catch_all: u16, tables: Vec<RoutingTable>) -> Self {
        Self {
            version: VERSION,
            catch_all,
            tables,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("can't read the proxy's state {path}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("can't write the proxy's state {path}; nothing was changed")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the proxy's state {path} is damaged; move it away, and `kiln up` writes a new one")]
    Damaged {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("the proxy's state {path} has format {found}, and this kiln knows {VERSION}")]
    Version { path: PathBuf, found: u32 },
}

/// No file is no state.
pub(crate) fn load(path: &Path) -> Result<State, StateError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(State::new(0, Vec::new()));
        }
        Err(source) => {
            let path = path.to_owned();
            return Err(StateError::Read { path, source });
        }
    };
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    let damaged = |source| StateError::Damaged {
        path: path.to_owned(),
        source,
    };
    let head: Head = serde_json::from_slice(&bytes).map_err(damaged)?;
    if head.version != VERSION {
        return Err(StateError::Version {
            path: path.to_owned(),
            found: head.version,
        });
    }
    serde_json::from_slice(&bytes).map_err(damaged)
}

pub(crate) fn save(path: &Path, state: &State) -> Result<(), StateError> {
    replace(path, state).map_err(|source| StateError::Write {
        path: path.to_owned(),
        source,
    })
}

fn replace(path: &Path, state: &State) -> std::io::Result<()> {
    let bytes = serde_json::to_vec(state)?;
    let beside = path.with_extension("new");
    let mut file = std::fs::File::create(&beside)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => std::fs::File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn it_comes_back_as_it_was_and_damage_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("proxy.json");
        assert_eq!(load(&path).unwrap(), State::new(0, vec![]));
        let state = State::new(17, vec![]);
        save(&path, &state).unwrap();
        assert_eq!(load(&path).unwrap(), state);

        std::fs::write(&path, "{\"version\":1,\"catch").unwrap();
        assert!(matches!(load(&path), Err(StateError::Damaged { .. })));
        std::fs::write(&path, "{\"version\":2,\"new\":true}").unwrap();
        assert!(matches!(
            load(&path),
            Err(StateError::Version { found: 2, .. })
        ));
        let nowhere = folder.path().join("no/such/folder");
        assert!(matches!(
            save(&nowhere, &state),
            Err(StateError::Write { .. })
        ));
    }
}

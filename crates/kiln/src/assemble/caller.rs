//! What builds take from whoever asks for them: the epoch, agents, and registries' logins.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kiln_oci::registry;

use crate::failure::{Failure, Kind};

/// Seconds; 0 unless the caller's SOURCE_DATE_EPOCH says otherwise.
pub(super) fn epoch() -> Result<i64, Failure> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text.parse().map_err(|_| {
            Failure::new(
                Kind::Input,
                format!("SOURCE_DATE_EPOCH is no number: `{text}`"),
            )
        }),
        Err(_) => Ok(0),
    }
}

/// `default`, `default=socket` or `id=socket` → where the agent listens.
pub(super) fn agents(asked: &[String]) -> Result<BTreeMap<String, PathBuf>, Failure> {
    use std::os::unix::fs::FileTypeExt as _;
    let mut agents = BTreeMap::new();
    for text in asked {
        let wrong = |why: String| Failure::new(Kind::Input, format!("build.ssh `{text}`: {why}"));
        let (id, path) = match text.split_once('=') {
            Some((id, path)) if !path.is_empty() => (id, PathBuf::from(path)),
            _ => match std::env::var_os("SSH_AUTH_SOCK") {
                Some(path) => (text.trim_end_matches('='), path.into()),
                None => return Err(wrong("SSH_AUTH_SOCK is not set: no agent runs".into())),
            },
        };
        let meta = std::fs::metadata(&path);
        let meta = meta.map_err(|e| wrong(format!("{}: {e}", path.display())))?;
        if !meta.file_type().is_socket() {
            return Err(wrong(format!(
                "{} is not an agent's socket; kiln reads no private keys: add it to an agent \
                 (ssh-add) and name that",
                path.display()
            )));
        }
        agents.insert(id.to_owned(), path);
    }
    Ok(agents)
}

/// Docker's and Podman's files of whoever asks.
pub(super) fn credentials() -> registry::CredentialSources {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let docker = std::env::var_os("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| home.clone().map(|h| h.join(".docker")));
    let files = docker
        .map(|folder| folder.join("config.json"))
        .into_iter()
        .chain(home.map(|h| h.join(".config/containers/auth.json")))
        .collect();
    registry::CredentialSources {
        files,
        helper_folder: None,
    }
}

//! What ADD takes from elsewhere: files by URL, git repositories.
//!
//! Invariants: what was taken once is pinned (a URL's content by sha256, a repository by
//! commit) and stays so until the lock is updated; nothing is used that differs from its
//! pin or from the file's own checksum.
//!
//! What must not enter: where in an image it is put.

mod fetch;
mod git;

use std::collections::BTreeMap;

use kiln_model::Digest;
use serde::{Deserialize, Serialize};

pub use fetch::{Fetched, Remotes};
pub use git::GitAddress;

/// Whether ADD takes this from elsewhere, not from the context.
pub(crate) fn is_remote(text: &str) -> bool {
    let schemes = ["http://", "https://", "ftp://"];
    schemes.iter().any(|scheme| text.starts_with(scheme)) || GitAddress::parse(text).is_some()
}

/// Something to be fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remote {
    Url {
        url: String,
        checksum: Option<Digest>,
    },
    Git {
        address: GitAddress,
        /// `--checksum`: the commit that it must be, or its beginning.
        commit: Option<String>,
        keep_git_dir: bool,
    },
}

impl Remote {
    /// As the file has it, without a password.
    pub fn shown(&self) -> String {
        match self {
            Remote::Url { url, .. } => without_password(url),
            Remote::Git { address, .. } => without_password(&address.shown()),
        }
    }
}

/// `https://user:password@host/` with the password left out.
fn without_password(url: &str) -> String {
    match reqwest::Url::parse(url) {
        Ok(mut parsed) if parsed.password().is_some() => {
            let _ = parsed.set_password(Some("***"));
            parsed.to_string()
        }
        _ => url.to_owned(),
    }
}

/// Values of `ADD --checksum`.
pub struct Checksum;

impl Checksum {
    pub fn sha256(text: &str) -> Result<Digest, &'static str> {
        text.parse()
            .map_err(|_| "of a URL is sha256: and 64 digits from 0 to f")
    }

    pub fn commit(text: &str) -> Result<String, &'static str> {
        let hex = text.bytes().all(|b| b.is_ascii_hexdigit());
        match hex && (7..=64).contains(&text.len()) {
            true => Ok(text.to_ascii_lowercase()),
            false => Err("of a git repository is a commit, or at least 7 digits of one"),
        }
    }
}

/// What is pinned of a project's remote sources: sections of `kiln.lock`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pins {
    /// URL → sha256 of its content.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub urls: BTreeMap<String, Digest>,
    /// Repository and ref (`https://host/x.git#main`) → commit.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub git: BTreeMap<String, String>,
}

/// Why something could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error("can't fetch {url}")]
    Http {
        url: String,
        #[source]
        cause: reqwest::Error,
    },
    #[error("can't fetch {url}: the server says {status}")]
    Status { url: String, status: u16 },
    #[error("can't fetch {0}: the server sends nothing")]
    Silent(String),
    #[error("{url} has more than {limit} bytes")]
    TooLong { url: String, limit: u64 },
    #[error(
        "{url} is not what it was: expected {expected}, found {found}; if that is right, change --checksum or run `kiln lock --update`"
    )]
    Changed {
        url: String,
        expected: Digest,
        found: Digest,
    },
    #[error("{address} is at commit {found}, but --checksum says {expected}")]
    Commit {
        address: String,
        expected: String,
        found: String,
    },
    #[error("git {what} failed for {address}:\n  {told}")]
    Git {
        what: &'static str,
        address: String,
        told: String,
    },
    #[error("can't run git, which ADD of a repository needs (apt install git)")]
    NoGit(#[source] std::io::Error),
    #[error("{address} has no folder `{folder}`")]
    NoFolder { address: String, folder: String },
    #[error("{address} has no branch, tag or commit `{wanted}`")]
    NoRef { address: String, wanted: String },
    #[error("can't use {path}")]
    Scratch {
        path: std::path::PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("cancelled")]
    Cancelled,
}

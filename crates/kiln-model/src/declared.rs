//! `x-kiln.image`: a whole image as values, which another project would write as a
//! Containerfile.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::spec::ExposedPort;

/// What is put over a base, and what the image says of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeclaredImage {
    pub place: DeclaredPlace,
    /// As FROM takes it; `None`: there is nothing below.
    pub base: Option<String>,
    pub groups: Vec<DeclaredGroup>,
    pub users: Vec<DeclaredUser>,
    /// In this order; no path is there twice.
    pub entries: Vec<DeclaredEntry>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub env: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    /// Absolute; made if it is missing.
    pub working_dir: Option<String>,
    /// `user[:group]`, by name or number.
    pub user: Option<String>,
    pub exposed: Vec<ExposedPort>,
    /// A signal's name or number.
    pub stop_signal: Option<String>,
}

/// Where it is said, for people; no part of what the image is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeclaredPlace {
    /// Relative to the project's folder where it is below it.
    pub file: String,
    /// Both count from 1.
    pub line: u32,
    pub column: u32,
}

impl fmt::Display for DeclaredPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// A line of `/etc/group`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeclaredGroup {
    pub name: String,
    pub gid: u32,
    pub place: DeclaredPlace,
}

/// A line of `/etc/passwd`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeclaredUser {
    pub name: String,
    pub uid: u32,
    /// By name or number; `None`: a group of the user's own, with the number of the user.
    pub group: Option<String>,
    /// Other groups that it is a member of, by name.
    pub groups: Vec<String>,
    pub home: String,
    pub shell: String,
    pub place: DeclaredPlace,
}

/// One folder, file or link of the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeclaredEntry {
    /// Absolute; of a file, a trailing `/` says that it goes into this folder.
    pub path: String,
    pub what: DeclaredContent,
    /// `user[:group]`, by name or number; `None`: root, or of a folder that is there
    /// already, whose it is.
    pub owner: Option<String>,
    /// Permission bits. Of a folder that is copied: those of its files; folders in it can
    /// be entered by whoever may read. `None`: 0755 for folders, 0644 for contents, and as
    /// it is on the host for what is copied.
    pub mode: Option<u32>,
    pub place: DeclaredPlace,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeclaredContent {
    Folder,
    /// A symbolic link with this target.
    Link(String),
    Text(String),
    /// A file of the host, or a folder whose content is meant. Absolute.
    Copy(PathBuf),
}

//! What a file of container-structure-test says (its README, and `pkg/types/v2`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Pattern;

/// One file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Structure {
    /// `globalEnvVars`, in order: values may refer to the image's and earlier ones.
    pub env: Vec<(String, String)>,
    /// `containerRunOptions.user`; `None`: the image's.
    pub user: Option<String>,
    /// `containerRunOptions.allocateTty`: both outputs come as one.
    pub tty: bool,
    /// `containerRunOptions.capabilities`, beside those that the service has.
    pub capabilities: Vec<String>,
    pub commands: Vec<CommandTest>,
    pub existence: Vec<ExistenceTest>,
    pub contents: Vec<ContentTest>,
    pub metadata: Option<MetadataTest>,
    pub licenses: Vec<LicenseTest>,
}

/// Runs a command in an instance of the image as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommandTest {
    pub name: String,
    /// Run before it, in the same files; how they end doesn't matter.
    pub setup: Vec<Vec<String>>,
    /// Run after it, likewise.
    pub teardown: Vec<Vec<String>>,
    pub env: Vec<(String, String)>,
    /// The command and its arguments; `$NAME` is a variable of the image.
    pub argv: Vec<String>,
    pub exit: i32,
    pub expected_output: Vec<Pattern>,
    pub excluded_output: Vec<Pattern>,
    pub expected_error: Vec<Pattern>,
    pub excluded_error: Vec<Pattern>,
}

/// Whether there is a file, and whose; a link counts as itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExistenceTest {
    pub name: String,
    /// `$NAME` is a variable of the image.
    pub path: String,
    pub exists: bool,
    /// As Go prints a mode (`-rw-r--r--`, `dtrwxrwxrwx`).
    pub permissions: Option<String>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub executable_by: Option<ExecutableBy>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecutableBy {
    Owner,
    Group,
    Other,
    Any,
}

/// What a file contains; links are followed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContentTest {
    pub name: String,
    pub path: String,
    pub expected: Vec<Pattern>,
    pub excluded: Vec<Pattern>,
}

/// A value that a variable or label must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    Equal(String),
    Match(Pattern),
}

/// What the image's configuration says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MetadataTest {
    pub env: BTreeMap<String, Wanted>,
    /// Variables that it must not have.
    pub unbound: Vec<String>,
    pub labels: BTreeMap<String, Wanted>,
    /// `80`, or `80/udp`.
    pub exposed: Vec<String>,
    pub unexposed: Vec<String>,
    pub volumes: Vec<String>,
    pub unmounted: Vec<String>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub workdir: Option<String>,
    pub user: Option<String>,
}

/// Copyright files that must name no refused licence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LicenseTest {
    /// Those of every Debian package, which must be there.
    pub debian: bool,
    pub files: Vec<String>,
}

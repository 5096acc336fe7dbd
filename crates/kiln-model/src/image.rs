//! What an image says about the process it holds (OCI image-spec v1.1,
//! config.md). Only what kiln acts on; the exact bytes stay in the store.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::spec::{ExposedPort, Healthcheck};

/// An image's own defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// `linux/amd64`, with `/variant` where there is one.
    pub platform: String,
    /// `user[:group]`, names or numbers; empty: root.
    pub user: String,
    /// In the order the image declares them; a later duplicate wins.
    pub env: Vec<(String, String)>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// Empty: `/`.
    pub working_dir: String,
    pub exposed: Vec<ExposedPort>,
    /// Absolute paths, sorted.
    pub volumes: Vec<String>,
    pub labels: BTreeMap<String, String>,
    /// A signal's name or number; `None`: SIGTERM.
    pub stop_signal: Option<String>,
    pub healthcheck: Option<Healthcheck>,
    /// The shell that shell-form instructions run under; empty: `/bin/sh -c`.
    pub shell: Vec<String>,
}

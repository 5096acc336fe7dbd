//! The process that stands behind every instance.
//!
//! `shim run <folder>` detaches itself from its caller, makes the container, keeps
//! its output and its exit status, and ends when everything of the instance has
//! ended. `shim exec <folder> <request>` runs one more process in an instance.
//!
//! Invariants: single-threaded (libcontainer clones and allocates); started with an
//! empty environment; nothing but the instance's folder connects it to the daemon,
//! so the daemon may die at any time; when the shim is killed, the kernel kills the
//! instance's first process.

mod capture;
mod exec;
mod executor;
mod init;
mod prepare;
mod program;
mod run;
mod supervise;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

pub(crate) use exec::{ExecAnswer, ExecRequest};
pub(crate) use run::cgroup_path;

/// What the shim tells whoever started it, as one JSON line on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Handshake {
    Started { pid: u32, since: kiln_model::Millis },
    Failed { cause: String },
}

/// The re-executed program's entry; `args` are those after `shim`.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let verb = args.first().and_then(|a| a.to_str());
    match (verb, &args[1.min(args.len())..]) {
        (Some("run"), [dir]) => run::main(PathBuf::from(dir)),
        (Some("exec"), [dir, request]) => exec::main(PathBuf::from(dir), PathBuf::from(request)),
        _ => ExitCode::from(2),
    }
}

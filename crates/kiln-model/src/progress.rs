//! What long work tells whoever watches: one stream of events, drawn by a terminal
//! renderer or printed as JSON lines.

use serde::{Deserialize, Serialize};

use crate::Millis;

/// Receives events as they happen; called from several threads.
pub trait Progress: Send + Sync {
    fn event(&self, event: ProgressEvent);
}

/// Drops every event.
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _: ProgressEvent) {}
}

/// `task` names a piece of work uniquely within one command: `build web`,
/// `build web: 3/7`, `test web`, `replace web`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum ProgressEvent {
    Started {
        task: String,
        /// What is being done, for people: the instruction, the image.
        detail: String,
    },
    /// How far it is; units are bytes where `bytes`, else items.
    Advanced {
        task: String,
        done: u64,
        total: Option<u64>,
        bytes: bool,
    },
    /// A line the work itself printed.
    Output { task: String, line: String },
    Finished {
        task: String,
        how: Finish,
        took: Millis,
    },
    /// Why it could not be taken from a cache.
    Explained { task: String, why: String },
    /// Its result was taken from a cache that others write to.
    Taken { task: String, from: String },
    /// Something a person should know that stops nothing.
    Warning { task: String, text: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    Done,
    /// Nothing needed doing.
    Cached,
    Failed {
        cause: String,
    },
}

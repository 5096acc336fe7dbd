//! What RUNs fetch over HTTP and HTTPS, recorded once and given again on later builds.
//!
//! A RUN is pointed at a proxy of the building process ([`server`]); HTTPS is read with a
//! certificate authority that only this process has ([`authority`]). Each exchange is known
//! by method, URL, body and the headers that decide what comes back ([`tape`]); bodies are
//! kept by digest ([`bodies`]), everything else is in `kiln.lock`.
//!
//! Invariants: what a program gets while it is recorded is what it gets later (headers that
//! are not in the lock are not passed on, but for cookies); nothing is given that differs
//! from its digest in the lock; no `Authorization` header, cookie, or secret of the build is
//! in lock, cache or log.
//!
//! In `kiln.lock`, for each service and each of its RUNs that fetched something:
//!
//! ```json
//! "network": {
//!   "web": {
//!     "<32 digits>": {
//!       "instruction": "RUN curl -fO https://example.org/tool",
//!       "platform": "linux/amd64",
//!       "exchanges": [
//!         {"url": "https://example.org/tool", "headers": {"last-modified": "…"}, "sha256": "…", "size": 7}
//!       ],
//!       "direct": ["192.0.2.7:5432/tcp"],
//!       "made": {"/var/lib/mysql": {"of": "…", "sha256": "…"}}
//!     }
//!   }
//! }
//! ```
//!
//! `method` is left out for GET and `status` for 200; `request` has what else the exchange
//! is known by. `direct`: what went past the proxy and is not recorded. `made`: databases
//! ([`crate::exec`]), whose content is in `kiln.lock.d` ([`kept`]).

mod authority;
mod bodies;
mod kept;
mod mask;
mod server;
mod session;
mod tape;
mod upstream;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use kiln_model::Digest;
use serde::{Deserialize, Serialize};

pub(crate) use bodies::FOLDER;
pub use kept::{Kept, Made};
pub(super) use server::{Callers, Listening, Recorder, Who};
pub(crate) use session::{Session, Setting};
pub(crate) use upstream::{Proxies, Route};

use crate::lock::bare_hex;

/// One request and its response, without the body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    #[serde(default = "get", skip_serializing_if = "is_get")]
    pub method: String,
    pub url: String,
    /// What else it is known by: `range`, `accept` (where the server says that it varies),
    /// `body` (its sha256), `authorization` (only that there was one) …
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub request: BTreeMap<String, String>,
    #[serde(default = "ok", skip_serializing_if = "is_ok")]
    pub status: u16,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// Of the body.
    #[serde(with = "bare_hex")]
    pub sha256: Digest,
    /// Bytes.
    pub size: u64,
}

fn get() -> String {
    "GET".into()
}

fn is_get(method: &str) -> bool {
    method == "GET"
}

fn ok() -> u16 {
    200
}

fn is_ok(status: &u16) -> bool {
    *status == 200
}

/// What one RUN fetched, and made by chance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recording {
    /// For people.
    pub instruction: String,
    pub platform: String,
    /// By URL; several for one request in the order in which they came.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exchanges: Vec<Exchange>,
    /// What went past the recording: the RUN is not hermetic.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub direct: Vec<String>,
    /// What it has made that is another each time, by path ([`kept`]).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub made: BTreeMap<String, Made>,
}

impl Recording {
    /// What a RUN's result depends on beside what stands before it; `None`: nothing.
    pub fn digest(&self) -> Option<Digest> {
        // Lists of plain values: they have a serialised form.
        match (self.exchanges.is_empty(), self.made.is_empty()) {
            (true, true) => None,
            (false, true) => Digest::of_json(&self.exchanges).ok(),
            (_, false) => Digest::of_json(&(&self.exchanges, &self.made)).ok(),
        }
    }
}

/// The recordings of one service's image, by RUN; learns.
#[derive(Debug, Default)]
pub struct Recordings {
    state: Mutex<State>,
    kept: Option<Kept>,
}

#[derive(Debug, Default)]
struct State {
    known: BTreeMap<String, Recording>,
    seen: BTreeSet<String>,
}

impl Recordings {
    pub fn new(known: BTreeMap<String, Recording>) -> Self {
        Self {
            state: Mutex::new(State {
                known,
                seen: BTreeSet::new(),
            }),
            kept: None,
        }
    }

    /// With a place for what RUNs make by chance, which is not recorded otherwise.
    pub fn keeping(self, kept: Kept) -> Self {
        Self {
            kept: Some(kept),
            ..self
        }
    }

    pub(crate) fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is recorded of a RUN, which is part of the image then.
    pub(crate) fn find(&self, id: &str) -> Option<Recording> {
        let mut state = self.state();
        state.seen.insert(id.to_owned());
        state.known.get(id).cloned()
    }

    pub(crate) fn learn(&self, id: &str, recording: Recording) {
        let mut state = self.state();
        let Recording {
            exchanges,
            direct,
            made,
            ..
        } = &recording;
        match exchanges.is_empty() && direct.is_empty() && made.is_empty() {
            true => state.known.remove(id),
            false => state.known.insert(id.to_owned(), recording),
        };
    }

    /// What the lock is to hold; after a whole build (on `platform`), without instructions
    /// that are no longer there.
    pub fn settled(&self, whole: Option<&str>) -> BTreeMap<String, Recording> {
        let state = self.state();
        let mut known = state.known.clone();
        if let Some(platform) = whole {
            known.retain(|id, one| state.seen.contains(id) || one.platform != platform);
        }
        known
    }
}

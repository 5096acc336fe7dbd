//! What every engine and API call uses, in one place.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use kiln_model::{EnvironmentName, Millis};
use kiln_runtime::Runtime;
use kiln_store::Store;
use kiln_trust::{AuditLog, AuditSink, Fact, SecretStore};
use tokio::io::unix::AsyncFd;
use tokio::sync::broadcast;

use crate::api::types::EventRecord;
use crate::engine::EngineHandle;
use crate::networks::Networks;
use crate::proxy_link::ProxyLink;
use crate::state::State;

/// Followers that fall further behind than this read the rest from the database.
pub const EVENT_QUEUE: usize = 256;

pub struct Shared {
    pub root: PathBuf,
    pub started: Millis,
    pub state: State,
    pub store: Arc<Store>,
    pub runtime: Arc<Runtime>,
    pub secrets: SecretStore,
    pub audit: AuditLog,
    pub proxy: ProxyLink,
    pub networks: Networks,
    pub events: broadcast::Sender<EventRecord>,
    pub engines: Mutex<BTreeMap<EnvironmentName, EngineHandle>>,
}

impl Shared {
    /// Milliseconds since the epoch.
    pub fn now() -> Millis {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map(Millis::from)
            .unwrap_or_default()
    }

    /// As [`Shared::now`] when first asked, and from then on at an even pace: setting the
    /// machine's clock cuts no wait short and makes none longer.
    pub fn steady_now() -> Millis {
        static BEGUN: OnceLock<(Instant, Millis)> = OnceLock::new();
        let (begun, at) = BEGUN.get_or_init(|| (Instant::now(), Self::now()));
        at.saturating_add(Millis::from(begun.elapsed()))
    }

    /// Stores an event and tells its followers. What can't be stored is at least logged.
    pub fn tell(&self, mut event: EventRecord) {
        match self.state.add_event(&event) {
            Ok(id) => {
                event.id = id;
                // No follower is no error.
                let _ = self.events.send(event);
            }
            Err(error) => tracing::error!(%error, text = event.text, "event not stored"),
        }
    }

    /// Writes an audit entry; a log that can't be written to is loud but stops nothing
    /// that keeps services up.
    pub fn record(&self, actor: &str, action: &str, subject: &str, details: &[(&str, String)]) {
        let fact = Fact {
            time: Self::now(),
            actor: actor.to_owned(),
            action: action.to_owned(),
            subject: subject.to_owned(),
            details: details
                .iter()
                .map(|(k, v)| ((*k).to_owned(), v.clone()))
                .collect(),
        };
        if let Err(error) = self.audit.record(fact) {
            tracing::error!(%error, action, subject, "audit entry not written");
        }
    }

    pub fn engine(&self, environment: &str) -> Option<EngineHandle> {
        self.engines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(environment)
            .cloned()
    }

    pub fn all_engines(&self) -> Vec<EngineHandle> {
        self.engines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }
}

/// Runs blocking work off the event loop.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| format!("an inner task broke: {e}"))
}

/// Waits for the end of the process behind a pidfd.
// `new` is deprecated for descriptors that might be closed meanwhile; this one is owned.
#[allow(deprecated)]
pub async fn ended(pidfd: OwnedFd) -> std::io::Result<()> {
    AsyncFd::new(pidfd)?.readable().await.map(drop)
}

//! The client of OCI registries (distribution-spec v1.1): resolve, pull, push.
//!
//! Manifests are kept byte for byte. Blobs stream from the network into the store and
//! are verified on the way; one that breaks off is resumed where it stopped. Plain
//! HTTP is spoken only to this machine itself and to hosts listed as insecure, and
//! credentials are sent only to the registry they belong to and the token service it
//! names.
//!
//! Why not the `oci-client` crate: it reads bodies without bounds, takes a failed
//! login for none, knows neither 429 nor retries, and falls back to a default client
//! when its TLS set-up fails.

mod artifact;
mod auth;
mod bridge;
mod credentials;
mod error;
mod pull;
mod push;
mod session;
mod tls;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_model::Digest;
use reqwest::header::HeaderValue;

pub use credentials::{Credential, CredentialError, CredentialSources};
pub use error::{Problem, RegistryError};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest silence in the middle of an answer.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Most redirects followed: blobs often lie at a storage service.
const MAX_REDIRECTS: usize = 5;
/// Most blobs of one image on their way at once.
const PARALLEL_BLOBS: usize = 4;
/// Most indexes inside one another.
const MAX_INDEX_DEPTH: usize = 4;

/// How often and how patiently a request is repeated.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Attempts in all, at least 1.
    pub attempts: u32,
    /// Before the second attempt; doubles from then on, up to [`Retry::MAX_WAIT`].
    pub first_wait: Duration,
}

impl Retry {
    pub const MAX_WAIT: Duration = Duration::from_secs(10);
    /// Longest wait that a registry may ask for (`Retry-After`).
    pub const MAX_ASKED_WAIT: Duration = Duration::from_secs(60);

    fn wait(&self, attempt: u32) -> Duration {
        let factor = 2u32.saturating_pow(attempt.saturating_sub(1));
        self.first_wait.saturating_mul(factor).min(Self::MAX_WAIT)
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 5,
            first_wait: Duration::from_millis(500),
        }
    }
}

/// How to reach registries.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub credentials: CredentialSources,
    /// Registries that may be spoken to in plain HTTP, as references name them:
    /// `registry.lan:5000`. This machine itself (`localhost`, 127.0.0.0/8, `[::1]`)
    /// always may. HTTPS is tried first.
    pub insecure: Vec<String>,
    /// PEM certificates trusted beside the system's.
    pub extra_roots: Vec<Vec<u8>>,
    pub retry: Retry,
}

/// Why no client could be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("an additional root certificate is not valid PEM: {0}")]
    Root(String),
    #[error("the HTTP client could not be set up: {0}")]
    Http(String),
}

/// Talks to any number of registries; keeps connections and logins between calls.
pub struct Client {
    http: reqwest::Client,
    options: Options,
    /// Why the system's certificates are not there, if they are not.
    no_roots: Option<String>,
    /// Whether a host that may speak plain HTTP speaks HTTPS.
    schemes: Mutex<BTreeMap<String, &'static str>>,
    /// `Authorization` by host, repository and action.
    authorizations: Mutex<BTreeMap<(String, String, Action), HeaderValue>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Pull,
    Push,
}

/// What a reference stands for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Of the image for the platform asked for.
    pub manifest: Digest,
    /// Of the index that lists it, if there is one.
    pub index: Option<Digest>,
}

impl Resolved {
    /// What to lock: the same image on every platform.
    pub fn pin(&self) -> Digest {
        self.index.unwrap_or(self.manifest)
    }
}

impl Client {
    pub fn new(options: Options) -> Result<Self, ClientError> {
        let (tls, no_roots) = tls::config(&options.extra_roots)?;
        let http_hosts = options.insecure.clone();
        let policy = reqwest::redirect::Policy::custom(move |attempt| {
            let url = attempt.url();
            let host = session::host_and_port(url);
            if attempt.previous().len() > MAX_REDIRECTS {
                attempt.error("too many redirects")
            } else if url.scheme() != "https" && !http_allowed(&host, &http_hosts) {
                attempt.error("it redirects to plain HTTP, which is not allowed")
            } else {
                attempt.follow()
            }
        });
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(STALL_TIMEOUT)
            .redirect(policy)
            .build()
            .map_err(|e| ClientError::Http(error::chain(&e)))?;
        Ok(Self {
            http,
            options,
            no_roots,
            schemes: Mutex::default(),
            authorizations: Mutex::default(),
        })
    }
}

/// Whether a host may be spoken to in plain HTTP.
fn http_allowed(host: &str, insecure: &[String]) -> bool {
    if insecure.iter().any(|allowed| allowed == host) {
        return true;
    }
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

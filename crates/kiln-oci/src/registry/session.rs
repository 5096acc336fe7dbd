//! Requests to one registry about one repository: scheme, login, retries, bounds.

use std::time::Duration;

use kiln_model::Digest;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Request, Response, StatusCode, Url};

use super::error::chain;
use super::{Action, Client, Problem, RegistryError, Retry, http_allowed, locked};
use crate::manifest::{self, Document, MAX_MANIFEST_BYTES, media_type};
use crate::reference::Reference;

/// Longest error message taken from a registry, in bytes.
const MAX_MESSAGE_BYTES: u64 = 16 << 10;
/// Longest wait for a whole manifest or other small answer.
const SMALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest wait to find out whether a host speaks HTTPS.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Attempts to connect; a host that is not there is told soon.
const CONNECT_ATTEMPTS: u32 = 3;

pub(super) struct Session<'c> {
    pub client: &'c Client,
    pub reference: &'c Reference,
    pub action: Action,
    /// `https://host:port/v2/<repository>/`.
    pub base: Url,
}

/// A host and its port where that is not the scheme's own, as references write it.
pub(super) fn host_and_port(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.into(),
    }
}

impl<'c> Session<'c> {
    pub async fn open(
        client: &'c Client,
        reference: &'c Reference,
        action: Action,
    ) -> Result<Self, RegistryError> {
        let host = reference.registry_host();
        let scheme = client.scheme(host).await;
        let text = format!("{scheme}://{host}/v2/{}/", reference.repository());
        let base = Url::parse(&text).map_err(|e| RegistryError {
            reference: reference.familiar(),
            host: host.into(),
            problem: Box::new(Problem::Challenge {
                problem: format!("`{text}` is no address: {e}"),
            }),
        })?;
        Ok(Self {
            client,
            reference,
            action,
            base,
        })
    }

    pub fn fail(&self, problem: Problem) -> RegistryError {
        self.fail_at(self.reference.registry_host(), problem)
    }

    pub fn fail_at(&self, host: &str, problem: Problem) -> RegistryError {
        RegistryError {
            reference: self.reference.familiar(),
            host: host.into(),
            problem: Box::new(problem),
        }
    }

    /// An address in the repository: `manifests/latest`.
    pub fn url(&self, path: &str) -> Result<Url, RegistryError> {
        self.base.join(path).map_err(|e| {
            self.fail(Problem::Broken {
                what: path.into(),
                cause: e.to_string(),
            })
        })
    }

    /// Sends a request, logging in if the registry asks for it; gives any answer that
    /// is neither a demand to log in nor a passing failure.
    pub async fn send(
        &self,
        make: &(dyn Fn() -> reqwest::RequestBuilder + Sync),
        retry: Retry,
    ) -> Result<Response, RegistryError> {
        let key = self.authorization_key();
        let known = locked(&self.client.authorizations).get(&key).cloned();
        let response = self.execute(make, known.as_ref(), retry).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        // What was known may have run out; the answer says how to get anew.
        let login = self.log_in(response.headers()).await?;
        locked(&self.client.authorizations).insert(key, login.authorization.clone());
        let response = self
            .execute(make, Some(&login.authorization), retry)
            .await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            return Err(self.fail(self.login_problem(login.with_credential)));
        }
        Ok(response)
    }

    pub fn login_problem(&self, with_credential: bool) -> Problem {
        let registry = self.reference.registry().to_owned();
        match with_credential {
            true => Problem::LoginRefused { registry },
            false => Problem::LoginNeeded { registry },
        }
    }

    fn authorization_key(&self) -> (String, String, Action) {
        let host = self.reference.registry_host().to_owned();
        (host, self.reference.repository().into(), self.action)
    }

    /// Repeats a request over passing failures.
    pub async fn execute(
        &self,
        make: &(dyn Fn() -> reqwest::RequestBuilder + Sync),
        authorization: Option<&HeaderValue>,
        retry: Retry,
    ) -> Result<Response, RegistryError> {
        let mut attempt = 1;
        loop {
            let request = self.request(make, authorization)?;
            let host = host_and_port(request.url());
            match self.client.http.execute(request).await {
                Ok(response) if is_busy(response.status()) => {
                    let wait = self.busy_wait(&host, &response, attempt, retry)?;
                    tracing::debug!(host, status = %response.status(), ?wait, "busy");
                    tokio::time::sleep(wait).await;
                }
                Ok(response) => return Ok(response),
                Err(error) => {
                    let most = match error.is_connect() {
                        true => retry.attempts.min(CONNECT_ATTEMPTS),
                        false => retry.attempts,
                    };
                    let hopeless = error.is_redirect() || error.is_builder();
                    if attempt >= most || hopeless || is_certificate(&error) {
                        return Err(self.unreachable(&host, &error));
                    }
                    tokio::time::sleep(retry.wait(attempt)).await;
                }
            }
            attempt += 1;
        }
    }

    fn request(
        &self,
        make: &(dyn Fn() -> reqwest::RequestBuilder + Sync),
        authorization: Option<&HeaderValue>,
    ) -> Result<Request, RegistryError> {
        let mut request = make()
            .build()
            .map_err(|e| self.unreachable(self.reference.registry_host(), &e))?;
        // Upload addresses may lie at another host, which must not see the login.
        let own = request.url().origin() == self.base.origin();
        if let Some(value) = authorization.filter(|_| own) {
            let mut value = value.clone();
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        Ok(request)
    }

    fn busy_wait(
        &self,
        host: &str,
        response: &Response,
        attempt: u32,
        retry: Retry,
    ) -> Result<Duration, RegistryError> {
        let status = response.status().as_u16();
        if attempt >= retry.attempts {
            let attempts = attempt;
            return Err(self.fail_at(host, Problem::Busy { status, attempts }));
        }
        match asked_wait(response.headers()) {
            Some(seconds) if seconds > Retry::MAX_ASKED_WAIT.as_secs() => {
                Err(self.fail_at(host, Problem::AskedToWait { status, seconds }))
            }
            Some(seconds) => Ok(Duration::from_secs(seconds)),
            None => Ok(retry.wait(attempt)),
        }
    }

    fn unreachable(&self, host: &str, error: &reqwest::Error) -> RegistryError {
        let cause = chain(error);
        let hint = match &self.client.no_roots {
            Some(why) if is_certificate(error) => format!(
                "This machine has no CA certificates ({why}): install the package ca-certificates"
            ),
            _ => hint(&cause, is_certificate(error)).into(),
        };
        self.fail_at(host, Problem::Unreachable { cause, hint })
    }

    /// A manifest or index, its exact bytes, and their digest.
    pub async fn manifest(
        &self,
        selector: &str,
        expected: Option<Digest>,
    ) -> Result<(Vec<u8>, Digest, Document), RegistryError> {
        let url = self.url(&format!("manifests/{selector}"))?;
        let accept = media_type::ACCEPTED_MANIFESTS.join(", ");
        let make = || self.client.http.get(url.clone()).header(ACCEPT, &accept);
        let what = format!("manifest `{selector}`");
        let (headers, bytes) = self.small(&what, &make, MAX_MANIFEST_BYTES).await?;
        let found = Digest::of(&bytes);
        let said = text_header(&headers, "docker-content-digest").and_then(|t| t.parse().ok());
        for expected in [expected, said].into_iter().flatten() {
            if found != expected {
                return Err(self.fail(Problem::WrongDigest { expected, found }));
            }
        }
        let content_type = text_header(&headers, "content-type");
        let content_type = content_type.and_then(|t| t.split(';').next().map(str::trim));
        let document = manifest::parse(&bytes, content_type).map_err(|source| {
            self.fail(Problem::Manifest {
                digest: found,
                source,
            })
        })?;
        Ok((bytes, found, document))
    }

    /// A whole answer of at most `limit` bytes, repeated if it breaks off.
    pub async fn small(
        &self,
        what: &str,
        make: &(dyn Fn() -> reqwest::RequestBuilder + Sync),
        limit: u64,
    ) -> Result<(HeaderMap, Vec<u8>), RegistryError> {
        let retry = self.client.options.retry;
        let mut attempt = 1;
        loop {
            let response = self.send(make, retry).await?;
            let response = self.success(what, response).await?;
            let headers = response.headers().clone();
            let body = tokio::time::timeout(SMALL_TIMEOUT, read_body(response, limit));
            let cause = match body.await {
                Ok(Ok(Some(bytes))) => return Ok((headers, bytes)),
                Ok(Ok(None)) => {
                    let what = what.into();
                    return Err(self.fail(Problem::TooLarge { what, limit }));
                }
                Ok(Err(error)) => chain(&error),
                Err(_) => format!("no whole answer within {} s", SMALL_TIMEOUT.as_secs()),
            };
            if attempt >= retry.attempts {
                let what = what.into();
                return Err(self.fail(Problem::Broken { what, cause }));
            }
            tokio::time::sleep(retry.wait(attempt)).await;
            attempt += 1;
        }
    }

    /// The answer if it is a success, else an error with the registry's own message.
    pub async fn success(&self, what: &str, response: Response) -> Result<Response, RegistryError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let host = host_and_port(response.url());
        // The message only adds to the status; without it the error still stands.
        let body = match tokio::time::timeout(SMALL_TIMEOUT, read_body(response, MAX_MESSAGE_BYTES))
            .await
        {
            Ok(Ok(Some(body))) => body,
            _ => Vec::new(),
        };
        let message = message(&body);
        let what = what.to_owned();
        let problem = match status {
            StatusCode::NOT_FOUND => Problem::NotFound { what },
            StatusCode::FORBIDDEN => Problem::Denied { message },
            _ => Problem::Status {
                status: status.as_u16(),
                what,
                message,
            },
        };
        Err(self.fail_at(&host, problem))
    }
}

impl Client {
    /// HTTPS, unless the host may be spoken to in plain HTTP and does not speak HTTPS.
    async fn scheme(&self, host: &str) -> &'static str {
        if !http_allowed(host, &self.options.insecure) {
            return "https";
        }
        if let Some(known) = locked(&self.schemes).get(host) {
            return known;
        }
        let probe = self.http.get(format!("https://{host}/v2/"));
        let scheme = match probe.timeout(PROBE_TIMEOUT).send().await {
            Ok(_) => "https",
            // It does speak HTTPS; falling back would hide what is wrong.
            Err(error) if is_certificate(&error) => "https",
            Err(_) => "http",
        };
        locked(&self.schemes).insert(host.into(), scheme);
        scheme
    }
}

/// The whole body; `None`: it is longer than `limit`.
pub(super) async fn read_body(
    mut response: Response,
    limit: u64,
) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Ok(None);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Some(bytes))
}

pub(super) fn text_header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn is_busy(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

/// `Retry-After` in seconds; its other form, a date, is not used by registries.
fn asked_wait(headers: &HeaderMap) -> Option<u64> {
    text_header(headers, RETRY_AFTER.as_str())?
        .trim()
        .parse()
        .ok()
}

fn is_certificate(error: &reqwest::Error) -> bool {
    chain(error).contains("certificate")
}

fn hint(cause: &str, certificate: bool) -> &'static str {
    if certificate {
        "Add its CA certificate to this machine's (update-ca-certificates)"
    } else if cause.contains("InvalidContentType") {
        "It seems to speak plain HTTP, which kiln uses only with this machine itself and with registries that are configured as insecure"
    } else if cause.contains("dns") || cause.contains("lookup") {
        "Check the registry's name and this machine's name resolution"
    } else {
        "Check the registry's address, the network and the proxy settings"
    }
}

/// What the registry says about a failure: `DENIED: no such access`.
fn message(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    const LONGEST: usize = 300;
    let text = match serde_json::from_slice::<Errors>(body) {
        Ok(errors) => {
            let each = errors.errors.iter();
            let each: Vec<_> = each.map(|e| format!("{}: {}", e.code, e.message)).collect();
            each.join("; ")
        }
        Err(_) => String::from_utf8_lossy(body).trim().to_owned(),
    };
    match text.is_empty() {
        true => "it gives no reason".into(),
        // A message must not steer the terminal.
        false => text
            .chars()
            .take(LONGEST)
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect(),
    }
}

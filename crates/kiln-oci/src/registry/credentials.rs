//! Who to be at a registry: Docker's `config.json` (and Podman's `auth.json`, which
//! has the same form), and the helper programs it names.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Longest configuration file, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Longest answer of a helper program, in bytes.
const MAX_HELPER_BYTES: u64 = 64 << 10;
/// How long a helper program may take: it may ask a person or a network service.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);
/// What Docker calls its own registry in this file.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// Other names of it.
const DOCKER_HUB_NAMES: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// Where credentials are looked for.
#[derive(Clone, Debug, Default)]
pub struct CredentialSources {
    /// Files in Docker's form; the first that knows a registry wins, absent ones are
    /// passed over.
    pub files: Vec<PathBuf>,
    /// Where helper programs lie; `None`: in the folders of `PATH`.
    pub helper_folder: Option<PathBuf>,
}

/// What proves who one is.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    Basic {
        user: String,
        password: String,
    },
    /// Traded for an access token at the registry's token service.
    IdentityToken(String),
    /// Sent as it is.
    RegistryToken(String),
}

/// Never shows the secret.
impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic",
            Self::IdentityToken(_) => "IdentityToken",
            Self::RegistryToken(_) => "RegistryToken",
        })
    }
}

/// Why credentials could not be found out.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    #[error("{}: it could not be read: {source}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The JSON error is not shown: it could quote a secret.
    #[error("{}: it is no configuration file of Docker's form (line {line})", path.display())]
    Json { path: PathBuf, line: usize },
    #[error("{}: the entry for {key} is unusable: {problem}", path.display())]
    Entry {
        path: PathBuf,
        key: String,
        problem: &'static str,
    },
    #[error(
        "the credential helper `{program}` {problem}; run `docker login` again, or take the helper out of the configuration file"
    )]
    Helper { program: String, problem: String },
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct DockerConfig {
    auths: BTreeMap<String, AuthEntry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// What a helper program answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// What one file says about a registry.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Credential(Credential),
    Helper(String),
}

impl CredentialSources {
    /// The credential for a registry as references name it (`docker.io`,
    /// `localhost:5000`); `None`: anonymous.
    pub async fn find(&self, registry: &str) -> Result<Option<Credential>, CredentialError> {
        for path in &self.files {
            match look_up(path, registry)? {
                Found::Nothing => {}
                Found::Credential(credential) => return Ok(Some(credential)),
                Found::Helper(name) => {
                    if let Some(credential) =
                        self.ask_helper(&name, registry, HELPER_TIMEOUT).await?
                    {
                        return Ok(Some(credential));
                    }
                }
            }
        }
        Ok(None)
    }

    async fn ask_helper(
        &self,
        name: &str,
        registry: &str,
        limit: Duration,
    ) -> Result<Option<Credential>, CredentialError> {
        let program = format!("docker-credential-{name}");
        let fail = |problem: String| CredentialError::Helper {
            program: program.clone(),
            problem,
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if name.is_empty() || !name.bytes().all(plain) {
            return Err(fail("is no name of a program".into()));
        }
        let path = match &self.helper_folder {
            Some(folder) => folder.join(&program),
            None => PathBuf::from(&program),
        };
        let running = run_helper(&path, server_name(registry));
        let (success, answer) = match tokio::time::timeout(limit, running).await {
            Err(_) => {
                return Err(fail(format!("did not answer within {limit:?}")));
            }
            Ok(Err(error)) => return Err(fail(format!("could not be run: {error}"))),
            Ok(Ok(output)) => output,
        };
        if answer.len() as u64 >= MAX_HELPER_BYTES {
            return Err(fail(format!("gave more than {MAX_HELPER_BYTES} bytes")));
        }
        if !success {
            let text = String::from_utf8_lossy(&answer);
            return match text.contains("credentials not found") {
                true => Ok(None),
                false => Err(fail(format!("failed: {}", first_line(&text)))),
            };
        }
        let answer: HelperAnswer = serde_json::from_slice(&answer)
            .map_err(|_| fail("gave an answer that is not in the agreed form".into()))?;
        Ok(Some(match answer.username.as_str() {
            "<token>" => Credential::IdentityToken(answer.secret),
            _ => Credential::Basic {
                user: answer.username,
                password: answer.secret,
            },
        }))
    }
}

/// Whether it ended well, and what it printed.
async fn run_helper(program: &Path, server: &str) -> io::Result<(bool, Vec<u8>)> {
    let mut child = tokio::process::Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that ends without reading still gave its answer.
        let _ = stdin.write_all(server.as_bytes()).await;
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let mut bounded = stdout.take(MAX_HELPER_BYTES);
        bounded.read_to_end(&mut answer).await?;
    }
    Ok((child.wait().await?.success(), answer))
}

fn look_up(path: &Path, registry: &str) -> Result<Found, CredentialError> {
    let file_error = |source| CredentialError::File {
        path: path.into(),
        source,
    };
    let file = match std::fs::File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        other => other.map_err(file_error)?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(file_error)?;
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(Found::Nothing);
    }
    let config: DockerConfig =
        serde_json::from_slice(&bytes).map_err(|e| CredentialError::Json {
            path: path.into(),
            line: e.line(),
        })?;
    config
        .find(registry)
        .map_err(|(key, problem)| CredentialError::Entry {
            path: path.into(),
            key,
            problem,
        })
}

impl DockerConfig {
    /// A helper for this very registry, else what the file itself says, else the
    /// helper for all registries.
    fn find(&self, registry: &str) -> Result<Found, (String, &'static str)> {
        let of = |key: &str| same_registry(key, registry);
        if let Some((_, name)) = self.cred_helpers.iter().find(|(key, _)| of(key)) {
            return Ok(Found::Helper(name.clone()));
        }
        for (key, entry) in self.auths.iter().filter(|(key, _)| of(key)) {
            let credential = entry
                .credential()
                .map_err(|problem| (key.clone(), problem))?;
            if let Some(credential) = credential {
                return Ok(Found::Credential(credential));
            }
        }
        Ok(match &self.creds_store {
            Some(name) if !name.is_empty() => Found::Helper(name.clone()),
            _ => Found::Nothing,
        })
    }
}

impl AuthEntry {
    /// `None`: an empty entry, which Docker leaves where a helper keeps the secret.
    fn credential(&self) -> Result<Option<Credential>, &'static str> {
        let set = |text: &Option<String>| text.clone().filter(|t| !t.is_empty());
        if let Some(token) = set(&self.registrytoken) {
            return Ok(Some(Credential::RegistryToken(token)));
        }
        if let Some(token) = set(&self.identitytoken) {
            return Ok(Some(Credential::IdentityToken(token)));
        }
        if let (Some(user), Some(password)) = (set(&self.username), set(&self.password)) {
            return Ok(Some(Credential::Basic { user, password }));
        }
        let Some(auth) = set(&self.auth) else {
            return Ok(None);
        };
        let bytes = STANDARD
            .decode(auth.trim())
            .map_err(|_| "its `auth` is not base64")?;
        // Docker for Windows once ended the text with a NUL.
        let text = String::from_utf8(bytes).map_err(|_| "its `auth` is not text")?;
        let (user, password) = text
            .trim_end_matches('\0')
            .split_once(':')
            .ok_or("its `auth` is not user:password")?;
        Ok(Some(Credential::Basic {
            user: user.into(),
            password: password.into(),
        }))
    }
}

/// What helpers call a registry.
fn server_name(registry: &str) -> &str {
    match DOCKER_HUB_NAMES.contains(&registry) {
        true => DOCKER_HUB_KEY,
        false => registry,
    }
}

/// Keys may be hosts or addresses: `localhost:5000`, `https://index.docker.io/v1/`.
fn same_registry(key: &str, registry: &str) -> bool {
    let bare = ["https://", "http://"]
        .iter()
        .find_map(|scheme| key.strip_prefix(scheme))
        .unwrap_or(key);
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    let whole_host = matches!(path.trim_end_matches('/'), "" | "v1" | "v2");
    let hub = DOCKER_HUB_NAMES.contains(&host) && DOCKER_HUB_NAMES.contains(&registry);
    whole_host && (host == registry || hub)
}

fn first_line(text: &str) -> String {
    const LONGEST: usize = 200;
    let line = text.lines().next().unwrap_or_default();
    let printable = line.chars().filter(|c| !c.is_control());
    printable.take(LONGEST).collect()
}

#[cfg(test)]
mod tests;

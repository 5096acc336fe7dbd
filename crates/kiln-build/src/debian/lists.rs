//! Brings a suite's package indexes here: Release files, their signatures, then the
//! indexes they name by digest, decompressed within bounds.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_model::{Digest, Progress, ProgressEvent};

use super::fetch::{Expected, FetchError, Fetcher};
use super::index::{self, IndexError, Package};
use super::release::{self, Release, ReleaseError};
use super::sources::{Archive, KeyRef};
use super::verify::{self, VerifyError};
use crate::lock::ArchiveKind;

/// Debian's largest Release files have a quarter of a megabyte.
const MAX_RELEASE_BYTES: u64 = 16 << 20;
/// Compressed; Debian's largest has 13 MB.
const MAX_INDEX_BYTES: u64 = 256 << 20;
/// Decompressed; Debian's largest has 60 MB.
const MAX_INDEX_TEXT: u64 = 1 << 30;

/// Why a suite's indexes could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ListsError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Verify(#[from] VerifyError),
    #[error(transparent)]
    Release(#[from] ReleaseError),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("{url} is not there: does the mirror have this suite?")]
    NoRelease { url: String },
    #[error(
        "none of the configured archives with suite `{suite}` is Debian's own ({ignored} are someone else's)"
    )]
    NoDebian { suite: String, ignored: usize },
    #[error("cannot decompress {url}: {source}")]
    Decompress {
        url: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the blocking task of {url} ended early")]
    Task { url: String },
}

/// One index's text and where it is from.
pub struct List {
    pub kind: ArchiveKind,
    pub url: String,
    pub text: String,
}

impl List {
    pub fn packages(&self, arch: &str) -> Result<Vec<Package<'_>>, IndexError> {
        index::parse(&self.text, arch, self.kind, &self.url)
    }
}

/// What to fetch, and with what.
pub struct ListsRequest<'r> {
    pub archives: &'r [Archive],
    pub components: &'r [String],
    pub arch: &'r str,
    /// Seconds since the epoch.
    pub now: u64,
    /// Where the default keyrings are looked for: `/`.
    pub root: &'r Path,
}

/// All indexes of `request`, verified.
pub async fn fetch(
    fetcher: &Fetcher,
    request: &ListsRequest<'_>,
    progress: &Arc<dyn Progress>,
    task: &str,
) -> Result<Vec<List>, ListsError> {
    let releases = futures_util::future::try_join_all(
        request
            .archives
            .iter()
            .map(|archive| verified_release(fetcher, request, archive)),
    )
    .await?;
    let mut wanted = Vec::new();
    let mut ignored = 0;
    for (archive, found) in request.archives.iter().zip(&releases) {
        match found {
            Found::Release(release) => {
                for component in request.components {
                    wanted.extend(indexes(archive, release, component, request.arch)?);
                }
            }
            Found::Foreign => ignored += 1,
            Found::Absent => progress.event(ProgressEvent::Warning {
                task: task.into(),
                text: format!(
                    "{} has no suite {}: its updates are not used",
                    archive.uri, archive.suite
                ),
            }),
        }
    }
    if wanted.is_empty() {
        return Err(ListsError::NoDebian {
            suite: request
                .archives
                .first()
                .map(|a| a.suite.clone())
                .unwrap_or_default(),
            ignored,
        });
    }
    futures_util::future::try_join_all(wanted.into_iter().map(|index| fetch_index(fetcher, index)))
        .await
}

enum Found {
    Release(Release),
    /// Signed by someone, for something that isn't Debian.
    Foreign,
    Absent,
}

async fn verified_release(
    fetcher: &Fetcher,
    request: &ListsRequest<'_>,
    archive: &Archive,
) -> Result<Found, ListsError> {
    let folder = format!("{}/dists/{}", archive.uri, archive.suite);
    let mut url = format!("{folder}/InRelease");
    let signed = match fetcher.text(&url, MAX_RELEASE_BYTES).await? {
        Some(text) => release::split_signed(&text),
        None => {
            url = format!("{folder}/Release");
            let Some(text) = fetcher.text(&url, MAX_RELEASE_BYTES).await? else {
                return match archive.optional {
                    true => Ok(Found::Absent),
                    false => Err(ListsError::NoRelease {
                        url: format!("{folder}/InRelease"),
                    }),
                };
            };
            let signature = fetcher
                .text(&format!("{url}.gpg"), MAX_RELEASE_BYTES)
                .await?;
            signature.map(|signature| (text, signature))
        }
    };
    let (message, signature) =
        signed.ok_or_else(|| ReleaseError::NotSigned { url: url.clone() })?;
    let outcome = check(
        &url,
        &message,
        signature,
        archive.signed_by.clone(),
        request.root.into(),
    )
    .await;
    let parsed = release::parse(&message, &url);
    // A vendor's archive for this suite, with the vendor's own key, is not for kiln;
    // whether its key is here does not matter then. Saying so of itself gains a
    // forger nothing but being left out, and only where the source names its own key.
    let foreign = |release: &Release| release.origin != "Debian" && !archive.signed_by.is_empty();
    if parsed.as_ref().is_ok_and(foreign) {
        return Ok(Found::Foreign);
    }
    outcome?;
    let release = parsed?;
    if release.origin != "Debian" {
        return Ok(Found::Foreign);
    }
    let now = archive.check_valid_until.then_some(request.now);
    release.check(&url, &archive.suite, now)?;
    Ok(Found::Release(release))
}

async fn check(
    url: &str,
    message: &str,
    signature: String,
    keys: Vec<KeyRef>,
    root: PathBuf,
) -> Result<(), ListsError> {
    let (text, message) = (url.to_string(), message.to_string());
    tokio::task::spawn_blocking(move || verify::verify(&text, &message, &signature, &keys, &root))
        .await
        .map_err(|_| ListsError::Task { url: url.into() })?
        .map_err(Into::into)
}

struct Wanted {
    kind: ArchiveKind,
    urls: Vec<String>,
    expected: Expected,
    path: String,
}

fn indexes(
    archive: &Archive,
    release: &Release,
    component: &str,
    arch: &str,
) -> Result<Vec<Wanted>, ListsError> {
    let found = release.indexes(component, arch);
    // The neighbours may lack a component; the suite itself may not.
    if found.is_empty()
        && archive.kind == ArchiveKind::Debian
        && !archive.suite.ends_with("-updates")
    {
        return Err(ReleaseError::NoComponent {
            suite: archive.suite.clone(),
            component: component.into(),
            arch: arch.into(),
            known: release.components.join(", "),
        }
        .into());
    }
    let folder = format!("{}/dists/{}", archive.uri, archive.suite);
    let wanted = |(path, digest, size): (String, Digest, u64)| {
        let plain = format!("{folder}/{path}");
        let by_hash = plain
            .rsplit_once('/')
            .filter(|_| release.by_hash)
            .map(|(parent, _)| format!("{parent}/by-hash/SHA256/{}", digest.hex()));
        Wanted {
            kind: archive.kind,
            urls: by_hash.into_iter().chain([plain]).collect(),
            expected: Expected { digest, size },
            path,
        }
    };
    Ok(found.into_iter().map(wanted).collect())
}

async fn fetch_index(fetcher: &Fetcher, wanted: Wanted) -> Result<List, ListsError> {
    let url = wanted.urls.last().cloned().unwrap_or_default();
    if wanted.expected.size > MAX_INDEX_BYTES {
        return Err(FetchError::TooLarge {
            url,
            limit: MAX_INDEX_BYTES,
        }
        .into());
    }
    let path = fetcher.file(&wanted.urls, wanted.expected, &|_| {}).await?;
    let (task_url, expected) = (url.clone(), wanted.expected);
    let name = wanted.path;
    let text = tokio::task::spawn_blocking(move || read_index(&path, &name, expected, &task_url))
        .await
        .map_err(|_| ListsError::Task { url: url.clone() })??;
    Ok(List {
        kind: wanted.kind,
        url,
        text,
    })
}

/// Reads a cached index, checking it once more: the cache outlives programs.
fn read_index(
    path: &Path,
    name: &str,
    expected: Expected,
    url: &str,
) -> Result<String, ListsError> {
    let fail = |source| ListsError::Decompress {
        url: url.into(),
        source,
    };
    let bytes = std::fs::read(path).map_err(fail)?;
    let found = Digest::of(&bytes);
    if found != expected.digest {
        // Gone bad on disk: the next run fetches it again.
        std::fs::remove_file(path).map_err(fail)?;
        return Err(FetchError::Mismatch {
            url: path.display().to_string(),
            expected: expected.digest,
            found,
        }
        .into());
    }
    let reader: Box<dyn Read> = match name.rsplit_once('.').map(|(_, suffix)| suffix) {
        Some("xz") => Box::new(xz2::read::XzDecoder::new_multi_decoder(bytes.as_slice())),
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(bytes.as_slice())),
        _ => Box::new(bytes.as_slice()),
    };
    let mut text = Vec::new();
    reader
        .take(MAX_INDEX_TEXT + 1)
        .read_to_end(&mut text)
        .map_err(fail)?;
    if text.len() as u64 > MAX_INDEX_TEXT {
        return Err(fail(std::io::Error::other(format!(
            "it has more than {MAX_INDEX_TEXT} bytes"
        ))));
    }
    // Descriptions are UTF-8; anything else is not worth failing for.
    Ok(String::from_utf8(text)
        .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
}

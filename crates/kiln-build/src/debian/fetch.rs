//! Gets files from archives over http, https or from a `file:` folder: bounded,
//! hashed while they arrive, tried again when the connection fails, kept in the
//! cache folder under their sha256. Nothing enters the cache unverified.

use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _};
use kiln_model::{Digest, Hasher, Progress, ProgressEvent};

/// Tries per file, the first included.
const MAX_TRIES: u32 = 4;
/// Before the second try; doubled for each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(300);
/// Without a byte for this long, a download is given up and tried again.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// Downloads at once.
pub const PARALLEL: usize = 8;
/// No Debian package file is larger.
pub const MAX_PACKAGE_BYTES: u64 = 8 << 30;

/// Why a file could not be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("cannot fetch {url}: {problem} (tried {MAX_TRIES} times)")]
    Unreachable { url: String, problem: String },
    #[error("{url} is not there: {status}")]
    Missing { url: String, status: String },
    #[error("{url} is larger than the {limit} bytes it may have")]
    TooLarge { url: String, limit: u64 },
    #[error("{url} does not have the content it should: expected {expected}, got {found}")]
    Mismatch {
        url: String,
        expected: Digest,
        found: Digest,
    },
    #[error("kiln can't fetch from `{url}`: only http:, https: and file: addresses")]
    Scheme { url: String },
    #[error("cannot write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl FetchError {
    /// Another address, or another time, may do better.
    fn passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

/// What a file must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

/// Fetches over one client into one cache folder.
#[derive(Clone)]
pub struct Fetcher {
    client: reqwest::Client,
    cache: PathBuf,
}

impl Fetcher {
    /// `cache` is made if missing.
    pub fn new(client: reqwest::Client, cache: PathBuf) -> Result<Self, FetchError> {
        std::fs::create_dir_all(&cache).map_err(|source| FetchError::Write {
            path: cache.clone(),
            source,
        })?;
        Ok(Self { client, cache })
    }

    /// Where the file of that content is, or is going to be.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.cache.join(digest.hex())
    }

    /// Whether the cache has a file of that name and size; its content is checked
    /// again when it is unpacked.
    pub fn has(&self, expected: &Expected) -> bool {
        std::fs::metadata(self.path(&expected.digest))
            .is_ok_and(|m| m.is_file() && m.len() == expected.size)
    }

    /// A small file whose digest nobody knows yet; `None`: the archive has no such file.
    pub async fn text(&self, url: &str, limit: u64) -> Result<Option<String>, FetchError> {
        let fetched = retried(|| async {
            let mut bytes = Vec::new();
            self.stream(url, limit, &mut |piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            })
            .await?;
            Ok(bytes)
        });
        match fetched.await {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(FetchError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Brings the file `expected` into the cache from the first of `urls` that has it;
    /// `advance` hears how many bytes came. Returns its path.
    pub async fn file(
        &self,
        urls: &[String],
        expected: Expected,
        advance: &(dyn Fn(u64) + Sync),
    ) -> Result<PathBuf, FetchError> {
        let path = self.path(&expected.digest);
        if self.has(&expected) {
            advance(expected.size);
            return Ok(path);
        }
        let mut problem = None;
        for url in urls {
            match retried(|| self.download(url, expected, &path, advance)).await {
                Ok(()) => return Ok(path),
                Err(error @ FetchError::Write { .. }) => return Err(error),
                // A wrong content weighs more than another mirror's lack of the file.
                Err(error) => match &problem {
                    Some(FetchError::Mismatch { .. }) => {}
                    _ => problem = Some(error),
                },
            }
        }
        Err(problem.unwrap_or_else(|| FetchError::Missing {
            url: path.display().to_string(),
            status: "no archive to take it from is configured".into(),
        }))
    }

    async fn download(
        &self,
        url: &str,
        expected: Expected,
        path: &Path,
        advance: &(dyn Fn(u64) + Sync),
    ) -> Result<(), FetchError> {
        let write = |source| FetchError::Write {
            path: path.into(),
            source,
        };
        let mut file = tempfile::Builder::new()
            .prefix(".fetch-")
            .tempfile_in(&self.cache)
            .map_err(write)?;
        let mut hasher = Hasher::new();
        let outcome = self
            .stream(url, expected.size, &mut |piece| {
                hasher.update(piece);
                advance(piece.len() as u64);
                file.write_all(piece).map_err(write)
            })
            .await;
        outcome?;
        let found = hasher.finish();
        if found != expected.digest {
            return Err(FetchError::Mismatch {
                url: url.into(),
                expected: expected.digest,
                found,
            });
        }
        file.persist(path).map_err(|e| write(e.error))?;
        Ok(())
    }

    /// Gives a body's pieces to `take`, at most `limit` bytes of them.
    async fn stream(
        &self,
        url: &str,
        limit: u64,
        take: &mut (dyn FnMut(&[u8]) -> Result<(), FetchError> + Send),
    ) -> Result<(), FetchError> {
        let too_large = || FetchError::TooLarge {
            url: url.into(),
            limit,
        };
        if let Some(path) = url.strip_prefix("file:") {
            return read_local(url, path, limit, take);
        }
        if !url.starts_with("http://") && !url.starts_with("https://") {
            return Err(FetchError::Scheme { url: url.into() });
        }
        let unreachable = |problem: String| FetchError::Unreachable {
            url: url.into(),
            problem,
        };
        let answer = tokio::time::timeout(IDLE_LIMIT, self.client.get(url).send())
            .await
            .map_err(|_| unreachable(format!("no answer in {} s", IDLE_LIMIT.as_secs())))?
            .map_err(|e| unreachable(causes(&e)))?;
        let status = answer.status();
        if status.is_server_error() || matches!(status.as_u16(), 408 | 429) {
            return Err(unreachable(format!("the server says {status}")));
        }
        if !status.is_success() {
            return Err(FetchError::Missing {
                url: url.into(),
                status: format!("the server says {status}"),
            });
        }
        if answer.content_length().is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let mut body = answer.bytes_stream();
        let mut size = 0u64;
        loop {
            let piece = tokio::time::timeout(IDLE_LIMIT, body.next())
                .await
                .map_err(|_| unreachable(format!("nothing came for {} s", IDLE_LIMIT.as_secs())))?;
            let Some(piece) = piece else {
                return Ok(());
            };
            let piece = piece.map_err(|e| unreachable(causes(&e)))?;
            size += piece.len() as u64;
            if size > limit {
                return Err(too_large());
            }
            take(&piece)?;
        }
    }
}

fn read_local(
    url: &str,
    path: &str,
    limit: u64,
    take: &mut (dyn FnMut(&[u8]) -> Result<(), FetchError> + Send),
) -> Result<(), FetchError> {
    let missing = |error: std::io::Error| FetchError::Missing {
        url: url.into(),
        status: error.to_string(),
    };
    let path = path.strip_prefix("//").unwrap_or(path);
    let mut file = std::fs::File::open(path).map_err(missing)?;
    let mut buffer = vec![0; 1 << 16];
    let mut size = 0;
    loop {
        let count = file.read(&mut buffer).map_err(missing)?;
        if count == 0 {
            return Ok(());
        }
        size += count as u64;
        if size > limit {
            return Err(FetchError::TooLarge {
                url: url.into(),
                limit,
            });
        }
        take(&buffer[..count])?;
    }
}

async fn retried<T, F: Future<Output = Result<T, FetchError>>>(
    once: impl Fn() -> F,
) -> Result<T, FetchError> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..MAX_TRIES {
        match once().await {
            Err(error) if error.passing() => {
                tracing::debug!(%error, "trying again");
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            other => return other,
        }
    }
    once().await
}

/// reqwest's own message leaves out why.
fn causes(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = cause.to_string();
        source = cause.source();
    }
    match text.is_empty() {
        true => error.to_string(),
        false => text,
    }
}

/// Tells a task's bytes as they come, and its end.
pub struct Meter {
    progress: Arc<dyn Progress>,
    task: String,
    total: u64,
    done: std::sync::atomic::AtomicU64,
}

impl Meter {
    pub fn new(progress: Arc<dyn Progress>, task: String, total: u64) -> Self {
        Self {
            progress,
            task,
            total,
            done: 0.into(),
        }
    }

    pub fn advance(&self, bytes: u64) {
        let before = self
            .done
            .fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        // One event per half megabyte is plenty for a progress bar.
        let done = before + bytes;
        if before >> 19 != done >> 19 || done >= self.total {
            self.progress.event(ProgressEvent::Advanced {
                task: self.task.clone(),
                done: done.min(self.total),
                total: Some(self.total),
                bytes: true,
            });
        }
    }
}

/// Fetches all of `wanted`, [`PARALLEL`] at a time; the first error ends it.
pub async fn all(
    fetcher: &Fetcher,
    wanted: Vec<(Vec<String>, Expected)>,
    meter: &Meter,
) -> Result<Vec<PathBuf>, FetchError> {
    let one = |(urls, expected): (Vec<String>, Expected)| async move {
        fetcher
            .file(&urls, expected, &|bytes| meter.advance(bytes))
            .await
    };
    futures_util::stream::iter(wanted.into_iter().map(one))
        .buffered(PARALLEL)
        .try_collect()
        .await
}

//! Bringing remote sources onto this machine, by their pins where there are any.

use std::fs;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_model::Digest;
use kiln_store::Store;

use super::git::Git;
use super::{GitAddress, Pins, Remote, RemoteError, without_password};

/// A file larger than this is refused: 64 GiB.
const MAX_FILE: u64 = 64 << 30;
/// A server that sends nothing for this long is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is asked again after no answer.
const TRIES: u32 = 3;

/// What was fetched.
pub enum Fetched {
    /// A file of the store, with the last name of its URL.
    File {
        name: String,
        digest: Digest,
        size: u64,
    },
    /// A checked out repository's folder.
    Folder { path: PathBuf, keep_git_dir: bool },
}

/// Fetches for one build.
pub struct Remotes<'a> {
    pub store: &'a Store,
    /// The builder's cache folder.
    pub cache: &'a Path,
    pub pins: &'a Arc<Mutex<Pins>>,
    pub cancel: &'a AtomicBool,
}

impl Remotes<'_> {
    pub fn fetch(&self, remote: &Remote) -> Result<Fetched, RemoteError> {
        match remote {
            Remote::Url { url, checksum } => self.file(url, *checksum),
            Remote::Git {
                address,
                commit,
                keep_git_dir,
            } => self.repository(address, commit.as_deref(), *keep_git_dir),
        }
    }

    fn pins(&self) -> std::sync::MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn scratch(&self, name: &str) -> Result<PathBuf, RemoteError> {
        let path = self.cache.join(name);
        match fs::create_dir_all(&path) {
            Ok(()) => Ok(path),
            Err(cause) => Err(RemoteError::Scratch { path, cause }),
        }
    }

    fn file(&self, url: &str, checksum: Option<Digest>) -> Result<Fetched, RemoteError> {
        let name = last_name(url);
        let expected = checksum.or_else(|| self.pins().urls.get(url).copied());
        if let Some(digest) = expected
            && let Ok(meta) = fs::metadata(self.store.object_path(&digest))
        {
            self.pins().urls.insert(url.to_owned(), digest);
            let size = meta.len();
            return Ok(Fetched::File { name, digest, size });
        }
        let mut file = self.download(url)?;
        let fail = |cause| RemoteError::Scratch {
            path: self.cache.to_owned(),
            cause,
        };
        file.rewind().map_err(fail)?;
        let put = self.store.put_object(&mut file);
        let (digest, size) = put.map_err(|e| fail(std::io::Error::other(e)))?;
        if let Some(expected) = expected.filter(|e| *e != digest) {
            return Err(RemoteError::Changed {
                url: without_password(url),
                expected,
                found: digest,
            });
        }
        self.pins().urls.insert(url.to_owned(), digest);
        Ok(Fetched::File { name, digest, size })
    }

    fn download(&self, url: &str) -> Result<fs::File, RemoteError> {
        let folder = self.scratch("run")?;
        let fail = |cause| RemoteError::Scratch {
            path: folder.clone(),
            cause,
        };
        // A build runs on threads of its own, outside of any async runtime.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(fail)?;
        let http = |cause| RemoteError::Http {
            url: without_password(url),
            cause,
        };
        let client = crate::http_client().map_err(http)?;
        let mut last = None;
        for _ in 0..TRIES {
            let mut file = tempfile::tempfile_in(&folder).map_err(fail)?;
            let one = runtime.block_on(self.receive(&client, url, &mut file));
            match one {
                Ok(()) => return Ok(file),
                // Sent again only where the network failed, not where the server refused.
                Err(error @ RemoteError::Http { .. }) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or(RemoteError::Cancelled))
    }

    async fn receive(
        &self,
        client: &reqwest::Client,
        url: &str,
        file: &mut fs::File,
    ) -> Result<(), RemoteError> {
        let http = |cause| RemoteError::Http {
            url: without_password(url),
            cause,
        };
        let request = client.get(url).timeout(Duration::from_secs(6 * 3600));
        let sent = tokio::time::timeout(PATIENCE, request.send()).await;
        let mut response = match sent {
            Ok(response) => response.map_err(http)?,
            Err(_) => return Err(RemoteError::Silent(without_password(url))),
        };
        if !response.status().is_success() {
            return Err(RemoteError::Status {
                url: without_password(url),
                status: response.status().as_u16(),
            });
        }
        let mut length = 0_u64;
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(RemoteError::Cancelled);
            }
            let chunk = match tokio::time::timeout(PATIENCE, response.chunk()).await {
                Ok(chunk) => chunk.map_err(http)?,
                Err(_) => return Err(RemoteError::Silent(without_password(url))),
            };
            let Some(chunk) = chunk else { return Ok(()) };
            length += chunk.len() as u64;
            if length > MAX_FILE {
                return Err(RemoteError::TooLong {
                    url: without_password(url),
                    limit: MAX_FILE,
                });
            }
            file.write_all(&chunk)
                .map_err(|cause| RemoteError::Scratch {
                    path: self.cache.to_owned(),
                    cause,
                })?;
        }
    }

    fn repository(
        &self,
        address: &GitAddress,
        expected: Option<&str>,
        keep_git_dir: bool,
    ) -> Result<Fetched, RemoteError> {
        let folder = self.scratch("git")?;
        let pinned = self.pins().git.get(&address.pin()).cloned();
        // A commit that the file names itself wins over an older pin.
        let pinned = pinned.filter(|pin| expected.is_none_or(|e| pin.starts_with(e)));
        let git = Git {
            folder: &folder,
            address,
            cancel: self.cancel,
        };
        let commit = match pinned {
            Some(commit) => commit,
            None => git.commit()?,
        };
        if let Some(expected) = expected.filter(|e| !commit.starts_with(e)) {
            return Err(RemoteError::Commit {
                address: address.shown(),
                expected: expected.to_owned(),
                found: commit,
            });
        }
        let name = Digest::of(format!("{}\n{commit}", address.repository)).hex();
        let path = folder.join(name);
        if !path.is_dir() {
            self.check_out(address, &commit, &folder, &path)?;
        }
        self.pins().git.insert(address.pin(), commit);
        let root = match address.folder.as_str() {
            "" => path.clone(),
            below => path.join(below),
        };
        // A link in the repository must not lead out of it.
        let top = fs::canonicalize(&path);
        let within = fs::canonicalize(&root)
            .is_ok_and(|real| top.is_ok_and(|top| real.starts_with(top)) && real.is_dir());
        if !within {
            return Err(RemoteError::NoFolder {
                address: address.shown(),
                folder: address.folder.clone(),
            });
        }
        Ok(Fetched::Folder {
            path: root,
            keep_git_dir: keep_git_dir && address.folder.is_empty(),
        })
    }

    /// Into a folder of its own first: what has its name is complete.
    fn check_out(
        &self,
        address: &GitAddress,
        commit: &str,
        folder: &Path,
        path: &Path,
    ) -> Result<(), RemoteError> {
        let fail = |cause| RemoteError::Scratch {
            path: path.to_owned(),
            cause,
        };
        let work = tempfile::Builder::new()
            .prefix("new-")
            .tempdir_in(folder)
            .map_err(fail)?;
        let git = Git {
            folder: work.path(),
            address,
            cancel: self.cancel,
        };
        git.check_out(commit)?;
        match fs::rename(work.path(), path) {
            Ok(()) => {
                let _ = work.keep();
                Ok(())
            }
            // Another build was faster.
            Err(_) if path.is_dir() => Ok(()),
            Err(cause) => Err(fail(cause)),
        }
    }
}

/// The last name of a URL's path; docker's word where there is none.
fn last_name(url: &str) -> String {
    let parsed = reqwest::Url::parse(url).ok();
    let last = parsed.as_ref().and_then(|url| {
        url.path_segments()?
            .rev()
            .find(|name| !name.is_empty())
            .map(str::to_owned)
    });
    last.map_or_else(|| "__unnamed__".into(), |name| decoded(&name))
}

/// A URL's `%20` as what it stands for; what can't be a file's name stays as it is.
fn decoded(name: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = name.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|_| *byte == b'%');
        let digits = digits.and_then(|two| std::str::from_utf8(two).ok());
        match digits.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*byte);
                rest = after;
            }
        }
    }
    match String::from_utf8(bytes) {
        Ok(plain) if !plain.contains(['/', '\0']) && plain != "." && plain != ".." => plain,
        _ => name.to_owned(),
    }
}

//! Resolving and pulling.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use futures_util::{StreamExt, TryStreamExt};
use kiln_model::progress::Finish;
use kiln_model::{Digest, Progress, ProgressEvent};
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, RANGE};
use tokio::sync::mpsc;

use super::bridge::{Arriving, PIECES, Piece};
use super::error::chain;
use super::session::{Session, text_header};
use super::{Action, Client, MAX_INDEX_DEPTH, PARALLEL_BLOBS, Problem, RegistryError, Resolved};
use crate::blob::{BlobWrite, BlobWriteError, Expected};
use crate::manifest::{Descriptor, Document, MAX_CONFIG_BYTES, Manifest, check_image};
use crate::platform::Platform;
use crate::reference::Reference;

/// Most answers that one blob may be pieced together from.
const MAX_PARTS: u32 = 10;

/// A manifest found by a reference, with its exact bytes.
struct Found {
    resolved: Resolved,
    bytes: Vec<u8>,
    manifest: Manifest,
}

impl Client {
    /// Asks which image a reference means now, for `platform`.
    pub async fn resolve(
        &self,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<Resolved, RegistryError> {
        let session = Session::open(self, reference, Action::Pull).await?;
        Ok(session.find(platform).await?.resolved)
    }

    /// Takes an image with all its blobs into `blobs`, those that are not there yet;
    /// the manifest comes last. Gives the manifest's digest.
    pub async fn pull(
        &self,
        reference: &Reference,
        platform: &Platform,
        blobs: Arc<dyn BlobWrite>,
        progress: &dyn Progress,
    ) -> Result<Digest, RegistryError> {
        let task = format!("pull {}", reference.familiar());
        progress.event(ProgressEvent::Started {
            task: task.clone(),
            detail: reference.to_string(),
        });
        let started = Instant::now();
        let result = self
            .pull_image(reference, platform, blobs, &task, progress)
            .await;
        let how = match &result {
            Ok((_, 0)) => Finish::Cached,
            Ok(_) => Finish::Done,
            Err(error) => Finish::Failed {
                cause: error.to_string(),
            },
        };
        let took = started.elapsed().into();
        progress.event(ProgressEvent::Finished { task, how, took });
        result.map(|(digest, _)| digest)
    }

    /// The digest, and how many bytes of layers were moved.
    async fn pull_image(
        &self,
        reference: &Reference,
        platform: &Platform,
        blobs: Arc<dyn BlobWrite>,
        task: &str,
        progress: &dyn Progress,
    ) -> Result<(Digest, u64), RegistryError> {
        let session = Session::open(self, reference, Action::Pull).await?;
        let found = session.find(platform).await?;
        let config = session.config(&found.manifest).await?;
        check_image(&found.manifest, &config, platform)
            .map_err(|e| session.fail(Problem::Image(e)))?;

        let mut missing = Vec::new();
        let mut seen = BTreeSet::new();
        for layer in &found.manifest.layers {
            if seen.insert(layer.digest) && !session.has(&blobs, layer.digest)? {
                missing.push(layer);
            }
        }
        let total = missing
            .iter()
            .fold(0u64, |sum, l| sum.saturating_add(l.size));
        let done = AtomicU64::new(0);
        let advance = |bytes: u64| {
            progress.event(ProgressEvent::Advanced {
                task: task.into(),
                done: done.fetch_add(bytes, Ordering::Relaxed) + bytes,
                total: Some(total),
                bytes: true,
            });
        };
        let (session, blobs, advance) = (&session, &blobs, &advance);
        futures_util::stream::iter(missing)
            .map(|layer| session.fetch(layer, Arc::clone(blobs), advance))
            .buffer_unordered(PARALLEL_BLOBS)
            .try_collect::<()>()
            .await?;
        session.keep(blobs, config).await?;
        session.keep(blobs, found.bytes).await?;
        Ok((found.resolved.manifest, total))
    }
}

impl Session<'_> {
    /// Follows indexes down to the manifest for `platform`.
    async fn find(&self, platform: &Platform) -> Result<Found, RegistryError> {
        let mut selector = self.reference.selector();
        let mut expected = self.reference.digest().copied();
        let mut index = None;
        for _ in 0..=MAX_INDEX_DEPTH {
            let (bytes, digest, document) = self.manifest(&selector, expected).await?;
            match document {
                Document::Manifest(manifest) => {
                    let resolved = Resolved {
                        manifest: digest,
                        index,
                    };
                    return Ok(Found {
                        resolved,
                        bytes,
                        manifest: *manifest,
                    });
                }
                Document::Index(found) => {
                    index = index.or(Some(digest));
                    let entry = found.select(platform).ok_or_else(|| {
                        self.fail(Problem::NoPlatform {
                            wanted: platform.to_string(),
                            found: found.platforms(),
                        })
                    })?;
                    selector = entry.digest.to_string();
                    expected = Some(entry.digest);
                }
            }
        }
        Err(self.fail(Problem::TooDeep))
    }

    async fn config(&self, manifest: &Manifest) -> Result<Vec<u8>, RegistryError> {
        manifest
            .check_runnable()
            .map_err(|e| self.fail(Problem::Image(e.into())))?;
        let digest = manifest.config.digest;
        self.small_blob(&digest, MAX_CONFIG_BYTES).await
    }

    fn has(&self, blobs: &Arc<dyn BlobWrite>, digest: Digest) -> Result<bool, RegistryError> {
        blobs.contains(&digest).map_err(|source| {
            let source = BlobWriteError::Store(source);
            self.fail(Problem::Blob { digest, source })
        })
    }

    /// Takes in what is whole and verified already.
    async fn keep(&self, blobs: &Arc<dyn BlobWrite>, bytes: Vec<u8>) -> Result<(), RegistryError> {
        let expected = Expected {
            digest: Digest::of(&bytes),
            size: bytes.len() as u64,
        };
        let blobs = Arc::clone(blobs);
        let writer =
            tokio::task::spawn_blocking(move || blobs.write(Some(expected), &mut bytes.as_slice()));
        self.written(expected.digest, writer.await)
    }

    fn written(
        &self,
        digest: Digest,
        outcome: Result<Result<(Digest, u64), BlobWriteError>, tokio::task::JoinError>,
    ) -> Result<(), RegistryError> {
        match outcome {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(BlobWriteError::WrongDigest { expected, found })) => {
                Err(self.fail(Problem::WrongDigest { expected, found }))
            }
            Ok(Err(source)) => Err(self.fail(Problem::Blob { digest, source })),
            Err(error) => Err(self.fail(Problem::Worker {
                what: "writing a blob",
                cause: error.to_string(),
            })),
        }
    }

    /// Streams one blob into the store.
    pub(super) async fn fetch(
        &self,
        blob: &Descriptor,
        blobs: Arc<dyn BlobWrite>,
        advance: &(dyn Fn(u64) + Sync),
    ) -> Result<(), RegistryError> {
        let (sender, receiver) = mpsc::channel(PIECES);
        let expected = Expected {
            digest: blob.digest,
            size: blob.size,
        };
        let writer = tokio::task::spawn_blocking(move || {
            blobs.write(Some(expected), &mut Arriving::new(receiver))
        });
        let fed = self.feed(blob, &sender, advance).await;
        drop(sender);
        let written = writer.await;
        // If the network failed, what the store says about it is only an echo.
        fed?;
        self.written(blob.digest, written)
    }

    /// Sends a blob's content on, resuming it where it broke off.
    async fn feed(
        &self,
        blob: &Descriptor,
        pieces: &mpsc::Sender<Piece>,
        advance: &(dyn Fn(u64) + Sync),
    ) -> Result<(), RegistryError> {
        let retry = self.client.options.retry;
        let mut done = 0;
        let mut attempts = 0;
        loop {
            match self.feed_part(blob, &mut done, pieces, advance).await? {
                Part::StoreFailed => return Ok(()),
                Part::Whole => {
                    // If nobody listens, the store has failed and will say so.
                    let _ = pieces.send(Piece::End).await;
                    return Ok(());
                }
                Part::BrokenOff => {}
            }
            attempts += 1;
            if attempts >= MAX_PARTS {
                return Err(self.fail(Problem::Truncated {
                    digest: blob.digest,
                    found: done,
                    expected: blob.size,
                    attempts,
                }));
            }
            tokio::time::sleep(retry.wait(attempts.min(3))).await;
        }
    }

    async fn feed_part(
        &self,
        blob: &Descriptor,
        done: &mut u64,
        pieces: &mpsc::Sender<Piece>,
        advance: &(dyn Fn(u64) + Sync),
    ) -> Result<Part, RegistryError> {
        let url = self.url(&format!("blobs/{}", blob.digest))?;
        let start = *done;
        let make = || match start {
            0 => self.client.http.get(url.clone()),
            _ => self
                .client
                .http
                .get(url.clone())
                .header(RANGE, format!("bytes={start}-")),
        };
        let response = self.send(&make, self.client.options.retry).await?;
        let what = format!("blob {}", blob.digest);
        let mut response = self.success(&what, response).await?;
        let resumed = response.status() == StatusCode::PARTIAL_CONTENT
            && text_header(response.headers(), CONTENT_RANGE.as_str())
                .is_some_and(|range| range.starts_with(&format!("bytes {start}-")));
        // A registry that knows no ranges begins anew.
        let mut skip = if resumed { 0 } else { start };
        loop {
            let mut chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(%what, done = *done, cause = chain(&error), "broke off");
                    break;
                }
            };
            let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
            skip -= skipped as u64;
            let chunk = chunk.split_off(skipped);
            if chunk.is_empty() {
                continue;
            }
            let bytes = chunk.len() as u64;
            if bytes > blob.size - *done {
                return Err(self.fail(Problem::TooLong {
                    digest: blob.digest,
                    expected: blob.size,
                }));
            }
            if pieces.send(Piece::Content(chunk)).await.is_err() {
                return Ok(Part::StoreFailed);
            }
            *done += bytes;
            advance(bytes);
        }
        match *done == blob.size {
            true => Ok(Part::Whole),
            false => Ok(Part::BrokenOff),
        }
    }
}

/// How far one answer got.
enum Part {
    Whole,
    BrokenOff,
    /// The store takes no more, and knows why.
    StoreFailed,
}

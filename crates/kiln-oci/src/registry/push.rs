//! Pushing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use futures_util::{StreamExt, TryStreamExt};
use kiln_model::progress::Finish;
use kiln_model::{Digest, Progress, ProgressEvent};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{StatusCode, Url};

use super::session::{Session, text_header};
use super::{Action, Client, PARALLEL_BLOBS, Problem, RegistryError, Retry, bridge, http_allowed};
use crate::blob::{BlobRead, ReadSmallError, read_small};
use crate::manifest::{self, Descriptor, Document, MAX_MANIFEST_BYTES, media_type};
use crate::reference::Reference;

impl Client {
    /// Puts an image into a registry under `reference`: the blobs it lacks, then the
    /// manifest's exact bytes. An index is pushed with all images it lists.
    pub async fn push(
        &self,
        manifest: &Digest,
        blobs: Arc<dyn BlobRead>,
        reference: &Reference,
        progress: &dyn Progress,
    ) -> Result<(), RegistryError> {
        let task = format!("push {}", reference.familiar());
        progress.event(ProgressEvent::Started {
            task: task.clone(),
            detail: manifest.to_string(),
        });
        let started = Instant::now();
        let result = match Session::open(self, reference, Action::Push).await {
            Ok(session) => {
                let selector = reference.selector();
                session.push(*manifest, &selector, &blobs).await
            }
            Err(error) => Err(error),
        };
        let how = match &result {
            Ok(()) => Finish::Done,
            Err(error) => Finish::Failed {
                cause: error.to_string(),
            },
        };
        let took = started.elapsed().into();
        progress.event(ProgressEvent::Finished { task, how, took });
        result
    }
}

impl Session<'_> {
    async fn push(
        &self,
        digest: Digest,
        selector: &str,
        blobs: &Arc<dyn BlobRead>,
    ) -> Result<(), RegistryError> {
        let (bytes, document) = self.read_document(digest, blobs).await?;
        match &document {
            Document::Manifest(manifest) => {
                self.push_blobs(manifest, blobs).await?;
            }
            Document::Index(index) => {
                for entry in &index.manifests {
                    let (bytes, document) = self.read_document(entry.digest, blobs).await?;
                    let Document::Manifest(manifest) = &document else {
                        return Err(self.fail(Problem::TooDeep));
                    };
                    self.push_blobs(manifest, blobs).await?;
                    let selector = entry.digest.to_string();
                    self.put_manifest(&selector, &document, bytes).await?;
                }
            }
        }
        self.put_manifest(selector, &document, bytes).await
    }

    async fn read_document(
        &self,
        digest: Digest,
        blobs: &Arc<dyn BlobRead>,
    ) -> Result<(Vec<u8>, Document), RegistryError> {
        let blobs = Arc::clone(blobs);
        let reading =
            tokio::task::spawn_blocking(move || read_small(&*blobs, &digest, MAX_MANIFEST_BYTES));
        let bytes = match reading.await {
            Ok(bytes) => bytes.map_err(|e| self.fail(e.into()))?,
            Err(error) => {
                return Err(self.fail(Problem::Worker {
                    what: "reading a blob",
                    cause: error.to_string(),
                }));
            }
        };
        let document = manifest::parse(&bytes, None)
            .map_err(|source| self.fail(Problem::Manifest { digest, source }))?;
        Ok((bytes, document))
    }

    async fn push_blobs(
        &self,
        manifest: &manifest::Manifest,
        blobs: &Arc<dyn BlobRead>,
    ) -> Result<(), RegistryError> {
        let mut seen = BTreeSet::new();
        let each = manifest.layers.iter().chain([&manifest.config]);
        let each: Vec<&Descriptor> = each.filter(|blob| seen.insert(blob.digest)).collect();
        futures_util::stream::iter(each)
            .map(|blob| self.push_blob(blob, blobs))
            .buffer_unordered(PARALLEL_BLOBS)
            .try_collect::<()>()
            .await
    }

    async fn push_blob(
        &self,
        blob: &Descriptor,
        blobs: &Arc<dyn BlobRead>,
    ) -> Result<(), RegistryError> {
        self.check_present(blob, blobs)?;
        let url = self.url(&format!("blobs/{}", blob.digest))?;
        let head = || self.client.http.head(url.clone());
        let retry = self.client.options.retry;
        let response = self.send(&head, retry).await?;
        if response.status().is_success() {
            return Ok(());
        }
        // An upload that broke off is begun anew: its address may be spent.
        let mut attempt = 1;
        loop {
            match self.upload(blob, blobs).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    let passing = matches!(
                        *error.problem,
                        Problem::Unreachable { .. } | Problem::Busy { .. } | Problem::Broken { .. }
                    );
                    if !passing || attempt >= retry.attempts {
                        return Err(error);
                    }
                }
            }
            tokio::time::sleep(retry.wait(attempt)).await;
            attempt += 1;
        }
    }

    /// One whole upload (distribution-spec v1.1, "POST then PUT").
    async fn upload(
        &self,
        blob: &Descriptor,
        blobs: &Arc<dyn BlobRead>,
    ) -> Result<(), RegistryError> {
        let what = format!("the upload of blob {}", blob.digest);
        let start = self.url("blobs/uploads/")?;
        let post = || {
            let request = self.client.http.post(start.clone());
            request.header(CONTENT_LENGTH, 0)
        };
        let response = self.send(&post, self.client.options.retry).await?;
        let response = self.success(&what, response).await?;
        let mut target = text_header(response.headers(), LOCATION.as_str())
            .and_then(|location| response.url().join(location).ok())
            .ok_or_else(|| self.broken(&what, "the registry named no address for it"))?;
        self.check_target(&what, &target)?;
        let digest = blob.digest.to_string();
        target.query_pairs_mut().append_pair("digest", &digest);

        let put = || {
            let request = self.client.http.put(target.clone());
            let request = request
                .header(CONTENT_TYPE, "application/octet-stream")
                .header(CONTENT_LENGTH, blob.size);
            request.body(bridge::body(Arc::clone(blobs), blob.digest))
        };
        let once = Retry {
            attempts: 1,
            ..self.client.options.retry
        };
        let response = self.send(&put, once).await?;
        self.success(&what, response).await.map(drop)
    }

    /// Found out before a registry is bothered with it.
    fn check_present(
        &self,
        blob: &Descriptor,
        blobs: &Arc<dyn BlobRead>,
    ) -> Result<(), RegistryError> {
        let digest = blob.digest;
        let problem = match blobs.size(&digest) {
            Ok(Some(size)) if size == blob.size => return Ok(()),
            Ok(Some(size)) => {
                let why = format!("it has {size} bytes, not the {} of its manifest", blob.size);
                let source = std::io::Error::new(std::io::ErrorKind::InvalidData, why);
                ReadSmallError::Io { digest, source }
            }
            Ok(None) => ReadSmallError::Missing { digest },
            Err(source) => ReadSmallError::Io { digest, source },
        };
        Err(self.fail(problem.into()))
    }

    fn check_target(&self, what: &str, target: &Url) -> Result<(), RegistryError> {
        let host = super::session::host_and_port(target);
        let plain_allowed = http_allowed(&host, &self.client.options.insecure);
        match target.scheme() {
            "https" => Ok(()),
            "http" if plain_allowed => Ok(()),
            _ => Err(self.broken(what, "the registry wants it over plain HTTP")),
        }
    }

    fn broken(&self, what: &str, cause: &str) -> RegistryError {
        self.fail(Problem::Broken {
            what: what.into(),
            cause: cause.into(),
        })
    }

    async fn put_manifest(
        &self,
        selector: &str,
        document: &Document,
        bytes: Vec<u8>,
    ) -> Result<(), RegistryError> {
        let said = match document {
            Document::Manifest(m) => m.media_type.clone(),
            Document::Index(i) => i.media_type.clone(),
        };
        let content_type = said.unwrap_or_else(|| match document {
            Document::Manifest(_) => media_type::OCI_MANIFEST.into(),
            Document::Index(_) => media_type::OCI_INDEX.into(),
        });
        let url = self.url(&format!("manifests/{selector}"))?;
        let expected = Digest::of(&bytes);
        let bytes = bytes::Bytes::from(bytes);
        let put = || {
            let request = self.client.http.put(url.clone());
            let request = request.header(CONTENT_TYPE, &content_type);
            request.body(bytes.clone())
        };
        let response = self.send(&put, self.client.options.retry).await?;
        let what = format!("manifest `{selector}`");
        let response = match response.status() {
            StatusCode::NOT_FOUND => {
                return Err(self.broken(&what, "the registry has no such repository"));
            }
            _ => self.success(&what, response).await?,
        };
        let said = text_header(response.headers(), "docker-content-digest");
        match said.and_then(|text| text.parse::<Digest>().ok()) {
            Some(found) if found != expected => {
                Err(self.fail(Problem::WrongDigest { expected, found }))
            }
            _ => Ok(()),
        }
    }
}

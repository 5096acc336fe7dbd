//! The API's client, for the CLI and for tests.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use kiln_model::{EnvironmentName, InstanceId, NetworkName, Release, ReleaseNumber, VolumeName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::error::ApiError;
use super::types::{
    ApiErrorBody, DaemonStatus, DownRequest, EnvironmentStatus, EventRecord, ExecNotice,
    Explanation, NetworkLine, NetworkRequest, ReleaseAnswer, ReleaseLine, ReleaseRequest,
    RollbackRequest,
};
use crate::snapshots::Snapshot;

/// No answer of the daemon's is larger.
const LARGEST_ANSWER: usize = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no kiln daemon answers on {socket}: {source}")]
    Unreachable {
        socket: PathBuf,
        source: std::io::Error,
    },
    #[error("talking to the kiln daemon: {0}")]
    Broken(String),
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// Talks to the daemon of one root; opens a connection per call.
#[derive(Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(root: &Path) -> Self {
        Self {
            socket: crate::server::socket_path(root),
        }
    }

    pub async fn daemon(&self) -> Result<DaemonStatus, ClientError> {
        self.call(Method::GET, "/v1/daemon", None::<&()>).await
    }

    pub async fn stop(&self) -> Result<(), ClientError> {
        self.call(Method::POST, "/v1/daemon/stop", Some(&())).await
    }

    pub async fn status(&self, e: &EnvironmentName) -> Result<EnvironmentStatus, ClientError> {
        self.call(Method::GET, &format!("/v1/environments/{e}"), None::<&()>)
            .await
    }

    /// Without a look into the instances (pid, drift, warnings): cheap enough to ask for
    /// several times a second.
    pub async fn brief(&self, e: &EnvironmentName) -> Result<EnvironmentStatus, ClientError> {
        let path = format!("/v1/environments/{e}?brief=true");
        self.call(Method::GET, &path, None::<&()>).await
    }

    pub async fn releases(&self, e: &EnvironmentName) -> Result<Vec<ReleaseLine>, ClientError> {
        self.call(
            Method::GET,
            &format!("/v1/environments/{e}/releases"),
            None::<&()>,
        )
        .await
    }

    pub async fn release(
        &self,
        e: &EnvironmentName,
        number: ReleaseNumber,
    ) -> Result<Release, ClientError> {
        let path = format!("/v1/environments/{e}/releases/{number}");
        self.call(Method::GET, &path, None::<&()>).await
    }

    pub async fn roll_out(&self, request: &ReleaseRequest) -> Result<ReleaseAnswer, ClientError> {
        let path = format!("/v1/environments/{}/releases", request.release.environment);
        self.call(Method::POST, &path, Some(request)).await
    }

    pub async fn rollback(
        &self,
        e: &EnvironmentName,
        request: &RollbackRequest,
    ) -> Result<ReleaseAnswer, ClientError> {
        self.call(
            Method::POST,
            &format!("/v1/environments/{e}/rollback"),
            Some(request),
        )
        .await
    }

    pub async fn networks(&self) -> Result<Vec<NetworkLine>, ClientError> {
        self.call(Method::GET, "/v1/networks", None::<&()>).await
    }

    pub async fn create_network(&self, request: &NetworkRequest) -> Result<(), ClientError> {
        self.call(Method::POST, "/v1/networks", Some(request)).await
    }

    pub async fn remove_network(&self, name: &NetworkName, by: &str) -> Result<(), ClientError> {
        let request = DownRequest { by: by.to_owned() };
        let path = format!("/v1/networks/{name}");
        self.call(Method::DELETE, &path, Some(&request)).await
    }

    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, ClientError> {
        self.call(Method::GET, "/v1/snapshots", None::<&()>).await
    }

    /// Returns the snapshot that what was there has become.
    pub async fn restore_snapshot(
        &self,
        volume: &VolumeName,
        number: u32,
        by: &str,
    ) -> Result<Snapshot, ClientError> {
        let request = DownRequest { by: by.to_owned() };
        let path = format!("/v1/snapshots/{volume}/{number}/restore");
        self.call(Method::POST, &path, Some(&request)).await
    }

    pub async fn remove_snapshot(
        &self,
        volume: &VolumeName,
        number: u32,
        by: &str,
    ) -> Result<(), ClientError> {
        let request = DownRequest { by: by.to_owned() };
        let path = format!("/v1/snapshots/{volume}/{number}");
        self.call(Method::DELETE, &path, Some(&request)).await
    }

    /// Returns the id of the last event before it.
    pub async fn down(&self, e: &EnvironmentName, by: &str) -> Result<u64, ClientError> {
        let request = DownRequest { by: by.to_owned() };
        self.call(
            Method::POST,
            &format!("/v1/environments/{e}/down"),
            Some(&request),
        )
        .await
    }

    pub async fn abandon(&self, e: &EnvironmentName, by: &str) -> Result<(), ClientError> {
        let request = DownRequest { by: by.to_owned() };
        self.call(
            Method::POST,
            &format!("/v1/environments/{e}/abandon"),
            Some(&request),
        )
        .await
    }

    /// Only one that is down; releases, events and its own volumes go.
    pub async fn forget(&self, e: &EnvironmentName, by: &str) -> Result<(), ClientError> {
        let request = DownRequest { by: by.to_owned() };
        let path = format!("/v1/environments/{e}");
        self.call(Method::DELETE, &path, Some(&request)).await
    }

    /// `pause`, `resume` or `promote`.
    pub async fn steer(
        &self,
        e: &EnvironmentName,
        what: &str,
        by: &str,
    ) -> Result<(), ClientError> {
        let request = DownRequest { by: by.to_owned() };
        let path = format!("/v1/environments/{e}/rollout/{what}");
        self.call(Method::POST, &path, Some(&request)).await
    }

    pub async fn explain(
        &self,
        e: &EnvironmentName,
        id: &InstanceId,
    ) -> Result<Explanation, ClientError> {
        let path = format!("/v1/environments/{e}/instances/{id}");
        self.call(Method::GET, &path, None::<&()>).await
    }

    pub async fn executed(
        &self,
        e: &EnvironmentName,
        id: &InstanceId,
        notice: &ExecNotice,
    ) -> Result<(), ClientError> {
        let path = format!("/v1/environments/{e}/instances/{id}/exec");
        self.call(Method::POST, &path, Some(notice)).await
    }

    /// Hands over events as they come, until `each` says stop (returns false), the
    /// stream ends, or the daemon goes away.
    pub async fn events(
        &self,
        e: &EnvironmentName,
        after: u64,
        follow: bool,
        mut each: impl FnMut(EventRecord) -> bool,
    ) -> Result<(), ClientError> {
        let path = format!("/v1/environments/{e}/events?after={after}&follow={follow}");
        let mut body = self
            .send(Method::GET, &path, None::<&()>)
            .await?
            .into_body();
        let mut pending: Vec<u8> = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(broken)?;
            let Some(data) = frame.data_ref() else {
                continue;
            };
            pending.extend_from_slice(data);
            while let Some(end) = pending.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let event = serde_json::from_slice(&line).map_err(broken)?;
                if !each(event) {
                    return Ok(());
                }
            }
            if pending.len() > LARGEST_ANSWER {
                return Err(ClientError::Broken("an event is too large".into()));
            }
        }
        Ok(())
    }

    async fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        let response = self.send(method, path, body).await?;
        let bytes = Limited::new(response.into_body(), LARGEST_ANSWER)
            .collect()
            .await
            .map_err(|e| ClientError::Broken(e.to_string()))?
            .to_bytes();
        serde_json::from_slice(&bytes).map_err(broken)
    }

    async fn send<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream =
            UnixStream::connect(&self.socket)
                .await
                .map_err(|source| ClientError::Unreachable {
                    socket: self.socket.clone(),
                    source,
                })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        tokio::spawn(connection);
        let body = match body {
            Some(value) => serde_json::to_vec(value).map_err(broken)?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "kiln")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(broken)?;
        let response = sender.send_request(request).await.map_err(broken)?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(Self::error_of(response).await)
    }

    async fn error_of(response: Response<Incoming>) -> ClientError {
        let status: StatusCode = response.status();
        let body = Limited::new(response.into_body(), LARGEST_ANSWER)
            .collect()
            .await;
        let Ok(body) = body else {
            return ClientError::Broken(format!("it answered {status}"));
        };
        match serde_json::from_slice::<ApiErrorBody>(&body.to_bytes()) {
            Ok(body) => ClientError::Api(ApiError::from_body(body)),
            Err(_) => ClientError::Broken(format!("it answered {status}")),
        }
    }
}

fn broken(error: impl std::fmt::Display) -> ClientError {
    ClientError::Broken(error.to_string())
}

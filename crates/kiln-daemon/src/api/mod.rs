//! The daemon's API: REST and JSON over a unix socket (mode 0600: who may open it is
//! root). The OpenAPI document is generated from these handlers and served.

pub mod client;
pub mod error;
mod json;
mod networks;
mod rollout;
mod snapshots;
pub mod types;

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use self::json::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream;
use kiln_model::{EnvironmentName, InstanceId, ReleaseNumber};
use kiln_plan::World;
use serde::Deserialize;
use tokio::sync::{broadcast, mpsc};
use utoipa::OpenApi;

use self::error::ApiError;
use self::types::{
    ApiErrorBody, DaemonStatus, DownRequest, EnvironmentStatus, EventRecord, ExecNotice,
    Explanation, ReleaseAnswer, ReleaseLine, ReleaseRequest, RollbackRequest,
};
use crate::engine::{self, EngineHandle, Message};
use crate::shared::{Shared, blocking};
use crate::status;

/// A release of thousands of services stays far below this.
const LARGEST_BODY: usize = 64 << 20;
/// Events read from the database at once.
const EVENT_PAGE: u32 = 500;

#[derive(Clone)]
pub struct Api {
    shared: Arc<Shared>,
    stop: mpsc::Sender<()>,
}

#[derive(OpenApi)]
#[openapi(
    info(title = "kiln", description = "Immutable infrastructure on this host."),
    paths(
        daemon,
        shut_down,
        environment,
        releases,
        release_content,
        release,
        rollback,
        down,
        abandon,
        forget,
        rollout::pause,
        rollout::resume,
        rollout::promote,
        events,
        explain,
        executed,
        networks::networks,
        networks::create_network,
        networks::remove_network,
        snapshots::list,
        snapshots::restore,
        snapshots::remove
    ),
    components(schemas(ApiErrorBody))
)]
struct Document;

/// The OpenAPI document.
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

pub fn router(shared: Arc<Shared>, stop: mpsc::Sender<()>) -> Router {
    let environment = Router::new()
        .route("/", get(self::environment).delete(forget))
        .route("/releases", get(releases).post(release))
        .route("/releases/{number}", get(release_content))
        .route("/rollback", post(rollback))
        .route("/down", post(down))
        .route("/abandon", post(abandon))
        .merge(rollout::router())
        .route("/events", get(events))
        .route("/instances/{id}", get(explain))
        .route("/instances/{id}/exec", post(executed));
    Router::new()
        .route("/v1/daemon", get(daemon))
        .route("/v1/daemon/stop", post(shut_down))
        .route("/v1/openapi.json", get(|| async { Json(document()) }))
        .nest("/v1/environments/{environment}", environment)
        .merge(networks::router())
        .merge(snapshots::router())
        .fallback(|| async { ApiError::not_found("no such path", "see /v1/openapi.json") })
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .with_state(Api { shared, stop })
}

impl Api {
    fn engine(&self, environment: &str) -> Result<EngineHandle, ApiError> {
        self.shared.engine(environment).ok_or_else(|| {
            ApiError::not_found(
                format!("there is no environment `{environment}`"),
                "kiln up makes one; kiln status --all lists those there are",
            )
        })
    }

    fn engine_or_new(&self, name: &EnvironmentName) -> EngineHandle {
        let mut engines = self
            .shared
            .engines
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        engines
            .entry(name.clone())
            .or_insert_with(|| engine::spawn(self.shared.clone(), World::new(name.clone())))
            .clone()
    }
}

#[utoipa::path(get, path = "/v1/daemon", responses((status = 200, body = DaemonStatus)))]
async fn daemon(State(api): State<Api>) -> Json<DaemonStatus> {
    let environments = api
        .shared
        .engines
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .keys()
        .cloned()
        .collect();
    Json(DaemonStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        supervised: is_supervised(),
        root: api.shared.root.display().to_string(),
        since: api.shared.started.0,
        proxy_pid: api.shared.proxy.pid(),
        environments,
    })
}

/// systemd.exec(5): the process which systemd itself started.
fn is_supervised() -> bool {
    std::env::var("SYSTEMD_EXEC_PID").is_ok_and(|pid| pid == std::process::id().to_string())
}

#[utoipa::path(post, path = "/v1/daemon/stop", responses((status = 200)))]
async fn shut_down(State(api): State<Api>) -> Json<()> {
    // Full means that someone has asked already.
    let _ = api.stop.try_send(());
    Json(())
}

#[derive(Deserialize, utoipa::IntoParams)]
struct StatusQuery {
    /// Leave out what takes a look into each instance: pid, drift and warnings.
    #[serde(default)]
    brief: bool,
}

#[utoipa::path(get, path = "/v1/environments/{environment}",
    params(("environment" = String, Path), StatusQuery),
    responses((status = 200, body = EnvironmentStatus), (status = 404, body = ApiErrorBody)))]
async fn environment(
    State(api): State<Api>,
    Path(name): Path<String>,
    Query(query): Query<StatusQuery>,
) -> Result<Json<EnvironmentStatus>, ApiError> {
    let status = api
        .engine(&name)?
        .ask(|reply| Message::Status { reply })
        .await?;
    let status = status::with_traffic(&api.shared, status).await;
    if query.brief {
        return Ok(Json(status));
    }
    let whole = blocking(move || status::look_inside(&api.shared, status)).await;
    Ok(Json(whole.map_err(ApiError::internal)?))
}

#[utoipa::path(get, path = "/v1/environments/{environment}/releases",
    params(("environment" = String, Path)),
    responses((status = 200, body = Vec<ReleaseLine>)))]
async fn releases(
    State(api): State<Api>,
    Path(name): Path<EnvironmentName>,
) -> Result<Json<Vec<ReleaseLine>>, ApiError> {
    let serving = match api.shared.engine(name.as_str()) {
        Some(engine) => engine.ask(|reply| Message::Status { reply }).await?.serving,
        None => None,
    };
    let records = api
        .shared
        .state
        .records(&name)
        .map_err(|e| ApiError::internal(e.to_string()))?;
    Ok(Json(
        records
            .into_iter()
            .map(|r| ReleaseLine {
                number: r.number,
                digest: r.digest,
                created: r.created.0,
                by: r.by,
                reason: r.reason,
                outcome: r.outcome,
                serving: Some(r.number) == serving,
            })
            .collect(),
    ))
}

#[utoipa::path(get, path = "/v1/environments/{environment}/releases/{number}",
    params(("environment" = String, Path), ("number" = u64, Path)),
    responses((status = 200, description = "the release's content"), (status = 404, body = ApiErrorBody)))]
async fn release_content(
    State(api): State<Api>,
    Path((name, number)): Path<(EnvironmentName, u64)>,
) -> Result<Json<kiln_model::Release>, ApiError> {
    api.shared
        .state
        .release(&name, ReleaseNumber(number))
        .map_err(|e| ApiError::internal(e.to_string()))?
        .map(Json)
        .ok_or_else(|| {
            ApiError::not_found(
                format!("there is no release {number} in `{name}`"),
                "kiln releases lists what there is",
            )
        })
}

#[utoipa::path(post, path = "/v1/environments/{environment}/releases",
    params(("environment" = String, Path)), request_body = ReleaseRequest,
    responses((status = 200, body = ReleaseAnswer), (status = 409, body = ApiErrorBody),
        (status = 422, body = ApiErrorBody)))]
async fn release(
    State(api): State<Api>,
    Path(name): Path<EnvironmentName>,
    Json(request): Json<ReleaseRequest>,
) -> Result<Json<ReleaseAnswer>, ApiError> {
    if request.release.environment != name {
        return Err(ApiError::invalid(
            format!(
                "the release is for `{}`, not `{name}`",
                request.release.environment
            ),
            "send it to its own environment",
        ));
    }
    let engine = api.engine_or_new(&name);
    let answer = engine
        .ask(|reply| Message::Release {
            release: Box::new(request.release),
            by: request.by,
            dry_run: request.dry_run,
            reply,
        })
        .await?;
    Ok(Json(answer))
}

#[utoipa::path(post, path = "/v1/environments/{environment}/rollback",
    params(("environment" = String, Path)), request_body = RollbackRequest,
    responses((status = 200, body = ReleaseAnswer), (status = 404, body = ApiErrorBody)))]
async fn rollback(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(request): Json<RollbackRequest>,
) -> Result<Json<ReleaseAnswer>, ApiError> {
    let engine = api.engine(&name)?;
    let answer = engine
        .ask(|reply| Message::Rollback {
            to: request.to,
            by: request.by,
            reply,
        })
        .await?;
    Ok(Json(answer))
}

#[utoipa::path(post, path = "/v1/environments/{environment}/down",
    params(("environment" = String, Path)), request_body = DownRequest,
    responses((status = 200, description = "the id of the last event before it", body = u64)))]
async fn down(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(request): Json<DownRequest>,
) -> Result<Json<u64>, ApiError> {
    let engine = api.engine(&name)?;
    Ok(Json(
        engine
            .ask(|reply| Message::Down {
                by: request.by,
                reply,
            })
            .await?,
    ))
}

#[utoipa::path(post, path = "/v1/environments/{environment}/abandon",
    params(("environment" = String, Path)), request_body = DownRequest,
    responses((status = 200)))]
async fn abandon(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(request): Json<DownRequest>,
) -> Result<Json<()>, ApiError> {
    let engine = api.engine(&name)?;
    Ok(Json(
        engine
            .ask(|reply| Message::Abandon {
                by: request.by,
                reply,
            })
            .await?,
    ))
}

#[utoipa::path(delete, path = "/v1/environments/{environment}",
    params(("environment" = String, Path)), request_body = DownRequest,
    responses((status = 200, description = "its releases, events and own volumes are gone"),
        (status = 404, body = ApiErrorBody), (status = 409, body = ApiErrorBody)))]
async fn forget(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(request): Json<DownRequest>,
) -> Result<Json<()>, ApiError> {
    let engine = api.engine(&name)?;
    engine
        .ask(|reply| Message::Forget {
            by: request.by,
            reply,
        })
        .await?;
    Ok(Json(()))
}

#[utoipa::path(get, path = "/v1/environments/{environment}/instances/{id}",
    params(("environment" = String, Path), ("id" = String, Path)),
    responses((status = 200, body = Explanation), (status = 404, body = ApiErrorBody)))]
async fn explain(
    State(api): State<Api>,
    Path((name, id)): Path<(String, InstanceId)>,
) -> Result<Json<Explanation>, ApiError> {
    let engine = api.engine(&name)?;
    Ok(Json(
        engine.ask(|reply| Message::Explain { id, reply }).await?,
    ))
}

#[utoipa::path(post, path = "/v1/environments/{environment}/instances/{id}/exec",
    params(("environment" = String, Path), ("id" = String, Path)), request_body = ExecNotice,
    responses((status = 200, description = "recorded; the instance is tainted")))]
async fn executed(
    State(api): State<Api>,
    Path((name, id)): Path<(String, InstanceId)>,
    Json(notice): Json<ExecNotice>,
) -> Result<Json<()>, ApiError> {
    let engine = api.engine(&name)?;
    engine
        .ask(|reply| Message::Tainted {
            id,
            by: notice.by,
            command: notice.command,
            reply,
        })
        .await?;
    Ok(Json(()))
}

#[derive(Deserialize, utoipa::IntoParams)]
struct EventQuery {
    /// Only events with a greater id.
    #[serde(default)]
    after: u64,
    /// Go on with what happens from then on.
    #[serde(default)]
    follow: bool,
}

#[utoipa::path(get, path = "/v1/environments/{environment}/events",
    params(("environment" = String, Path), EventQuery),
    responses((status = 200, description = "one JSON event a line", body = EventRecord)))]
async fn events(
    State(api): State<Api>,
    Path(name): Path<EnvironmentName>,
    Query(query): Query<EventQuery>,
) -> Response {
    let reader = EventReader {
        receiver: api.shared.events.subscribe(),
        shared: api.shared,
        name,
        after: query.after,
        follow: query.follow,
    };
    let lines = stream::unfold(reader, |mut reader| async move {
        let chunk = reader.next().await?;
        Some((Ok::<_, std::convert::Infallible>(chunk), reader))
    });
    (
        [(CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response()
}

struct EventReader {
    shared: Arc<Shared>,
    receiver: broadcast::Receiver<EventRecord>,
    name: EnvironmentName,
    after: u64,
    follow: bool,
}

impl EventReader {
    /// The next lines; `None`: that was all. The database is what counts; the channel
    /// only says that there is something new.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let page = self
                .shared
                .state
                .events(&self.name, self.after, EVENT_PAGE)
                .ok()?;
            if let Some(last) = page.last() {
                self.after = last.id;
                let mut text = Vec::new();
                for event in &page {
                    serde_json::to_writer(&mut text, event).ok()?;
                    text.push(b'\n');
                }
                return Some(Bytes::from(text));
            }
            if !self.follow {
                return None;
            }
            // Something new, too much new, or a quiet minute: look again.
            let news = tokio::time::timeout(Duration::from_secs(60), self.receiver.recv()).await;
            if matches!(news, Ok(Err(broadcast::error::RecvError::Closed))) {
                return None;
            }
        }
    }
}

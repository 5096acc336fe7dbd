//! What can be said about a rollout under way. Giving it up is `abandon`; how far it is,
//! the environment's status.

use axum::Router;
use axum::extract::{Path, State};
use axum::routing::post;

use super::error::ApiError;
use super::json::Json;
use super::types::{ApiErrorBody, DownRequest};
use super::{Api, Message};

pub(super) fn router() -> Router<Api> {
    Router::new()
        .route("/rollout/pause", post(pause))
        .route("/rollout/resume", post(resume))
        .route("/rollout/promote", post(promote))
}

#[utoipa::path(post, path = "/v1/environments/{environment}/rollout/pause",
    params(("environment" = String, Path)), request_body = DownRequest,
    responses((status = 200), (status = 409, body = ApiErrorBody)))]
pub(super) async fn pause(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(request): Json<DownRequest>,
) -> Result<Json<()>, ApiError> {
    let by = request.by;
    let engine = api.engine(&name)?;
    let paused = engine.ask(|reply| Message::Pause { by, reply });
    Ok(Json(paused.await?))
}

#[utoipa::path(post, path = "/v1/environments/{environment}/rollout/resume",
    params(("environment" = String, Path)), request_body = DownRequest,
    responses((status = 200), (status = 409, body = ApiErrorBody)))]
pub(super) async fn resume(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(request): Json<DownRequest>,
) -> Result<Json<()>, ApiError> {
    let by = request.by;
    let engine = api.engine(&name)?;
    let resumed = engine.ask(|reply| Message::Resume { by, reply });
    Ok(Json(resumed.await?))
}

#[utoipa::path(post, path = "/v1/environments/{environment}/rollout/promote",
    params(("environment" = String, Path)), request_body = DownRequest,
    responses((status = 200), (status = 409, body = ApiErrorBody)))]
pub(super) async fn promote(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(request): Json<DownRequest>,
) -> Result<Json<()>, ApiError> {
    let by = request.by;
    let engine = api.engine(&name)?;
    let promoted = engine.ask(|reply| Message::Promote { by, reply });
    Ok(Json(promoted.await?))
}

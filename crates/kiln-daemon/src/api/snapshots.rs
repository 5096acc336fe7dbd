//! Snapshots of volumes: seen, put back, removed.

use axum::Router;
use axum::extract::{Path, State};
use axum::routing::{delete, get, post};
use kiln_model::VolumeName;

use super::Api;
use super::error::ApiError;
use super::json::Json;
use super::types::{ApiErrorBody, DownRequest};
use crate::shared::{Shared, blocking};
use crate::snapshots::{self, Snapshot, SnapshotError};

pub(super) fn router() -> Router<Api> {
    Router::new()
        .route("/v1/snapshots", get(list))
        .route("/v1/snapshots/{volume}/{number}/restore", post(restore))
        .route("/v1/snapshots/{volume}/{number}", delete(remove))
}

fn refused(error: SnapshotError) -> ApiError {
    let text = error.to_string();
    match error {
        SnapshotError::Unknown { .. } => {
            ApiError::not_found(text, "kiln snapshots list shows those there are")
        }
        SnapshotError::InUse { .. } => ApiError::conflict(
            text,
            "kiln down, then restore it, then kiln rollback or kiln up",
        ),
        SnapshotError::Io { .. } => ApiError::internal(text),
    }
}

#[utoipa::path(get, path = "/v1/snapshots", responses((status = 200, body = Vec<Snapshot>)))]
pub(super) async fn list(State(api): State<Api>) -> Result<Json<Vec<Snapshot>>, ApiError> {
    let all = blocking(move || snapshots::all(&api.shared.root)).await;
    let all = all.map_err(ApiError::internal)?.map_err(refused)?;
    Ok(Json(all))
}

#[utoipa::path(post, path = "/v1/snapshots/{volume}/{number}/restore",
    params(("volume" = String, Path), ("number" = u32, Path)), request_body = DownRequest,
    responses((status = 200, description = "what was there before", body = Snapshot),
        (status = 404, body = ApiErrorBody), (status = 409, body = ApiErrorBody)))]
pub(super) async fn restore(
    State(api): State<Api>,
    Path((volume, number)): Path<(VolumeName, u32)>,
    Json(request): Json<DownRequest>,
) -> Result<Json<Snapshot>, ApiError> {
    let (shared, name) = (api.shared.clone(), volume.clone());
    let put_back = blocking(move || {
        snapshots::restore(&shared.root, &shared.runtime, &name, number, Shared::now())
    });
    let before = put_back.await.map_err(ApiError::internal)?;
    let before = before.map_err(refused)?;
    let details = [
        ("snapshot", number.to_string()),
        ("before", before.number.to_string()),
    ];
    let subject = volume.as_str();
    api.shared.record(&request.by, "restore", subject, &details);
    Ok(Json(before))
}

#[utoipa::path(delete, path = "/v1/snapshots/{volume}/{number}",
    params(("volume" = String, Path), ("number" = u32, Path)), request_body = DownRequest,
    responses((status = 200), (status = 404, body = ApiErrorBody)))]
pub(super) async fn remove(
    State(api): State<Api>,
    Path((volume, number)): Path<(VolumeName, u32)>,
    Json(request): Json<DownRequest>,
) -> Result<Json<()>, ApiError> {
    let (root, name) = (api.shared.root.clone(), volume.clone());
    let removed = blocking(move || snapshots::remove(&root, &name, number)).await;
    removed.map_err(ApiError::internal)?.map_err(refused)?;
    let details = [("snapshot", number.to_string())];
    let subject = volume.as_str();
    api.shared
        .record(&request.by, "remove snapshot", subject, &details);
    Ok(Json(()))
}

//! Networks that belong to no environment, for compose's `external`.

use super::json::Json;
use axum::Router;
use axum::extract::{Path, State};
use axum::routing::{delete, get};

use super::Api;
use super::error::ApiError;
use super::types::{ApiErrorBody, DownRequest, NetworkLine, NetworkRequest};

pub(super) fn router() -> Router<Api> {
    Router::new()
        .route("/v1/networks", get(networks).post(create_network))
        .route("/v1/networks/{name}", delete(remove_network))
}

#[utoipa::path(get, path = "/v1/networks", responses((status = 200, body = Vec<NetworkLine>)))]
pub(super) async fn networks(State(api): State<Api>) -> Json<Vec<NetworkLine>> {
    let list = api.shared.networks.list().into_iter();
    let line =
        |(network, environment, used_by): (kiln_model::network::BridgeNetwork, _, _)| NetworkLine {
            name: network.name,
            subnet: network.subnet,
            internal: network.internal,
            bridge: network.bridge,
            environment,
            used_by,
        };
    Json(list.map(line).collect())
}

#[utoipa::path(post, path = "/v1/networks", request_body = NetworkRequest,
    responses((status = 200), (status = 409, body = ApiErrorBody)))]
pub(super) async fn create_network(
    State(api): State<Api>,
    Json(request): Json<NetworkRequest>,
) -> Result<Json<()>, ApiError> {
    let shared = &api.shared;
    let network = shared
        .networks
        .create(&request.name, request.subnet, request.internal)
        .map_err(|e| ApiError::conflict(e, "kiln networks list shows those there are"))?;
    if let Err(error) = shared.state.add_network(&network) {
        // What is not stored would be forgotten by a restart.
        let _ = shared.networks.remove(&network.name);
        return Err(ApiError::internal(error.to_string()));
    }
    let subnet = [("subnet", network.subnet.to_string())];
    shared.record(&request.by, "create network", &network.name, &subnet);
    Ok(Json(()))
}

#[utoipa::path(delete, path = "/v1/networks/{name}", params(("name" = String, Path)),
    request_body = DownRequest, responses((status = 200), (status = 409, body = ApiErrorBody)))]
pub(super) async fn remove_network(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(request): Json<DownRequest>,
) -> Result<Json<()>, ApiError> {
    let refuse = |cause| {
        let text = format!("the network `{name}` is not removed: {cause}");
        ApiError::conflict(
            text,
            "only those that `kiln networks create` made can be removed",
        )
    };
    api.shared.networks.remove(&name).map_err(refuse)?;
    let removed = api.shared.state.remove_network(&name);
    removed.map_err(|e| ApiError::internal(e.to_string()))?;
    api.shared.record(&request.by, "remove network", &name, &[]);
    Ok(Json(()))
}

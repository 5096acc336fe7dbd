//! Bodies in JSON. Beside axum's own: errors have this API's form, and the model's types
//! are compiled for one kind of reader only, as compiling them is much of this crate's build.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::ApiError;

pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let hint = "/v1/openapi.json says what is expected";
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(|e| ApiError::invalid(e.body_text(), hint))?;
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Self(value)),
            Err(error) => Err(ApiError::invalid(
                format!("the request's body: {error}"),
                hint,
            )),
        }
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(bytes) => {
                let json = HeaderValue::from_static("application/json");
                ([(CONTENT_TYPE, json)], bytes).into_response()
            }
            Err(error) => ApiError::internal(format!("the answer: {error}")).into_response(),
        }
    }
}

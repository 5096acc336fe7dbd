//! Errors as the API tells them: a kind that fixes the status and the CLI's exit code,
//! a message, and a way out.

use super::json::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::types::ApiErrorBody;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub kind: ErrorKind,
    pub message: String,
    pub hint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    NotFound,
    Conflict,
    Invalid,
    Internal,
}

impl ApiError {
    fn new(kind: ErrorKind, message: impl Into<String>, hint: Option<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint,
        }
    }

    pub fn not_found(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message, Some(hint.into()))
    }

    pub fn conflict(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(ErrorKind::Conflict, message, Some(hint.into()))
    }

    pub fn invalid(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message, Some(hint.into()))
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message, None)
    }

    pub fn body(&self) -> ApiErrorBody {
        let kind = match self.kind {
            ErrorKind::NotFound => "not_found",
            ErrorKind::Conflict => "conflict",
            ErrorKind::Invalid => "invalid",
            ErrorKind::Internal => "internal",
        };
        ApiErrorBody {
            kind: kind.into(),
            message: self.message.clone(),
            hint: self.hint.clone(),
        }
    }

    /// The error a client reads back from a body.
    pub fn from_body(body: ApiErrorBody) -> Self {
        let kind = match body.kind.as_str() {
            "not_found" => ErrorKind::NotFound,
            "conflict" => ErrorKind::Conflict,
            "invalid" => ErrorKind::Invalid,
            _ => ErrorKind::Internal,
        };
        Self {
            kind,
            message: body.message,
            hint: body.hint,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.kind {
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self.body())).into_response()
    }
}

//! Answers of the proxy itself: short texts which name the service.

use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER as RETRY_AFTER_HEADER};
use http::{Response, StatusCode};

use super::body::OutBody;
use crate::limits::RETRY_AFTER;
use crate::service::Service;
use crate::stats::Failure;

/// 503 where trying again will help, and nothing was sent; 502 and 504 else.
fn status(failure: Failure) -> StatusCode {
    match failure {
        Failure::NoBackend | Failure::ParkTimeout | Failure::ParkFull => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        Failure::ConnectTimeout => StatusCode::GATEWAY_TIMEOUT,
        Failure::Connect | Failure::NoAnswer | Failure::HalfAnswer | Failure::DrainCut => {
            StatusCode::BAD_GATEWAY
        }
    }
}

fn reason(failure: Failure) -> &'static str {
    match failure {
        Failure::NoBackend => "has no instance that serves",
        Failure::ParkTimeout => "is being replaced, and the new instance is not ready in time",
        Failure::ParkFull => "is being replaced, and too many requests are waiting for it",
        Failure::Connect => "refuses connections",
        Failure::ConnectTimeout => "does not accept connections in time",
        Failure::NoAnswer => "closed the connection without an answer",
        Failure::HalfAnswer => "closed the connection within its answer",
        Failure::DrainCut => "was replaced, and the request took longer than its drain limit",
    }
}

pub(super) fn refused(service: &Service, failure: Failure) -> Response<OutBody> {
    let Service {
        name, environment, ..
    } = service;
    let reason = reason(failure);
    let text = format!("kiln: service `{name}` of `{environment}` {reason}\n");
    let mut response = plain(status(failure), text);
    if status(failure) == StatusCode::SERVICE_UNAVAILABLE {
        let value = HeaderValue::from_static(RETRY_AFTER);
        response.headers_mut().insert(RETRY_AFTER_HEADER, value);
    }
    response
}

pub(super) fn plain(status: StatusCode, text: String) -> Response<OutBody> {
    let mut response = Response::new(OutBody::text(text));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

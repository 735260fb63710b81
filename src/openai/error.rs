//! A failure, in the words and with the headers that clients of the API act on.

use serde::Serialize;
use serde_json::Value;

use super::encode;
use super::request::field;
use crate::error::{ControllerError, ControllerErrorCode};

/// How long to stay away where an error asks for it without saying how long.
const DEFAULT_RETRY_AFTER_MS: u64 = 1_000;

/// An error as an HTTP answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorAnswer {
    /// The status.
    pub status: u16,
    /// `retry-after`, `retry-after-ms`, `x-should-retry`, where they apply.
    pub headers: Vec<(&'static str, String)>,
    /// `{"error": {"message", "type", "param", "code"}}`.
    pub body: Vec<u8>,
}

#[derive(Serialize)]
struct Body<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: &'a str,
}

/// The body of an error with a status and a code that no request can end with: a missing key, an unknown address.
#[must_use]
pub fn error_body(status: u16, code: &str, message: &str) -> Vec<u8> {
    body(status, code, message, None)
}

fn body(status: u16, code: &str, message: &str, param: Option<&str>) -> Vec<u8> {
    encode(&Body { error: Inner { message, kind: kind(status), param, code } })
}

// === impl ErrorAnswer ===

impl From<&ControllerError> for ErrorAnswer {
    fn from(error: &ControllerError) -> Self {
        let status = error.http_status();
        let param = match (error.code(), field(error)) {
            (ControllerErrorCode::ModelNotFound, _) | (_, Some("model_id")) => Some("model"),
            (_, other) => other,
        };
        Self { status, headers: headers(error, status), body: body(status, error.code().as_str(), error.message(), param) }
    }
}

/// The API's word for what kind of error a status is.
const fn kind(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        429 => "rate_limit_error",
        400..=498 => "invalid_request_error",
        _ => "server_error",
    }
}

fn headers(error: &ControllerError, status: u16) -> Vec<(&'static str, String)> {
    let mut headers = Vec::new();
    if let Some(millis) = retry_after_ms(error) {
        headers.push(("retry-after", millis.div_ceil(1_000).to_string()));
        headers.push(("retry-after-ms", millis.to_string()));
    }
    // Clients try these again by themselves, three times in all: what was tried on several workers, or was not to be
    // tried again, would be multiplied by it.
    if matches!(status, 408 | 409 | 429 | 500..) && !worth_another_try(error) {
        headers.push(("x-should-retry", "false".to_owned()));
    }
    headers
}

/// When to come back: said by the error or by the last attempt's; after a moment where the code means "later".
fn retry_after_ms(error: &ControllerError) -> Option<u64> {
    match error.retry_after_ms().or_else(|| error.cause().and_then(ControllerError::retry_after_ms)) {
        Some(millis) => u64::try_from(millis).ok().map(|millis| millis.max(1)),
        None => match error.code() {
            ControllerErrorCode::NoHealthyWorkers
            | ControllerErrorCode::CircuitBreakerOpen
            | ControllerErrorCode::WorkerOverloaded
            | ControllerErrorCode::QueueFull => Some(DEFAULT_RETRY_AFTER_MS),
            _ => None,
        },
    }
}

fn worth_another_try(error: &ControllerError) -> bool {
    let attempts = error.context().get("attempts").and_then(Value::as_array).map_or(0, Vec::len);
    error.code().retryable()
        && error.code() != ControllerErrorCode::AllRetriesExhausted
        && attempts <= 1
        && error.retry_after_ms().is_none_or(|millis| millis >= 0)
        && error.context().get("retryBudgetExhausted") != Some(&Value::Bool(true))
}

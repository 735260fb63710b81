//! What a server means that does not answer: its statuses and error bodies in our codes.
//!
//! Codes follow from statuses and shapes, never from words. The words are kept for the caller, and not for the log.

use std::time::{Duration, SystemTime};

use hyper::header::{HeaderMap, RETRY_AFTER};
use hyper::{StatusCode, Uri};
use serde_json::Value;

use crate::error::{ControllerError, ControllerErrorCode};

/// A server that wants to be left alone for longer than this is asked again after this.
const LONGEST_HOLD: Duration = Duration::from_secs(3_600);
/// The most bytes of a body without JSON that are read for words.
const WORDS_LONGEST: usize = 1_000;

/// The error of an answer with another status than 200. `body`: as much of it as was read.
pub(super) fn by_status(status: StatusCode, headers: &HeaderMap, body: &[u8], path: &Uri) -> ControllerError {
    let document: Option<Value> = serde_json::from_slice(body).ok();
    let said = document.as_ref().and_then(said_of);
    let code = match (status, said) {
        // A text, say: `mlx_lm.server` answers so to whatever kept it from beginning.
        (StatusCode::NOT_FOUND, Some(said)) if !is_model_missing(said) => ControllerErrorCode::ModelLoadFailed,
        _ => code(status),
    };
    let error = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            ControllerError::new(code, "the worker refuses the key that it was given: workers.static[].apiKey")
        }
        // A path that is not there and a model that is not there have the same status. Who knows the API says it in its way.
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED if said.is_none() => ControllerError::new(
            ControllerErrorCode::WorkerUnavailable,
            format!("the worker has no {}: is workers.static[].url the address of a server with the OpenAI API?", path.path()),
        ),
        status if status.is_redirection() => {
            ControllerError::new(code, "the worker sends its callers elsewhere: workers.static[].url has to be where it is")
        }
        _ => ControllerError::in_workers_words(code, words(document.as_ref(), body)),
    };
    let error = error.with("httpStatus", status.as_u16());
    match retry_after(headers, SystemTime::now()).filter(|_| code == ControllerErrorCode::WorkerOverloaded) {
        Some(after) => error.with("retryAfterMs", u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
        None => error,
    }
}

/// The same of an endpoint that servers may not have: that one has it not, or not for this model, is no failure.
pub(super) fn of_endpoint(
    endpoint: &'static str,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    path: &Uri,
) -> ControllerError {
    let error = by_status(status, headers, body, path);
    let words = || error.message().to_owned();
    let told = match status {
        StatusCode::METHOD_NOT_ALLOWED => ControllerError::no_endpoint(endpoint, None),
        StatusCode::NOT_IMPLEMENTED => ControllerError::no_endpoint(endpoint, Some(words())),
        StatusCode::NOT_FOUND => match serde_json::from_slice(body).ok().as_ref().and_then(said_of) {
            None => ControllerError::no_endpoint(endpoint, None),
            Some(said) if is_of_request(said) => {
                ControllerError::in_workers_words(ControllerErrorCode::RequestValidationFailed, words())
            }
            Some(_) => ControllerError::no_endpoint(endpoint, Some(words())),
        },
        _ => return error,
    };
    told.with("httpStatus", status.as_u16())
}

/// Whether a 404 is about something that the request names, such as a response that it was to follow.
fn is_of_request(error: &Value) -> bool {
    error.get("param").and_then(Value::as_str).is_some_and(|param| param != "model")
}

/// The error of an error object within a stream, or in place of an answer.
pub(super) fn by_object(error: &Value) -> ControllerError {
    let status = error.get("code").and_then(Value::as_u64).and_then(|code| u16::try_from(code).ok());
    let status = status.and_then(|status| StatusCode::from_u16(status).ok()).filter(|status| status.as_u16() >= 400);
    let by_status = || status.map_or(ControllerErrorCode::WorkerUnavailable, code);
    let code = by_name(error).unwrap_or_else(by_status);
    let told = ControllerError::in_workers_words(code, words(Some(error), b""));
    match status {
        Some(status) => told.with("httpStatus", status.as_u16()),
        None => told,
    }
}

/// What a document says of an error in one of the API's ways: in its `error`, or as `"object": "error"` itself.
fn said_of(document: &Value) -> Option<&Value> {
    let itself = || (document.get("object").and_then(Value::as_str) == Some("error")).then_some(document);
    document.get("error").filter(|error| !error.is_null()).or_else(itself)
}

/// Whether a 404 with this error is about the model.
fn is_model_missing(error: &Value) -> bool {
    by_name(error) == Some(ControllerErrorCode::ModelNotFound)
        || error.get("object").and_then(Value::as_str) == Some("error") && error.get("code").and_then(Value::as_u64) == Some(404)
}

/// The code of an error that says its kind in words for programs.
fn by_name(error: &Value) -> Option<ControllerErrorCode> {
    let names: Vec<String> =
        ["code", "type"].iter().filter_map(|key| Some(error.get(key)?.as_str()?.to_ascii_lowercase())).collect();
    let is_any = |wanted: &[&str]| names.iter().any(|name| wanted.contains(&name.as_str()));
    if is_any(&["model_not_found", "notfounderror", "not_found_error"]) {
        Some(ControllerErrorCode::ModelNotFound)
    } else if names.iter().any(|name| name.starts_with("rate_limit")) {
        Some(ControllerErrorCode::WorkerOverloaded)
    } else if is_any(&["invalid_request_error", "badrequesterror", "invalid_prompt"]) {
        Some(ControllerErrorCode::RequestValidationFailed)
    } else {
        None
    }
}

fn code(status: StatusCode) -> ControllerErrorCode {
    match status.as_u16() {
        400 | 422 => ControllerErrorCode::RequestValidationFailed,
        404 => ControllerErrorCode::ModelNotFound,
        413 => ControllerErrorCode::PayloadTooLarge,
        429 | 503 => ControllerErrorCode::WorkerOverloaded,
        _ => ControllerErrorCode::WorkerUnavailable,
    }
}

/// What a server says of its error: an object in the OpenAI API's shape, a text in place of it, what FastAPI writes, or a text
/// without any JSON. Nothing of a page for people.
fn words(document: Option<&Value>, body: &[u8]) -> String {
    let Some(document) = document else {
        let text = String::from_utf8_lossy(&body[..body.len().min(WORDS_LONGEST)]);
        let text = text.trim();
        return if text.starts_with('<') { String::new() } else { text.to_owned() };
    };
    let error = document.get("error").filter(|error| !error.is_null()).unwrap_or(document);
    let said = [Some(error), error.get("message"), error.get("detail"), document.get("message")];
    let text = said.into_iter().flatten().find_map(Value::as_str);
    text.map_or_else(|| error.get("detail").map(Value::to_string).unwrap_or_default(), str::to_owned)
}

/// When to come back: `retry-after-ms`, or `Retry-After` as seconds or as a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let millis = headers.get("retry-after-ms").and_then(|value| value.to_str().ok()?.trim().parse::<f64>().ok());
    let after = match millis {
        Some(millis) => Duration::try_from_secs_f64(millis / 1_000.0).ok()?,
        None => {
            let said = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
            match said.parse::<f64>() {
                Ok(seconds) => Duration::try_from_secs_f64(seconds).ok()?,
                Err(_) => httpdate::parse_http_date(said).ok()?.duration_since(now).unwrap_or_default(),
            }
        }
    };
    Some(after.min(LONGEST_HOLD))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used)]

    use super::*;

    fn refused(status: u16, headers: &[(&'static str, &str)], body: &str) -> ControllerError {
        let headers = headers
            .iter()
            .map(|(name, value)| (hyper::header::HeaderName::from_static(name), value.parse().expect("a header's value")));
        let status = StatusCode::from_u16(status).expect("a status");
        by_status(status, &headers.collect(), body.as_bytes(), &Uri::from_static("http://a:1/v1/chat/completions"))
    }

    #[test]
    fn each_status_has_its_code() {
        use ControllerErrorCode as Code;
        for (status, code) in [
            (400, Code::RequestValidationFailed),
            (422, Code::RequestValidationFailed),
            (401, Code::WorkerUnavailable),
            (403, Code::WorkerUnavailable),
            (404, Code::ModelLoadFailed),
            (413, Code::PayloadTooLarge),
            (429, Code::WorkerOverloaded),
            (503, Code::WorkerOverloaded),
            (500, Code::WorkerUnavailable),
            (502, Code::WorkerUnavailable),
            (302, Code::WorkerUnavailable),
            (418, Code::WorkerUnavailable),
        ] {
            let error = refused(status, &[], r#"{"error": {"message": "why"}}"#);
            assert_eq!((error.code(), &error.context()["httpStatus"]), (code, &Value::from(status)), "{status}");
        }
    }

    #[test]
    fn a_path_that_is_not_there_is_no_model_that_is_not_there() {
        for body in ["Not Found", r#"{"detail": "Not Found"}"#, "<html>", ""] {
            let error = refused(404, &[], body);
            assert_eq!(error.code(), ControllerErrorCode::WorkerUnavailable, "{body}");
            assert!(error.message().contains("/v1/chat/completions"), "{error}");
        }
    }

    #[test]
    fn words_are_found_in_every_usual_shape() {
        for (body, words) in [
            (r#"{"error": {"message": "why", "type": "x"}}"#, "why"),
            (r#"{"error": "why"}"#, "why"),
            (r#"{"object": "error", "message": "why", "code": 400}"#, "why"),
            (r#"{"detail": "why"}"#, "why"),
            (r#"{"detail": [{"msg": "why"}]}"#, r#"[{"msg":"why"}]"#),
            (r#""why""#, "why"),
            ("why\n", "why"),
            ("<!doctype html><h1>why", "the worker gave no reason"),
            ("", "the worker gave no reason"),
            ("{}", "the worker gave no reason"),
        ] {
            let error = refused(400, &[], body);
            assert_eq!(error.message(), words, "{body}");
            assert!(!error.message_for_log().contains("why"));
        }
    }

    #[test]
    fn it_says_when_to_come_back() {
        let after = |headers: &[(&'static str, &str)]| refused(503, headers, "").retry_after_ms();
        assert_eq!(after(&[("retry-after", "2")]), Some(2_000));
        assert_eq!(after(&[("retry-after", "2"), ("retry-after-ms", "150.5")]), Some(150));
        assert_eq!(after(&[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")]), Some(0));
        assert_eq!(after(&[("retry-after", "99999999999")]), Some(3_600_000));
        assert_eq!(after(&[("retry-after", "soon")]), None);
        assert_eq!(after(&[("retry-after", "-1")]), None);
        assert_eq!(after(&[]), None);
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        assert!(after(&[("retry-after", &date)]).is_some_and(|after| (90_000..=100_000).contains(&after)));
        assert_eq!(refused(500, &[("retry-after", "2")], "").retry_after_ms(), None);
    }

    #[test]
    fn an_error_in_a_stream_may_bring_its_status() {
        let error = by_object(&serde_json::json!({"message": "full", "code": 429}));
        assert_eq!((error.code(), error.message()), (ControllerErrorCode::WorkerOverloaded, "full"));
        let error = by_object(&serde_json::json!({"message": "odd", "code": "strange"}));
        assert_eq!((error.code(), error.message()), (ControllerErrorCode::WorkerUnavailable, "odd"));
        assert_eq!(by_object(&Value::from("odd")).message(), "odd");
    }

    #[test]
    fn an_error_in_a_stream_may_say_its_kind() {
        use ControllerErrorCode as Code;
        for (kind, wanted) in [
            (r#"{"type": "invalid_request_error"}"#, Code::RequestValidationFailed),
            (r#"{"type": "BadRequestError", "code": null}"#, Code::RequestValidationFailed),
            (r#"{"type": "invalid_request_error", "code": "model_not_found"}"#, Code::ModelNotFound),
            (r#"{"type": "rate_limit_error"}"#, Code::WorkerOverloaded),
            (r#"{"type": "requests", "code": "rate_limit_exceeded"}"#, Code::WorkerOverloaded),
            (r#"{"type": "server_error"}"#, Code::WorkerUnavailable),
            (r#"{"type": 7, "code": {}}"#, Code::WorkerUnavailable),
        ] {
            assert_eq!(by_object(&serde_json::from_str(kind).expect("JSON")).code(), wanted, "{kind}");
        }
    }

    #[test]
    fn only_who_says_so_has_no_such_model() {
        for (body, wanted) in [
            (r#"{"error": {"message": "why", "code": "model_not_found"}}"#, ControllerErrorCode::ModelNotFound),
            (r#"{"error": {"message": "why", "type": "NotFoundError", "code": 404}}"#, ControllerErrorCode::ModelNotFound),
            (r#"{"error": {"message": "why", "type": "not_found_error"}}"#, ControllerErrorCode::ModelNotFound),
            (r#"{"object": "error", "message": "why", "code": 404}"#, ControllerErrorCode::ModelNotFound),
            (r#"{"error": "why"}"#, ControllerErrorCode::ModelLoadFailed),
            (r#"{"error": {"message": "why"}}"#, ControllerErrorCode::ModelLoadFailed),
        ] {
            let error = refused(404, &[], body);
            assert_eq!((error.code(), error.message()), (wanted, "why"), "{body}");
        }
    }
}

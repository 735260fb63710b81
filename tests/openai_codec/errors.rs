//! Errors out.

use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::openai::{self, ErrorAnswer};
use serde_json::{Value, json};

#[test]
fn errors_say_what_clients_act_on() {
    let attempts = |n: usize| json!(vec![json!({}); n]);
    let new = |code| ControllerError::new(code, "why");
    let overloaded = || new(Code::WorkerOverloaded).with("retryAfterMs", 1_500);
    let retry = |millis: &str, seconds: &str| vec![("retry-after", seconds.to_owned()), ("retry-after-ms", millis.to_owned())];
    let never = || ("x-should-retry", "false".to_owned());
    let with_never = |mut headers: Vec<(&'static str, String)>| {
        headers.push(never());
        headers
    };
    for (error, status, kind, headers) in [
        (ControllerError::validation("stop", "is bad"), 400, "invalid_request_error", vec![]),
        (new(Code::ModelNotFound), 404, "invalid_request_error", vec![]),
        (new(Code::PayloadTooLarge), 413, "invalid_request_error", vec![]),
        (overloaded(), 429, "rate_limit_error", retry("1500", "2")),
        (overloaded().with("attempts", attempts(2)), 429, "rate_limit_error", with_never(retry("1500", "2"))),
        (new(Code::WorkerOverloaded).with("retryAfterMs", -1), 429, "rate_limit_error", vec![never()]),
        (new(Code::QueueFull), 429, "rate_limit_error", retry("1000", "1")),
        (new(Code::NoHealthyWorkers).with("retryAfterMs", 0), 503, "server_error", retry("1", "1")),
        (new(Code::CircuitBreakerOpen), 503, "server_error", retry("1000", "1")),
        (new(Code::NoWorkersAvailable), 503, "server_error", vec![]),
        (new(Code::WorkerUnavailable).with("attempts", attempts(1)), 503, "server_error", vec![]),
        (new(Code::WorkerUnavailable).with("retryBudgetExhausted", true), 503, "server_error", vec![never()]),
        (new(Code::AllRetriesExhausted).caused_by(overloaded()), 429, "rate_limit_error", with_never(retry("1500", "2"))),
        (new(Code::AllRetriesExhausted).caused_by(new(Code::WorkerTimeout)), 504, "server_error", vec![never()]),
        (new(Code::InternalError), 500, "server_error", vec![never()]),
    ] {
        let answer = ErrorAnswer::from(&error);
        let body: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!((answer.status, body["error"]["type"].as_str(), &answer.headers), (status, Some(kind), &headers), "{error}");
        assert_eq!(body["error"]["code"], error.code().as_str());
    }
}

#[test]
fn errors_name_the_param_by_the_apis_name() {
    let param = |error: &ControllerError| -> Value {
        let body: Value = serde_json::from_slice(&ErrorAnswer::from(error).body).unwrap();
        body["error"]["param"].clone()
    };
    assert_eq!(param(&ControllerError::new(Code::ModelNotFound, "none")), "model");
    assert_eq!(param(&ControllerError::validation("model_id", "is bad")), "model");
    assert_eq!(param(&ControllerError::validation("top_p", "is bad")), "top_p");
    assert_eq!(param(&ControllerError::new(Code::QueueFull, "full")), Value::Null);
    let body: Value = serde_json::from_slice(&openai::error_body(401, "invalid_api_key", "no")).unwrap();
    let error = json!({"message": "no", "type": "authentication_error", "param": null, "code": "invalid_api_key"});
    assert_eq!(body, json!({"error": error}));
}

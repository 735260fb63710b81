//! What is remembered and told of requests, through the public API.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::Duration;

use mlx_serving_router::config::RequestMetricsConfig;
use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::telemetry::{Gauges, LeftOut, Metrics, RequestMetadata, RequestStatus, Requests, WorkerGauges};
use mlx_serving_router::wire::{InferenceRequest, Usage, WorkerId};
use tokio::time::Instant;

fn requests(retention_ms: u64, max_entries: usize) -> Arc<Requests> {
    Requests::new(&RequestMetricsConfig { retention_ms, max_entries })
}

fn request(id: &str) -> InferenceRequest {
    InferenceRequest { request_id: id.into(), model_id: "tiny".into(), session_id: Some("s".into()), ..Default::default() }
}

fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

#[test]
fn a_retried_request_tells_its_whole_story() {
    let (requests, start) = (requests(1_000, 10), Instant::now());
    let mut record = requests.begin(&request("r"), start).unwrap();
    assert_eq!(record.snapshot().status, RequestStatus::Queued);
    assert_eq!((requests.active(), requests.queued(), requests.completed()), (1, 1, 0));

    record.attempt_started(&worker("a"), "affinity", vec![], start + ms(1));
    assert_eq!((requests.queued(), record.snapshot().status), (0, RequestStatus::Running));
    record.breaker_tripped();
    record.attempt_ended(Some(Code::WorkerTimeout), start + ms(11));
    let left_out = LeftOut { worker_id: worker("a"), reason: "tried".into() };
    record.attempt_started(&worker("b"), "strategy", vec![left_out.clone()], start + ms(20));
    record.first_token(start + ms(25));
    record.first_token(start + ms(35));
    record.tokens(3);
    record.tokens(2);
    let last = record.finish(Ok(()), start + ms(40));

    assert_eq!(last.status, RequestStatus::Succeeded);
    assert_eq!((last.retry_count, last.timeouts, last.circuit_breaker_trips, last.tokens), (1, 1, 1, 5));
    assert_eq!((last.selected_worker.clone(), last.failed_workers.clone()), (Some(worker("b")), vec![worker("a")]));
    assert_eq!((last.duration_ms, last.time_to_first_token_ms), (Some(40.0), Some(25.0)));
    assert_eq!((last.end_time, last.final_error.clone()), (Some(last.start_time + 40), None));
    let told: Vec<_> = last.attempts.iter().map(|a| (a.started_ms - last.start_time, a.duration_ms, a.code)).collect();
    assert_eq!(told, [(1, Some(10.0), Some(Code::WorkerTimeout)), (20, Some(20.0), None)]);
    assert_eq!((&*last.attempts[0].choice, &last.attempts[1].left_out), ("affinity", &vec![left_out]));
    assert_eq!(requests.get("r", start + ms(40)), Some(Arc::unwrap_or_clone(last)));
    assert_eq!((requests.active(), requests.queued(), requests.completed()), (0, 0, 1));
}

#[test]
fn a_dropped_record_ends_as_cancelled() {
    let (requests, start) = (requests(1_000, 10), Instant::now());
    let record = requests.begin(&request("r"), start).unwrap();
    record.attempt_started(&worker("a"), "strategy", vec![], start);
    drop(record);
    drop(requests.begin(&request("queued"), start).unwrap());

    let last = requests.get("r", start).unwrap();
    assert_eq!((last.status, last.final_error.clone().unwrap().code), (RequestStatus::Cancelled, Code::Cancelled));
    assert_eq!(last.attempts[0].code, Some(Code::Cancelled));
    assert!(last.failed_workers.is_empty(), "a cancellation is no failure of the worker");
    assert_eq!((requests.active(), requests.queued(), requests.completed()), (0, 0, 2));
}

#[test]
fn a_failure_before_any_attempt_keeps_its_error() {
    let (requests, start) = (requests(1_000, 10), Instant::now());
    let mut record = requests.begin(&request("r"), start).unwrap();
    let last = record.finish(Err(&ControllerError::new(Code::NoWorkersAvailable, "x".repeat(10_000))), start);
    assert_eq!((last.status, last.retry_count, &last.selected_worker), (RequestStatus::Failed, 0, &None));
    let error = last.final_error.clone().unwrap();
    assert_eq!((error.code, error.message.len()), (Code::NoWorkersAvailable, 512));
}

#[test]
fn a_limit_that_passes_between_attempts_is_counted() {
    let (requests, start) = (requests(1_000, 10), Instant::now());
    let mut record = requests.begin(&request("r"), start).unwrap();
    record.attempt_started(&worker("a"), "strategy", vec![], start);
    record.attempt_ended(Some(Code::WorkerUnavailable), start);
    let last = record.finish(Err(&ControllerError::new(Code::WorkerTimeout, "total")), start);
    assert_eq!(last.timeouts, 1);
    assert_eq!(last.attempts[0].code, Some(Code::WorkerUnavailable));
}

#[test]
fn an_active_id_is_refused_and_an_ended_one_replaced() {
    let (requests, start) = (requests(1_000, 10), Instant::now());
    let record = requests.begin(&request("r"), start).unwrap();
    assert_eq!(requests.begin(&request("r"), start).err().unwrap().code(), Code::RequestValidationFailed);
    assert!(requests.is_active("r"));
    drop(record);
    assert!(!requests.is_active("r"));
    let mut again = requests.begin(&request("r"), start).unwrap();
    assert_eq!(requests.get("r", start).unwrap().status, RequestStatus::Queued);
    assert_eq!(requests.all(start).len(), 1);
    again.finish(Ok(()), start);
    assert_eq!(requests.all(start).len(), 1);
}

#[test]
fn ended_requests_are_forgotten_after_the_retention_and_active_ones_never() {
    let (requests, start) = (requests(1_000, 10), Instant::now());
    let active = requests.begin(&request("active"), start).unwrap();
    requests.begin(&request("ended"), start).unwrap().finish(Ok(()), start);
    assert!(requests.get("ended", start + ms(1_000)).is_some());
    assert!(requests.get("ended", start + ms(1_001)).is_none());
    assert_eq!(requests.all(start + ms(1_000_000)), vec![active.snapshot()]);
}

#[test]
fn at_most_max_entries_ended_requests_stay_and_the_oldest_go_first() {
    let (requests, start) = (requests(1_000, 3), Instant::now());
    let active: Vec<_> = (0..5).map(|n| requests.begin(&request(&format!("active-{n}")), start).unwrap()).collect();
    for n in 0..100_000 {
        requests.begin(&request(&format!("r-{n}")), start).unwrap().finish(Ok(()), start);
        requests.begin(&request("always the same"), start).unwrap().finish(Ok(()), start);
    }
    let ids: Vec<_> = requests.all(start).into_iter().map(|metadata| metadata.request_id).collect();
    for most in 0..=ids.len() + 1 {
        let newest: Vec<_> = requests.newest(most, start).into_iter().map(|metadata| metadata.request_id).collect();
        assert_eq!(newest, ids[ids.len().saturating_sub(most)..]);
    }
    let expected = ["r-99998", "r-99999", "always the same", "active-0", "active-1", "active-2", "active-3", "active-4"];
    assert_eq!(ids.iter().map(|id| &**id).collect::<Vec<_>>(), expected);
    assert_eq!((requests.active(), requests.remembered(), requests.completed()), (active.len(), 3, 200_000));
}

#[test]
fn metadata_travels_as_camel_case_json() {
    let (requests, start) = (requests(1_000, 3), Instant::now());
    let mut record = requests.begin(&request("r"), start).unwrap();
    record.attempt_started(&worker("a"), "strategy", vec![], start);
    let metadata = record.finish(Err(&ControllerError::new(Code::StreamInterrupted, "broken")), start);
    let json = serde_json::to_value(&*metadata).unwrap();
    assert_eq!(json["status"], "failed");
    assert_eq!(json["finalError"], serde_json::json!({"code": "STREAM_INTERRUPTED", "message": "broken"}));
    assert_eq!(json["attempts"][0]["workerId"], "a");
    for key in ["circuitBreakerTrips", "timeToFirstTokenMs", "failedWorkers", "selectedWorker", "startTime", "endTime"] {
        assert!(json.get(key).is_some(), "{key}");
    }
    assert_eq!(serde_json::from_value::<RequestMetadata>(json).unwrap(), *metadata);
}

fn gauges(workers: &[&str]) -> Gauges {
    let one =
        |name: &&str| WorkerGauges { worker_id: worker(name), status: "online", breaker: "CLOSED", in_flight: 2, queue_depth: 0 };
    Gauges { active: 3, queued: 1, workers: workers.iter().map(one).collect(), stores: vec![("sessions", 7)] }
}

fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn the_text_has_every_number_under_one_prefix() {
    let metrics = Metrics::new();
    metrics.request_ended(Some("tiny"), None, ms(30), Some(ms(7)));
    metrics.request_ended(None, Some(Code::ModelNotFound), ms(1), None);
    metrics.tokens(Some("tiny"), &Usage { prompt_tokens: 9, completion_tokens: 12, cached_tokens: 0 });
    metrics.worker_registered(&worker("a"));
    metrics.attempt_ended(&worker("a"), Some(Code::WorkerTimeout));
    metrics.retry(Code::WorkerTimeout);
    metrics.breaker_transition("OPEN");
    metrics.late_replies(1);
    metrics.dropped_replies(1);
    metrics.events_lost(4);
    metrics.failover();
    let text = metrics.text(&gauges(&["a", "b"]));
    for (series, expected) in [
        (r#"mlx_router_requests_total{model="tiny",code="OK"}"#, 1.0),
        (r#"mlx_router_requests_total{model="unknown",code="MODEL_NOT_FOUND"}"#, 1.0),
        (r#"mlx_router_request_duration_seconds_count{model="tiny"}"#, 1.0),
        (r#"mlx_router_request_duration_seconds_sum{model="tiny"}"#, 0.03),
        (r#"mlx_router_time_to_first_token_seconds_bucket{le="0.01",model="tiny"}"#, 1.0),
        (r#"mlx_router_tokens_total{model="tiny",kind="completion"}"#, 12.0),
        (r#"mlx_router_attempts_total{worker_id="a",code="WORKER_TIMEOUT"}"#, 1.0),
        (r#"mlx_router_retries_total{code="WORKER_TIMEOUT"}"#, 1.0),
        (r#"mlx_router_breaker_transitions_total{to="OPEN"}"#, 1.0),
        (r#"mlx_router_retries_total{code="WORKER_OVERLOADED"}"#, 0.0),
        (r#"mlx_router_breaker_transitions_total{to="CLOSED"}"#, 0.0),
        ("mlx_router_late_replies_total", 1.0),
        ("mlx_router_dropped_replies_total", 1.0),
        ("mlx_router_events_lost_total", 4.0),
        ("mlx_router_failovers_total", 1.0),
        ("mlx_router_requests_active", 3.0),
        ("mlx_router_requests_queued", 1.0),
        (r#"mlx_router_workers{status="online"}"#, 2.0),
        (r#"mlx_router_workers{status="offline"}"#, 0.0),
        (r#"mlx_router_worker_in_flight{worker_id="b"}"#, 2.0),
        (r#"mlx_router_worker_breaker{worker_id="b",state="CLOSED"}"#, 1.0),
        (r#"mlx_router_store_entries{store="sessions"}"#, 7.0),
    ] {
        assert_eq!(value(&text, series), Some(expected), "{series}\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    assert!(text.lines().all(|line| line.starts_with('#') || line.starts_with("mlx_router_")), "{text}");
}

#[test]
fn a_removed_worker_leaves_no_series() {
    let metrics = Metrics::new();
    for name in ["gone", "here"] {
        metrics.worker_registered(&worker(name));
        metrics.attempt_ended(&worker(name), None);
    }
    metrics.attempt_ended(&worker("gone"), Some(Code::WorkerUnavailable));
    metrics.worker_removed(&worker("gone"));
    metrics.attempt_ended(&worker("gone"), Some(Code::WorkerOffline));
    let text = metrics.text(&gauges(&["here"]));
    assert!(!text.contains("gone"), "{text}");
    assert_eq!(value(&text, r#"mlx_router_attempts_total{worker_id="here",code="OK"}"#), Some(1.0));
}

#[test]
fn a_worker_that_comes_back_begins_anew() {
    let metrics = Metrics::new();
    metrics.worker_registered(&worker("back"));
    metrics.attempt_ended(&worker("back"), None);
    metrics.worker_removed(&worker("back"));
    metrics.attempt_ended(&worker("back"), Some(Code::WorkerOffline));
    metrics.worker_registered(&worker("back"));
    metrics.attempt_ended(&worker("back"), Some(Code::WorkerTimeout));
    let text = metrics.text(&gauges(&["back"]));
    let mut attempts: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("mlx_router_attempts_total")).collect();
    attempts.sort_unstable();
    assert_eq!(attempts, [r#"{worker_id="back",code="OK"} 0"#, r#"{worker_id="back",code="WORKER_TIMEOUT"} 1"#]);
}

#[test]
fn the_number_of_models_with_series_is_bounded_and_their_names_are_escaped() {
    let metrics = Metrics::new();
    for n in 0..1_500 {
        metrics.request_ended(Some(&format!("model \"{n}\"\n")), None, ms(1), None);
    }
    let text = metrics.text(&Gauges::default());
    assert_eq!(value(&text, r#"mlx_router_requests_total{model="unknown",code="OK"}"#), Some(500.0));
    assert_eq!(value(&text, r#"mlx_router_requests_total{model="model \"7\"\n",code="OK"}"#), Some(1.0));
}

//! Everything that a server can do wrong: each ends with its code, at its limit, and nothing is left behind.

use std::time::Duration;

use mlx_serving_router::dispatch::CallOptions;
use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::wire::InferenceRequest;
use serde_json::{Value, json};

use crate::server::{Act, Server, chunk, chunked_head, delta, event, finish, good, head, refusal, token, write};
use crate::{alone, assert_at_rest, buffered, chat, controller, limit, read, streaming};

/// How a buffered request to a server with this script ends.
async fn fails(script: &[Act]) -> ControllerError {
    let server = Server::start(script).await;
    let controller = alone(&server, json!({})).await;
    let error = buffered(&controller).await.err().unwrap();
    assert_at_rest(&controller);
    error
}

/// How a stream that has begun ends.
async fn breaks(script: &[Act], routing: Value) -> ControllerError {
    let server = Server::start(script).await;
    let controller = alone(&server, routing).await;
    let mut stream = streaming(&controller).await.unwrap();
    let error = read(&mut stream).await.err().unwrap();
    assert_at_rest(&controller);
    error
}

#[tokio::test]
async fn an_answer_that_is_cut_is_never_taken_for_one() {
    for end in [vec![], vec![write("data: {\"choices\": [{\"ind")]] {
        let script: Vec<Act> = [head(), token("x")].into_iter().chain(end).collect();
        let error = breaks(&script, json!({})).await;
        assert_eq!(error.code(), Code::StreamInterrupted, "{script:?}");
        assert_eq!(fails(&script).await.code(), Code::WorkerUnavailable, "{script:?}");
    }
    // The chunks of the body do not end.
    let error = breaks(&[chunked_head(), chunk(&delta("x"))], json!({})).await;
    assert_eq!(error.code(), Code::StreamInterrupted);
    // The connection breaks once the token has come.
    let server = Server::start(&[head(), token("x"), Act::Wait, Act::Reset]).await;
    let controller = alone(&server, json!({})).await;
    let mut stream = streaming(&controller).await.unwrap();
    server.go_on();
    assert_eq!(read(&mut stream).await.err().unwrap().code(), Code::StreamInterrupted);
}

#[tokio::test]
async fn a_kept_connection_that_turns_out_to_be_closed_is_nobodys_failure() {
    let mut script = good(&["a", "b"]);
    script.pop();
    script.push(Act::Hear);
    let server = Server::start(&script).await;
    let controller = alone(&server, json!({})).await;
    for _ in 0..3 {
        buffered(&controller).await.unwrap();
    }
    assert_eq!(server.asked().len(), 3);
}

#[tokio::test]
async fn a_connection_that_ends_after_a_while_may_have_had_the_request() {
    let server = Server::start(&good(&["a"])).await;
    let controller = alone(&server, json!({})).await;
    buffered(&controller).await.unwrap();
    server.now_does(&[Act::Pause(Duration::from_millis(1_050))]);
    assert_eq!(buffered(&controller).await.unwrap_err().code(), Code::WorkerUnavailable);
    assert_eq!(server.asked().len(), 2);
}

#[tokio::test]
async fn another_server_is_asked_when_one_breaks() {
    for broken in [
        vec![],
        vec![Act::Reset],
        vec![write("nonsense\r\n\r\n")],
        vec![head()],
        vec![head(), write("<html>busy</html>")],
        vec![head(), write("data: {\"error\": {\"message\": \"no\"}}\n\n")],
        refusal(500, "", "oops"),
        refusal(503, "", "{\"error\": \"full\"}"),
        refusal(401, "", "{}"),
        refusal(301, "location: http://127.0.0.1:1/\r\n", ""),
    ] {
        let (bad, good) = (Server::start(&broken).await, Server::start(&good(&["x"])).await);
        let workers = [("a", &bad, json!({"priority": 1})), ("b", &good, json!({}))];
        let controller = controller(&workers, json!({"requestRouting": {"retry": {"retryDelayMs": 1}}})).await;
        let answer = buffered(&controller).await.unwrap();
        assert_eq!((answer.worker_id.as_str(), answer.metadata.retry_count), ("b", 1), "{broken:?}");
        assert_eq!(bad.asked().len(), 1);
        assert_at_rest(&controller);
    }
}

#[tokio::test]
async fn where_nobody_listens_the_next_is_asked_at_once() {
    let (mut gone, good) = (Server::start(&[]).await, Server::start(&good(&["x"])).await);
    let workers = [("a", &gone, json!({"priority": 1})), ("b", &good, json!({}))];
    // A delay would be longer than the test may run.
    let routing =
        json!({"requestRouting": {"retry": {"retryDelayMs": 3_000_000, "maxDelayMs": 3_000_000}, "timeoutMs": 9_000_000}});
    let controller = controller(&workers, routing).await;
    let mut events = controller.events();
    gone.stop().await;
    let answer = buffered(&controller).await.unwrap();
    assert_eq!((answer.worker_id.as_str(), answer.metadata.retry_count), ("b", 1));
    assert_eq!(answer.metadata.attempts[0].code, Some(Code::WorkerUnavailable));
    // A look confirms it, long before the next one is due.
    crate::event(&mut events, "worker_offline").await;
    assert_eq!(controller.cluster_status().workers.offline, 1);
}

#[tokio::test]
async fn a_silent_server_passes_the_limits_and_notices_the_end() {
    for (script, limits, passed) in [
        (vec![Act::Stall], json!({"streamingTimeoutMs": 100}), "first_token"),
        (vec![write("HTTP/1.1 200 OK\r\ncontent-ty"), Act::Stall], json!({"streamingTimeoutMs": 100}), "first_token"),
        (vec![head(), Act::Stall], json!({"streamingTimeoutMs": 100}), "first_token"),
        (vec![head(), Act::Flood(b": keepalive\n\n".to_vec())], json!({"streamingTimeoutMs": 100}), "first_token"),
        (vec![head(), token("x"), Act::Stall], json!({"streamIdleTimeoutMs": 100}), "idle"),
        (vec![head(), Act::Flood(delta("x").into_bytes())], json!({"streamTotalTimeoutMs": 300}), "total"),
    ] {
        let server = Server::start(&script).await;
        let controller = alone(&server, limits).await;
        let error = match streaming(&controller).await {
            Err(error) => {
                assert_eq!(error.code(), Code::WorkerTimeout, "{passed}");
                error
            }
            Ok(mut stream) => {
                let error = read(&mut stream).await.err().unwrap();
                assert_eq!(error.code(), Code::StreamInterrupted, "{passed}");
                error
            }
        };
        assert_eq!(limit(&error), passed);
        server.was_left(1).await;
        assert_at_rest(&controller);
    }
}

#[tokio::test]
async fn a_caller_that_leaves_ends_the_work() {
    let server = Server::start(&[Act::Stall]).await;
    let controller = alone(&server, json!({})).await;
    // Before anything came.
    let waiting = tokio::spawn({
        let controller = controller.clone();
        async move { buffered(&controller).await.map(drop) }
    });
    server.was_asked(1).await;
    waiting.abort();
    server.was_left(1).await;
    // In the middle, be there more to come or not.
    for (left, act) in [(2, Act::Stall), (3, Act::Flood(delta("x").into_bytes()))] {
        server.now_does(&[head(), token("x"), act]);
        drop(streaming(&controller).await.unwrap());
        server.was_left(left).await;
    }
    assert_at_rest(&controller);
    assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
}

#[tokio::test]
async fn a_controller_that_stops_ends_the_work() {
    let server = Server::start(&[head(), token("x"), Act::Stall]).await;
    let controller = alone(&server, json!({})).await;
    let mut stream = streaming(&controller).await.unwrap();
    controller.stop(std::time::Duration::ZERO).await;
    assert!(read(&mut stream).await.is_err());
    server.was_left(1).await;
}

#[tokio::test]
async fn what_has_no_bound_is_given_up() {
    for script in [
        vec![write("HTTP/1.1 200 OK\r\n"), Act::Flood(b"x-more: more\r\n".to_vec())],
        vec![write("HTTP/1.1 200 OK\r\nx-long: "), Act::Flood(vec![b'x'; 4096])],
        vec![head(), write("data: "), Act::Flood(vec![b'x'; 65_536])],
        vec![head(), Act::Flood([b"data: ", vec![b'x'; 4096].as_slice(), b"\n"].concat())],
        vec![head(), Act::Flood(b"data: nonsense\n\n".to_vec())],
        vec![head(), write("{\"choices\": ["), Act::Flood(vec![b' '; 65_536])],
    ] {
        let server = Server::start(&script).await;
        let controller = alone(&server, json!({})).await;
        let error = buffered(&controller).await.err().unwrap();
        assert_eq!(error.code(), Code::WorkerUnavailable);
        server.was_left(1).await;
        assert_at_rest(&controller);
    }
}

#[tokio::test]
async fn an_answer_that_grows_without_end_is_given_up() {
    let flood = [head(), Act::Flood(delta(&"x".repeat(60_000)).into())];
    let error = fails(&flood).await;
    assert_eq!((error.code(), error.context().contains_key("protocolError")), (Code::WorkerUnavailable, true));
    // Whoever does not read is not sent more than that, either.
    let server = Server::start(&flood).await;
    let controller = alone(&server, json!({})).await;
    let mut stream = streaming(&controller).await.unwrap();
    server.was_left(1).await;
    let error = read(&mut stream).await.err().unwrap();
    assert_eq!((error.code(), error.context().contains_key("protocolError")), (Code::StreamInterrupted, true));
    assert_at_rest(&controller);
}

#[tokio::test]
async fn the_words_of_a_refusal_are_bounded() {
    let endless = [write("HTTP/1.1 400 No\r\nconnection: close\r\n\r\n"), Act::Flood(vec![b'x'; 65_536])];
    let error = fails(&endless).await;
    assert_eq!((error.code(), error.message().len()), (Code::RequestValidationFailed, 1_000));
    let huge = refusal(400, "", &json!({"error": {"message": "y".repeat(20_000)}}).to_string());
    assert_eq!(fails(&huge).await.message(), "y".repeat(1_000));
}

#[tokio::test]
async fn statuses_have_their_codes_and_words() {
    for (status, body, code, words) in [
        (400, r#"{"error": "max_tokens must be at least 1"}"#, Code::RequestValidationFailed, "max_tokens must be at least 1"),
        (422, r#"{"detail": "bad"}"#, Code::RequestValidationFailed, "bad"),
        (404, r#"{"error": {"message": "no such model", "code": "model_not_found"}}"#, Code::ModelNotFound, "no such model"),
        (404, r#"{"error": "failed to load"}"#, Code::ModelLoadFailed, "failed to load"),
        (413, "too much", Code::PayloadTooLarge, "too much"),
        (429, r#"{"error": {"message": "slow down"}}"#, Code::WorkerOverloaded, "slow down"),
        (503, "", Code::WorkerOverloaded, "the worker gave no reason"),
        (500, "<html>oops</html>", Code::WorkerUnavailable, "the worker gave no reason"),
        (401, "{}", Code::WorkerUnavailable, "the worker refuses the key that it was given: workers.static[].apiKey"),
    ] {
        let error = fails(&refusal(status, "", body)).await;
        assert_eq!((error.code(), error.message()), (code, words), "{status}");
        assert_eq!(error.context()["httpStatus"], status);
    }
}

#[tokio::test]
async fn a_request_that_a_server_finds_wrong_is_not_its_failure() {
    let server = Server::start(&refusal(400, "", r#"{"error": "bad"}"#)).await;
    let controller = alone(&server, json!({})).await;
    for _ in 0..10 {
        assert!(buffered(&controller).await.is_err());
    }
    assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
}

#[tokio::test]
async fn a_server_that_wants_to_be_left_alone_is() {
    let (full, good) = (Server::start(&refusal(503, "retry-after: 100\r\n", "")).await, Server::start(&good(&["x"])).await);
    let workers = [("a", &full, json!({"priority": 1})), ("b", &good, json!({}))];
    let controller = controller(&workers, json!({"requestRouting": {"retry": {"retryDelayMs": 1}}})).await;
    for _ in 0..3 {
        assert_eq!(buffered(&controller).await.unwrap().worker_id.as_str(), "b");
    }
    assert_eq!(full.asked().len(), 1);
}

#[tokio::test]
async fn an_error_within_a_stream_ends_it() {
    let error = event(&json!({"error": {"message": "out of memory", "code": 500}}));
    let told = breaks(&[head(), token("x"), write(&error), write(&finish())], json!({})).await;
    assert_eq!(told.code(), Code::StreamInterrupted);
    assert_eq!(told.cause().unwrap().message(), "out of memory");
}

#[tokio::test]
async fn the_breaker_of_a_server_opens_and_is_the_operators_to_close() {
    let server = Server::start(&[]).await;
    let controller = alone(&server, json!({"circuitBreaker": {"failureThreshold": 2}})).await;
    for _ in 0..2 {
        assert_eq!(buffered(&controller).await.err().unwrap().code(), Code::WorkerUnavailable);
    }
    assert_eq!(buffered(&controller).await.err().unwrap().code(), Code::NoHealthyWorkers);
    server.now_does(&good(&["x"]));
    assert!(controller.reset_breaker("a"));
    assert_eq!(buffered(&controller).await.unwrap().text, "x");
    assert!(controller.force_open_breaker("a"));
    assert_eq!(buffered(&controller).await.err().unwrap().code(), Code::NoHealthyWorkers);
}

#[tokio::test]
async fn a_server_that_is_drained_gets_nothing_new() {
    let (one, other) = (Server::start(&good(&["x"])).await, Server::start(&good(&["y"])).await);
    let workers = [("a", &one, json!({"priority": 1})), ("b", &other, json!({}))];
    let controller = controller(&workers, json!({})).await;
    assert!(controller.drain_worker("a"));
    assert_eq!(buffered(&controller).await.unwrap().text, "y");
    assert!(one.asked().is_empty());
}

#[tokio::test]
async fn a_full_server_leaves_its_requests_to_those_of_lower_priority() {
    let (first, second) = (Server::start(&[head(), token("x"), Act::Stall]).await, Server::start(&good(&["y"])).await);
    let workers = [("z", &first, json!({"priority": 9, "maxConcurrent": 1})), ("a", &second, json!({"priority": 1}))];
    let controller = controller(&workers, json!({})).await;
    let held = streaming(&controller).await.unwrap();
    assert_eq!(held.worker_id().as_str(), "z");
    let request = || InferenceRequest { request_id: String::new(), ..chat() };
    let options = CallOptions::default;
    assert_eq!(controller.buffered(request(), options()).await.unwrap().worker_id.as_str(), "a");
    drop(held);
    assert_eq!(controller.streaming(request(), options()).await.unwrap().worker_id().as_str(), "z");
}

//! Endpoints that the fleet has no words for: sent as they came, answered as the server answers.

use mlx_serving_router::dispatch::{CallOptions, Controller, TokenStream};
use mlx_serving_router::error::{ControllerError, ControllerErrorCode};
use mlx_serving_router::openai::RelayedCall;
use mlx_serving_router::wire::{Capacity, InferenceRequest, PROTOCOL, Registration, RelayedTo, Skills, WorkerId, WorkerStatus};
use serde_json::{Value, json};

use super::server::{Act, Server, chunk, chunked_head, good, head, refusal, write};
use super::{alone, assert_at_rest, chat, controller, read, started};

const QUESTION: &str = r#"{ "input": ["a", "b"], "model": "m", "encoding_format": "base64", "of our own": 1.50 }"#;
const VECTORS: &str = r#"{"object": "list", "data": [{"index": 0, "embedding": "AAA="}], "model": "own", "usage": {"prompt_tokens": 5, "total_tokens": 5}}"#;

fn asking(to: RelayedTo, body: &str) -> InferenceRequest {
    let call = RelayedCall::parse(to, body.as_bytes(), "r", None).unwrap();
    InferenceRequest { request_id: String::new(), ..(*call.request).clone() }
}

async fn embed(controller: &Controller) -> Result<mlx_serving_router::dispatch::Answer, ControllerError> {
    controller.buffered(asking(RelayedTo::Embeddings, QUESTION), CallOptions::default()).await
}

async fn respond(controller: &Controller) -> Result<TokenStream, ControllerError> {
    let body = r#"{"model": "m", "input": "Hello", "stream": true}"#;
    controller.streaming(asking(RelayedTo::Responses, body), CallOptions::default()).await
}

fn whole(body: &str) -> Vec<Act> {
    vec![write(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())), Act::Keep]
}

fn event(kind: &str, more: &Value) -> String {
    let mut data = json!({"type": kind});
    data.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    format!("event: {kind}\ndata: {data}\n\n")
}

fn delta(text: &str) -> String {
    event("response.output_text.delta", &json!({"delta": text}))
}

fn completed() -> String {
    event("response.completed", &json!({"response": {"usage": {"input_tokens": 4, "output_tokens": 2}}}))
}

fn local(models: &[&str]) -> Registration {
    Registration {
        protocol: Some(PROTOCOL),
        worker_id: WorkerId::new("local").unwrap(),
        incarnation: "1".into(),
        hostname: "h".into(),
        ip: "127.0.0.1".into(),
        port: 0,
        skills: Skills { available_models: models.iter().map(ToString::to_string).collect(), ..Skills::default() },
        capacity: Capacity { max_concurrent: 8, max_queue: 0, memory_gb: 1.0 },
        features: Vec::new(),
        status: WorkerStatus::Online,
        timestamp: 0,
    }
}

#[tokio::test]
async fn a_body_goes_out_and_an_answer_comes_back_as_they_are() {
    let server = Server::start(&whole(VECTORS)).await;
    let controller = controller(&[("a", &server, json!({"models": ["m=own \"name\""], "apiKey": "k"}))], json!({})).await;
    let answer = embed(&controller).await.unwrap();
    assert_eq!(answer.text, VECTORS);
    assert_eq!((answer.usage.prompt_tokens, answer.usage.completion_tokens), (5, 0));
    let asked = &server.asked()[0];
    assert_eq!(asked.path, "/v1/embeddings");
    assert!(asked.head.contains("accept: application/json") && asked.head.contains("authorization: bearer k"), "{}", asked.head);
    let mut wanted: Value = serde_json::from_str(QUESTION).unwrap();
    wanted["model"] = "own \"name\"".into();
    assert_eq!(asked.body, wanted);
    assert_at_rest(&controller);
}

#[tokio::test]
async fn a_server_without_the_endpoint_is_passed_over() {
    for lacking in
        [refusal(404, "", "Not Found"), refusal(405, "", ""), refusal(501, "", r#"{"error": {"message": "start it so"}}"#)]
    {
        let (without, with) = (Server::start(&lacking).await, Server::start(&whole(VECTORS)).await);
        let workers = [("a", &without, json!({"priority": 100})), ("b", &with, json!({"priority": 1}))];
        let controller = controller(&workers, json!({"requestRouting": {"circuitBreaker": {"failureThreshold": 1}}})).await;
        for _ in 0..2 {
            let answer = embed(&controller).await.unwrap();
            let metadata = &answer.metadata;
            assert_eq!((answer.worker_id.as_str(), metadata.retry_count, metadata.failed_workers.len()), ("b", 0, 0));
            let left_out = &metadata.attempts[0].left_out;
            assert_eq!((left_out[0].worker_id.as_str(), &*left_out[0].reason), ("a", "unable"));
        }
        assert_eq!(without.asked().len(), 1);
        let a = controller.worker("a").unwrap();
        assert_eq!(a.breaker.as_str(), "CLOSED");
        assert_at_rest(&controller);
    }
}

#[tokio::test]
async fn where_nobody_has_the_endpoint_it_is_not_there() {
    let server = Server::start(&refusal(404, "", "Not Found")).await;
    let controller = alone(&server, json!({"retry": {"maxRetries": 2}})).await;
    for asked in [1, 1] {
        let error = embed(&controller).await.unwrap_err();
        assert_eq!((error.code(), error.http_status()), (ControllerErrorCode::ModelNotFound, 404));
        assert_eq!(error.context()["endpoint"], "/v1/embeddings");
        assert_eq!(server.asked().len(), asked);
    }
    let named = CallOptions { worker_id: Some("a".into()), ..CallOptions::default() };
    let error = controller.buffered(asking(RelayedTo::Embeddings, QUESTION), named).await.unwrap_err();
    assert_eq!(error.code(), ControllerErrorCode::ModelNotFound);
    assert!(error.message().contains("worker a"), "{error}");
    // What it has not is one endpoint.
    server.now_does(&whole(r#"{"object": "response"}"#));
    let body = r#"{"model": "m", "input": "Hello"}"#;
    controller.buffered(asking(RelayedTo::Responses, body), CallOptions::default()).await.unwrap();
    assert_at_rest(&controller);
}

#[tokio::test]
async fn workers_that_have_no_words_for_it_are_never_asked() {
    let server = Server::start(&whole(VECTORS)).await;
    let controller = controller(&[("a", &server, json!({"models": ["other"]}))], json!({})).await;
    let _port = controller.attach_local(&local(&["m"])).unwrap();
    let error = embed(&controller).await.unwrap_err();
    assert_eq!((error.code(), &error.context()["endpoint"]), (ControllerErrorCode::ModelNotFound, &json!("/v1/embeddings")));
    let error =
        controller.buffered(asking(RelayedTo::Embeddings, r#"{"model": "nobody's"}"#), CallOptions::default()).await.unwrap_err();
    assert!(error.message().contains("no online worker serves this model"), "{error}");
    assert!(server.asked().is_empty());
}

#[tokio::test]
async fn the_words_of_a_missing_model_reach_the_caller() {
    let words = r#"{"error": {"message": "no such model here", "type": "NotFoundError", "code": 404}}"#;
    let server = Server::start(&refusal(404, "", words)).await;
    let controller = alone(&server, json!({})).await;
    let error = embed(&controller).await.unwrap_err();
    assert_eq!(error.code(), ControllerErrorCode::ModelNotFound);
    assert_eq!(error.cause().unwrap().message(), "no such model here");
    assert!(!error.message_for_log().contains("such"));
}

#[tokio::test]
async fn what_a_server_has_not_for_one_model_it_may_have_for_another() {
    let lacking = refusal(501, "", r#"{"error": {"message": "This server does not support embeddings."}}"#);
    let server = Server::start(&lacking).await;
    let controller = controller(&[("a", &server, json!({"models": ["m", "n"]}))], json!({})).await;
    embed(&controller).await.unwrap_err();
    server.now_does(&whole(VECTORS));
    let other = || asking(RelayedTo::Embeddings, r#"{"model": "n", "input": "a"}"#);
    controller.buffered(other(), CallOptions::default()).await.unwrap();
    assert_eq!(embed(&controller).await.unwrap_err().code(), ControllerErrorCode::ModelNotFound);
    assert_eq!(server.asked().len(), 2);
}

#[tokio::test]
async fn what_a_request_names_and_is_not_there_is_its_own_mistake() {
    let said = "Response with id 'x' not found.";
    let error = json!({"message": said, "type": "invalid_request_error", "param": "response_id", "code": 404});
    let mut flat = error.clone();
    flat["object"] = "error".into();
    for words in [json!({"error": error}), flat] {
        let (one, other) = (Server::start(&refusal(404, "", &words.to_string())).await, Server::start(&whole(VECTORS)).await);
        let workers = [("a", &one, json!({"priority": 100})), ("b", &other, json!({"priority": 1}))];
        let controller = controller(&workers, json!({})).await;
        let error = embed(&controller).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (ControllerErrorCode::RequestValidationFailed, said));
        assert!(other.asked().is_empty());
        one.now_does(&whole(VECTORS));
        assert_eq!(embed(&controller).await.unwrap().worker_id.as_str(), "a");
        // Words that nobody knows, of a server that has answered there, are about something else.
        one.now_does(&refusal(404, "", r#"{"error": {"message": "it is gone", "type": "gone"}}"#));
        assert_eq!(embed(&controller).await.unwrap().worker_id.as_str(), "b");
        one.now_does(&whole(VECTORS));
        assert_eq!(embed(&controller).await.unwrap().worker_id.as_str(), "a");
    }
}

#[tokio::test]
async fn that_servers_lack_it_is_no_failed_attempt() {
    let lacking = refusal(404, "", "Not Found");
    let servers = [Server::start(&lacking).await, Server::start(&lacking).await, Server::start(&lacking).await];
    let good = Server::start(&whole(VECTORS)).await;
    let mut workers: Vec<_> =
        ["a", "b", "c"].into_iter().zip(&servers).map(|(id, server)| (id, server, json!({"priority": 50}))).collect();
    workers.push(("d", &good, json!({"priority": 1})));
    for retry in [json!({"enabled": false}), json!({"maxRetries": 1}), json!({"budgetPercent": 0, "budgetMinPerSecond": 0})] {
        let controller = controller(&workers, json!({"requestRouting": {"retry": retry}})).await;
        let answer = embed(&controller).await.unwrap();
        assert_eq!((answer.worker_id.as_str(), answer.metadata.attempts.len()), ("d", 1));
        assert_eq!(answer.metadata.attempts[0].left_out.len(), 3);
        assert_at_rest(&controller);
    }
    // What the others met is what the caller is told.
    good.now_does(&refusal(500, "", ""));
    let controller = controller(&workers, json!({"requestRouting": {"circuitBreaker": {"failureThreshold": 1}}})).await;
    let error = embed(&controller).await.unwrap_err();
    assert_eq!(error.code(), ControllerErrorCode::NoWorkersAvailable);
    assert_eq!(error.cause().unwrap().code(), ControllerErrorCode::WorkerUnavailable);
    assert_eq!(embed(&controller).await.unwrap_err().code(), ControllerErrorCode::NoHealthyWorkers);
}

#[tokio::test]
async fn another_models_vectors_are_no_stand_in() {
    let server = Server::start(&refusal(404, "", "Not Found")).await;
    let more = json!({"requestRouting": {"fallbackModels": {"m": ["n"]}, "retry": {"revisitFailedWorkers": true}}});
    let controller = controller(&[("a", &server, json!({"models": ["m", "n"]}))], more).await;
    for _ in 0..2 {
        let error = embed(&controller).await.unwrap_err();
        assert_eq!((error.code(), &error.context()["endpoint"]), (ControllerErrorCode::ModelNotFound, &json!("/v1/embeddings")));
    }
    assert_eq!(server.asked().len(), 1);
}

#[tokio::test]
async fn a_session_stays_where_its_conversation_is() {
    let lacking = refusal(404, "", "Not Found");
    let (one, other) = (Server::start(&good(&["x"])).await, Server::start(&good(&["x"])).await);
    let controller = controller(&[("a", &one, json!({})), ("b", &other, json!({}))], json!({})).await;
    let talk = || async {
        let request = InferenceRequest { request_id: String::new(), session_id: Some("s".into()), ..chat() };
        controller.buffered(request, CallOptions::default()).await.unwrap().worker_id.to_string()
    };
    let home = talk().await;
    let (at_home, away) = if home == "a" { (&one, &other) } else { (&other, &one) };
    at_home.now_does(&lacking);
    away.now_does(&whole(r#"{"object": "response"}"#));
    let body = r#"{"model": "m", "input": "Hello", "session_id": "s"}"#;
    let answer = controller.buffered(asking(RelayedTo::Responses, body), CallOptions::default()).await.unwrap();
    assert_ne!(answer.worker_id.as_str(), home);
    one.now_does(&good(&["x"]));
    other.now_does(&good(&["x"]));
    assert_eq!(talk().await, home);
}

#[tokio::test]
async fn a_session_of_responses_stays_with_the_server_that_keeps_them() {
    let lacking = refusal(404, "", "Not Found");
    let response = whole(r#"{"object": "response"}"#);
    let (one, other) = (Server::start(&lacking).await, Server::start(&response).await);
    let mut third = Server::start(&response).await;
    let address = third.address;
    third.stop().await;
    let url = format!("http://{address}");
    let workers = [("a", &one, json!({})), ("b", &other, json!({})), ("c", &other, json!({"url": url}))];
    let controller = started(&workers, json!({"discovery": {"heartbeatIntervalMs": 100}})).await;
    controller.wait_for_workers(2).await.unwrap();
    let ask = |session: usize| {
        let body = format!(r#"{{"model": "m", "input": "Hello", "session_id": "{session}"}}"#);
        controller.buffered(asking(RelayedTo::Responses, &body), CallOptions::default())
    };
    for session in 0..20 {
        assert_eq!(ask(session).await.unwrap().worker_id.as_str(), "b");
    }
    // Another one comes, which would have some of these sessions if they were new.
    let _third = Server::start_at(address, &response).await;
    controller.wait_for_workers(3).await.unwrap();
    for session in 0..20 {
        assert_eq!(ask(session).await.unwrap().worker_id.as_str(), "b");
    }
    let mut fresh = Vec::new();
    for session in 100..120 {
        fresh.push(ask(session).await.unwrap().worker_id.to_string());
    }
    assert!(fresh.contains(&"c".to_owned()));
}

#[tokio::test]
async fn who_waits_for_a_server_keeps_nobody_from_another_worker() {
    let server = Server::start(&[Act::Stall]).await;
    let controller = controller(&[("a", &server, json!({}))], json!({})).await;
    let mut port = controller.attach_local(&local(&["m"])).unwrap();
    // The server wants to be left alone for a while: what is for it alone has to wait.
    server.now_does(&refusal(429, "retry-after: 60\r\n", ""));
    embed(&controller).await.unwrap_err();
    let waiting = tokio::spawn({
        let controller = controller.clone();
        async move { embed(&controller).await.map(drop) }
    });
    while controller.cluster_status().requests.queued == 0 {
        tokio::task::yield_now().await;
    }
    let chatting = tokio::spawn({
        let controller = controller.clone();
        async move { controller.buffered(InferenceRequest { request_id: String::new(), ..chat() }, CallOptions::default()).await }
    });
    let asked = port.recv().await.unwrap();
    drop(asked);
    assert_eq!(controller.cluster_status().requests.queued, 1);
    chatting.abort();
    waiting.abort();
}

#[tokio::test]
async fn what_is_no_answer_is_never_taken_for_one() {
    let short = vec![write(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{{\"object\"", VECTORS.len()))];
    let scripts = [
        short,
        whole(&VECTORS[..VECTORS.len() - 1]),
        whole("[]"),
        whole("\"text\""),
        whole(r#"{"error": {"message": "no"}}"#),
        whole(r#"{"object": "response", "status": "failed", "error": {"code": "server_error", "message": "no"}}"#),
        vec![write("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{\"object\": \"list\"")],
    ];
    for script in scripts {
        let (bad, good) = (Server::start(&script).await, Server::start(&whole(VECTORS)).await);
        let workers = [("a", &bad, json!({"priority": 100})), ("b", &good, json!({"priority": 1}))];
        let controller = controller(&workers, json!({})).await;
        let answer = embed(&controller).await.unwrap();
        assert_eq!((answer.worker_id.as_str(), &*answer.text), ("b", VECTORS), "{script:?}");
        let code = answer.metadata.attempts[0].code;
        assert_eq!(code, Some(ControllerErrorCode::WorkerUnavailable), "{script:?}");
        assert_at_rest(&controller);
    }
}

#[tokio::test]
async fn a_200_that_says_there_is_no_such_endpoint_blames_nobody() {
    let script = whole(r#"{"error": "Unexpected endpoint or method. (POST /v1/responses)"}"#);
    let server = Server::start(&script).await;
    let controller = alone(&server, json!({"circuitBreaker": {"failureThreshold": 1}})).await;
    for asked in [1, 1] {
        assert_eq!(respond(&controller).await.map(drop).unwrap_err().code(), ControllerErrorCode::ModelNotFound);
        assert_eq!(server.asked().len(), asked);
    }
    assert_eq!(embed(&controller).await.unwrap_err().code(), ControllerErrorCode::ModelNotFound);
    assert_eq!(controller.worker("a").unwrap().breaker.as_str(), "CLOSED");
}

#[tokio::test]
async fn an_answer_without_end_is_given_up_and_blames_nobody() {
    let head = write("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{\"data\": \"");
    let (endless, other) = (Server::start(&[head, Act::Flood(vec![b'a'; 1 << 20])]).await, Server::start(&whole(VECTORS)).await);
    let workers = [("a", &endless, json!({"priority": 100})), ("b", &other, json!({"priority": 1}))];
    let controller = controller(&workers, json!({"requestRouting": {"circuitBreaker": {"failureThreshold": 1}}})).await;
    let error = embed(&controller).await.unwrap_err();
    assert_eq!((error.code(), error.http_status()), (ControllerErrorCode::PayloadTooLarge, 413));
    assert!(other.asked().is_empty());
    assert_eq!(controller.worker("a").unwrap().breaker.as_str(), "CLOSED");
}

#[tokio::test]
async fn events_are_handed_on_whole() {
    // The last one repeats all that went before.
    let last = event(
        "response.completed",
        &json!({"response": {"output": "x".repeat(2 << 20), "usage": {"input_tokens": 4, "output_tokens": 2}}}),
    );
    let events = [
        event("response.created", &json!({})),
        event("response.in_progress", &json!({})),
        delta("Hä"),
        ": comment\n\n".into(),
        last,
    ];
    let all = events.concat();
    // Cut everywhere, within characters too.
    let (begin, end) = all.as_bytes().split_at(400);
    let pieces = begin.chunks(7).chain([end]).map(|piece| Act::Write(piece.to_vec()));
    let script: Vec<Act> = [head()].into_iter().chain(pieces).collect();
    let server = Server::start(&script).await;
    let controller = alone(&server, json!({})).await;
    let mut stream = respond(&controller).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), all.replace(": comment\n\n", ""));
    let usage = stream.response().unwrap().usage;
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (4, 2));
    assert_eq!(server.asked()[0].body["stream"], true);
    assert_at_rest(&controller);
    // The last one may end with the body.
    let last = completed();
    server.now_does(&[head(), write(last.trim_end())]);
    assert_eq!(read(&mut respond(&controller).await.unwrap()).await.unwrap(), last);
}

#[tokio::test]
async fn a_response_in_one_piece_is_a_stream_of_one_event() {
    for status in ["completed", "incomplete"] {
        let response = json!({"object": "response", "status": status, "usage": {"input_tokens": 4, "output_tokens": 2}});
        let server = Server::start(&whole(&format!("{response:#}"))).await;
        let controller = alone(&server, json!({})).await;
        let mut stream = respond(&controller).await.unwrap();
        let text = read(&mut stream).await.unwrap();
        let kind = format!("response.{status}");
        let data = text.strip_prefix(&format!("event: {kind}\ndata: ")).unwrap().strip_suffix("\n\n").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!((&data["type"], &data["response"]), (&json!(kind), &response));
        assert_eq!(stream.response().unwrap().usage.prompt_tokens, 4);
    }
}

#[tokio::test]
async fn until_an_answer_has_begun_another_server_may_give_it() {
    let created = event("response.created", &json!({})) + &event("response.in_progress", &json!({}));
    let failed = event("response.failed", &json!({"response": {"error": {"code": "server_error", "message": "no"}}}));
    let page = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n<html>";
    let scripts = [
        vec![chunked_head(), chunk(&created), Act::Reset],
        vec![head(), write(&created)],
        vec![chunked_head(), chunk(&created), chunk(&failed), chunk(""), Act::Keep],
        vec![write(page)],
    ];
    for script in scripts {
        let good = vec![chunked_head(), chunk(&(created.clone() + &delta("H"))), chunk(&completed()), chunk(""), Act::Keep];
        let (bad, good) = (Server::start(&script).await, Server::start(&good).await);
        let workers = [("a", &bad, json!({"priority": 100})), ("b", &good, json!({"priority": 1}))];
        let controller = controller(&workers, json!({})).await;
        let mut stream = respond(&controller).await.unwrap();
        assert_eq!(stream.worker_id().as_str(), "b", "{script:?}");
        assert_eq!(read(&mut stream).await.unwrap(), created.clone() + &delta("H") + &completed());
        assert_at_rest(&controller);
    }
}

#[tokio::test]
async fn a_stream_of_events_that_breaks_is_never_taken_for_an_answer() {
    let begin = event("response.created", &json!({})) + &delta("H");
    let error = "event: error\ndata: {\"type\": \"error\", \"code\": \"server_error\", \"message\": \"no\"}\n\n";
    let scripts = [
        vec![head(), write(&begin)],
        vec![chunked_head(), chunk(&begin), chunk("")],
        vec![chunked_head(), chunk(&begin), Act::Reset],
        vec![chunked_head(), chunk(&begin), chunk("data: no JSON\n\n"), chunk(&completed()), chunk(""), Act::Keep],
        vec![chunked_head(), chunk(&begin), chunk(error), chunk(""), Act::Keep],
    ];
    for script in scripts {
        let server = Server::start(&script).await;
        let controller = alone(&server, json!({})).await;
        let mut stream = respond(&controller).await.unwrap();
        let error = read(&mut stream).await.unwrap_err();
        assert_eq!(error.code(), ControllerErrorCode::StreamInterrupted, "{script:?}");
        assert_at_rest(&controller);
    }
    // One that failed says so itself.
    let failed = event("response.failed", &json!({"response": {"error": {"message": "no"}}}));
    let server = Server::start(&[chunked_head(), chunk(&begin), chunk(&failed), chunk(""), Act::Keep]).await;
    let controller = alone(&server, json!({})).await;
    assert_eq!(read(&mut respond(&controller).await.unwrap()).await.unwrap(), begin + &failed);
}

#[tokio::test]
async fn a_caller_that_leaves_ends_the_work() {
    let server = Server::start(&[chunked_head(), chunk(&delta("H")), Act::Stall]).await;
    let controller = alone(&server, json!({})).await;
    drop(respond(&controller).await.unwrap());
    server.was_left(1).await;
    server.now_does(&[Act::Stall]);
    let waiting = tokio::spawn({
        let controller = controller.clone();
        async move { embed(&controller).await.map(drop) }
    });
    server.was_asked(2).await;
    waiting.abort();
    server.was_left(2).await;
    let _ = waiting.await;
    assert_at_rest(&controller);
}

//! Endpoints that the fleet has no words for: sent as they came, answered as the server answers.

use bytes::Bytes;
use mlx_serving_router::dispatch::{CallOptions, Controller, TokenStream};
use mlx_serving_router::error::{ControllerError, ControllerErrorCode};
use mlx_serving_router::openai::RelayedCall;
use mlx_serving_router::wire::{Capacity, InferenceRequest, PROTOCOL, Registration, RelayedTo, Skills, WorkerId, WorkerStatus};
use serde_json::{Value, json};

use super::server::{Act, Server, chunk, chunked_head, head, refusal, write};
use super::{alone, assert_at_rest, controller, read};

const QUESTION: &str = r#"{ "input": ["a", "b"], "model": "m", "encoding_format": "base64", "of our own": 1.50 }"#;
const VECTORS: &str = r#"{"object": "list", "data": [{"index": 0, "embedding": "AAA="}], "model": "own", "usage": {"prompt_tokens": 5, "total_tokens": 5}}"#;

fn asking(to: RelayedTo, body: &str) -> InferenceRequest {
    let call = RelayedCall::parse(to, &Bytes::copy_from_slice(body.as_bytes()), "r", None).unwrap();
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
        let first = embed(&controller).await.unwrap();
        assert_eq!((first.worker_id.as_str(), first.metadata.retry_count), ("b", 1));
        let second = embed(&controller).await.unwrap();
        assert_eq!((second.worker_id.as_str(), second.metadata.retry_count), ("b", 0));
        let left_out = &second.metadata.attempts[0].left_out;
        assert_eq!((left_out[0].worker_id.as_str(), &*left_out[0].reason), ("a", "unable"));
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
    assert_eq!((error.code(), error.message()), (ControllerErrorCode::ModelNotFound, "no such model here"));
    assert!(!error.message_for_log().contains("such"));
    let _ = embed(&controller).await;
    assert_eq!(server.asked().len(), 2, "it has the endpoint");
}

#[tokio::test]
async fn what_is_no_answer_is_never_taken_for_one() {
    let short = vec![write(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{{\"object\"", VECTORS.len()))];
    let scripts = [
        short,
        whole(&VECTORS[..VECTORS.len() - 1]),
        whole("[]"),
        whole("\"text\""),
        whole(r#"{"error": "unexpected endpoint"}"#),
        vec![write("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{\"object\": \"list\"")],
    ];
    for script in scripts {
        let (bad, good) = (Server::start(&script).await, Server::start(&whole(VECTORS)).await);
        let controller =
            controller(&[("a", &bad, json!({"priority": 100})), ("b", &good, json!({"priority": 1}))], json!({})).await;
        let answer = embed(&controller).await.unwrap();
        assert_eq!((answer.worker_id.as_str(), &*answer.text), ("b", VECTORS), "{script:?}");
        let code = answer.metadata.attempts[0].code;
        assert_eq!(code, Some(ControllerErrorCode::WorkerUnavailable), "{script:?}");
        assert_at_rest(&controller);
    }
    // One that failed says so itself, and is an answer.
    let failed = r#"{"object": "response", "status": "failed", "error": {"code": "server_error", "message": "no"}}"#;
    let server = Server::start(&whole(failed)).await;
    let controller = alone(&server, json!({})).await;
    let body = r#"{"model": "m", "input": "Hello"}"#;
    let answer = controller.buffered(asking(RelayedTo::Responses, body), CallOptions::default()).await.unwrap();
    assert_eq!(answer.text, failed);
}

#[tokio::test]
async fn events_are_handed_on_whole() {
    let events =
        [event("response.created", &json!({})), event("response.output_text.delta", &json!({"delta": "Hä"})), completed()];
    let all = events.concat();
    // Cut everywhere, within characters too.
    let pieces: Vec<Act> = all.as_bytes().chunks(7).map(|piece| Act::Write(piece.to_vec())).collect();
    let script: Vec<Act> = [head()].into_iter().chain(pieces).collect();
    let server = Server::start(&script).await;
    let controller = alone(&server, json!({})).await;
    let mut stream = respond(&controller).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), all);
    let usage = stream.response().unwrap().usage;
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (4, 2));
    assert_eq!(server.asked()[0].body["stream"], true);
    assert_at_rest(&controller);
}

#[tokio::test]
async fn a_stream_of_events_that_breaks_is_never_taken_for_an_answer() {
    let begin = event("response.created", &json!({}));
    let delta = event("response.output_text.delta", &json!({"delta": "H"}));
    let error = "event: error\ndata: {\"type\": \"error\", \"code\": \"server_error\", \"message\": \"no\"}\n\n";
    let scripts = [
        vec![head(), write(&begin), write(&delta)],
        vec![chunked_head(), chunk(&begin), chunk(&delta), chunk("")],
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
}

#[tokio::test]
async fn a_caller_that_leaves_ends_the_work() {
    let server = Server::start(&[chunked_head(), chunk(&event("response.created", &json!({}))), Act::Stall]).await;
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

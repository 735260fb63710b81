//! Answers that are answers, in all the shapes that servers give them.

use mlx_serving_router::dispatch::CallOptions;
use mlx_serving_router::routing::Carrier;
use mlx_serving_router::wire::{FinishReason, InferenceRequest, Usage};
use serde_json::{Value, json};

use crate::server::{Act, DONE, Server, chunk, chunked_head, delta, event, finish, good, head, token, usage, write};
use crate::{alone, assert_at_rest, buffered, chat, controller, read, streaming};

#[tokio::test]
async fn a_stream_is_passed_on_and_counted() {
    let server = Server::start(&good(&["Hel", "lo"])).await;
    let controller = controller(&[("a", &server, json!({"apiKey": "secret", "models": ["m=/theirs/m"]}))], json!({})).await;
    let options = CallOptions { traceparent: Some("00-1-2-01".into()), ..CallOptions::default() };
    let mut stream = controller.streaming(InferenceRequest { max_tokens: Some(9), ..chat() }, options).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), "Hello");
    let answer = stream.response().unwrap();
    assert_eq!((answer.worker_id.as_str(), answer.finish_reason), ("a", FinishReason::Stop));
    assert_eq!(answer.usage, Usage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: 0 });
    let asked = &server.asked()[0];
    assert_eq!(asked.path, "/v1/chat/completions");
    for (key, value) in [
        ("model", json!("/theirs/m")),
        ("max_tokens", json!(9)),
        ("stream", json!(true)),
        ("stream_options", json!({"include_usage": true})),
        ("messages", json!([{"role": "user", "content": "Hello"}])),
    ] {
        assert_eq!(asked.body[key], value, "{key}");
    }
    for header in ["authorization: bearer secret", "x-request-id: r", "traceparent: 00-1-2-01"] {
        assert!(asked.head.contains(header), "{}", asked.head);
    }
    assert_at_rest(&controller);
}

#[tokio::test]
async fn a_whole_answer_is_asked_for_as_one_where_the_server_watches_its_callers() {
    for (name, stream) in [(None, false), (Some("uvicorn"), false), (Some("BaseHTTP/0.6 Python/3.11.7"), true)] {
        let server = Server::start(&good(&["Hel", "lo"])).await;
        server.now_looks(|looks| looks.name = name.map(str::to_owned));
        let controller = alone(&server, json!({})).await;
        // Whatever was asked for, an answer is read as what it is.
        assert_eq!(buffered(&controller).await.unwrap().text, "Hello");
        let asked = &server.asked()[0];
        assert_eq!(asked.body["stream"], stream, "{name:?}");
        assert_eq!(asked.body.get("stream_options").is_some(), stream);
        let accept = if stream { "accept: text/event-stream" } else { "accept: application/json" };
        assert!(asked.head.contains(accept), "{}", asked.head);
        read(&mut streaming(&controller).await.unwrap()).await.unwrap();
        assert_eq!(server.asked()[1].body["stream"], true);
    }
}

#[tokio::test]
async fn a_prompt_goes_to_the_text_api() {
    let text = |text: &str, reason: Value| event(&json!({"choices": [{"index": 0, "text": text, "finish_reason": reason}]}));
    let server = Server::start(&[
        head(),
        write(&text("a", Value::Null)),
        write(&text("b", json!("length"))),
        write(&usage(1, 2)),
        write(DONE),
    ])
    .await;
    let controller = alone(&server, json!({})).await;
    let request = InferenceRequest { messages: None, prompt: Some("Once".into()), ..chat() };
    let answer = controller.buffered(request, CallOptions::default()).await.unwrap();
    assert_eq!((answer.text.as_str(), answer.finish_reason), ("ab", FinishReason::Length));
    let asked = &server.asked()[0];
    assert_eq!((asked.path.as_str(), &asked.body["prompt"]), ("/v1/completions", &json!("Once")));
}

#[tokio::test]
async fn an_address_may_end_with_the_version() {
    let server = Server::start(&good(&["x"])).await;
    let url = format!("http://{}/v1/", server.address);
    let controller = controller(&[("a", &server, json!({"url": url}))], json!({})).await;
    assert_eq!(buffered(&controller).await.unwrap().text, "x");
    assert_eq!(server.asked()[0].path, "/v1/chat/completions");
}

#[tokio::test]
async fn a_connection_serves_one_request_after_the_other() {
    let server = Server::start(&good(&["x"])).await;
    let controller = alone(&server, json!({})).await;
    for _ in 0..20 {
        assert_eq!(buffered(&controller).await.unwrap().text, "x");
    }
    // The end of a body may come a moment after the answer is complete: then another connection is made.
    assert!(server.connections() < 5, "{}", server.connections());
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_fails_nothing() {
    let mut closes = good(&["x"]);
    closes.pop();
    let server = Server::start(&closes).await;
    let controller = alone(&server, json!({})).await;
    for _ in 0..20 {
        assert_eq!(buffered(&controller).await.unwrap().text, "x");
        // What the kernel knows of the connection, the client hears now.
        tokio::task::yield_now().await;
    }
    assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
}

#[tokio::test]
async fn a_body_may_end_without_the_last_word() {
    for end in [finish(), finish().trim_end().to_owned(), format!("{}data: [DO", finish())] {
        let server = Server::start(&[head(), token("x"), write(&end)]).await;
        let controller = alone(&server, json!({})).await;
        let answer = buffered(&controller).await.unwrap();
        assert_eq!((answer.text.as_str(), answer.usage.completion_tokens), ("x", 1), "{end}");
    }
}

#[tokio::test]
async fn a_complete_answer_is_not_held_up_by_a_missing_end() {
    let server = Server::start(&[head(), token("x"), write(&finish()), Act::Stall]).await;
    let controller = alone(&server, json!({})).await;
    assert_eq!(buffered(&controller).await.unwrap().text, "x");
    server.was_left(1).await;
}

#[tokio::test]
async fn a_complete_answer_is_not_held_up_by_what_does_not_end() {
    let server = Server::start(&[head(), token("x"), write(&finish()), Act::Flood(b": more\n\n".to_vec())]).await;
    let controller = alone(&server, json!({})).await;
    assert_eq!(buffered(&controller).await.unwrap().text, "x");
    server.was_left(1).await;
}

#[tokio::test]
async fn what_follows_the_end_is_not_waited_for() {
    let server = Server::start(&[head(), token("x"), write(&finish()), write(DONE), Act::Stall]).await;
    let controller = alone(&server, json!({})).await;
    let mut stream = streaming(&controller).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), "x");
    assert_at_rest(&controller);
    server.was_left(1).await;
}

#[tokio::test]
async fn a_stream_may_be_cut_and_spaced_as_it_likes() {
    let stream = format!(
        "\u{feff}: hello\r\n\r\ndata:{}\r\n\r\n: keepalive 1/2\n\nid: 1\nevent: message\n{}data: nonsense\n\n{}{}{DONE}",
        json!({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
        delta("Hä"),
        delta("ll\u{1f600}"),
        finish(),
    );
    let bytes = stream.as_bytes().iter().map(|byte| Act::Write([b"1\r\n", [*byte].as_slice(), b"\r\n"].concat()));
    let script: Vec<Act> = [chunked_head()].into_iter().chain(bytes).chain([chunk("")]).collect();
    let server = Server::start(&script).await;
    let controller = alone(&server, json!({})).await;
    let mut stream = streaming(&controller).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), "Häll\u{1f600}");
    assert_eq!(stream.response().unwrap().usage.completion_tokens, 2);
}

#[tokio::test]
async fn signs_of_life_are_no_tokens() {
    let server = Server::start(&[head(), write(": keepalive 1/2\n\n"), Act::Wait, token("x"), write(&finish())]).await;
    let controller = alone(&server, json!({"acceptTimeoutMs": 100, "streamingTimeoutMs": 300})).await;
    let error = streaming(&controller).await.err().unwrap();
    assert_eq!(error.context()["limit"], "first_token");
    server.was_left(1).await;
}

#[tokio::test]
async fn a_server_may_be_busy_before_it_says_anything() {
    let server = Server::start(&[Act::Wait, head(), token("x"), write(&finish())]).await;
    let controller = alone(&server, json!({"acceptTimeoutMs": 1, "circuitBreaker": {"enabled": false}})).await;
    let waiting = tokio::spawn(async move { buffered(&controller).await });
    server.was_asked(1).await;
    // Longer than the limit for a sign of the worker, which was that it took the request.
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    server.go_on();
    assert_eq!(waiting.await.unwrap().unwrap().text, "x");
}

#[tokio::test]
async fn a_whole_answer_may_come_in_place_of_a_stream() {
    let body = json!({"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 1}})
    .to_string();
    let script = [write(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()))];
    let server = Server::start(&script).await;
    let controller = alone(&server, json!({})).await;
    assert_eq!(buffered(&controller).await.unwrap().text, "Hello");
    let mut stream = streaming(&controller).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), "Hello");
    assert_eq!(stream.response().unwrap().usage.prompt_tokens, 4);
}

#[tokio::test]
async fn calls_of_tools_reach_the_answer() {
    let call = json!({"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let server = Server::start(&[
        head(),
        write(&event(&json!({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}))),
        write(&event(&json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}))),
    ])
    .await;
    let controller = alone(&server, json!({})).await;
    let answer = buffered(&controller).await.unwrap();
    assert_eq!((answer.text.as_str(), answer.finish_reason), ("", FinishReason::ToolCalls));
    let calls: Value = answer.tool_calls.unwrap().read().unwrap();
    assert_eq!(calls, json!([{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]));
}

#[tokio::test]
async fn a_reader_that_is_slow_holds_its_server_back() {
    let tokens: String = (0..20_000).map(|number| delta(&format!("{number},"))).collect();
    let server = Server::start(&[head(), write(&tokens), write(&finish())]).await;
    let controller = alone(&server, json!({})).await;
    let mut stream = streaming(&controller).await.unwrap();
    // Far more than fits has come by the time that another request is through.
    for _ in 0..3 {
        controller.buffered(InferenceRequest { request_id: "r2".into(), ..chat() }, CallOptions::default()).await.unwrap();
    }
    let wanted: String = (0..20_000).map(|number| format!("{number},")).collect();
    assert_eq!(read(&mut stream).await.unwrap(), wanted);
}

#[tokio::test]
async fn workers_are_shown_with_their_carrier() {
    let server = Server::start(&good(&["x"])).await;
    let controller = controller(&[("a", &server, json!({"maxConcurrent": 3}))], json!({})).await;
    let worker = controller.worker("a").unwrap();
    assert_eq!((worker.carrier, worker.capacity.max_concurrent), (Carrier::Http, 3));
    assert_eq!((worker.models, worker.loaded_models), (vec!["m".to_owned()], vec!["m".to_owned()]));
    assert!(worker.features.is_empty() && !worker.incarnation.is_empty());
}

//! Of what servers send, all shapes that are known to come.
#![allow(clippy::expect_used)]

use std::time::Duration;

use serde_json::{Value, json};

use super::*;

fn take(answer: &mut Answer, data: &str) -> Result<Option<Token>, ControllerError> {
    answer.event(&Event { data: data.as_bytes(), is_error: false })
}

/// The tokens of these events, and the end.
fn read(events: &[Value]) -> Result<(Vec<Token>, Finish), ControllerError> {
    let mut answer = Answer::default();
    let mut tokens = Vec::new();
    for event in events {
        let data = event.as_str().map_or_else(|| event.to_string(), str::to_owned);
        tokens.extend(take(&mut answer, &data)?);
    }
    Ok((tokens, answer.end(Duration::ZERO)?))
}

fn delta(delta: Value) -> Value {
    json!({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": null}]})
}

fn finish(reason: &str) -> Value {
    json!({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
}

fn texts(tokens: &[Token]) -> Vec<(u64, &str)> {
    tokens.iter().map(|token| (token.index, token.text.as_str())).collect()
}

#[test]
fn a_chat_is_read() {
    let (tokens, end) = read(&[
        delta(json!({"role": "assistant", "content": ""})),
        delta(json!({"content": "Hel"})),
        delta(json!({"content": "lo"})),
        finish("length"),
        json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 4}}}),
        json!("[DONE]"),
    ])
    .expect("an answer");
    assert_eq!(texts(&tokens), [(0, "Hel"), (1, "lo")]);
    assert_eq!(end.reason, FinishReason::Length);
    assert_eq!(end.usage, Usage { prompt_tokens: 9, completion_tokens: 5, cached_tokens: 4 });
    assert_eq!(end.tool_calls, None);
}

#[test]
fn a_text_is_read_and_tokens_are_counted_where_the_server_does_not() {
    let text = |text: &str, reason: Option<&str>| json!({"choices": [{"index": 0, "text": text, "finish_reason": reason}]});
    let (tokens, end) = read(&[text("a", None), text("b", Some("stop"))]).expect("an answer");
    assert_eq!(texts(&tokens), [(0, "a"), (1, "b")]);
    assert_eq!((end.reason, end.usage.completion_tokens), (FinishReason::Stop, 2));
}

#[test]
fn other_choices_and_chunks_without_any_are_nothing() {
    let other = json!({"choices": [{"index": 1, "delta": {"content": "no"}, "finish_reason": "length"}]});
    let (tokens, end) = read(&[other, json!({}), json!({"choices": null, "usage": null}), finish("stop")]).expect("an answer");
    assert_eq!((tokens.len(), end.reason), (0, FinishReason::Stop));
}

#[test]
fn reasoning_is_work_without_text() {
    let (tokens, end) = read(&[
        delta(json!({"reasoning": "hm"})),
        delta(json!({"reasoning_content": "hm", "content": null})),
        delta(json!({"reasoning": "", "content": "Yes"})),
        finish("stop"),
    ])
    .expect("an answer");
    assert_eq!(texts(&tokens), [(0, ""), (1, ""), (2, "Yes")]);
    assert_eq!(end.usage.completion_tokens, 3);
}

#[test]
fn calls_of_tools_are_gathered_by_their_index() {
    let part = |part: Value| delta(json!({"tool_calls": [part]}));
    let (tokens, end) = read(&[
        part(json!({"index": 0, "id": "a", "type": "function", "function": {"name": "add", "arguments": ""}})),
        part(json!({"index": 1, "id": "b", "type": "function", "function": {"name": "sub", "arguments": "{}"}})),
        part(json!({"index": 0, "function": {"arguments": "{\"x\""}})),
        part(json!({"index": 0, "id": null, "function": {"name": null, "arguments": ": 1}"}})),
        finish("tool_calls"),
    ])
    .expect("an answer");
    assert!(tokens.iter().all(|token| token.text.is_empty()));
    assert_eq!(end.reason, FinishReason::ToolCalls);
    let calls: Value = end.tool_calls.and_then(|calls| calls.read().ok()).expect("calls");
    let wanted = json!([
        {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{\"x\": 1}"}},
        {"id": "b", "type": "function", "function": {"name": "sub", "arguments": "{}"}},
    ]);
    assert_eq!(calls, wanted);
}

#[test]
fn calls_of_tools_without_an_index_go_by_their_ids() {
    let part = |part: Value| delta(json!({"tool_calls": [part]}));
    let (_, end) = read(&[
        part(json!({"id": "a", "function": {"name": "add", "arguments": {"x": 1}}})),
        part(json!({"id": "b", "function": {"name": "sub", "arguments": "{"}})),
        part(json!({"function": {"arguments": "}"}})),
        json!("[DONE]"),
    ])
    .expect("an answer");
    assert_eq!(end.reason, FinishReason::ToolCalls);
    let calls: Value = end.tool_calls.and_then(|calls| calls.read().ok()).expect("calls");
    assert_eq!((&calls[0]["function"]["arguments"], &calls[1]["function"]["arguments"]), (&json!("{\"x\":1}"), &json!("{}")));
}

#[test]
fn calls_without_end_are_refused() {
    let mut answer = Answer::default();
    let part = |index: usize| delta(json!({"tool_calls": [{"index": index, "function": {"name": "f"}}]})).to_string();
    assert!((0..CALLS_MOST).all(|index| take(&mut answer, &part(index)).is_ok()));
    assert!(take(&mut answer, &part(CALLS_MOST)).is_err());
    let long = json!({"tool_calls": [{"index": 0, "function": {"arguments": "x".repeat(ARGUMENTS_MOST + 1)}}]});
    assert!(take(&mut Answer::default(), &delta(long).to_string()).is_err());
}

#[test]
fn an_answer_that_is_cut_is_no_answer() {
    let error = read(&[delta(json!({"content": "Hel"}))]).expect_err("cut");
    assert_eq!(error.code(), ControllerErrorCode::WorkerUnavailable);
    assert!(error.context().contains_key("protocolError"));
    assert!(read(&[]).is_err());
    assert!(read(&[json!("[DONE]")]).is_ok());
}

#[test]
fn an_answer_that_the_server_breaks_off_is_no_answer() {
    for reason in ["abort", "error"] {
        assert!(read(&[delta(json!({"content": "Hel"})), finish(reason)]).is_err());
    }
    assert_eq!(read(&[finish("content_filter")]).expect("an answer").1.reason, FinishReason::Stop);
}

#[test]
fn a_few_chunks_may_be_malformed() {
    let mut answer = Answer::default();
    for _ in 0..MALFORMED_MOST {
        assert!(take(&mut answer, r#"{"status": ["#).is_ok_and(|token| token.is_none()));
    }
    assert!(take(&mut answer, &delta(json!({"content": "x"})).to_string()).is_ok_and(|token| token.is_some()));
    assert!(take(&mut answer, "nonsense").is_err());
}

#[test]
fn no_text_is_passed_over() {
    for data in [
        r#"{"choices": [{"index": 0, "delta": {"content": 5}}]}"#,
        r#"{"choices": [{"index": 0, "delta": {"content": "x"#,
        r#"{"choices": "x"}"#,
    ] {
        let error = take(&mut Answer::default(), data).expect_err("a hole");
        assert_eq!(error.code(), ControllerErrorCode::WorkerUnavailable, "{data}");
        assert!(error.context().contains_key("protocolError"), "{data}");
    }
}

#[test]
fn what_stands_beside_the_text_may_be_odd() {
    let (tokens, end) = read(&[
        json!({"object": 7, "choices": [{"index": null, "delta": {"content": "a", "reasoning": ["hm"]}, "finish_reason": 0}],
            "usage": "none"}),
        json!({"choices": [{"delta": {"content": "b", "reasoning_content": {}}, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 3.5, "completion_tokens": 2, "prompt_tokens_details": []}}),
    ])
    .expect("an answer");
    assert_eq!(texts(&tokens), [(0, "a"), (1, "b")]);
    assert_eq!((end.reason, end.usage.prompt_tokens, end.usage.completion_tokens), (FinishReason::Length, 0, 2));
}

#[test]
fn calls_of_tools_keep_their_ids_and_have_no_place_too_high() {
    let part = |part: Value| delta(json!({"tool_calls": [part]}));
    let (_, end) = read(&[
        part(json!({"index": u64::MAX, "id": "a", "function": {"name": "add", "arguments": "{"}})),
        part(json!({"id": "", "function": {"arguments": "}"}})),
        finish("tool_calls"),
    ])
    .expect("an answer");
    let calls: Value = end.tool_calls.and_then(|calls| calls.read().ok()).expect("calls");
    assert_eq!((&calls[0]["id"], &calls[0]["function"]["arguments"]), (&json!("a"), &json!("{}")));
    let highest = part(json!({"index": u64::MAX, "id": "a"}));
    assert!(read(&[highest, part(json!({"id": "b"})), finish("tool_calls")]).is_ok());
}

#[test]
fn errors_within_a_stream_are_errors() {
    for event in [
        json!({"error": {"message": "why", "code": 503}}),
        json!({"error": "why"}),
        json!({"object": "error", "message": "why", "code": 503}),
    ] {
        let error = read(&[event]).expect_err("an error");
        assert_eq!(error.message(), "why");
    }
    let named = |data: &[u8]| Answer::default().event(&Event { data, is_error: true }).expect_err("an error");
    assert_eq!(named(br#"{"message": "why"}"#).message(), "why");
    assert_eq!(named(b"why").message(), "why");
    assert!(read(&[json!({"error": null, "choices": []}), finish("stop")]).is_ok());
}

#[test]
fn log_probabilities_have_the_chat_apis_shape() {
    let chat = json!({"content": [{"token": "a", "logprob": -0.5, "top_logprobs": []}]});
    let event = json!({"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": chat}]});
    let (tokens, _) = read(&[event, finish("stop")]).expect("an answer");
    assert_eq!(tokens[0].logprobs.as_ref().and_then(|given| given.read().ok()), Some(chat));
    let text = json!({"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -1.5}], "text_offset": [0]});
    let event = json!({"choices": [{"index": 0, "text": "a", "logprobs": text}]});
    let (tokens, _) = read(&[event, finish("stop")]).expect("an answer");
    let wanted = json!({"content": [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.5}]}]});
    assert_eq!(tokens[0].logprobs.as_ref().and_then(|given| given.read().ok()), Some(wanted));
    let event = json!({"choices": [{"index": 0, "text": "a", "logprobs": null}]});
    assert_eq!(read(&[event, finish("stop")]).expect("an answer").0[0].logprobs, None);
}

#[test]
fn a_whole_answer_in_place_of_a_stream_is_read() {
    let whole = |body: Value| Answer::default().whole(body.to_string().as_bytes(), Duration::ZERO);
    let body = json!({"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello",
        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}, {"id": "b", "function": {"name": "g"}}]},
        "finish_reason": "tool_calls"}], "usage": {"prompt_tokens": 2, "completion_tokens": 3}});
    let Ok(Reply::Response { text, finish, .. }) = whole(body) else { panic!("no response") };
    assert_eq!((text.as_str(), finish.usage.completion_tokens, finish.reason), ("Hello", 3, FinishReason::ToolCalls));
    let calls: Vec<Value> = finish.tool_calls.and_then(|calls| calls.read().ok()).expect("calls");
    assert_eq!((calls.len(), &calls[1]["function"]["name"]), (2, &json!("g")));
    assert!(matches!(whole(json!({"choices": [{"text": "Hi"}]})), Ok(Reply::Response { text, .. }) if text == "Hi"));
    assert_eq!(whole(json!({"error": "why"})).expect_err("an error").message(), "why");
    assert!(whole(json!({"choices": []})).is_err());
    assert!(Answer::default().whole(b"{", Duration::ZERO).is_err());
}

//! Answers and streams out.

use std::sync::Arc;

use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::openai::{self, Completion, StreamEncoder};
use mlx_serving_router::wire::{FinishReason, Json};
use serde_json::{Value, json};

use super::{CREATED, chat, completion, encoded, events, json_of, stream, text};

#[test]
fn a_chat_answer_has_the_apis_shape() {
    assert_eq!(
        encoded(&chat(json!({})), &completion("Hi \"you\"")),
        json!({
            "id": "chatcmpl-r-1", "object": "chat.completion", "created": CREATED, "model": "tiny",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi \"you\"", "refusal": null},
                         "logprobs": null, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 4}},
        })
    );
}

#[test]
fn a_text_answer_has_the_apis_shape() {
    let logprobs = json_of(json!({"content": [
        {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [{"token": "e", "logprob": -1.5}]},
        {"token": "b", "logprob": -0.25},
    ]}));
    let answer = encoded(&text(json!({})), &Completion { logprobs: Some(&logprobs), ..completion("éb") });
    assert_eq!(answer["id"], "cmpl-r-1");
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(
        answer["choices"],
        json!([{"index": 0, "text": "éb", "finish_reason": "stop", "logprobs": {
            "tokens": ["é", "b"], "token_logprobs": [-0.5, -0.25], "top_logprobs": [{"e": -1.5}, {}], "text_offset": [0, 1]}}])
    );
}

#[test]
fn tool_calls_are_complete_and_decide_the_finish_reason() {
    let calls = json_of(json!([
        {"id": "c-1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}},
        {"function": {"name": "g", "arguments": {"b": [2]}}},
        {"id": "", "function": {"name": "h"}},
    ]));
    let answer = encoded(&chat(json!({})), &Completion { tool_calls: Some(&calls), ..completion("") });
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], Value::Null);
    assert_eq!(
        choice["message"]["tool_calls"],
        json!([
            {"id": "c-1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}},
            {"id": "call_r-1_1", "type": "function", "function": {"name": "g", "arguments": "{\"b\":[2]}"}},
            {"id": "call_r-1_2", "type": "function", "function": {"name": "h", "arguments": "{}"}},
        ])
    );
    let announced = Completion { finish_reason: FinishReason::ToolCalls, ..completion("Hi") };
    assert_eq!(encoded(&chat(json!({})), &announced)["choices"][0]["finish_reason"], "stop");
    assert_eq!(encoded(&text(json!({})), &announced)["choices"][0]["finish_reason"], "stop");
}

#[test]
fn tool_calls_in_no_shape_fail_the_answer() {
    let calls = json_of(json!([{"name": "f"}]));
    let end = Completion { tool_calls: Some(&calls), ..completion("") };
    assert_eq!(chat(json!({})).encode(&end, CREATED).unwrap_err().code(), Code::WorkerUnavailable);
    let events = stream(chat(json!({})), &[], &end);
    assert_eq!(events.last().unwrap()["error"]["code"], "WORKER_UNAVAILABLE");
}

#[test]
fn models_are_listed() {
    let list: Value = serde_json::from_slice(&openai::models(&["a", "b"], CREATED)).unwrap();
    let one: Value = serde_json::from_slice(&openai::model("a", CREATED)).unwrap();
    assert_eq!(one, json!({"id": "a", "object": "model", "created": CREATED, "owned_by": "mlx_serving_router"}));
    assert_eq!((&list["object"], &list["data"][0], &list["data"][1]["id"]), (&json!("list"), &one, &json!("b")));
}

// === streams ===

#[test]
fn a_chat_stream_is_what_clients_expect() {
    let call = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let events = stream(call, &["Hel", "", "lo\n\n"], &completion("Hello\n\n"));
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    for chunk in chunks {
        assert_eq!(
            (&chunk["id"], &chunk["object"], &chunk["created"], &chunk["model"]),
            (&json!("chatcmpl-r-1"), &json!("chat.completion.chunk"), &json!(CREATED), &json!("tiny"))
        );
    }
    let (usage, chunks) = chunks.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["total_tokens"]), (&json!([]), &json!(12)));
    assert!(chunks.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
    let choices: Vec<_> = chunks.iter().map(|chunk| chunk["choices"][0].clone()).collect();
    assert_eq!(
        choices,
        [
            json!({"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}),
            json!({"index": 0, "delta": {"content": "Hel"}, "logprobs": null, "finish_reason": null}),
            json!({"index": 0, "delta": {"content": "lo\n\n"}, "logprobs": null, "finish_reason": null}),
            json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop"}),
        ]
    );
}

#[test]
fn usage_comes_only_when_asked_for() {
    let events = stream(chat(json!({"stream": true})), &["Hi"], &completion("Hi"));
    assert!(events.iter().all(|event| event.get("usage").is_none()));
    assert_eq!(events.len(), 4);
}

#[test]
fn an_answer_without_tokens_still_names_its_role() {
    let events = stream(chat(json!({})), &[], &completion(""));
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events[1]["choices"][0]["finish_reason"], "stop");
}

#[test]
fn streamed_tool_calls_name_themselves_first() {
    let calls = json_of(json!([{"id": "c", "function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g"}}]));
    let end = Completion { tool_calls: Some(&calls), ..completion("") };
    let events = stream(chat(json!({})), &[], &end);
    let deltas: Vec<_> = events[1..5].iter().map(|event| event["choices"][0]["delta"]["tool_calls"][0].clone()).collect();
    assert_eq!(
        deltas,
        [
            json!({"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}),
            json!({"index": 0, "function": {"arguments": "{\"a\":1}"}}),
            json!({"index": 1, "id": "call_r-1_1", "type": "function", "function": {"name": "g", "arguments": ""}}),
            json!({"index": 1, "function": {"arguments": "{}"}}),
        ]
    );
    assert_eq!(events[5]["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn a_text_stream_counts_its_offsets_on() {
    let pretty = |token: &str| {
        Json::from_text(format!("{{\n \"content\": [\n {{\"token\": \"{token}\", \"logprob\": -1}}\n]\n}}")).unwrap()
    };
    let (first, second) = (pretty("éa"), pretty("b"));
    let mut encoder = StreamEncoder::new(Arc::new(text(json!({}))), CREATED);
    let mut bytes = encoder.tokens([("éa", Some(&first))]);
    bytes.extend(encoder.tokens([("b", Some(&second))]));
    bytes.extend(encoder.finish(&completion("éab")));
    let events = events(&bytes);
    assert_eq!(events[0]["object"], "text_completion");
    assert_eq!(events[1]["choices"][0]["logprobs"]["text_offset"], json!([2]));
    assert_eq!(events[2]["choices"], json!([{"index": 0, "text": "", "logprobs": null, "finish_reason": "stop"}]));
}

#[test]
fn a_stream_that_breaks_ends_with_the_error() {
    let mut encoder = StreamEncoder::new(Arc::new(chat(json!({}))), CREATED);
    encoder.tokens([("Hel", None)]);
    let events = events(&encoder.error(&ControllerError::new(Code::StreamInterrupted, "it broke")));
    let error = json!({"message": "it broke", "type": "server_error", "param": null, "code": "STREAM_INTERRUPTED"});
    assert_eq!(events, [json!({"error": error})]);
}

#[test]
fn a_sign_of_life_is_a_chunk_without_text_and_the_role_is_named_once() {
    for include_usage in [false, true] {
        let call = chat(json!({"stream": true, "stream_options": {"include_usage": include_usage}}));
        let mut encoder = StreamEncoder::new(Arc::new(call), CREATED);
        let mut bytes = encoder.keepalive();
        bytes.extend(encoder.keepalive());
        bytes.extend(encoder.tokens([("Hi", None)]));
        let deltas: Vec<_> = events(&bytes).iter().map(|event| event["choices"][0]["delta"].clone()).collect();
        assert_eq!(deltas, [json!({"role": "assistant", "content": ""}), json!({"content": ""}), json!({"content": "Hi"})]);
    }
    let mut encoder = StreamEncoder::new(Arc::new(text(json!({}))), CREATED);
    let choice = json!({"index": 0, "text": "", "logprobs": null, "finish_reason": null});
    assert_eq!(events(&encoder.keepalive())[0]["choices"], json!([choice]));
}

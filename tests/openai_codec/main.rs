//! The OpenAI codec through its public door: bodies in, answers, streams and errors out.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod answers;
mod errors;
mod requests;

use std::sync::Arc;

use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::openai::{Completion, CompletionCall, Endpoint, StreamEncoder};
use mlx_serving_router::wire::{FinishReason, Json, Usage};
use proptest::prelude::*;
use serde_json::{Value, json};

const CREATED: u64 = 1_762_732_800;

fn parse(endpoint: Endpoint, body: &str) -> Result<CompletionCall, ControllerError> {
    CompletionCall::parse(endpoint, body.as_bytes(), "r-1", None)
}

/// A chat body with these fields on top of a sound one.
fn chat_body(extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn chat(extra: Value) -> CompletionCall {
    parse(Endpoint::Chat, &chat_body(extra).to_string()).unwrap()
}

fn text(extra: Value) -> CompletionCall {
    let mut body = json!({"model": "tiny", "prompt": "Once"});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    parse(Endpoint::Text, &body.to_string()).unwrap()
}

/// The code of a refusal and the field that it names.
fn refusal(result: Result<CompletionCall, ControllerError>) -> (Code, Option<String>) {
    let error = result.unwrap_err();
    (error.code(), error.context().get("field").and_then(Value::as_str).map(str::to_owned))
}

fn json_of(value: Value) -> Json {
    Json::from_value(&value).unwrap()
}

fn completion(text: &str) -> Completion<'_> {
    let usage = Usage { prompt_tokens: 9, completion_tokens: 3, cached_tokens: 4 };
    Completion { model: "tiny", text, finish_reason: FinishReason::Stop, usage, tool_calls: None, logprobs: None }
}

fn encoded(call: &CompletionCall, completion: &Completion<'_>) -> Value {
    serde_json::from_slice(&call.encode(completion, CREATED).unwrap()).unwrap()
}

/// The payloads of a stream's events, with a check that they are written as clients need them.
fn events(bytes: &[u8]) -> Vec<Value> {
    let written = std::str::from_utf8(bytes).unwrap();
    assert!(written.is_empty() || written.ends_with("\n\n"));
    written
        .split_terminator("\n\n")
        .map(|event| {
            let data = event.strip_prefix("data: ").expect("only data lines");
            assert!(!data.is_empty() && !data.contains(['\n', '\r']));
            if data == "[DONE]" { json!("[DONE]") } else { serde_json::from_str(data).unwrap() }
        })
        .collect()
}

fn stream(call: CompletionCall, pieces: &[&str], end: &Completion<'_>) -> Vec<Value> {
    let mut encoder = StreamEncoder::new(Arc::new(call), CREATED);
    let mut bytes = encoder.tokens(pieces.iter().map(|piece| (*piece, None)));
    bytes.extend(encoder.finish(end));
    events(&bytes)
}

// === anything at all ===

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("role|content|type|text|function|name|include_usage|.{0,4}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..256), header in prop::option::of(".{0,300}")) {
        let _ = CompletionCall::parse(Endpoint::Chat, &bytes, "r", header.as_deref());
    }

    #[test]
    fn no_value_of_a_field_panics(
        field in "messages|prompt|model|stop|tools|tool_choice|logit_bias|logprobs|n|seed|user|session_id|stream_options|priority",
        value in any_json(),
    ) {
        let body = chat_body(json!({field: value})).to_string();
        for endpoint in [Endpoint::Chat, Endpoint::Text] {
            if let Ok(call) = CompletionCall::parse(endpoint, body.as_bytes(), "r", None) {
                prop_assert!(call.request.validate().is_ok());
            }
        }
    }

    #[test]
    fn any_answer_streams_as_sound_events(pieces in prop::collection::vec(".{0,8}", 0..6), calls in any_json(), odd in any_json()) {
        let (calls, odd) = (json_of(calls), json_of(odd));
        let text: String = pieces.concat();
        let end = Completion { tool_calls: Some(&calls), logprobs: Some(&odd), ..completion(&text) };
        let mut encoder = StreamEncoder::new(Arc::new(chat(json!({"stream": true}))), CREATED);
        let mut bytes = encoder.tokens(pieces.iter().map(|piece| (piece.as_str(), Some(&odd))));
        bytes.extend(encoder.finish(&end));
        let read: String = events(&bytes).iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
        prop_assert_eq!(read, text);
    }
}

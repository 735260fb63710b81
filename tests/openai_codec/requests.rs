//! Bodies in.

use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::openai::{CompletionCall, Endpoint, RelayedCall};
use mlx_serving_router::wire::{Priority, RelayedTo};
use serde_json::{Value, json};

use super::{chat, chat_body, parse, refusal, text};

#[test]
fn every_field_finds_its_place() {
    let call = chat(json!({
        "max_tokens": 16, "temperature": 0.7, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "seed": 7, "stop": "\n\n",
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"42": -100},
        "logprobs": true, "top_logprobs": 2, "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto", "response_format": {"type": "json_object"}, "session_id": "s-1", "stream": true,
        "stream_options": {"include_usage": true}, "priority": "high", "n": 1, "parallel_tool_calls": true, "store": false,
    }));
    assert!(call.stream && call.include_usage);
    assert_eq!(
        serde_json::to_value(&*call.request).unwrap(),
        json!({
            "requestId": "r-1", "modelId": "tiny", "messages": [{"role": "user", "content": "Hello"}], "maxTokens": 16,
            "temperature": 0.7, "topP": 0.95, "topK": 40, "minP": 0.05, "seed": 7, "stop": ["\n\n"],
            "repetitionPenalty": 1.1, "presencePenalty": 0.5, "frequencyPenalty": -0.5, "logitBias": {"42": -100},
            "logprobs": 2, "tools": [{"type": "function", "function": {"name": "f"}}], "toolChoice": "auto",
            "responseFormat": {"type": "json_object"}, "sessionId": "s-1", "stream": true, "priority": "high",
        })
    );
}

#[test]
fn what_is_null_empty_or_unknown_is_not_set() {
    let call = chat(json!({
        "max_tokens": null, "max_completion_tokens": null, "temperature": null, "stop": [], "tools": [ ], "n": null,
        "logprobs": false, "top_logprobs": null, "stream": null, "stream_options": null, "session_id": null, "user": null,
        "priority": null, "an_unknown_one": [1, {"two": 3}],
    }));
    assert_eq!(call.request, chat(json!({})).request);
    assert!(!call.stream && !call.include_usage);
    assert_eq!(call.request.priority, Priority::Normal);
}

#[test]
fn a_whole_number_may_be_written_with_a_point() {
    let call = chat(json!({"max_tokens": 16.0, "n": 1.0, "seed": -3.0, "top_k": 4e1}));
    assert_eq!((call.request.max_tokens, call.request.seed, call.request.top_k), (Some(16), Some(-3), Some(40)));
    for wrong in [json!({"seed": 1e19}), json!({"seed": 0.5}), json!({"n": 2.0}), json!({"seed": 9_223_372_036_854_775_808_u64})]
    {
        let found = refusal(parse(Endpoint::Chat, &chat_body(wrong.clone()).to_string()));
        assert_eq!(found.0, Code::RequestValidationFailed, "{wrong}");
    }
}

#[test]
fn a_text_completion_asks_for_a_prompt() {
    let call = text(json!({"logprobs": 3, "best_of": 1, "echo": false, "suffix": null, "stop": ["a", "b"]}));
    assert_eq!(call.request.prompt.as_deref(), Some("Once"));
    assert_eq!(call.request.logprobs, Some(3));
    assert_eq!(call.request.stop, Some(vec!["a".to_owned(), "b".to_owned()]));
    assert_eq!(text(json!({"prompt": ["Once"]})).request.prompt.as_deref(), Some("Once"));
}

#[test]
fn the_newer_name_of_the_limit_wins() {
    assert_eq!(chat(json!({"max_tokens": 5, "max_completion_tokens": 6})).request.max_tokens, Some(6));
    assert_eq!(chat(json!({"logprobs": true})).request.logprobs, Some(0));
}

#[test]
fn parts_of_text_are_joined_and_all_else_is_left_alone() {
    let messages = json!([
        {"role": "system", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo \u{e9}\n\"", "extra": 1}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": []},
    ]);
    let read: Value = chat(json!({"messages": messages})).request.messages.as_ref().unwrap().read().unwrap();
    assert_eq!(
        read,
        json!([
            {"role": "system", "content": "Be brief.", "name": "boss"},
            {"role": "user", "content": "Hello \u{e9}\n\""},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": ""},
        ])
    );
}

#[test]
fn each_bad_field_is_named_as_the_client_knows_it() {
    let image = json!([{"role": "user", "content": [
        {"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:"}}]}]);
    for (extra, field) in [
        (json!({"model": null}), "model"),
        (json!({"model": ""}), "model"),
        (json!({"model": 7}), "model"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "Hello"}), "messages"),
        (json!({"messages": ["Hello"]}), "messages"),
        (json!({"messages": [{"content": "Hello"}]}), "messages"),
        (json!({"messages": [{"role": "", "content": "Hello"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": ["Hello"]}]}), "messages[0].content[0]"),
        (json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}), "messages[0].content[0]"),
        (json!({"messages": [{"role": "user", "content": [{"type": "song", "text": "la"}]}]}), "messages[0].content[0]"),
        (json!({"messages": image}), "messages[0].content[1]"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"max_tokens": "16"}), "max_tokens"),
        (json!({"max_completion_tokens": -1}), "max_completion_tokens"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 1.1}), "top_p"),
        (json!({"top_k": -1}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"seed": 0.5}), "seed"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": [1]}), "stop"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"logit_bias": []}), "logit_bias"),
        (json!({"logprobs": 1}), "logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"tools": {}}), "tools"),
        (json!({"tool_choice": 1}), "tool_choice"),
        (json!({"response_format": "json"}), "response_format"),
        (json!({"n": 2}), "n"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": true}), "stream_options"),
        (json!({"priority": "urgent"}), "priority"),
    ] {
        let found = refusal(parse(Endpoint::Chat, &chat_body(extra.clone()).to_string()));
        assert_eq!(found, (Code::RequestValidationFailed, Some(field.to_owned())), "{extra}");
    }
    for (body, field) in [
        (json!({"model": "tiny"}), "prompt"),
        (json!({"model": "tiny", "prompt": ""}), "prompt"),
        (json!({"model": "tiny", "prompt": ["a", "b"]}), "prompt"),
        (json!({"model": "tiny", "prompt": [1, 2]}), "prompt"),
        (json!({"model": "tiny", "prompt": "a", "best_of": 2}), "best_of"),
        (json!({"model": "tiny", "prompt": "a", "echo": true}), "echo"),
        (json!({"model": "tiny", "prompt": "a", "suffix": "b"}), "suffix"),
        (json!({"model": "tiny", "prompt": "a", "logprobs": true}), "logprobs"),
    ] {
        let found = refusal(parse(Endpoint::Text, &body.to_string()));
        assert_eq!(found, (Code::RequestValidationFailed, Some(field.to_owned())), "{body}");
    }
}

#[test]
fn broken_json_is_refused_with_its_place() {
    let error = parse(Endpoint::Chat, "{\"model\": \"tiny\",\n  \"messages\": [}").unwrap_err();
    assert_eq!(refusal(Err(error.clone())), (Code::RequestValidationFailed, None));
    assert!(error.message().contains("line 2 column 16"), "{error}");
    let deep = format!(r#"{{"model":"tiny","metadata":{}{}}}"#, "[".repeat(1_000_000), "]".repeat(1_000_000));
    for body in ["", "nonsense", "[]", "null", "7", r#"{"model": "a", "model": "b"}"#, "{\"model\": \"\u{1}\"}", &deep] {
        assert_eq!(refusal(parse(Endpoint::Chat, body)), (Code::RequestValidationFailed, None));
    }
    assert!(CompletionCall::parse(Endpoint::Chat, b"{\"model\": \"\xff\"}", "r", None).is_err());
    let lone_surrogate = r#"{"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}"#;
    assert_eq!(refusal(parse(Endpoint::Chat, lone_surrogate)).1.as_deref(), Some("messages[0].content"));
}

#[test]
fn a_refusal_never_repeats_what_was_said() {
    for body in [
        chat_body(json!({"messages": "a secret"})),
        chat_body(json!({"messages": [{"role": "user", "content": {"a secret": 1}}]})),
        chat_body(json!({"messages": [{"role": "user", "content": [{"type": "a secret", "text": "a secret"}]}]})),
        json!("a secret"),
    ] {
        let error = parse(Endpoint::Chat, &body.to_string()).unwrap_err();
        assert!(!format!("{error:?}").contains("secret"), "{error}");
    }
}

#[test]
fn the_session_is_the_first_that_is_given() {
    let long = "x".repeat(257);
    for (header, body, session) in [
        (Some("h"), json!({"session_id": "s", "prompt_cache_key": "k", "user": "u"}), Some("h")),
        (None, json!({"session_id": "s", "prompt_cache_key": "k", "user": "u"}), Some("s")),
        (None, json!({"prompt_cache_key": "k", "user": "u"}), Some("k")),
        (None, json!({"user": "u"}), Some("u")),
        (None, json!({"user": "Zo\u{eb} \u{1f469}\u{200d}\u{1f4bb}"}), Some("Zo\u{eb} \u{1f469}\u{200d}\u{1f4bb}")),
        (None, json!({}), None),
        (None, json!({"prompt_cache_key": long, "user": "u"}), Some("u")),
        (None, json!({"prompt_cache_key": 7, "user": "a\nb"}), None),
        (None, json!({"user": ""}), None),
    ] {
        let body = chat_body(body).to_string();
        let call = CompletionCall::parse(Endpoint::Chat, body.as_bytes(), "r-1", header).unwrap();
        assert_eq!(call.request.session_id.as_deref(), session, "{body}");
    }
    for (header, body, field) in [
        (Some(""), json!({}), "x-session-id"),
        (Some("a\tb"), json!({"session_id": "s"}), "x-session-id"),
        (None, json!({"session_id": ""}), "session_id"),
        (None, json!({"session_id": long}), "session_id"),
        (None, json!({"session_id": "a\u{2028}b"}), "session_id"),
        (None, json!({"session_id": "a\u{200b}"}), "session_id"),
        (None, json!({"session_id": 7}), "session_id"),
    ] {
        let body = chat_body(body).to_string();
        let found = refusal(CompletionCall::parse(Endpoint::Chat, body.as_bytes(), "r-1", header));
        assert_eq!(found, (Code::InvalidSessionId, Some(field.to_owned())), "{body}");
    }
}

fn relayed(to: RelayedTo, body: &str) -> Result<RelayedCall, ControllerError> {
    RelayedCall::parse(to, body.as_bytes(), "r", None)
}

#[test]
fn a_relayed_body_goes_on_but_for_what_the_router_reads() {
    let body = r#" {"é": "\u00e9", "model" : "a\"b" , "model ": 1.50, "input": [ "x"], "session_id": "s", "priority": "high", "stream": true, "user": "u"} "#;
    let call = relayed(RelayedTo::Responses, body).unwrap();
    let request = &call.request;
    assert_eq!((&*request.model_id, request.session_id.as_deref(), request.priority), ("a\"b", Some("s"), Priority::High));
    let sent = request.relayed.as_ref().unwrap().body("c\"d", true);
    let wanted = r#"{"model":"c\"d","é":"\u00e9","model ":1.50,"input":[ "x"],"user":"u","stream":true}"#;
    assert_eq!(String::from_utf8(sent).unwrap(), wanted);
    assert!(!format!("{request:?} {:?}", request.relayed).contains("input"));
}

#[test]
fn of_a_relayed_body_only_what_routing_needs_is_judged() {
    for (body, field) in [
        (r#"{"input": "x"}"#, "model"),
        (r#"{"model": null}"#, "model"),
        (r#"{"model": 5}"#, "model"),
        (r#"{"model": ""}"#, "model"),
        (r#"{"model": "m", "stream": "yes"}"#, "stream"),
        (r#"{"model": "m", "session_id": ""}"#, "session_id"),
    ] {
        let error = relayed(RelayedTo::Responses, body).unwrap_err();
        assert_eq!(error.context()["field"], field, "{body}");
    }
    // Servers have a priority of their own, which is a number.
    let call = relayed(RelayedTo::Embeddings, r#"{"model": "m", "priority": 3}"#).unwrap();
    assert_eq!(call.request.priority, Priority::Normal);
    assert_eq!(call.request.relayed.as_ref().unwrap().body("m", false), br#"{"model":"m","priority":3}"#);
    assert!(relayed(RelayedTo::Embeddings, "[]").is_err() && relayed(RelayedTo::Embeddings, "{").is_err());
    // Embeddings are never streams, and have no session.
    let call = relayed(RelayedTo::Embeddings, r#"{"model": "m", "stream": "yes", "user": "u"}"#).unwrap();
    assert!(!call.request.stream && call.request.session_id.is_none());
    assert!(relayed(RelayedTo::Responses, r#"{"model": "m", "stream": true}"#).unwrap().request.stream);
}

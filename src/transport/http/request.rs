//! A request of ours in the words of the OpenAI API.
//!
//! What is not set is left out, for the server to decide.

use serde::Serialize;

use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::{InferenceRequest, Json};

/// The body, as `/v1/chat/completions` and `/v1/completions` take it.
#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    messages: Option<&'a Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repetition_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logit_bias: Option<&'a Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Logprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tools: Option<&'a Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_choice: Option<&'a Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_format: Option<&'a Json>,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

/// Of the chat API whether, of the text API how many.
#[derive(Serialize)]
#[serde(untagged)]
enum Logprobs {
    Wanted(bool),
    Many(i64),
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// Writes the body for a server that calls the model `model`. `stream`: the answer is wanted as it comes.
///
/// # Errors
/// INTERNAL_ERROR: it cannot be written.
pub(super) fn body(request: &InferenceRequest, model: &str, stream: bool) -> Result<Vec<u8>, ControllerError> {
    let is_chat = request.messages.is_some();
    let set = |json: &'_ Option<Json>| json.as_ref().is_some_and(|json| !matches!(json.text(), "null" | "[]"));
    let tools = request.tools.as_ref().filter(|_| set(&request.tools));
    let body = Body {
        model,
        messages: request.messages.as_ref(),
        prompt: request.prompt.as_deref(),
        max_tokens: request.max_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        min_p: request.min_p,
        seed: request.seed,
        stop: request.stop.as_deref().filter(|stop| !stop.is_empty()),
        repetition_penalty: request.repetition_penalty,
        presence_penalty: request.presence_penalty,
        frequency_penalty: request.frequency_penalty,
        logit_bias: request.logit_bias.as_ref().filter(|_| set(&request.logit_bias)),
        logprobs: request.logprobs.map(|many| if is_chat { Logprobs::Wanted(true) } else { Logprobs::Many(many) }),
        top_logprobs: request.logprobs.filter(|many| is_chat && *many > 0),
        tools,
        // Servers refuse a choice among nothing.
        tool_choice: request.tool_choice.as_ref().filter(|_| tools.is_some() && set(&request.tool_choice)),
        response_format: request.response_format.as_ref().filter(|_| set(&request.response_format)),
        stream,
        stream_options: stream.then_some(StreamOptions { include_usage: true }),
    };
    serde_json::to_vec(&body)
        .map_err(|error| ControllerError::new(ControllerErrorCode::InternalError, format!("cannot encode the request: {error}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used)]

    use serde_json::{Value, json};

    use super::*;

    fn written(request: Value) -> Value {
        let request: InferenceRequest = serde_json::from_value(request).expect("a request");
        serde_json::from_slice(&body(&request, "theirs", true).expect("a body")).expect("JSON")
    }

    #[test]
    fn only_what_is_set_is_sent() {
        let messages = json!([{"role": "user", "content": "Hello"}]);
        let chat = written(json!({"requestId": "r", "modelId": "ours", "messages": messages, "tools": [], "toolChoice": "auto",
            "responseFormat": null, "stop": [], "sessionId": "s", "priority": "high"}));
        let wanted = json!({"model": "theirs", "messages": messages, "stream": true, "stream_options": {"include_usage": true}});
        assert_eq!(chat, wanted);
        let text = written(json!({"requestId": "r", "modelId": "ours", "prompt": "Once"}));
        assert_eq!(text["prompt"], "Once");
        assert!(text.get("messages").is_none());
    }

    #[test]
    fn an_answer_may_be_wanted_in_one_piece() {
        let request = serde_json::from_value(json!({"requestId": "r", "modelId": "ours", "prompt": "Once"})).expect("a request");
        let sent: Value = serde_json::from_slice(&body(&request, "theirs", false).expect("a body")).expect("JSON");
        assert_eq!(sent, json!({"model": "theirs", "prompt": "Once", "stream": false}));
    }

    #[test]
    fn everything_that_is_set_is_sent() {
        let said = written(json!({"requestId": "r", "modelId": "ours", "messages": [{"role": "user", "content": "x"}],
            "maxTokens": 5, "temperature": 0.5, "topP": 0.9, "topK": 3, "minP": 0.1, "seed": 7, "stop": ["a"],
            "repetitionPenalty": 1.1, "presencePenalty": 0.2, "frequencyPenalty": 0.3, "logitBias": {"1": 2}, "logprobs": 2,
            "tools": [{"type": "function"}], "toolChoice": "auto", "responseFormat": {"type": "json_object"}}));
        for (key, value) in [
            ("max_tokens", json!(5)),
            ("temperature", json!(0.5)),
            ("top_p", json!(0.9)),
            ("top_k", json!(3)),
            ("min_p", json!(0.1)),
            ("seed", json!(7)),
            ("stop", json!(["a"])),
            ("repetition_penalty", json!(1.1)),
            ("presence_penalty", json!(0.2)),
            ("frequency_penalty", json!(0.3)),
            ("logit_bias", json!({"1": 2})),
            ("logprobs", json!(true)),
            ("top_logprobs", json!(2)),
            ("tools", json!([{"type": "function"}])),
            ("tool_choice", json!("auto")),
            ("response_format", json!({"type": "json_object"})),
        ] {
            assert_eq!(said[key], value, "{key}");
        }
    }

    #[test]
    fn the_text_api_counts_its_log_probabilities() {
        let text = written(json!({"requestId": "r", "modelId": "ours", "prompt": "Once", "logprobs": 3}));
        assert_eq!((&text["logprobs"], text.get("top_logprobs")), (&json!(3), None));
    }
}

//! What is read and written: the messages between controller and worker, and the OpenAI API.

use std::hint::black_box;
use std::sync::Arc;

use mlx_serving_router::openai::{Completion, CompletionCall, Endpoint, StreamEncoder};
use mlx_serving_router::wire::{Finish, FinishReason, InferenceRequest, Json, Reply, Token, Usage};

use crate::{Case, sound};

/// The name of a request, as long as the controller makes them.
const REQUEST_ID: &str = "0b0e7c1a-52d1-4c7e-9b1e-5a6c2d3e4f50";
const CREATED: u64 = 1_762_732_800;
pub const ANSWER: &str = "It takes the worker with the fewest requests in flight among those that are healthy and have the model; when \
                          one falls silent it asks another.";
const BATCH: [&str; 8] = ["It", " takes", " the", " worker", " with", " the", " fewest", " requests"];
const CHAT: &[u8] = br#"{"model": "model-a", "messages": [
    {"role": "system", "content": "You are a helpful assistant of few words."},
    {"role": "user", "content": "A small fleet of workers answers questions. Which of them gets the next one, and why?"}],
    "max_tokens": 64, "temperature": 0.7, "top_p": 0.95, "stream": true, "stream_options": {"include_usage": true}, "user": "u-1"}"#;

pub fn cases() -> Vec<Case> {
    let case = |name, times, run| Case { name, times, run };
    vec![
        case("wire/decode/token", 5_000, |times| decode(times, &token(7))),
        case("wire/decode/response", 4_000, |times| decode(times, &response())),
        case("wire/encode/token", 5_000, encode_token),
        case("wire/encode/request", 4_000, encode_request),
        case("openai/parse/chat", 1_000, parse),
        case("openai/encode/answer", 1_000, encode_answer),
        case("openai/encode/8_tokens", 1_000, encode_batches),
    ]
}

/// A piece of an answer.
pub fn token(index: u64) -> Reply {
    Reply::Token(Token { text: " token".into(), index, token_ids: vec![1_000].into(), logprobs: None })
}

/// A whole answer.
pub fn response() -> Reply {
    Reply::Response { text: ANSWER.into(), finish: finish(), logprobs: None }
}

/// How answers end here.
pub fn finish() -> Finish {
    Finish { reason: FinishReason::Stop, usage: usage(), tool_calls: None, latency_ms: 210.5 }
}

/// A question that wants its answer in one piece or as it comes.
pub fn request(stream: bool) -> InferenceRequest {
    let messages = serde_json::json!([{"role": "user", "content": "Which of them gets the next one, and why?"}]);
    InferenceRequest {
        request_id: REQUEST_ID.into(),
        model_id: "model-a".into(),
        messages: Some(sound(Json::from_value(&messages))),
        max_tokens: Some(64),
        session_id: Some("session-1".into()),
        stream,
        ..InferenceRequest::default()
    }
}

fn usage() -> Usage {
    Usage { prompt_tokens: 32, completion_tokens: 64, cached_tokens: 0 }
}

fn decode(times: u64, reply: &Reply) {
    let bytes = reply.encode(REQUEST_ID);
    for _ in 0..times {
        black_box(sound(Reply::decode(black_box(&bytes))));
    }
}

fn encode_token(times: u64) {
    let token = token(7);
    for _ in 0..times {
        black_box(black_box(&token).encode(REQUEST_ID));
    }
}

fn encode_request(times: u64) {
    let request = request(true);
    for _ in 0..times {
        black_box(sound(serde_json::to_vec(black_box(&request))));
    }
}

fn call() -> CompletionCall {
    sound(CompletionCall::parse(Endpoint::Chat, black_box(CHAT), REQUEST_ID, None))
}

fn parse(times: u64) {
    for _ in 0..times {
        black_box(call());
    }
}

fn encode_answer(times: u64) {
    let call = call();
    let completion = Completion {
        model: "model-a",
        text: ANSWER,
        finish_reason: FinishReason::Stop,
        usage: usage(),
        tool_calls: None,
        logprobs: None,
    };
    for _ in 0..times {
        black_box(sound(call.encode(black_box(&completion), CREATED)));
    }
}

/// Eight tokens that came together, as one write.
fn encode_batches(times: u64) {
    let mut encoder = StreamEncoder::new(Arc::new(call()), CREATED);
    for _ in 0..times {
        black_box(encoder.tokens(black_box(BATCH).map(|text| (text, None))));
    }
}

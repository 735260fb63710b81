//! The OpenAI API: bytes in, bytes out.
//!
//! A body becomes a [`CompletionCall`]: the request that the fleet understands and what its answer has to look like.
//! Answers, streams, lists of models and errors become bytes again. One codec for every front-end: it knows the API's
//! names and shapes and does no I/O; the time of creation comes in, and who answers is none of its business. What the fleet has no
//! words for becomes a [`RelayedCall`], of which only what routing needs is read.

mod body;
mod completion;
mod error;
mod logprobs;
mod messages;
mod models;
mod relayed;
mod request;
mod stream;
mod tool_calls;

pub use completion::Completion;
pub use error::{ErrorAnswer, error_body};
pub use models::{model, models};
pub use relayed::{RelayedCall, relayed_error};
pub use request::{CompletionCall, Endpoint};
pub use stream::StreamEncoder;

use serde::Serialize;

/// Adds a value as JSON. Texts, numbers and what was parsed before: nothing that is written here can fail to be.
fn append<T: Serialize>(out: &mut Vec<u8>, value: &T) {
    let written = serde_json::to_writer(out, value);
    debug_assert!(written.is_ok(), "{written:?}");
}

/// A value as JSON.
fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    append(&mut out, value);
    out
}

//! A whole answer.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::telemetry::RequestMetadata;
use crate::wire::{FinishReason, Json, Usage, WorkerId};

/// The answer to a request, and how it came about.
#[derive(Clone, PartialEq)]
pub struct Answer {
    /// The request.
    pub request_id: Arc<str>,
    /// The model that answered.
    pub model_id: Arc<str>,
    /// The worker that answered.
    pub worker_id: WorkerId,
    /// The text, whole also after a stream.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What it cost.
    pub usage: Usage,
    /// The functions that the model wants called, in the OpenAI API's shape.
    pub tool_calls: Option<Json>,
    /// Log probabilities, in the OpenAI API's shape; of a stream they went with its tokens.
    pub logprobs: Option<Json>,
    /// How it came about; final.
    pub metadata: Arc<RequestMetadata>,
}

/// Of the text the size alone: answers are never printed.
impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer")
            .field("request_id", &self.request_id)
            .field("model_id", &self.model_id)
            .field("worker_id", &self.worker_id)
            .field("text", &format_args!("<{} bytes>", self.text.len()))
            .field("finish_reason", &self.finish_reason)
            .field("usage", &self.usage)
            .finish_non_exhaustive()
    }
}

/// The log probabilities of an answer that is put together from its tokens.
#[derive(Default)]
pub(super) struct Logprobs(Vec<Box<RawValue>>);

#[derive(Default, Serialize, Deserialize)]
struct Content {
    #[serde(default)]
    content: Vec<Box<RawValue>>,
}

// === impl Logprobs ===

impl Logprobs {
    /// Those of the next token. What is in no shape that could be meant is left out.
    pub(super) fn add(&mut self, logprobs: Option<Json>) {
        if let Some(logprobs) = logprobs {
            self.0.extend(logprobs.read::<Content>().unwrap_or_default().content);
        }
    }

    /// All together, in the OpenAI API's shape.
    pub(super) fn whole(self) -> Option<Json> {
        if self.0.is_empty() { None } else { Json::from_value(&Content { content: self.0 }).ok() }
    }
}

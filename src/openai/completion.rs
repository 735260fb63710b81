//! A whole answer.

use serde::Serialize;

use super::encode;
use super::logprobs::{ChatLogprobs, TextLogprobs};
use super::request::{CompletionCall, Endpoint};
use super::tool_calls::{self, ToolCall};
use crate::error::ControllerError;
use crate::wire::{FinishReason, Json, Usage};

/// An answer of the fleet, as the codec needs it.
#[derive(Clone, Copy)]
pub struct Completion<'a> {
    /// The model that answered.
    pub model: &'a str,
    /// The text.
    pub text: &'a str,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What it cost.
    pub usage: Usage,
    /// The functions that the model wants called.
    pub tool_calls: Option<&'a Json>,
    /// Log probabilities in the chat API's shape.
    pub logprobs: Option<&'a Json>,
}

/// What stands around the choices, in answers and in chunks.
#[derive(Serialize)]
pub(super) struct Envelope<'a, C> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: C,
    /// Outer none: no such key. Inner none: null, as streams with usage have it in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<UsageBody>>,
}

/// What an answer cost, in the API's words.
#[derive(Clone, Copy, Serialize)]
pub(super) struct UsageBody {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokens,
}

#[derive(Clone, Copy, Serialize)]
struct PromptTokens {
    cached_tokens: u64,
}

/// A choice of `text_completion`, whole or in a chunk.
#[derive(Serialize)]
pub(super) struct TextChoice<'a> {
    pub index: u8,
    pub text: &'a str,
    pub logprobs: Option<TextLogprobs>,
    pub finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u8,
    message: ChatMessage<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct ChatMessage<'a> {
    role: &'static str,
    content: Option<&'a str>,
    refusal: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tool_calls: &'a [ToolCall],
}

// === impl CompletionCall ===

impl CompletionCall {
    /// The answer in one piece. `created` is in seconds since the epoch.
    ///
    /// # Errors
    /// WORKER_UNAVAILABLE: the worker's tool calls are in no shape that could be meant.
    pub fn encode(&self, completion: &Completion<'_>, created: u64) -> Result<Vec<u8>, ControllerError> {
        let id = &self.answer_id();
        let model = completion.model;
        let logprobs = ChatLogprobs::read(completion.logprobs);
        let usage = Some(Some(completion.usage.into()));
        Ok(match self.endpoint {
            Endpoint::Text => {
                let choice = TextChoice {
                    index: 0,
                    text: completion.text,
                    logprobs: logprobs.map(|logprobs| logprobs.into_text(&mut 0)),
                    finish_reason: Some(self.finish_reason(completion.finish_reason, &[])),
                };
                encode(&Envelope { id, object: "text_completion", created, model, choices: [choice], usage })
            }
            Endpoint::Chat => {
                let tool_calls = &tool_calls::read(completion.tool_calls, &self.request.request_id)?[..];
                let content = Some(completion.text).filter(|text| !text.is_empty() || tool_calls.is_empty());
                let choice = ChatChoice {
                    index: 0,
                    message: ChatMessage { role: "assistant", content, refusal: None, tool_calls },
                    logprobs,
                    finish_reason: self.finish_reason(completion.finish_reason, tool_calls),
                };
                encode(&Envelope { id, object: "chat.completion", created, model, choices: [choice], usage })
            }
        })
    }

    /// The reason in the API's words: calls are announced exactly where there are some. Streams say the same.
    pub(super) fn finish_reason(&self, reason: FinishReason, tool_calls: &[ToolCall]) -> &'static str {
        match reason {
            FinishReason::Length => FinishReason::Length,
            FinishReason::Stop | FinishReason::ToolCalls if tool_calls.is_empty() => FinishReason::Stop,
            FinishReason::Stop | FinishReason::ToolCalls => FinishReason::ToolCalls,
        }
        .as_str()
    }
}

// === impl UsageBody ===

impl From<Usage> for UsageBody {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.total_tokens(),
            prompt_tokens_details: PromptTokens { cached_tokens: usage.cached_tokens },
        }
    }
}

//! What a server answers, event by event or in one piece, as the replies of a worker.
//!
//! A chunk with text is a token, whatever it holds: servers do not say how many it took until the end, where `usage` does. Text
//! that a server sets apart as reasoning is no part of the answer; it passes as tokens without text, so that limits see that
//! the worker is at work. Pure: bytes in, replies out.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::refusal;
use super::sse::Event;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::{ANSWER_MOST, Finish, FinishReason, Json, Reply, Token, TokenIds, Usage};

/// Events in one answer that may be in no shape that is known before it is given up.
const MALFORMED_MOST: u32 = 16;
/// How the key of the text looks. In a text of JSON it would stand between backslashes.
const CHOICES: &[u8] = b"\"choices\"";
/// Calls of tools in one answer, and bytes of their arguments together.
const CALLS_MOST: usize = 128;
const ARGUMENTS_MOST: usize = 1 << 20;

/// What is known of an answer so far.
#[derive(Default)]
pub(super) struct Answer {
    /// The place of the next token.
    next: u64,
    /// Bytes of the tokens so far.
    size: usize,
    reason: Option<FinishReason>,
    usage: Option<Usage>,
    calls: Vec<Call>,
    arguments: usize,
    malformed: u32,
    /// The server said that nothing follows.
    is_done: bool,
}

/// A call of a tool, as far as it is known.
#[derive(Serialize)]
struct Call {
    #[serde(skip)]
    index: u64,
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: Function,
}

#[derive(Serialize)]
struct Function {
    name: String,
    arguments: String,
}

/// An event, or a whole answer.
///
/// What stands beside the text is left out where it cannot be read; the text never is.
#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(default, deserialize_with = "if_readable")]
    object: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(default, deserialize_with = "if_readable")]
    usage: Option<Counts>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default, deserialize_with = "if_readable")]
    index: Option<u64>,
    #[serde(borrow, default, alias = "message")]
    delta: Option<Delta<'a>>,
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
    #[serde(default)]
    logprobs: Option<Json>,
    #[serde(borrow, default, deserialize_with = "if_readable")]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow, default)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "if_readable")]
    reasoning: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "if_readable")]
    reasoning_content: Option<Cow<'a, str>>,
    #[serde(default)]
    tool_calls: Option<Vec<CallPart>>,
}

#[derive(Deserialize)]
struct CallPart {
    #[serde(default, deserialize_with = "if_readable")]
    index: Option<u64>,
    #[serde(default, deserialize_with = "if_readable")]
    id: Option<String>,
    #[serde(default)]
    function: Option<FunctionPart>,
}

#[derive(Deserialize)]
struct FunctionPart {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    arguments: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Counts {
    #[serde(default, deserialize_with = "if_readable")]
    prompt_tokens: Option<u64>,
    #[serde(default, deserialize_with = "if_readable")]
    completion_tokens: Option<u64>,
    #[serde(default, deserialize_with = "if_readable")]
    prompt_tokens_details: Option<PromptCounts>,
}

#[derive(Deserialize)]
struct PromptCounts {
    #[serde(default, deserialize_with = "if_readable")]
    cached_tokens: Option<u64>,
}

/// The text API's log probabilities.
#[derive(Deserialize)]
struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    #[serde(default)]
    top_logprobs: Option<Vec<Option<BTreeMap<String, f64>>>>,
}

/// The chat API's, which workers send.
#[derive(Serialize)]
struct ChatLogprobs {
    content: Vec<TokenLogprob>,
}

#[derive(Serialize)]
struct TokenLogprob {
    token: String,
    logprob: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_logprobs: Vec<TokenLogprob>,
}

// === impl Answer ===

impl Answer {
    /// Takes an event; gives the piece of the answer that it is, if it is one.
    ///
    /// # Errors
    /// The server's own, or that it broke the protocol.
    pub(super) fn event(&mut self, event: &Event<'_>) -> Result<Option<Token>, ControllerError> {
        if event.data.trim_ascii() == b"[DONE]" {
            self.is_done = true;
            return Ok(None);
        }
        let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(event.data) else {
            return if event.is_error { Err(refusal::by_object(&text_or_object(event.data))) } else { self.skip(event.data) };
        };
        if let Some(error) = chunk.error(event.data, event.is_error) {
            return Err(refusal::by_object(&error));
        }
        self.note(chunk.usage);
        let Some(choice) = chunk.choices.into_iter().flatten().find(Choice::is_ours) else { return Ok(None) };
        let mut text = choice.text;
        let mut is_at_work = false;
        if let Some(delta) = choice.delta {
            is_at_work = [delta.reasoning, delta.reasoning_content].iter().flatten().any(|thought| !thought.is_empty());
            text = delta.content.or(text);
            for part in delta.tool_calls.into_iter().flatten() {
                is_at_work = true;
                self.call(part)?;
            }
        }
        if let Some(reason) = choice.finish_reason {
            self.reason = Some(read_reason(&reason)?);
        }
        let text = text.filter(|text| !text.is_empty());
        if text.is_none() && !is_at_work {
            return Ok(None);
        }
        let index = self.next;
        self.next += 1;
        let logprobs = choice.logprobs.and_then(chat_logprobs);
        let token = Token { text: text.map(Cow::into_owned).unwrap_or_default(), index, token_ids: TokenIds::new(), logprobs };
        // Looked at here as well as by whoever reads: a mailbox is bounded by their number, and each may be as long as a line.
        self.size += token.size();
        if self.size > ANSWER_MOST {
            return Err(protocol_error("its answer does not end"));
        }
        Ok(Some(token))
    }

    /// Whether only counts can follow.
    pub(super) fn is_finished(&self) -> bool {
        self.reason.is_some()
    }

    /// Whether the server said that nothing follows.
    pub(super) fn is_done(&self) -> bool {
        self.is_done
    }

    /// The end of it: the server said so, or the body is over.
    ///
    /// # Errors
    /// WORKER_UNAVAILABLE: the body is over and the answer is not.
    pub(super) fn end(&mut self, latency: Duration) -> Result<Finish, ControllerError> {
        if self.reason.is_none() && !self.is_done {
            return Err(protocol_error("its answer ended before it was finished"));
        }
        let mut usage = self.usage.unwrap_or_default();
        if usage.completion_tokens == 0 {
            usage.completion_tokens = self.next;
        }
        let tool_calls = (!self.calls.is_empty()).then(|| Json::from_value(&self.calls).ok()).flatten();
        let default = if tool_calls.is_some() { FinishReason::ToolCalls } else { FinishReason::Stop };
        Ok(Finish { reason: self.reason.unwrap_or(default), usage, tool_calls, latency_ms: latency.as_secs_f64() * 1_000.0 })
    }

    /// Takes a whole answer, which some servers give to whoever wants a stream.
    ///
    /// # Errors
    /// As [`Self::event`].
    pub(super) fn whole(mut self, body: &[u8], latency: Duration) -> Result<Reply, ControllerError> {
        let no_answer = || protocol_error("what it sent is no answer");
        let chunk: Chunk<'_> = serde_json::from_slice(body).map_err(|_| no_answer())?;
        if let Some(error) = chunk.error(body, false) {
            return Err(refusal::by_object(&error));
        }
        self.note(chunk.usage);
        let choice = chunk.choices.into_iter().flatten().find(Choice::is_ours).ok_or_else(no_answer)?;
        self.reason = Some(choice.finish_reason.map_or(Ok(FinishReason::Stop), |reason| read_reason(&reason))?);
        let mut text = choice.text;
        if let Some(message) = choice.delta {
            text = message.content.or(text);
            for (place, part) in (0..).zip(message.tool_calls.into_iter().flatten()) {
                self.call(CallPart { index: Some(place), ..part })?;
            }
        }
        let logprobs = choice.logprobs.and_then(chat_logprobs);
        Ok(Reply::Response { text: text.unwrap_or_default().into_owned(), finish: self.end(latency)?, logprobs })
    }

    fn note(&mut self, counts: Option<Counts>) {
        if let Some(counts) = counts {
            self.usage = Some(Usage {
                prompt_tokens: counts.prompt_tokens.unwrap_or(0),
                completion_tokens: counts.completion_tokens.unwrap_or(0),
                cached_tokens: counts.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or(0),
            });
        }
    }

    /// Passes over an event that cannot be read, unless there may be text in it: an answer has no holes.
    fn skip(&mut self, data: &[u8]) -> Result<Option<Token>, ControllerError> {
        if data.windows(CHOICES.len()).any(|window| window == CHOICES) {
            return Err(protocol_error("a piece of its answer cannot be read"));
        }
        self.malformed += 1;
        if self.malformed > MALFORMED_MOST {
            return Err(protocol_error("too much of its answer is in no shape that could be meant"));
        }
        Ok(None)
    }

    /// A part of a call belongs to the one with its index; without one, to the last, unless it names another.
    fn call(&mut self, part: CallPart) -> Result<(), ControllerError> {
        let last = self.calls.last();
        let is_new = last.is_none_or(|last| part.id.as_ref().is_some_and(|id| !id.is_empty() && *id != last.id));
        let index = part.index.unwrap_or_else(|| last.map_or(0, |last| last.index.saturating_add(u64::from(is_new))));
        let place = self.calls.iter().position(|call| call.index == index).unwrap_or_else(|| {
            let function = Function { name: String::new(), arguments: String::new() };
            self.calls.push(Call { index, id: String::new(), kind: "function", function });
            self.calls.len() - 1
        });
        let call = &mut self.calls[place];
        if let Some(id) = part.id.filter(|id| !id.is_empty()) {
            call.id = id;
        }
        if let Some(function) = part.function {
            if let Some(name) = function.name.filter(|name| !name.is_empty()) {
                call.function.name = name;
            }
            if let Some(raw) = function.arguments.filter(|raw| raw.get() != "null") {
                // A text of JSON; some servers send what it would say.
                let text: Cow<'_, str> = serde_json::from_str::<String>(raw.get()).map_or(raw.get().into(), Into::into);
                self.arguments += text.len();
                call.function.arguments.push_str(&text);
            }
        }
        if self.calls.len() > CALLS_MOST || self.arguments > ARGUMENTS_MOST {
            return Err(protocol_error("it calls more tools than could be meant"));
        }
        Ok(())
    }
}

// === impl Chunk ===

impl Chunk<'_> {
    /// The error that it is instead of a part of an answer.
    fn error(&self, data: &[u8], is_error: bool) -> Option<Value> {
        match &self.error {
            Some(error) if !error.is_null() => Some(error.clone()),
            _ if is_error || self.object.as_deref() == Some("error") => Some(text_or_object(data)),
            _ => None,
        }
    }
}

// === impl Choice ===

impl Choice<'_> {
    /// One answer is asked for.
    fn is_ours(&self) -> bool {
        self.index.unwrap_or(0) == 0
    }
}

/// A value, or nothing where it is of another kind.
pub(super) fn if_readable<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    let raw: &'de RawValue = Deserialize::deserialize(from)?;
    Ok(serde_json::from_str(raw.get()).ok())
}

/// Why an answer ended.
///
/// # Errors
/// WORKER_UNAVAILABLE: the server itself broke it off.
fn read_reason(reason: &str) -> Result<FinishReason, ControllerError> {
    match reason {
        "abort" | "error" => Err(ControllerError::new(ControllerErrorCode::WorkerUnavailable, "the worker broke its answer off")
            .with("finishReason", reason)),
        "function_call" => Ok(FinishReason::ToolCalls),
        reason => Ok(FinishReason::parse(reason).unwrap_or_default()),
    }
}

fn text_or_object(data: &[u8]) -> Value {
    serde_json::from_slice(data).unwrap_or_else(|_| String::from_utf8_lossy(data).into_owned().into())
}

/// The chat API's as they are, the text API's in its shape; nothing where there are none.
fn chat_logprobs(given: Json) -> Option<Json> {
    if given.text() == "null" {
        return None;
    }
    let Ok(text) = given.read::<TextLogprobs>() else { return Some(given) };
    let mut alternatives = text.top_logprobs.unwrap_or_default().into_iter();
    let content = text.tokens.into_iter().zip(text.token_logprobs).map(|(token, logprob)| {
        let others = alternatives.next().flatten().unwrap_or_default().into_iter();
        let top_logprobs = others.map(|(token, logprob)| TokenLogprob { token, logprob, top_logprobs: Vec::new() }).collect();
        TokenLogprob { token, logprob: logprob.unwrap_or(0.0), top_logprobs }
    });
    Json::from_value(&ChatLogprobs { content: content.collect() }).ok()
}

pub(super) fn protocol_error(what: &str) -> ControllerError {
    ControllerError::new(ControllerErrorCode::WorkerUnavailable, format!("the worker broke the protocol: {what}"))
        .with("protocolError", what)
}

#[cfg(test)]
mod tests;

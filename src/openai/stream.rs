//! An answer as it comes: server-sent events, `data:` lines alone.
//!
//! A stream that ends well ends with a finish reason and `[DONE]`. One that breaks ends with an error frame and without
//! them: clients take a stream that is merely cut for a success.

use std::sync::Arc;

use serde::Serialize;

use super::append;
use super::completion::{Completion, Envelope, TextChoice, UsageBody};
use super::error::ErrorAnswer;
use super::logprobs::ChatLogprobs;
use super::request::{CompletionCall, Endpoint};
use super::tool_calls::{self, ToolCall};
use crate::error::ControllerError;
use crate::wire::Json;

/// Writes one stream. Each method gives the bytes of one write.
pub struct StreamEncoder {
    call: Arc<CompletionCall>,
    id: String,
    model: String,
    created: u64,
    /// Whether the first chunk, which names the role, has been written.
    begun: bool,
    /// Characters written so far: where the next token's log probabilities begin.
    offset: usize,
    /// What stands around the text of a chunk that has nothing else to say, written once.
    plain: Option<Plain>,
}

struct Plain {
    before: Vec<u8>,
    after: Vec<u8>,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u8,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[ToolCallDelta<'a>; 1]>,
}

#[derive(Serialize)]
struct ToolCallDelta<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

// === impl StreamEncoder ===

impl StreamEncoder {
    /// The writer of a call's stream. `created` is in seconds since the epoch.
    #[must_use]
    pub fn new(call: Arc<CompletionCall>, created: u64) -> Self {
        let (id, model) = (call.answer_id(), call.request.model_id.clone());
        Self { call, id, model, created, begun: false, offset: 0, plain: None }
    }

    /// The model that answers, where it is not the one that was asked for. What is written from now on names it.
    pub fn answered_by(&mut self, model: &str) {
        if self.model != model {
            model.clone_into(&mut self.model);
            self.plain = None;
        }
    }

    /// Pieces of the answer, each with its log probabilities: one chunk each, none for a piece without text of its own.
    pub fn tokens<'a>(&mut self, tokens: impl IntoIterator<Item = (&'a str, Option<&'a Json>)>) -> Vec<u8> {
        let tokens = tokens.into_iter();
        let mut out = Vec::with_capacity(256 * (tokens.size_hint().0 + 1));
        self.begin(&mut out);
        for (text, logprobs) in tokens {
            let logprobs = ChatLogprobs::read(logprobs);
            if !text.is_empty() || logprobs.is_some() {
                self.piece(&mut out, text, logprobs);
            }
        }
        out
    }

    /// The end of the answer: tool calls, finish reason, usage where it was asked for, `[DONE]`.
    ///
    /// Where the worker's tool calls are in no shape that could be meant, the stream ends with that error.
    pub fn finish(&mut self, completion: &Completion<'_>) -> Vec<u8> {
        let mut out = Vec::with_capacity(1024);
        self.begin(&mut out);
        match self.call.endpoint {
            Endpoint::Chat => {
                let calls = match tool_calls::read(completion.tool_calls, &self.call.request.request_id) {
                    Ok(calls) => calls,
                    Err(error) => return self.error(&error),
                };
                for (index, call) in calls.iter().enumerate() {
                    self.tool_call(&mut out, index, call);
                }
                let reason = self.call.finish_reason(completion.finish_reason, &calls);
                self.chat(&mut out, Delta::default(), None, Some(reason));
            }
            Endpoint::Text => {
                let reason = self.call.finish_reason(completion.finish_reason, &[]);
                self.text(&mut out, "", None, Some(reason));
            }
        }
        if self.call.include_usage {
            let none: [(); 0] = [];
            frame(&mut out, &self.envelope(none, Some(completion.usage.into())));
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
        out
    }

    /// The end of a stream that broke: clients raise the error.
    pub fn error(&mut self, error: &ControllerError) -> Vec<u8> {
        let mut out = b"data: ".to_vec();
        out.extend_from_slice(&ErrorAnswer::from(error).body);
        out.extend_from_slice(b"\n\n");
        out
    }

    /// A sign of life: a chunk without text; the first one names the role.
    pub fn keepalive(&mut self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        if self.begun || self.call.endpoint == Endpoint::Text {
            self.piece(&mut out, "", None);
        } else {
            self.begin(&mut out);
        }
        out
    }

    fn begin(&mut self, out: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.begun, true) && self.call.endpoint == Endpoint::Chat {
            self.chat(out, Delta { role: Some("assistant"), content: Some(""), tool_calls: None }, None, None);
        }
    }

    fn piece(&mut self, out: &mut Vec<u8>, text: &str, logprobs: Option<ChatLogprobs>) {
        if logprobs.is_some() {
            return self.whole_piece(out, text, logprobs);
        }
        let plain = match self.plain.take() {
            Some(plain) => plain,
            None => self.plain(),
        };
        out.extend_from_slice(&plain.before);
        append(out, &text);
        out.extend_from_slice(&plain.after);
        self.plain = Some(plain);
    }

    fn whole_piece(&mut self, out: &mut Vec<u8>, text: &str, logprobs: Option<ChatLogprobs>) {
        match self.call.endpoint {
            Endpoint::Chat => self.chat(out, Delta { content: Some(text), ..Delta::default() }, logprobs, None),
            Endpoint::Text => self.text(out, text, logprobs, None),
        }
    }

    /// A chunk, cut where its text stands.
    fn plain(&mut self) -> Plain {
        // No name of a model or a request has such a character.
        const TEXT: &str = "\0";
        const WRITTEN: &[u8] = br#""\u0000""#;
        let mut chunk = Vec::with_capacity(256);
        self.whole_piece(&mut chunk, TEXT, None);
        let at = chunk.windows(WRITTEN.len()).position(|part| part == WRITTEN).unwrap_or(chunk.len());
        let after = chunk.get(at + WRITTEN.len()..).unwrap_or_default().to_vec();
        chunk.truncate(at);
        Plain { before: chunk, after }
    }

    /// Id and name come first, the arguments after them.
    fn tool_call(&self, out: &mut Vec<u8>, index: usize, call: &ToolCall) {
        let opening = ToolCallDelta {
            index,
            id: Some(&call.id),
            kind: Some(call.kind),
            function: FunctionDelta { name: Some(&call.function.name), arguments: "" },
        };
        let arguments = FunctionDelta { name: None, arguments: &call.function.arguments };
        let rest = ToolCallDelta { index, id: None, kind: None, function: arguments };
        for part in [opening, rest] {
            self.chat(out, Delta { tool_calls: Some([part]), ..Delta::default() }, None, None);
        }
    }

    fn chat(&self, out: &mut Vec<u8>, delta: Delta<'_>, logprobs: Option<ChatLogprobs>, finish_reason: Option<&'static str>) {
        frame(out, &self.envelope([ChatChoice { index: 0, delta, logprobs, finish_reason }], None));
    }

    fn text(&mut self, out: &mut Vec<u8>, text: &str, logprobs: Option<ChatLogprobs>, finish_reason: Option<&'static str>) {
        let logprobs = logprobs.map(|logprobs| logprobs.into_text(&mut self.offset));
        frame(out, &self.envelope([TextChoice { index: 0, text, logprobs, finish_reason }], None));
    }

    fn envelope<C>(&self, choices: C, usage: Option<UsageBody>) -> Envelope<'_, C> {
        Envelope {
            id: &self.id,
            object: match self.call.endpoint {
                Endpoint::Chat => "chat.completion.chunk",
                Endpoint::Text => "text_completion",
            },
            created: self.created,
            model: &self.model,
            choices,
            usage: self.call.include_usage.then_some(usage),
        }
    }
}

/// One event. What serde writes has no line breaks of its own, so it stays one `data:` line.
fn frame<T: Serialize>(out: &mut Vec<u8>, value: &T) {
    out.extend_from_slice(b"data: ");
    append(out, value);
    out.extend_from_slice(b"\n\n");
}

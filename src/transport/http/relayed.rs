//! An answer in the OpenAI API's own words, handed on as it came.
//!
//! Read of it is only what says whether there is such an endpoint, whether the answer is complete, and what it cost: an answer that was
//! cut must not be taken for one. Events of a stream are written anew, one `data` line for each of theirs, so that what reaches a
//! client is whole events. Those that come before the server has begun to answer are kept until it has: up to then another server may
//! be asked.

use std::borrow::Cow;

use hyper::Response;
use hyper::body::{Body, Incoming};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::answer::{if_readable, protocol_error};
use super::exchange::{broken, collect, data};
use super::refusal;
use super::server::Server;
use super::sse::Decoder;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::transport::{Delivery, Postbox};
use crate::wire::{ANSWER_MOST, Finish, RelayedTo, Reply, Token, TokenIds, Usage};

/// The longest answer in one piece: some two thousand embeddings of four thousand numbers each.
const WHOLE_MOST: usize = 64 << 20;
/// So much is kept of the events before the first word.
const PREFACE_MOST: usize = 256 * 1024;

/// An answer in one piece.
#[derive(Deserialize)]
struct Whole<'a> {
    #[serde(borrow, default, deserialize_with = "if_readable")]
    object: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "if_readable")]
    status: Option<Cow<'a, str>>,
    #[serde(default)]
    usage: Value,
    #[serde(default)]
    error: Value,
}

/// An event of a stream.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, default, rename = "type", deserialize_with = "if_readable")]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    response: Option<&'a RawValue>,
}

/// What the last event says of the answer.
#[derive(Default, Deserialize)]
struct Outcome {
    #[serde(default)]
    usage: Value,
    #[serde(default)]
    error: Value,
}

/// An answer that came in one piece.
struct Gathered {
    text: String,
    finish: Finish,
    /// The event that it would end with as a stream.
    end: &'static str,
}

/// A stream on its way to its reader.
struct Relay<'a> {
    postbox: &'a Postbox,
    /// The place of the next token.
    index: u64,
    /// Bytes of the events so far.
    size: usize,
    /// Events from before the answer began.
    preface: String,
}

/// Reads an answer in one piece.
pub(super) async fn whole(to: RelayedTo, response: Response<Incoming>) -> Result<Reply, ControllerError> {
    let Gathered { text, finish, .. } = gather(to, Vec::new(), response.into_body()).await?;
    Ok(Reply::Response { text, finish, logprobs: None })
}

/// Reads a stream, and posts its events. Gives its end, and what may be left of the body.
pub(super) async fn events(
    to: RelayedTo,
    server: &Server,
    response: Response<Incoming>,
    postbox: &Postbox,
) -> Result<(Reply, Option<Incoming>), ControllerError> {
    let mut body = response.into_body();
    // The last event repeats the whole answer.
    let mut events = Decoder::with_longest(ANSWER_MOST);
    let mut relay = Relay { postbox, index: 0, size: 0, preface: String::new() };
    let (mut is_known, mut is_over) = (false, false);
    loop {
        match data(&mut body).await {
            Ok(Some(bytes)) => {
                server.heard();
                match bytes.iter().find(|byte| !byte.is_ascii_whitespace()).filter(|_| !is_known) {
                    Some(b'{') => {
                        let whole = gather(to, bytes.into(), body).await?;
                        relay.post(&only_event(&whole)).await?;
                        return Ok((Reply::Done(whole.finish), None));
                    }
                    Some(b'<') => return Err(protocol_error("it sent a page in place of an answer")),
                    first => is_known |= first.is_some(),
                }
                events.push(&bytes);
            }
            Ok(None) => {
                is_over = true;
                events.end();
            }
            Err(_) => return Err(broken()),
        }
        while let Some(event) = events.next().map_err(|_| too_large(ANSWER_MOST))? {
            if event.data.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let Event { kind, response } =
                read(event.data).ok_or_else(|| protocol_error("an event of its answer is no JSON object"))?;
            let kind = kind.unwrap_or_default();
            if kind == "error" || event.is_error {
                let said: Value = serde_json::from_slice(event.data).unwrap_or_default();
                return Err(refusal::by_object(said.get("error").filter(|error| error.is_object()).unwrap_or(&said)));
            }
            let text = written(&kind, event.data).ok_or_else(|| protocol_error("an event of its answer is not UTF-8"))?;
            let outcome = || response.and_then(|response| serde_json::from_str(response.get()).ok()).unwrap_or_default();
            match &*kind {
                "response.created" | "response.queued" | "response.in_progress" if relay.keeps(&text) => {}
                // Another server may do better.
                "response.failed" if relay.index == 0 => {
                    let Outcome { error, .. } = outcome();
                    return Err(refusal::by_object(&error));
                }
                "response.completed" | "response.incomplete" | "response.failed" | "response.cancelled" => {
                    relay.post(&text).await?;
                    let Outcome { usage, .. } = outcome();
                    let rest = (!body.is_end_stream()).then_some(body);
                    return Ok((Reply::Done(finish(&usage)), rest));
                }
                _ => relay.post(&text).await?,
            }
        }
        // A body may end by the end of its connection: what has said no last word is not complete.
        if is_over {
            return Err(broken());
        }
    }
}

/// The whole of an answer that begins so, and what it cost.
async fn gather(to: RelayedTo, begin: Vec<u8>, body: Incoming) -> Result<Gathered, ControllerError> {
    let mut bytes = begin;
    if !collect(body, WHOLE_MOST, &mut bytes).await {
        return Err(if bytes.len() >= WHOLE_MOST { too_large(WHOLE_MOST) } else { broken() });
    }
    let Whole { object, status, usage, error } = read(&bytes).ok_or_else(|| protocol_error("its answer is no JSON object"))?;
    let is_answer = object.as_ref().is_some_and(|object| object != "error");
    match error {
        // LM Studio answers so wherever it has nothing.
        Value::String(words) if !is_answer => return Err(ControllerError::no_endpoint(to.path(), Some(words))),
        error if !error.is_null() && (!is_answer || status.as_ref().is_some_and(|status| status == "failed")) => {
            return Err(refusal::by_object(&error));
        }
        _ => {}
    }
    let finish = finish(&usage);
    let end = match status.as_deref() {
        Some("incomplete") => "response.incomplete",
        Some("failed") => "response.failed",
        Some("cancelled") => "response.cancelled",
        _ => "response.completed",
    };
    let text = String::from_utf8(bytes).map_err(|_| protocol_error("its answer is not UTF-8"))?;
    Ok(Gathered { text, finish, end })
}

/// An object; lists would be read as its fields in their order.
fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    let is_object = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
    serde_json::from_slice(bytes).ok().filter(|_| is_object)
}

/// An event as it is handed on.
fn written(kind: &str, data: &[u8]) -> Option<String> {
    let data = std::str::from_utf8(data).ok()?;
    let mut text = String::with_capacity(kind.len() + data.len() + 32);
    if !kind.is_empty() && !kind.contains(['\r', '\n']) {
        text.extend(["event: ", kind, "\n"]);
    }
    for line in data.split('\n') {
        text.extend(["data: ", line, "\n"]);
    }
    text.push('\n');
    Some(text)
}

/// The only event of a stream whose server gave the answer in one piece.
fn only_event(whole: &Gathered) -> String {
    let (end, response) = (whole.end, whole.text.split(['\r', '\n']).collect::<String>());
    format!("event: {end}\ndata: {{\"type\":\"{end}\",\"sequence_number\":0,\"response\":{response}}}\n\n")
}

/// What it cost: embeddings count in the first words, responses in the others.
fn finish(usage: &Value) -> Finish {
    let count = |names: [&str; 2]| names.iter().find_map(|name| usage.pointer(name)?.as_u64()).unwrap_or(0);
    let usage = Usage {
        prompt_tokens: count(["/prompt_tokens", "/input_tokens"]),
        completion_tokens: count(["/completion_tokens", "/output_tokens"]),
        cached_tokens: count(["/prompt_tokens_details/cached_tokens", "/input_tokens_details/cached_tokens"]),
    };
    Finish { usage, ..Finish::default() }
}

/// Nobody's failure, and no other server's answer would be shorter.
fn too_large(most: usize) -> ControllerError {
    let what = format!("the answer has more than {} MiB; ask for less at a time", most >> 20);
    ControllerError::new(ControllerErrorCode::PayloadTooLarge, what)
}

// === impl Relay ===

impl Relay<'_> {
    /// Whether an event from before the answer is kept for later.
    fn keeps(&mut self, event: &str) -> bool {
        let keeps = self.index == 0 && self.preface.len() + event.len() <= PREFACE_MOST;
        if keeps {
            self.preface.push_str(event);
        }
        keeps
    }

    /// Posts an event, after those that were kept.
    async fn post(&mut self, event: &str) -> Result<(), ControllerError> {
        let text = std::mem::take(&mut self.preface) + event;
        // A mailbox is bounded by the number of tokens in it.
        self.size += text.len();
        if self.size > ANSWER_MOST {
            return Err(too_large(ANSWER_MOST));
        }
        let token = Token { text, index: self.index, token_ids: TokenIds::new(), logprobs: None };
        self.index += 1;
        // Nobody waits any more, or not for this.
        if self.postbox.post_in_time(Delivery::Reply(Reply::Token(token))).await { Ok(()) } else { Err(broken()) }
    }
}

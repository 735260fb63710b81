//! An answer in the OpenAI API's own words, handed on as it came.
//!
//! Read of it is only what says whether it is complete and what it cost: an answer that was cut must not be taken for one. Events of
//! a stream are written anew, one `data` line for each of theirs, so that what reaches a client is whole events.

use std::borrow::Cow;

use hyper::body::{Body, Incoming};
use hyper::header::HeaderMap;
use hyper::{Response, StatusCode, Uri};
use serde::Deserialize;
use serde_json::Value;

use super::answer::protocol_error;
use super::exchange::{broken, collect, data};
use super::refusal;
use super::server::Server;
use super::sse::Decoder;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::transport::{Delivery, Postbox};
use crate::wire::{ANSWER_MOST, Finish, RelayedTo, Reply, Token, TokenIds, Usage};

/// An answer in one piece.
#[derive(Deserialize)]
struct Whole<'a> {
    #[serde(borrow, default)]
    object: Option<Cow<'a, str>>,
    #[serde(default)]
    usage: Value,
    #[serde(default)]
    error: Value,
}

/// An event of a stream.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Cow<'a, str>>,
    #[serde(default)]
    response: Option<Cost>,
}

#[derive(Deserialize)]
struct Cost {
    #[serde(default)]
    usage: Value,
}

/// The error of an answer with another status than 200. A server that has no such endpoint is not asked for it again for a while.
pub(super) fn refused(
    server: &Server,
    to: RelayedTo,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    uri: &Uri,
) -> ControllerError {
    let error = refusal::by_status(status, headers, body, uri);
    if !matches!(status, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED) {
        return error;
    }
    // Who has it says in the API's words what else is not there, mostly the model.
    if error.code() != ControllerErrorCode::ModelNotFound {
        server.lacks(to);
    }
    let has_words = error.code() != ControllerErrorCode::WorkerUnavailable || status == StatusCode::NOT_IMPLEMENTED;
    let told = if has_words {
        ControllerError::in_workers_words(ControllerErrorCode::ModelNotFound, error.message().to_owned())
    } else {
        ControllerError::new(ControllerErrorCode::ModelNotFound, format!("the worker has no {}", to.path()))
    };
    told.with("endpoint", to.path()).with("httpStatus", status.as_u16())
}

/// Reads an answer in one piece.
pub(super) async fn whole(response: Response<Incoming>) -> Result<Reply, ControllerError> {
    let mut bytes = Vec::new();
    if !collect(response.into_body(), ANSWER_MOST, &mut bytes).await {
        return Err(if bytes.len() >= ANSWER_MOST { protocol_error("its answer does not end") } else { broken() });
    }
    let Whole { object, usage, error } = read(&bytes).ok_or_else(|| protocol_error("its answer is no JSON object"))?;
    // A response that failed has its error within.
    if !error.is_null() && object.is_none_or(|object| object == "error") {
        return Err(refusal::by_object(&error));
    }
    let finish = finish(&usage);
    let text = String::from_utf8(bytes).map_err(|_| protocol_error("its answer is not UTF-8"))?;
    Ok(Reply::Response { text, finish, logprobs: None })
}

/// Reads a stream, and posts its events. Gives its end, and what may be left of the body.
pub(super) async fn events(
    server: &Server,
    response: Response<Incoming>,
    postbox: &Postbox,
) -> Result<(Reply, Option<Incoming>), ControllerError> {
    let mut body = response.into_body();
    let mut events = Decoder::default();
    let mut index = 0;
    loop {
        match data(&mut body).await {
            Ok(Some(bytes)) => {
                server.heard();
                events.push(&bytes);
            }
            // A body may end by the end of its connection: what has said no last word is not complete.
            Ok(None) | Err(_) => return Err(broken()),
        }
        while let Some(event) = events.next().map_err(|_| protocol_error("a line of its answer does not end"))? {
            let Event { kind, response } =
                read(event.data).ok_or_else(|| protocol_error("an event of its answer is no JSON object"))?;
            let kind = kind.unwrap_or_default();
            if kind == "error" || event.is_error {
                let said: Value = serde_json::from_slice(event.data).unwrap_or_default();
                return Err(refusal::by_object(said.get("error").filter(|error| error.is_object()).unwrap_or(&said)));
            }
            let text = written(&kind, event.data).ok_or_else(|| protocol_error("an event of its answer is not UTF-8"))?;
            let token = Token { text, index, token_ids: TokenIds::new(), logprobs: None };
            index += 1;
            if !postbox.post_in_time(Delivery::Reply(Reply::Token(token))).await {
                return Err(broken());
            }
            if matches!(&*kind, "response.completed" | "response.incomplete" | "response.failed" | "response.cancelled") {
                let rest = (!body.is_end_stream()).then_some(body);
                let usage = response.map(|response| response.usage).unwrap_or_default();
                return Ok((Reply::Done(finish(&usage)), rest));
            }
        }
    }
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

//! Calls that go to a server as they came: no worker on NATS has words for them, and no codec of ours reads them.

use std::sync::Arc;

use serde::Serialize;

use super::append;
use super::body::{self, Body, Object, Raw};
use super::error::ErrorAnswer;
use super::request::{field, renamed, session};
use crate::error::ControllerError;
use crate::wire::{InferenceRequest, Priority, Relayed, RelayedTo};

/// A client's call of `/v1/embeddings` or `/v1/responses`.
#[derive(Clone, Debug)]
pub struct RelayedCall {
    /// What is asked of the fleet. Valid, as far as it is read here.
    pub request: Arc<InferenceRequest>,
}

/// An event of the API's streams.
#[derive(Serialize)]
struct ErrorEvent<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    sequence_number: u64,
    code: &'a str,
    message: &'a str,
    param: Option<&'a str>,
    /// The same once more, by which clients tell an event that they have to raise.
    error: serde_json::Value,
}

// === impl RelayedCall ===

impl RelayedCall {
    /// Reads of a body what routing has to know: the model, the session, the priority, and whether a stream is wanted. The rest is
    /// the server's to judge, which gets neither session nor priority. Names as
    /// [`CompletionCall::parse`](super::CompletionCall::parse).
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED, INVALID_SESSION_ID.
    pub fn parse(
        to: RelayedTo,
        bytes: &[u8],
        request_id: impl Into<String>,
        session_header: Option<&str>,
    ) -> Result<Self, ControllerError> {
        let read = Body::parse(bytes)?;
        let Some(model_id) = body::text("model", read.model)? else {
            return Err(ControllerError::validation("model", "is missing; GET /v1/models lists what is served"));
        };
        let priority = priority(read.priority);
        let stream = to == RelayedTo::Responses && body::flag("stream", read.stream)?;
        // What was embedded before helps nothing that follows.
        let session_id = session(session_header, &read)?.filter(|_| to != RelayedTo::Embeddings);
        let is_ours = |name: &str| match name {
            "model" | "session_id" => true,
            "stream" => to == RelayedTo::Responses,
            "priority" => priority.is_some(),
            _ => false,
        };
        let Object(members) = serde_json::from_slice(bytes)
            .map_err(|_| ControllerError::validation("body", "is no JSON object whose keys are texts"))?;
        let mut sent = Vec::with_capacity(bytes.len());
        for (name, value) in members.iter().filter(|(name, _)| !is_ours(name)) {
            sent.push(b',');
            append(&mut sent, name);
            sent.push(b':');
            sent.extend_from_slice(value.get().as_bytes());
        }
        let request = InferenceRequest {
            request_id: request_id.into(),
            model_id,
            session_id,
            stream,
            priority: priority.unwrap_or_default(),
            relayed: Some(Relayed { to, members: sent.into() }),
            ..InferenceRequest::default()
        };
        request.validate().map_err(|error| match field(&error) {
            Some("model_id") => renamed(&error, "model_id", "model"),
            _ => error,
        })?;
        Ok(Self { request: Arc::new(request) })
    }
}

/// A priority, where it is one: servers have a field of this name, too, that is a number.
fn priority(raw: Raw<'_>) -> Option<Priority> {
    body::read("priority", raw, "").ok().flatten()
}

/// The end of a relayed stream that broke, after so many events: one without which clients would take the answer for complete.
#[must_use]
pub fn relayed_error(error: &ControllerError, sequence_number: u64) -> Vec<u8> {
    let body: serde_json::Value = serde_json::from_slice(&ErrorAnswer::from(error).body).unwrap_or_default();
    let event = ErrorEvent {
        kind: "error",
        sequence_number,
        code: error.code().as_str(),
        message: error.message(),
        param: field(error),
        error: body["error"].clone(),
    };
    let mut out = b"event: error\ndata: ".to_vec();
    append(&mut out, &event);
    out.extend_from_slice(b"\n\n");
    out
}

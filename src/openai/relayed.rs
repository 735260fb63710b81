//! Calls that go to a server as they came: no worker on NATS has words for them, and no codec of ours reads them.

use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;

use super::append;
use super::body::{self, Body};
use super::error::ErrorAnswer;
use super::request::{field, priority, renamed, session};
use crate::error::ControllerError;
use crate::wire::{InferenceRequest, Relayed, RelayedTo};

/// A client's call of `/v1/embeddings` or `/v1/responses`.
#[derive(Clone, Debug)]
pub struct RelayedCall {
    /// What is asked of the fleet. Valid, as far as it is read here.
    pub request: Arc<InferenceRequest>,
    /// Whether the answer is wanted as it comes.
    pub stream: bool,
}

// === impl RelayedCall ===

impl RelayedCall {
    /// Reads of a body what routing has to know: the model, the session, the priority, and whether a stream is wanted. The rest is
    /// the server's to judge. Names as [`CompletionCall::parse`](super::CompletionCall::parse).
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED, INVALID_SESSION_ID.
    pub fn parse(
        to: RelayedTo,
        bytes: &Bytes,
        request_id: impl Into<String>,
        session_header: Option<&str>,
    ) -> Result<Self, ControllerError> {
        let read = Body::parse(bytes)?;
        let (Some(raw), Some(model_id)) = (read.model, body::text("model", read.model)?) else {
            return Err(ControllerError::validation("model", "is missing; GET /v1/models lists what is served"));
        };
        let begin = raw.get().as_ptr().addr() - bytes.as_ptr().addr();
        let relayed = Relayed { to, before: bytes.slice(..begin), after: bytes.slice(begin + raw.get().len()..) };
        let stream = to == RelayedTo::Responses && body::flag("stream", read.stream)?;
        // What was embedded before helps nothing that follows.
        let session_id = session(session_header, &read)?.filter(|_| to != RelayedTo::Embeddings);
        let request = InferenceRequest {
            request_id: request_id.into(),
            model_id,
            session_id,
            stream,
            priority: priority(&read)?,
            relayed: Some(relayed),
            ..InferenceRequest::default()
        };
        request.validate().map_err(|error| match field(&error) {
            Some("model_id") => renamed(&error, "model_id", "model"),
            _ => error,
        })?;
        Ok(Self { request: Arc::new(request), stream })
    }
}

/// An event of the API's streams.
#[derive(Serialize)]
struct ErrorEvent<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    code: &'a str,
    message: &'a str,
    param: Option<&'a str>,
    /// The same once more, by which clients tell an event that they have to raise.
    error: serde_json::Value,
}

/// The end of a relayed stream that broke: an event without which clients would take the answer for complete.
#[must_use]
pub fn relayed_error(error: &ControllerError) -> Vec<u8> {
    let body: serde_json::Value = serde_json::from_slice(&ErrorAnswer::from(error).body).unwrap_or_default();
    let event = ErrorEvent {
        kind: "error",
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

//! What a client asks, in the fleet's words.

use std::borrow::Cow;
use std::sync::Arc;

use serde::Deserialize;

use super::body::{self, Body, Raw};
use super::messages;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::{InferenceRequest, Priority, valid_session_id};

/// Which of the two kinds of completion is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// A client's call: what is asked of the fleet, and what its answer has to look like.
#[derive(Clone, Debug)]
pub struct CompletionCall {
    /// The kind.
    pub endpoint: Endpoint,
    /// What is asked of the fleet. Valid.
    pub request: Arc<InferenceRequest>,
    /// Whether the answer is wanted as it comes.
    pub stream: bool,
    /// Whether a stream ends with its usage.
    pub include_usage: bool,
}

// === impl Endpoint ===

impl Endpoint {
    /// What the ids of answers begin with.
    pub(super) const fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Text => "cmpl-",
        }
    }
}

// === impl CompletionCall ===

impl CompletionCall {
    /// Reads a body.
    ///
    /// `request_id` becomes the request's name, `session_header` is the header `x-session-id`. The session is the header's,
    /// else the body's `session_id`, else its `prompt_cache_key`, else its `user`; the latter two only where they can be one.
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED says where the JSON is broken, or which field (`context.field`, the API's name for it) is
    /// wrong and what would be right; INVALID_SESSION_ID for the first two.
    pub fn parse(
        endpoint: Endpoint,
        bytes: &[u8],
        request_id: impl Into<String>,
        session_header: Option<&str>,
    ) -> Result<Self, ControllerError> {
        let body = Body::parse(bytes)?;
        only_one("n", body.n)?;
        let (prompt, messages) = match endpoint {
            Endpoint::Chat => (None, body.messages.map(messages::read).transpose()?),
            Endpoint::Text => {
                refuse_text_extras(&body)?;
                (prompt(body.prompt)?, None)
            }
        };
        // What is missing is named before the request as a whole is judged, by the names of this endpoint.
        let missing = |field: &str, message: &str| Err(ControllerError::validation(field, message));
        match endpoint {
            Endpoint::Chat if messages.is_none() => return missing("messages", "is missing; give at least one message"),
            Endpoint::Text if prompt.is_none() => return missing("prompt", "is missing; give a text"),
            _ => {}
        }
        let Some(model_id) = body::text("model", body.model)? else {
            return missing("model", "is missing; GET /v1/models lists what is served");
        };
        // The newer name wins.
        let (limit_name, limit) = match body.max_completion_tokens {
            Some(limit) => ("max_completion_tokens", Some(limit)),
            None => ("max_tokens", body.max_tokens),
        };
        let stream = body::flag("stream", body.stream)?;
        let request = InferenceRequest {
            request_id: request_id.into(),
            model_id,
            prompt,
            messages,
            max_tokens: body::integer(limit_name, limit)?,
            temperature: body::number("temperature", body.temperature)?,
            top_p: body::number("top_p", body.top_p)?,
            top_k: body::integer("top_k", body.top_k)?,
            min_p: body::number("min_p", body.min_p)?,
            seed: body::integer("seed", body.seed)?,
            stop: body::texts("stop", body.stop)?,
            repetition_penalty: body::number("repetition_penalty", body.repetition_penalty)?,
            presence_penalty: body::number("presence_penalty", body.presence_penalty)?,
            frequency_penalty: body::number("frequency_penalty", body.frequency_penalty)?,
            logit_bias: body::object("logit_bias", body.logit_bias)?,
            logprobs: logprobs(endpoint, &body)?,
            tools: body::list("tools", body.tools)?,
            tool_choice: tool_choice(body.tool_choice)?,
            response_format: body::object("response_format", body.response_format)?,
            session_id: session(session_header, &body)?,
            stream,
            priority: body::read("priority", body.priority, r#"one of "high", "normal" and "low""#)?.unwrap_or(Priority::Normal),
            unknown_priority: None,
            resume: None,
            relayed: None,
        };
        request.validate().map_err(|error| match field(&error) {
            Some("model_id") => renamed(&error, "model_id", "model"),
            Some("max_tokens") => renamed(&error, "max_tokens", limit_name),
            Some("logprobs") if endpoint == Endpoint::Chat => renamed(&error, "logprobs", "top_logprobs"),
            _ => error,
        })?;
        Ok(Self { endpoint, request: Arc::new(request), stream, include_usage: include_usage(body.stream_options)? })
    }

    /// The id of the answer: that of the request, with the API's prefix.
    pub(super) fn answer_id(&self) -> String {
        format!("{}{}", self.endpoint.id_prefix(), self.request.request_id)
    }
}

/// The field that an error names.
pub(super) fn field(error: &ControllerError) -> Option<&str> {
    error.context().get("field")?.as_str()
}

/// The error of a field under the name that the client knows it by.
pub(super) fn renamed(error: &ControllerError, ours: &str, theirs: &str) -> ControllerError {
    let message = error.message();
    let message = message.strip_prefix(ours).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(message);
    ControllerError::validation(theirs, message)
}

fn only_one(name: &str, raw: Raw<'_>) -> Result<(), ControllerError> {
    match body::integer(name, raw)? {
        None | Some(1) => Ok(()),
        Some(several) => Err(ControllerError::validation(name, format_args!("is {several}; only 1 is supported"))),
    }
}

/// What would change the answer, and which no worker can do, is refused rather than ignored.
fn refuse_text_extras(body: &Body<'_>) -> Result<(), ControllerError> {
    only_one("best_of", body.best_of)?;
    if body::flag("echo", body.echo)? {
        return Err(ControllerError::validation("echo", "is true; only false is supported"));
    }
    match body::text("suffix", body.suffix)? {
        Some(suffix) if !suffix.is_empty() => Err(ControllerError::validation("suffix", "is not supported; leave it out")),
        _ => Ok(()),
    }
}

fn prompt(raw: Raw<'_>) -> Result<Option<String>, ControllerError> {
    let Some(mut prompts) = body::texts("prompt", raw)? else { return Ok(None) };
    match prompts.len() {
        1 => Ok(prompts.pop()),
        several => Err(ControllerError::validation("prompt", format_args!("has {several} texts; only one is supported"))),
    }
}

/// The wire asks for a number of alternatives; the chat API for a yes and a number, the text API for the number alone.
fn logprobs(endpoint: Endpoint, body: &Body<'_>) -> Result<Option<i64>, ControllerError> {
    match endpoint {
        Endpoint::Text => body::integer("logprobs", body.logprobs),
        Endpoint::Chat => {
            let wanted = body::flag("logprobs", body.logprobs)?;
            let alternatives = body::integer("top_logprobs", body.top_logprobs)?.unwrap_or(0);
            if !wanted && alternatives != 0 {
                return Err(ControllerError::validation("top_logprobs", "needs logprobs to be true"));
            }
            Ok(wanted.then_some(alternatives))
        }
    }
}

fn tool_choice(raw: Raw<'_>) -> Result<Option<crate::wire::Json>, ControllerError> {
    match raw {
        Some(raw) if body::starts_with(raw, b'"') || body::starts_with(raw, b'{') => Ok(Some(raw.into())),
        Some(raw) => Err(body::unsuitable("tool_choice", raw, "a text or an object")),
        None => Ok(None),
    }
}

fn include_usage(raw: Raw<'_>) -> Result<bool, ControllerError> {
    #[derive(Deserialize)]
    struct Options {
        include_usage: Option<bool>,
    }
    let options: Option<Options> = body::read("stream_options", raw, r#"an object such as {"include_usage": true}"#)?;
    Ok(options.and_then(|options| options.include_usage).unwrap_or(false))
}

pub(super) fn session(header: Option<&str>, body: &Body<'_>) -> Result<Option<String>, ControllerError> {
    let invalid = |name: &str, found: Cow<'_, str>| {
        let message = format!("{name} {found}; 1 to 256 printable characters are allowed");
        ControllerError::new(ControllerErrorCode::InvalidSessionId, message).with("field", name)
    };
    let checked = |name: &str, session: String| {
        if valid_session_id(&session) {
            Ok(Some(session))
        } else {
            Err(invalid(name, format!("has {} characters or unprintable ones", session.chars().count()).into()))
        }
    };
    if let Some(session) = header {
        return checked("x-session-id", session.to_owned());
    }
    if body.session_id.is_some() {
        return match body::text("session_id", body.session_id) {
            Ok(Some(session)) => checked("session_id", session),
            _ => Err(invalid("session_id", "is no text".into())),
        };
    }
    // Made for other ends, so whatever stands there is no error.
    let suitable = |raw: Raw<'_>| body::text("", raw).ok().flatten().filter(|session| valid_session_id(session));
    Ok(suitable(body.prompt_cache_key).or_else(|| suitable(body.user)))
}

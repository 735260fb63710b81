//! The older dialect: what workers of existing mlx-serving fleets are asked, and where. What they answer and say of
//! themselves is read as everybody's; they only leave more out. Their subjects take no prefix.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{InferenceRequest, Json, Priority, WorkerId};
use crate::error::{ControllerError, ControllerErrorCode};

/// The body of a request to a worker of the older dialect: `prompt` is always a text, `stream` always true, and `priority`
/// is written only where it is one that these workers know. `request_id` is new for each attempt: it names the subject of
/// the answer.
///
/// # Errors
/// REQUEST_VALIDATION_FAILED: a message's content is no text.
pub fn request(request: &InferenceRequest, request_id: &str) -> Result<Vec<u8>, ControllerError> {
    let prompt = match (&request.prompt, &request.messages) {
        (Some(prompt), _) => prompt.clone(),
        (None, messages) => messages.as_ref().map_or(Ok(String::new()), contents)?,
    };
    let asked = InferenceRequest {
        request_id: request_id.to_owned(),
        prompt: Some(prompt),
        messages: None,
        stream: true,
        resume: None,
        ..request.clone()
    };
    let written = serde_json::to_value(&asked).and_then(|mut body| {
        if let Some(body) = body.as_object_mut().filter(|_| asked.priority == Priority::Normal) {
            body.remove("priority");
        }
        serde_json::to_vec(&body)
    });
    written
        .map_err(|error| ControllerError::new(ControllerErrorCode::InternalError, format!("cannot encode the request: {error}")))
}

/// A worker takes requests here.
#[must_use]
pub fn inference(worker: &WorkerId) -> String {
    format!("worker.{worker}.inference")
}

/// The answer to one attempt comes here. `request_id` is ours, never a caller's.
#[must_use]
pub fn response(request_id: &uuid::Uuid) -> String {
    format!("response.{request_id}")
}

/// The contents of all messages in their order, each on a line of its own. A message without content has none.
fn contents(messages: &Json) -> Result<String, ControllerError> {
    #[derive(Deserialize)]
    struct Message<'a> {
        #[serde(borrow, default)]
        content: Option<&'a RawValue>,
    }
    let messages: Vec<Message<'_>> = serde_json::from_str(messages.text())
        .map_err(|_| ControllerError::validation("messages", "is not a list of objects with a content each"))?;
    let mut lines = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        if let Some(content) = message.content {
            lines.push(text(content).ok_or_else(|| {
                let field = format!("messages[{index}].content");
                ControllerError::validation(
                    &field,
                    "is neither a text nor a list of text parts, which is all that this worker takes",
                )
            })?);
        }
    }
    Ok(lines.join("\n"))
}

/// A content's text; parts follow each other directly.
fn text(content: &RawValue) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Content<'a> {
        Text(#[serde(borrow)] Cow<'a, str>),
        Parts(#[serde(borrow)] Vec<Part<'a>>),
    }
    #[derive(Deserialize)]
    struct Part<'a> {
        #[serde(rename = "type")]
        kind: Cow<'a, str>,
        text: Option<Cow<'a, str>>,
    }
    match serde_json::from_str(content.get()).ok()? {
        Content::Text(text) => Some(text),
        Content::Parts(parts) => {
            parts.into_iter().map(|part| part.text.filter(|_| part.kind == "text")).collect::<Option<String>>().map(Cow::Owned)
        }
    }
}

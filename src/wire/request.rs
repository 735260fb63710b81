//! What is asked of a worker.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Json, Relayed};
use crate::error::{ControllerError, ControllerErrorCode};

/// The headers of a request.
pub mod header {
    /// The request's id.
    pub const REQUEST_ID: &str = "Request-Id";
    /// 1 for the first attempt.
    pub const ATTEMPT: &str = "Attempt";
    /// Who asks.
    pub const CONTROLLER_ID: &str = "Controller-Id";
    /// How long the attempt may still take, to its end.
    pub const TIMEOUT_MS: &str = "Timeout-Ms";
    /// The caller's W3C trace context.
    pub const TRACEPARENT: &str = "traceparent";
    /// Of a cancellation: the subject for the replies to the attempt that it means. A request id may be used again, this is
    /// not.
    pub const REPLY_TO: &str = "Reply-To";
}

/// A question for a model. What is not set is left to the worker.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InferenceRequest {
    /// Names the request everywhere; made by the controller when the caller gives none.
    #[serde(default)]
    pub request_id: String,
    /// The model.
    pub model_id: String,
    /// A plain text to continue; instead of `messages`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// A conversation: a list of objects with a `role`, in the OpenAI API's shape; instead of `prompt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Json>,
    /// The most tokens to generate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<i64>,
    /// 0 is greedy decoding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Only the k likeliest tokens; 0 is all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<i64>,
    /// Only tokens at least so likely as this share of the likeliest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// Makes sampling repeatable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Texts that end the answer and are not part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<Vec<String>>,
    /// Above 1 makes what was said less likely.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
    /// Taken once from every token that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    /// Taken from a token as often as it was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// Added to the logits: an object of token id to number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logit_bias: Option<Json>,
    /// How many alternatives to report for each token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<i64>,
    /// Functions that the model may call, in the OpenAI API's shape.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Json>,
    /// Whether and which of them it has to call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_choice: Option<Json>,
    /// The shape of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_format: Option<Json>,
    /// The conversation that the request belongs to: it goes to the same worker where that is possible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
    /// Whether tokens are wanted as they come. The method called decides, not this.
    #[serde(default)]
    pub stream: bool,
    /// Who goes first in a queue.
    #[serde(default)]
    pub priority: Priority,
    /// What was asked for in its place and is no priority: [`Self::validate`] refuses it.
    #[serde(skip)]
    pub unknown_priority: Option<String>,
    /// Continues after tokens that another worker delivered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Resume>,
    /// What is asked in place of a completion, of servers that speak the OpenAI API alone.
    #[serde(skip)]
    pub relayed: Option<Relayed>,
}

/// Who goes first in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Waits for the others, is refused first.
    Low,
    /// As usual.
    #[default]
    #[serde(alias = "medium")]
    Normal,
    /// Goes first.
    High,
}

/// What an answer has delivered so far.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resume {
    /// The tokens.
    pub token_ids: Vec<u32>,
    /// Their text.
    pub text: String,
}

/// `<P>cancel.<workerId>`: stop this attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cancel {
    /// The request.
    pub request_id: String,
    /// Its attempt; a worker that knows several attempts of a request stops this one alone.
    #[serde(default)]
    pub attempt: u32,
}

// === impl InferenceRequest ===

impl InferenceRequest {
    /// Writes the message.
    ///
    /// # Errors
    /// None that is known: texts, numbers and JSON that was parsed before.
    pub fn encode(&self) -> serde_json::Result<Bytes> {
        let long = [&self.messages, &self.tools].into_iter().flatten().map(|json| json.text().len()).sum::<usize>();
        let mut bytes = Vec::with_capacity(512 + long + self.prompt.as_ref().map_or(0, String::len));
        serde_json::to_writer(&mut bytes, self)?;
        Ok(bytes.into())
    }

    /// Checks everything that can be judged without a model.
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED names the field, its value and what would be right; INVALID_SESSION_ID.
    pub fn validate(&self) -> Result<(), ControllerError> {
        text("request_id", &self.request_id, 256)?;
        text("model_id", &self.model_id, 512)?;
        match (&self.prompt, &self.messages) {
            // The server judges what it is asked.
            (None, None) if self.relayed.is_some() => {}
            (Some(_), Some(_)) => return Err(invalid("messages", "give either messages or prompt, not both")),
            (None, None) => return Err(invalid("messages", "give messages, or a prompt")),
            (Some(prompt), None) if prompt.is_empty() => return Err(invalid("prompt", "is empty; give at least one character")),
            (Some(_), None) => {}
            (None, Some(messages)) => check_messages(messages)?,
        }
        at_least("max_tokens", self.max_tokens, 1)?;
        at_least("top_k", self.top_k, 0)?;
        within("temperature", self.temperature, 0.0, f64::MAX)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.0, f64::MAX)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        if let Some(logprobs) = self.logprobs
            && !(0..=20).contains(&logprobs)
        {
            return Err(invalid("logprobs", format!("is {logprobs}; 0 to 20 is allowed")));
        }
        if let Some(other) = &self.unknown_priority {
            let shown: String = other.chars().take(80).collect();
            return Err(invalid("priority", format!("is {shown:?}; high, normal or low is right")));
        }
        if let Some(stop) = &self.stop
            && stop.iter().any(String::is_empty)
        {
            return Err(invalid("stop", "contains an empty text, which would end every answer at once"));
        }
        self.session_id.as_deref().map_or(Ok(()), check_session_id)
    }
}

/// Whether a text can name a session.
///
/// # Errors
/// INVALID_SESSION_ID.
pub fn check_session_id(session: &str) -> Result<(), ControllerError> {
    if valid_session_id(session) {
        return Ok(());
    }
    let message = format!(
        "session_id has {} characters or unprintable ones; 1 to 256 printable characters are allowed",
        session.chars().count()
    );
    Err(ControllerError::new(ControllerErrorCode::InvalidSessionId, message).with("field", "session_id"))
}

/// Whether a text may name a session: 1 to 256 printable characters.
#[must_use]
pub fn valid_session_id(session: &str) -> bool {
    if is_plain(session) {
        return (1..=256).contains(&session.len());
    }
    (1..=256).contains(&session.chars().take(257).count()) && session.chars().all(is_printable)
}

/// Whether a text has printable characters of ASCII alone: those need no closer look.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

/// Whether something is seen of a character, or it joins those beside it: no control, no mark of direction, of all spaces
/// the usual one.
fn is_printable(letter: char) -> bool {
    let unseen = ['\u{ad}', '\u{200b}', '\u{200e}', '\u{200f}', '\u{feff}'].contains(&letter)
        || ('\u{202a}'..='\u{202e}').contains(&letter)
        || ('\u{2060}'..='\u{206f}').contains(&letter);
    letter == ' ' || !(letter.is_control() || letter.is_whitespace() || unseen)
}

/// Says which fields are set, and of prompts the size alone.
impl fmt::Debug for InferenceRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("InferenceRequest");
        shown.field("request_id", &self.request_id).field("model_id", &self.model_id).field("stream", &self.stream);
        if let Some(prompt) = &self.prompt {
            shown.field("prompt", &format_args!("<{} bytes>", prompt.len()));
        }
        if let Some(messages) = &self.messages {
            shown.field("messages", messages);
        }
        if let Some(max_tokens) = self.max_tokens {
            shown.field("max_tokens", &max_tokens);
        }
        if let Some(session) = &self.session_id {
            shown.field("session_id", session);
        }
        shown.finish_non_exhaustive()
    }
}

impl fmt::Debug for Resume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resume").field("token_ids", &self.token_ids.len()).finish_non_exhaustive()
    }
}

fn invalid(field: &str, message: impl fmt::Display) -> ControllerError {
    ControllerError::validation(field, message)
}

fn text(field: &str, value: &str, most: usize) -> Result<(), ControllerError> {
    match value.len() {
        0 => Err(invalid(field, "is empty")),
        length if length > most => Err(invalid(field, format!("has {length} bytes; at most {most} are allowed"))),
        _ if !is_plain(value) && value.chars().any(char::is_control) => Err(invalid(field, "has control characters")),
        _ => Ok(()),
    }
}

fn at_least(field: &str, value: Option<i64>, least: i64) -> Result<(), ControllerError> {
    match value {
        Some(value) if value < least => Err(invalid(field, format!("is {value}; it has to be at least {least}"))),
        _ => Ok(()),
    }
}

fn within(field: &str, value: Option<f64>, least: f64, most: f64) -> Result<(), ControllerError> {
    match value {
        Some(value) if !value.is_finite() || value < least || value > most => {
            let upper = if most == f64::MAX { String::new() } else { format!(" and at most {most}") };
            Err(invalid(field, format!("is {value}; it has to be at least {least}{upper}")))
        }
        _ => Ok(()),
    }
}

fn check_messages(messages: &Json) -> Result<(), ControllerError> {
    #[derive(Deserialize)]
    struct Message<'a> {
        #[serde(borrow)]
        role: Cow<'a, str>,
    }
    let messages: Vec<Message<'_>> = serde_json::from_str(messages.text()).map_err(|_| {
        invalid("messages", r#"is not a list of objects with a "role" each, such as [{"role": "user", "content": "Hello"}]"#)
    })?;
    if messages.is_empty() {
        return Err(invalid("messages", "is empty; give at least one message"));
    }
    match messages.iter().position(|message| message.role.is_empty()) {
        Some(index) => Err(invalid(&format!("messages[{index}].role"), "is empty")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(messages: &str) -> InferenceRequest {
        InferenceRequest {
            request_id: "r".into(),
            model_id: "tiny".into(),
            messages: Json::from_text(messages.into()).ok(),
            ..InferenceRequest::default()
        }
    }

    fn field(request: &InferenceRequest) -> Option<String> {
        let error = request.validate().err()?;
        error.context().get("field")?.as_str().map(str::to_owned)
    }

    #[test]
    fn a_sound_request_passes() {
        assert!(chat(r#"[{"role": "user", "content": "Hello"}]"#).validate().is_ok());
    }

    #[test]
    fn each_bad_field_is_named() {
        let good = chat(r#"[{"role": "user", "content": "Hello"}]"#);
        let bad = |change: fn(&mut InferenceRequest)| {
            let mut request = good.clone();
            change(&mut request);
            field(&request)
        };
        assert_eq!(field(&chat("[]")).as_deref(), Some("messages"));
        assert_eq!(field(&chat(r#""hello""#)).as_deref(), Some("messages"));
        assert_eq!(bad(|r| r.max_tokens = Some(-1)).as_deref(), Some("max_tokens"));
        assert_eq!(bad(|r| r.max_tokens = Some(0)).as_deref(), Some("max_tokens"));
        assert_eq!(bad(|r| r.temperature = Some(f64::NAN)).as_deref(), Some("temperature"));
        assert_eq!(bad(|r| r.top_p = Some(1.5)).as_deref(), Some("top_p"));
        assert_eq!(bad(|r| r.model_id = String::new()).as_deref(), Some("model_id"));
        assert_eq!(bad(|r| r.prompt = Some("x".into())).as_deref(), Some("messages"));
        assert_eq!(bad(|r| r.session_id = Some("a\nb".into())).as_deref(), Some("session_id"));
        assert_eq!(bad(|r| r.stop = Some(vec![String::new()])).as_deref(), Some("stop"));
    }

    #[test]
    fn nothing_that_was_asked_is_printed() {
        let mut request = chat(r#"[{"role": "user", "content": "a secret"}]"#);
        request.prompt = Some("a secret".into());
        assert!(!format!("{request:?}").contains("secret"));
    }
}

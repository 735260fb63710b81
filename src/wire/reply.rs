//! What a worker answers.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::Json;

/// The ids of a piece of an answer: mostly one.
pub type TokenIds = SmallVec<[u32; 4]>;

/// Bytes of one answer, log probabilities included: what takes more does not end by itself. Twenty thousand tokens with twenty
/// alternatives each, or millions without, stay below it.
pub const ANSWER_MOST: usize = 32 << 20;

/// One message of an answer.
#[derive(Clone, PartialEq)]
pub enum Reply {
    /// The worker has taken the request.
    Accepted {
        /// How many are before it.
        queue_position: u32,
    },
    /// A piece of the answer.
    Token(Token),
    /// The end of a streamed answer.
    Done(Finish),
    /// The whole of a buffered answer.
    Response {
        /// Its text.
        text: String,
        /// Its end.
        finish: Finish,
        /// Log probabilities, in the OpenAI API's shape.
        logprobs: Option<Json>,
    },
    /// The end of a failed answer.
    Error {
        /// What happened, for people.
        message: String,
        /// The worker's code, as it came.
        code: Option<String>,
        /// When to come back; −1: never.
        retry_after_ms: Option<i64>,
    },
}

/// A piece of an answer: one token, or several.
#[derive(Clone, PartialEq)]
pub struct Token {
    /// The text, perhaps empty (a character may need several tokens).
    pub text: String,
    /// The place of its first token in the answer, from 0.
    pub index: u64,
    /// The tokens, where the worker says them.
    pub token_ids: TokenIds,
    /// Log probabilities, in the OpenAI API's shape.
    pub logprobs: Option<Json>,
}

/// How an answer ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// What it cost.
    pub usage: Usage,
    /// The functions that the model wants called, in the OpenAI API's shape.
    pub tool_calls: Option<Json>,
    /// The worker's own time for it.
    pub latency_ms: f64,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// `maxTokens` was reached.
    Length,
    /// The model wants functions called.
    ToolCalls,
    /// The model said so, or a stop text came. Also what an unknown word is read as.
    #[default]
    #[serde(other)]
    Stop,
}

/// Tokens of a request and its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u64,
    /// Of the answer.
    pub completion_tokens: u64,
    /// Of the prompt, those that a cache held.
    pub cached_tokens: u64,
}

/// A message that is no reply; the text says why, without any of its content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Undecodable(pub &'static str);

/// All replies in one, as they are written.
#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Message<'a> {
    /// Written alone: the subject says whom a message answers.
    #[serde(skip_deserializing)]
    request_id: Cow<'a, str>,
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    queue_position: Option<u32>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    token: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    index: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_ids: Option<TokenIds>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    logprobs: Option<Json>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    text: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    total_tokens: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    latency_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    finish_reason: Option<FinishReason>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Json>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    error: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    code: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<i64>,
}

// === impl Reply ===

impl Reply {
    /// Reads a message.
    ///
    /// # Errors
    /// It is no JSON object of one of the five types, or lacks what its type needs.
    pub fn decode(bytes: &[u8]) -> Result<Self, Undecodable> {
        Self::read(bytes, None)
    }

    /// Reads a message of a worker that may leave out the index of a token: then it is `next`, the one that is due.
    ///
    /// # Errors
    /// As [`Self::decode`], but for the index.
    pub fn decode_older(bytes: &[u8], next: u64) -> Result<Self, Undecodable> {
        Self::read(bytes, Some(next))
    }

    fn read(bytes: &[u8], next: Option<u64>) -> Result<Self, Undecodable> {
        // Looked at once, the characters need not be looked at in each text.
        let text = std::str::from_utf8(bytes).map_err(|_| Undecodable("the message is not of UTF-8"))?;
        let message: Message<'_> = serde_json::from_str(text).map_err(|_| Undecodable("the message is no reply"))?;
        match &*message.kind {
            "token" => Ok(Self::Token(Token {
                text: message.token.ok_or(Undecodable("a token message without token"))?.into_owned(),
                index: message.index.or(next).ok_or(Undecodable("a token message without index"))?,
                token_ids: message.token_ids.unwrap_or_default(),
                logprobs: message.logprobs,
            })),
            "accepted" => Ok(Self::Accepted { queue_position: message.queue_position.unwrap_or(0) }),
            "done" => Ok(Self::Done(message.finish())),
            "response" => Ok(Self::Response {
                text: message.text.as_deref().ok_or(Undecodable("a response message without text"))?.to_owned(),
                logprobs: message.logprobs.clone(),
                finish: message.finish(),
            }),
            "error" => Ok(Self::Error {
                message: message.error.map(Cow::into_owned).unwrap_or_default(),
                code: message.code.map(Cow::into_owned),
                retry_after_ms: message.retry_after_ms,
            }),
            _ => Err(Undecodable("a message of unknown type")),
        }
    }

    /// Writes the message for a request.
    #[must_use]
    pub fn encode(&self, request_id: &str) -> Vec<u8> {
        let blank = Message { request_id: request_id.into(), ..Message::default() };
        let message = match self {
            Self::Accepted { queue_position } => {
                Message { kind: "accepted".into(), queue_position: Some(*queue_position), ..blank }
            }
            Self::Token(token) => Message {
                kind: "token".into(),
                token: Some(token.text.as_str().into()),
                index: Some(token.index),
                token_ids: (!token.token_ids.is_empty()).then(|| token.token_ids.clone()),
                logprobs: token.logprobs.clone(),
                ..blank
            },
            Self::Done(finish) => finish.fill(Message { kind: "done".into(), ..blank }),
            Self::Response { text, finish, logprobs } => finish.fill(Message {
                kind: "response".into(),
                text: Some(text.as_str().into()),
                logprobs: logprobs.clone(),
                ..blank
            }),
            Self::Error { message, code, retry_after_ms } => Message {
                kind: "error".into(),
                error: Some(message.as_str().into()),
                code: code.as_deref().map(Cow::from),
                retry_after_ms: *retry_after_ms,
                ..blank
            },
        };
        // Texts, numbers and JSON that was parsed before: nothing here can fail to be written.
        serde_json::to_vec(&message).unwrap_or_default()
    }

    /// Whether nothing may follow.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Done(_) | Self::Response { .. } | Self::Error { .. })
    }
}

// === impl Message ===

impl Message<'_> {
    fn finish(self) -> Finish {
        let mut usage = self.usage.unwrap_or_default();
        if self.usage.is_none() {
            usage.completion_tokens = self.total_tokens.unwrap_or(0);
        }
        Finish {
            reason: self.finish_reason.unwrap_or_default(),
            usage,
            tool_calls: self.tool_calls.filter(|calls| !matches!(calls.text().trim(), "[]" | "null")),
            latency_ms: self.latency_ms.unwrap_or(0.0),
        }
    }
}

// === impl Finish ===

impl Finish {
    fn fill<'a>(&self, message: Message<'a>) -> Message<'a> {
        Message {
            total_tokens: Some(self.usage.completion_tokens),
            latency_ms: Some(self.latency_ms),
            finish_reason: Some(self.reason),
            usage: Some(self.usage),
            tool_calls: self.tool_calls.clone().or_else(|| Json::from_value(&[(); 0]).ok()),
            ..message
        }
    }
}

// === impl FinishReason ===

impl FinishReason {
    /// The reason as it is written everywhere.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }

    /// The reason of this name; `None` for an unknown one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Stop, Self::Length, Self::ToolCalls].into_iter().find(|reason| reason.as_str() == name)
    }
}

// === impl Usage ===

impl Usage {
    /// Prompt and answer together.
    #[must_use]
    pub const fn total_tokens(&self) -> u64 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }
}

// === impl Token ===

impl Token {
    /// How many places of the answer it takes: as many as it has token ids, one where it names none.
    #[must_use]
    pub fn width(&self) -> u64 {
        (self.token_ids.len() as u64).max(1)
    }

    /// Bytes of its text and its log probabilities.
    #[must_use]
    pub fn size(&self) -> usize {
        self.text.len() + self.logprobs.as_ref().map_or(0, |logprobs| logprobs.text().len())
    }
}

/// Of answers the size alone: they are never printed.
impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accepted { queue_position } => f.debug_struct("Accepted").field("queue_position", queue_position).finish(),
            Self::Token(token) => token.fmt(f),
            Self::Done(finish) => finish.fmt(f),
            Self::Response { text, finish, logprobs: _ } => {
                f.debug_struct("Response").field("bytes", &text.len()).field("finish", finish).finish_non_exhaustive()
            }
            Self::Error { message, code, retry_after_ms } => f
                .debug_struct("Error")
                .field("message", message)
                .field("code", code)
                .field("retry_after_ms", retry_after_ms)
                .finish(),
        }
    }
}

/// Says the sizes alone: tokens are never printed.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("index", &self.index).field("bytes", &self.text.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let finish = Finish {
            reason: FinishReason::Length,
            usage: Usage { prompt_tokens: 9, completion_tokens: 12, cached_tokens: 4 },
            tool_calls: Json::from_text(r#"[{"id":"c"}]"#.into()).ok(),
            latency_ms: 210.5,
        };
        for reply in [
            Reply::Accepted { queue_position: 3 },
            Reply::Token(Token { text: "Hel\n\u{1f600}".into(), index: 7, token_ids: vec![1, 2].into(), logprobs: None }),
            Reply::Done(finish.clone()),
            Reply::Response { text: "Hello".into(), finish, logprobs: None },
            Reply::Error { message: "full".into(), code: Some("WORKER_OVERLOADED".into()), retry_after_ms: Some(-1) },
        ] {
            assert_eq!(Reply::decode(&reply.encode("r-1")), Ok(reply));
        }
    }

    #[test]
    fn an_index_may_be_left_out_by_older_workers_alone() {
        let index = |said: &str| match Reply::decode_older(said.as_bytes(), 7) {
            Ok(Reply::Token(token)) => Some(token.index),
            _ => None,
        };
        assert_eq!(index(r#"{"type":"token","token":"x"}"#), Some(7));
        assert_eq!(index(r#"{"type":"token","token":"x","index":null}"#), Some(7));
        assert_eq!(index(r#"{"type":"token","token":"x","index":2}"#), Some(2));
        assert_eq!(index(r#"{"type":"token"}"#), None);
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        for bad in [
            "",
            "nonsense",
            "[]",
            "{}",
            r#"{"type":"song"}"#,
            r#"{"type":"token","token":"x"}"#,
            r#"{"type":"token","index":-1,"token":"x"}"#,
        ] {
            assert!(Reply::decode(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}

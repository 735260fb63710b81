//! Log probabilities, as each kind of completion shows them. Workers send those of the chat API.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::wire::Json;

/// The chat API's.
#[derive(Serialize, Deserialize)]
pub(super) struct ChatLogprobs {
    content: Vec<TokenLogprob>,
}

#[derive(Serialize, Deserialize)]
struct TokenLogprob {
    token: String,
    logprob: f64,
    #[serde(default)]
    bytes: Option<Vec<u8>>,
    #[serde(default)]
    top_logprobs: Vec<Alternative>,
}

#[derive(Serialize, Deserialize)]
struct Alternative {
    token: String,
    logprob: f64,
    #[serde(default)]
    bytes: Option<Vec<u8>>,
}

/// The text API's.
#[derive(Default, Serialize)]
pub(super) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f64>,
    top_logprobs: Vec<BTreeMap<String, f64>>,
    text_offset: Vec<usize>,
}

// === impl ChatLogprobs ===

impl ChatLogprobs {
    /// Reads what a worker sent. None where nothing was, or nothing that a client could read: they adorn the answer.
    pub(super) fn read(logprobs: Option<&Json>) -> Option<Self> {
        logprobs?.read().ok()
    }

    /// The same for the text API. `offset` is where the first token begins, in characters of the answer, and is moved on.
    pub(super) fn into_text(self, offset: &mut usize) -> TextLogprobs {
        let mut text = TextLogprobs::default();
        for token in self.content {
            text.text_offset.push(*offset);
            *offset += token.token.chars().count();
            text.token_logprobs.push(token.logprob);
            text.top_logprobs.push(token.top_logprobs.into_iter().map(|other| (other.token, other.logprob)).collect());
            text.tokens.push(token.token);
        }
        text
    }
}

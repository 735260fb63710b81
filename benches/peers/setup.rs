//! What every process is told at its start.

use mlx_serving_router::wire::{InferenceRequest, Json};
use serde::Deserialize;

/// The server and the work, the same for all sides.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Setup {
    /// Where NATS is.
    pub url: String,
    /// The worker's name.
    pub worker: String,
    /// The model that it serves.
    pub model: String,
    /// What is asked.
    pub prompt: String,
    /// The text of a buffered answer.
    pub answer: String,
    /// How many tokens a streamed answer has.
    pub tokens: u64,
    /// How many sessions the requests belong to, in turn.
    pub sessions: u64,
    /// Milliseconds between the tokens of a paced stream.
    #[serde(default)]
    pub interval: u64,
    /// Where workers over HTTP are. None: they are on NATS.
    #[serde(default)]
    pub workers: Vec<String>,
}

// === impl Setup ===

impl Setup {
    /// A request without an id.
    pub fn request(&self, number: u64) -> Result<InferenceRequest, serde_json::Error> {
        Ok(InferenceRequest {
            model_id: self.model.clone(),
            messages: Some(Json::from_value(&serde_json::json!([{"role": "user", "content": self.prompt}]))?),
            max_tokens: i64::try_from(self.tokens).ok(),
            session_id: Some(format!("session-{}", number % self.sessions)),
            ..InferenceRequest::default()
        })
    }
}

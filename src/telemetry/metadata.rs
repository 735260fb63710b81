//! What is known of one request: plain data, as HTTP answers and Python show it.

use std::borrow::Cow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::ControllerErrorCode;
use crate::wire::WorkerId;

/// One request, from its arrival on. Points in time are milliseconds since the epoch, durations milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestMetadata {
    /// Its name.
    pub request_id: Arc<str>,
    /// The model that was asked for.
    pub model_id: Arc<str>,
    /// The session it belongs to.
    pub session_id: Option<String>,
    /// When it came.
    pub start_time: u64,
    /// When it ended.
    pub end_time: Option<u64>,
    /// How long it took, waiting and retries included.
    pub duration_ms: Option<f64>,
    /// From its arrival to its first token; none for an answer without tokens of its own.
    pub time_to_first_token_ms: Option<f64>,
    /// Attempts after the first.
    pub retry_count: u32,
    /// The worker that was chosen last.
    pub selected_worker: Option<WorkerId>,
    /// The workers at which an attempt failed, each once, in the order of their failures.
    pub failed_workers: Vec<WorkerId>,
    /// Breakers that this request opened.
    pub circuit_breaker_trips: u32,
    /// Limits on time that passed.
    pub timeouts: u32,
    /// What the caller met, where it failed.
    pub final_error: Option<FinalError>,
    /// How far it is.
    pub status: RequestStatus,
    /// Tokens generated for it.
    pub tokens: u64,
    /// What was tried.
    pub attempts: Vec<Attempt>,
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RequestStatus {
    /// It waits for its first worker.
    Queued,
    /// A worker has been chosen.
    Running,
    /// It has its answer.
    Succeeded,
    /// It ended with an error.
    Failed,
    /// Its caller went away.
    Cancelled,
}

/// The error that a request ended with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalError {
    /// Its code.
    pub code: ControllerErrorCode,
    /// Its message, cut after 512 characters.
    pub message: String,
}

/// One attempt: where, why there, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// The worker.
    pub worker_id: WorkerId,
    /// When it was sent.
    pub started_ms: u64,
    /// How long it took; none while it runs.
    pub duration_ms: Option<f64>,
    /// How it failed; none for a success, or while it runs.
    pub code: Option<ControllerErrorCode>,
    /// Why this worker: what decided the selection.
    pub choice: Cow<'static, str>,
    /// Who was no candidate: the first 64 of them.
    pub left_out: Vec<LeftOut>,
}

/// A worker that was no candidate for an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeftOut {
    /// The worker.
    pub worker_id: WorkerId,
    /// Why.
    pub reason: Cow<'static, str>,
}

// === impl RequestStatus ===

impl RequestStatus {
    /// The status as it is written everywhere: `running`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

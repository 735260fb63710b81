//! What the contract makes of an attempt, given what its worker said and when: written a second time, without looking at
//! how the program does it.

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::error::ControllerErrorCode as Code;

use crate::caller::Met;
use crate::machine::Served;
use crate::script::{Post, Posted, WHOLE_TOKENS};

/// An end of an attempt, and when. No code: the answer is complete.
pub type Ending = (Option<Code>, u64);

/// The limits of an attempt that is sent at `sent`, as points in time.
pub struct Limits {
    accept: u64,
    first_token: Option<u64>,
    idle: Option<u64>,
    total: u64,
}

impl Limits {
    pub fn new(config: &ClusterConfig, met: &Met, sent: u64) -> Self {
        let routing = &config.request_routing;
        let whole = if met.call.streaming { routing.stream_total_timeout_ms } else { routing.timeout_ms };
        Self {
            accept: sent + routing.accept_timeout_ms,
            first_token: met.call.streaming.then_some(sent + routing.streaming_timeout_ms),
            idle: met.call.streaming.then_some(routing.stream_idle_timeout_ms),
            total: (sent + whole).min(deadline(config, met)),
        }
    }

    /// How long an attempt that was sent at that time may take, to its end.
    pub fn left(&self, sent: u64) -> u64 {
        self.total.saturating_sub(sent)
    }

    /// None at all.
    pub fn none() -> Self {
        Self { accept: u64::MAX, first_token: None, idle: None, total: u64::MAX }
    }

    /// The same for a worker that may be loading: nothing is late before it had the time for that.
    pub fn prolonged(self, by: u64) -> Self {
        Self {
            accept: self.accept + by,
            first_token: self.first_token.map(|at| at + by),
            idle: self.idle.map(|span| span + by),
            total: self.total + by,
        }
    }
}

/// When a request is over at the latest.
pub fn deadline(config: &ClusterConfig, met: &Met) -> u64 {
    let routing = &config.request_routing;
    let attempts = if routing.retry.enabled { 1 + u64::from(routing.retry.max_retries) } else { 1 };
    let own = if met.call.streaming { routing.stream_total_timeout_ms } else { routing.timeout_ms * attempts };
    met.began + met.call.timeout.unwrap_or(own)
}

/// How an attempt may end whose worker said this. More than one way where two things happen at the same moment.
pub fn endings(limits: &Limits, posts: &[Posted]) -> Vec<Ending> {
    let mut endings = Vec::new();
    let (mut accept, mut first_token, mut idle_at) = (Some(limits.accept), limits.first_token, None);
    let mut expected = 0;
    let next = |accept: Option<u64>, first_token: Option<u64>, idle_at: Option<u64>| {
        [accept, first_token, idle_at, Some(limits.total)].into_iter().flatten().min().unwrap_or(limits.total)
    };
    for Posted { at, post, .. } in posts {
        let limit = next(accept, first_token, idle_at);
        if *at >= limit {
            endings.push((Some(Code::WorkerTimeout), limit));
        }
        if *at > limit {
            return endings;
        }
        let end = match post {
            Post::Accepted => {
                accept = None;
                continue;
            }
            Post::Token { index, width, .. } if *index == expected => {
                expected += width;
                accept = None;
                first_token = None;
                idle_at = limits.idle.map(|idle| at + idle);
                continue;
            }
            Post::Response(_) if expected > 0 => Some(Code::WorkerUnavailable),
            Post::Done(_) | Post::Response(_) => None,
            Post::Error { code, .. } => Some(meaning(*code)),
            Post::Token { .. } | Post::NobodyListens | Post::Unreadable | Post::Lost => Some(Code::WorkerUnavailable),
        };
        endings.push((end, *at));
        return endings;
    }
    endings.push((Some(Code::WorkerTimeout), next(accept, first_token, idle_at)));
    endings
}

/// What a worker's word for its failure means.
pub fn meaning(code: Option<&str>) -> Code {
    match code {
        Some("WORKER_OVERLOADED" | "QUEUE_FULL") => Code::WorkerOverloaded,
        Some("MODEL_LOAD_FAILED") => Code::ModelLoadFailed,
        Some("MODEL_NOT_FOUND") => Code::ModelNotFound,
        Some("REQUEST_VALIDATION_FAILED") => Code::RequestValidationFailed,
        Some("PAYLOAD_TOO_LARGE") => Code::PayloadTooLarge,
        Some("WORKER_TIMEOUT") => Code::WorkerTimeout,
        // CANCELLED without having been told to, the controller's own affairs, and words that mean nothing.
        _ => Code::WorkerUnavailable,
    }
}

/// The text of an answer, the places of its tokens, and the tokens that its worker counts, up to its end or to what is wrong
/// in it.
pub fn said(served: &Served) -> (String, u64, u64) {
    let (mut text, mut expected) = (String::new(), 0);
    for Posted { post, .. } in &served.posts {
        match post {
            Post::Accepted => {}
            Post::Token { text: more, index, width } if *index == expected => {
                text.push_str(more);
                expected += width;
            }
            Post::Response(whole) if expected == 0 => return (whole.clone(), u64::from(!whole.is_empty()), WHOLE_TOKENS),
            _ => break,
        }
    }
    (text, expected, expected)
}

/// Whether the worker's last word on it was that nobody should try again.
pub fn forbids_retry(served: &Served) -> bool {
    served.posts.iter().any(|posted| posted.taken && matches!(posted.post, Post::Error { after: Some(-1), .. }))
}

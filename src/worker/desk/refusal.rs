//! Who is not taken, and why.

use std::time::Duration;

use tokio::time::Instant;

use super::{Desk, Doors, Floor, HELD_BYTES, Key, UNLIMITED};
use crate::error::ControllerErrorCode;
use crate::wire::{InferenceRequest, Priority, Reply};

/// What the engine wants refused, for want of memory.
pub(super) struct ClosedTo {
    /// The highest priority that is.
    up_to: Priority,
    why: String,
    retry_after_ms: Option<i64>,
}

// === impl Desk ===

impl Desk {
    /// Refuses attempts of this priority and of lower ones from now on, those that wait already too; none refuses nobody. Where it
    /// is not said when to ask again, it is when an attempt like the recent ones will have ended.
    pub(in crate::worker) fn close_to(&self, up_to: Option<Priority>, why: &str, retry_after_ms: Option<i64>) {
        let mut floor = self.floor.lock();
        floor.closed_to = up_to.map(|up_to| ClosedTo { up_to, why: why.to_owned(), retry_after_ms });
        let Some(retry) = floor.closed_to.as_ref().map(|closed| closed.retry(&floor)) else { return };
        let concerns = |priority| up_to.is_some_and(|up_to| priority <= up_to);
        let waiting: Vec<_> = floor.waiting.values().filter(|taken| concerns(taken.request.priority)).cloned().collect();
        drop(floor);
        for taken in waiting {
            self.end(&taken, ControllerErrorCode::WorkerOverloaded.as_str(), why, Some(retry));
        }
    }

    pub(super) fn refusal(
        &self,
        floor: &mut Floor,
        key: &Key,
        request: &InferenceRequest,
        size: usize,
        now: Instant,
    ) -> Option<Reply> {
        let limit = match self.limits.max_concurrent {
            0 => UNLIMITED,
            most => most as usize + self.limits.max_queue as usize,
        };
        let retry = |floor: &Floor| millis(floor.tally.next_place(self.limits.max_concurrent));
        if floor.cancels.was_before(key, now) {
            return Some(refused(ControllerErrorCode::Cancelled, "cancelled before it arrived".into(), None));
        }
        match floor.doors {
            Doors::Open => {}
            Doors::Draining(until) => {
                let left = until.saturating_duration_since(now).max(Duration::from_secs(1));
                return Some(refused(ControllerErrorCode::WorkerOverloaded, "the worker is draining".into(), Some(millis(left))));
            }
            Doors::Closed => return Some(refused(ControllerErrorCode::WorkerUnavailable, "the worker has stopped".into(), None)),
        }
        if let Err((field, why)) = check(request) {
            return Some(refused(ControllerErrorCode::RequestValidationFailed, format!("{field}: {why}"), None));
        }
        if !self.limits.models.contains(&request.model_id) {
            return Some(refused(ControllerErrorCode::ModelNotFound, "the worker does not serve this model".into(), None));
        }
        if floor.live.len() >= limit {
            let message = format!("the worker has {} requests, which is all that it takes", floor.live.len());
            return Some(refused(ControllerErrorCode::WorkerOverloaded, message, Some(retry(floor))));
        }
        if floor.held_bytes + size > HELD_BYTES {
            let message = format!("the requests at the worker would have more than {HELD_BYTES} bytes together");
            return Some(refused(ControllerErrorCode::WorkerOverloaded, message, Some(retry(floor))));
        }
        let closed = floor.closed_to.as_ref().filter(|closed| request.priority <= closed.up_to)?;
        Some(refused(ControllerErrorCode::WorkerOverloaded, closed.why.clone(), Some(closed.retry(floor))))
    }
}

// === impl ClosedTo ===

impl ClosedTo {
    fn retry(&self, floor: &Floor) -> i64 {
        self.retry_after_ms.unwrap_or_else(|| millis(floor.tally.next_place(1)))
    }
}

/// What the runtime itself needs; the rest is the engine's to judge.
fn check(request: &InferenceRequest) -> Result<(), (&'static str, &'static str)> {
    match (&request.prompt, &request.messages) {
        _ if request.request_id.is_empty() => Err(("requestId", "is empty")),
        (None, None) => Err(("messages", "give messages, or a prompt")),
        (Some(_), Some(_)) => Err(("messages", "give either messages or prompt, not both")),
        _ => Ok(()),
    }
}

/// The answer to a request that is not taken.
pub(in crate::worker) fn refused(code: ControllerErrorCode, message: String, retry_after_ms: Option<i64>) -> Reply {
    Reply::Error { message, code: Some(code.as_str().into()), retry_after_ms }
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

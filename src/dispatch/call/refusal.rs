//! What the caller is told when nobody was chosen.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Call;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::routing::Refusal;

impl Call {
    /// The error of a refusal, with what the last attempt met.
    pub(super) fn refused(&self, refusal: Refusal) -> ControllerError {
        let model = &self.request.model_id;
        let named = self.options.worker_id.as_deref().unwrap_or_default();
        let millis = |after: Duration| u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        let error = |code, message: String| ControllerError::new(code, message);
        let refusal = match refusal {
            // The codes of these are for requests that nobody has been asked for.
            Refusal::NoWorkers | Refusal::ModelNotFound | Refusal::NoHealthyWorkers { .. } if self.attempts > 0 => {
                let tried: BTreeSet<_> = self.met.iter().filter_map(|attempt| attempt["workerId"].as_str()).collect();
                Refusal::AllTried { total: self.core.router.serving(model), healthy: 0, excluded: tried.len() }
            }
            refusal => refusal,
        };
        let endpoint = self.request.relayed.as_ref().map(|asked| asked.to.path());
        let error = match refusal {
            Refusal::NoWorkers if self.core.is_disconnected() => error(
                ControllerErrorCode::NatsError,
                "the connection to NATS is down; workers are asked to register as soon as it is back".into(),
            ),
            Refusal::NoWorkers => error(
                ControllerErrorCode::NoWorkersAvailable,
                "no worker is online; start one, or wait for one to register".into(),
            )
            .with("totalWorkers", self.core.workers_known())
            .with("healthyWorkers", 0)
            .with("excludedWorkers", 0),
            Refusal::ModelNotFound if endpoint.is_some() && self.core.router.serving(model) > 0 => {
                let path = endpoint.unwrap_or_default();
                let what = match named {
                    "" => format!("no online worker that serves this model has {path}; servers reached over HTTP may have it"),
                    _ => format!("worker {named} does not serve this model, or has no {path}"),
                };
                error(ControllerErrorCode::ModelNotFound, what).with("endpoint", path)
            }
            Refusal::ModelNotFound if self.options.worker_id.is_some() => {
                error(ControllerErrorCode::ModelNotFound, format!("worker {named} does not serve this model"))
            }
            Refusal::ModelNotFound => {
                let served = self.core.router.models();
                let shown = served.iter().take(16).map(String::as_str).collect::<Vec<_>>().join(", ");
                error(ControllerErrorCode::ModelNotFound, format!("no online worker serves this model; served are: {shown}"))
            }
            Refusal::NoHealthyWorkers { retry_after } => error(
                ControllerErrorCode::NoHealthyWorkers,
                "every worker that serves this model failed lately; its breaker is open".into(),
            )
            .with("retryAfterMs", millis(retry_after).max(1))
            .with("totalWorkers", self.core.router.serving(model))
            .with("healthyWorkers", 0),
            Refusal::AllTried { total, healthy, excluded } => {
                let message = match &self.last {
                    Some(last) => format!(
                        "nobody is left to try; the last of {} attempts failed with {}: {}",
                        self.attempts,
                        last.code(),
                        last.message()
                    ),
                    None => "nobody is left to try".into(),
                };
                error(ControllerErrorCode::NoWorkersAvailable, message)
                    .with("totalWorkers", total)
                    .with("healthyWorkers", healthy)
                    .with("excludedWorkers", excluded)
            }
            Refusal::WorkerOffline => error(
                ControllerErrorCode::WorkerOffline,
                "the worker that was named is not online; leave it out to have one chosen".into(),
            ),
            Refusal::CircuitOpen { retry_after } => {
                error(ControllerErrorCode::CircuitBreakerOpen, format!("the circuit breaker of worker {named} is open"))
                    .with("retryAfterMs", millis(retry_after).max(1))
            }
            // Waited for, never told.
            Refusal::Full => error(ControllerErrorCode::QueueFull, "every worker is busy".into()),
        };
        if self.options.worker_id.is_some() { error.with("workerId", named) } else { error }
    }

    /// The last attempt's error is the cause of what ends the request between attempts.
    pub(super) fn after_last(&mut self, error: ControllerError) -> ControllerError {
        match self.last.take() {
            Some(last) => error.caused_by(last),
            None => error,
        }
    }
}

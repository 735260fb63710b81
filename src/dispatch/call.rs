//! One request, from its arrival to its end: who is asked, who is asked next, and what the caller is told.
//!
//! It promises one end for each request, with everything given back and everything recorded before the caller sees it.
//! What happens within an attempt is the attempt's business; who is chosen, the routing room's.

mod choice;
mod refusal;

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::answer::Answer;
use super::attempt::Attempt;
use super::controller::CallOptions;
use super::core::{Core, not_ready};
use super::limits::{Deadline, Limit, Mode, timeout};
use super::retry::Next;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::routing::{Choice, Lease};
use crate::telemetry::{LeftOut, RequestMetadata, RequestRecord};
use crate::transport::Outgoing;
use crate::wire::{Finish, InferenceRequest, Json, PrefixHashes, WorkerId};

/// An active request.
pub(super) struct Call {
    core: Arc<Core>,
    mode: Mode,
    request: Arc<InferenceRequest>,
    /// What the prompt begins with, where the strategy asks for it.
    prompt: Option<PrefixHashes>,
    options: CallOptions,
    deadline: Deadline,
    started: Instant,
    /// What the caller asked: `request` names another model once a fallback is turned to.
    asked: Arc<InferenceRequest>,
    /// Fallback models that have been turned to.
    fallbacks: usize,
    attempts: u32,
    failed: Vec<Failed>,
    /// Servers that have not what is asked for.
    lacking: Vec<WorkerId>,
    /// Where the request belongs, if not to the session that it names.
    session: Option<String>,
    /// The budget knows of it.
    is_counted: bool,
    first_worker: Option<WorkerId>,
    /// What each attempt met, for the error's context.
    met: Vec<Value>,
    last: Option<ControllerError>,
    first_token: Option<Duration>,
    /// Tokens that the record has not been told of.
    unrecorded: u64,
    record: RequestRecord,
    ended: bool,
}

/// A worker that failed this request.
struct Failed {
    worker: WorkerId,
    code: ControllerErrorCode,
    /// Until when it wants no further request.
    hold: Option<Instant>,
}

// === impl Call ===

impl Call {
    /// Takes a request on.
    ///
    /// # Errors
    /// CONTROLLER_NOT_READY, REQUEST_VALIDATION_FAILED, INVALID_SESSION_ID.
    pub(super) fn open(
        core: &Arc<Core>,
        request: Arc<InferenceRequest>,
        options: CallOptions,
        mode: Mode,
    ) -> Result<Self, ControllerError> {
        let stream = mode == Mode::Streaming;
        let request = if request.stream == stream && !request.request_id.is_empty() {
            request
        } else {
            let mut request = Arc::unwrap_or_clone(request);
            request.stream = stream;
            if request.request_id.is_empty() {
                request.request_id = uuid::Uuid::new_v4().to_string();
            }
            Arc::new(request)
        };
        let started = Instant::now();
        let deadline = core.limits.deadline(mode, options.timeout, started);
        let record = Self::admit(core, &request, started).map_err(|error| match request.request_id.len() {
            1..=256 => error.or_with("requestId", &*request.request_id).or_with("modelId", &*request.model_id),
            _ => error,
        })?;
        Ok(Self {
            core: core.clone(),
            mode,
            options,
            deadline,
            started,
            asked: request.clone(),
            prompt: core.router.wants_prefixes().then(|| PrefixHashes::of(&request)),
            fallbacks: 0,
            attempts: 0,
            failed: Vec::new(),
            lacking: Vec::new(),
            session: choice::session(&request),
            is_counted: false,
            first_worker: None,
            met: Vec::new(),
            last: None,
            first_token: None,
            unrecorded: 0,
            record,
            ended: false,
            request,
        })
    }

    fn admit(core: &Core, request: &InferenceRequest, now: Instant) -> Result<RequestRecord, ControllerError> {
        if !core.is_ready() {
            return Err(not_ready(core.state()));
        }
        request.validate()?;
        core.requests.begin(request, now)
    }

    pub(super) fn request(&self) -> &Arc<InferenceRequest> {
        &self.request
    }

    /// The next attempt, not sent yet.
    ///
    /// # Errors
    /// Why there is none; the request has ended with it.
    pub(super) async fn attempt(&mut self) -> Result<Attempt, ControllerError> {
        loop {
            match self.lease().await {
                Ok(lease) => return Ok(self.begin(lease)),
                Err(error) if self.turn_to_fallback(error.code()) => {}
                Err(error) => {
                    let error = self.after_last(error);
                    return Err(self.give_up(error));
                }
            }
        }
    }

    /// An attempt failed: returns when the next one may be made.
    ///
    /// # Errors
    /// What the caller is told; the request has ended with it.
    pub(super) async fn failed(&mut self, attempt: Attempt, error: ControllerError) -> Result<(), ControllerError> {
        if error.code() == ControllerErrorCode::StreamInterrupted {
            return Err(self.abandoned(attempt, error));
        }
        if error.lacks_endpoint() && self.options.worker_id.is_none() {
            return self.withdraw(attempt, error);
        }
        let now = Instant::now();
        let over = attempt.is_requests_own_end(&error, now);
        let error = self.attempt_failed(attempt, error);
        if self.options.worker_id.is_some() {
            return Err(self.give_up(error));
        }
        let next = self.core.next(&error, self.attempts);
        // Another model is another request: that a worker no longer serves the first one is not held against it.
        let turns = error.code() == ControllerErrorCode::ModelNotFound && self.can_turn_to_fallback(now);
        let turns = turns && error.retry_after_ms().is_none_or(|after| after >= 0);
        let turns = turns && next == Next::Surface && self.attempts < self.core.retry.attempts();
        let affordable = || self.core.budgets.lock().affords(&self.request.model_id, error.code(), now);
        if next != Next::Surface && !over && !affordable() {
            return Err(self.give_up(error.with("retryBudgetExhausted", true)));
        }
        let delay = match next {
            Next::Surface if turns => Duration::ZERO,
            Next::Surface => return Err(self.give_up(error)),
            Next::Exhausted => {
                let told = ControllerError::new(
                    ControllerErrorCode::AllRetriesExhausted,
                    format!("{} attempts failed, the last one with {}: {}", self.attempts, error.code(), error.message()),
                );
                return Err(self.give_up(told.caused_by(error)));
            }
            Next::After(_) if over => return Err(self.give_up(error)),
            Next::After(delay) => delay,
        };
        if !turns && self.is_nobody_left(now) {
            // The next selection says so; there is nothing to wait for.
            self.last = Some(error);
            return Ok(());
        }
        if now + delay >= self.deadline.at {
            let told =
                timeout(Limit::Total, "no time is left for another attempt; the request was not finished", self.deadline.span);
            return Err(self.give_up(told.caused_by(error)));
        }
        if !self.core.budgets.lock().take(&self.request.model_id, error.code(), now) {
            return Err(self.give_up(error.with("retryBudgetExhausted", true)));
        }
        let code = error.code();
        if turns {
            self.turn_to_fallback(code);
        }
        self.core.metrics.retry(code);
        let (request_id, worker_id) = (&*self.request.request_id, self.failed.last().map(|failed| failed.worker.as_str()));
        tracing::warn!(
            request_id,
            worker_id,
            code = code.as_str(),
            duration_ms = self.record.elapsed_ms(now),
            attempt = self.attempts,
            "attempt failed, another worker is tried"
        );
        self.last = Some(error);
        if !delay.is_zero() {
            tokio::select! {
                biased;
                () = tokio::time::sleep(delay) => {}
                () = self.core.cut.fired() => {
                    let error = self.after_last(not_ready(self.core.state()));
                    return Err(self.give_up(error));
                }
            }
        }
        Ok(())
    }

    /// The first token came.
    pub(super) fn first_token(&mut self) {
        if self.first_token.is_none() {
            let now = Instant::now();
            self.first_token = Some(now.saturating_duration_since(self.started));
            self.record.first_token(now);
        }
    }

    /// So many more tokens were delivered, which the record is told [together](Self::record_tokens).
    pub(super) fn tokens(&mut self, count: u64) {
        self.unrecorded += count;
    }

    /// Tells the record of the tokens that came.
    pub(super) fn record_tokens(&mut self) {
        match std::mem::take(&mut self.unrecorded) {
            0 => {}
            count => self.record.tokens(count),
        }
    }

    /// The answer is complete.
    pub(super) fn complete(&mut self, attempt: Attempt, finish: Finish, text: String, logprobs: Option<Json>) -> Answer {
        let now = Instant::now();
        let worker_id = attempt.worker().clone();
        let core = self.core.clone();
        core.metrics.dropped_replies(attempt.dropped());
        if attempt.succeed(now) {
            self.record.breaker_tripped();
        }
        core.metrics.attempt_ended(&worker_id, None);
        if let Some(previous) = self.first_worker.as_ref().filter(|first| **first != worker_id) {
            core.events.failover(&self.request.request_id, &worker_id, previous);
        }
        core.metrics.tokens(Some(&self.request.model_id), &finish.usage);
        let metadata = self.end(Ok(()), now);
        tracing::info!(
            request_id = &*self.request.request_id,
            worker_id = worker_id.as_str(),
            duration_ms = metadata.duration_ms,
            attempts = self.attempts,
            tokens = metadata.tokens,
            "request completed"
        );
        Answer {
            request_id: metadata.request_id.clone(),
            model_id: if self.fallbacks == 0 { metadata.model_id.clone() } else { self.request.model_id.as_str().into() },
            worker_id,
            text,
            finish_reason: finish.reason,
            usage: finish.usage,
            tool_calls: finish.tool_calls,
            logprobs,
            metadata,
        }
    }

    /// The stream broke after tokens were delivered.
    pub(super) fn interrupted(&mut self, attempt: Attempt, error: ControllerError) -> ControllerError {
        if error.code() == ControllerErrorCode::StreamInterrupted {
            return self.abandoned(attempt, error);
        }
        let error = self.attempt_failed(attempt, error);
        if error.code() == ControllerErrorCode::ControllerNotReady {
            return self.give_up(error);
        }
        let told = ControllerError::new(
            ControllerErrorCode::StreamInterrupted,
            format!("the stream broke after tokens were delivered: {}", error.message()),
        )
        .with("cause", error.code().as_str());
        let facts = error.context().clone().into_iter();
        let told = facts.fold(told, |told, (key, value)| told.or_with(&key, value));
        self.give_up(told.caused_by(error))
    }

    /// The reader cannot follow: nobody's failure but its own.
    pub(super) fn abandoned(&mut self, attempt: Attempt, error: ControllerError) -> ControllerError {
        drop(attempt);
        self.record.attempt_ended(Some(ControllerErrorCode::Cancelled), Instant::now());
        self.give_up(error)
    }

    fn begin(&mut self, lease: Lease) -> Attempt {
        let now = Instant::now();
        self.attempts += 1;
        let worker = lease.worker_id().clone();
        if !std::mem::replace(&mut self.is_counted, true) {
            self.core.budgets.lock().request(&self.request.model_id, now);
        }
        if self.attempts == 1 {
            self.first_worker = Some(worker.clone());
        }
        let left_out = lease.left_out(&self.query(&self.left_aside()), now);
        if lease.choice() != Choice::Named {
            self.core.left_out.tell(&self.request.request_id, &self.request.model_id, &left_out, now);
        }
        let left_out = left_out.into_iter().map(|(worker_id, why)| LeftOut { worker_id, reason: why.as_str().into() }).collect();
        self.record.attempt_started(&worker, lease.choice().as_str(), left_out, now);
        tracing::debug!(
            request_id = &*self.request.request_id,
            worker_id = worker.as_str(),
            choice = lease.choice().as_str(),
            attempt = self.attempts,
            "worker selected"
        );
        let loading = lease.is_loading(&self.request.model_id);
        let timers = self.core.limits.timers(self.mode, loading, self.deadline, now);
        // It says nothing before its first token.
        let timers = if lease.is_legacy() { timers.without_accept() } else { timers };
        let outgoing = Outgoing {
            worker,
            request: self.request.clone(),
            attempt: self.attempts,
            timeout: timers.left(now),
            traceparent: self.options.traceparent.clone(),
            older: lease.is_legacy(),
        };
        let transport = self.core.transport(lease.carrier());
        Attempt::new(transport, lease, outgoing, timers, &self.core.cut, now)
    }

    /// A worker has not what is asked for: that was a question, and no attempt. Whoever may have it is asked next, or the choice
    /// says why nobody is.
    fn withdraw(&mut self, attempt: Attempt, error: ControllerError) -> Result<(), ControllerError> {
        let now = Instant::now();
        self.lacking.push(attempt.worker().clone());
        self.core.metrics.dropped_replies(attempt.dropped());
        attempt.fail(&error, now);
        self.attempts -= 1;
        self.record.attempt_withdrawn();
        if now >= self.deadline.at {
            let told = timeout(Limit::Total, "no time is left to ask another worker", self.deadline.span);
            return Err(self.give_up(told.caused_by(error)));
        }
        self.last.get_or_insert(error);
        Ok(())
    }

    /// Gives back what the attempt held, and notes what it met.
    fn attempt_failed(&mut self, attempt: Attempt, error: ControllerError) -> ControllerError {
        let now = Instant::now();
        let worker = attempt.worker().clone();
        self.core.metrics.dropped_replies(attempt.dropped());
        let tripped = attempt.fail(&error, now);
        self.core.metrics.attempt_ended(&worker, Some(error.code()));
        self.record.attempt_ended(Some(error.code()), now);
        if tripped {
            self.record.breaker_tripped();
        }
        self.met.push(json!({"workerId": worker.as_str(), "code": error.code(), "message": error.message()}));
        let hold =
            error.retry_after_ms().and_then(|after| u64::try_from(after).ok()).map(|after| now + Duration::from_millis(after));
        self.failed.push(Failed { worker, code: error.code(), hold });
        error
    }

    /// Ends the request with an error, and gives the error as the caller sees it.
    fn give_up(&mut self, error: ControllerError) -> ControllerError {
        let mut error = error.or_with("requestId", &*self.request.request_id).or_with("modelId", &*self.request.model_id);
        if !self.met.is_empty() {
            error = error.with("attempts", std::mem::take(&mut self.met));
        }
        let metadata = self.end(Err(&error), Instant::now());
        tracing::error!(
            request_id = &*self.request.request_id,
            worker_id = metadata.selected_worker.as_deref(),
            code = error.code().as_str(),
            duration_ms = metadata.duration_ms,
            attempts = self.attempts,
            "request failed: {}",
            error.message_for_log()
        );
        error
    }

    /// Closes the books. What is recorded is final before the caller hears of it.
    fn end(&mut self, result: Result<(), &ControllerError>, now: Instant) -> Arc<RequestMetadata> {
        self.ended = true;
        self.record_tokens();
        let metadata = self.record.finish(result, now);
        self.tell_end(result.err().map(ControllerError::code), now);
        metadata
    }

    fn tell_end(&self, code: Option<ControllerErrorCode>, now: Instant) {
        // Names that callers invent are no labels.
        let model = &*self.request.model_id;
        let is_known = self.attempts > 0 || self.core.metrics.knows_model(model) || self.core.router.serving(model) > 0;
        let model = is_known.then_some(model);
        let duration = now.saturating_duration_since(self.started);
        self.core.metrics.request_ended(model, code, duration, self.first_token);
        self.core.ended.notify_waiters();
    }
}

/// The caller went away.
impl Drop for Call {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.record_tokens();
        let now = Instant::now();
        let gone = ControllerError::new(ControllerErrorCode::Cancelled, "the caller went away");
        let metadata = self.record.finish(Err(&gone), now);
        self.tell_end(Some(gone.code()), now);
        tracing::info!(
            request_id = &*self.request.request_id,
            worker_id = metadata.selected_worker.as_deref(),
            duration_ms = metadata.duration_ms,
            attempts = self.attempts,
            "request cancelled: its caller went away"
        );
    }
}

//! One attempt: sent to one worker, under four timers, to its end.
//!
//! It promises tokens in order and without gaps, exactly one end, and that a worker that can be told to stop is told so
//! whenever the attempt ends before the worker's answer does, be it by being dropped. It knows nothing of other attempts.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::{Instant, Sleep};

use super::limits::{Limit, Timers};
use crate::error::{ControllerError, ControllerErrorCode};
use crate::routing::{Lease, Outcome};
use crate::signal::{Listener, Signal};
use crate::transport::{Delivery, Mailbox, Outgoing, Transport};
use crate::wire::{ANSWER_MOST, Finish, Json, Reply, Token, WorkerId};

/// How often is looked whether a model that a worker loads is there.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A running attempt.
pub(super) struct Attempt {
    transport: Arc<dyn Transport>,
    lease: Option<Lease>,
    outgoing: Outgoing,
    timers: Timers,
    sent: Instant,
    /// When it was looked at the clock last.
    latest: Instant,
    stage: Stage,
    sleep: Pin<Box<Sleep>>,
    /// What the sleep was set to last; never later than the limit that passes next.
    armed: Instant,
    gone: Listener,
    cut: Listener,
    accepted: bool,
    /// Our own connection was lost while it ran.
    disturbed: bool,
    /// The place that the next token has to have.
    expected: u64,
    /// Bytes of the answer so far.
    size: usize,
    /// Replies that the protocol has no place for.
    dropped: u64,
}

enum Stage {
    Unsent,
    Running(Mailbox),
    Over,
}

/// What happens to an attempt that runs.
enum Event {
    Delivered(Option<Delivery>),
    /// The worker is gone.
    Gone,
    /// The controller stops.
    Cut,
    Passed(Limit),
}

/// What an attempt has to tell.
pub(super) enum Step {
    /// A piece of the answer.
    Token(Token),
    /// The end of it.
    End(Finish),
    /// All of it at once.
    Whole(Whole),
}

/// An answer in one message.
pub(super) struct Whole {
    pub(super) text: String,
    pub(super) finish: Finish,
    pub(super) logprobs: Option<Json>,
}

// === impl Attempt ===

impl Attempt {
    /// An attempt that is not sent yet: the first [`next`](Self::next) does. `cut` fires when the controller stops.
    pub(super) fn new(
        transport: Arc<dyn Transport>,
        lease: Lease,
        outgoing: Outgoing,
        timers: Timers,
        cut: &Signal,
        now: Instant,
    ) -> Self {
        let gone = lease.gone().listen();
        let (at, _) = timers.next();
        Self {
            transport,
            lease: Some(lease),
            outgoing,
            timers,
            sent: now,
            latest: now,
            stage: Stage::Unsent,
            sleep: Box::pin(tokio::time::sleep_until(at)),
            armed: at,
            gone,
            cut: cut.listen(),
            accepted: false,
            disturbed: false,
            expected: 0,
            size: 0,
            dropped: 0,
        }
    }

    pub(super) fn worker(&self) -> &WorkerId {
        &self.outgoing.worker
    }

    /// Replies that the protocol has no place for.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Whether a token has been given out.
    pub(super) fn has_begun(&self) -> bool {
        self.expected > 0
    }

    /// Whether it ended because the time of its request was over, be it that the worker noticed first.
    pub(super) fn is_requests_own_end(&self, error: &ControllerError, now: Instant) -> bool {
        error.code() == ControllerErrorCode::WorkerTimeout
            && error.context().get("limit").is_some_and(|limit| limit == Limit::Total.as_str())
            && self.timers.request_is_over(now)
    }

    /// The next thing that it has to tell. Cancel-safe. After an end or an error it is not called again.
    pub(super) async fn next(&mut self) -> Result<Step, ControllerError> {
        loop {
            match &self.stage {
                Stage::Unsent => self.send().await?,
                Stage::Running(_) => match poll_fn(|context| self.poll_event(context)).await {
                    Event::Delivered(delivery) => {
                        self.latest = Instant::now();
                        if let Some(step) = self.take(delivery, self.latest)? {
                            return Ok(step);
                        }
                    }
                    Event::Gone => return Err(self.failed(offline())),
                    Event::Cut => return Err(self.failed(cut_off())),
                    Event::Passed(limit) => return Err(self.failed(self.timers.passed(limit))),
                },
                Stage::Over => return Err(self.failed(defect("an attempt was asked after its end"))),
            }
        }
    }

    async fn send(&mut self) -> Result<(), ControllerError> {
        let limit = self.set_sleep(None);
        let send: BoxFuture<'_, _> = self.transport.send(&self.outgoing);
        let sent = tokio::select! {
            biased;
            sent = send => sent,
            () = self.cut.fired() => Err(cut_off()),
            () = &mut self.sleep => Err(self.timers.passed(limit)),
        };
        self.stage = Stage::Running(sent.map_err(|error| self.failed(error))?);
        Ok(())
    }

    /// What happens first to an attempt that runs; what is there already comes before all else.
    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        if let Stage::Running(mailbox) = &mut self.stage
            && let Poll::Ready(delivery) = mailbox.poll_recv(context)
        {
            return Poll::Ready(Event::Delivered(delivery));
        }
        if self.gone.poll_fired(context).is_ready() {
            return Poll::Ready(Event::Gone);
        }
        if self.cut.poll_fired(context).is_ready() {
            return Poll::Ready(Event::Cut);
        }
        loop {
            self.look_for_the_model();
            let look = self.timers.is_loading().then(|| Instant::now() + LOOK_AGAIN);
            self.set_sleep(look);
            ready!(self.sleep.as_mut().poll(context));
            self.look_for_the_model();
            self.look_for_loading();
            let (at, limit) = self.timers.next();
            if at <= Instant::now() {
                return Poll::Ready(Event::Passed(limit));
            }
        }
    }

    /// Sets the sleep to the limit that passes next, or to an earlier time, and says which limit that is.
    fn set_sleep(&mut self, earlier: Option<Instant>) -> Limit {
        let (at, limit) = self.timers.next();
        let at = earlier.map_or(at, |earlier| earlier.min(at));
        // One that is set to an earlier time is left alone: tokens move the limit further with each of them.
        if at < self.armed || self.sleep.is_elapsed() {
            self.sleep.as_mut().reset(at);
            self.armed = at;
        }
        limit
    }

    /// Notes when the worker has loaded the model.
    fn look_for_the_model(&mut self) {
        let still = |lease: &Lease| lease.is_loading(&self.outgoing.request.model_id);
        if self.timers.is_loading() && !self.lease.as_ref().is_some_and(still) {
            self.timers.loaded(Instant::now());
        }
    }

    /// Notes, where a limit passes, that the worker has begun to load the model since the request was sent.
    fn look_for_loading(&mut self) {
        let now = Instant::now();
        let loads = |lease: &Lease| lease.is_loading(&self.outgoing.request.model_id);
        if self.timers.may_begin_loading() && self.timers.next().0 <= now && self.lease.as_ref().is_some_and(loads) {
            self.timers.begin_loading(self.sent);
        }
    }

    /// The time at which [`next`](Self::next) returned.
    pub(super) fn latest(&self) -> Instant {
        self.latest
    }

    /// What is there already.
    pub(super) fn try_next(&mut self, now: Instant) -> Result<Option<Step>, ControllerError> {
        while let Stage::Running(mailbox) = &mut self.stage {
            let Some(delivery) = mailbox.try_recv() else { break };
            if let Some(step) = self.take(Some(delivery), now)? {
                return Ok(Some(step));
            }
        }
        Ok(None)
    }

    /// Ends it well; true when that opened the worker's breaker all the same: it may be the one that completes a bad rate.
    /// Everything that it held is free before this returns.
    pub(super) fn succeed(mut self, now: Instant) -> bool {
        self.close();
        self.lease.take().is_some_and(|lease| lease.end(Outcome::Success, now))
    }

    /// Ends it with an error; true when that opened the worker's breaker. Everything that it held is free, and the worker
    /// has been told, before this returns.
    pub(super) fn fail(mut self, error: &ControllerError, now: Instant) -> bool {
        self.close();
        let blameless = error.code() == ControllerErrorCode::WorkerTimeout
            && self.timers.shortened_by_caller()
            && self.is_requests_own_end(error, now);
        if let (Some(lease), Some(Ok(after))) = (&self.lease, error.retry_after_ms().map(u64::try_from)) {
            lease.hold_back(Duration::from_millis(after), now);
        }
        let blameless = blameless || self.disturbed && may_be_lost(error);
        let outcome = if blameless { Outcome::Ignored } else { Outcome::Failure(error.code()) };
        self.lease.take().is_some_and(|lease| lease.end(outcome, now))
    }

    fn take(&mut self, delivery: Option<Delivery>, now: Instant) -> Result<Option<Step>, ControllerError> {
        let reply = match delivery {
            Some(Delivery::Reply(reply)) => reply,
            Some(Delivery::Failed(error)) => {
                // Nobody listens, or nobody can be told.
                if error.context().contains_key("noResponders") {
                    self.stage = Stage::Over;
                }
                return Err(self.failed(error));
            }
            Some(Delivery::Disturbed) => {
                self.disturbed = true;
                return Ok(None);
            }
            Some(Delivery::Overflow) => return Err(self.failed(unread())),
            None => return Err(self.failed(protocol_error("its answer was lost"))),
        };
        match reply {
            Reply::Accepted { .. } => {
                self.dropped += u64::from(std::mem::replace(&mut self.accepted, true) || self.has_begun());
                self.timers.heard();
                Ok(None)
            }
            Reply::Token(token) => self.take_token(token, now).map(Some),
            Reply::Done(finish) => {
                self.stage = Stage::Over;
                Ok(Some(Step::End(finish)))
            }
            Reply::Response { text, finish, logprobs } => {
                if self.has_begun() {
                    return Err(self.failed(protocol_error("a response came after tokens")));
                }
                self.stage = Stage::Over;
                Ok(Some(Step::Whole(Whole { text, finish, logprobs })))
            }
            Reply::Error { message, code, retry_after_ms } => {
                self.stage = Stage::Over;
                let error = self.workers_own(message, code.as_deref(), retry_after_ms);
                Err(self.failed(error))
            }
        }
    }

    fn take_token(&mut self, token: Token, now: Instant) -> Result<Step, ControllerError> {
        if token.index != self.expected {
            let error = if self.disturbed { lost_tokens() } else { protocol_error("its tokens came out of order") };
            return Err(self.failed(error.with("index", token.index).with("expected", self.expected)));
        }
        // Tokens that are there already come before the timer is looked at.
        if self.timers.left(now).is_zero() {
            let error = self.timers.passed(Limit::Total);
            return Err(self.failed(error));
        }
        // Whoever gathers the answer keeps all of it.
        self.size += token.size();
        if self.size > ANSWER_MOST {
            return Err(self.failed(protocol_error("its answer does not end")));
        }
        if self.expected == 0
            && let Some(lease) = &self.lease
        {
            lease.first_token(now.saturating_duration_since(self.sent), now);
        }
        self.expected += token.width();
        self.timers.token(now);
        Ok(Step::Token(token))
    }

    fn workers_own(&self, message: String, code: Option<&str>, retry_after_ms: Option<i64>) -> ControllerError {
        let code = match ControllerErrorCode::from_worker(code) {
            // Nobody told it to stop.
            ControllerErrorCode::Cancelled => ControllerErrorCode::WorkerUnavailable,
            code => code,
        };
        let error = ControllerError::in_workers_words(code, message);
        let error = match code {
            // A worker drops by itself what is past its deadline.
            ControllerErrorCode::WorkerTimeout => error.with("limit", Limit::Total.as_str()),
            _ => error,
        };
        match retry_after_ms {
            Some(after) => error.with("retryAfterMs", after),
            None => error,
        }
    }

    /// The error with what is known here.
    fn failed(&self, error: ControllerError) -> ControllerError {
        error.or_with("workerId", &self.outgoing.worker)
    }

    /// Tells the worker to stop, if it may still be at it and knows the word, and lets go of the replies.
    fn close(&mut self) {
        let stage = std::mem::replace(&mut self.stage, Stage::Over);
        if let Stage::Running(mailbox) = stage
            && !self.outgoing.older
        {
            self.transport.cancel(&self.outgoing, &mailbox);
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.close();
    }
}

/// Whether this is how it looks when parts of an answer are lost on their way.
fn may_be_lost(error: &ControllerError) -> bool {
    error.code() == ControllerErrorCode::WorkerTimeout
        || ["protocolError", "connectionLost"].iter().any(|key| error.context().contains_key(*key))
}

fn lost_tokens() -> ControllerError {
    ControllerError::new(ControllerErrorCode::WorkerUnavailable, "tokens were lost with the connection to NATS")
        .with("connectionLost", true)
}

fn protocol_error(what: &str) -> ControllerError {
    ControllerError::new(ControllerErrorCode::WorkerUnavailable, format!("the worker broke the protocol: {what}"))
        .with("protocolError", what)
}

fn unread() -> ControllerError {
    ControllerError::new(ControllerErrorCode::StreamInterrupted, "the answer came faster than it was read for too long")
        .with("limit", "reader")
}

fn offline() -> ControllerError {
    ControllerError::new(
        ControllerErrorCode::WorkerOffline,
        "the worker is gone: silent for too long, or replaced by a new start",
    )
}

fn cut_off() -> ControllerError {
    ControllerError::new(ControllerErrorCode::ControllerNotReady, "the controller stopped before the request was finished")
}

fn defect(what: &str) -> ControllerError {
    ControllerError::new(ControllerErrorCode::InternalError, what)
}

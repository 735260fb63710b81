//! The work of an engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::answer::Taken;
use super::desk::{Attempt, Desk};
use crate::error::ControllerErrorCode;
use crate::wire::{Finish, InferenceRequest, Json, Phase, Priority};

/// The work of one engine, in the order in which it is to be done. Clones are the same one.
#[derive(Clone)]
pub struct JobQueue(Arc<Desk>);

/// One attempt at one request. Exactly one of `done` and `error` ends it; afterwards, and once it is cancelled or put back,
/// every method is without effect. Dropped without an end it is answered as WORKER_UNAVAILABLE.
pub struct Job {
    desk: Arc<Desk>,
    attempt: Arc<Attempt>,
    /// It was put back: whoever holds this holds nothing.
    put_back: AtomicBool,
}

/// A piece of a job's answer, for [`JobQueue::deliver`].
pub struct Piece {
    /// Whose.
    pub job: Arc<Job>,
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// Their log probabilities.
    pub logprobs: Option<Json>,
}

// === impl JobQueue ===

impl JobQueue {
    pub(super) fn new(desk: Arc<Desk>) -> Self {
        Self(desk)
    }

    /// The next job, blocking the thread: none when the time has passed or the queue is closed.
    #[must_use]
    pub fn get(&self, timeout: Option<Duration>) -> Option<Job> {
        self.0.get(timeout).map(|attempt| Job::new(self.0.clone(), attempt))
    }

    /// The next job, for a task of its own: where it ends by another's word it keeps its place until [`Job::let_go`]. None when the queue is closed. A
    /// dropped future loses no job.
    pub async fn next(&self) -> Option<Job> {
        let attempt = self.0.next().await?;
        Some(Job::new(self.0.clone(), attempt))
    }

    /// Whether no further job will come.
    #[must_use]
    pub fn closed(&self) -> bool {
        self.0.is_closed()
    }

    /// What heartbeats say from now on. The first `Ready` lets the worker register. Jobs for models that are being loaded are not
    /// handed out.
    pub fn report(&self, phase: Phase, loaded: Vec<String>, loading: Vec<String>) {
        self.0.hold_for(&loading);
        self.0.board.send_if_modified(|board| {
            let mut next = board.clone();
            next.has_spoken = true;
            next.was_ready |= phase == Phase::Ready;
            (next.phase, next.loaded, next.loading) = (phase, loaded, loading);
            let changed = next != *board;
            *board = next;
            changed
        });
    }

    /// Whoever waits for work without having reported anything is ready for it.
    pub fn report_waiting(&self) {
        if !self.0.board.borrow().has_spoken {
            self.report(Phase::Ready, Vec::new(), Vec::new());
        }
    }

    /// Which prompts the engine's caches hold, as hashes of [`PrefixHashes`](crate::wire::PrefixHashes): heartbeats say so from the next one
    /// on. They change with every answer, so that they call for no heartbeat of their own.
    pub fn hold(&self, prefixes: Vec<String>) {
        self.0.board.send_if_modified(|board| {
            board.cached = prefixes.into();
            false
        });
    }

    /// The models that waiting jobs ask for, each once.
    #[must_use]
    pub fn waiting_models(&self) -> Vec<String> {
        self.0.waiting_models().into_iter().collect()
    }

    /// Refuses, as WORKER_OVERLOADED, requests of this priority and of lower ones from now on, waiting jobs too; none refuses
    /// nobody. Where `retry_after_ms` is not said, it is estimated.
    pub fn refuse(&self, up_to: Option<Priority>, why: &str, retry_after_ms: Option<i64>) {
        self.0.close_to(up_to, why, retry_after_ms);
    }

    /// Delivers pieces of several jobs, as [`Job::token`] does: they are handed over together, which costs a fraction of one after the other.
    pub fn deliver(&self, pieces: impl IntoIterator<Item = Piece>) {
        let _together = self.0.outbox.gather();
        for Piece { job, text, token_ids, logprobs } in pieces {
            job.token(&text, &token_ids, logprobs);
        }
    }

    /// The engine has ended, with an error where there is one: nobody will take jobs any more.
    pub fn engine_ended(&self, error: Option<String>) {
        self.0.board.send_modify(|board| {
            board.ended.get_or_insert(error);
        });
    }
}

// === impl Job ===

impl Job {
    fn new(desk: Arc<Desk>, attempt: Arc<Attempt>) -> Self {
        Self { desk, attempt, put_back: AtomicBool::new(false) }
    }

    /// Gives it back to the queue, where it waits as before and is handed out again as another job: its model has to be loaded
    /// first, which [`JobQueue::report`] has said. A job of which a piece was delivered is not put back.
    pub fn put_back(&self) {
        if self.attempt.answer.tokens() == 0 && !self.put_back.swap(true, Ordering::Relaxed) {
            self.desk.put_back(&self.attempt);
        }
    }

    /// What is asked.
    #[must_use]
    pub fn request(&self) -> &Arc<InferenceRequest> {
        &self.attempt.request
    }

    /// 1 for the first attempt.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt.number()
    }

    /// Fires when nobody waits any more: cancelled, past its deadline, or the worker stops.
    #[must_use]
    pub fn cancelled(&self) -> &CancellationToken {
        &self.attempt.token
    }

    /// Delivers a piece of the answer. The runtime counts the index. Never waits: see [`Self::has_room`].
    pub fn token(&self, text: &str, token_ids: &[u32], logprobs: Option<Json>) {
        if self.put_back.load(Ordering::Relaxed) {
            return;
        }
        match self.attempt.answer.piece(text, token_ids, logprobs) {
            Taken::Yes | Taken::Over => {}
            Taken::Gone => self.desk.end(&self.attempt, ControllerErrorCode::Cancelled.as_str(), "nobody waits any more", None),
            Taken::Overflow => self.desk.end(
                &self.attempt,
                ControllerErrorCode::WorkerUnavailable.as_str(),
                "the answer is longer than what may wait to be sent",
                None,
            ),
        }
    }

    /// Whether the answer goes out as fast as it comes. An engine that delivers in spite of `false` for long loses the
    /// job: see [`Self::wait_for_room`] and [`Self::room`].
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.attempt.answer.has_room()
    }

    /// Blocks the thread until [`Self::has_room`], or until the time has passed.
    pub fn wait_for_room(&self, limit: Duration) {
        self.attempt.answer.wait_for_room(limit);
    }

    /// Returns when [`Self::has_room`].
    pub async fn room(&self) {
        tokio::select! {
            () = self.attempt.answer.room() => {}
            () = self.attempt.token.cancelled() => {}
        }
    }

    /// Ends it well. `completion_tokens` of the usage is counted where it is none; the time is the runtime's.
    pub fn done(&self, mut finish: Finish, completion_tokens: Option<u64>) {
        if self.put_back.load(Ordering::Relaxed) {
            return;
        }
        let attempt = &self.attempt;
        attempt.runs_on.store(false, Ordering::Relaxed);
        if attempt.answer.close() {
            finish.usage.completion_tokens = completion_tokens.unwrap_or_else(|| attempt.answer.tokens());
            finish.latency_ms = (attempt.arrived.elapsed().as_secs_f64() * 1e6).round() / 1e3;
            self.desk.leave(attempt, true);
            attempt.answer.finish(finish);
        }
    }

    /// Nobody works on it any more: a job of [`JobQueue::next`] that was cancelled gives its place back.
    pub fn let_go(&self) {
        if self.put_back.load(Ordering::Relaxed) {
            return;
        }
        self.desk.let_go(&self.attempt);
    }

    /// Ends it badly.
    pub fn error(&self, code: &str, message: &str, retry_after_ms: Option<i64>) {
        if self.put_back.load(Ordering::Relaxed) {
            return;
        }
        self.attempt.runs_on.store(false, Ordering::Relaxed);
        self.desk.end(&self.attempt, code, message, retry_after_ms);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if *self.put_back.get_mut() {
            return;
        }
        let code = ControllerErrorCode::WorkerUnavailable.as_str();
        self.desk.end(&self.attempt, code, "the engine let go of the request without an end", None);
        self.let_go();
    }
}

/// Names the job; says nothing of what was asked.
impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("request", self.request()).field("attempt", &self.attempt()).finish_non_exhaustive()
    }
}

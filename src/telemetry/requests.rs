//! The memory of requests: every active one, and of the ended ones the youngest, for a while.
//!
//! Promises: an active request is never dropped; ended ones are kept for `retentionMs` and at most `maxEntries` of them,
//! the oldest going first; every record ends, be it by its guard's drop. Nothing here waits: the map's lock is held for a
//! look-up, a record's lock for a change of a few fields. Time comes in with each call.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hashlink::LinkedHashMap;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::metadata::{Attempt, FinalError, LeftOut, RequestMetadata, RequestStatus};
use crate::config::RequestMetricsConfig;
use crate::error::{ControllerError, ControllerErrorCode, epoch_ms};
use crate::wire::{InferenceRequest, WorkerId};

/// Left-out workers that an attempt remembers.
const LEFT_OUT_MAX: usize = 64;
/// Characters of a final error's message that are remembered.
const MESSAGE_MAX: usize = 512;

/// The metadata of requests, bounded in number and time.
pub struct Requests {
    retention: Duration,
    max_entries: usize,
    queued: AtomicUsize,
    store: Mutex<Store>,
}

#[derive(Default)]
struct Store {
    /// Callers choose the names: std's hasher is proof against chosen ones.
    active: HashMap<Arc<str>, Arc<Live>>,
    /// In the order of their ends.
    ended: LinkedHashMap<Arc<str>, Ended>,
    begun: u64,
    completed: u64,
}

struct Ended {
    at: Instant,
    metadata: Arc<RequestMetadata>,
}

struct Live {
    id: Arc<str>,
    /// The place in the order of arrival.
    sequence: u64,
    start: Instant,
    state: Mutex<State>,
}

struct State {
    /// Shared with whoever looked; copied on the next change where somebody still does.
    metadata: Arc<RequestMetadata>,
    /// When the attempt that runs was sent.
    attempt: Option<Instant>,
}

/// The record of one active request. Dropped without [`finish`](Self::finish), it ends as cancelled.
pub struct RequestRecord {
    requests: Arc<Requests>,
    live: Arc<Live>,
    finished: bool,
}

// === impl Requests ===

impl Requests {
    /// An empty memory with the limits of the configuration.
    #[must_use]
    pub fn new(config: &RequestMetricsConfig) -> Arc<Self> {
        Arc::new(Self {
            retention: Duration::from_millis(config.retention_ms),
            max_entries: config.max_entries,
            queued: AtomicUsize::new(0),
            store: Mutex::default(),
        })
    }

    /// Opens the record of a request, which is queued until its first attempt. An ended one of the same id is replaced.
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED: a request with this id is active.
    pub fn begin(self: &Arc<Self>, request: &InferenceRequest, now: Instant) -> Result<RequestRecord, ControllerError> {
        let id: Arc<str> = request.request_id.as_str().into();
        let metadata = RequestMetadata {
            request_id: id.clone(),
            model_id: request.model_id.as_str().into(),
            session_id: request.session_id.clone(),
            start_time: epoch_ms(),
            end_time: None,
            duration_ms: None,
            time_to_first_token_ms: None,
            retry_count: 0,
            selected_worker: None,
            failed_workers: Vec::new(),
            circuit_breaker_trips: 0,
            timeouts: 0,
            final_error: None,
            status: RequestStatus::Queued,
            tokens: 0,
            attempts: Vec::new(),
        };
        let mut store = self.store.lock();
        if store.active.contains_key(&id) {
            return Err(ControllerError::validation("request_id", "a request with this id is still active; give each its own")
                .with("requestId", &*id));
        }
        store.forget_old(now, self.retention);
        store.ended.remove(&id);
        store.begun += 1;
        let state = Mutex::new(State { metadata: Arc::new(metadata), attempt: None });
        let live = Arc::new(Live { id: Arc::clone(&id), sequence: store.begun, start: now, state });
        store.active.insert(id, Arc::clone(&live));
        self.queued.fetch_add(1, Ordering::Relaxed);
        Ok(RequestRecord { requests: Arc::clone(self), live, finished: false })
    }

    /// What is known of a request; none where it is unknown, or forgotten.
    #[must_use]
    pub fn get(&self, id: &str, now: Instant) -> Option<RequestMetadata> {
        let found = {
            let mut store = self.store.lock();
            store.forget_old(now, self.retention);
            match store.active.get(id) {
                Some(live) => live.snapshot(),
                None => Arc::clone(&store.ended.get(id)?.metadata),
            }
        };
        Some(Arc::unwrap_or_clone(found))
    }

    /// All requests that are known: the ended ones in the order of their ends, then the active ones in that of arrival.
    #[must_use]
    pub fn all(&self, now: Instant) -> Vec<RequestMetadata> {
        self.newest(usize::MAX, now)
    }

    /// As [`Self::all`], the last `most` of them.
    #[must_use]
    pub fn newest(&self, most: usize, now: Instant) -> Vec<RequestMetadata> {
        let (mut found, mut active): (Vec<_>, Vec<_>) = {
            let mut store = self.store.lock();
            store.forget_old(now, self.retention);
            let of_ended = most.saturating_sub(store.active.len());
            let ended = store.ended.values().rev().take(of_ended).map(|ended| Arc::clone(&ended.metadata)).collect();
            (ended, store.active.values().map(|live| (live.sequence, live.snapshot())).collect())
        };
        found.reverse();
        active.sort_unstable_by_key(|(sequence, _)| *sequence);
        let too_many = active.len().saturating_sub(most);
        found.extend(active.into_iter().skip(too_many).map(|(_, metadata)| metadata));
        found.into_iter().map(Arc::unwrap_or_clone).collect()
    }

    /// Requests that have not ended, queued ones included.
    #[must_use]
    pub fn active(&self) -> usize {
        self.store.lock().active.len()
    }

    /// Requests that wait for their first worker.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }

    /// Requests that ended since the beginning, however they did.
    #[must_use]
    pub fn completed(&self) -> u64 {
        self.store.lock().completed
    }

    /// Ended requests that are remembered now.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.store.lock().ended.len()
    }

    /// Whether a request with this id has not ended yet.
    #[must_use]
    pub fn is_active(&self, request_id: &str) -> bool {
        self.store.lock().active.contains_key(request_id)
    }

    fn end(&self, live: &Live, now: Instant) {
        let mut store = self.store.lock();
        store.active.remove(&live.id);
        store.completed += 1;
        store.ended.insert(Arc::clone(&live.id), Ended { at: now, metadata: live.snapshot() });
        store.forget_old(now, self.retention);
        while store.ended.len() > self.max_entries {
            store.ended.pop_front();
        }
    }
}

// === impl Store ===

impl Store {
    fn forget_old(&mut self, now: Instant, retention: Duration) {
        while let Some((_, oldest)) = self.ended.front()
            && now.saturating_duration_since(oldest.at) > retention
        {
            self.ended.pop_front();
        }
    }
}

// === impl Live ===

impl Live {
    fn snapshot(&self) -> Arc<RequestMetadata> {
        Arc::clone(&self.state.lock().metadata)
    }

    fn change<T>(&self, change: impl FnOnce(&mut RequestMetadata) -> T) -> T {
        change(Arc::make_mut(&mut self.state.lock().metadata))
    }
}

// === impl State ===

impl State {
    /// Ends the attempt that runs, if one does.
    fn close_attempt(&mut self, code: Option<ControllerErrorCode>, now: Instant) {
        let metadata = Arc::make_mut(&mut self.metadata);
        let (Some(sent), Some(attempt)) = (self.attempt.take(), metadata.attempts.last_mut()) else {
            return;
        };
        attempt.duration_ms = Some(fractional_ms(now.saturating_duration_since(sent)));
        attempt.code = code;
        if code == Some(ControllerErrorCode::WorkerTimeout) {
            metadata.timeouts += 1;
        }
        let failed = code.is_some_and(ControllerErrorCode::is_workers_failure);
        if failed && !metadata.failed_workers.contains(&attempt.worker_id) {
            metadata.failed_workers.push(attempt.worker_id.clone());
        }
    }

    /// Another status; says whether the request was queued until now.
    fn leave_queue(&mut self, status: RequestStatus) -> bool {
        std::mem::replace(&mut Arc::make_mut(&mut self.metadata).status, status) == RequestStatus::Queued
    }
}

// === impl RequestRecord ===

impl RequestRecord {
    /// An attempt is sent: to whom, what decided for this worker, and who was no candidate.
    pub fn attempt_started(&self, worker: &WorkerId, choice: &'static str, mut left_out: Vec<LeftOut>, now: Instant) {
        left_out.truncate(LEFT_OUT_MAX);
        let since_start = now.saturating_duration_since(self.live.start);
        let mut state = self.live.state.lock();
        state.attempt = Some(now);
        if state.leave_queue(RequestStatus::Running) {
            self.requests.queued.fetch_sub(1, Ordering::Relaxed);
        }
        let metadata = Arc::make_mut(&mut state.metadata);
        metadata.retry_count = u32::try_from(metadata.attempts.len()).unwrap_or(u32::MAX);
        metadata.selected_worker = Some(worker.clone());
        // Most requests have one.
        metadata.attempts.reserve_exact(1);
        metadata.attempts.push(Attempt {
            worker_id: worker.clone(),
            started_ms: metadata.start_time.saturating_add(whole_ms(since_start)),
            duration_ms: None,
            code: None,
            choice: choice.into(),
            left_out,
        });
    }

    /// The running attempt has ended: with a code where it failed.
    pub fn attempt_ended(&self, code: Option<ControllerErrorCode>, now: Instant) {
        self.live.state.lock().close_attempt(code, now);
    }

    /// The running attempt was none: the worker had not what was asked for.
    pub fn attempt_withdrawn(&self) {
        let mut state = self.live.state.lock();
        state.attempt = None;
        let metadata = Arc::make_mut(&mut state.metadata);
        metadata.attempts.pop();
        metadata.selected_worker = metadata.attempts.last().map(|attempt| attempt.worker_id.clone());
    }

    /// A token came; the first call counts.
    pub fn first_token(&self, now: Instant) {
        let since_start = now.saturating_duration_since(self.live.start);
        self.live.change(|metadata| {
            metadata.time_to_first_token_ms.get_or_insert(fractional_ms(since_start));
        });
    }

    /// So many more tokens were generated.
    pub fn tokens(&self, count: u64) {
        self.live.change(|metadata| metadata.tokens = metadata.tokens.saturating_add(count));
    }

    /// An attempt of this request opened a breaker.
    pub fn breaker_tripped(&self) {
        self.live.change(|metadata| metadata.circuit_breaker_trips += 1);
    }

    /// Closes the record, and with it an attempt that still runs. Gives the final metadata. Done once; nothing follows it.
    pub fn finish(&mut self, result: Result<(), &ControllerError>, now: Instant) -> Arc<RequestMetadata> {
        let error = result
            .err()
            .map(|error| FinalError { code: error.code(), message: error.message().chars().take(MESSAGE_MAX).collect() });
        self.close(error, now);
        self.live.snapshot()
    }

    /// How long ago it came, in milliseconds.
    #[must_use]
    pub fn elapsed_ms(&self, now: Instant) -> f64 {
        fractional_ms(now.saturating_duration_since(self.live.start))
    }

    /// What is known so far.
    #[must_use]
    pub fn snapshot(&self) -> RequestMetadata {
        Arc::unwrap_or_clone(self.live.snapshot())
    }

    fn close(&mut self, error: Option<FinalError>, now: Instant) {
        self.finished = true;
        let duration = now.saturating_duration_since(self.live.start);
        let code = error.as_ref().map(|error| error.code);
        let mut state = self.live.state.lock();
        state.close_attempt(code, now);
        let status = match code {
            None => RequestStatus::Succeeded,
            Some(ControllerErrorCode::Cancelled) => RequestStatus::Cancelled,
            Some(_) => RequestStatus::Failed,
        };
        if state.leave_queue(status) {
            self.requests.queued.fetch_sub(1, Ordering::Relaxed);
        }
        let metadata = Arc::make_mut(&mut state.metadata);
        // A limit of the whole request may pass between attempts, where no attempt counts it.
        let last = metadata.attempts.last().and_then(|attempt| attempt.code);
        if code == Some(ControllerErrorCode::WorkerTimeout) && last != code {
            metadata.timeouts += 1;
        }
        metadata.end_time = Some(metadata.start_time.saturating_add(whole_ms(duration)));
        metadata.duration_ms = Some(fractional_ms(duration));
        metadata.final_error = error;
        drop(state);
        self.requests.end(&self.live, now);
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        if !self.finished {
            let code = ControllerErrorCode::Cancelled;
            self.close(Some(FinalError { code, message: "the caller went away".into() }), Instant::now());
        }
    }
}

fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds, to the microsecond.
fn fractional_ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1_000_000.0).round() / 1_000.0
}

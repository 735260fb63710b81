//! The desk: it takes attempts in, hands them out in order, and sees to it that each meets exactly one end.
//!
//! A taken attempt is `accepted` at once, waits by priority and then by arrival, is handed out while fewer than
//! `max_concurrent` are, and gives its place back the moment it ends; one that was handed to a task (`next`) and ends by
//! another's word gives it back when the task lets go of it, so that what is cancelled and still winds up counts. It ends by the engine's word, by its
//! deadline, by a cancellation, with its controller, or with the worker. The desk knows nothing of NATS and of engines.
//! `refusal` says who is not taken, `holding` who waits until a model is loaded.

mod holding;
mod refusal;

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::answer::{Answer, Target};
use super::board::Board;
use super::cancels::{Cancellation, Cancels, Key};
use super::liveness::Liveness;
use super::outbox::Outbox;
use super::tally::Tally;
use crate::error::ControllerErrorCode;
use crate::wire::{InferenceRequest, Priority, Reply};

pub(super) use refusal::refused;

/// How many attempts are held where the worker sets no limit of its own.
const UNLIMITED: usize = 10_000;
/// How many bytes of requests may wait or run together.
const HELD_BYTES: usize = 256 * 1024 * 1024;
/// An attempt as it arrives.
pub(super) struct Arrival {
    pub(super) request: Arc<InferenceRequest>,
    pub(super) attempt: u32,
    pub(super) controller: Arc<str>,
    pub(super) timeout: Duration,
    /// Of its message, in bytes.
    pub(super) size: usize,
}

/// An attempt that was taken.
pub(super) struct Attempt {
    key: Key,
    pub(super) request: Arc<InferenceRequest>,
    pub(super) answer: Arc<Answer>,
    pub(super) token: CancellationToken,
    pub(super) arrived: Instant,
    /// When it ends at the latest; while its model is loaded that is the end of the time for loading. Read and changed with the
    /// floor alone.
    deadline: Mutex<Option<Instant>>,
    timeout: Duration,
    /// When it was last handed out.
    begun: Mutex<Option<Instant>>,
    place: Place,
    size: usize,
    /// It is one of those that run.
    runs: AtomicBool,
    /// An end by another's word does not take it out of those.
    pub(super) runs_on: AtomicBool,
}

/// Where an attempt waits: the more important first, then the earlier.
type Place = (Reverse<Priority>, u64);

/// What became of an arrival.
pub(super) enum Intake {
    /// It is taken.
    Taken,
    /// It is here already: the first one goes on undisturbed, and answers.
    Repeated,
    /// It is refused; this is the answer.
    Refused(Target, Reply),
}

/// What a desk is set to.
pub(super) struct Limits {
    pub(super) models: Vec<String>,
    /// 0: none.
    pub(super) max_concurrent: u32,
    pub(super) max_queue: u32,
    /// How long an attempt waits for its model to be loaded.
    pub(super) loading: Duration,
}

/// The desk.
pub(super) struct Desk {
    limits: Limits,
    pub(super) outbox: Arc<Outbox>,
    pub(super) board: watch::Sender<Board>,
    floor: Mutex<Floor>,
    /// A job may be had, or the desk is closed: for threads and for tasks.
    work: Condvar,
    work_async: Notify,
    /// The next moment at which something passes has changed.
    timing: Notify,
    /// The last attempt has ended.
    empty: Notify,
}

#[derive(Default)]
struct Floor {
    live: HashMap<Key, Arc<Attempt>>,
    waiting: BTreeMap<Place, Arc<Attempt>>,
    deadlines: BTreeMap<(Instant, u64), Key>,
    running: usize,
    held_bytes: usize,
    arrivals: u64,
    doors: Doors,
    cancels: Cancels,
    liveness: Liveness,
    tally: Tally,
    /// Models on their way into memory.
    loading: Vec<String>,
    closed_to: Option<refusal::ClosedTo>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Doors {
    #[default]
    Open,
    /// Nothing new; until then the rest may finish.
    Draining(Instant),
    Closed,
}

/// What heartbeats say of the desk.
pub(super) struct Census {
    pub(super) waiting: usize,
    pub(super) active: usize,
    pub(super) active_ids: Vec<String>,
    pub(super) tally: Tally,
}

// === impl Desk ===

impl Desk {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            outbox: Arc::default(),
            board: watch::Sender::default(),
            floor: Mutex::default(),
            work: Condvar::new(),
            work_async: Notify::new(),
            timing: Notify::new(),
            empty: Notify::new(),
        })
    }

    /// Takes an attempt, or refuses it.
    pub(super) fn take(&self, arrival: Arrival, target: Target) -> Intake {
        let Arrival { request, attempt, controller, timeout, size } = arrival;
        let now = Instant::now();
        let key = Key { request_id: request.request_id.clone(), attempt, controller, reply_to: target.address() };
        let mut floor = self.floor.lock();
        floor.liveness.touch(&key.controller, now);
        if floor.live.contains_key(&key) {
            return Intake::Repeated;
        }
        if let Some(refusal) = self.refusal(&mut floor, &key, &request, size, now) {
            floor.tally.refused += 1;
            return Intake::Refused(target, refusal);
        }
        let number = floor.arrivals;
        floor.arrivals += 1;
        let answer = Answer::new(key.request_id.clone(), request.stream, target, self.outbox.clone());
        let place = (Reverse(request.priority), number);
        let taken = Arc::new(Attempt {
            key: key.clone(),
            request,
            answer,
            token: CancellationToken::new(),
            arrived: now,
            deadline: Mutex::default(),
            timeout,
            begun: Mutex::default(),
            place,
            size,
            runs: AtomicBool::new(false),
            runs_on: AtomicBool::new(false),
        });
        let before = floor.waiting.range(..place).count();
        taken.answer.accept(u32::try_from(before).unwrap_or(u32::MAX));
        floor.held_bytes += size;
        let limit = if floor.is_loading(&taken.request.model_id) { self.limits.loading } else { timeout };
        floor.start_clock(&taken, now, limit);
        floor.waiting.insert(place, taken.clone());
        let first_to_pass = floor.deadlines.first_key_value().is_some_and(|(first, _)| first.1 == number);
        floor.live.insert(key, taken);
        drop(floor);
        if first_to_pass {
            self.timing.notify_one();
        }
        self.offer_work();
        Intake::Taken
    }

    /// Ends an attempt at its controller's word.
    pub(super) fn cancel(&self, cancellation: Cancellation) {
        let meant: Vec<_> = {
            let mut floor = self.floor.lock();
            let meant = floor.meant_by(&cancellation);
            if meant.is_empty() {
                floor.cancels.before_its_request(cancellation, Instant::now());
            }
            meant
        };
        for taken in meant {
            self.end(&taken, ControllerErrorCode::Cancelled.as_str(), "cancelled by its controller", None);
        }
    }

    /// A controller spoke.
    pub(super) fn controller_heard(&self, controller: &str, interval_ms: u64) {
        self.floor.lock().liveness.heard(controller, interval_ms, Instant::now());
        self.timing.notify_one();
    }

    /// Our own connection went down, or came back.
    pub(super) fn connected(&self, connected: bool) {
        let mut floor = self.floor.lock();
        if connected {
            floor.liveness.resume(Instant::now())
        } else {
            floor.liveness.pause()
        }
        drop(floor);
        self.timing.notify_one();
    }

    /// Ends with an error what is not over yet, and lets whoever works on it know.
    pub(super) fn end(&self, taken: &Attempt, code: &str, message: &str, retry_after_ms: Option<i64>) {
        if taken.answer.close() {
            self.leave(taken, false);
            taken.token.cancel();
            taken.answer.fail(code, message, retry_after_ms);
        }
    }

    /// Gives an attempt's place back. Its end is decided, and not yet said.
    pub(super) fn leave(&self, taken: &Attempt, served: bool) {
        let tokens = taken.answer.tokens();
        let mut floor = self.floor.lock();
        if floor.live.remove(&taken.key).is_none() {
            return;
        }
        floor.waiting.remove(&taken.place);
        if !taken.runs_on.load(Ordering::Relaxed) {
            floor.free(taken);
        }
        floor.stop_clock(taken);
        floor.held_bytes -= taken.size;
        floor.cancels.ended(&taken.key);
        let worked = taken.begun.lock().map(|begun| begun.elapsed());
        floor.tally.ended(taken.arrived.elapsed(), worked, tokens, served);
        let empty = floor.live.is_empty();
        drop(floor);
        self.offer_work();
        if empty {
            self.empty.notify_waiters();
        }
    }

    /// Whoever worked on an attempt does so no more.
    pub(super) fn let_go(&self, taken: &Attempt) {
        self.floor.lock().free(taken);
        self.offer_work();
    }

    /// The next attempt to work on, where there is one and a place for it. Those for a model that is being loaded wait on: they
    /// are passed over one by one, at most as many as the queue is long.
    fn pick(&self, floor: &mut Floor) -> Option<Arc<Attempt>> {
        let limit = self.limits.max_concurrent as usize;
        if floor.doors == Doors::Closed || (limit > 0 && floor.running >= limit) {
            return None;
        }
        let (place, _) = floor.waiting.iter().find(|(_, taken)| !floor.is_loading(&taken.request.model_id))?;
        let place = *place;
        let taken = floor.waiting.remove(&place)?;
        floor.running += 1;
        taken.runs.store(true, Ordering::Relaxed);
        *taken.begun.lock() = Some(Instant::now());
        Some(taken)
    }

    /// The next attempt, blocking the thread; none when the time has passed or the desk is closed.
    pub(super) fn get(&self, timeout: Option<Duration>) -> Option<Arc<Attempt>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut floor = self.floor.lock();
        loop {
            if let Some(taken) = self.pick(&mut floor) {
                return Some(taken);
            }
            if floor.doors == Doors::Closed {
                return None;
            }
            match deadline {
                None => self.work.wait(&mut floor),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() || self.work.wait_for(&mut floor, left).timed_out() {
                        return self.pick(&mut floor);
                    }
                }
            }
        }
    }

    /// The next attempt, which runs until [`Self::let_go`]; none when the desk is closed.
    pub(super) async fn next(&self) -> Option<Arc<Attempt>> {
        loop {
            let work = self.work_async.notified();
            tokio::pin!(work);
            work.as_mut().enable();
            {
                let mut floor = self.floor.lock();
                if let Some(taken) = self.pick(&mut floor) {
                    taken.runs_on.store(true, Ordering::Relaxed);
                    return Some(taken);
                }
                if floor.doors == Doors::Closed {
                    self.work_async.notify_one(); // the next one that waits has to see it, too
                    return None;
                }
            }
            work.await;
        }
    }

    /// Whether no further attempt will be handed out.
    pub(super) fn is_closed(&self) -> bool {
        self.floor.lock().doors == Doors::Closed
    }

    /// Refuses what comes from now on. What is here may finish until then.
    pub(super) fn drain(&self, until: Instant) {
        let mut floor = self.floor.lock();
        if floor.doors != Doors::Closed {
            floor.doors = Doors::Draining(until);
        }
    }

    /// Returns when nothing is left.
    pub(super) async fn emptied(&self) {
        loop {
            let empty = self.empty.notified();
            tokio::pin!(empty);
            empty.as_mut().enable();
            if self.floor.lock().live.is_empty() {
                return;
            }
            empty.await;
        }
    }

    /// Ends everything with WORKER_UNAVAILABLE and hands out nothing more.
    pub(super) fn close(&self, why: &str) {
        let left: Vec<_> = {
            let mut floor = self.floor.lock();
            floor.doors = Doors::Closed;
            floor.live.values().cloned().collect()
        };
        for taken in left {
            self.end(&taken, ControllerErrorCode::WorkerUnavailable.as_str(), why, None);
        }
        self.offer_work();
        self.work.notify_all();
    }

    /// Ends what is past its deadline or whose controller has gone, for ever.
    pub(super) async fn watch_time(self: Arc<Self>) {
        loop {
            let next = self.end_what_has_passed();
            let changed = self.timing.notified();
            match next {
                Some(at) => tokio::select! {
                    () = tokio::time::sleep_until(at) => {}
                    () = changed => {}
                },
                None => changed.await,
            }
        }
    }

    /// How things stand. `most`: how many request ids are wanted.
    pub(super) fn census(&self, most: usize) -> Census {
        let floor = self.floor.lock();
        Census {
            waiting: floor.waiting.len(),
            active: floor.live.len(),
            active_ids: floor.live.keys().take(most).map(|key| key.request_id.clone()).collect(),
            tally: floor.tally,
        }
    }

    fn end_what_has_passed(&self) -> Option<Instant> {
        let now = Instant::now();
        let (late, orphans, next) = {
            let mut floor = self.floor.lock();
            let passed = floor.deadlines.range(..=(now, u64::MAX));
            let late: Vec<_> = passed
                .filter_map(|(_, key)| floor.live.get(key).cloned())
                .map(|taken| (self.too_late(&floor, &taken), taken))
                .collect();
            let gone = floor.liveness.ended(now);
            let orphans: Vec<_> = if gone.is_empty() {
                Vec::new()
            } else {
                floor.live.values().filter(|taken| gone.iter().any(|name| **name == *taken.key.controller)).cloned().collect()
            };
            let next = floor.deadlines.range((now, u64::MAX)..).next().map(|((at, _), _)| *at);
            (late, orphans, next.into_iter().chain(floor.liveness.next_end()).min())
        };
        for (message, taken) in late {
            self.end(&taken, ControllerErrorCode::WorkerTimeout.as_str(), &message, None);
        }
        for taken in orphans {
            self.end(
                &taken,
                ControllerErrorCode::Cancelled.as_str(),
                "its controller has not been heard for three intervals",
                None,
            );
        }
        next
    }

    fn too_late(&self, floor: &Floor, taken: &Attempt) -> String {
        if floor.is_loading(&taken.request.model_id) {
            let limit = self.limits.loading.as_millis();
            return format!("its model was not loaded within requestRouting.modelLoadTimeoutMs: {limit}");
        }
        format!("not done within Timeout-Ms: {}", taken.timeout.as_millis())
    }

    fn offer_work(&self) {
        self.work.notify_one();
        self.work_async.notify_one();
    }
}

// === impl Floor ===

impl Floor {
    /// The attempts that a cancellation means: one, where it says all that makes it this one.
    fn meant_by(&self, cancellation: &Cancellation) -> Vec<Arc<Attempt>> {
        let Cancellation { cancel, controller, reply_to } = cancellation;
        if let Some(controller) = controller {
            let (controller, reply_to) = (controller.clone(), reply_to.clone());
            let key = Key { request_id: cancel.request_id.clone(), attempt: cancel.attempt, controller, reply_to };
            if let Some(taken) = self.live.get(&key) {
                return vec![taken.clone()];
            }
            if cancellation.reply_to.is_some() {
                return Vec::new();
            }
        }
        self.live.values().filter(|taken| cancellation.means(&taken.key)).cloned().collect()
    }

    /// Takes an attempt out of those that run, once.
    fn free(&mut self, taken: &Attempt) {
        if taken.runs.swap(false, Ordering::Relaxed) {
            self.running -= 1;
        }
    }

    /// From now on it has so long.
    fn start_clock(&mut self, taken: &Attempt, now: Instant, limit: Duration) {
        self.stop_clock(taken);
        let at = now + limit;
        *taken.deadline.lock() = Some(at);
        self.deadlines.insert((at, taken.place.1), taken.key.clone());
    }

    /// No deadline ends it any more.
    fn stop_clock(&mut self, taken: &Attempt) {
        if let Some(at) = taken.deadline.lock().take() {
            self.deadlines.remove(&(at, taken.place.1));
        }
    }
}

// === impl Attempt ===

impl Attempt {
    /// 1 for the first attempt.
    pub(super) fn number(&self) -> u32 {
        self.key.attempt
    }
}

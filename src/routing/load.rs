//! How busy a worker is, and how quick.
//!
//! Load = own requests in flight + what its latest report says of requests that are not ours. A report is ignored when it
//! is older than three heartbeats. Counts are kept by [`Lease`](super::Lease)s, which take them back on any end.

use std::time::Duration;

use tokio::time::Instant;

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

#[derive(Debug)]
pub(super) struct Load {
    /// Times below are told from here.
    born: Instant,
    own: AtomicU32,
    /// The most requests at the same time; 0: no limit.
    limit: AtomicU32,
    foreign: AtomicU32,
    /// Until when `foreign` counts, in milliseconds since `born`.
    foreign_until: AtomicU64,
    /// Until when it wants nothing, in milliseconds since `born`; 0: it said no such thing.
    held_until: AtomicU64,
    /// `None` before the first answer.
    latency: Mutex<Option<PeakEwma>>,
}

/// A moving average of the time to first token that jumps to a peak and sinks slowly, as finagle's and linkerd's do:
/// a larger sample replaces it; a smaller one pulls it down by `1 − e^(−age / DECAY)`; without samples it decays to zero,
/// so that a worker once slow is tried again.
#[derive(Clone, Copy, Debug)]
struct PeakEwma {
    seconds: f64,
    at: Instant,
}

/// The time constant of the average.
const DECAY: Duration = Duration::from_secs(10);
/// A failure counts as a first token after twice the average, but not less and not more than this, in seconds: a worker
/// that fails fast must not attract requests.
const PENALTY: (f64, f64) = (5.0, 60.0);

// === impl Load ===

impl Load {
    pub(super) fn new(limit: u32, now: Instant) -> Self {
        Self {
            born: now,
            own: AtomicU32::new(0),
            limit: AtomicU32::new(limit),
            foreign: AtomicU32::new(0),
            foreign_until: AtomicU64::new(0),
            held_until: AtomicU64::new(0),
            latency: Mutex::new(None),
        }
    }

    pub(super) fn own(&self) -> u32 {
        self.own.load(Ordering::Relaxed)
    }

    pub(super) fn foreign(&self, now: Instant) -> u32 {
        match self.foreign.load(Ordering::Relaxed) {
            0 => 0,
            foreign if self.millis(now) < self.foreign_until.load(Ordering::Relaxed) => foreign,
            _ => 0,
        }
    }

    /// All requests that it works on, as far as is known.
    pub(super) fn total(&self, now: Instant) -> u32 {
        self.own().saturating_add(self.foreign(now))
    }

    pub(super) fn has_room(&self, now: Instant) -> bool {
        if self.is_held_back(now) {
            return false;
        }
        match self.limit.load(Ordering::Relaxed) {
            0 => true,
            limit => self.total(now) < limit,
        }
    }

    /// Takes a place, unless there is none: of racing callers no more get one than there are.
    pub(super) fn try_enter(&self, now: Instant) -> bool {
        let limit = match self.limit.load(Ordering::Relaxed) {
            _ if self.is_held_back(now) => return false,
            0 => u32::MAX,
            limit => limit.saturating_sub(self.foreign(now)),
        };
        self.own.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |own| (own < limit).then_some(own + 1)).is_ok()
    }

    /// Gives back a place that [`Self::try_enter`] took.
    pub(super) fn leave(&self) {
        self.own.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// It asked to be left alone for so long.
    pub(super) fn hold_back(&self, span: Duration, now: Instant) {
        let until = self.millis(now).saturating_add(u64::try_from(span.as_millis()).unwrap_or(u64::MAX));
        self.held_until.fetch_max(until, Ordering::Relaxed);
    }

    /// Whether its time to be left alone has just passed; says so once.
    pub(super) fn has_rested(&self, now: Instant) -> bool {
        let until = self.held_until.load(Ordering::Relaxed);
        until != 0
            && self.millis(now) >= until
            && self.held_until.compare_exchange(until, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn is_held_back(&self, now: Instant) -> bool {
        match self.held_until.load(Ordering::Relaxed) {
            0 => false,
            until => self.millis(now) < until,
        }
    }

    /// Takes a report of requests that are not ours, good for `lifetime`.
    pub(super) fn report_foreign(&self, foreign: u32, lifetime: Duration, now: Instant) {
        let until = self.millis(now).saturating_add(u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX));
        self.foreign_until.store(until, Ordering::Relaxed);
        self.foreign.store(foreign, Ordering::Relaxed);
    }

    pub(super) fn observe(&self, ttft: Duration, now: Instant) {
        let mut latency = self.latency.lock();
        *latency = Some(PeakEwma::with(*latency, ttft.as_secs_f64(), now));
    }

    pub(super) fn observe_failure(&self, now: Instant) {
        let mut latency = self.latency.lock();
        let estimate = latency.map_or(0.0, |latency| latency.estimate(now));
        *latency = Some(PeakEwma::with(*latency, (2.0 * estimate).clamp(PENALTY.0, PENALTY.1), now));
    }

    /// The expected time to first token, in seconds; `None` before the first answer.
    pub(super) fn latency(&self, now: Instant) -> Option<f64> {
        self.latency.lock().map(|latency| latency.estimate(now))
    }

    /// How long ago the worker registered.
    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.born)
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(self.age(now).as_millis()).unwrap_or(u64::MAX)
    }
}

// === impl PeakEwma ===

impl PeakEwma {
    fn weight(&self, now: Instant) -> f64 {
        (-now.saturating_duration_since(self.at).as_secs_f64() / DECAY.as_secs_f64()).exp()
    }

    fn estimate(&self, now: Instant) -> f64 {
        self.seconds * self.weight(now)
    }

    fn with(before: Option<Self>, seconds: f64, now: Instant) -> Self {
        let Some(before) = before else { return Self { seconds, at: now } };
        let weight = before.weight(now);
        let seconds = seconds.max(before.seconds * weight + seconds * (1.0 - weight));
        Self { seconds, at: before.at.max(now) }
    }
}

//! How busy a worker is, and how quick.
//!
//! Load = own requests in flight + what its latest report says of requests that are not ours. A report is ignored when it
//! is older than three heartbeats. Counts are kept by [`Lease`](super::Lease)s, which take them back on any end.

use std::time::Duration;

use tokio::time::Instant;

use super::ledger::{Account, Entry};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

#[derive(Debug)]
#[repr(C)]
pub(super) struct Load {
    /// See [`PeakEwma::pack`].
    latency: AtomicU64,
    /// Until when it wants nothing, in milliseconds since `born`; 0: it said no such thing.
    held_until: AtomicU64,
    /// Until when requests of others count, in milliseconds since `born`.
    foreign_until: AtomicU64,
    /// The most requests at the same time; 0: no limit.
    limit: AtomicU32,
    /// Times above are told from here.
    born: Instant,
    /// Requests, our own and others'.
    account: Account,
}

/// A moving average of the time to first token that jumps to a peak and sinks slowly, as finagle's and linkerd's do:
/// a larger sample replaces it; a smaller one pulls it down by `1 − e^(−age / DECAY)`; without samples it decays to zero,
/// so that a worker once slow is tried again.
#[derive(Clone, Copy, Debug)]
struct PeakEwma {
    seconds: f32,
    /// The latest sample, in milliseconds since the worker's `born`. It begins anew after 49 days.
    at: u32,
}

/// Before the first answer.
const NO_LATENCY: u64 = u64::MAX;
/// The time constant of the average.
const DECAY: Duration = Duration::from_secs(10);
/// A failure counts as a first token after twice the average, but not less and not more than this, in seconds: a worker
/// that fails fast must not attract requests.
const PENALTY: (f32, f32) = (5.0, 60.0);

// === impl Load ===

impl Load {
    pub(super) fn new(account: Account, limit: u32, now: Instant) -> Self {
        Self {
            account,
            born: now,
            limit: AtomicU32::new(limit),
            foreign_until: AtomicU64::new(0),
            held_until: AtomicU64::new(0),
            latency: AtomicU64::new(NO_LATENCY),
        }
    }

    pub(super) fn account(&self) -> &Account {
        &self.account
    }

    pub(super) fn own(&self) -> u32 {
        self.account.entry().own()
    }

    pub(super) fn foreign(&self, now: Instant) -> u32 {
        self.total(now).saturating_sub(self.own())
    }

    /// All requests that it works on, as far as is known.
    pub(super) fn total(&self, now: Instant) -> u32 {
        let entry = self.account.entry();
        if self.is_outdated(entry, now) { entry.own() } else { entry.total() }
    }

    pub(super) fn has_room(&self, now: Instant) -> bool {
        if self.is_held_back(now) {
            return false;
        }
        match self.limit() {
            0 => true,
            limit => self.total(now) < limit,
        }
    }

    /// Takes a place, unless there is none: of racing callers no more get one than there are.
    pub(super) fn try_enter(&self, now: Instant) -> bool {
        !self.is_held_back(now) && self.update(|entry, limit| self.without_outdated(entry, limit, now).enter(limit)).is_ok()
    }

    /// Gives back a place that [`Self::try_enter`] took. True: there was no other.
    pub(super) fn leave(&self) -> bool {
        let before = self.update(|entry, limit| Some(entry.leave(limit)));
        let limit = self.limit();
        before.is_ok_and(|before| before.has(Entry::FULL) || limit != 0 && before.total() >= limit)
    }

    pub(super) fn set_limit(&self, limit: u32) {
        if self.limit.swap(limit, Ordering::Relaxed) != limit {
            let _ = self.update(|entry, limit| Some(entry.limited(limit)));
        }
    }

    /// Changes the account by the limit. Where that became another meanwhile, the mark of a full one is set right.
    fn update(&self, change: impl Fn(Entry, u32) -> Option<Entry>) -> Result<Entry, Entry> {
        let mut limit = self.limit();
        let before = self.account.update(|entry| change(entry, limit));
        while self.limit() != limit {
            limit = self.limit();
            let _ = self.account.update(|entry| Some(entry.limited(limit)));
        }
        before
    }

    /// It asked to be left alone for so long.
    pub(super) fn hold_back(&self, span: Duration, now: Instant) {
        let until = self.millis(now).saturating_add(u64::try_from(span.as_millis()).unwrap_or(u64::MAX));
        // The mark comes first: whoever takes it away at the end of an earlier hold must not leave it behind.
        self.account.mark(Entry::HELD, true);
        let until = self.held_until.fetch_max(until, Ordering::AcqRel).max(until);
        self.is_due_at(until);
    }

    /// Whether its time to be left alone has just passed; says so once.
    fn has_rested(&self, now: Instant) -> bool {
        let until = self.held_until.load(Ordering::Relaxed);
        let rested = until != 0
            && self.millis(now) >= until
            && self.held_until.compare_exchange(until, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if rested {
            self.account.mark(Entry::HELD, false);
        }
        rested
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
        self.foreign_until.store(until, Ordering::Release);
        let _ = self.update(|entry, limit| Some(entry.with_foreign(foreign, limit)));
        if foreign > 0 {
            self.is_due_at(until);
        }
    }

    /// Sets right what the clock alone changes in its account. True: there may be room where there was none.
    pub(super) fn settle(&self, now: Instant) -> bool {
        let before = self.update(|entry, limit| {
            let settled = self.without_outdated(entry, limit, now).limited(limit);
            (settled != entry).then_some(settled)
        });
        let entry = self.account.entry();
        if entry.foreign() > 0 {
            self.is_due_at(self.foreign_until.load(Ordering::Acquire));
        }
        let rested = self.has_rested(now);
        if self.is_held_back(now) {
            // An earlier hold that ended just now may have taken the mark of this one.
            self.account.mark(Entry::HELD, true);
            self.is_due_at(self.held_until.load(Ordering::Acquire));
        } else {
            self.account.mark(Entry::HELD, false);
        }
        rested || before.is_ok_and(|before| before.has(Entry::FULL)) && !entry.has(Entry::FULL)
    }

    /// Whether what it says of others has grown old.
    fn is_outdated(&self, entry: Entry, now: Instant) -> bool {
        entry.foreign() > 0 && self.millis(now) >= self.foreign_until.load(Ordering::Acquire)
    }

    fn without_outdated(&self, entry: Entry, limit: u32, now: Instant) -> Entry {
        if self.is_outdated(entry, now) { entry.with_foreign(0, limit) } else { entry }
    }

    fn is_due_at(&self, millis: u64) {
        if let Some(at) = self.born.checked_add(Duration::from_millis(millis)) {
            self.account.is_due_at(at);
        }
    }

    fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    pub(super) fn observe(&self, ttft: Duration, now: Instant) {
        self.change_latency(now, |_| ttft.as_secs_f32());
    }

    pub(super) fn observe_failure(&self, now: Instant) {
        self.change_latency(now, |estimate| (2.0 * estimate).clamp(PENALTY.0, PENALTY.1));
    }

    /// The expected time to first token, in seconds; `None` before the first answer.
    pub(super) fn latency(&self, now: Instant) -> Option<f32> {
        PeakEwma::unpack(self.latency.load(Ordering::Relaxed)).map(|latency| latency.estimate(self.millis(now) as u32))
    }

    /// Takes the sample that `sample` makes of the estimate.
    fn change_latency(&self, now: Instant, sample: impl Fn(f32) -> f32) {
        let now = self.millis(now) as u32;
        let _ = self.latency.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |latency| {
            let before = PeakEwma::unpack(latency);
            let seconds = sample(before.map_or(0.0, |before| before.estimate(now)));
            Some(before.map_or(PeakEwma { seconds, at: now }, |before| before.with(seconds, now)).pack())
        });
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
    /// In one number, so that a sample is taken without a lock.
    fn pack(self) -> u64 {
        u64::from(self.seconds.to_bits()) << 32 | u64::from(self.at)
    }

    fn unpack(packed: u64) -> Option<Self> {
        (packed != NO_LATENCY).then(|| Self { seconds: f32::from_bits((packed >> 32) as u32), at: packed as u32 })
    }

    /// How old the latest sample is, in milliseconds; 0 where the clock went backwards.
    fn age(self, now: u32) -> u32 {
        let age = now.wrapping_sub(self.at);
        if age > u32::MAX / 2 { 0 } else { age }
    }

    fn weight(self, now: u32) -> f32 {
        (-(self.age(now) as f32 / 1e3) / DECAY.as_secs_f32()).exp()
    }

    fn estimate(self, now: u32) -> f32 {
        self.seconds * self.weight(now)
    }

    fn with(self, seconds: f32, now: u32) -> Self {
        let weight = self.weight(now);
        let seconds = seconds.max(self.seconds * weight + seconds * (1.0 - weight));
        Self { seconds, at: self.at.wrapping_add(self.age(now)) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use super::super::ledger::Ledger;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_average_jumps_to_a_peak_and_sinks_slowly() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let load = Load::new(Arc::new(Ledger::new(false)).open(start), 0, start);
        assert_eq!(load.latency(start), None);
        load.observe(Duration::from_millis(500), at(1));
        load.observe(Duration::from_secs(2), at(1));
        assert_eq!(load.latency(at(1)), Some(2.0));
        let close = |found: f32, expected: f32| assert!((found - expected).abs() < 1e-4, "{found} instead of {expected}");
        close(load.latency(at(11)).unwrap(), 2.0 * (-1_f32).exp());
        load.observe(Duration::from_secs(1), at(11));
        close(load.latency(at(11)).unwrap(), 1.0 + (-1_f32).exp());
        load.observe(Duration::ZERO, at(5));
        close(load.latency(at(11)).unwrap(), 1.0 + (-1_f32).exp());
        load.observe_failure(at(11));
        close(load.latency(at(11)).unwrap(), 5.0);
        load.observe_failure(at(11));
        close(load.latency(at(11)).unwrap(), 10.0);
        // The milliseconds begin anew after 49.7 days.
        let days = |count: u64| start + Duration::from_secs(count * 86_400);
        load.observe(Duration::from_secs(3), days(49));
        load.observe(Duration::from_secs(1), days(50));
        close(load.latency(days(50)).unwrap(), 1.0);
    }
}

//! A sliding window of ten buckets: how many requests ended lately, and how.

use std::time::Duration;

use tokio::time::Instant;

const BUCKETS: usize = 10;

/// Ends within the window. Time that goes backwards counts as standing still.
#[derive(Debug)]
pub(super) struct Window {
    origin: Instant,
    width: Duration,
    /// The bucket of the latest end, counted from `origin`.
    head: u64,
    buckets: [Tally; BUCKETS],
    total: Tally,
}

/// How many ended, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) requests: u32,
    pub(super) failures: u32,
    pub(super) slow: u32,
}

// === impl Window ===

impl Window {
    pub(super) fn new(length: Duration, now: Instant) -> Self {
        let width = (length / BUCKETS as u32).max(Duration::from_millis(1));
        Self { origin: now, width, head: 0, buckets: [Tally::default(); BUCKETS], total: Tally::default() }
    }

    /// Adds one end and gives what the window holds now.
    pub(super) fn add(&mut self, end: Tally, now: Instant) -> Tally {
        self.advance(now);
        self.buckets[(self.head % BUCKETS as u64) as usize].add(end);
        self.total.add(end);
        self.total
    }

    /// What a window that ends now holds.
    pub(super) fn tally(&self, now: Instant) -> Tally {
        let passed = self.bucket_at(now).saturating_sub(self.head);
        let mut total = self.total;
        for ahead in 1..=passed.min(BUCKETS as u64) {
            total.subtract(self.buckets[((self.head + ahead) % BUCKETS as u64) as usize]);
        }
        total
    }

    pub(super) fn clear(&mut self) {
        self.buckets = [Tally::default(); BUCKETS];
        self.total = Tally::default();
    }

    fn advance(&mut self, now: Instant) {
        let head = self.bucket_at(now).max(self.head);
        for ahead in 1..=(head - self.head).min(BUCKETS as u64) {
            let bucket = &mut self.buckets[((self.head + ahead) % BUCKETS as u64) as usize];
            self.total.subtract(*bucket);
            *bucket = Tally::default();
        }
        self.head = head;
    }

    fn bucket_at(&self, now: Instant) -> u64 {
        // In 64 bits: a division of wider ones is a call.
        let nanos = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        nanos(now.saturating_duration_since(self.origin)) / nanos(self.width)
    }
}

// === impl Tally ===

impl Tally {
    fn add(&mut self, other: Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.failures = self.failures.saturating_add(other.failures);
        self.slow = self.slow.saturating_add(other.slow);
    }

    fn subtract(&mut self, other: Self) {
        self.requests = self.requests.saturating_sub(other.requests);
        self.failures = self.failures.saturating_sub(other.failures);
        self.slow = self.slow.saturating_sub(other.slow);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Tally = Tally { requests: 1, failures: 1, slow: 0 };

    #[tokio::test(start_paused = true)]
    async fn what_is_older_than_the_window_is_gone() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut window = Window::new(Duration::from_secs(10), start);
        window.add(ONE, at(0));
        window.add(ONE, at(5));
        assert_eq!(window.tally(at(9)).requests, 2);
        assert_eq!(window.tally(at(10)).requests, 1);
        assert_eq!(window.tally(at(15)).requests, 0);
        assert_eq!(window.tally(at(1_000)).requests, 0);
        assert_eq!(window.add(ONE, at(12)).requests, 2);
        assert_eq!(window.add(ONE, at(900)).requests, 1);
    }
}

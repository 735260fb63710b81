//! A sliding window of ten buckets: how many requests ended lately, and how.

use std::time::Duration;

use tokio::time::Instant;

const BUCKETS: usize = 10;

/// Ends within the window. Time that goes backwards counts as standing still.
///
/// In this order: what every end writes lies together.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Window {
    /// The bucket of the latest end, counted from `origin`.
    head: u64,
    /// What is in it so far.
    latest: Tally,
    /// What is in all of them.
    total: Tally,
    origin: Instant,
    width: Duration,
    /// The others; the place of the latest one is empty.
    past: [Tally; BUCKETS],
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
        let (latest, total) = (Tally::default(), Tally::default());
        Self { head: 0, latest, total, origin: now, width, past: [Tally::default(); BUCKETS] }
    }

    /// Adds one end and gives what the window holds now.
    pub(super) fn add(&mut self, end: Tally, now: Instant) -> Tally {
        let head = self.bucket_at(now);
        if head > self.head {
            self.advance(head);
        }
        self.latest.add(end);
        self.total.add(end);
        self.total
    }

    /// What a window that ends now holds.
    pub(super) fn tally(&self, now: Instant) -> Tally {
        let passed = self.bucket_at(now).saturating_sub(self.head);
        if passed >= BUCKETS as u64 {
            return Tally::default();
        }
        let mut total = self.total;
        (1..=passed).for_each(|ahead| total.subtract(self.past[place(self.head + ahead)]));
        total
    }

    pub(super) fn clear(&mut self) {
        self.past = [Tally::default(); BUCKETS];
        self.latest = Tally::default();
        self.total = Tally::default();
    }

    fn advance(&mut self, head: u64) {
        self.past[place(self.head)] = std::mem::take(&mut self.latest);
        for bucket in self.head + 1..=head.min(self.head + BUCKETS as u64) {
            self.total.subtract(std::mem::take(&mut self.past[place(bucket)]));
        }
        self.head = head;
    }

    fn bucket_at(&self, now: Instant) -> u64 {
        // In 64 bits: a division of wider ones is a call.
        let nanos = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        nanos(now.saturating_duration_since(self.origin)) / nanos(self.width)
    }
}

fn place(bucket: u64) -> usize {
    (bucket % BUCKETS as u64) as usize
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

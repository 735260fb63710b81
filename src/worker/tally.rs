//! What a worker has done so far, in numbers.

use std::time::Duration;

/// How much a new time moves the mean of recent ones.
const WEIGHT: f64 = 0.2;
/// How soon a full worker may be asked again.
const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(10);
const UNKNOWN: Duration = Duration::from_millis(500);

/// Sums since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    /// Attempts that ended, however they did.
    pub(super) handled: u64,
    /// Of those, the ones that did not end well.
    pub(super) failed: u64,
    /// Attempts that were not taken.
    pub(super) refused: u64,
    /// Tokens of all answers.
    pub(super) tokens: u64,
    total: Duration,
    /// Mean time of the recent ones from being handed out to the end.
    recent_seconds: Option<f64>,
}

// === impl Tally ===

impl Tally {
    /// An attempt ended so long after its arrival, and after it was handed out where it was.
    pub(super) fn ended(&mut self, after: Duration, worked: Option<Duration>, tokens: u64, served: bool) {
        self.handled += 1;
        self.failed += u64::from(!served);
        self.tokens += tokens;
        self.total += after;
        if let Some(seconds) = worked.map(|worked| worked.as_secs_f64()) {
            self.recent_seconds = Some(self.recent_seconds.map_or(seconds, |mean| mean + WEIGHT * (seconds - mean)));
        }
    }

    /// Mean time from arrival to end, in milliseconds.
    pub(super) fn mean_ms(&self) -> f64 {
        if self.handled == 0 { 0.0 } else { self.total.as_secs_f64() * 1000.0 / self.handled as f64 }
    }

    /// When a place is likely to be free: recent requests were worked on for so long, and so many places empty in turn.
    pub(super) fn next_place(&self, places: u32) -> Duration {
        self.recent_seconds.map_or(UNKNOWN, |seconds| {
            Duration::try_from_secs_f64(seconds / f64::from(places.max(1))).unwrap_or(LONGEST).clamp(SHORTEST, LONGEST)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_sooner_where_there_are_many_and_requests_are_short() {
        let mut tally = Tally::default();
        assert_eq!(tally.next_place(4), UNKNOWN);
        tally.ended(Duration::from_secs(30), Some(Duration::from_secs(8)), 10, true);
        assert_eq!(tally.next_place(4), Duration::from_secs(2));
        assert_eq!(tally.next_place(1000), SHORTEST);
        tally.ended(Duration::from_secs(40), None, 0, false);
        assert_eq!(tally.next_place(4), Duration::from_secs(2), "who was never handed out held no place");
        tally.ended(Duration::from_secs(1000), Some(Duration::from_secs(1000)), 0, false);
        assert_eq!(tally.next_place(1), LONGEST);
        assert_eq!((tally.handled, tally.failed, tally.tokens, tally.mean_ms()), (3, 2, 10, 1_070_000.0 / 3.0));
    }
}

//! Cancellations that overtook their requests.
//!
//! One that finds nothing is either too late, because its attempt has just ended here, or too early. The early ones are
//! kept for a moment. Attempts that ended are remembered, so that a late one does not strike a later request of the same
//! name. Both lists are short and lose the oldest.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How many of each are kept.
const MOST: usize = 1024;
/// How far a cancellation can be ahead of its request.
const AHEAD: Duration = Duration::from_secs(5);

/// Early cancellations and recent ends.
#[derive(Default)]
pub(super) struct Cancels {
    early: VecDeque<Early>,
    ended: VecDeque<(String, u32)>,
}

struct Early {
    at: Instant,
    request_id: String,
    attempt: u32,
    controller: Option<String>,
}

// === impl Cancels ===

impl Cancels {
    /// An attempt ended: a cancellation that comes now is late.
    pub(super) fn ended(&mut self, request_id: &str, attempt: u32) {
        if self.ended.len() == MOST {
            self.ended.pop_front();
        }
        self.ended.push_back((request_id.to_owned(), attempt));
    }

    /// A cancellation came for an attempt that is not here.
    pub(super) fn before_its_request(&mut self, request_id: &str, attempt: u32, controller: Option<&str>, now: Instant) {
        if self.ended.iter().rev().any(|(id, number)| *number == attempt && id == request_id) {
            return;
        }
        if self.early.len() == MOST {
            self.early.pop_front();
        }
        let controller = controller.map(str::to_owned);
        self.early.push_back(Early { at: now, request_id: request_id.to_owned(), attempt, controller });
    }

    /// Whether an attempt that arrives was cancelled before; takes the cancellation out.
    pub(super) fn was_before(&mut self, request_id: &str, attempt: u32, controller: &str, now: Instant) -> bool {
        while self.early.front().is_some_and(|early| now.saturating_duration_since(early.at) > AHEAD) {
            self.early.pop_front();
        }
        let found = self.early.iter().position(|early| {
            early.attempt == attempt
                && early.request_id == request_id
                && early.controller.as_deref().is_none_or(|name| name == controller)
        });
        found.and_then(|index| self.early.remove(index)).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_early_one_strikes_its_request_once_and_for_a_moment() {
        let (mut cancels, now) = (Cancels::default(), Instant::now());
        cancels.before_its_request("r", 1, None, now);
        assert!(!cancels.was_before("r", 2, "c", now));
        assert!(cancels.was_before("r", 1, "c", now));
        assert!(!cancels.was_before("r", 1, "c", now));
        cancels.before_its_request("r", 1, Some("other"), now);
        assert!(!cancels.was_before("r", 1, "c", now));
        assert!(!cancels.was_before("r", 1, "other", now + 2 * AHEAD));
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_one_does_not_strike_the_next_request_of_its_name() {
        let (mut cancels, now) = (Cancels::default(), Instant::now());
        cancels.ended("r", 1);
        cancels.before_its_request("r", 1, None, now);
        assert!(!cancels.was_before("r", 1, "c", now));
    }

    #[tokio::test(start_paused = true)]
    async fn both_lists_are_bounded() {
        let (mut cancels, now) = (Cancels::default(), Instant::now());
        for number in 0..3 * MOST as u32 {
            cancels.ended("ended", number);
            cancels.before_its_request("early", number, None, now);
        }
        assert_eq!((cancels.early.len(), cancels.ended.len()), (MOST, MOST));
    }
}

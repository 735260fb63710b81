//! Cancellations: which attempt one means, and those that overtook their requests.
//!
//! One that finds nothing is either too late, because its attempt has just ended here, or too early. The early ones are
//! kept for a moment. Attempts that ended are remembered, so that a late one does not strike a later request of the same
//! name. Both lists are short and lose the oldest.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::transport::nats::Incoming;
use crate::wire::{Cancel, header};

/// How many of each are kept.
const MOST: usize = 1024;
/// How far a cancellation can be ahead of its request.
const AHEAD: Duration = Duration::from_secs(5);

/// What makes an attempt this one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) request_id: String,
    pub(super) attempt: u32,
    pub(super) controller: Arc<str>,
    /// The subject of its answer, where it came over NATS. A request id may be used again, at once even; this is not.
    pub(super) reply_to: Option<String>,
}

/// A cancellation, and what else it says of the attempt that it means.
#[derive(Clone, Debug)]
pub(super) struct Cancellation {
    pub(super) cancel: Cancel,
    pub(super) controller: Option<Arc<str>>,
    pub(super) reply_to: Option<String>,
}

/// Early cancellations and recent ends.
#[derive(Default)]
pub(super) struct Cancels {
    early: VecDeque<(Instant, Cancellation)>,
    ended: VecDeque<Key>,
}

// === impl Cancellation ===

impl Cancellation {
    /// What came over NATS, if it can be read.
    pub(super) fn read(message: &Incoming) -> Option<Self> {
        Some(Self {
            cancel: serde_json::from_slice(&message.payload).ok()?,
            controller: message.header(header::CONTROLLER_ID).map(Into::into),
            reply_to: message.header(header::REPLY_TO).map(Into::into),
        })
    }

    /// Whether it means this attempt. What one of the two does not say is no difference.
    pub(super) fn means(&self, key: &Key) -> bool {
        self.cancel.attempt == key.attempt
            && self.cancel.request_id == key.request_id
            && self.controller.as_ref().is_none_or(|name| *name == key.controller)
            && (self.reply_to.is_none() || key.reply_to.is_none() || self.reply_to == key.reply_to)
    }
}

// === impl Cancels ===

impl Cancels {
    /// An attempt ended: a cancellation that comes now is late.
    pub(super) fn ended(&mut self, key: &Key) {
        if self.ended.len() == MOST {
            self.ended.pop_front();
        }
        self.ended.push_back(key.clone());
    }

    /// A cancellation came for an attempt that is not here.
    pub(super) fn before_its_request(&mut self, cancellation: Cancellation, now: Instant) {
        if self.ended.iter().rev().any(|key| cancellation.means(key)) {
            return;
        }
        if self.early.len() == MOST {
            self.early.pop_front();
        }
        self.early.push_back((now, cancellation));
    }

    /// Whether an attempt that arrives was cancelled before; takes the cancellation out.
    pub(super) fn was_before(&mut self, key: &Key, now: Instant) -> bool {
        while self.early.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > AHEAD) {
            self.early.pop_front();
        }
        let found = self.early.iter().position(|(_, cancellation)| cancellation.means(key));
        found.and_then(|index| self.early.remove(index)).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str, attempt: u32, controller: &str, reply_to: Option<&str>) -> Key {
        Key { request_id: id.into(), attempt, controller: controller.into(), reply_to: reply_to.map(Into::into) }
    }

    fn cancellation(id: &str, controller: Option<&str>, reply_to: Option<&str>) -> Cancellation {
        let cancel = Cancel { request_id: id.into(), attempt: 1 };
        Cancellation { cancel, controller: controller.map(Into::into), reply_to: reply_to.map(Into::into) }
    }

    #[tokio::test(start_paused = true)]
    async fn an_early_one_strikes_its_request_once_and_for_a_moment() {
        let (mut cancels, now) = (Cancels::default(), Instant::now());
        cancels.before_its_request(cancellation("r", None, None), now);
        assert!(!cancels.was_before(&key("r", 2, "c", None), now));
        assert!(cancels.was_before(&key("r", 1, "c", None), now));
        assert!(!cancels.was_before(&key("r", 1, "c", None), now));
        cancels.before_its_request(cancellation("r", Some("other"), None), now);
        assert!(!cancels.was_before(&key("r", 1, "c", None), now));
        assert!(!cancels.was_before(&key("r", 1, "other", None), now + 2 * AHEAD));
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_one_does_not_strike_the_next_request_of_its_name() {
        let (mut cancels, now) = (Cancels::default(), Instant::now());
        cancels.ended(&key("r", 1, "c", Some("inbox.1")));
        cancels.before_its_request(cancellation("r", None, None), now);
        cancels.before_its_request(cancellation("r", Some("c"), Some("inbox.1")), now);
        assert!(!cancels.was_before(&key("r", 1, "c", Some("inbox.2")), now));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_names_the_subject_of_the_answer_means_no_other_of_its_name() {
        let (mut cancels, now) = (Cancels::default(), Instant::now());
        cancels.before_its_request(cancellation("r", Some("c"), Some("inbox.1")), now);
        assert!(!cancels.was_before(&key("r", 1, "c", Some("inbox.2")), now));
        assert!(cancels.was_before(&key("r", 1, "c", Some("inbox.1")), now));
    }

    #[tokio::test(start_paused = true)]
    async fn both_lists_are_bounded() {
        let (mut cancels, now) = (Cancels::default(), Instant::now());
        for number in 0..3 * MOST as u32 {
            cancels.ended(&key("ended", number, "c", None));
            cancels.before_its_request(cancellation(&format!("early {number}"), None, None), now);
        }
        assert_eq!((cancels.early.len(), cancels.ended.len()), (MOST, MOST));
    }
}

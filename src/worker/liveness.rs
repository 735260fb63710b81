//! Which controllers still live: each says how often it speaks, and three silences in a row are its end.
//!
//! One that has never said how often is not judged: its requests end at their deadlines. Time goes in; the decision comes out.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// How many intervals of silence end a controller.
const INTERVALS: u32 = 3;
/// How many controllers are watched at most; the requests of further ones end at their deadlines.
const MOST: usize = 4096;
/// What a controller may name as its interval.
const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(3600);

/// The controllers that were heard.
#[derive(Default)]
pub(super) struct Liveness {
    seen: HashMap<String, Seen>,
    paused: bool,
}

struct Seen {
    at: Instant,
    interval: Duration,
}

// === impl Liveness ===

impl Liveness {
    /// A controller spoke and said how often it does.
    pub(super) fn heard(&mut self, controller: &str, interval_ms: u64, now: Instant) {
        let interval = Duration::from_millis(interval_ms).clamp(SHORTEST, LONGEST);
        if self.seen.len() < MOST || self.seen.contains_key(controller) {
            self.seen.insert(controller.to_owned(), Seen { at: now, interval });
        }
    }

    /// A request of a controller came: a sign of life as well.
    pub(super) fn touch(&mut self, controller: &str, now: Instant) {
        if let Some(seen) = self.seen.get_mut(controller) {
            seen.at = now;
        }
    }

    /// Our own connection is down: nobody can be heard.
    pub(super) fn pause(&mut self) {
        self.paused = true;
    }

    /// Our own connection is back: everyone counts as heard now.
    pub(super) fn resume(&mut self, now: Instant) {
        self.paused = false;
        self.seen.values_mut().for_each(|seen| seen.at = now);
    }

    /// When the next one ends, if it stays silent.
    pub(super) fn next_end(&self) -> Option<Instant> {
        if self.paused { None } else { self.seen.values().map(Seen::end).min() }
    }

    /// Takes out those whose end has come.
    pub(super) fn ended(&mut self, now: Instant) -> Vec<String> {
        if self.paused {
            return Vec::new();
        }
        self.seen.extract_if(|_, seen| seen.end() <= now).map(|(controller, _)| controller).collect()
    }
}

impl Seen {
    fn end(&self) -> Instant {
        self.at + self.interval * INTERVALS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn three_silences_end_a_controller_and_a_request_is_a_sign_of_life() {
        let (mut liveness, start) = (Liveness::default(), Instant::now());
        liveness.heard("c", 1000, start);
        assert_eq!(liveness.next_end(), Some(start + 3 * SECOND));
        liveness.touch("c", start + SECOND);
        liveness.touch("unknown", start);
        assert!(liveness.ended(start + 3 * SECOND).is_empty());
        assert_eq!(liveness.ended(start + 4 * SECOND), ["c"]);
        assert_eq!(liveness.next_end(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_judged_while_nobody_can_be_heard() {
        let (mut liveness, start) = (Liveness::default(), Instant::now());
        liveness.heard("c", 1000, start);
        liveness.pause();
        assert_eq!(liveness.next_end(), None);
        assert!(liveness.ended(start + 60 * SECOND).is_empty());
        liveness.resume(start + 60 * SECOND);
        assert_eq!(liveness.next_end(), Some(start + 63 * SECOND));
    }
}

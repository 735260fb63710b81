//! What the log is told of workers that could serve a model and are not asked: those whose breaker refuses, and those that
//! have not been heard from since our own connection was down.
//!
//! Each of them is told at most once in a while, however many requests pass them by. Who was tried, is full or is degraded
//! is ordinary, and stands in the request's metadata alone.

use std::collections::HashMap;
use std::fmt::Write;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::routing::LeftOut;
use crate::wire::WorkerId;

/// For so long nothing more is said of a worker and a reason.
const AGAIN_AFTER: Duration = Duration::from_secs(30);
/// Workers that one record names.
const NAMED_MAX: usize = 16;

/// What was told, and when. Never more than a few entries for each worker that is left out.
#[derive(Default)]
pub(super) struct LeftOutLog {
    told: Mutex<HashMap<(WorkerId, LeftOut), Instant>>,
}

// === impl LeftOutLog ===

impl LeftOutLog {
    /// Tells the log of those who were left out, where there is somebody new among them.
    pub(super) fn tell(&self, request_id: &str, model_id: &str, left_out: &[(WorkerId, LeftOut)], now: Instant) {
        if let Some((count, left_out)) = self.news(left_out, now) {
            tracing::warn!(request_id, model_id, count, left_out, "workers filtered out");
        }
    }

    /// How many are kept out, and who and why; nothing where all of them were told lately.
    fn news(&self, left_out: &[(WorkerId, LeftOut)], now: Instant) -> Option<(usize, String)> {
        let kept_out = || left_out.iter().filter(|(_, why)| matches!(why, LeftOut::CircuitOpen | LeftOut::Unheard));
        kept_out().next()?;
        let mut told = self.told.lock();
        let lately = |at: &Instant| now.saturating_duration_since(*at) < AGAIN_AFTER;
        if kept_out().all(|one| told.get(one).is_some_and(lately)) {
            return None;
        }
        told.retain(|_, at| lately(at));
        told.extend(kept_out().map(|one| (one.clone(), now)));
        drop(told);
        let mut named = String::new();
        for (worker_id, why) in kept_out().take(NAMED_MAX) {
            let comma = if named.is_empty() { "" } else { ", " };
            // Writing into a String cannot fail.
            let _ = write!(named, "{comma}{worker_id}: {}", why.as_str());
        }
        Some((kept_out().count(), named))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn one(name: &str, why: LeftOut) -> (WorkerId, LeftOut) {
        (WorkerId::new(name).unwrap(), why)
    }

    #[test]
    fn a_worker_is_told_once_in_a_while_and_a_new_one_at_once() {
        let (log, start) = (LeftOutLog::default(), Instant::now());
        let (a, b) = (one("a", LeftOut::CircuitOpen), one("b", LeftOut::Unheard));
        let second = Duration::from_secs(1);
        assert_eq!(log.news(std::slice::from_ref(&a), start), Some((1, "a: circuit_open".into())));
        assert_eq!(log.news(std::slice::from_ref(&a), start + second), None);
        let both = [a, b];
        assert_eq!(log.news(&both, start + second * 2), Some((2, "a: circuit_open, b: unheard".into())));
        assert_eq!(log.news(&both, start + second * 31), None);
        assert!(log.news(&both, start + second * 32).is_some());
    }

    #[test]
    fn a_worker_that_comes_and_goes_is_not_told_more_often() {
        let (log, start) = (LeftOutLog::default(), Instant::now());
        let kept_out = [one("a", LeftOut::CircuitOpen)];
        let told = (0..1_000).filter(|at| {
            let left_out = if at % 2 == 0 { &kept_out[..] } else { &[] };
            log.news(left_out, start + Duration::from_millis(100) * *at).is_some()
        });
        assert_eq!(told.count(), 4);
    }

    #[test]
    fn what_is_ordinary_is_not_told() {
        let ordinary = [one("a", LeftOut::Tried), one("b", LeftOut::Full), one("c", LeftOut::Degraded)];
        assert_eq!(LeftOutLog::default().news(&ordinary, Instant::now()), None);
    }

    #[test]
    fn the_memory_and_the_record_are_bounded() {
        let (log, start) = (LeftOutLog::default(), Instant::now());
        let kept_out = |round: usize| (0..100).map(|at| one(&format!("w{round}-{at}"), LeftOut::CircuitOpen)).collect::<Vec<_>>();
        for round in 0..10 {
            let (count, named) = log.news(&kept_out(round), start + AGAIN_AFTER * u32::try_from(round).unwrap()).unwrap();
            assert_eq!((count, named.matches("circuit_open").count()), (100, NAMED_MAX));
            assert_eq!(log.told.lock().len(), 100);
        }
    }
}

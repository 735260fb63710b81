//! Which worker a session belongs to: a bounded map that forgets what was not used for longest.
//!
//! All sessions live equally long since their last use, so that one list in the order of use serves both the time limit
//! and the cap: finding, binding and forgetting take constant time. Sessions are known by a hash of 64 bits with a key of
//! its own: of a hundred thousand two are the same once in a few billion times, and then share a worker.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use hashlink::LinkedHashMap;
use hashlink::linked_hash_map::RawEntryMut;
use tokio::time::Instant;

use super::worker::Life;
use crate::wire::WorkerId;

#[derive(Debug)]
pub(super) struct Sessions {
    ttl: Duration,
    cap: usize,
    /// By the hash of the session, the least recently used one first.
    entries: LinkedHashMap<u64, Entry, RandomState>,
}

/// One life of one worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Binding {
    pub(super) worker: WorkerId,
    pub(super) life: Life,
}

#[derive(Debug)]
struct Entry {
    binding: Binding,
    used: Instant,
}

// === impl Sessions ===

impl Sessions {
    pub(super) fn new(ttl: Duration, cap: usize) -> Self {
        Self { ttl, cap: cap.max(1), entries: LinkedHashMap::default() }
    }

    /// The worker of a session; asking is using.
    pub(super) fn find(&mut self, session: &str, now: Instant) -> Option<Binding> {
        let session = self.key(session);
        let RawEntryMut::Occupied(mut found) = self.entries.raw_entry_mut().from_key(&session) else { return None };
        if found.get().is_over(self.ttl, now) {
            found.remove();
            return None;
        }
        found.to_back();
        let entry = found.into_mut();
        entry.used = now;
        Some(entry.binding.clone())
    }

    /// Gives a session to a worker and says whose it was.
    pub(super) fn bind(&mut self, session: &str, binding: Binding, now: Instant) -> Option<Binding> {
        let session = self.key(session);
        if let RawEntryMut::Occupied(mut found) = self.entries.raw_entry_mut().from_key(&session) {
            found.to_back();
            return Some(found.replace_value(Entry { binding, used: now }).binding);
        }
        self.expire(now);
        while self.entries.len() >= self.cap {
            self.entries.pop_front();
        }
        self.entries.insert(session, Entry { binding, used: now });
        None
    }

    /// Forgets what was not used for too long.
    pub(super) fn expire(&mut self, now: Instant) {
        while self.entries.front().is_some_and(|(_, oldest)| oldest.is_over(self.ttl, now)) {
            self.entries.pop_front();
        }
    }

    fn key(&self, session: &str) -> u64 {
        self.entries.hasher().hash_one(session)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

// === impl Entry ===

impl Entry {
    fn is_over(&self, ttl: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.used) >= ttl
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn to(name: &str) -> Binding {
        Binding { worker: WorkerId::new(name).unwrap(), life: Life { serial: 1, account: 0 } }
    }

    #[tokio::test(start_paused = true)]
    async fn the_one_not_used_for_longest_goes_first() {
        let now = Instant::now();
        let mut sessions = Sessions::new(Duration::from_secs(60), 3);
        for name in ["a", "b", "c"] {
            assert_eq!(sessions.bind(name, to(name), now), None);
        }
        assert_eq!(sessions.find("a", now), Some(to("a")));
        sessions.bind("d", to("d"), now);
        assert_eq!(sessions.find("b", now), None);
        assert_eq!(sessions.find("c", now), Some(to("c")));
        assert_eq!(sessions.bind("c", to("x"), now), Some(to("c")));
        assert_eq!(sessions.len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_lives_from_its_last_use() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut sessions = Sessions::new(Duration::from_secs(60), 10);
        sessions.bind("a", to("a"), at(0));
        sessions.bind("b", to("b"), at(0));
        assert!(sessions.find("a", at(59)).is_some());
        assert!(sessions.find("b", at(60)).is_none());
        assert!(sessions.find("a", at(118)).is_some());
        sessions.expire(at(178));
        assert_eq!(sessions.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn many_sessions_stay_at_the_cap() {
        let now = Instant::now();
        let mut sessions = Sessions::new(Duration::from_secs(60), 100);
        for number in 0..50_000_u32 {
            sessions.bind(&number.to_string(), to("a"), now);
        }
        assert_eq!((sessions.len(), sessions.entries.capacity() <= 256), (100, true));
    }
}

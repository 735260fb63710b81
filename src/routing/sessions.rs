//! Which worker a session belongs to: a bounded map that forgets what was not used for longest.
//!
//! All sessions live equally long since their last use, so that one list in the order of use serves both the time limit
//! and the cap: finding, binding and forgetting take constant time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;
use tokio::time::Instant;

use crate::wire::WorkerId;

#[derive(Debug)]
pub(super) struct Sessions {
    ttl: Duration,
    cap: usize,
    places: HashMap<Arc<str>, usize>,
    entries: Slab<Entry>,
    /// The least and the most recently used.
    ends: Option<(usize, usize)>,
}

/// One life of one worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Binding {
    pub(super) worker: WorkerId,
    pub(super) serial: u64,
}

#[derive(Debug)]
struct Entry {
    session: Arc<str>,
    binding: Binding,
    used: Instant,
    older: Option<usize>,
    newer: Option<usize>,
}

// === impl Sessions ===

impl Sessions {
    pub(super) fn new(ttl: Duration, cap: usize) -> Self {
        Self { ttl, cap, places: HashMap::new(), entries: Slab::new(), ends: None }
    }

    /// The worker of a session; asking is using.
    pub(super) fn find(&mut self, session: &str, now: Instant) -> Option<Binding> {
        let place = *self.places.get(session)?;
        if now.saturating_duration_since(self.entries[place].used) >= self.ttl {
            self.forget(place);
            return None;
        }
        self.unlink(place);
        self.link_newest(place, now);
        Some(self.entries[place].binding.clone())
    }

    /// Gives a session to a worker and says whose it was.
    pub(super) fn bind(&mut self, session: &str, binding: Binding, now: Instant) -> Option<Binding> {
        if let Some(&place) = self.places.get(session) {
            self.unlink(place);
            self.link_newest(place, now);
            return Some(std::mem::replace(&mut self.entries[place].binding, binding));
        }
        self.expire(now);
        while self.entries.len() >= self.cap.max(1) {
            self.forget_oldest();
        }
        let session: Arc<str> = session.into();
        let entry = Entry { session: session.clone(), binding, used: now, older: None, newer: None };
        let place = self.entries.insert(entry);
        self.places.insert(session, place);
        self.link_newest(place, now);
        None
    }

    /// Forgets what was not used for too long.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((oldest, _)) = self.ends
            && now.saturating_duration_since(self.entries[oldest].used) >= self.ttl
        {
            self.forget(oldest);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn forget_oldest(&mut self) {
        if let Some((oldest, _)) = self.ends {
            self.forget(oldest);
        }
    }

    fn forget(&mut self, place: usize) {
        self.unlink(place);
        let entry = self.entries.remove(place);
        self.places.remove(&entry.session);
    }

    fn link_newest(&mut self, place: usize, now: Instant) {
        let newest = self.ends.map(|(_, newest)| newest);
        let entry = &mut self.entries[place];
        entry.used = now;
        entry.older = newest;
        entry.newer = None;
        if let Some(newest) = newest {
            self.entries[newest].newer = Some(place);
        }
        self.ends = Some((self.ends.map_or(place, |(oldest, _)| oldest), place));
    }

    fn unlink(&mut self, place: usize) {
        let Entry { older, newer, .. } = self.entries[place];
        if let Some(older) = older {
            self.entries[older].newer = newer;
        }
        if let Some(newer) = newer {
            self.entries[newer].older = older;
        }
        self.ends = self.ends.and_then(|(oldest, newest)| {
            let oldest = if oldest == place { newer } else { Some(oldest) };
            let newest = if newest == place { older } else { Some(newest) };
            oldest.zip(newest)
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn to(name: &str) -> Binding {
        Binding { worker: WorkerId::new(name).unwrap(), serial: 1 }
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
        assert_eq!((sessions.len(), sessions.places.len(), sessions.entries.capacity() <= 256), (100, 100, true));
    }
}

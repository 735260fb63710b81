//! What is remembered of an id beyond one life of it: the incarnations that are over, and how often it came back.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::wire::WorkerId;

#[derive(Debug, Default)]
pub(super) struct History {
    /// The latest incarnations that were superseded or deregistered, the oldest first.
    over: VecDeque<Arc<str>>,
    /// Returns that are not forgiven yet.
    returns: u32,
    returned: Option<Instant>,
}

/// The histories of ids that are not in the fleet, for an hour since they were last heard from, and of no more of them
/// than the fleet may have members.
#[derive(Debug, Default)]
pub(super) struct Departed {
    histories: HashMap<WorkerId, (History, Instant)>,
    /// Whoever was not heard from for longest comes first.
    order: BTreeSet<(Instant, WorkerId)>,
}

/// Incarnations remembered for each id.
const REMEMBERED: usize = 16;
/// How long the history of a worker that left is remembered.
const REMEMBERED_FOR: Duration = Duration::from_secs(3_600);
/// Returns that hold nobody back: a restart, and a second try.
const FREE_RETURNS: u32 = 2;
/// The first time to be held back; doubles with each return.
const FIRST_HOLD: Duration = Duration::from_secs(1);

// === impl History ===

impl History {
    /// Whether this incarnation is over.
    pub(super) fn contains(&self, incarnation: &str) -> bool {
        self.over.iter().any(|known| **known == *incarnation)
    }

    /// An incarnation is over. Workers without incarnations have none to remember.
    pub(super) fn push(&mut self, incarnation: &Arc<str>) {
        if !incarnation.is_empty() && !self.contains(incarnation) {
            if self.over.len() == REMEMBERED {
                self.over.pop_front();
            }
            self.over.push_back(incarnation.clone());
        }
    }

    /// The worker is back: until when it is held back. `longest` is the limit of that, and the time without a return after
    /// which one is forgiven.
    pub(super) fn back(&mut self, longest: Duration, now: Instant) -> Option<Instant> {
        let calm = self.returned.map_or(Duration::ZERO, |returned| now.saturating_duration_since(returned));
        let forgiven = calm.as_nanos().checked_div(longest.as_nanos())?;
        self.returns = self.returns.saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX)).saturating_add(1);
        self.returned = Some(now);
        let doublings = self.returns.checked_sub(FREE_RETURNS + 1)?;
        let hold = FIRST_HOLD.saturating_mul(1_u32.checked_shl(doublings).unwrap_or(u32::MAX));
        if hold >= longest {
            // Returns beyond the longest hold are not counted, or they would have to be forgiven too.
            self.returns -= 1;
        }
        Some(now + hold.min(longest))
    }
}

// === impl Departed ===

impl Departed {
    /// Whether this incarnation is over.
    pub(super) fn remembers(&self, id: &WorkerId, incarnation: &str) -> bool {
        self.histories.get(id).is_some_and(|(history, _)| history.contains(incarnation))
    }

    pub(super) fn take(&mut self, id: &WorkerId) -> Option<History> {
        let (id, (history, last_seen)) = self.histories.remove_entry(id)?;
        self.order.remove(&(last_seen, id));
        Some(history)
    }

    pub(super) fn insert(&mut self, id: WorkerId, history: History, cap: usize, last_seen: Instant) {
        self.take(&id);
        self.order.insert((last_seen, id.clone()));
        self.histories.insert(id, (history, last_seen));
        while self.order.len() > cap {
            self.forget_oldest();
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        while self.order.first().is_some_and(|(since, _)| now.saturating_duration_since(*since) >= REMEMBERED_FOR) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, id)) = self.order.pop_first() {
            self.histories.remove(&id);
        }
    }
}

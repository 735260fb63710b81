//! `skills_based`: workers that have the model in memory, then most free memory, then fewest requests in flight; ties in
//! turn. What is in memory and what is free is what the latest heartbeat said.

use std::cmp::Ordering;
use std::ops::ControlFlow;

use crate::routing::fleet::Candidates;

/// What a candidate is judged by; the smallest is the best.
#[derive(PartialEq)]
struct Rank {
    cold: bool,
    free_memory_gb: f64,
    requests: u32,
}

pub(super) fn pick(candidates: &Candidates<'_>) -> Option<usize> {
    let mut best: Option<(usize, Rank)> = None;
    candidates.each_in_turn::<()>(|place, worker| {
        let live = worker.live();
        let rank = Rank {
            cold: !live.loaded.iter().any(|model| model == candidates.query.model_id),
            free_memory_gb: live.free_memory_gb(),
            requests: worker.load.total(candidates.now),
        };
        if best.as_ref().is_none_or(|(_, best)| rank.cmp(best).is_lt()) {
            best = Some((place, rank));
        }
        ControlFlow::Continue(())
    });
    best.map(|(place, _)| place)
}

// === impl Rank ===

impl Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_memory = other.free_memory_gb.total_cmp(&self.free_memory_gb);
        self.cold.cmp(&other.cold).then(by_memory).then(self.requests.cmp(&other.requests))
    }
}

//! `least_requests`: the fewest requests in flight, our own and others' together; ties in turn.

use crate::routing::fleet::Candidates;

pub(super) fn pick(candidates: &Candidates<'_>) -> Option<usize> {
    let now = candidates.now;
    candidates.in_turn().min_by_key(|(_, worker)| worker.load.total(now)).map(|(place, _)| place)
}

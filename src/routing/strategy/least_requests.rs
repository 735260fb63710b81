//! `least_requests`: the fewest requests in flight, our own and others' together; ties in turn.

use crate::routing::fleet::Candidates;

pub(super) fn pick(candidates: &Candidates<'_>) -> Option<usize> {
    candidates.least_loaded().map(|(place, _)| place)
}

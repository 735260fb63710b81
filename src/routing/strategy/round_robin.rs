//! `round_robin`: in turn.

use crate::routing::fleet::Candidates;

pub(super) fn pick(candidates: &Candidates<'_>) -> Option<usize> {
    candidates.in_turn().map(|(place, _)| place).next()
}

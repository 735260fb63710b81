//! `round_robin`: in turn.

use crate::routing::fleet::Candidates;

pub(super) fn pick(candidates: &Candidates<'_>) -> Option<usize> {
    candidates.take_turn()
}

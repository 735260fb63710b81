//! `round_robin`: in turn.

use std::ops::ControlFlow;

use crate::routing::fleet::Candidates;

pub(super) fn pick(candidates: &Candidates<'_>) -> Option<usize> {
    candidates.each_in_turn(|place, _| ControlFlow::Break(place))
}

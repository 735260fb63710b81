//! `weighted_random`: at random, in proportion to weights. A weight of 0 takes a worker out unless all have it.

use std::ops::ControlFlow;

use crate::routing::dice::Dice;
use crate::routing::fleet::Candidates;

pub(super) fn pick(candidates: &Candidates<'_>, dice: &Dice) -> Option<usize> {
    let mut random = dice.roll();
    let mut total = 0.0;
    let mut chosen = None;
    // One pass: each candidate takes the place of those before it with probability weight / sum of the weights so far.
    candidates.each_from::<()>(0, |place, worker| {
        total += worker.weight;
        if chosen.is_none() || random.f64() * total < worker.weight {
            chosen = Some(place);
        }
        ControlFlow::Continue(())
    });
    chosen
}

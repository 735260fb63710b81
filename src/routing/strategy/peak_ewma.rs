//! `peak_ewma`: the better of two random picks by (requests in flight + 1) × moving average of the time to first token.
//!
//! Two picks need no look at the others, whatever the size of the fleet (Mitzenmacher, 2001). While one of the two has
//! never answered, requests in flight alone decide: a new worker neither draws everything nor starves.

use std::ops::ControlFlow;

use crate::routing::dice::Dice;
use crate::routing::fleet::Candidates;

/// Random places that are tried for each pick before the candidates are walked through.
const DRAWS: usize = 4;

pub(super) fn pick(candidates: &Candidates<'_>, dice: &Dice) -> Option<usize> {
    let mut random = dice.roll();
    let first = draw(candidates, &mut random, None)?;
    let Some(second) = draw(candidates, &mut random, Some(first)) else { return Some(first) };
    let [one, other] = [first, second].map(|place| {
        let load = &candidates.model.workers[place].load;
        (load.total(candidates.now) as f32 + 1.0, load.latency(candidates.now))
    });
    let second_is_better = match (one, other) {
        ((load, Some(latency)), (other_load, Some(other_latency))) => other_load * other_latency < load * latency,
        ((load, _), (other_load, _)) => other_load < load,
    };
    Some(if second_is_better { second } else { first })
}

/// The place of a random candidate other than `taken`.
fn draw(candidates: &Candidates<'_>, random: &mut fastrand::Rng, taken: Option<usize>) -> Option<usize> {
    let count = candidates.model.workers.len();
    let fits = |place: usize| Some(place) != taken && candidates.admits(place);
    if let Some(place) = (0..DRAWS.min(count)).map(|_| random.usize(..count)).find(|&place| fits(place)) {
        return Some(place);
    }
    candidates.each_from(random.usize(..count), |place, _| match taken {
        Some(taken) if taken == place => ControlFlow::Continue(()),
        _ => ControlFlow::Break(place),
    })
}

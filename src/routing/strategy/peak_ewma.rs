//! `peak_ewma`: the better of two random picks by (requests in flight + 1) × moving average of the time to first token.
//!
//! Two picks need no look at the others, whatever the size of the fleet (Mitzenmacher, 2001).

use crate::routing::dice::Dice;
use crate::routing::fleet::Candidates;
use crate::routing::worker::Worker;

/// Random places that are tried for each pick before the candidates are walked through.
const DRAWS: usize = 4;

pub(super) fn pick(candidates: &Candidates<'_>, dice: &Dice) -> Option<usize> {
    let mut random = dice.roll();
    let first = draw(candidates, &mut random, None)?;
    let Some(second) = draw(candidates, &mut random, Some(first)) else { return Some(first) };
    let cost = |place: usize| cost(&candidates.model.workers[place], candidates);
    Some(if cost(second) < cost(first) { second } else { first })
}

fn cost(worker: &Worker, candidates: &Candidates<'_>) -> f64 {
    (f64::from(worker.load.total(candidates.now)) + 1.0) * worker.load.latency(candidates.now)
}

/// The place of a random candidate other than `taken`.
fn draw(candidates: &Candidates<'_>, random: &mut fastrand::Rng, taken: Option<usize>) -> Option<usize> {
    let count = candidates.model.workers.len();
    let fits = |place: usize| Some(place) != taken && candidates.admits(place);
    if let Some(place) = (0..DRAWS.min(count)).map(|_| random.usize(..count)).find(|&place| fits(place)) {
        return Some(place);
    }
    candidates.iter_from(random.usize(..count)).map(|(place, _)| place).find(|&place| Some(place) != taken)
}

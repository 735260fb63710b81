//! Which of the candidates is taken: one file for each way.
//!
//! A strategy sees the candidates of one request and names the place of one of them; it holds no state. Of equals it
//! takes the one whose turn it is.

mod least_requests;
mod peak_ewma;
mod prefix_aware;
mod round_robin;
mod skills_based;
mod weighted_random;

use super::dice::Dice;
use super::fleet::Candidates;
use super::lease::Choice;
use crate::config::Strategy;

pub(super) use prefix_aware::Caches;

/// The place of the chosen candidate and what decided for it; `None` where there is no candidate. `caches`: what of the
/// prompt lies in caches, for `prefix_aware`.
pub(super) fn pick(
    strategy: Strategy,
    candidates: &Candidates<'_>,
    caches: Option<Caches<'_>>,
    dice: &Dice,
) -> Option<(usize, Choice)> {
    if let Some(place) = caches.and_then(|caches| prefix_aware::pick(candidates, caches)) {
        return Some((place, Choice::Prefix));
    }
    let in_turn = match strategy {
        // It has moved the turn on already: of callers at the same time each gets another one.
        Strategy::RoundRobin => return Some((round_robin::pick(candidates)?, Choice::Strategy)),
        Strategy::LeastRequests | Strategy::PrefixAware => least_requests::pick(candidates),
        Strategy::SkillsBased => skills_based::pick(candidates),
        // By chance nobody has a turn, and threads need not tell each other.
        Strategy::WeightedRandom => return Some((weighted_random::pick(candidates, dice)?, Choice::Strategy)),
        Strategy::PeakEwma => return Some((peak_ewma::pick(candidates, dice)?, Choice::Strategy)),
    };
    let place = in_turn?;
    candidates.took(place);
    Some((place, Choice::Strategy))
}

//! Which of the candidates is taken: one file for each way.
//!
//! A strategy sees the candidates of one request and names the place of one of them; it holds no state. Of equals it
//! takes the one whose turn it is.

mod least_requests;
mod peak_ewma;
mod round_robin;
mod skills_based;
mod weighted_random;

use super::dice::Dice;
use super::fleet::Candidates;
use crate::config::Strategy;

/// The place of the chosen candidate; `None` where there is no candidate.
pub(super) fn pick(strategy: Strategy, candidates: &Candidates<'_>, dice: &Dice) -> Option<usize> {
    let place = match strategy {
        Strategy::RoundRobin => round_robin::pick(candidates),
        // `RouterSettings` refuses prefix_aware; without an index of prefixes it comes down to its second criterion.
        Strategy::LeastRequests | Strategy::PrefixAware => least_requests::pick(candidates),
        Strategy::WeightedRandom => weighted_random::pick(candidates, dice),
        Strategy::SkillsBased => skills_based::pick(candidates),
        Strategy::PeakEwma => peak_ewma::pick(candidates, dice),
    }?;
    candidates.took(place);
    Some(place)
}

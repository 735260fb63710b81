//! `prefix_aware`: the worker that most likely holds the longest prefix of the prompt, unless it is overloaded; of equals
//! the one with the fewest requests in flight. Where nobody holds enough of the prompt, `least_requests` chooses.
//!
//! Other routers weigh the same two things. The policy `cache_aware` of SMG (lightseekorg/smg, "Load Balancing") gives load
//! the word when the busiest worker is ahead by an absolute number and by a ratio, 64 and 1.5, and asks for 0.3 of the
//! prompt; Ray Serve ("Prefix-aware routing") asks for a tenth. Here the worker in question is judged, not the fleet, so that
//! of several holders those with room still count. The ratio is SMG's; the number is what a machine may have in flight that
//! answers a few requests at a time, not hundreds; the share lies between the two.

use crate::routing::fleet::Candidates;
use crate::routing::prefixes::Held;
use crate::wire::{PrefixHashes, prefix_bytes};

/// A worker is overloaded when it has so many requests more than the least busy candidate …
const AHEAD_BY: u32 = 4;
/// … and more than its requests times this: numerator and denominator.
const AHEAD_TIMES: (u32, u32) = (3, 2);
/// A worker that holds less than one in so many bytes of the prompt is one like the others: what all prompts begin with must
/// not bring all of them to one worker.
const SHARE: u64 = 4;

/// What of the prompt lies in caches.
#[derive(Clone, Copy, Debug)]
pub(in crate::routing) struct Caches<'a> {
    pub(in crate::routing) prompt: &'a PrefixHashes,
    /// Those who hold most first.
    pub(in crate::routing) held: &'a [Held],
}

struct Holder {
    place: usize,
    load: u32,
    prefixes: usize,
    /// So many others are before it in turn.
    waits: usize,
}

/// The holder that is taken; `None` where the prompt decides nothing.
pub(super) fn pick(candidates: &Candidates<'_>, caches: Caches<'_>) -> Option<usize> {
    let enough = |held: &&Held| prefix_bytes(held.prefixes - 1) * SHARE >= caches.prompt.bytes();
    let count = caches.held.iter().take_while(enough).count();
    let held = caches.held.get(..count).filter(|held| !held.is_empty())?;
    let (_, least) = candidates.least_loaded()?;
    let (turn, all) = (candidates.turn(), candidates.model.workers.len());
    let holders = held.iter().filter_map(|held| {
        let place = candidates.model.find(held.life).filter(|&place| candidates.admits(place))?;
        let load = candidates.load(&candidates.model.workers[place]);
        Some(Holder { place, load, prefixes: held.prefixes, waits: (place + all - turn.min(all)) % all })
    });
    let free = holders.filter(|holder| !is_overloaded(holder.load, least));
    free.min_by_key(|holder| (std::cmp::Reverse(holder.prefixes), holder.load, holder.waits)).map(|holder| holder.place)
}

fn is_overloaded(load: u32, least: u32) -> bool {
    let (times, of) = AHEAD_TIMES;
    load > least.saturating_add(AHEAD_BY) && u64::from(load) * u64::from(of) > u64::from(least) * u64::from(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overload_takes_both_a_number_and_a_ratio() {
        let overloaded = |least: u32| (0..1_000).find(|&load| is_overloaded(load, least));
        assert_eq!([0, 1, 8, 20].map(overloaded), [Some(5), Some(6), Some(13), Some(31)]);
    }
}

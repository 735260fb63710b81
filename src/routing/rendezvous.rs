//! Rendezvous hashing: every controller gives a session the same worker without asking the others.
//!
//! Each pair of session and worker has a score, `mix(fnv(session) ^ mix(fnv(worker)))`; the candidate with the highest
//! score takes the session, and of equal ones the one whose id sorts first. `fnv` is FNV-1a with 64 bits over the UTF-8
//! bytes and `mix` the finalizer of splitmix64. Nothing in it depends on the process, the machine or the order of the
//! workers: when one leaves, only its own sessions go elsewhere. The formula is part of the protocol between
//! controllers; a change of it moves sessions while versions are mixed.

use super::dice::mix;
use crate::fnv;

/// The share of a name in a score: that of a session as it is, that of a worker by [`seat`].
pub(super) fn fnv(name: &str) -> u64 {
    fnv::add(fnv::START, name.as_bytes())
}

/// A worker's share of its scores; worth keeping.
pub(super) fn seat(worker: &str) -> u64 {
    mix(fnv(worker))
}

/// The score of a session, by [`fnv`], on a worker, by [`seat`].
pub(super) const fn score(session: u64, seat: u64) -> u64 {
    mix(session ^ seat)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(session: &str, workers: &[String]) -> usize {
        let session = fnv(session);
        (0..workers.len()).max_by_key(|&index| score(session, seat(&workers[index]))).unwrap_or(0)
    }

    #[test]
    fn scores_are_the_same_in_every_controller() {
        assert_eq!(fnv(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv("a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(score(fnv("s-1"), seat("mac-studio-1")), 2_527_936_236_118_158_063);
    }

    #[test]
    fn sessions_spread_and_only_those_of_a_worker_that_left_move() {
        let workers: Vec<String> = (0..10).map(|number| format!("worker-{number}")).collect();
        let mut counts = [0_u32; 10];
        for session in (0..10_000).map(|number| format!("session-{number}")) {
            let before = owner(&session, &workers);
            counts[before] += 1;
            let after = owner(&session, &workers[..9]);
            assert!(before == 9 || before == after, "{session} moved without need");
        }
        assert!(counts.iter().all(|count| (850..1_150).contains(count)), "{counts:?}");
    }
}

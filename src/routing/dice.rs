//! Random numbers for many threads from one seed, without a lock.

use crate::sync::atomic::{AtomicU64, Ordering};

/// A seeded source of generators: with one thread, the same seed gives the same generators in the same order.
#[derive(Debug)]
pub(super) struct Dice(AtomicU64);

/// The step of splitmix64: odd, so that 2⁶⁴ draws pass before a seed comes back.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

// === impl Dice ===

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// A generator for one decision.
    pub(super) fn roll(&self) -> fastrand::Rng {
        fastrand::Rng::with_seed(mix(self.0.fetch_add(STEP, Ordering::Relaxed)))
    }
}

/// The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every bit of the input moves every bit of the output.
pub(super) const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

//! Random numbers for many threads from one seed, without a lock, and without a number that threads have to share.

use std::cell::Cell;

use crate::sync::atomic::{AtomicU64, Ordering};

/// A seeded source of generators: with one thread, the same seed gives the same generators in the same order.
#[derive(Debug)]
pub(super) struct Dice {
    /// Tells these dice from others.
    id: u64,
    /// The seed of the next thread that comes.
    next: AtomicU64,
}

/// The step of splitmix64: odd, so that 2⁶⁴ draws pass before a seed comes back.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// No thread of a test is scheduled by it.
static IDS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);

thread_local! {
    /// Which dice this thread rolled last, and where in their numbers it is. It begins anew with others.
    static ROLLED: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

// === impl Dice ===

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self { id: IDS.fetch_add(1, Ordering::Relaxed), next: AtomicU64::new(seed) }
    }

    /// A generator for one decision.
    pub(super) fn roll(&self) -> fastrand::Rng {
        let (id, at) = ROLLED.get();
        let at = if id == self.id { at } else { mix(self.next.fetch_add(STEP, Ordering::Relaxed)) };
        ROLLED.set((self.id, at.wrapping_add(STEP)));
        fastrand::Rng::with_seed(mix(at))
    }
}

/// The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every bit of the input moves every bit of the output.
pub(super) const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

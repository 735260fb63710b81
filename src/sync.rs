//! The locks and atomics of what many threads share: parking_lot's and std's, or shuttle's, which runs the threads of a test
//! in one random order after another (feature `shuttle`, for tests alone).
//!
//! Whatever is locked here has to be so with everything that is used under the lock: shuttle changes threads at each use, and
//! a lock it does not know would be held meanwhile. What never changes threads may stay as it is: `ArcSwap`, tokio's `Notify`,
//! `watch` and `mpsc`, cancellation tokens.
//!
//! To shuttle every access to an atomic comes before or after every other, whatever its `Ordering`. What asks for less is
//! therefore either one step on one number, as counts are, or advice. Advice that is looked at again under a lock before it
//! counts: a breaker's gate, a worker's standing, the version of the fleet. What the ledger says is advice too; no lock follows,
//! but whoever is to be chosen is asked, and everybody before all are called full.

#[cfg(feature = "shuttle")]
pub(crate) use self::scheduled::{Mutex, MutexGuard};
#[cfg(not(feature = "shuttle"))]
pub(crate) use parking_lot::{Mutex, MutexGuard};
#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::atomic;
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::atomic;

/// Shuttle's lock with parking_lot's door.
#[cfg(feature = "shuttle")]
mod scheduled {
    use std::sync::PoisonError;

    pub(crate) use shuttle::sync::MutexGuard;

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        pub(crate) fn get_mut(&mut self) -> &mut T {
            self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
        }
    }
}

/// Runs a test in so many random orders of its threads, and in as many that change threads seldom but anywhere. A failure
/// prints its order, which `shuttle::replay` runs again.
#[cfg(all(test, feature = "shuttle"))]
pub(crate) fn explore(orders: usize, test: impl Fn() + Send + Sync + Copy + 'static) {
    use shuttle::scheduler::{PctScheduler, RandomScheduler};
    let config = || {
        let mut config = shuttle::Config::new();
        config.stack_size = 1 << 20;
        // Of orderings, which the head of this file speaks of.
        config.silence_warnings = true;
        config
    };
    shuttle::Runner::new(RandomScheduler::new(orders), config()).run(test);
    shuttle::Runner::new(PctScheduler::new(3, orders), config()).run(test);
}

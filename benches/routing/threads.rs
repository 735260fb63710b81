//! How much more two threads decide than one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use mlx_serving_router::config::Strategy;
use mlx_serving_router::routing::Router;
use tokio::time::Instant;

use crate::decisions::{ANY, decide};
use crate::fleet;

/// For each round: decisions per second of one thread, of two together, and of two that have a router each. The last is
/// what the machine can do.
pub fn rounds(workers: usize, rounds: usize, length: Duration) -> Vec<[f64; 3]> {
    let [router, other] = [(); 2].map(|()| fleet::with_workers(Strategy::PeakEwma, workers, Instant::now()));
    rate(&[&router, &router], length);
    let kinds = [&[&router][..], &[&router, &router], &[&router, &other]];
    (0..rounds).map(|_| kinds.map(|routers| rate(routers, length))).collect()
}

fn rate(routers: &[&Arc<Router>], length: Duration) -> f64 {
    let ready = AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    let run = |router: &Arc<Router>| {
        let now = Instant::now();
        let mut decisions = 0_u64;
        ready.fetch_add(1, Ordering::AcqRel);
        while ready.load(Ordering::Acquire) < routers.len() {
            std::hint::spin_loop();
        }
        let started = Instant::now();
        while !over.load(Ordering::Relaxed) {
            for _ in 0..64 {
                decide(router, &ANY, now);
            }
            decisions += 64;
            if started.elapsed() >= length {
                over.store(true, Ordering::Relaxed);
            }
        }
        decisions as f64 / started.elapsed().as_secs_f64()
    };
    thread::scope(|scope| {
        let running: Vec<_> = routers.iter().map(|router| scope.spawn(|| run(router))).collect();
        running.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).sum()
    })
}

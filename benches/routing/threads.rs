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

/// For each round: decisions per second of one thread, and of two together.
pub fn rounds(workers: usize, rounds: usize, length: Duration) -> Vec<(f64, f64)> {
    let router = fleet::with_workers(Strategy::PeakEwma, workers, Instant::now());
    rate(&router, 2, length);
    (0..rounds).map(|_| (rate(&router, 1, length), rate(&router, 2, length))).collect()
}

fn rate(router: &Arc<Router>, threads: usize, length: Duration) -> f64 {
    let ready = AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    let run = || {
        let now = Instant::now();
        let mut decisions = 0_u64;
        ready.fetch_add(1, Ordering::AcqRel);
        while ready.load(Ordering::Acquire) < threads {
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
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        running.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).sum()
    })
}

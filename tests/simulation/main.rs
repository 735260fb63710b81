//! Random simulations of a fleet: whole controllers over the in-process transport, in paused time.
//!
//! One seed decides everything: the configuration, the workers and what they do when, the callers and how they behave, the
//! operator's hand, and every random choice of the controller. After each simulation everything that was seen is held
//! against what the contract allows; `check`, `judged` and `attempts` say how. A failure names its seed:
//!
//! | variable | what it does |
//! |---|---|
//! | `SIM_SEED=1234` | this one seed, with all that happened in it |
//! | `SIM_SEEDS=0..200000` | these seeds, in place of the usual ones; with `-- --nocapture` it tells how far it is |

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod attempts;
mod caller;
mod check;
mod judged;
mod machine;
mod plan;
mod script;
mod world;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use mlx_serving_router::error::ControllerErrorCode as Code;
use parking_lot::Mutex;

use plan::Plan;
use world::{Outcome, run};

/// Seeds of every run of the tests.
const SEEDS: Range<u64> = 0..10_000;
/// After so many seeds that failed, the rest would say nothing new.
const ENOUGH: usize = 5;

/// So often is told how far it is.
const PROGRESS: u64 = 10_000;

thread_local! {
    /// Panics on this thread: tasks of the controller swallow theirs.
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

fn simulate(seed: u64, traced: bool) -> Outcome {
    let before = PANICS.get();
    // The controller draws its own seeds from here.
    fastrand::seed(seed);
    let mut outcome = run(Plan::new(seed), traced);
    if PANICS.get() != before {
        outcome.complaints.push("something panicked".into());
    }
    outcome
}

fn count_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.set(PANICS.get() + 1);
        before(panic);
    }));
}

fn seeds() -> Range<u64> {
    let number = |text: &str| text.trim().parse().expect("SIM_SEED is a number, SIM_SEEDS are two: 0..10000");
    if let Ok(one) = std::env::var("SIM_SEED") {
        return number(&one)..number(&one) + 1;
    }
    match std::env::var("SIM_SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").expect("SIM_SEEDS are two numbers: 0..10000");
            number(from)..number(to)
        }
        Err(_) => SEEDS,
    }
}

#[test]
fn every_seed_keeps_the_invariants() {
    count_panics();
    let seeds = seeds();
    let one = std::env::var("SIM_SEED").is_ok();
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let (next, failed) = (AtomicU64::new(seeds.start), Mutex::new(Vec::new()));
    let codes = Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || failed.lock().len() >= ENOUGH {
                        return;
                    }
                    let outcome = simulate(seed, one);
                    if one {
                        outcome.trace.iter().for_each(|line| println!("{line}"));
                    }
                    codes.lock().extend(outcome.codes);
                    if !outcome.complaints.is_empty() {
                        println!("seed {seed}: SIM_SEED={seed} cargo test --test simulation every_seed -- --nocapture");
                        outcome.complaints.iter().take(8).for_each(|complaint| println!("    {complaint}"));
                        failed.lock().push(seed);
                    }
                    if seed.is_multiple_of(PROGRESS) {
                        println!("{seed} of {seeds:?}");
                    }
                }
            });
        }
    });
    let failed = failed.into_inner();
    assert!(failed.is_empty(), "seeds failed, see above: {failed:?}");
    if seeds == SEEDS {
        // There is no NATS to lose, and there should be no defect of ours.
        let never = [Code::NatsError, Code::InternalError];
        let all = Code::ALL.into_iter().filter(|code| !never.contains(code)).map(|code| Some(code.as_str())).chain([None]);
        assert_eq!(codes.into_inner(), all.collect(), "every end that there is comes about, and no other");
    }
}

#[test]
fn the_same_seed_happens_the_same() {
    for seed in (0..2_000).step_by(97) {
        let (first, second) = (simulate(seed, true).trace, simulate(seed, true).trace);
        let differs = first.iter().zip(&second).position(|(first, second)| first != second);
        let differs = differs.map(|at| (&first[at], &second[at]));
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(first.len(), second.len(), "seed {seed}");
        assert!(first.len() > 20);
    }
}

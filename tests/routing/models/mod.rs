//! Reference models: each part of the room said again, as plainly as its specification says it, and compared with the
//! program after every event of random histories. A model is written to be read, not to be fast; it knows nothing of how
//! the program does it.
//!
//! `PROPTEST_CASES` sets the number of histories. What the generators reach is counted, and a generator that no longer
//! reaches a state fails its test; `--no-capture` shows the counts.

mod breaker;
mod registry;
mod sessions;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestError, TestRunner};

/// How often histories reached what is worth reaching.
#[derive(Default)]
struct Coverage(RefCell<BTreeMap<String, u64>>);

impl Coverage {
    fn saw(&self, what: impl Into<String>) {
        *self.0.borrow_mut().entry(what.into()).or_default() += 1;
    }

    fn saw_if(&self, condition: bool, what: &str) {
        if condition {
            self.saw(what);
        }
    }
}

/// Runs so many random histories, or as many as `PROPTEST_CASES` says, and fails when one of them does, or when something
/// of `reached` is rarer than once in `every` histories.
fn run<S: Strategy>(
    cases: u32,
    histories: S,
    reached: &[&str],
    every: u32,
    test: impl Fn(S::Value, &Coverage) -> Result<(), TestCaseError>,
) where
    S::Value: Debug,
{
    let asked = std::env::var_os("PROPTEST_CASES").map(|_| ProptestConfig::default().cases);
    let cases = asked.unwrap_or(cases);
    // In a debug build proptest's ordinary generator takes most of the time.
    let rng_algorithm = RngAlgorithm::XorShift;
    let config = ProptestConfig { cases, rng_algorithm, failure_persistence: None, ..ProptestConfig::default() };
    let coverage = Coverage::default();
    match TestRunner::new(config).run(&histories, |history| test(history, &coverage)) {
        Err(TestError::Fail(reason, history)) => panic!("{reason}\n{history:?}"),
        result => result.unwrap(),
    }
    let seen = coverage.0.into_inner();
    seen.iter().for_each(|(what, count)| println!("{count:>9}  {what}"));
    for what in reached {
        let count = seen.get(*what).copied().unwrap_or(0);
        assert!(count >= u64::from(cases / every), "{count} times in {cases} histories: {what}");
    }
}

//! Random histories for tests that compare a program with a model of it, and a count of what they reach: a generator that no
//! longer reaches a state fails its test. `PROPTEST_CASES` sets the number of histories; `--no-capture` shows the counts.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestError, TestRunner};

/// How often histories reached what is worth reaching.
#[derive(Default)]
pub struct Coverage(RefCell<BTreeMap<String, u64>>);

impl Coverage {
    pub fn saw(&self, what: impl Into<String>) {
        self.saw_if(true, what);
    }

    pub fn saw_if(&self, condition: bool, what: impl Into<String>) {
        *self.0.borrow_mut().entry(what.into()).or_default() += u64::from(condition);
    }
}

/// Runs so many random histories, or as many as `PROPTEST_CASES` says, and fails when one of them does, or when something
/// of `reached` is rarer than once in `every` histories.
pub fn run<S: Strategy>(
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

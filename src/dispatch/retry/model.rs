//! The retry policy and its budget against the words of the specification.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use proptest::prelude::*;

use super::*;
use crate::histories::{Coverage, run};

// === the decision ===

#[derive(Clone, Debug)]
struct Failure {
    enabled: bool,
    max_retries: u32,
    on: Vec<ControllerErrorCode>,
    code: ControllerErrorCode,
    retry_after_ms: Option<i64>,
    nobody_listens: bool,
    attempt: u32,
    seed: u64,
}

fn failure() -> impl Strategy<Value = Failure> {
    let code = || prop::sample::select(&ControllerErrorCode::ALL[..]);
    let defaults = Just(RetryConfig::default().retry_on_errors);
    let policy = (prop::bool::weighted(0.9), 0..4_u32, prop_oneof![3 => defaults, 1 => prop::collection::vec(code(), 0..4)]);
    let after = prop_oneof![6 => Just(None), 1 => Just(Some(-1)), 2 => (0..5_000_i64).prop_map(Some)];
    let often = prop::sample::select(RetryConfig::default().retry_on_errors);
    let met = (prop_oneof![3 => often, 1 => code()], after, prop::bool::weighted(0.2), 1..6_u32);
    (policy, met, any::<u64>()).prop_map(|((enabled, max_retries, on), (code, retry_after_ms, nobody_listens, attempt), seed)| {
        Failure { enabled, max_retries, on, code, retry_after_ms, nobody_listens, attempt, seed }
    })
}

fn decides(met: &Failure, seen: &Coverage) -> Result<(), TestCaseError> {
    let config = RetryConfig {
        enabled: met.enabled,
        max_retries: met.max_retries,
        retry_on_errors: met.on.clone(),
        retry_delay_ms: 100,
        max_delay_ms: 350,
        ..RetryConfig::default()
    };
    let mut error = ControllerError::new(met.code, "it failed");
    if let Some(after) = met.retry_after_ms {
        error = error.with("retryAfterMs", after);
    }
    if met.nobody_listens {
        error = error.with("noResponders", true);
    }
    let next = RetryPolicy::new(&config).next(&error, met.attempt, &mut fastrand::Rng::with_seed(met.seed));
    let surfaces = !met.enabled || met.max_retries == 0 || !met.on.contains(&met.code) || met.retry_after_ms == Some(-1);
    if surfaces {
        seen.saw("surfaces");
        prop_assert_eq!(next, Next::Surface);
    } else if met.attempt > met.max_retries {
        seen.saw("exhausted");
        prop_assert_eq!(next, Next::Exhausted);
    } else {
        let longest = [100, 200, 350][met.attempt.min(3) as usize - 1];
        let Next::After(delay) = next else { return Err(TestCaseError::fail(format!("{next:?}"))) };
        let longest = if met.nobody_listens { 0 } else { longest };
        prop_assert!(delay <= Duration::from_millis(longest), "{delay:?}");
        seen.saw(if met.nobody_listens { "at once" } else { "after a while" });
    }
    Ok(())
}

#[test]
fn what_follows_a_failure_is_what_the_contract_says() {
    run(10_000, failure(), &["surfaces", "exhausted", "at once", "after a while"], 50, |met, seen| decides(&met, seen));
}

// === the budget ===

#[derive(Clone, Copy, Debug)]
enum Event {
    Requests { model: usize, count: u32 },
    Take { model: usize, code: ControllerErrorCode },
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let code = prop::sample::select(vec![ControllerErrorCode::WorkerTimeout, ControllerErrorCode::WorkerUnavailable]);
    prop_oneof![
        6 => (0..2_usize, prop_oneof![4 => Just(1), 1 => 2..60_u32])
            .prop_map(|(model, count)| Event::Requests { model, count }),
        12 => (0..2_usize, code).prop_map(|(model, code)| Event::Take { model, code }),
        2 => prop_oneof![0..30_u64, prop::sample::select(vec![99, 100, 101, 899, 900, 999, 1_000, 5_000])].prop_map(Event::Pass),
    ]
}

/// The budget of one model: all that ever happened, and when. Retries cost 1, after timeouts 2.
#[derive(Default)]
struct Budget {
    requests: Vec<Instant>,
    retries: Vec<(Instant, u32)>,
    first: Option<Instant>,
}

impl Budget {
    /// The second is that of ten slices, counted from the first use, the present one among them.
    fn is_recent(&self, at: Instant, now: Instant) -> bool {
        let slice = |at: Instant| (at - self.first.unwrap()).as_millis() / 100;
        slice(now) - slice(at) < 10
    }

    fn request(&mut self, now: Instant) {
        self.first.get_or_insert(now);
        self.requests.push(now);
    }

    /// Retries ≤ `percent` of requests + `floor`, in hundredths.
    fn take(&mut self, cost: u32, percent: u32, floor: u32, now: Instant) -> bool {
        self.first.get_or_insert(now);
        let requests = self.requests.iter().filter(|at| self.is_recent(**at, now)).count() as u32;
        let spent: u32 = self.retries.iter().filter(|(at, _)| self.is_recent(*at, now)).map(|(_, cost)| cost).sum();
        let affordable = 100 * (spent + cost) <= percent * requests + 100 * floor;
        if affordable {
            self.retries.push((now, cost));
        }
        affordable
    }
}

#[test]
fn a_budget_is_what_its_model_says() {
    let histories = (0..=300_u32, 0..4_u32, prop::collection::vec(event(), 1..200));
    run(2_000, histories, &["granted", "refused", "only a timeout is refused"], 50, |(percent, floor, events), seen| {
        let config =
            RetryConfig { budget_percent: f64::from(percent), budget_min_per_second: f64::from(floor), ..RetryConfig::default() };
        let (mut budgets, mut models) = (Budgets::new(&config), [Budget::default(), Budget::default()]);
        let mut now = Instant::now();
        for event in events {
            match event {
                Event::Requests { model, count } => {
                    for _ in 0..count {
                        budgets.request(["a", "b"][model], now);
                        models[model].request(now);
                    }
                }
                Event::Take { model, code } => {
                    let cost = if code == ControllerErrorCode::WorkerTimeout { 2 } else { 1 };
                    let expected = models[model].take(cost, percent, floor, now);
                    prop_assert_eq!(budgets.take(["a", "b"][model], code, now), expected);
                    seen.saw(if expected { "granted" } else { "refused" });
                    if !expected && cost == 2 && models[model].take(1, percent, floor, now) {
                        seen.saw("only a timeout is refused");
                        prop_assert!(budgets.take(["a", "b"][model], ControllerErrorCode::WorkerUnavailable, now));
                    }
                }
                Event::Pass(millis) => now += Duration::from_millis(millis),
            }
        }
        Ok(())
    });
}

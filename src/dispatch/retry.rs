//! Whether another worker is tried after one has failed, and when.
//!
//! Pure: what happened, the clock and the dice come in, a decision comes out. Who that other worker is, and whether there
//! is one, is the routing room's business.

use std::time::Duration;

use foldhash::HashMap;
use tokio::time::Instant;

use crate::config::RetryConfig;
use crate::error::{ControllerError, ControllerErrorCode};

/// When another worker is tried.
#[derive(Debug)]
pub(super) struct RetryPolicy {
    enabled: bool,
    max_retries: u32,
    first_delay: Duration,
    longest_delay: Duration,
    on: Vec<ControllerErrorCode>,
    pub(super) revisit: bool,
}

/// What follows a failed attempt, as far as the policy is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The attempt's own error is the request's.
    Surface,
    /// All retries are used up.
    Exhausted,
    /// Another attempt after so long.
    After(Duration),
}

// === impl RetryPolicy ===

impl RetryPolicy {
    pub(super) fn new(config: &RetryConfig) -> Self {
        Self {
            enabled: config.enabled,
            max_retries: config.max_retries,
            first_delay: Duration::from_millis(config.retry_delay_ms),
            longest_delay: Duration::from_millis(config.max_delay_ms),
            on: config.retry_on_errors.clone(),
            revisit: config.revisit_failed_workers,
        }
    }

    /// Attempts that one request may take.
    pub(super) fn attempts(&self) -> u32 {
        if self.enabled { 1 + self.max_retries } else { 1 }
    }

    /// What follows the failure of attempt number `attempt` (1 for the first). The budget is asked for separately.
    pub(super) fn next(&self, error: &ControllerError, attempt: u32, rng: &mut fastrand::Rng) -> Next {
        let may = self.attempts() > 1 && self.on.contains(&error.code()) && error.retry_after_ms().is_none_or(|after| after >= 0);
        if !may {
            Next::Surface
        } else if attempt >= self.attempts() {
            Next::Exhausted
        } else if nobody_listened(error) {
            Next::After(Duration::ZERO)
        } else {
            Next::After(self.backoff(attempt, rng))
        }
    }

    /// Full jitter: anything from nothing to `retryDelayMs` × 2ⁿ, at most `maxDelayMs` (after "Exponential Backoff And
    /// Jitter", AWS Architecture Blog, 2015).
    fn backoff(&self, attempt: u32, rng: &mut fastrand::Rng) -> Duration {
        let doubled = self.first_delay.saturating_mul(2_u32.saturating_pow(attempt.saturating_sub(1)));
        doubled.min(self.longest_delay).mul_f64(rng.f64())
    }
}

/// Whether the worker cannot have begun with the request.
pub(super) fn nobody_listened(error: &ControllerError) -> bool {
    error.context().get("noResponders") == Some(&serde_json::Value::Bool(true))
}

// === budget ===

/// What retries may cost, for each model: over the last second, a share of its requests and a fixed number.
///
/// In a total outage the fleet sees its requests, that share of them once more, and the fixed number.
#[derive(Debug)]
pub(super) struct Budgets {
    percent: f64,
    floor: f64,
    models: HashMap<Box<str>, Window>,
}

/// Requests and the cost of retries in the last second, in slices of a tenth.
#[derive(Debug, Default)]
struct Window {
    slices: [(u32, f64); SLICES],
    /// The number of the latest slice, counted from the first use.
    latest: u64,
    since: Option<Instant>,
}

const SLICES: usize = 10;
const SLICE: Duration = Duration::from_millis(100);
/// Models with a budget of their own; those beyond share one.
const MODELS_MAX: usize = 1_000;

// === impl Budgets ===

impl Budgets {
    pub(super) fn new(config: &RetryConfig) -> Self {
        Self { percent: config.budget_percent, floor: config.budget_min_per_second, models: HashMap::default() }
    }

    /// A request for a model that is served was sent for the first time.
    pub(super) fn request(&mut self, model: &str, now: Instant) {
        let window = match self.models.get_mut(model) {
            Some(window) => window,
            None => self.window(model),
        };
        window.slice(now).0 += 1;
    }

    /// Whether the cost of one retry after `code` is there.
    pub(super) fn affords(&mut self, model: &str, code: ControllerErrorCode, now: Instant) -> bool {
        self.cost(model, code, now).is_some()
    }

    /// Takes the cost of one retry after `code`; false: it is not there. Timeouts have cost the fleet most, and count twice.
    pub(super) fn take(&mut self, model: &str, code: ControllerErrorCode, now: Instant) -> bool {
        let cost = self.cost(model, code, now);
        if let Some(cost) = cost {
            self.window(model).slice(now).1 += cost;
        }
        cost.is_some()
    }

    /// What a retry costs, where it is there.
    fn cost(&mut self, model: &str, code: ControllerErrorCode, now: Instant) -> Option<f64> {
        let (percent, floor) = (self.percent, self.floor);
        let cost = if code == ControllerErrorCode::WorkerTimeout { 2.0 } else { 1.0 };
        let window = self.window(model);
        window.slice(now);
        let requests: u32 = window.slices.iter().map(|(requests, _)| requests).sum();
        let spent: f64 = window.slices.iter().map(|(_, spent)| spent).sum();
        (spent + cost <= percent * f64::from(requests) / 100.0 + floor).then_some(cost)
    }

    fn window(&mut self, model: &str) -> &mut Window {
        let known = self.models.contains_key(model) || self.models.len() < MODELS_MAX;
        self.models.entry(if known { model.into() } else { "".into() }).or_default()
    }
}

// === impl Window ===

impl Window {
    /// The slice of the present, after forgetting those that are over.
    fn slice(&mut self, now: Instant) -> &mut (u32, f64) {
        let since = *self.since.get_or_insert(now);
        let number = u64::try_from(now.saturating_duration_since(since).as_millis() / SLICE.as_millis()).unwrap_or(u64::MAX);
        if number > self.latest {
            let over = (number - self.latest).min(SLICES as u64);
            for passed in 1..=over {
                self.slices[((self.latest + passed) % SLICES as u64) as usize] = (0, 0.0);
            }
            self.latest = number;
        }
        &mut self.slices[(self.latest % SLICES as u64) as usize]
    }
}

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: ControllerErrorCode) -> ControllerError {
        ControllerError::new(code, "it failed")
    }

    fn policy(change: impl FnOnce(&mut RetryConfig)) -> RetryPolicy {
        let mut config = RetryConfig::default();
        change(&mut config);
        RetryPolicy::new(&config)
    }

    #[test]
    fn what_is_not_to_be_retried_surfaces() {
        let mut rng = fastrand::Rng::with_seed(1);
        let timeout = error(ControllerErrorCode::WorkerTimeout);
        assert_eq!(policy(|retry| retry.enabled = false).next(&timeout, 1, &mut rng), Next::Surface);
        assert_eq!(policy(|retry| retry.max_retries = 0).next(&timeout, 1, &mut rng), Next::Surface);
        let validation = error(ControllerErrorCode::RequestValidationFailed);
        assert_eq!(policy(|_| {}).next(&validation, 1, &mut rng), Next::Surface);
        let never = error(ControllerErrorCode::WorkerOverloaded).with("retryAfterMs", -1);
        assert_eq!(policy(|_| {}).next(&never, 1, &mut rng), Next::Surface);
    }

    #[test]
    fn retries_are_counted() {
        let mut rng = fastrand::Rng::with_seed(1);
        let policy = policy(|retry| retry.max_retries = 2);
        let failure = error(ControllerErrorCode::WorkerUnavailable);
        assert!(matches!(policy.next(&failure, 1, &mut rng), Next::After(_)));
        assert!(matches!(policy.next(&failure, 2, &mut rng), Next::After(_)));
        assert_eq!(policy.next(&failure, 3, &mut rng), Next::Exhausted);
    }

    #[test]
    fn nobody_listening_costs_no_delay() {
        let mut rng = fastrand::Rng::with_seed(1);
        let failure = error(ControllerErrorCode::WorkerUnavailable).with("noResponders", true);
        assert_eq!(policy(|_| {}).next(&failure, 1, &mut rng), Next::After(Duration::ZERO));
    }

    #[test]
    fn delays_double_up_to_the_longest_and_are_spread_over_all_of_it() {
        let policy = policy(|retry| {
            retry.max_retries = 10;
            retry.max_delay_ms = 300;
        });
        let failure = error(ControllerErrorCode::WorkerUnavailable);
        for (attempt, longest) in [(1, 100), (2, 200), (3, 300), (9, 300)] {
            let mut rng = fastrand::Rng::with_seed(7);
            let delays: Vec<u128> = (0..1_000)
                .map(|_| match policy.next(&failure, attempt, &mut rng) {
                    Next::After(delay) => delay.as_millis(),
                    other => panic!("{other:?}"),
                })
                .collect();
            assert!(delays.iter().all(|delay| *delay <= longest));
            assert!(delays.iter().any(|delay| *delay < longest / 10));
            assert!(delays.iter().any(|delay| *delay > longest * 9 / 10));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_budget_is_a_share_of_the_last_second_and_a_floor() {
        let mut budgets = Budgets::new(&RetryConfig { budget_min_per_second: 2.0, ..RetryConfig::default() });
        let take = |budgets: &mut Budgets, code| budgets.take("m", code, Instant::now());
        for _ in 0..10 {
            budgets.request("m", Instant::now());
        }
        // 20 % of 10, and 2: four retries, or two after timeouts.
        assert!(take(&mut budgets, ControllerErrorCode::WorkerTimeout));
        assert!(take(&mut budgets, ControllerErrorCode::WorkerUnavailable));
        assert!(take(&mut budgets, ControllerErrorCode::WorkerUnavailable));
        assert!(!take(&mut budgets, ControllerErrorCode::WorkerUnavailable));
        assert!(budgets.take("other", ControllerErrorCode::WorkerUnavailable, Instant::now()));
        tokio::time::advance(Duration::from_millis(1_100)).await;
        assert!(take(&mut budgets, ControllerErrorCode::WorkerTimeout));
        assert!(!take(&mut budgets, ControllerErrorCode::WorkerUnavailable));
        tokio::time::advance(Duration::from_secs(3_600)).await;
        assert!(take(&mut budgets, ControllerErrorCode::WorkerTimeout));
    }

    #[tokio::test(start_paused = true)]
    async fn a_share_is_taken_exactly() {
        let config = RetryConfig { budget_percent: 29.0, budget_min_per_second: 0.0, ..RetryConfig::default() };
        let mut budgets = Budgets::new(&config);
        (0..100).for_each(|_| budgets.request("m", Instant::now()));
        let granted = (0..100).filter(|_| budgets.take("m", ControllerErrorCode::WorkerUnavailable, Instant::now()));
        assert_eq!(granted.count(), 29);
    }

    #[tokio::test(start_paused = true)]
    async fn models_beyond_a_thousand_share_a_budget() {
        let mut budgets = Budgets::new(&RetryConfig { budget_min_per_second: 1.0, ..RetryConfig::default() });
        let mut take = |model: usize| budgets.take(&model.to_string(), ControllerErrorCode::WorkerUnavailable, Instant::now());
        assert!((0..=MODELS_MAX).all(&mut take));
        assert!((MODELS_MAX..2 * MODELS_MAX).all(|model| !take(model)));
        assert_eq!(budgets.models.len(), MODELS_MAX + 1);
    }
}

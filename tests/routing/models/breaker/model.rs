//! The circuit breaker as its specification says it, as plainly as can be: lists that are counted, no clock, no jitter.

use std::time::Duration;

use mlx_serving_router::error::{BreakerEffect, ControllerErrorCode};
use mlx_serving_router::routing::BreakerReason::{
    ConsecutiveFailures, FailureRate, Forced, ProbeFailed, ProbesSucceeded, Reset, SlowFirstTokens, TimeoutPassed,
};
use mlx_serving_router::routing::CircuitState::{Closed, ForcedOpen, HalfOpen, Open};
use mlx_serving_router::routing::{BreakerReason, BreakerSettings, BreakerStats, CircuitState, Outcome};
use tokio::time::Instant;

/// A transition, as it has to be told.
pub type Told = (CircuitState, CircuitState, BreakerReason);

/// The breaker of one life of one worker.
pub struct Breaker {
    settings: BreakerSettings,
    made: Instant,
    state: CircuitState,
    since: Instant,
    /// When the time to be open is over. Jitter is not the model's: it is told by [`Self::opens_until`].
    until: Option<Instant>,
    epoch: u32,
    by_rate: bool,
    n: u32,
    /// Time spent CLOSED that no step of `n` was taken for.
    calm: Duration,
    /// What ended while it was CLOSED, since it was last closed.
    ends: Vec<End>,
    probes: u32,
    successful_probes: u32,
    seen: BreakerStats,
}

struct End {
    at: Instant,
    failed: bool,
    slow: bool,
}

/// What one request holds of a breaker.
pub struct Permit {
    epoch: u32,
    pub probe: bool,
    pub panic: bool,
    /// Its first token came: of a probe, that was the success.
    token: bool,
    slow: bool,
}

impl Breaker {
    pub fn new(settings: &BreakerSettings, now: Instant) -> Self {
        let seen = BreakerStats {
            state: Closed,
            failure_count: 0,
            success_count: 0,
            consecutive_failures: 0,
            opened_count: 0,
            window_requests: 0,
            window_failures: 0,
            probes: 0,
            last_failure: None,
            last_success: None,
            opened_at: None,
            retry_after: None,
        };
        Self {
            settings: settings.clone(),
            made: now,
            state: Closed,
            since: now,
            until: None,
            epoch: 0,
            by_rate: false,
            n: 0,
            calm: Duration::ZERO,
            ends: Vec::new(),
            probes: 0,
            successful_probes: 0,
            seen,
        }
    }

    /// What anybody may see; reading changes nothing.
    pub fn stats(&self, now: Instant) -> BreakerStats {
        let state = if self.is_due(now) { HalfOpen } else { self.state };
        BreakerStats {
            state,
            window_requests: self.in_window(now, |_| true),
            window_failures: self.in_window(now, |end| end.failed),
            probes: self.probes,
            opened_at: matches!(state, Open | ForcedOpen).then_some(self.since),
            retry_after: self.until.filter(|_| state == Open).map(|until| until - now),
            ..self.seen.clone()
        }
    }

    /// Whether a request may pass in the ordinary way.
    pub fn admits(&self, now: Instant) -> bool {
        match self.state {
            Closed => true,
            Open => self.is_due(now),
            HalfOpen => self.probes < self.settings.half_open_requests,
            _ => false,
        }
    }

    /// Whether panic mode lets a request pass beside the ordinary ones.
    pub fn admits_in_panic(&self) -> bool {
        self.by_rate && matches!(self.state, Open | HalfOpen)
    }

    /// How long somebody who was refused is told to wait.
    pub fn wait(&self, now: Instant) -> Duration {
        match self.state {
            Open => self.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now)),
            HalfOpen => Duration::ZERO,
            _ => self.settings.open_for,
        }
    }

    /// A request passes.
    pub fn acquire(&mut self, now: Instant, told: &mut Vec<Told>) -> Permit {
        let panic = !self.admits(now);
        if !panic {
            self.tick(now, told);
        }
        let probe = !panic && self.state == HalfOpen;
        self.probes += u32::from(probe);
        Permit { epoch: self.epoch, probe, panic, token: false, slow: false }
    }

    /// Time alone makes it half-open.
    pub fn tick(&mut self, now: Instant, told: &mut Vec<Told>) {
        if self.is_due(now) {
            self.go(HalfOpen, TimeoutPassed, now, told);
        }
    }

    pub fn first_token(&mut self, permit: &mut Permit, ttft: Duration, now: Instant, told: &mut Vec<Told>) {
        if permit.token {
            return;
        }
        permit.token = true;
        permit.slow = self.settings.slow_first_token.is_some_and(|limit| ttft > limit);
        if permit.epoch == self.epoch && permit.probe {
            self.probes -= 1;
            self.success(now, told);
        }
    }

    /// The request ended without a word about the worker.
    pub fn release(&mut self, permit: &Permit) {
        if permit.epoch == self.epoch && permit.probe && !permit.token {
            self.probes -= 1;
        }
    }

    pub fn end(&mut self, permit: &Permit, outcome: Outcome, now: Instant, told: &mut Vec<Told>) {
        self.release(permit);
        let effect = match outcome {
            Outcome::Success => None,
            Outcome::Ignored => Some(BreakerEffect::Ignored),
            Outcome::Failure(code) => Some(effect(code)),
        };
        if permit.epoch != self.epoch || permit.panic || effect == Some(BreakerEffect::Ignored) {
            return;
        }
        match (self.state, effect) {
            (HalfOpen, None) if !permit.token => self.success(now, told),
            (HalfOpen, Some(BreakerEffect::Failure)) => {
                self.failure(now);
                let most = (0..).find(|n| self.settings.open_for * 2_u32.pow(*n) >= self.settings.open_for_max);
                self.n = most.unwrap().min(self.n + 1);
                self.open(ProbeFailed, now, told);
            }
            (Closed, effect) => {
                match effect {
                    None => self.success(now, told),
                    Some(BreakerEffect::Failure) => self.failure(now),
                    Some(_) => {}
                }
                self.ends.push(End { at: now, failed: effect.is_some(), slow: permit.slow });
                if let Some(reason) = self.signal(now) {
                    self.by_rate = reason == FailureRate;
                    self.calm += now - self.since;
                    while self.calm >= self.settings.open_for {
                        self.calm -= self.settings.open_for;
                        self.n = self.n.saturating_sub(1);
                    }
                    self.open(reason, now, told);
                }
            }
            _ => {}
        }
    }

    pub fn force_open(&mut self, now: Instant, told: &mut Vec<Told>) {
        if self.state != ForcedOpen {
            self.go(ForcedOpen, Forced, now, told);
        }
    }

    /// As new, but what began before does not count.
    pub fn reset(&mut self, now: Instant, told: &mut Vec<Told>) {
        if self.state != Closed {
            told.push((self.state, Closed, Reset));
        }
        let epoch = self.epoch + 1;
        *self = Self { epoch, ..Self::new(&self.settings, now) };
    }

    /// How long it is to be open before jitter, when it has just opened and its end is not known.
    pub fn just_opened(&self) -> Option<Duration> {
        let doubled = self.settings.open_for * 2_u32.pow(self.n);
        (self.state == Open && self.until.is_none()).then_some(doubled.min(self.settings.open_for_max))
    }

    pub fn opens_until(&mut self, until: Instant) {
        self.until = Some(until);
    }

    fn is_due(&self, now: Instant) -> bool {
        self.state == Open && self.until.is_some_and(|until| now >= until)
    }

    /// The window is made of ten buckets: an end counts while its bucket is one of the last ten.
    fn in_window(&self, now: Instant, which: impl Fn(&End) -> bool) -> u32 {
        let bucket = |at: Instant| (at - self.made).as_nanos() / (self.settings.window / 10).as_nanos();
        self.ends.iter().filter(|end| bucket(now) - bucket(end.at) < 10 && which(end)).count() as u32
    }

    fn signal(&self, now: Instant) -> Option<BreakerReason> {
        let all = self.in_window(now, |_| true);
        let percent = (100.0 * self.settings.failure_rate).round() as u32;
        let is_too_much = |part| all >= self.settings.minimum_requests && 100 * part >= percent * all;
        let slow = self.settings.slow_first_token.is_some() && is_too_much(self.in_window(now, |end| end.slow));
        let rate = is_too_much(self.in_window(now, |end| end.failed));
        let row = self.seen.consecutive_failures >= self.settings.failure_threshold;
        [(row, ConsecutiveFailures), (rate, FailureRate), (slow, SlowFirstTokens)]
            .into_iter()
            .find_map(|(is, why)| is.then_some(why))
    }

    fn success(&mut self, now: Instant, told: &mut Vec<Told>) {
        self.seen.success_count += 1;
        self.seen.consecutive_failures = 0;
        self.seen.last_success = Some(now);
        self.successful_probes += u32::from(self.state == HalfOpen);
        if self.state == HalfOpen && self.successful_probes == self.settings.success_threshold {
            self.go(Closed, ProbesSucceeded, now, told);
            self.ends.clear();
        }
    }

    fn failure(&mut self, now: Instant) {
        self.seen.failure_count += 1;
        self.seen.consecutive_failures += 1;
        self.seen.last_failure = Some(now);
    }

    fn open(&mut self, reason: BreakerReason, now: Instant, told: &mut Vec<Told>) {
        self.seen.opened_count += 1;
        self.until = None;
        self.go(Open, reason, now, told);
    }

    fn go(&mut self, to: CircuitState, reason: BreakerReason, now: Instant, told: &mut Vec<Told>) {
        told.push((self.state, to, reason));
        self.state = to;
        self.since = now;
        self.epoch += 1;
        self.probes = 0;
        self.successful_probes = 0;
    }
}

/// The column "counts against the breaker" of the contract's table of errors.
pub fn effect(code: ControllerErrorCode) -> BreakerEffect {
    use ControllerErrorCode::{StreamInterrupted, WorkerOffline, WorkerOverloaded, WorkerTimeout, WorkerUnavailable};
    match code {
        WorkerOffline | WorkerUnavailable | WorkerTimeout | StreamInterrupted => BreakerEffect::Failure,
        WorkerOverloaded => BreakerEffect::RateOnly,
        _ => BreakerEffect::Ignored,
    }
}

//! The state behind a breaker's lock. Every transition goes through [`Core::go`], but for the operator's reset.

use std::time::Duration;

use tokio::time::Instant;

use super::window::{Tally, Window};
use super::{BreakerReason, BreakerStats, CircuitState};
use crate::error::BreakerEffect;
use crate::routing::dice::Dice;
use crate::routing::settings::BreakerSettings;

/// A transition that was just made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::routing) struct Transition {
    pub(in crate::routing) from: CircuitState,
    pub(in crate::routing) to: CircuitState,
    pub(in crate::routing) reason: BreakerReason,
}

/// A request's leave to reach the worker.
#[derive(Debug)]
pub(in crate::routing) struct Permit {
    epoch: u64,
    /// It holds one of the places for probes.
    pub(super) probe: bool,
    /// Its success has been counted, at its first token.
    counted: bool,
    /// Its first token was slow.
    pub(super) slow: bool,
    /// Panic mode let it through: its end says nothing.
    panic: bool,
}

/// How a request ended, as far as a breaker cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::routing) enum Verdict {
    Success,
    Effect(BreakerEffect),
}

/// In this order: what every report reads and writes lies together.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Core {
    state: CircuitState,
    consecutive_failures: u32,
    epoch: u64,
    success_count: u64,
    last_success: Option<Instant>,
    window: Window,
    since: Instant,
    /// When an OPEN one becomes HALF_OPEN.
    until: Instant,
    /// The failure rate took it out of CLOSED.
    by_rate: bool,
    /// The exponent n of the time to be open.
    backoff: u32,
    /// Time spent CLOSED that has not lowered `backoff` yet.
    calm: Duration,
    probes: u32,
    probe_successes: u32,
    failure_count: u64,
    opened_count: u64,
    last_failure: Option<Instant>,
}

/// The jitter of the time to be open, as a share of it.
const JITTER: f64 = 0.2;

// === impl Core ===

impl Core {
    pub(super) fn new(settings: &BreakerSettings, epoch: u64, now: Instant) -> Self {
        Self {
            state: CircuitState::Closed,
            epoch,
            since: now,
            until: now,
            by_rate: false,
            backoff: 0,
            calm: Duration::ZERO,
            probes: 0,
            probe_successes: 0,
            consecutive_failures: 0,
            window: Window::new(settings.window, now),
            failure_count: 0,
            success_count: 0,
            opened_count: 0,
            last_failure: None,
            last_success: None,
        }
    }

    /// The epoch and the state in one number.
    pub(super) fn gate(&self) -> u64 {
        self.epoch << 3 | self.state as u64
    }

    /// The epoch in a [`Self::gate`], if the state there is CLOSED.
    pub(super) fn closed_epoch(gate: u64) -> Option<u64> {
        (gate & 7 == CircuitState::Closed as u64).then_some(gate >> 3)
    }

    pub(super) fn state_at(&self, now: Instant) -> CircuitState {
        match self.state {
            CircuitState::Open if now >= self.until => CircuitState::HalfOpen,
            state => state,
        }
    }

    pub(super) fn opened_by_rate(&self) -> bool {
        self.by_rate && matches!(self.state, CircuitState::Open | CircuitState::HalfOpen)
    }

    pub(super) fn admits(&self, settings: &BreakerSettings, panic: bool, now: Instant) -> bool {
        let regularly = match self.state {
            CircuitState::Closed => true,
            CircuitState::Open => now >= self.until,
            CircuitState::HalfOpen => self.probes < settings.half_open_requests,
            CircuitState::ForcedOpen | CircuitState::Disabled => false,
        };
        regularly || panic && self.opened_by_rate()
    }

    /// Whether nothing is let through, an OPEN one whose time may be up included.
    pub(super) fn is_shut(&self, settings: &BreakerSettings) -> bool {
        match self.state {
            CircuitState::Closed => false,
            CircuitState::HalfOpen => self.probes >= settings.half_open_requests,
            CircuitState::Open | CircuitState::ForcedOpen | CircuitState::Disabled => true,
        }
    }

    /// When an OPEN one lets a probe through.
    pub(super) fn open_until(&self) -> Option<Instant> {
        (self.state == CircuitState::Open).then_some(self.until)
    }

    pub(super) fn acquire(
        &mut self,
        settings: &BreakerSettings,
        panic: bool,
        now: Instant,
    ) -> Option<(Permit, Option<Transition>)> {
        if !self.admits(settings, false, now) {
            let panic = self.admits(settings, panic, now);
            return panic.then_some((Permit { panic, ..Permit::closed(self.epoch) }, None));
        }
        let transition = self.tick(now);
        let probe = self.state == CircuitState::HalfOpen;
        self.probes += u32::from(probe);
        Some((Permit { probe, ..Permit::closed(self.epoch) }, transition))
    }

    pub(super) fn retry_after(&self, now: Instant) -> Option<Duration> {
        match self.state {
            CircuitState::Open => Some(self.until.saturating_duration_since(now)),
            CircuitState::HalfOpen => Some(Duration::ZERO),
            CircuitState::Closed | CircuitState::ForcedOpen | CircuitState::Disabled => None,
        }
    }

    pub(super) fn tick(&mut self, now: Instant) -> Option<Transition> {
        (self.state == CircuitState::Open && now >= self.until)
            .then(|| self.go(CircuitState::HalfOpen, BreakerReason::TimeoutPassed, now))
    }

    pub(super) fn release(&mut self, permit: &mut Permit) {
        if std::mem::take(&mut permit.probe) && permit.epoch == self.epoch {
            self.probes -= 1;
        }
    }

    pub(super) fn first_token(&mut self, settings: &BreakerSettings, permit: &mut Permit, now: Instant) -> Option<Transition> {
        self.release(permit);
        if permit.epoch != self.epoch {
            return None;
        }
        permit.counted = true;
        self.probe_succeeded(settings, now)
    }

    pub(super) fn report(
        &mut self,
        settings: &BreakerSettings,
        mut permit: Permit,
        verdict: Verdict,
        dice: &Dice,
        now: Instant,
    ) -> Option<Transition> {
        self.release(&mut permit);
        if permit.epoch != self.epoch || permit.panic {
            return None;
        }
        match self.state {
            CircuitState::Closed => self.report_closed(settings, &permit, verdict, dice, now),
            CircuitState::HalfOpen => self.report_probe(settings, &permit, verdict, dice, now),
            CircuitState::Open | CircuitState::ForcedOpen | CircuitState::Disabled => None,
        }
    }

    pub(super) fn force_open(&mut self, now: Instant) -> Option<Transition> {
        (self.state != CircuitState::ForcedOpen).then(|| self.go(CircuitState::ForcedOpen, BreakerReason::Forced, now))
    }

    pub(super) fn reset(&mut self, settings: &BreakerSettings, now: Instant) -> Option<Transition> {
        let from = self.state;
        *self = Self::new(settings, self.epoch + 1, now);
        (from != CircuitState::Closed).then_some(Transition { from, to: self.state, reason: BreakerReason::Reset })
    }

    pub(super) fn stats(&self, now: Instant) -> BreakerStats {
        let state = self.state_at(now);
        let window = self.window.tally(now);
        BreakerStats {
            state,
            failure_count: self.failure_count,
            success_count: self.success_count,
            consecutive_failures: self.consecutive_failures,
            opened_count: self.opened_count,
            window_requests: window.requests,
            window_failures: window.failures,
            probes: self.probes,
            last_failure: self.last_failure,
            last_success: self.last_success,
            opened_at: matches!(state, CircuitState::Open | CircuitState::ForcedOpen).then_some(self.since),
            retry_after: self.retry_after(now).filter(|_| state == CircuitState::Open),
        }
    }

    fn report_closed(
        &mut self,
        settings: &BreakerSettings,
        permit: &Permit,
        verdict: Verdict,
        dice: &Dice,
        now: Instant,
    ) -> Option<Transition> {
        let failed = match verdict {
            Verdict::Effect(BreakerEffect::Ignored) => return None,
            Verdict::Effect(BreakerEffect::RateOnly) => true,
            Verdict::Effect(BreakerEffect::Failure) => {
                self.count_failure(now);
                true
            }
            Verdict::Success => {
                self.count_success(now);
                false
            }
        };
        let end = Tally { requests: 1, failures: u32::from(failed), slow: u32::from(permit.slow) };
        let window = self.window.add(end, now);
        let share_opens = |part: u32| {
            window.requests >= settings.minimum_requests && f64::from(part) / f64::from(window.requests) >= settings.failure_rate
        };
        let reason = if self.consecutive_failures >= settings.failure_threshold {
            BreakerReason::ConsecutiveFailures
        } else if share_opens(window.failures) {
            BreakerReason::FailureRate
        } else if settings.slow_first_token.is_some() && share_opens(window.slow) {
            BreakerReason::SlowFirstTokens
        } else {
            return None;
        };
        self.calm += now.saturating_duration_since(self.since);
        self.by_rate = reason == BreakerReason::FailureRate;
        let steps = self.calm.as_nanos() / settings.open_for.as_nanos().max(1);
        self.backoff = self.backoff.saturating_sub(u32::try_from(steps).unwrap_or(u32::MAX));
        self.calm = Duration::from_nanos((self.calm.as_nanos() % settings.open_for.as_nanos().max(1)) as u64);
        Some(self.open(settings, reason, dice, now))
    }

    fn report_probe(
        &mut self,
        settings: &BreakerSettings,
        permit: &Permit,
        verdict: Verdict,
        dice: &Dice,
        now: Instant,
    ) -> Option<Transition> {
        match verdict {
            Verdict::Effect(BreakerEffect::Ignored | BreakerEffect::RateOnly) => None,
            Verdict::Success if permit.counted => None,
            Verdict::Success => self.probe_succeeded(settings, now),
            Verdict::Effect(BreakerEffect::Failure) => {
                self.count_failure(now);
                self.backoff += u32::from(self.open_for(settings) < settings.open_for_max);
                Some(self.open(settings, BreakerReason::ProbeFailed, dice, now))
            }
        }
    }

    fn probe_succeeded(&mut self, settings: &BreakerSettings, now: Instant) -> Option<Transition> {
        self.count_success(now);
        self.probe_successes += 1;
        (self.probe_successes >= settings.success_threshold)
            .then(|| self.go(CircuitState::Closed, BreakerReason::ProbesSucceeded, now))
    }

    fn count_success(&mut self, now: Instant) {
        self.success_count += 1;
        self.consecutive_failures = 0;
        self.last_success = Some(now);
    }

    fn count_failure(&mut self, now: Instant) {
        self.failure_count += 1;
        self.consecutive_failures = self.consecutive_failures.saturating_add(1);
        self.last_failure = Some(now);
    }

    /// How long it is to be open, before jitter.
    fn open_for(&self, settings: &BreakerSettings) -> Duration {
        let factor = 1_u32.checked_shl(self.backoff).unwrap_or(u32::MAX);
        settings.open_for.saturating_mul(factor).min(settings.open_for_max)
    }

    fn open(&mut self, settings: &BreakerSettings, reason: BreakerReason, dice: &Dice, now: Instant) -> Transition {
        let jitter = 1.0 + JITTER * (2.0 * dice.roll().f64() - 1.0);
        self.until = now + self.open_for(settings).mul_f64(jitter).min(settings.open_for_max);
        self.opened_count += 1;
        self.go(CircuitState::Open, reason, now)
    }

    fn go(&mut self, to: CircuitState, reason: BreakerReason, now: Instant) -> Transition {
        let from = std::mem::replace(&mut self.state, to);
        self.epoch += 1;
        self.since = now;
        self.probes = 0;
        self.probe_successes = 0;
        if to == CircuitState::Closed {
            self.consecutive_failures = 0;
            self.window.clear();
        }
        Transition { from, to, reason }
    }
}

// === impl Permit ===

impl Permit {
    /// For a request that a CLOSED breaker let through.
    pub(super) const fn closed(epoch: u64) -> Self {
        Self { epoch, probe: false, counted: false, slow: false, panic: false }
    }

    /// Whether it holds a place that others wait for.
    pub(in crate::routing) fn is_probe(&self) -> bool {
        self.probe
    }
}

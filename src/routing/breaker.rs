//! The circuit breaker of one worker: CLOSED → OPEN → HALF_OPEN → CLOSED, and the operator's FORCED_OPEN.
//!
//! | from | to | when |
//! |---|---|---|
//! | CLOSED | OPEN | `failure_threshold` consecutive failures, or too large a share of failures, or of slow first tokens, in the window |
//! | OPEN | HALF_OPEN | `open_for × 2ⁿ`, at most `open_for_max`, ± 20 %, have passed; n grows by one with each failed probe and falls by one for each `open_for` spent CLOSED |
//! | HALF_OPEN | CLOSED | `success_threshold` probes succeeded |
//! | HALF_OPEN | OPEN | a probe failed |
//!
//! Every request holds a [`Permit`] with the epoch of its beginning; each transition begins an epoch, and the result of an
//! earlier one changes nothing. In HALF_OPEN a permit is one of `half_open_requests` places and comes back on any end.
//! Reading never changes the state: an OPEN breaker whose time is up reads as HALF_OPEN, and the transition is told when
//! the first probe takes it, or by [`Breaker::tick`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::Instant;

use super::dice::Dice;
use super::settings::BreakerSettings;
use super::window::{Tally, Window};
use crate::error::BreakerEffect;

/// The state of a breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum CircuitState {
    /// Requests pass.
    Closed,
    /// The worker is left alone for a while.
    Open,
    /// Probes pass, few at a time.
    HalfOpen,
    /// An operator keeps the worker out.
    ForcedOpen,
    /// There are no breakers.
    Disabled,
}

/// Why a breaker changed its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerReason {
    /// So many failures in a row.
    ConsecutiveFailures,
    /// So large a share of failures.
    FailureRate,
    /// So large a share of slow first tokens.
    SlowFirstTokens,
    /// The time to be open is over.
    TimeoutPassed,
    /// A probe failed.
    ProbeFailed,
    /// Enough probes succeeded.
    ProbesSucceeded,
    /// An operator opened it.
    Forced,
    /// An operator reset it.
    Reset,
}

/// What a breaker has seen. Counts are since the last reset; times are of the injected clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BreakerStats {
    /// The state.
    pub state: CircuitState,
    /// Failures that counted.
    pub failure_count: u64,
    /// Successes that counted.
    pub success_count: u64,
    /// Failures since the last success.
    pub consecutive_failures: u32,
    /// How often it went to OPEN.
    pub opened_count: u64,
    /// Requests in the window.
    pub window_requests: u32,
    /// Failures in the window, refusals for want of room among them.
    pub window_failures: u32,
    /// Probes on their way.
    pub probes: u32,
    /// The latest failure.
    pub last_failure: Option<Instant>,
    /// The latest success.
    pub last_success: Option<Instant>,
    /// Since when it has been open, or forced open; `None` in the other states.
    pub opened_at: Option<Instant>,
    /// How long it stays open.
    pub retry_after: Option<Duration>,
}

/// A transition that was just made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Transition {
    pub(super) from: CircuitState,
    pub(super) to: CircuitState,
    pub(super) reason: BreakerReason,
}

/// A request's leave to reach the worker.
#[derive(Debug)]
pub(super) struct Permit {
    epoch: u64,
    /// It holds one of the places for probes.
    probe: bool,
    /// Its success has been counted, at its first token.
    counted: bool,
    /// Its first token was slow.
    slow: bool,
}

/// How a request ended, as far as a breaker cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Success,
    Effect(BreakerEffect),
}

#[derive(Debug)]
pub(super) struct Breaker {
    /// `epoch << 3 | state`, written under the lock: a CLOSED breaker admits without taking it.
    gate: AtomicU64,
    core: Mutex<Core>,
}

#[derive(Debug)]
struct Core {
    state: CircuitState,
    epoch: u64,
    since: Instant,
    /// When an OPEN one becomes HALF_OPEN.
    until: Instant,
    /// The exponent n of the time to be open.
    backoff: u32,
    /// Time spent CLOSED that has not lowered `backoff` yet.
    calm: Duration,
    probes: u32,
    probe_successes: u32,
    consecutive_failures: u32,
    window: Window,
    failure_count: u64,
    success_count: u64,
    opened_count: u64,
    last_failure: Option<Instant>,
    last_success: Option<Instant>,
}

/// The jitter of the time to be open, as a share of it.
const JITTER: f64 = 0.2;

// === impl Breaker ===

impl Breaker {
    pub(super) fn new(settings: &BreakerSettings, now: Instant) -> Self {
        let core = Core::new(settings, 0, now);
        Self { gate: AtomicU64::new(core.gate()), core: Mutex::new(core) }
    }

    /// Whether a request would be let through.
    pub(super) fn admits(&self, settings: &BreakerSettings, now: Instant) -> bool {
        match self.closed_epoch() {
            Some(_) => true,
            None => self.core.lock().admits(settings, now),
        }
    }

    /// Lets a request through, or not.
    pub(super) fn acquire(&self, settings: &BreakerSettings, now: Instant) -> Option<(Permit, Option<Transition>)> {
        if let Some(epoch) = self.closed_epoch() {
            return Some((Permit::new(epoch, false), None));
        }
        let mut core = self.core.lock();
        if !core.admits(settings, now) {
            return None;
        }
        let transition = core.tick(now);
        let probe = core.state == CircuitState::HalfOpen;
        core.probes += u32::from(probe);
        self.publish(&core);
        Some((Permit::new(core.epoch, probe), transition))
    }

    /// The first token came. For a probe that is its success, and its place is free again.
    pub(super) fn first_token(
        &self,
        settings: &BreakerSettings,
        permit: &mut Permit,
        ttft: Duration,
        now: Instant,
    ) -> Option<Transition> {
        permit.slow = settings.slow_first_token.is_some_and(|limit| ttft > limit);
        if !permit.probe {
            return None;
        }
        let mut core = self.core.lock();
        let transition = core.first_token(settings, permit, now);
        self.publish(&core);
        transition
    }

    /// The request ended.
    pub(super) fn report(
        &self,
        settings: &BreakerSettings,
        mut permit: Permit,
        verdict: Verdict,
        dice: &Dice,
        now: Instant,
    ) -> Option<Transition> {
        let mut core = self.core.lock();
        if permit.epoch != core.epoch {
            return None;
        }
        core.release(&mut permit);
        let transition = match core.state {
            CircuitState::Closed => core.report_closed(settings, &permit, verdict, dice, now),
            CircuitState::HalfOpen => core.report_probe(settings, &permit, verdict, dice, now),
            CircuitState::Open | CircuitState::ForcedOpen | CircuitState::Disabled => None,
        };
        self.publish(&core);
        transition
    }

    /// The request ended, and its end says nothing about the worker.
    pub(super) fn release(&self, permit: &mut Permit) {
        if permit.probe {
            self.core.lock().release(permit);
        }
    }

    /// Makes the transition that is due by the clock alone.
    pub(super) fn tick(&self, now: Instant) -> Option<Transition> {
        self.closed_epoch().is_none().then(|| {
            let mut core = self.core.lock();
            let transition = core.tick(now);
            self.publish(&core);
            transition
        })?
    }

    /// Opens it until it is reset.
    pub(super) fn force_open(&self, now: Instant) -> Option<Transition> {
        let mut core = self.core.lock();
        let transition =
            (core.state != CircuitState::ForcedOpen).then(|| core.go(CircuitState::ForcedOpen, BreakerReason::Forced, now));
        self.publish(&core);
        transition
    }

    /// Makes it as new. What began before does not count.
    pub(super) fn reset(&self, settings: &BreakerSettings, now: Instant) -> Option<Transition> {
        let mut core = self.core.lock();
        let from = core.state;
        *core = Core::new(settings, core.epoch + 1, now);
        self.publish(&core);
        (from != CircuitState::Closed).then_some(Transition { from, to: CircuitState::Closed, reason: BreakerReason::Reset })
    }

    pub(super) fn state(&self, now: Instant) -> CircuitState {
        match self.closed_epoch() {
            Some(_) => CircuitState::Closed,
            None => self.core.lock().state_at(now),
        }
    }

    /// How long it stays open; zero while half-open, `None` while forced open or closed.
    pub(super) fn retry_after(&self, now: Instant) -> Option<Duration> {
        self.core.lock().retry_after(now)
    }

    pub(super) fn stats(&self, now: Instant) -> BreakerStats {
        let core = self.core.lock();
        let state = core.state_at(now);
        let window = core.window.tally(now);
        BreakerStats {
            state,
            failure_count: core.failure_count,
            success_count: core.success_count,
            consecutive_failures: core.consecutive_failures,
            opened_count: core.opened_count,
            window_requests: window.requests,
            window_failures: window.failures,
            probes: core.probes,
            last_failure: core.last_failure,
            last_success: core.last_success,
            opened_at: matches!(state, CircuitState::Open | CircuitState::ForcedOpen).then_some(core.since),
            retry_after: core.retry_after(now).filter(|_| state == CircuitState::Open),
        }
    }

    fn closed_epoch(&self) -> Option<u64> {
        let gate = self.gate.load(Ordering::Acquire);
        (gate & 7 == CircuitState::Closed as u64).then_some(gate >> 3)
    }

    fn publish(&self, core: &Core) {
        self.gate.store(core.gate(), Ordering::Release);
    }
}

// === impl Core ===

impl Core {
    fn new(settings: &BreakerSettings, epoch: u64, now: Instant) -> Self {
        Self {
            state: CircuitState::Closed,
            epoch,
            since: now,
            until: now,
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

    fn gate(&self) -> u64 {
        self.epoch << 3 | self.state as u64
    }

    fn state_at(&self, now: Instant) -> CircuitState {
        match self.state {
            CircuitState::Open if now >= self.until => CircuitState::HalfOpen,
            state => state,
        }
    }

    fn admits(&self, settings: &BreakerSettings, now: Instant) -> bool {
        match self.state {
            CircuitState::Closed => true,
            CircuitState::Open => now >= self.until,
            CircuitState::HalfOpen => self.probes < settings.half_open_requests,
            CircuitState::ForcedOpen | CircuitState::Disabled => false,
        }
    }

    fn retry_after(&self, now: Instant) -> Option<Duration> {
        match self.state {
            CircuitState::Open => Some(self.until.saturating_duration_since(now)),
            CircuitState::HalfOpen => Some(Duration::ZERO),
            CircuitState::Closed | CircuitState::ForcedOpen | CircuitState::Disabled => None,
        }
    }

    fn tick(&mut self, now: Instant) -> Option<Transition> {
        (self.state == CircuitState::Open && now >= self.until)
            .then(|| self.go(CircuitState::HalfOpen, BreakerReason::TimeoutPassed, now))
    }

    fn release(&mut self, permit: &mut Permit) {
        if std::mem::take(&mut permit.probe) && permit.epoch == self.epoch {
            self.probes -= 1;
        }
    }

    fn first_token(&mut self, settings: &BreakerSettings, permit: &mut Permit, now: Instant) -> Option<Transition> {
        self.release(permit);
        if permit.epoch != self.epoch {
            return None;
        }
        permit.counted = true;
        self.probe_succeeded(settings, now)
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
            window.requests >= settings.minimum_requests && f64::from(part) >= settings.failure_rate * f64::from(window.requests)
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
                self.backoff = self.backoff.saturating_add(1);
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

    fn open(&mut self, settings: &BreakerSettings, reason: BreakerReason, dice: &Dice, now: Instant) -> Transition {
        let factor = 1_u32.checked_shl(self.backoff).unwrap_or(u32::MAX);
        let length = settings.open_for.saturating_mul(factor).min(settings.open_for_max);
        let jitter = 1.0 + JITTER * (2.0 * dice.roll().f64() - 1.0);
        self.until = now + length.mul_f64(jitter);
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
    const fn new(epoch: u64, probe: bool) -> Self {
        Self { epoch, probe, counted: false, slow: false }
    }
}

// === impl CircuitState ===

impl CircuitState {
    /// The state as it is written everywhere: `HALF_OPEN`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "CLOSED",
            Self::Open => "OPEN",
            Self::HalfOpen => "HALF_OPEN",
            Self::ForcedOpen => "FORCED_OPEN",
            Self::Disabled => "DISABLED",
        }
    }
}

// === impl BreakerReason ===

impl BreakerReason {
    /// The reason as it is written in logs and events: `consecutive_failures`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ConsecutiveFailures => "consecutive_failures",
            Self::FailureRate => "failure_rate",
            Self::SlowFirstTokens => "slow_first_tokens",
            Self::TimeoutPassed => "timeout_passed",
            Self::ProbeFailed => "probe_failed",
            Self::ProbesSucceeded => "probes_succeeded",
            Self::Forced => "forced",
            Self::Reset => "reset",
        }
    }
}

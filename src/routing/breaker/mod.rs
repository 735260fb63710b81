//! The circuit breaker of one worker: CLOSED → OPEN → HALF_OPEN → CLOSED, and the operator's FORCED_OPEN.
//!
//! | from | to | when |
//! |---|---|---|
//! | CLOSED | OPEN | `failure_threshold` consecutive failures, or too large a share of failures, or of slow first tokens, in the window |
//! | OPEN | HALF_OPEN | `open_for × 2ⁿ`, at most `open_for_max`, ± 20 %, have passed; n grows by one with each failed probe until that makes no difference, and falls by one for each `open_for` spent CLOSED |
//! | HALF_OPEN | CLOSED | `success_threshold` probes succeeded |
//! | HALF_OPEN | OPEN | a probe failed |
//!
//! Every request holds a [`Permit`] with the epoch of its beginning; each transition begins an epoch, and the result of an
//! earlier one changes nothing. In HALF_OPEN a permit is one of `half_open_requests` places and comes back on any end.
//! Reading never changes the state: an OPEN breaker whose time is up reads as HALF_OPEN, and the transition is told when
//! the first probe takes it, or by [`Breaker::tick`].
//!
//! Panic mode is the caller's word that too few of a model's workers are admitted: then a breaker that the failure rate
//! opened lets requests pass beside its probes, and what becomes of them says nothing.

mod core;
mod window;

use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use self::core::Core;
pub(super) use self::core::{Permit, Transition, Verdict};
use super::dice::Dice;
use super::ledger::{Account, Entry};
use super::settings::BreakerSettings;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};

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

#[derive(Debug)]
#[repr(C)]
pub(super) struct Breaker {
    /// What [`Core::gate`] says, written under the lock: a CLOSED breaker admits without taking it.
    gate: AtomicU64,
    core: Mutex<Core>,
    /// Marked, under the lock, where nothing is let through.
    account: Account,
}

// === impl Breaker ===

impl Breaker {
    pub(super) fn new(settings: &BreakerSettings, account: Account, now: Instant) -> Self {
        let core = Core::new(settings, 0, now);
        Self { gate: AtomicU64::new(core.gate()), account, core: Mutex::new(core) }
    }

    /// Whether a request would be let through.
    pub(super) fn admits(&self, settings: &BreakerSettings, panic: bool, now: Instant) -> bool {
        self.closed_epoch().is_some() || self.core.lock().admits(settings, panic, now)
    }

    /// Lets a request through, or not.
    pub(super) fn acquire(&self, settings: &BreakerSettings, panic: bool, now: Instant) -> Option<(Permit, Option<Transition>)> {
        match self.closed_epoch() {
            Some(epoch) => Some((Permit::closed(epoch), None)),
            None => self.change(settings, |core| core.acquire(settings, panic, now)),
        }
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
        if permit.probe { self.change(settings, |core| core.first_token(settings, permit, now)) } else { None }
    }

    /// The request ended.
    pub(super) fn report(
        &self,
        settings: &BreakerSettings,
        permit: Permit,
        verdict: Verdict,
        dice: &Dice,
        now: Instant,
    ) -> Option<Transition> {
        self.change(settings, |core| core.report(settings, permit, verdict, dice, now))
    }

    /// The request ended, and its end says nothing about the worker.
    pub(super) fn release(&self, settings: &BreakerSettings, permit: &mut Permit) {
        if permit.probe {
            self.change(settings, |core| core.release(permit));
        }
    }

    /// Makes the transition that is due by the clock alone.
    pub(super) fn tick(&self, settings: &BreakerSettings, now: Instant) -> Option<Transition> {
        if self.closed_epoch().is_some() { None } else { self.change(settings, |core| core.tick(now)) }
    }

    /// Sets right what the clock alone changes in the worker's account. The state stays as it is.
    pub(super) fn settle(&self, settings: &BreakerSettings, now: Instant) {
        if self.closed_epoch().is_none() {
            let core = self.core.lock();
            let shut = !core.admits(settings, false, now);
            self.mark(&core, shut);
        }
    }

    /// Opens it until it is reset.
    pub(super) fn force_open(&self, settings: &BreakerSettings, now: Instant) -> Option<Transition> {
        self.change(settings, |core| core.force_open(now))
    }

    /// Makes it as new. What began before does not count.
    pub(super) fn reset(&self, settings: &BreakerSettings, now: Instant) -> Option<Transition> {
        self.change(settings, |core| core.reset(settings, now))
    }

    pub(super) fn state(&self, now: Instant) -> CircuitState {
        match self.closed_epoch() {
            Some(_) => CircuitState::Closed,
            None => self.core.lock().state_at(now),
        }
    }

    /// Whether panic mode would let requests pass: the failure rate opened it, and it is not closed again.
    pub(super) fn opened_by_rate(&self) -> bool {
        self.closed_epoch().is_none() && self.core.lock().opened_by_rate()
    }

    /// How long it stays open; zero while half-open, `None` while forced open or closed.
    pub(super) fn retry_after(&self, now: Instant) -> Option<Duration> {
        self.core.lock().retry_after(now)
    }

    pub(super) fn stats(&self, now: Instant) -> BreakerStats {
        self.core.lock().stats(now)
    }

    fn change<T>(&self, settings: &BreakerSettings, change: impl FnOnce(&mut Core) -> T) -> T {
        let mut core = self.core.lock();
        let result = change(&mut core);
        // Reports change it seldom: others who only look keep their copy of it.
        if self.gate.load(Ordering::Relaxed) != core.gate() {
            self.gate.store(core.gate(), Ordering::Release);
        }
        self.mark(&core, core.is_shut(settings));
        result
    }

    /// Marks the account. An open breaker is one to look at again when its time is up.
    fn mark(&self, core: &Core, shut: bool) {
        self.account.mark(Entry::SHUT, shut);
        if let Some(at) = core.open_until().filter(|_| shut) {
            self.account.is_due_at(at);
        }
    }

    fn closed_epoch(&self) -> Option<u64> {
        Core::closed_epoch(self.gate.load(Ordering::Acquire))
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

//! A request's hold on a worker: its place among the requests in flight and the breaker's permit.
//!
//! Both come back on any end, once: [`Lease::end`] reports how the attempt ended; a lease that is dropped says nothing
//! about the worker.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::Instant;

use super::breaker::{CircuitState, Permit, Verdict};
use super::selection::{LeftOut, Query};
use super::sessions::Binding;
use super::worker::{Carrier, Worker};
use crate::error::{BreakerEffect, ControllerErrorCode};
use crate::signal::Signal;
use crate::sync::Mutex;
use crate::wire::{Feature, PrefixHashes, WorkerId};

/// How an attempt ended, as far as the worker is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The answer came, to its end.
    Success,
    /// It failed; what the breaker makes of it is [`ControllerErrorCode::breaker_effect`].
    Failure(ControllerErrorCode),
    /// It says nothing about the worker.
    Ignored,
}

/// Why a worker was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Choice {
    /// By the strategy.
    Strategy,
    /// By `prefix_aware`: it most likely holds most of the prompt in its cache.
    Prefix,
    /// The session belongs to it.
    Affinity,
    /// By rendezvous hashing: the session is new, or its worker cannot take the request.
    Rendezvous,
    /// The caller named it.
    Named,
}

/// A worker's promise to take one request. Send it, tell the first token, and [`end`](Self::end) it.
#[derive(Debug)]
pub struct Lease {
    worker: Arc<Worker>,
    presence: u64,
    /// That of the presence, once somebody asked for it.
    gone: OnceLock<Signal>,
    choice: Choice,
    since: Instant,
    progress: Mutex<Progress>,
    /// The session that moves here with a success, and from whom.
    moves: Option<Box<(Box<str>, Binding)>>,
    /// What the worker holds in its cache once it has begun to answer.
    prompt: Option<PrefixHashes>,
    /// It ended as a probe, whose place is another's.
    was_probe: bool,
}

#[derive(Debug)]
struct Progress {
    permit: Option<Permit>,
    first_token: bool,
}

// === impl Lease ===

impl Lease {
    /// The caller has taken a place in the worker's load.
    pub(super) fn new(worker: Arc<Worker>, presence: u64, choice: Choice, now: Instant) -> Self {
        let progress = Mutex::new(Progress { permit: None, first_token: false });
        Self {
            worker,
            presence,
            gone: OnceLock::new(),
            choice,
            since: now,
            progress,
            moves: None,
            prompt: None,
            was_probe: false,
        }
    }

    /// The breaker let the request through.
    pub(super) fn hold(&mut self, permit: Permit) {
        self.progress.get_mut().permit = Some(permit);
    }

    /// A success moves this session here.
    pub(super) fn moves_with_success(&mut self, session: &str, from: Binding) {
        self.moves = Some(Box::new((session.into(), from)));
    }

    /// The worker will hold this prompt in its cache.
    pub(super) fn teaches(&mut self, prompt: &PrefixHashes) {
        self.prompt = Some(prompt.clone());
    }

    pub(super) fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }

    /// Who takes the request.
    #[must_use]
    pub fn worker_id(&self) -> &WorkerId {
        &self.worker.id
    }

    /// Which life of it; empty for workers of the older dialect.
    #[must_use]
    pub fn incarnation(&self) -> &str {
        &self.worker.incarnation
    }

    /// Who carries the request there.
    #[must_use]
    pub fn carrier(&self) -> Carrier {
        self.worker.carrier
    }

    /// Whether the worker speaks the older dialect.
    #[must_use]
    pub fn is_legacy(&self) -> bool {
        self.worker.legacy
    }

    /// Whether the worker can do this.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        self.worker.has(feature)
    }

    /// Whether the worker said that it is loading this model.
    #[must_use]
    pub fn is_loading(&self, model: &str) -> bool {
        self.worker.live().loading.iter().any(|loading| loading == model)
    }

    /// Fires when the worker goes offline, is removed, or is replaced; deregistering does not fire it.
    #[must_use]
    pub fn gone(&self) -> &Signal {
        self.gone.get_or_init(|| self.worker.gone(self.presence))
    }

    /// Why this worker was chosen.
    #[must_use]
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// Who was no candidate for this query beside the chosen worker, and why. It looks at all who serve the model, and
    /// allocates nothing where all were candidates.
    #[must_use]
    pub fn left_out(&self, query: &Query<'_>, now: Instant) -> Vec<(WorkerId, LeftOut)> {
        self.worker.hub.left_out(query, Some(&self.worker), now)
    }

    /// The first token came, so long after the request was sent. For a probe of a half-open breaker this is its success.
    pub fn first_token(&self, ttft: Duration, now: Instant) {
        let hub = &self.worker.hub;
        let mut was_probe = false;
        let transition = {
            let mut progress = self.progress.lock();
            if std::mem::replace(&mut progress.first_token, true) {
                return;
            }
            self.worker.load.observe(ttft, now);
            self.worker.breaker().zip(progress.permit.as_mut()).and_then(|((breaker, settings), permit)| {
                was_probe = permit.is_probe();
                breaker.first_token(settings, permit, ttft, now)
            })
        };
        hub.tell_breaker(&self.worker, transition);
        if was_probe {
            hub.capacity_freed.notify_waiters();
        }
        self.teach(now);
    }

    fn teach(&self, now: Instant) {
        if let Some(prompt) = &self.prompt {
            self.worker.hub.learn(prompt.hashes().iter().copied(), &self.worker, now);
        }
    }

    /// The worker asked to be left alone for so long: until then it has no room for anybody.
    pub fn hold_back(&self, span: Duration, now: Instant) {
        self.worker.load.hold_back(span, now);
    }

    /// The attempt ended. Gives back everything that the lease holds before it returns; true when this end opened the
    /// breaker.
    pub fn end(mut self, outcome: Outcome, now: Instant) -> bool {
        let first_token = self.progress.get_mut().first_token;
        let verdict = match outcome {
            Outcome::Success => Verdict::Success,
            Outcome::Failure(code) => Verdict::Effect(code.breaker_effect()),
            Outcome::Ignored => Verdict::Effect(BreakerEffect::Ignored),
        };
        match verdict {
            Verdict::Success if !first_token => {
                self.worker.load.observe(now.saturating_duration_since(self.since), now);
                self.teach(now);
            }
            Verdict::Effect(BreakerEffect::Failure | BreakerEffect::RateOnly) => self.worker.load.observe_failure(now),
            _ => {}
        }
        let permit = self.progress.get_mut().permit.take();
        self.was_probe = permit.as_ref().is_some_and(Permit::is_probe);
        let transition = self
            .worker
            .breaker()
            .zip(permit)
            .and_then(|((breaker, settings), permit)| breaker.report(settings, permit, verdict, &self.worker.hub.dice, now));
        if let Some(moves) = self.moves.take().filter(|_| verdict == Verdict::Success) {
            let (session, from) = *moves;
            self.worker.hub.move_session(&session, &from, &self.worker, now);
        }
        let told = transition.map(|transition| (transition, self.worker.clone()));
        drop(self);
        told.is_some_and(|(transition, worker)| {
            worker.hub.tell_breaker(&worker, Some(transition)) && transition.to == CircuitState::Open
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(permit) = &mut self.progress.get_mut().permit {
            self.was_probe = permit.is_probe();
            if let Some((breaker, settings)) = self.worker.breaker() {
                breaker.release(settings, permit);
            }
        }
        // A place that others could have had before is no news to those who wait.
        if self.worker.load.leave() || self.was_probe {
            self.worker.hub.capacity_freed.notify_waiters();
        }
    }
}

// === impl Choice ===

impl Choice {
    /// The choice as it is written in metadata and logs: `affinity`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Strategy => "strategy",
            Self::Prefix => "prefix",
            Self::Affinity => "affinity",
            Self::Rendezvous => "rendezvous",
            Self::Named => "named",
        }
    }
}
